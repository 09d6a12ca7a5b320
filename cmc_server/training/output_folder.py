"""Where a delta may be written: into a folder, and never over anything that its training reads."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cmc_server.errors import ConfigError
from cmc_server.training.checkpoints import working_folder
from cmc_server.training.data import local_or_hub
from cmc_server.training.recipes import Recipe


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
        taken = (place, working_folder(folder).resolve())
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


def _check_writable(folder: Path, place: Path) -> None:
    """The output, or the nearest folder above it that exists, takes new files."""
    nearest = next(path for path in (place, *place.parents) if path.exists())
    if not nearest.is_dir():
        raise ConfigError(f"The output folder {folder} cannot be made, since {nearest} is a file; give another one.")
    if folder.is_symlink() and not place.exists():
        raise ConfigError(f"The output folder {folder} is a link to {place}, which does not exist; give another one.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"The output folder {folder} cannot be written; give another one, or its owner's rights.")
