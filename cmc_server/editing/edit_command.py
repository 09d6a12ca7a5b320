"""``cmc-server edit``: edit what training changed in a checkpoint, and write, measure or pack the result."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cmc_server import __version__
from cmc_server.editing.checkpoint import Checkpoint
from cmc_server.editing.dare import edit_intensity
from cmc_server.editing.edit_options import EditOptions
from cmc_server.editing.methods import BitDelta, Dare
from cmc_server.editing.packed import packed_header, write_packed
from cmc_server.editing.runs import check_finite, identity, output_folder, progress, result_of, run_dry, write_weights
from cmc_server.editing.sources import Sources
from cmc_server.editing.stream import Edit
from cmc_server.editing.writing import check_output, check_record
from cmc_server.errors import EditingError

_TOO_LARGE = "the edited weights are too large to be measured; give --alpha, --factor or --k nearer to 0"


def run_edit(options: EditOptions, as_json: bool = False) -> int:
    """Edit a checkpoint. Progress goes to stderr, the report to stdout.

    Args:
        options: what to do.
        as_json: print the report as one JSON object instead of as text.

    Returns:
        The exit code, 0.

    Raises:
        EditingError: a checkpoint cannot be read or edited, or the output not be written.
        ConfigError: data cannot be used.
    """
    sources = Sources(
        base=None if options.zero_base else Checkpoint(Path(options.base)),
        posts=tuple(Checkpoint(path) for path in (options.post, *options.others)),
        only=options.only,
        exclude=options.exclude,
    )
    if options.output is not None:
        read = [*(one.folder for one in sources.checkpoints), options.calibrate, options.analyse]
        check_output(options.output, read, force=options.force, dry_run=options.dry_run)
    check_record(sources.post.folder)
    _check_taken(options, sources)
    scales = _scales(options, sources)
    report = _describe(options, sources)
    if options.analyse is not None:
        report["analysis"] = _analyse(options, options.analyse, Edit(sources, options.build(), options.seed, scales))
        check_finite(report["analysis"], _TOO_LARGE, "analysis")
    edit = Edit(sources, options.build(), options.seed, scales)
    header = None
    if options.packed:
        header, size = packed_header(edit)
        elements = sum(sources.post.stored(name).num_elements for name in sources.post.names)
        report["packed"] = {"bytes": size, "share_of_float16": size / (2 * elements)}
    if options.dry_run or options.output is None:
        run_dry(edit)
        report["result"] = _result(edit)
    else:
        _write(options, options.output, edit, header, report)
    sys.stdout.write(json.dumps(report, ensure_ascii=False, allow_nan=False) + "\n" if as_json else _text(report))
    return 0


def _check_taken(options: EditOptions, sources: Sources) -> None:
    method = options.build()
    if not any(sources.is_edited(name, method) for name in sources.post.names):
        raise EditingError(
            f"--method {options.method} takes none of the tensors of {sources.post.folder} that --only and --exclude "
            "leave; give other patterns."
        )


def _scales(options: EditOptions, sources: Sources) -> dict[str, torch.Tensor] | None:
    """The scales of every tensor of a one-bit BitDelta that is packed or calibrated; None for any other edit."""
    method = options.build()
    if not isinstance(method, BitDelta) or not (options.packed or options.calibrate):
        return None
    edit = Edit(sources, method, options.seed)
    scales = {name: edit.measure(name) for name in edit.edited_names()}
    if options.calibrate is None:
        return scales
    from cmc_server.editing.calibration import calibrate_scales
    from cmc_server.editing.texts import read_texts

    return calibrate_scales(
        edit, scales, read_texts(options.calibrate), options.calibration_steps, options.calibration_rate, options.seed
    )


def _analyse(options: EditOptions, data: Path, edit: Edit) -> dict[str, Any]:
    from cmc_server.editing.analysis import analyse_edit
    from cmc_server.editing.texts import read_texts

    return analyse_edit(edit, read_texts(data)[: options.analyse_examples], options.mask_seeds)


def _write(options: EditOptions, output: Path, edit: Edit, header: bytes | None, report: dict[str, Any]) -> None:
    """Write the edited weights, packed if there is a header for that."""
    folder = output_folder(edit.sources.post, output, report, force=options.force)
    with folder as part, progress(edit.sources, "edit") as advance:
        if header is None:
            write_weights(edit, part, advance)
        else:
            write_packed(edit, header, part, advance)
        report["result"] = _result(edit)


def _result(edit: Edit) -> dict[str, Any]:
    result = result_of(edit)
    check_finite(result, _TOO_LARGE, "result")
    return result


def _describe(options: EditOptions, sources: Sources) -> dict[str, Any]:
    """What is done to what: with the result, the provenance of the output."""
    method = options.build()
    described: dict[str, Any] = {
        "cmc_server": __version__,
        "method": options.method,
        "options": method.model_dump(),
        "base": identity(sources.base),
        "post": identity(sources.post),
    }
    if isinstance(method, Dare):
        described["edit_intensity"] = edit_intensity(method.drop, method.k)
    if options.others:
        described["with"] = [identity(other) for other in sources.posts[1:]]
    if method.draws or options.calibrate is not None:
        described["seed"] = options.seed
    for name in ("only", "exclude"):
        if getattr(options, name):
            described[name] = list(getattr(options, name))
    if options.calibrate is not None:
        described["calibration"] = {
            "data": options.calibrate.name,
            "steps": options.calibration_steps,
            "learning_rate": options.calibration_rate,
        }
    return described


def _text(report: Mapping[str, Any]) -> str:
    result = report["result"]
    lines = [
        f"{report['method']} of {result['edited_tensors']} tensors ({result['copied_tensors']} copied), "
        f"{result['delta_parameters']:,} delta parameters, norm {result['norm_before']:.6g} before "
        f"and {result['norm_after']:.6g} after",
    ]
    if "edit_intensity" in report:
        lines.append(f"edit intensity (k - 1)^2 p / (1 - p): {report['edit_intensity']:.4g}")
    if "packed" in report:
        packed = report["packed"]
        lines.append(f"packed into {packed['bytes']:,} bytes, {packed['share_of_float16']:.4f} of float16")
    if "analysis" in report:
        from cmc_server.editing.analysis import analysis_table

        lines += ["", *analysis_table(report["analysis"])]
    lines += ["", f"written to {report['output']}" if "output" in report else "dry run: nothing was written"]
    return "\n".join(lines) + "\n"
