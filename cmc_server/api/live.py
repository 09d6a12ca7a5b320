"""Deltas that come and go while the server runs: prepared beside the traffic, put into use between two steps."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

from cmc_server.api.catalog import Catalog, ServedDelta, serve
from cmc_server.api.preflight import check_delta
from cmc_server.api.state import LiveState, StateFile
from cmc_server.api.words import DeltaWords, delta_words, user_vocabulary
from cmc_server.config import DeltaSource, EngineSettings
from cmc_server.delta.store import DeltaArtifact, one_of_each_vocabulary, open_delta
from cmc_server.delta.turns import short_turns
from cmc_server.errors import CapacityError, CmcError, ConfigError, DeltaError, DeltaNotFoundError
from cmc_server.integrations.vllm_engine import ask_workers

logger = logging.getLogger(__name__)

#: For how long a version that was replaced or unloaded is kept for requests that chose it before, and still wait.
KEPT_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.05
_SYNC_SECONDS: Final = 1.0
_RPC_SECONDS: Final = 60.0


class LiveDeltas:
    """Loads, replaces and unloads deltas of a running server.

    Args:
        engine: vLLM's engine client.
        catalog: what this process offers.
        settings: the server's settings, with a state file.
        tokenizer: folder or hub id of the user LLM's tokenizer.
        on_ranks: called with what the workers report after a change.
    """

    def __init__(
        self,
        engine: Any,
        catalog: Catalog,
        settings: EngineSettings,
        tokenizer: str,
        on_ranks: Callable[[Sequence[Mapping[str, Any]]], None],
    ) -> None:
        assert settings.state_file is not None, "the launcher names a state file"
        self._engine = engine
        self._catalog = catalog
        self._settings = settings
        self._on_ranks = on_ranks
        self._file = StateFile(Path(settings.state_file))
        self._seen = self._file.read().count
        # Now, since streams wait while a large one is read.
        self._user = user_vocabulary(tokenizer)
        self._words = _read_vocabularies(settings)
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def load(self, source: DeltaSource) -> tuple[ServedDelta, bool]:
        """Load a delta, or replace the one of that name.

        Returns:
            The delta as it is served now, and whether the name is new.

        Raises:
            UserError: it cannot be used, is not allowed or does not fit; nothing has changed then.
        """
        if source.name in self._catalog.served:
            raise ConfigError(f"The delta name {source.name!r} is also the name of a served model; choose another.")
        async with self._alone():
            served = await asyncio.to_thread(self._check, source)
            artifact = served.artifact
            # The folder as it was found: the workers and the next start must not look for it elsewhere.
            found = source.model_copy(update={"path": str(artifact.path)})
            await self._prepare(found, artifact.version)
            await self._commit(artifact)
            previous = self._catalog.deltas.get(source.name)
            self._catalog.put(served)
            self._record(self._file.read().with_loaded(found))
        if previous is not None and previous.artifact.version != artifact.version:
            self._retire_later(previous.artifact)
        logger.info("Delta %s (version %s) was loaded.", source.name, artifact.version)
        return served, previous is None

    async def unload(self, name: str) -> None:
        """Take a delta out of use; requests that run on it finish.

        Raises:
            DeltaNotFoundError: there is none of that name.
            CapacityError: the server was told to steer requests with it.
        """
        pinned = {dose.name for dose in (*self._settings.default_deltas, *self._settings.required_deltas)}
        async with self._alone():
            served = self._catalog.deltas.get(name)
            if served is None:
                available = ", ".join(self._catalog.deltas) or "none is loaded"
                raise DeltaNotFoundError(f"There is no delta named {name[:80]!r}; available: {available}.")
            if name in pinned:
                raise CapacityError(f"The delta {name!r} is a default or required one of this server; it stays.")
            self._catalog.remove(name)
            self._on_ranks(await self._call("cmc_unload", name))
            self._record(self._file.read().with_unloaded(name))
        self._retire_later(served.artifact)
        logger.info("Delta %s was unloaded.", name)

    async def follow(self) -> None:
        """Take over, again and again, what other API processes changed."""
        while True:
            await asyncio.sleep(_SYNC_SECONDS)
            try:
                async with self._turn:
                    await self._catch_up()
            except (CmcError, TimeoutError) as error:
                logger.error("The deltas of another API process could not be taken over: %r", error)

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """One change at a time, in this process and among all of them; each begins with what the others did."""
        async with self._turn:
            lock = self._file.locked()
            await asyncio.to_thread(lock.__enter__)
            try:
                await self._catch_up()
                yield
            finally:
                lock.__exit__(None, None, None)

    async def _catch_up(self) -> None:
        state = await asyncio.to_thread(self._file.read)
        if state.count == self._seen:
            return
        wanted = {source.name: source for source in state.apply(self._settings)}
        for name in set(self._catalog.deltas) - set(wanted):
            self._catalog.remove(name)
        for name, source in wanted.items():
            artifact = await asyncio.to_thread(open_delta, source)
            known = self._catalog.deltas.get(name)
            if known is None or known.artifact.version != artifact.version:
                self._catalog.put(await asyncio.to_thread(_serve_beside, artifact))
        self._on_ranks(await self._call("cmc_status"))
        self._seen = state.count

    def _record(self, state: LiveState) -> None:
        self._file.write(state)
        self._seen = state.count

    def _check(self, source: DeltaSource) -> ServedDelta:
        roots = [Path(root) for root in self._settings.delta_roots]
        with short_turns():
            served = serve(open_delta(source, roots))
            check_delta(served.artifact, self._settings, self._user)
        return served

    async def _prepare(self, source: DeltaSource, version: str) -> None:
        """Let all workers load, and wait for the slowest.

        Raises:
            UserError: one of them cannot; the others forget it.
        """
        reports = await self._call("cmc_prepare", source.model_dump(), version)
        while all(report["state"] != "failed" for report in reports):
            if all(report["state"] == "ready" for report in reports):
                return
            await asyncio.sleep(_POLL_SECONDS)
            reports = await self._call("cmc_state", source.name)
        failed = next(report for report in reports if report["state"] == "failed")
        await self._call("cmc_discard", source.name)
        raise (CapacityError if failed["status"] == CapacityError.http_status else DeltaError)(failed["reason"])

    async def _commit(self, artifact: DeltaArtifact) -> None:
        self._on_ranks(await self._call("cmc_commit", artifact.name, artifact.version))

    async def _call(self, method: str, *arguments: Any) -> Sequence[Any]:
        async with asyncio.timeout(_RPC_SECONDS):
            return await ask_workers(self._engine, method, *arguments)

    def _retire_later(self, artifact: DeltaArtifact) -> None:
        async def retire() -> None:
            await asyncio.sleep(KEPT_SECONDS)
            # Not between the preparing and the putting into use of this same version by whoever wants it back.
            async with self._alone():
                current = self._catalog.deltas.get(artifact.name)
                if current is None or current.artifact.version != artifact.version:
                    await self._call("cmc_retire", artifact.name, artifact.version)

        task = asyncio.create_task(retire())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _serve_beside(artifact: DeltaArtifact) -> ServedDelta:
    with short_turns():
        return serve(artifact)


def _read_vocabularies(settings: EngineSettings) -> list[DeltaWords]:
    """What deltas under --delta-root will need; the workers read it too, and say what cannot be used."""
    found = []
    for artifact in one_of_each_vocabulary(map(Path, settings.delta_roots)):
        with suppress(CmcError):
            words = delta_words(artifact)
            _ = words.vocabulary  # read now
            found.append(words)
    return found
