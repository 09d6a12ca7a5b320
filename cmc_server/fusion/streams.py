"""What the controller knows of a request: its deltas, what each has to read, and what of that is cached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from cmc_server.config import Unmapped
from cmc_server.delta.blocks import CachedSequence
from cmc_server.delta.spelling import DeltaInput, WholeDeltaInput, window_drop
from cmc_server.fusion.loaded import LoadedDelta


class Steering(Protocol):
    """One delta of a request as the controller takes it; ``integrations.request_args.ActiveDelta`` is one."""

    @property
    def name(self) -> str:
        """Name of a loaded delta."""

    @property
    def strength(self) -> float:
        """Factor on its logits."""

    @property
    def version(self) -> str | None:
        """Content that the caller expects; None takes what is loaded."""

    @property
    def prompt_ids(self) -> Sequence[int] | None:
        """The prompt in the delta's tokens; None spells the user LLM's prompt."""


@dataclass
class Stream:
    """One delta of one request: its input, and what of it is cached."""

    delta: LoadedDelta
    strength: float
    text: DeltaInput | WholeDeltaInput
    sequence: CachedSequence | None = None
    dropped: int = 0
    keep: int = 0

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append response tokens; the window moves on where it has to."""
        unchanged = self.text.extend(token_ids)
        dropped = window_drop(len(self.text.ids), self.delta.runner.context_length)
        num_bos = self.num_bos
        kept = unchanged - self.dropped if unchanged >= num_bos + self.dropped else min(unchanged, num_bos)
        self.keep = min(self.keep, kept if dropped == self.dropped else num_bos)
        self.dropped = dropped

    @property
    def num_bos(self) -> int:
        """Leading ids that stay whatever else is dropped."""
        bos = self.delta.encoder.bos_ids
        return len(bos) if bos and self.text.ids[: len(bos)] == bos else 0

    @property
    def num_settled(self) -> int:
        """Leading ids of the window that never change while no more are dropped."""
        settled = self.text.num_settled
        return settled - self.dropped if settled >= self.num_bos + self.dropped else min(settled, self.num_bos)

    def window(self) -> list[int]:
        """The ids that the delta reads: all, or the bos and what is left behind the dropped ones."""
        ids = self.text.ids
        return ids[: self.num_bos] + ids[self.num_bos + self.dropped :] if self.dropped else ids


@dataclass(eq=False)
class Request:
    """One steered request. Equal only to itself."""

    streams: list[Stream] = field(default_factory=list)
    unmapped: Unmapped = "zero"
    failed: bool = False


@dataclass(frozen=True)
class Output:
    """Logits of one delta, [n, D] float32, and the row of each stream by its identity."""

    logits: Tensor
    rows: Mapping[int, int]

    def of(self, streams: Sequence[Stream]) -> Tensor:
        """The rows of some streams in their order; no copy where these are all rows."""
        rows = [self.rows[id(stream)] for stream in streams]
        if rows == list(range(self.logits.shape[0])):
            return self.logits
        return self.logits.index_select(0, torch.tensor(rows, device=self.logits.device))


#: A row of the logits and the request that it belongs to.
Row = tuple[int, Request]


def same_deltas(
    steered: Sequence[tuple[int, Request]],
) -> dict[tuple[Unmapped | LoadedDelta, ...], list[tuple[int, Request]]]:
    """Rows grouped by their deltas and policy, so that each group is one application of the rule."""
    groups: dict[tuple[Unmapped | LoadedDelta, ...], list[tuple[int, Request]]] = {}
    for row, request in steered:
        if not request.failed:
            key = (request.unmapped, *(stream.delta for stream in request.streams))
            groups.setdefault(key, []).append((row, request))
    return groups
