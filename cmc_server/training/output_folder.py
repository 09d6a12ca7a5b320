"""Where a delta may be written: into a folder, by one run at a time, and never over what its training reads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from cmc_server.errors import ConfigError
from cmc_server.locks import exclusive
from cmc_server.training.checkpoints import working_folder
from cmc_server.training.data import local_or_hub
from cmc_server.training.recipes import Recipe

#: Where a delta's curvature lies in its folder; beside weights that it was not measured on it is worth nothing.
CURVATURE_FILE = Path("curvature") / "fisher.safetensors"
#: Other ways to store weights, which a delta's ``model.safetensors`` would contradict.
_STALE = (Path("packed.safetensors"), Path("model.safetensors.index.json"), CURVATURE_FILE)


def check_output(folder: Path, read: Iterable[Path]) -> None:
    """Refuse an output that cannot be written, or whose writing would destroy what is read.

    Args:
        folder: the delta folder to write; its working folder beside it is removed when the run ends.
        read: files and folders, perhaps some that do not exist.

    Raises:
        ConfigError: the output is no folder or cannot be written, or it or its working folder is or holds one of them.
    """
    try:
        place = folder.resolve()
        _check_writable(folder, place)
        taken = (place, working_folder(folder).resolve(), _beside(place, "part"))
        for path in read:
            if path.exists() and any(path.resolve().is_relative_to(one) for one in taken):
                raise ConfigError(
                    f"Writing the output folder {folder} would destroy {path}, which the training reads; "
                    "give another output.folder or --output."
                )
    except (OSError, RuntimeError, ValueError) as error:  # such as links in a circle, or a name that is too long
        raise ConfigError(
            f"The output folder {str(folder)!r} cannot be used ({error}); give another output.folder or --output."
        ) from None


def held(folder: Path) -> AbstractContextManager[None]:
    """Keep other runs from an output, which :func:`check_output` has passed, while this one works on it.

    Raises:
        ConfigError: another run has it, or no folder for it can be made.
    """
    path = _beside(folder.resolve(), "lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"The output folder {folder} cannot be made ({error}); give another --output.") from None
    return exclusive(path, ConfigError(f"Another run is writing {folder}; wait for its end, or give another --output."))


@contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """A hidden folder to write a delta into, whose files are moved to their place once all of them are written.

    Other files of the place stay as they are. What a killed run left is removed by the next one.

    Args:
        folder: the delta folder, held by this run.
    """
    place = folder.resolve()
    part = _beside(place, "part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        place.mkdir(exist_ok=True)
        for stale in _STALE:
            (place / stale).unlink(missing_ok=True)
        for path in sorted(path for path in part.rglob("*") if path.is_file()):
            path.chmod(0o644)  # some writers leave a file readable by its owner only; a server may run as another user
            target = place / path.relative_to(part)
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def paths_read(recipe: Recipe, base: Path, template_paths: Sequence[str]) -> Iterator[Path]:
    """What a run reads, if it is local; hub ids come as paths that do not exist.

    Args:
        recipe: a valid recipe.
        base: folder that the recipe's paths are relative to.
        template_paths: of the template LLMs, as they are loaded.
    """
    yield from map(Path, template_paths)
    for name in (recipe.delta.start_from, getattr(recipe.objective, "tuned", None)):
        if name is not None:
            yield Path(local_or_hub(name, base))
    for source in recipe.data.sources.values():
        yield base / source.file if source.file is not None else Path(local_or_hub(str(source.dataset), base))


def _beside(place: Path, kind: str) -> Path:
    return place.with_name(f".{place.name}.{kind}")


def _check_writable(folder: Path, place: Path) -> None:
    """The output, or the nearest folder above it that exists, takes new files."""
    nearest = next(path for path in (place, *place.parents) if path.exists())
    if not nearest.is_dir():
        raise ConfigError(f"The output folder {folder} cannot be made, since {nearest} is a file; give another one.")
    if folder.is_symlink() and not place.exists():
        raise ConfigError(f"The output folder {folder} is a link to {place}, which does not exist; give another one.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"The output folder {folder} cannot be written; give another one, or its owner's rights.")
