"""Whether what a delta gave is finite: decided on its device, and learned by the host when that has arrived there.

On a GPU the host does not wait for it: a row that is at fault is ended on the device, in the step itself, and the books
follow in one of the next steps.
"""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from cmc_server.delta.transfer import Arrival
from cmc_server.fusion.loaded import LoadedDelta
from cmc_server.fusion.streams import Request


@dataclass(frozen=True)
class Judged:
    """A row of a delta's forward pass: whose it is, and the cache blocks that it held."""

    request: Request
    blocks: array[int]


@dataclass(frozen=True)
class Verdict:
    """What is to be learned of one forward pass.

    Args:
        delta: that ran.
        rows: of its logits, in their order.
        finite: [len(rows)] bool.
        clock: how long it took.
    """

    delta: LoadedDelta
    rows: list[Judged]
    finite: Arrival
    clock: Clock

    @property
    def faulty(self) -> list[Judged]:
        """Rows with logits that are not finite; waits for the verdict."""
        return [row for row, is_finite in zip(self.rows, self.finite.wait().tolist(), strict=True) if not is_finite]


class Clock:
    """Measures work of a device, from now to :meth:`stop`."""

    def __init__(self, device: torch.device) -> None:
        self._events = (_timed(), _timed()) if device.type == "cuda" else None
        if self._events is not None:
            self._events[0].record()
        self._begin = self._end = time.perf_counter()

    def stop(self) -> None:
        """The work is done, or queued."""
        if self._events is not None:
            self._events[1].record()
        self._end = time.perf_counter()

    @property
    def seconds(self) -> float:
        """How long it took; on a GPU to be asked once the work is done there."""
        if self._events is not None:
            return float(self._events[0].elapsed_time(self._events[1])) / 1e3
        return self._end - self._begin


def _timed() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def finite_rows(logits: Tensor) -> Tensor:
    """[n] bool: which rows of [n, D] are finite. A sum is finite only if all of it is."""
    return torch.isfinite(logits.sum(dim=-1))
