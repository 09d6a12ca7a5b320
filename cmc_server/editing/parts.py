"""A hidden folder beside an output, of one run at a time, that takes the output's place whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from cmc_server.editing.places import HIDDEN, beside, check_replaceable, place_of
from cmc_server.errors import EditingError
from cmc_server.locks import exclusive


@contextmanager
def part_folder(output: Path, *, force: bool) -> Iterator[Path]:
    """A hidden folder beside the output, which takes its place once everything is written.

    After an error or an interruption it is removed. If the process was killed it stays, hidden, until the next run of
    the same output.

    Args:
        output: to write; of a symbolic link, its target is written.
        force: whether a checkpoint that lies there may be replaced at the end.

    Raises:
        EditingError: the folder cannot be written or replaced, or another run is writing it.
    """
    place = place_of(output)
    part = beside(place, "part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _locked(place):
            _tidy(place)
            check_replaceable(output, force=force)
            try:
                part.mkdir()
                yield part
                for path in part.rglob("*"):
                    if path.is_file():
                        _synchronise(path)
                check_replaceable(output, force=force)  # once more: writing took its time
                _publish(part, place)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise EditingError(f"The output folder {output} cannot be written: {error}.") from None


def settle(output: Path) -> None:
    """Put right what a killed run of the same output has left, such as the old output under a hidden name.

    Args:
        output: to write.

    Raises:
        EditingError: another run is writing it.
    """
    place = place_of(output)
    if any(os.path.lexists(beside(place, kind)) for kind in HIDDEN):
        with _locked(place):
            _tidy(place)


def _tidy(place: Path) -> None:
    _remove(beside(place, "part"))
    old = beside(place, "old")
    if old.exists() and not place.exists():  # a run was killed between the two renamings of _publish
        old.rename(place)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _publish(part: Path, place: Path) -> None:
    old = beside(place, "old")
    try:
        if place.exists():
            place.rename(old)
        part.rename(place)
    except BaseException:
        if old.exists() and not place.exists():
            old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _locked(place: Path) -> AbstractContextManager[None]:
    """Keep other runs from a place; the part folder would not do, since it is gone before the run is."""
    busy = EditingError(f"Another run is writing {place}; wait for its end, or give another output.")
    return exclusive(beside(place, "lock"), busy)


def _synchronise(path: Path) -> None:
    """Wait until a file is on the disk, so that not even a power failure leaves half of it under the final name."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
