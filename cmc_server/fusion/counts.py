"""What is counted of each delta while it steers: plain numbers, for whoever publishes them.

Counting costs a step a few microseconds, whatever the vocabulary: nothing is counted of base rows, and on a GPU nothing
waits for the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

#: In one of so many steps, on average, one row is looked at to see whether its most likely token changed.
LOOK_EVERY = 16
#: Forward passes that are remembered until somebody takes them.
_MAX_PASSES = 4096


class TopTokens:
    """How often a delta was looked at, and how often the most likely token was another one with it.

    What a GPU finds is added up there and copied to the host behind it. Whoever reads gets what has arrived.
    """

    def __init__(self) -> None:
        self._host = torch.zeros(2, dtype=torch.int64)
        self._device: Tensor | None = None

    @property
    def seen_and_changed(self) -> tuple[int, int]:
        """Rows that were looked at, and those of them where the token changed."""
        seen, changed = self._host.tolist()
        return seen, changed

    @torch.inference_mode()
    def add(self, changed: Tensor) -> None:
        """Count one row; [1] bool."""
        found = torch.cat([torch.ones_like(changed), changed])
        if changed.device.type == "cpu":
            self._host += found
            return
        if self._device is None:
            self._device = torch.zeros(2, dtype=torch.int64, device=changed.device)
            self._host = torch.zeros(2, dtype=torch.int64, pin_memory=True)
        self._device += found
        self._host.copy_(self._device, non_blocking=True)


@dataclass(frozen=True)
class Pass:
    """One forward pass of a delta: over how many rows, and how long it took."""

    rows: int
    seconds: float


@dataclass
class DeltaCounts:
    """What one delta did, over all versions that had its name.

    Args:
        admissions: rows that began to be steered; a row that the engine preempts begins again.
        tokens: tokens that were chosen under it.
        failures: requests that ended with an error because of it, or of what it and others added up to.
        read: tokens that went through it, prompts included.
        recomputed: of these, tokens in place of which as many had been read before by the same row.
        respellings: times that the end of a response was spelled again, since the map alone did not say how it goes on.
        rebuilds: times that a row's cache began anew: the window had moved, or another row had needed the room.
        top: how often it changed the most likely token, in a sample of rows.
        passes: the latest forward passes; whoever reads them takes them out.
    """

    admissions: int = 0
    tokens: int = 0
    failures: int = 0
    read: int = 0
    recomputed: int = 0
    respellings: int = 0
    rebuilds: int = 0
    top: TopTokens = field(default_factory=TopTokens)
    passes: deque[Pass] = field(default_factory=lambda: deque(maxlen=_MAX_PASSES))


@dataclass(frozen=True)
class Look:
    """A row that is looked at, and its most likely token before the deltas are added."""

    row: int
    values: Tensor  # [U] of the batch's own memory
    top: Tensor  # [1] int64

    def count(self, deltas: Sequence[TopTokens]) -> None:
        """Count for the row's deltas whether another token is more likely by now. With several, it counts for each."""
        changed = _largest(self.values) > self.values.index_select(0, self.top)
        for delta in deltas:
            delta.add(changed)


class TopWatch:
    """Picks the rows to look at.

    To find the most likely token takes a pass over the vocabulary, before and after: 60 to 180 microseconds for 262k
    tokens on a CPU. So it is done for one row in one of :data:`LOOK_EVERY` steps, on average; the gaps take all lengths
    from 1 to almost twice that in turn, so that answers of one length are not always looked at in the same place.
    """

    def __init__(self, every: int = LOOK_EVERY) -> None:
        self._every = every
        self._num_looks = 0
        self._left = 1

    def look(self, rows: Sequence[int], logits: Tensor) -> Look | None:
        """Note that a step begins; the row to look at, if one is due.

        Args:
            rows: the steered rows of the step.
            logits: [B, U], before anything is added.
        """
        self._left -= 1
        if self._left > 0 or not rows:
            return None
        row = rows[self._num_looks % len(rows)]
        self._num_looks += 1
        # These two numbers have no common factor, so that every gap has its turn.
        self._left = 1 + self._num_looks * self._every % (2 * self._every - 1)
        return Look(row, logits[row], _most_likely(logits[row]))


def _most_likely(values: Tensor) -> Tensor:
    """[1] int64. On a CPU by numpy, which is eight times as fast at it as torch."""
    if values.device.type != "cpu":
        return values.argmax().view(1)
    return torch.tensor([values.detach().float().numpy().argmax()])


def _largest(values: Tensor) -> Tensor:
    """[1]. On a CPU by numpy, which is three times as fast."""
    if values.device.type != "cpu":
        return values.max().view(1)
    return torch.tensor([values.detach().float().numpy().max()])
