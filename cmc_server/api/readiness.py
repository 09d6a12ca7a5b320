"""Whether everything that a steered request passes through is there: a half-wired server never serves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cmc_server.api.catalog import Catalog
from cmc_server.integrations.vllm_engine import ask_workers

logger = logging.getLogger(__name__)

STATUS_RPC = "cmc_status"
_RPC_TIMEOUT = 10.0


class Readiness:
    """Plugin, front door and worker processor, seen from the API process.

    The workers are asked until they have answered well once; after that, whoever changes their deltas says so.
    """

    def __init__(self) -> None:
        self._problem: str | None = "the server is still starting"
        self._draining = False
        self._engine: Any = None
        self._catalog: Catalog | None = None
        self._loaded: Mapping[str, Mapping[str, Any]] = {}
        self._use_rows: Callable[[int], None] = lambda rows: None

    @property
    def catalog(self) -> Catalog | None:
        """The served deltas; None before the engine is connected."""
        return self._catalog

    @property
    def problem(self) -> str | None:
        """Why the server does not serve, or None if it does."""
        if self._draining:
            return "the server is shutting down"
        if self._engine is not None and self._engine.errored:
            return "the engine has failed"
        return self._problem

    def loaded(self, name: str) -> Mapping[str, Any]:
        """What the worker reports of a delta; empty before it has answered."""
        return self._loaded.get(name, {})

    def drain(self) -> None:
        """From now on the server is not ready; requests that run go on."""
        self._draining = True

    async def connect(self, engine: Any, catalog: Catalog, use_rows: Callable[[int], None]) -> None:
        """Begin to check against this engine client, and check once.

        Args:
            engine: vLLM's engine client.
            catalog: the deltas as this process knows them.
            use_rows: called once with the number of rows that the workers can steer at once.
        """
        self._engine, self._catalog, self._use_rows = engine, catalog, use_rows
        await self.check()

    async def check(self) -> str | None:
        """Ask the workers if that is still needed.

        Returns:
            Why the server does not serve, or None if it does.
        """
        if self._problem is not None and self._engine is not None and self._catalog is not None:
            self._problem = await self._ask_workers(self._catalog)
            if self._problem is not None:
                logger.warning("Not ready: %s.", self._problem)
        return self.problem

    async def _ask_workers(self, catalog: Catalog) -> str | None:
        try:
            async with asyncio.timeout(_RPC_TIMEOUT):
                ranks = await ask_workers(self._engine, STATUS_RPC)
        except Exception as error:
            # Whatever goes wrong here means the same: no worker of ours has answered.
            return f"the workers do not answer ({error or type(error).__name__})"
        problem = _compare(ranks, catalog.versions)
        if problem is None:
            self.take(ranks)
        return problem

    def take(self, ranks: Sequence[Mapping[str, Any]]) -> None:
        """Note what the workers report."""
        self._loaded = {report["name"]: report for rank in ranks for report in rank["deltas"]}
        rows = [rank["max_delta_seqs"] for rank in ranks if rank["deltas"]]
        if rows:
            self._use_rows(min(rows))


def _compare(ranks: Sequence[Any], versions: Mapping[str, str]) -> str | None:
    """The first disagreement between the workers and the front door."""
    if not ranks or not all(isinstance(rank, Mapping) and rank.get("processor") for rank in ranks):
        return "a worker runs without the delta processor"
    reported = [{delta["name"]: delta["version"] for delta in rank["deltas"]} for rank in ranks]
    for loaded in filter(None, reported):  # a pipeline rank that does not sample holds no deltas
        if loaded != versions:
            return f"the workers have loaded {dict(loaded)}, but the front door knows {dict(versions)}"
    if versions and not any(reported):
        return "no worker has loaded the deltas"
    return None
