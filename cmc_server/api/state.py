"""The deltas that came and went while a server ran, in a file: for its other API processes, and for its next start."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pydantic import Field

from cmc_server.config import DeltaName, DeltaSource, EngineSettings, FrozenModel, build
from cmc_server.errors import ConfigError

_LOCK_SUFFIX: Final = ".lock"


class LiveState(FrozenModel):
    """What differs from the command line.

    Args:
        loaded: deltas that were loaded or replaced, the last one of a name.
        unloaded: deltas of the command line that were unloaded.
        count: how many changes there were.
    """

    loaded: tuple[DeltaSource, ...] = ()
    unloaded: frozenset[DeltaName] = frozenset()
    count: int = Field(default=0, ge=0)

    def with_loaded(self, source: DeltaSource) -> LiveState:
        """The state after a delta was loaded."""
        others = tuple(one for one in self.loaded if one.name != source.name)
        return LiveState(loaded=(*others, source), unloaded=self.unloaded - {source.name}, count=self.count + 1)

    def with_unloaded(self, name: str) -> LiveState:
        """The state after a delta was unloaded."""
        others = tuple(one for one in self.loaded if one.name != name)
        return LiveState(loaded=others, unloaded=self.unloaded | {name}, count=self.count + 1)

    def apply(self, settings: EngineSettings) -> tuple[DeltaSource, ...]:
        """The deltas of the command line, changed as they were."""
        replaced = {source.name for source in self.loaded} | self.unloaded
        return (*(source for source in settings.deltas if source.name not in replaced), *self.loaded)


class StateFile:
    """The state on disk.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> LiveState:
        """What the file says; nothing has changed where there is none.

        Raises:
            ConfigError: it cannot be read.
        """
        try:
            return build(LiveState, json.loads(self._path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return LiveState()
        except (OSError, ValueError, ConfigError) as error:
            raise ConfigError(f"The state file {self._path} cannot be read: {error}") from None

    def write(self, state: LiveState) -> None:
        """Replace the file, in one step."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_name(f"{self._path.name}.{os.getpid()}.part")
        part.write_text(state.model_dump_json(indent=1) + "\n", encoding="utf-8")
        part.replace(self._path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Wait until no other process changes the deltas, and keep them from it meanwhile."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.with_name(self._path.name + _LOCK_SUFFIX).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
