"""Bootstrap intervals against theory, and by hand where they are exact."""

from __future__ import annotations

import numpy as np
import pytest

from cmc_server.evaluation import bootstrap
from cmc_server.evaluation.bootstrap import (
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_statistic,
)


def test_equal_values_have_no_spread() -> None:
    point = bootstrap_mean([4, 4, 4])
    assert (point.mean, point.low, point.high) == (4, 4, 4)


def test_the_interval_repeats_with_its_seed() -> None:
    values = [1, 2, 3, 10, 20]
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_the_interval_is_as_wide_as_theory_says() -> None:
    # 100 values of 0 and 100 of 1: the standard error of the mean is 0.5 / sqrt(200).
    interval = bootstrap_mean([0, 1] * 100)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.5 / 200**0.5, rel=0.1)


def test_it_resamples_as_a_loop_would() -> None:
    values = np.array([0.0, 1.0, 5.0])
    generator = np.random.default_rng(3)
    draws = generator.integers(3, size=(10_000, 3))
    means = [np.mean([values[index] for index in draw]) for draw in draws]
    interval = bootstrap_mean(values, seed=3)
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))


def test_paired_differences_lose_what_varies_between_items() -> None:
    base = np.linspace(-100, 100, 50)
    interval = bootstrap_difference(base + 1, base)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((1, 1, 1))


def test_a_ratio_weighs_items_by_their_denominator() -> None:
    # Two texts: 10 nats over 1 token, and 10 nats over 9 tokens: 20 nats over 10 tokens, not the mean of 10 and 1.1.
    interval = bootstrap_ratio([10, 10], [1, 9])
    assert interval.mean == 2
    assert (interval.low, interval.high) == pytest.approx((10 / 9, 10))


def test_groups_are_resampled_on_their_own() -> None:
    groups = [np.array([[1.0], [3.0]]), np.array([[10.0], [30.0]])]
    interval = bootstrap_statistic(groups, lambda means: means[0][:, 0] * means[1][:, 0])
    assert (interval.mean, interval.low, interval.high) == (40, 10, 90)


@pytest.mark.parametrize("bad", [lambda: bootstrap_mean([]), lambda: bootstrap_difference([1, 2], [1])])
def test_what_cannot_be_resampled(bad) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"at least one|equally many"):
        bad()


def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=30)
    whole = bootstrap_mean(values)
    monkeypatch.setattr(bootstrap, "_MAX_DRAWS", 100_000)
    assert bootstrap_mean(values) == whole
