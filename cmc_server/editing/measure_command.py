"""``cmc-server merge measure``: the curvature of a checkpoint on data, computed after training and kept in a file."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from cmc_server.editing.checkpoint import Checkpoint
from cmc_server.editing.curvature import CurvatureFile, CurvatureOrigin, Kind, write_curvature
from cmc_server.editing.fisher import diagonal_fisher
from cmc_server.editing.gram import gram_matrices
from cmc_server.editing.models import load_model
from cmc_server.editing.places import check_not_read, place_of
from cmc_server.editing.texts import encode_all, read_texts
from cmc_server.errors import ConfigError, EditingError


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """Settings of one measurement.

    Args:
        model: folder of a causal language model.
        data: JSON lines, see :mod:`cmc_server.editing.texts`.
        output: file to write.
        kind: ``fisher``, or ``gram`` for RegMean.
        examples: use only the first so many; None takes all.
        dataset_size: N that the model was trained on; None takes the number of records in the file.
        seed: of the labels that the model draws.
        force: replace a curvature file at ``output``.

    Raises:
        ConfigError: a value is out of range.
    """

    model: Path
    data: Path
    output: Path
    kind: Kind = "fisher"
    examples: int | None = None
    dataset_size: int | None = None
    seed: int = 0
    force: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("fisher", "gram"):
            raise ConfigError(f"There is no curvature of kind {self.kind!r}; choose fisher or gram.")
        for name in ("examples", "dataset_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1.")


def run_measure(options: MeasureOptions, as_json: bool = False) -> int:
    """Measure, and write the file. Progress goes to stderr, the report to stdout.

    Args:
        options: what to do.
        as_json: print the report as one JSON object instead of as text.

    Returns:
        The exit code, 0.

    Raises:
        EditingError: the model cannot be used, the file exists or cannot be written, or a gradient is not finite.
        ConfigError: the data cannot be used.
    """
    _check_output(options)
    checkpoint = Checkpoint(options.model)
    texts = read_texts(options.data)
    model = load_model(checkpoint, torch.float32)
    limit = getattr(model.config, "max_position_embeddings", None)
    examples = encode_all(options.model, texts[: options.examples], limit)
    if options.kind == "fisher":
        measured, made = diagonal_fisher(model, examples, options.seed), f"sampled labels, seed {options.seed}"
    else:
        measured, made = gram_matrices(model, examples), "inputs of linear layers"
    own = {name: measured[name] for name in checkpoint.names if name in measured}
    broken = [name for name, tensor in own.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise EditingError(f"The {options.kind} of {broken[0]} is not finite; {options.model} is broken, or overflows.")
    size = options.dataset_size or len(texts)
    origin = CurvatureOrigin(options.kind, made, len(examples), size, checkpoint.file_hashes())
    _check_output(options)  # once more: measuring took its time
    write_curvature(place_of(options.output), own, origin)
    report = asdict(origin) | {"tensors": len(own), "output": str(options.output)}
    sys.stdout.write(json.dumps(report) + "\n" if as_json else _text(report))
    return 0


def _check_output(options: MeasureOptions) -> None:
    output, place = options.output, place_of(options.output)
    check_not_read(output, (options.model, options.data))
    if not place.exists():
        return
    if not place.is_file() or not options.force:
        raise EditingError(f"The output {output} exists; give another file, or --force to replace a curvature file.")
    try:
        CurvatureFile(place)
    except EditingError:
        raise EditingError(
            f"{output} is no curvature file, so that --force does not replace it; give another file."
        ) from None


def _text(report: dict[str, object]) -> str:
    return (
        f"{report['kind']} of {report['tensors']} tensors ({report['made']}), {report['num_examples']} examples, "
        f"data set of {report['dataset_size']}\n\nwritten to {report['output']}\n"
    )
