"""vLLM's V1 model runner: rows are places in a persistent batch, which requests enter, leave and change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cmc_server.errors import DeltaRuntimeError
from cmc_server.fusion.controller import DeltaController
from cmc_server.integrations.request_args import RequestControls, read_controls

if TYPE_CHECKING:
    from vllm.v1.sample.logits_processor.interface import BatchUpdate


@dataclass
class _Tracked:
    """A steered request in the batch.

    ``outputs`` is vLLM's own growing list. ``consumed`` counts what the controller has seen of it; None means that the
    controller has not been given the request yet.
    """

    slot: int
    prompt: Sequence[int] | None
    outputs: list[int]
    controls: RequestControls
    consumed: int | None = None


class V1Adapter:
    """Translates V1's batch into the controller's slots.

    Args:
        controller: does the work.
    """

    def __init__(self, controller: DeltaController) -> None:
        self._controller = controller
        self._batch: dict[int, _Tracked] = {}
        self._slots = count()

    def update(self, batch_update: BatchUpdate) -> None:
        """Follow removals, then additions, then moves. The latter two evict whoever was there."""
        for index in batch_update.removed:
            self._evict(index)
        for index, params, prompt, outputs in batch_update.added:
            self._evict(index)
            controls = read_controls(params.extra_args)
            if controls is not None:
                self._batch[index] = _Tracked(next(self._slots), prompt, outputs, controls)
        for source, target, direction in batch_update.moved:
            moved, met = self._batch.pop(source, None), self._batch.pop(target, None)
            if moved is not None:
                self._batch[target] = moved
            if met is not None and direction.name == "SWAP":
                self._batch[source] = met
            elif met is not None:
                self._controller.release(met.slot)

    def begin(self, device: torch.device) -> None:
        """Before the user LLM's forward pass: let the deltas run beside it, if their input is complete.

        Under asynchronous scheduling it is not: the last tokens are still on their way.
        """
        tracked = [one for _, one in sorted(self._batch.items())]
        if not tracked or any(one.outputs and one.outputs[-1] < 0 for one in tracked):
            return
        for one in tracked:
            self._follow(one)
        self._controller.begin([one.slot for one in tracked], device)

    def apply(self, logits: Tensor) -> Tensor:
        """Give new tokens to the controller, then let it change the rows.

        Tokens are taken here too, since only now are they complete under asynchronous scheduling.
        """
        if not self._batch:
            return logits
        rows = [(index, tracked) for index, tracked in sorted(self._batch.items()) if index < logits.shape[0]]
        for _, tracked in rows:
            self._follow(tracked)
        return self._controller.shift([(index, tracked.slot) for index, tracked in rows], logits)

    def _follow(self, tracked: _Tracked) -> None:
        outputs = tracked.outputs
        if tracked.consumed is None or len(outputs) < tracked.consumed:  # new, or vLLM took tokens back
            controls = tracked.controls
            self._controller.admit(
                tracked.slot, tracked.prompt, controls.deltas, controls.unmapped, controls.request_id
            )
            tracked.consumed = 0
        if len(outputs) == tracked.consumed:
            return
        fresh = outputs[tracked.consumed :]
        if min(fresh) < 0:
            raise DeltaRuntimeError(
                "vLLM handed over unfinished token ids; pass the processor with --logits-processors, not as a plugin."
            )
        self._controller.advance(tracked.slot, fresh)
        tracked.consumed = len(outputs)

    def _evict(self, index: int) -> None:
        tracked = self._batch.pop(index, None)
        if tracked is not None:
            self._controller.release(tracked.slot)
