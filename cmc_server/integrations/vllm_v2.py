"""vLLM's Model Runner V2: requests own slots, rows change order every step, and tokens live on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cmc_server.fusion.controller import DeltaController
from cmc_server.integrations.request_args import RequestControls, read_controls

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState


@dataclass
class _Tracked:
    """A steered request; ``known`` counts prompt and response tokens given to the controller, None before that."""

    controls: RequestControls
    known: int | None = None


@dataclass(frozen=True)
class _Copy:
    """Lengths and last tokens of some slots on their way to the host."""

    slots: list[int]
    values: Tensor  # [2, len(slots)] int32 on the host
    event: torch.cuda.Event | None


class V2Adapter:
    """Translates MRV2's slots and device-side tokens for the controller, whose slots are MRV2's own.

    Args:
        controller: does the work.
        req_states: vLLM's per-slot buffers, read only.
    """

    def __init__(self, controller: DeltaController, req_states: LogitsProcRequestState) -> None:
        self._controller = controller
        self._states = req_states
        self._requests: dict[int, _Tracked] = {}
        self._recent: list[int] = []
        self._copy: _Copy | None = None

    def add(self, slot: int, extra_args: dict[str, Any] | None) -> bool:
        """A request took a slot, perhaps again after preemption; there is no word when one leaves."""
        self._controller.release(slot)
        self._requests.pop(slot, None)
        controls = read_controls(extra_args)
        if controls is not None:
            self._requests[slot] = _Tracked(controls)
        return controls is not None

    def fetch(self) -> None:
        """Queue a copy of the last sampled tokens to the host, behind the step that samples them.

        It runs while the GPU works on the next forward pass, so that :meth:`apply` need not wait for that.
        """
        slots = [slot for slot in self._recent if (tracked := self._requests.get(slot)) and tracked.known is not None]
        self._copy = None
        if not slots:
            return
        device = self._states.device
        index = torch.tensor(slots, device=device)
        lengths = self._states.total_len.gpu[index]
        last = self._states.all_token_ids.gpu[index, lengths - 1]
        values = torch.stack([lengths, last])
        if device.type != "cuda":
            self._copy = _Copy(slots, values, None)
            return
        pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        pinned.copy_(values, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._copy = _Copy(slots, pinned, event)

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        """Give new tokens to the controller, then let it change the rows that will be sampled from."""
        lengths = ctx.seq_lens_upper_bound_np
        rows: list[tuple[int, int]] = []
        for row, slot in enumerate(ctx.idx_mapping_np.tolist()):
            # A row whose prompt is not complete yet is thrown away by vLLM.
            if slot in self._requests and lengths[row] >= self._states.prefill_len.np[slot]:
                rows.append((row, slot))
        if not rows:
            return logits
        arrived = self._arrived()
        for _, slot in rows:
            self._follow(slot, arrived.get(slot))
        self._recent = [slot for _, slot in rows]
        return self._controller.shift(rows, logits)

    def _arrived(self) -> dict[int, tuple[int, int]]:
        copy, self._copy = self._copy, None
        if copy is None:
            return {}
        if copy.event is not None:
            copy.event.synchronize()
        return {slot: (length, last) for slot, length, last in zip(copy.slots, *copy.values.tolist(), strict=True)}

    def _follow(self, slot: int, arrived: tuple[int, int] | None) -> None:
        tracked = self._requests[slot]
        length = arrived[0] if arrived else int(self._states.total_len.gpu[slot])
        if tracked.known is None:
            prompt_len = int(self._states.prompt_len.np[slot])
            tokens = self._tokens(slot, 0, length)
            controls = tracked.controls
            prompt = tokens[:prompt_len]
            self._controller.admit(slot, prompt, controls.deltas, controls.unmapped, controls.request_id)
            self._controller.advance(slot, tokens[prompt_len:])
        elif arrived and length == tracked.known + 1:
            self._controller.advance(slot, [arrived[1]])
        elif length > tracked.known:
            self._controller.advance(slot, self._tokens(slot, tracked.known, length))
        tracked.known = length

    def _tokens(self, slot: int, start: int, stop: int) -> Sequence[int]:
        tokens: list[int] = self._states.all_token_ids.gpu[slot, start:stop].tolist()
        return tokens
