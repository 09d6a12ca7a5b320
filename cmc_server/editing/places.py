"""Where an output may lie: never on anything that is read, and in place of a checkpoint only when that is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cmc_server.editing.mask_file import MASKS
from cmc_server.errors import EditingError

#: Hidden names beside an output: of what is written, of what it replaces, and of the lock of a run.
HIDDEN = ("part", "old", "lock")
TEMPLATES = "additional_chat_templates"
#: Folders that a checkpoint may hold.
_FOLDERS = (TEMPLATES, MASKS.parts[0])


def place_of(output: Path) -> Path:
    """Where an output really lies: the target of a symbolic link, which itself is never replaced.

    Raises:
        EditingError: there is no such place, as with links in a circle.
    """
    try:
        return output.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise EditingError(f"The output {str(output)!r} cannot be used: {error}; give another one.") from None


def beside(place: Path, kind: str) -> Path:
    """The hidden name of a kind, one of :data:`HIDDEN`, of a place."""
    return place.parent / f".{place.name}.{kind}"


def check_not_read(output: Path, read: Iterable[Path]) -> None:
    """Refuse an output whose writing would remove something that is read.

    Args:
        output: file or folder to write.
        read: files and folders.

    Raises:
        EditingError: the output, or a hidden name beside it, is one of them or holds it.
    """
    place = place_of(output)
    taken = (place, *(beside(place, kind) for kind in HIDDEN))
    for path in read:
        if any(path.resolve().is_relative_to(one) for one in taken):
            raise EditingError(f"Writing {output} would remove {path}, which is read; give another output.")


def check_replaceable(output: Path, *, force: bool) -> None:
    """Refuse to replace a folder unless that is asked for and the folder is a checkpoint, or empty.

    Args:
        output: folder to write.
        force: whether a checkpoint may be replaced.

    Raises:
        EditingError: there is something that must stay.
    """
    place = place_of(output)
    if not place.exists():
        return
    if not force:
        raise EditingError(f"The output folder {output} exists; give another one, or --force to replace it.")
    reason = _reason_to_stay(place)
    if reason is not None:
        raise EditingError(f"{output} {reason}, so that --force does not replace it; give another folder.")


def _reason_to_stay(place: Path) -> str | None:
    if not place.is_dir():
        return "is not a checkpoint folder"
    content = sorted(place.iterdir())
    if not content:
        return None
    if not (place / "config.json").is_file() or not any(path.suffix == ".safetensors" for path in content):
        return "is not a checkpoint folder with config.json and safetensors"
    # Such as the checkpoints of a training run, or a repository's history.
    more = [path.name for path in content if path.is_dir() and path.name not in _FOLDERS]
    return f"holds {more[0]}{f' and {len(more) - 1} more folders' if more[1:] else ''}" if more else None
