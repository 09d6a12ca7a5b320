"""What a run of ``edit``, ``merge`` or ``sparsify`` does besides its arithmetic: progress, output, record."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfile
from typing import Any

from tqdm import tqdm

from cmc_server.editing.checkpoint import INDEX, Checkpoint
from cmc_server.editing.edit_options import ZERO
from cmc_server.editing.parts import part_folder
from cmc_server.editing.sources import Sources
from cmc_server.editing.stream import Edit, write_edited
from cmc_server.editing.writing import copy_companions, write_provenance
from cmc_server.errors import EditingError


def identity(checkpoint: Checkpoint | None) -> Any:
    """What a record says of a checkpoint: its folder's name and a fingerprint; ``zero`` of none."""
    if checkpoint is None:
        return ZERO
    return {"folder": checkpoint.folder.resolve().name, "fingerprint": checkpoint.fingerprint()}


def result_of(edit: Edit) -> dict[str, Any]:
    """Figures of an edit that has run."""
    totals = edit.totals
    return {
        "edited_tensors": totals.tensors,
        "copied_tensors": len(edit.sources.layout.names) - totals.tensors,
        "delta_parameters": totals.elements,
        "norm_before": math.sqrt(totals.squares_before),
        "norm_after": math.sqrt(totals.squares_after),
    }


@contextmanager
def progress(sources: Sources, label: str) -> Iterator[Callable[[int], object]]:
    """A bar on stderr over the bytes of a checkpoint."""
    with tqdm(total=sources.layout.num_bytes, desc=label, unit="B", unit_scale=True, file=sys.stderr) as bar:
        yield bar.update


def run_dry(edit: Edit) -> None:
    """Compute everything and write nothing."""
    with progress(edit.sources, "dry run") as advance:
        for piece in edit.tensors(edit.sources.layout.names):
            advance(piece.nbytes)


@contextmanager
def output_folder(source: Checkpoint, output: Path, report: dict[str, Any], *, force: bool) -> Iterator[Path]:
    """A folder to write weights into that becomes the output, with everything else that belongs to a checkpoint.

    Args:
        source: whose companions are copied.
        output: the folder to write.
        report: recorded in the output once the weights are written.
        force: whether a checkpoint that lies there may be replaced.
    """
    with part_folder(output, force=force) as part:
        copy_companions(source.folder, part)
        yield part
        write_provenance(part, report)
    report["output"] = str(output)


def write_weights(edit: Edit, folder: Path, advance: Callable[[int], object]) -> None:
    """Weights, with their index if they have one, in the layout of :attr:`Sources.layout`."""
    write_edited(edit, folder, advance)
    index = edit.sources.layout.folder / INDEX
    if index.exists():
        copyfile(index, folder / INDEX)


def check_finite(report: Any, advice: str, place: str = "") -> None:
    """Refuse a report with NaN or infinity in it, which is worth nothing, and which no other JSON parser reads.

    Args:
        report: JSON values.
        advice: the end of the sentence: what may be wrong, and what to do.
        place: of these values in the whole report.

    Raises:
        EditingError: as said; names the first such number.
    """
    if isinstance(report, float) and not math.isfinite(report):
        raise EditingError(f"{place} came out as {report}: {advice}.")
    if isinstance(report, Mapping):
        for name, value in report.items():
            check_finite(value, advice, f"{place}.{name}" if place else str(name))
    elif isinstance(report, list | tuple):
        for index, value in enumerate(report):
            check_finite(value, advice, f"{place}[{index}]")
