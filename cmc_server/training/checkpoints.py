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
    """Open a working folder and find the checkpoint to go on from; broken ones are removed.

    Args:
        folder: as :func:`working_folder` gives it; created if missing.
        run: hash of all that decides the result of the run.
        restart: drop what is there.

    Returns:
        The newest complete checkpoint of this run, or None.

    Raises:
        ConfigError: the folder holds the checkpoints of another run, or cannot be written.
    """
    if restart and folder.exists():
        shutil.rmtree(folder)
    marker = folder / _RUN_FILE
    if _run_of(marker) not in (None, run):
        raise ConfigError(
            f"{folder} holds an unfinished run of another recipe, other data or another template; finish that run, "
            "give another --output, or drop it with --restart."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps({"run": run}) + "\n", "utf-8")
    except OSError as error:
        raise ConfigError(f"The working folder {folder} cannot be written ({error}); give another --output.") from None
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    complete = [path for path in found if _is_complete(path)]
    for path in found:
        if path not in complete[-1:]:
            shutil.rmtree(path)
    if not complete:
        return None
    sys.stderr.write(f"cmc-server: going on from {complete[-1]} (--restart would begin again)\n")
    return complete[-1]


def _run_of(marker: Path) -> str | None:
    try:
        return str(json.loads(marker.read_text("utf-8"))["run"])
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ):  # not there, or killed before any checkpoint
        return None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _STATE_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return True
