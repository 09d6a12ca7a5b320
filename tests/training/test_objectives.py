"""Objectives: which terms, with which weights, from which options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from cmc_server.training.objectives import AnyObjective, Objective
from cmc_server.training.refusals import REFUSALS
from cmc_server.training.terms import Answers

LN3 = math.log(3)
#: One token, p = (1/2, 1/2); steered, q = (3/4, 1/4) for "high" and (1/4, 3/4) for "low". The label is 0.
CE_HIGH, CE_LOW = math.log(4 / 3), math.log(4)
KL_LOW = math.log(2 / math.sqrt(3))  # 1/2 ln (1/2)/(1/4) + 1/2 ln (1/2)/(3/4)


def one_token(kind: str) -> Answers:
    delta = torch.tensor([[LN3 if kind == "high" else -LN3, 0.0]])
    tuned = torch.tensor([[LN3, 0.0]])
    return Answers(torch.zeros(1, 2), delta, torch.tensor([0]), torch.tensor([0]), tuned)


def build(**options: Any) -> Objective:
    objective: Objective = TypeAdapter(AnyObjective).validate_python(options)
    return objective


BY_HAND: dict[str, tuple[dict[str, Any], dict[str, str], dict[str, float], float]] = {
    # name: options, answers by role, terms, loss
    "instruction_tuning": ({}, {"train": "low"}, {"train": CE_LOW}, CE_LOW),
    "grad_ascent": ({}, {"forget": "low"}, {"forget": -CE_LOW}, -CE_LOW),
    "grad_diff": (
        {"retain_weight": 3.0, "forget_bound": 1.0},
        {"forget": "low", "retain": "high"},
        {"forget": -1.0, "retain": CE_HIGH},
        -1.0 + 3 * CE_HIGH,
    ),
    "kl_retain": (
        {"retain_weight": 2.0},
        {"forget": "high", "retain": "low"},
        {"forget": -CE_HIGH, "retain": KL_LOW},
        -CE_HIGH + 2 * KL_LOW,
    ),
    "npo": (
        {"beta": 2.0, "retain_weight": 0.5},
        {"forget": "high", "retain": "low"},
        {"forget": math.log1p(1.5**2), "retain": CE_LOW},
        math.log1p(1.5**2) + CE_LOW / 2,
    ),
    "idk": ({}, {"forget": "low", "retain": "high"}, {"forget": CE_LOW, "retain": CE_HIGH}, CE_LOW + CE_HIGH),
    "dpo": (
        {"beta": 1.0},
        {"chosen": "high", "rejected": "low"},
        {"preference": math.log1p(1 / 3)},  # ratios 3/2 and 1/2
        math.log1p(1 / 3),
    ),
    "logit_shift": ({"tuned": "x"}, {"train": "high"}, {"train": 0.0}, 0.0),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    options, kinds, terms, loss = BY_HAND[name]
    total, means = build(name=name, **options).loss({role: one_token(kind) for role, kind in kinds.items()})
    assert total.item() == pytest.approx(loss, abs=1e-6)
    assert {term: value.item() for term, value in means.items()} == pytest.approx(terms, abs=1e-6)


def test_retain_is_optional_where_the_objective_says_so() -> None:
    total, means = build(name="npo", beta=2.0).loss({"forget": one_token("high")})
    assert set(means) == {"forget"} and total.item() == pytest.approx(math.log1p(1.5**2), abs=1e-6)


def test_unbounded_ascent_diverges_and_bounded_does_not() -> None:
    delta = torch.zeros(1, 2, requires_grad=True)
    optimiser = torch.optim.SGD([delta], lr=5.0)
    objective = build(name="grad_ascent", forget_bound=8.0)
    for _ in range(200):
        optimiser.zero_grad()
        answers = Answers(torch.zeros(1, 2), delta, torch.tensor([0]), torch.tensor([0]))
        objective.loss({"forget": answers})[0].backward()
        optimiser.step()
    # Beyond the bound nothing pulls any more: the last step that crossed it adds one learning rate at most.
    assert 8.0 < float((delta[0, 1] - delta[0, 0]).detach()) < 8.0 + 2 * 5.0


@pytest.mark.parametrize(
    "options",
    [
        {"name": "grad_ascent", "retain_weight": 1.0},
        {"name": "instruction_tuning", "template_weight": 1.0},
        {"name": "npo", "beta": 0.0},
        {"name": "idk", "refusals": []},
        {"name": "idk", "refusals": [" "]},
        {"name": "logit_shift"},
        {"name": "magic"},
    ],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        build(**options)


def test_a_name_alone_is_dumped_as_a_name() -> None:
    assert build(name="npo").model_dump(exclude_unset=True) == "npo"
    assert build(name="npo", beta=0.5).model_dump(exclude_unset=True) == {"name": "npo", "beta": 0.5}
    assert build(name="npo").model_dump() == {"name": "npo", "beta": 0.1, "retain_weight": 1.0}


def test_refusals_that_ship_differ() -> None:
    assert len({text.lower() for text in REFUSALS}) == len(REFUSALS) >= 20
