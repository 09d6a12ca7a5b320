"""A folder whose sub-folders are deltas: loaded as they come, replaced as they change, unloaded as they go."""

from __future__ import annotations

import asyncio
import fcntl
import logging
from pathlib import Path
from typing import Final

from cmc_server.api.live import LiveDeltas
from cmc_server.config import DeltaSource, is_delta_name
from cmc_server.errors import CmcError

logger = logging.getLogger(__name__)

_LOOK_SECONDS: Final = 1.0
#: Names, sizes and times of a folder's files: what does not change while nobody writes.
_Look = tuple[tuple[str, int, int], ...]


class FolderWatch:
    """Looks at a folder again and again.

    Args:
        folder: what is watched.
        live: where deltas are loaded.
    """

    def __init__(self, folder: Path, live: LiveDeltas) -> None:
        self._folder = folder
        self._live = live
        self._last: dict[str, _Look] = {}
        self._done: dict[str, _Look] = {}
        self._loaded: set[str] = set()

    async def run(self, lock: Path) -> None:
        """Watch until cancelled; of several processes with the same ``lock``, one at a time watches."""
        with lock.open("w") as held:
            await asyncio.to_thread(fcntl.flock, held, fcntl.LOCK_EX)
            while True:
                await self.look()
                await asyncio.sleep(_LOOK_SECONDS)

    async def look(self) -> None:
        """Load, replace and unload once. A folder counts when it looks as it did the last time, so nobody writes."""
        found = await asyncio.to_thread(_look, self._folder)
        for name, look in found.items():
            if self._last.get(name) == look != self._done.get(name):
                self._done[name] = look
                await self._load(name)
        for name in self._loaded - set(found):
            self._loaded.discard(name)
            self._done.pop(name, None)
            await self._try(name, self._live.unload(name))
        self._last = found

    async def _load(self, name: str) -> None:
        source = DeltaSource(name=name, path=str(self._folder / name))
        if await self._try(name, self._live.load(source)):
            self._loaded.add(name)

    async def _try(self, name: str, change: object) -> bool:
        try:
            await change  # type: ignore[misc]
        except (CmcError, TimeoutError) as error:
            logger.error("The delta %s in %s: %s", name, self._folder, error)
            return False
        return True


def _look(folder: Path) -> dict[str, _Look]:
    found = {}
    try:
        for path in folder.iterdir():
            if is_delta_name(path.name) and (path / "config.json").is_file():
                files = sorted(entry for entry in path.iterdir() if entry.is_file())
                stats = [(entry.name, entry.stat()) for entry in files]
                found[path.name] = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    except FileNotFoundError:
        pass  # the folder, or a file in it, went while it was looked at; the next look tells
    return found
