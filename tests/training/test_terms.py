"""Terms of the objectives against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cmc_server.training.terms import (
    Answers,
    ascent,
    label_loss,
    log_ratios,
    negative_preference,
    preference,
    pulled_loss,
    shift_divergence,
    template_divergence,
)

LN2, LN3 = math.log(2), math.log(3)


def answers(
    template: Tensor, delta: Tensor, labels: list[int], rows: list[int], tuned: Tensor | None = None
) -> Answers:
    return Answers(template, delta, torch.tensor(labels), torch.tensor(rows), tuned)


@pytest.fixture
def two() -> Answers:
    """One token each: p = (1, 2, 1) / 4, q = (1, 1, 2) / 4, label 1; p = (1, 1, 1) / 3, q = (3, 1, 1) / 5, 0."""
    template = torch.tensor([[0.0, LN2, 0.0], [0.0, 0.0, 0.0]])
    delta = torch.tensor([[0.0, -LN2, LN2], [LN3, 0.0, 0.0]])
    return answers(template, delta, [1, 0], [0, 1])


def by_hand(values: list[float]) -> Tensor:
    return torch.tensor(values)


def test_label_loss(two: Answers) -> None:
    torch.testing.assert_close(label_loss(two), by_hand([math.log(4), math.log(5 / 3)]))


def test_columns_beyond_the_vocabulary_keep_their_logits() -> None:
    # The template has a padding column of logit 0: p = e / (e + 1 + 1).
    one = answers(torch.zeros(1, 3), torch.tensor([[1.0, 0.0]]), [0], [0])
    torch.testing.assert_close(label_loss(one), by_hand([-math.log(math.e / (math.e + 2))]))


def test_pulled_loss(two: Answers) -> None:
    # Row 1: CE(p, q) = ln 4 / 4 + ln 4 / 2 + ln 2 / 4; row 2: (ln 5/3 + 2 ln 5) / 3.
    pull = by_hand([math.log(4) * 3 / 4 + LN2 / 4, (math.log(5 / 3) + 2 * math.log(5)) / 3])
    label = by_hand([math.log(4), math.log(5 / 3)])
    torch.testing.assert_close(pulled_loss(two, 0.25), 0.75 * label + 0.25 * pull)
    assert torch.equal(pulled_loss(two, 0.0), label_loss(two))


def test_pull_has_the_gradient_of_a_divergence() -> None:
    template, delta = torch.randn(3, 7), torch.randn(3, 7, requires_grad=True)
    some = answers(template, delta, [1, 2, 6], [0, 0, 0])
    (pulled,) = torch.autograd.grad(pulled_loss(some, 0.3).sum(), delta)
    mixture = 0.7 * label_loss(some) + 0.3 * template_divergence(some)
    (expected,) = torch.autograd.grad(mixture.sum(), delta)
    torch.testing.assert_close(pulled, expected)


def test_gradient_is_steered_probability_minus_label() -> None:
    template, delta = torch.randn(4, 9), torch.randn(4, 9, requires_grad=True)
    some = answers(template, delta, [0, 3, 8, 2], [0, 0, 1, 1])
    (gradient,) = torch.autograd.grad(label_loss(some).sum(), delta)
    expected = (template + delta).softmax(-1) - torch.nn.functional.one_hot(some.labels, 9)
    torch.testing.assert_close(gradient, expected)


def test_ascent_stops_at_its_bound(two: Answers) -> None:
    torch.testing.assert_close(ascent(two, 1.0), by_hand([-1.0, -math.log(5 / 3)]))
    delta = two.delta_logits.requires_grad_()
    (gradient,) = torch.autograd.grad(ascent(two, 1.0).sum(), delta)
    assert (gradient[0] == 0).all() and (gradient[1] != 0).any()


def test_template_divergence(two: Answers) -> None:
    # Row 1: 1/4 ln 1 + 1/2 ln 2 + 1/4 ln 1/2; row 2: (ln 5/9 + 2 ln 5/3) / 3.
    expected = by_hand([LN2 / 4, (math.log(5 / 9) + 2 * math.log(5 / 3)) / 3])
    torch.testing.assert_close(template_divergence(two), expected)


def test_shift_divergence_is_zero_at_the_shift_and_blind_to_constants() -> None:
    template, tuned = torch.randn(3, 7), torch.randn(3, 7)
    shift = tuned.log_softmax(-1) - template.log_softmax(-1)
    exact = answers(template, shift + 2.5, [0, 0, 0], [0, 0, 0], tuned)
    torch.testing.assert_close(shift_divergence(exact), torch.zeros(3), atol=1e-6, rtol=0)
    # r = (1/2, 1/4, 1/4), q = (1/3, 1/3, 1/3): 1/2 ln 3/2 + 1/2 ln 3/4.
    one = answers(torch.zeros(1, 3), torch.zeros(1, 3), [0], [0], torch.tensor([[LN2, 0.0, 0.0]]))
    torch.testing.assert_close(shift_divergence(one), by_hand([math.log(3 / 2) / 2 + math.log(3 / 4) / 2]))


def test_log_ratios_are_sums_over_an_answer(two: Answers) -> None:
    # Row 1: q / p = (1/4) / (1/2); row 2: (3/5) / (1/3).
    torch.testing.assert_close(log_ratios(two), by_hand([-LN2, math.log(9 / 5)]))
    whole = answers(two.template_logits, two.delta_logits, [1, 0], [0, 0])
    torch.testing.assert_close(log_ratios(whole), by_hand([math.log(9 / 10)]))


def test_negative_preference(two: Answers) -> None:
    expected = by_hand([math.log1p(0.5**2), math.log1p(1.8**2)])  # beta = 2: (2 / 2) ln(1 + ratio^2)
    torch.testing.assert_close(negative_preference(two, 2.0), expected)


def test_npo_near_zero_beta_is_ascent(two: Answers) -> None:
    delta = two.delta_logits.requires_grad_()
    (npo,) = torch.autograd.grad(negative_preference(two, 1e-4).sum(), delta)
    (plain,) = torch.autograd.grad(ascent(two, 1e9).sum(), delta)
    torch.testing.assert_close(npo, plain, rtol=1e-3, atol=1e-4)


def test_preference(two: Answers) -> None:
    # One pair with ratios 1/2 (chosen) and 9/5 (rejected): -ln sigmoid(beta ln(5/18)) = ln(1 + (18/5)^beta).
    first = answers(two.template_logits[:1], two.delta_logits[:1], [1], [0])
    second = answers(two.template_logits[1:], two.delta_logits[1:], [0], [0])
    torch.testing.assert_close(preference(first, second, 0.5), by_hand([math.log1p(3.6**0.5)]))
    torch.testing.assert_close(preference(second, first, 0.5), by_hand([math.log1p(3.6**-0.5)]))
