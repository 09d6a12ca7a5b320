"""The working folder of a run: a run that was killed goes on from its last complete checkpoint."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from cmc_server.errors import ConfigError

_RUN_FILE = "run.json"
#: The Trainer writes it last, and removes older checkpoints only afterwards.
_STATE_FILE = "trainer_state.json"


def working_folder(output: Path) -> Path:
    """Where the checkpoints of a run lie: beside the delta folder that it writes."""
    output = output.absolute()
    return output.with_name(f".{output.name}.training")


def last_checkpoint(folder: Path, run: str, *, restart: bool = False) -> Path | None:
    """The checkpoint to go on from.

    Args:
        folder: as :func:`working_folder` gives it, perhaps not there yet.
        run: hash of all that decides the result of the run.
        restart: take none.

    Returns:
        The newest complete checkpoint of this run, or None.

    Raises:
        ConfigError: the folder holds the checkpoints of another run.
    """
    found = [path for path in folder.glob("checkpoint-*") if _is_complete(path)]
    if restart or not found:
        return None
    if _run_of(folder) != run:
        raise ConfigError(
            f"{folder} holds an unfinished run of another recipe, other data or another template; finish that run, "
            "give another --output, or drop it with --restart."
        )
    newest = max(found, key=lambda path: int(path.name.rpartition("-")[2]))
    sys.stderr.write(f"cmc-server: going on from {newest} (--restart would begin again)\n")
    return newest


def open_folder(folder: Path, run: str, checkpoint: Path | None) -> None:
    """Make the folder ready for a run: of older checkpoints only the one that it goes on from stays.

    Args:
        folder: the working folder, created if missing.
        run: as for :func:`last_checkpoint`.
        checkpoint: what that returned.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("checkpoint-*"):
            if path != checkpoint:
                shutil.rmtree(path)
        (folder / _RUN_FILE).write_text(json.dumps({"run": run}) + "\n", "utf-8")
    except OSError as error:
        raise ConfigError(f"The working folder {folder} cannot be written ({error}); give another --output.") from None


def _run_of(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / _RUN_FILE).read_text("utf-8"))["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _STATE_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return True
