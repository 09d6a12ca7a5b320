"""What the controller knows of a request: its deltas, what each has to read, and what of that is cached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from cmc_server.config import Unmapped
from cmc_server.delta.blocks import CachedSequence
from cmc_server.delta.spelling import DeltaInput, WholeDeltaInput, window_drop
from cmc_server.fusion.counts import DeltaCounts
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
    counts: DeltaCounts
    sequence: CachedSequence | None = None
    dropped: int = 0
    keep: int = 0
    num_read: int = 0  # how long the whole input was when it was last read

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append response tokens; the window moves on where it has to."""
        num_respellings = self.text.num_respellings
        unchanged = self.text.extend(token_ids)
        self.counts.respellings += self.text.num_respellings - num_respellings
        dropped = window_drop(len(self.text.ids), self.delta.runner.context_length)
        num_bos = self.num_bos
        kept = unchanged - self.dropped if unchanged >= num_bos + self.dropped else min(unchanged, num_bos)
        self.keep = min(self.keep, kept if dropped == self.dropped else num_bos)
        if dropped != self.dropped and self.num_read:
            self.counts.rebuilds += 1
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

    def note_read(self, num_ids: int) -> None:
        """The delta has read the window, which has ``num_ids`` ids; from now on all of them are cached."""
        num_fed = num_ids - min(self.keep, num_ids - 1)
        num_new = max(0, len(self.text.ids) - self.num_read)
        self.counts.recomputed += max(0, num_fed - num_new)
        self.keep, self.num_read = num_ids, len(self.text.ids)


@dataclass(eq=False)
class Request:
    """One steered request. Equal only to itself."""

    streams: list[Stream] = field(default_factory=list)
    unmapped: Unmapped = "zero"
    failed: bool = False
    request_id: str | None = None
    is_counted: bool = False  # whether the token that comes next is

    @property
    def delta_names(self) -> list[str]:
        """Names of the deltas, in the order of the streams."""
        return [stream.delta.name for stream in self.streams]

    def count_token(self) -> None:
        """A token is about to be chosen; a step that is repeated for the same response counts once."""
        if not self.is_counted:
            for stream in self.streams:
                stream.counts.tokens += 1
        self.is_counted = True


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


@dataclass(frozen=True)
class Ahead:
    """Forward passes that were begun before they are wanted, and for which slots."""

    slots: list[int]
    outputs: Future[dict[LoadedDelta, Output]]


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
