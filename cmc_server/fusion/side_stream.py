"""A CUDA stream of its own for the deltas' forward passes beside the user LLM's."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cmc_server.fusion.loaded import LoadedDelta
from cmc_server.fusion.streams import Output, Unseen


class SideStream:
    """Runs functions whose work the device may do while that of the current stream is under way."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def renew(self) -> None:
        """Wait, in the next :meth:`run`, for what was queued until then, such as weights that were loaded."""
        self._stream = None

    def run(
        self, function: Callable[[], dict[LoadedDelta, Output]], device: torch.device, unseen: Unseen | None
    ) -> dict[LoadedDelta, Output]:
        """What the function returns; the current stream waits for it, and the host does not.

        Args:
            function: queues work.
            device: of the current stream.
            unseen: what the function reads of the current stream's work.
        """
        main, side = torch.cuda.current_stream(device), self._get(device)
        if unseen is not None:
            unseen.ids.record_stream(side)  # or its memory would be used again too early
            if unseen.ready is not None:
                side.wait_event(unseen.ready)
        with torch.cuda.stream(side):
            outputs = function()
        main.wait_stream(side)
        for output in outputs.values():
            for tensor in (output.logits, output.finite):
                if tensor is not None:
                    tensor.record_stream(main)
        return outputs

    def queue(self, function: Callable[[], None], device: torch.device) -> None:
        """Run what nobody waits for, behind all that was queued in this way."""
        with torch.cuda.stream(self._get(device)):
            function()

    def _get(self, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(device))
        return self._stream
