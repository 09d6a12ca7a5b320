"""What the controller knows of a request: its deltas, what each has to read, and what of that is cached."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from cmc_server.config import Unmapped
from cmc_server.delta.blocks import CachedSequence
from cmc_server.delta.spelling import DeltaInput, WholeDeltaInput
from cmc_server.delta.transfer import on_device
from cmc_server.delta.window import Window, window_drop
from cmc_server.fusion.counts import DeltaCounts
from cmc_server.fusion.loaded import LoadedDelta
from cmc_server.fusion.rule import Shift, spread_rows

logger = logging.getLogger(__name__)


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
        self._move_on(self.text.extend(token_ids))
        self.counts.respellings += self.text.num_respellings - num_respellings

    def extend_unseen(self) -> None:
        """Append a response token that only the device knows; :attr:`can_read_unseen` says whether that is possible."""
        assert isinstance(self.text, DeltaInput), "the whole response is needed to spell it"
        self._move_on(self.text.extend_unseen())

    def see(self, token_id: int) -> None:
        """That token has arrived."""
        assert isinstance(self.text, DeltaInput), "the whole response is needed to spell it"
        self.text.see(token_id)

    @property
    def can_read_unseen(self) -> bool:
        """Whether the delta reads the user LLM's own ids, which the device has before the host does."""
        return self.delta.reads_user_ids and isinstance(self.text, DeltaInput)

    def _move_on(self, unchanged: int) -> None:
        """The input grew behind its first ``unchanged`` ids."""
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

    def window(self, stop: int | None = None) -> Window:
        """The ids that the delta reads, or the first ``stop`` of them; to be used before the input grows."""
        return Window(self.text.ids, self.num_bos, self.dropped, stop)

    def note_read(self, num_ids: int) -> None:
        """The delta has read the window, which has ``num_ids`` ids; from now on all of them are cached."""
        num_fed = num_ids - min(self.keep, num_ids - 1)
        num_new = max(0, len(self.text.ids) - self.num_read)
        self.counts.recomputed += max(0, num_fed - num_new)
        self.keep, self.num_read = num_ids, len(self.text.ids)

    def note_prefilled(self, num_ids: int) -> None:
        """The same of the first ``num_ids`` ids of the window; more are left to read."""
        self.keep, self.num_read = num_ids, num_ids + self.dropped


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


#: Bytes that one delta's logits may take when they are spread over the user LLM's vocabulary ahead of time.
_SPREAD_BYTES = 128 << 20


@dataclass(frozen=True)
class Output:
    """What one delta says.

    Args:
        logits: [n, D] float32.
        rows: the row of each stream by its identity.
        finite: [n] bool, which rows are; None where the requests of those that are not have failed already.
        spread: [n, U'] float32, the same through the map, 0 where that ends; None where it was not made ahead of time.
    """

    logits: Tensor
    rows: Mapping[int, int]
    finite: Tensor | None = None
    spread: Tensor | None = None

    def spread_by(self, delta_ids: Tensor | None) -> Output:
        """With the map applied, which is most of the rule's work, if that is worth while."""
        if delta_ids is None or 4 * len(self.rows) * delta_ids.numel() > _SPREAD_BYTES:
            return self
        try:
            return replace(self, spread=spread_rows(self.logits, delta_ids))
        except Exception as error:  # what is wrong with the map, the rule meets again, and ends the request there
            logger.warning("The map could not be applied ahead of time, which is slower: %r", error)
            return self

    def shift(self, streams: Sequence[Stream], delta_ids: Tensor | None, unmapped: Unmapped) -> Shift:
        """What it contributes to the rows of some streams, in their order."""
        strengths = on_device(torch.tensor([stream.strength for stream in streams]), self.logits.device)
        rows = [self.rows[id(stream)] for stream in streams]
        if self.spread is not None and unmapped == "zero":
            return Shift(select_rows(self.spread, rows), None, strengths)
        return Shift(select_rows(self.logits, rows), delta_ids, strengths)


def spread_outputs(outputs: dict[LoadedDelta, Output], requests: Sequence[Request]) -> dict[LoadedDelta, Output]:
    """With the maps applied, as far as that is the rule of one of the requests: what is left of it is to add."""
    if all(request.unmapped == "preserve" for request in requests):
        return outputs
    return {delta: output.spread_by(delta.delta_ids) for delta, output in outputs.items()}


@dataclass(frozen=True)
class Unseen:
    """The last tokens of some requests, which only the device knows.

    Args:
        ids: [n] int64 user token ids, and -1 for those that the host has told. To be read only behind ``ready``, not on
            the stream of the user LLM's forward pass, which would come first.
        places: of each request, where in ``ids`` its own is.
        ready: passed when they are there; None if they are.
    """

    ids: Tensor
    places: list[int]
    ready: torch.cuda.Event | None = None


@dataclass(frozen=True)
class Ahead:
    """Forward passes that were begun before they are wanted, and for which slots."""

    slots: list[int]
    outputs: Future[dict[LoadedDelta, Output]]

    def wait_for(self, slots: list[int]) -> dict[LoadedDelta, Output] | None:
        """What was begun, when it has ended; None if it was begun for other slots."""
        outputs = self.outputs.result()
        return outputs if self.slots == slots else None


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


def select_rows(values: Tensor, rows: list[int]) -> Tensor:
    """Some rows; no copy where these are all."""
    if rows == list(range(values.shape[0])):
        return values
    return values.index_select(0, on_device(rows, values.device))
