"""Tensor parallelism: every rank samples, so all of them must add the very same logits.

Each rank keeps its own books, which follow the same scheduler, but only the leader runs the deltas, and its logits are
what every rank uses. A request that fails on one rank, whichever it is, fails on all: a rank that went on alone would
feed other tokens than the rest into its part of the user LLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Exchange(Protocol):
    """How the ranks of one engine talk to each other. All ranks make the same calls in the same order."""

    @property
    def is_leader(self) -> bool:
        """Whether this rank runs the deltas."""

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite ``tensor`` with the leader's, on every rank."""

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of the ranks' tensors, on every rank."""


def anywhere(exchange: Exchange, flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Which flags are set on any rank, the same on every rank."""
    # float32 is what every backend can add, a CPU's shared memory too.
    found: list[float] = exchange.add(torch.tensor(flags, dtype=torch.float32, device=device)).tolist()
    return [count > 0 for count in found]
