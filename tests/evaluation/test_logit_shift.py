"""Logit shifts and their distances by hand, within one vocabulary and across two."""

from __future__ import annotations

import math

import pytest
import torch

from cmc_server.evaluation.logit_shift import compare_shifts, logit_shift, shared_steps, top_tokens


def test_a_shift_is_the_difference_of_log_probabilities() -> None:
    base = torch.log(torch.tensor([[0.5, 0.25, 0.25]])) + 7  # logits are free of a constant
    tuned = torch.log(torch.tensor([[0.25, 0.5, 0.25]]))
    expected = torch.tensor([[-math.log(2), math.log(2), 0.0]], dtype=torch.float64)
    torch.testing.assert_close(logit_shift(tuned, base), expected, atol=1e-6, rtol=0)


def test_ruled_out_tokens() -> None:
    both = torch.tensor([[0.0, -torch.inf]])
    assert logit_shift(both, both).tolist() == [[0, 0]]
    with pytest.raises(ValueError, match="infinite"):
        logit_shift(torch.zeros(1, 2), both)


def test_top_tokens_are_those_of_the_named_scores() -> None:
    scores = torch.tensor([[0.1, 3.0, 2.0, 1.0], [5.0, 1.0, 0.0, 4.0]])
    assert top_tokens(scores, 2).tolist() == [[1, 2], [0, 3]]
    assert top_tokens(scores, 2, torch.tensor([7, -1, 5, 6])).tolist() == [[2, 3], [0, 3]]
    assert top_tokens(scores, 9, torch.tensor([7, -1, 5, -1])).tolist() == [[2, 0], [0, 2]]


def test_distances_by_hand() -> None:
    first = torch.tensor([[1.0, 0.0, 9.0], [0.0, 2.0, 9.0]])
    second = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    result = compare_shifts(first, second, torch.tensor([[0, 1], [0, 1]]))
    assert result.num_steps == 2
    assert result.cosine == pytest.approx((1 / math.sqrt(2) + 1) / 2)
    assert result.l1 == pytest.approx((0 + 1 + 0 + 1) / 4)
    # Clouds {(1,0), (0,2)} and {(1,1), (0,1)}: both points move by 1, half of 1 each, over two tokens.
    assert result.sinkhorn == pytest.approx(0.5 / 2, abs=1e-3)


def test_equal_shifts_are_no_distance_apart_and_order_matters_only_step_by_step() -> None:
    shift = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(8).expand(6, 8)
    same = compare_shifts(shift, shift, tokens)
    assert (same.sinkhorn, same.l1) == (0, 0) and same.cosine == pytest.approx(1)
    turned = compare_shifts(shift, shift.flip(0), tokens)
    assert turned.sinkhorn == pytest.approx(0, abs=1e-9)
    assert turned.l1 > 0.1 and turned.cosine < 0.9


def test_across_vocabularies_the_map_says_which_tokens_are_compared() -> None:
    first = torch.tensor([[1.0, 2.0, 3.0]])
    second = torch.tensor([[3.0, 0.0, 1.0, 0.0]])
    delta_ids = torch.tensor([2, -1, 0])  # the first vocabulary's 0 is the second's 2, its 2 the second's 0
    result = compare_shifts(first, second, torch.tensor([[2, 0]]), delta_ids)
    assert (result.l1, result.sinkhorn) == (0, 0) and result.cosine == pytest.approx(1)
    with pytest.raises(ValueError, match="not mapped"):
        compare_shifts(first, second, torch.tensor([[1, 0]]), delta_ids)


def test_steps_must_fit() -> None:
    with pytest.raises(ValueError, match="same steps"):
        compare_shifts(torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(2, 1, dtype=torch.int64))


def test_steps_that_begin_at_the_same_place() -> None:
    # "abcdef" as ab|cd|ef and as abc|d|ef: both begin a token at 0 and at 4.
    assert shared_steps([2, 2, 2], [3, 1, 2]) == [(0, 0), (2, 2)]
    assert shared_steps([3], [1, 1, 1]) == [(0, 0)]
    # A token without bytes, such as an end token, is followed by one at the same place.
    assert shared_steps([0, 2], [2]) == [(1, 0)]
