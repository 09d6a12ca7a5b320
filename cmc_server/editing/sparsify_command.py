"""``cmc-server sparsify``: prune a checkpoint's linear layers, tune what is left, and write it with its masks."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmc_server import __version__
from cmc_server.editing.checkpoint import Checkpoint
from cmc_server.editing.mask_file import write_masks
from cmc_server.editing.methods import Method
from cmc_server.editing.runs import check_finite, identity, output_folder, progress, result_of, run_dry, write_weights
from cmc_server.editing.sources import Sources
from cmc_server.editing.sparsify import Sparsification
from cmc_server.editing.sparsify_inputs import SparsifyInputs
from cmc_server.editing.sparsify_options import SparsifyOptions
from cmc_server.editing.stream import Edit
from cmc_server.editing.writing import check_output, check_record

_ASTRAY = "MODEL is broken, or tuning has gone astray; lower --learning-rate or --scale if it was tuned"


class Replacement(Method):
    """Weights that were computed elsewhere, written as an edit is: the pieces are what was measured."""

    dims = (2, 2)

    def measured_rows(self, measured: Any, rows: slice) -> Any:
        """Some rows of the new weight."""
        return measured[rows]

    def apply(self, deltas: Sequence[Tensor], measured: Any, generator: torch.Generator) -> Tensor:
        """The new weight instead of the old one."""
        new: Tensor = measured
        return new


def run_sparsify(options: SparsifyOptions, as_json: bool = False) -> int:
    """Sparsify a checkpoint. Progress goes to stderr, the report to stdout.

    Args:
        options: what to do.
        as_json: print the report as one JSON object instead of as text.

    Returns:
        The exit code, 0.

    Raises:
        EditingError: the checkpoint cannot be read or pruned, or the output not be written.
        ConfigError: data cannot be used.
    """
    sources = Sources(None, (Checkpoint(options.model),), options.only, options.exclude)
    if options.output is not None:
        read = [options.model, options.calibrate, options.tuning_data, options.heldout]
        check_output(options.output, read, force=options.force, dry_run=options.dry_run)
    check_record(options.model)
    inputs = SparsifyInputs(options, sources)
    report = _describe(options, inputs)
    done = Sparsification(inputs).run()
    edit = Edit(Sources(None, sources.posts, only=tuple(done.weights)), Replacement(), options.seed, done.weights)
    if options.dry_run or options.output is None:
        run_dry(edit)
        report["result"] = _result(edit, done.figures)
    else:
        folder = output_folder(sources.post, options.output, report, force=options.force)
        with folder as part, progress(sources, "write") as advance:
            write_weights(edit, part, advance)
            write_masks(part, done.masks)
            report["result"] = _result(edit, done.figures)
    sys.stdout.write(json.dumps(report, ensure_ascii=False, allow_nan=False) + "\n" if as_json else _text(report))
    return 0


def _describe(options: SparsifyOptions, inputs: SparsifyInputs) -> dict[str, Any]:
    """What is done to what: with the result, the provenance of the output."""
    described: dict[str, Any] = {
        "cmc_server": __version__,
        "method": options.method,
        "model": identity(inputs.checkpoint),
        "sparsity": options.final_sparsity,
        "seed": options.seed,
    }
    if options.pattern is not None:
        described["pattern"] = options.pattern
    for name in ("only", "exclude"):
        if getattr(options, name):
            described[name] = list(getattr(options, name))
    if options.calibrate is not None:
        shape = [len(inputs.sequences), inputs.sequences[0].shape[1]]
        described["calibration"] = {"data": options.calibrate.name, "sequences": shape[0], "length": shape[1]}
    if options.allocation != "uniform":
        described["allocation"] = {"by": options.allocation, "spread": options.spread, "beta": options.beta}
    if options.tuning != "none":
        described["iterations"], data = options.num_rounds, _name(options.tuning_data)
        described["tuning"] = {"method": options.tuning, "data": data, "options": options.build_tuning().model_dump()}
    if options.heldout is not None:
        described["heldout"] = options.heldout.name
    return described


def _name(path: Path | None) -> str | None:
    return None if path is None else path.name


def _result(edit: Edit, figures: dict[str, Any]) -> dict[str, Any]:
    result = result_of(edit)
    del result["delta_parameters"]  # the weights, which the figures count
    result |= figures
    check_finite(result, _ASTRAY, "result")
    return result


def _text(report: Mapping[str, Any]) -> str:
    result = report["result"]
    what = f"{report['pattern']} " if "pattern" in report else ""
    lines = [
        f"{report['method']}: {what}{result['dropped']:,} of {result['weights']:,} weights pruned "
        f"({result['sparsity']:.4g}; {result['share_of_model']:.4g} of the model), {result['edited_tensors']} tensors "
        f"({result['copied_tensors']} copied)",
    ]
    if "calibration" in report:
        shape = report["calibration"]
        lost = {name: one["reconstruction_loss"] for name, one in result["layers"].items()}
        mean, worst = sum(lost.values()) / len(lost), max(lost, key=lambda name: lost[name])
        lines += [
            f"calibrated on {shape['sequences']} sequences of {shape['length']} tokens",
            f"reconstruction loss of layers: {mean:.4g} in the mean, most {lost[worst]:.4g} ({worst})",
        ]
    if "blocks" in result:
        lines.append("sparsity of blocks: " + ", ".join(f"{one['sparsity']:.4g}" for one in result["blocks"].values()))
    if "tuning" in report:
        lines += _tuned(report["tuning"]["method"], result["rounds"])
    lines += [f"loss {stage}: {loss:.4f} nats per token" for stage, loss in result.get("losses", {}).items()]
    lines += ["", f"written to {report['output']}" if "output" in report else "dry run: nothing was written"]
    return "\n".join(lines) + "\n"


def _tuned(method: str, rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    last = rounds[-1]
    head = f"tuned by {method}"
    return [
        *(
            f"{head}, sparsity {one['sparsity']:.4g}: {one['parameters']:,} parameters, {one['examples']} texts in "
            f"{one['steps']} steps, loss {one['loss'][0]:.4f} to {one['loss'][1]:.4f}"
            for one in rounds
        ),
        f"interference {last['interference']:.4g} (of a dense change {last['dense_interference']:.4g}), "
        f"merge gap {last['merge_gap']:.4g} nats per token",
    ]
