"""Objectives against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from cmc_server.training.objectives import instruction_tuning


def test_instruction_tuning_by_hand() -> None:
    # Row 1: l + d = (0, ln 2, ln 1) and label 1: p = 2 / 4. Row 2: l + d = (ln 3, 0, 0) and label 0: p = 3 / 5.
    template = torch.tensor([[0.0, math.log(4), 0.0], [0.0, -1.0, 2.0]])
    delta = torch.tensor([[0.0, -math.log(2), 0.0], [math.log(3), 1.0, -2.0]])
    loss = instruction_tuning(template, delta, torch.tensor([1, 0]))
    assert loss.item() == pytest.approx(-(math.log(2 / 4) + math.log(3 / 5)) / 2, abs=1e-6)


def test_columns_beyond_the_vocabulary_keep_their_logits() -> None:
    # The template has a padding column of logit 0: p = e / (e + 1 + 1).
    loss = instruction_tuning(torch.zeros(1, 3), torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert loss.item() == pytest.approx(-math.log(math.e / (math.e + 2)), abs=1e-6)


def test_gradient_is_steered_probability_minus_label() -> None:
    template, labels = torch.randn(4, 9), torch.tensor([0, 3, 8, 2])
    delta = torch.randn(4, 9, requires_grad=True)
    instruction_tuning(template, delta, labels).backward()
    expected = ((template + delta.detach()).softmax(-1) - torch.nn.functional.one_hot(labels, 9)) / 4
    torch.testing.assert_close(delta.grad, expected)


def test_pull_towards_the_template_by_hand() -> None:
    # p = (1/2, 1/2), q = (3/4, 1/4), label 0, a = 0.25: 0.75 * -ln(3/4) + 0.25 * -(ln(3/4) + ln(1/4)) / 2.
    delta = torch.tensor([[math.log(3), 0.0]])
    loss = instruction_tuning(torch.zeros(1, 2), delta, torch.tensor([0]), 0.25)
    expected = -0.75 * math.log(3 / 4) - 0.25 * (math.log(3 / 4) + math.log(1 / 4)) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-6)
