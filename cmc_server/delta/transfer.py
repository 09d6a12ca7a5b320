"""Host values to a device and back, without the host waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def on_device(values: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """What the host holds, on a device; numbers become int64.

    From ordinary memory CUDA copies only after everything that was queued before, and the host waits for that: the user
    LLM's whole forward pass. Pinned memory is copied in the stream's own time, and not used again until then.
    """
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.int64)
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Arrival:
    """A device's values on their way to the host.

    Args:
        values: on the host, to be read once they are there.
        event: passed when they are; None if they are there already.
    """

    values: Tensor
    event: torch.cuda.Event | None

    @classmethod
    def of(cls, values: Tensor) -> Arrival:
        """Queue the copy behind what computes the values."""
        if not values.is_cuda:
            return cls(values, None)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return cls(host, event)

    @property
    def is_there(self) -> bool:
        """Whether :meth:`wait` returns at once."""
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> Tensor:
        """The values, when they are there."""
        if self.event is not None:
            self.event.synchronize()
        return self.values


def put_newest(ids: Tensor, places: Tensor, newest: Tensor) -> None:
    """Replace the ids that only the device knows.

    Args:
        ids: [T] int64, changed in place.
        places: [R] int64, where each row's last id is.
        newest: [R] int64, what it is; -1 where ``ids`` has it already.
    """
    ids.index_copy_(0, places, torch.where(newest < 0, ids[places], newest))
