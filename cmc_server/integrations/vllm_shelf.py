"""Deltas that come and go while a worker runs: loaded beside its steps, put into use between two of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmc_server.config import DeltaSource
from cmc_server.delta.store import DeltaArtifact, open_delta
from cmc_server.delta.trim import trim_memory
from cmc_server.delta.turns import short_turns
from cmc_server.errors import CapacityError, CmcError, DeltaError
from cmc_server.fusion.beside import Beside
from cmc_server.fusion.controller import DeltaController
from cmc_server.fusion.loaded import LoadedDelta

logger = logging.getLogger(__name__)

_GIB = 2**30


@dataclass
class _Order:
    """A delta on its way.

    Args:
        loaded: what it becomes.
        num_bytes: how many bytes it will take; 0 until its folder has been read.
    """

    loaded: Future[LoadedDelta]
    num_bytes: int = 0


class Shelf:
    """What a worker does when it is told to load or unload a delta.

    Every method is called between two steps, on all ranks alike, and none of them takes long.

    Args:
        controller: where deltas are put into use.
        load: makes a checked delta ready; runs in the thread of ``beside``.
        needed: bytes that a delta will take.
        budget: bytes for all deltas together.
        beside: the thread that loads.
        device: where deltas live. On a GPU the rest of the budget is taken at once, so that vLLM, which sizes its own
            cache by what is free, leaves it; it is handed to the allocator's cache when the first delta comes.
    """

    def __init__(
        self,
        controller: DeltaController,
        load: Callable[[DeltaArtifact], LoadedDelta],
        needed: Callable[[DeltaArtifact], int],
        budget: int,
        beside: Beside,
        device: torch.device,
    ) -> None:
        self._controller = controller
        self._load = load
        self._needed = needed
        self._budget = budget
        self._beside = beside
        self._orders: dict[str, _Order] = {}
        self._reserve: Tensor | None = None
        if device.type == "cuda" and budget > self._taken():
            self._reserve = torch.empty(budget - self._taken(), dtype=torch.uint8, device=device)

    def prepare(self, source: DeltaSource, version: str) -> None:
        """Begin to load a delta; one that is still in memory is not loaded again.

        Everything that reads the folder happens in the thread. What it finds wrong is in :meth:`state`: the folder
        cannot be used, has another content than the caller saw, or does not fit into the memory for deltas.

        Raises:
            CapacityError: one of that name is being loaded.
        """
        name = source.name
        if name in self._orders:
            raise CapacityError(f"The delta {name!r} is being loaded already; try again when that is done.")
        if (name, version) not in self._controller.kept and not self._is_in_use(name, version):
            order = self._orders[name] = _Order(Future())
            order.loaded = self._beside.start(lambda: self._load_checked(source, version, order))

    def _load_checked(self, source: DeltaSource, version: str, order: _Order) -> LoadedDelta:
        artifact = open_delta(source)
        if artifact.version != version:
            raise DeltaError(f"The delta {source.name!r} changed while it was being loaded; try again.")
        num_bytes = self._needed(artifact)
        self._check_room(source.name, num_bytes)
        order.num_bytes = num_bytes
        self._reserve = None
        with short_turns():
            loaded = self._load(artifact)
        trim_memory()  # what loading has used, and deltas that went before it
        return loaded

    def state(self, name: str) -> dict[str, Any]:
        """How far a delta is: ``ready``, ``loading``, or ``failed`` with the ``reason``."""
        order = self._orders.get(name)
        if order is None:
            return {"state": "ready"}
        if not order.loaded.done():
            return {"state": "loading"}
        error = order.loaded.exception()
        if error is None:
            return {"state": "ready"}
        if not isinstance(error, CmcError):
            logger.error("The delta %s could not be loaded.", name, exc_info=error)
        status = error.http_status if isinstance(error, CmcError) else 500
        return {"state": "failed", "reason": str(error) or type(error).__name__, "status": status}

    def commit(self, name: str, version: str) -> None:
        """Put a prepared delta into use, from the next step on."""
        order = self._orders.pop(name, None)
        if order is None:
            ready = self._is_in_use(name, version) or self._controller.restore(name, version)
            assert ready, "a delta is prepared before it is committed"
        else:
            self._controller.load(order.loaded.result())
        logger.info("Delta %s (version %s) is ready.", name, version)

    def discard(self, name: str) -> None:
        """Forget a delta that was prepared, or failed to be."""
        order = self._orders.pop(name, None)
        if order is not None:
            order.loaded.cancel()

    def _is_in_use(self, name: str, version: str) -> bool:
        delta = self._controller.deltas.get(name)
        return delta is not None and delta.artifact.version == version

    def _check_room(self, name: str, num_bytes: int) -> None:
        taken = self._taken()
        if taken + num_bytes > self._budget:
            raise CapacityError(
                f"The delta {name!r} needs {num_bytes / _GIB:.2f} GiB, but of the {self._budget / _GIB:.2f} GiB of "
                f"--delta-memory {taken / _GIB:.2f} GiB are taken; unload another delta, or give more at the start."
            )

    def _taken(self) -> int:
        """Bytes of the deltas that are in memory or on their way."""
        held = [*self._controller.deltas.values(), *self._controller.kept.values()]
        return sum(delta.runner.memory_bytes for delta in held) + sum(one.num_bytes for one in self._orders.values())
