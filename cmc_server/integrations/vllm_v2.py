"""vLLM's Model Runner V2: requests own slots, rows change order every step, and tokens live on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cmc_server.delta.transfer import Arrival, on_device
from cmc_server.fusion.controller import DeltaController
from cmc_server.fusion.streams import Unseen
from cmc_server.integrations.request_args import RequestControls, read_controls

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState


@dataclass(eq=False)
class _Tracked:
    """A steered request.

    Args:
        controls: what it asks for.
        tokens: those that it came with, once their copy is queued.
        known: how many prompt and response tokens the controller has counted; None before it was admitted.
        is_unseen: whether the controller does not know the last of them yet.
    """

    controls: RequestControls
    tokens: Arrival | None = None
    known: int | None = None
    is_unseen: bool = False


@dataclass(frozen=True)
class _Copy:
    """Lengths and last tokens of some requests after one step.

    Args:
        members: slots and their requests.
        last: [len(members) + 1] int64 on the device, the last tokens and -1.
        values: [2, len(members)] lengths and last tokens, on their way to the host.
    """

    members: list[tuple[int, _Tracked]]
    last: Tensor
    values: Arrival


class V2Adapter:
    """Translates MRV2's slots and device-side tokens for the controller, whose slots are MRV2's own.

    With asynchronous scheduling a step begins before the host knows what the step before it sampled. Deltas that read
    the user LLM's own ids take them from the device, and the host learns them a step later; others wait for them.

    Args:
        controller: does the work.
        req_states: vLLM's per-slot buffers, read only.
    """

    def __init__(self, controller: DeltaController, req_states: LogitsProcRequestState) -> None:
        self._controller = controller
        self._states = req_states
        self._requests: dict[int, _Tracked] = {}
        self._fresh: list[int] = []
        self._recent: list[int] = []
        self._copies: deque[_Copy] = deque()

    def add(self, slot: int, extra_args: dict[str, Any] | None) -> bool:
        """A request took a slot, perhaps again after preemption; there is no word when one leaves."""
        self._controller.release(slot)
        self._requests.pop(slot, None)
        controls = read_controls(extra_args)
        if controls is not None:
            self._requests[slot] = _Tracked(controls)
            self._fresh.append(slot)
        return controls is not None

    def fetch(self) -> None:
        """Queue copies of new prompts and of the last sampled tokens to the host, behind the step that samples them.

        They run while the GPU works on the next forward pass, so that :meth:`apply` need not wait for that.
        """
        for slot in self._fresh:
            if slot in self._requests:
                length = int(self._states.prefill_len.np[slot])
                self._requests[slot].tokens = Arrival.of(self._states.all_token_ids.gpu[slot, :length])
        self._fresh = []
        members = [(slot, tracked) for slot in self._recent if (tracked := self._requests.get(slot)) and tracked.known]
        if not members:
            return
        index = on_device([slot for slot, _ in members], self._states.device)
        lengths = self._states.total_len.gpu[index]
        last = self._states.all_token_ids.gpu[index, lengths - 1]
        padded = torch.cat([last, last.new_full((1,), -1)]).long()
        self._copies.append(_Copy(members, padded, Arrival.of(torch.stack([lengths, last]))))

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        """Give new tokens to the controller, then let it change the rows that will be sampled from."""
        rows: list[tuple[int, int]] = []
        lengths: dict[int, int] = {}
        reading: list[int] = []
        slots = ctx.idx_mapping_np.tolist()
        for row, (slot, length) in enumerate(zip(slots, ctx.seq_lens_upper_bound_np.tolist(), strict=True)):
            if slot not in self._requests:
                continue
            if length < self._states.prefill_len.np[slot]:
                reading.append(slot)  # vLLM throws this row away
                continue
            rows.append((row, slot))
            lengths[slot] = length  # exact without speculative decoding, which is refused at the start
        if rows:
            self._shift(rows, lengths, logits)
        self._read_ahead(reading)
        return logits

    def _shift(self, rows: list[tuple[int, int]], lengths: dict[int, int], logits: Tensor) -> None:
        newest = self._copies.pop() if self._copies else None
        while self._copies:
            self._take_in(self._copies.popleft())
        unseen = None if newest is None else self._leave_unseen(newest, lengths, logits.shape[1])
        if newest is not None:
            if unseen is None:
                self._take_in(newest)
            else:
                self._copies.append(newest)
        for slot, length in lengths.items():
            self._follow(slot, length)
        self._recent = list(lengths)
        self._controller.shift(rows, logits, unseen)

    def _read_ahead(self, slots: list[int]) -> None:
        """Let the deltas read prompts of which the user LLM still reads the beginning."""
        ready = []
        for slot in slots:
            tracked = self._requests[slot]
            if tracked.known is None and tracked.tokens is not None and tracked.tokens.is_there:
                self._follow(slot, int(self._states.prefill_len.np[slot]))
            if tracked.known is not None:
                ready.append(slot)
        if ready:
            self._controller.prefill(ready, self._states.device)

    def _leave_unseen(self, copy: _Copy, lengths: dict[int, int], num_columns: int) -> Unseen | None:
        """Let each request grow by a token that stays on the device, if that is possible for all that grew.

        Args:
            copy: of the last step's tokens.
            lengths: of the slots in this step, in its order.
            num_columns: of the user LLM's logits.

        Returns:
            The slots' last tokens; None if the host has to know them now.
        """
        place_of = {id(tracked): place for place, (_, tracked) in enumerate(copy.members)}
        places, growing = [], []
        for slot, length in lengths.items():
            tracked = self._requests[slot]
            place = place_of.get(id(tracked), len(copy.members))
            if tracked.known is not None and length > tracked.known:
                is_next = length == tracked.known + 1 and place < len(copy.members)
                if not is_next or not self._controller.can_read_unseen(slot, num_columns):
                    return None
                growing.append((slot, tracked))
            else:
                place = len(copy.members)
            places.append(place)
        if not growing:
            return None
        for slot, tracked in growing:
            self._controller.advance_unseen(slot)
            tracked.known, tracked.is_unseen = lengths[slot], True
        return Unseen(copy.last, places, copy.values.event)

    def _take_in(self, copy: _Copy) -> None:
        """Wait for a copy, and give what it says to the controller."""
        lengths, last_tokens = copy.values.wait().tolist()
        for (slot, tracked), length, last in zip(copy.members, lengths, last_tokens, strict=True):
            if self._requests.get(slot) is not tracked or tracked.known is None:
                continue
            if tracked.is_unseen:
                assert length == tracked.known, "the host has lost count of a response"
                self._controller.see(slot, last)
                tracked.is_unseen = False
            elif length == tracked.known + 1:
                self._controller.advance(slot, [last])
                tracked.known = length

    def _follow(self, slot: int, length: int) -> None:
        """Admit a request, and give it those of its tokens that no copy brought."""
        tracked = self._requests[slot]
        if tracked.known is None:
            tokens = tracked.tokens.wait().tolist() if tracked.tokens is not None else []
            tokens += self._tokens(slot, len(tokens), length)
            prompt_len = int(self._states.prompt_len.np[slot])
            controls = tracked.controls
            prompt = tokens[:prompt_len]
            self._controller.admit(slot, prompt, controls.deltas, controls.unmapped, controls.request_id)
            self._controller.advance(slot, tokens[prompt_len:])
        elif length > tracked.known:
            self._controller.advance(slot, self._tokens(slot, tracked.known, length))
        tracked.tokens, tracked.known = None, length

    def _tokens(self, slot: int, start: int, stop: int) -> Sequence[int]:
        """Tokens from the device; waits for it, unless there are none."""
        if start == stop:
            return []
        tokens: list[int] = self._states.all_token_ids.gpu[slot, start:stop].tolist()
        return tokens
