"""Tensor parallelism: every rank samples, so all of them must add the very same logits.

Each rank keeps its own books, which follow the same scheduler, but only the leader runs the deltas. Its logits, and its
word on which requests failed, are what every rank uses: no difference in arithmetic, memory or luck between ranks can
make them sample different tokens.
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


def agree(exchange: Exchange, flags: Sequence[bool], device: torch.device) -> list[bool]:
    """The leader's flags, on every rank."""
    shared = torch.tensor(flags, dtype=torch.uint8, device=device)
    exchange.broadcast(shared)
    return [bool(flag) for flag in shared.tolist()]
