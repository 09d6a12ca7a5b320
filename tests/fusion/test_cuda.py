"""What only a CUDA device shows: graphs, kernels and the side stream give the same rows, and the host never waits."""

from __future__ import annotations

import pytest
import torch
from steered import Steered

from cmc_server.fusion.controller import DeltaController
from cmc_server.fusion.streams import Unseen
from cmc_server.integrations.request_args import ActiveDelta

RESERVED = 5


def steps(steered: Steered, device: torch.device, unseen: bool) -> list[torch.Tensor]:
    """The rows of three requests over six steps, in float32; on a GPU the last steps may not wait for it."""
    controller = DeltaController(RESERVED)
    for name in ("same", "other"):
        controller.load(steered.load(name, device=device))
    names = ["same"] if unseen else ["same", "other"]
    for slot in range(3):
        steering = [ActiveDelta(name=name, strength=1.0) for name in names]
        controller.admit(slot, [30 + slot, 40, 50], steering, "preserve" if slot else "zero")
    draw = torch.Generator().manual_seed(0)
    rows = []
    for moment in range(6):
        logits = torch.randn(4, steered.vocabulary.size, generator=draw).to(device)
        last = torch.tensor([60 + moment] * 3, device=device)
        for slot in range(3) if moment else ():
            if unseen:
                controller.advance_unseen(slot)
            else:
                controller.advance(slot, [60 + moment])
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if moment > 2 else "default")
        try:
            controller.shift(
                [(slot, slot) for slot in range(3)], logits, Unseen(last, [0, 1, 2]) if unseen and moment else None
            )
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        for slot in range(3) if unseen and moment else ():
            controller.see(slot, 60 + moment)
        rows.append(logits.cpu())
    return rows


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("unseen", [True, False])
def test_the_same_rows_without_waiting(steered: Steered, unseen: bool) -> None:
    devices = torch.device("cpu"), torch.device("cuda")
    for expected, actual in zip(*(steps(steered, device, unseen) for device in devices), strict=True):
        torch.testing.assert_close(actual, expected, atol=0.2, rtol=0.05)  # bfloat16 there


def test_on_a_cpu(steered: Steered) -> None:
    """What the test above compares with, so that it is known to run."""
    for unseen in (True, False):
        assert all(rows[:3].isneginf().sum() == 3 for rows in steps(steered, torch.device("cpu"), unseen))
