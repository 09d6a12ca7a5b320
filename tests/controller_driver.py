"""Drives a controller as an engine does, and compares every row with the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from cmc_server.config import Unmapped
from cmc_server.fusion.controller import DeltaController
from cmc_server.fusion.reference import ReferenceFusedLM
from cmc_server.integrations.request_args import ActiveDelta

RESERVED = 5
TOLERANCE = {"atol": 2e-4, "rtol": 2e-4}


@dataclass
class Request:
    """A request of the driver below; ``strengths`` empty is base traffic."""

    prompt: list[int]
    strengths: dict[str, float]
    unmapped: Unmapped = "zero"
    delta_prompts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    response: list[int] = field(default_factory=list)

    @property
    def steering(self) -> list[ActiveDelta]:
        return [
            ActiveDelta(name=name, strength=strength, prompt_ids=self.delta_prompts.get(name))
            for name, strength in self.strengths.items()
        ]


def base_logits(oracle: ReferenceFusedLM, request: Request) -> torch.Tensor:
    (last,) = oracle.steps(request.prompt, request.response, {}, start=len(request.response))
    return last


def expected(oracle: ReferenceFusedLM, request: Request) -> torch.Tensor:
    (last,) = oracle.steps(
        request.prompt,
        request.response,
        request.strengths,
        delta_prompts=request.delta_prompts,
        unmapped=request.unmapped,
        start=len(request.response),
    )
    if request.strengths:
        last[RESERVED] = -torch.inf
    return last


def step(controller: DeltaController, oracle: ReferenceFusedLM, rows: Sequence[tuple[int, Request]]) -> torch.Tensor:
    """One engine step over (slot, request) rows, checked row by row; base rows bit by bit."""
    before = torch.stack([base_logits(oracle, request) for _, request in rows])
    named = [(row, slot) for row, (slot, request) in enumerate(rows) if request.strengths]
    controller.begin([slot for _, slot in named], before.device)
    after = controller.shift(named, before.clone())
    for row, (_, request) in enumerate(rows):
        if request.strengths:
            torch.testing.assert_close(after[row], expected(oracle, request), **TOLERANCE)
        else:
            assert torch.equal(after[row], before[row])
    return after


def assert_ended(row: torch.Tensor) -> None:
    assert row[RESERVED] == 0
    assert torch.isfinite(row).sum() == 1
