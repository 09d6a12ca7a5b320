"""The Kolmogorov-Smirnov test against counting every order by hand, and against published values."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest

from cmc_server.evaluation.ks import ks_test


def statistic(first: list[float], second: list[float]) -> float:
    """D as it is defined, at every value."""
    return max(
        abs(np.mean([one <= x for one in first]) - np.mean([one <= x for one in second])) for x in [*first, *second]
    )


def p_value(n: int, m: int, observed: float) -> float:
    """Share of all orders of n + m values whose statistic reaches the observed one."""
    hits = 0
    for places in combinations(range(n + m), n):
        first = [float(place) for place in places]
        second = [float(place) for place in range(n + m) if place not in places]
        hits += statistic(first, second) >= observed - 1e-12
    return hits / comb(n + m, n)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 4), (3, 3), (4, 6), (5, 5), (7, 3)])
def test_every_order_counted(n: int, m: int) -> None:
    generator = np.random.default_rng(n * 10 + m)
    for _ in range(5):
        first, second = generator.normal(size=n).tolist(), generator.normal(0.5, size=m).tolist()
        result = ks_test(first, second)
        assert result.statistic == pytest.approx(statistic(first, second))
        assert result.p_value == pytest.approx(p_value(n, m, result.statistic))


def test_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    for n, m in ((3, 5), (40, 40), (40, 57), (300, 200)):
        first, second = generator.normal(size=n), generator.normal(0.4, size=m)
        expected = stats.ks_2samp(first, second, method="exact")
        result = ks_test(first, second)
        assert (result.statistic, result.p_value) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-6)


def test_by_hand() -> None:
    assert ks_test([1, 2, 3], [4, 5, 6]).statistic == 1
    assert ks_test([1, 2, 3], [4, 5, 6]).p_value == pytest.approx(2 / 20)  # two of the C(6, 3) orders
    assert ks_test([1, 3, 5], [2, 4, 6]).statistic == pytest.approx(1 / 3)
    assert ks_test([1, 3, 5], [2, 4, 6]).p_value == pytest.approx(1)
    assert ks_test([1, 2], [1, 2]) == ks_test([2, 1], [2, 1])
    assert ks_test([1, 2], [1, 2]).p_value == 1


def test_tiny_p_values_keep_their_digits() -> None:
    # Two samples of 400 that do not overlap: two orders among all.
    result = ks_test(np.arange(400), np.arange(400, 800))
    assert result.p_value == pytest.approx(2 / comb(800, 400), rel=1e-9)


def test_large_samples_meet_the_limit_distribution() -> None:
    # Kolmogorov's limit: at 1.358 * sqrt(2 / n) the p-value is 0.05.
    n = 3000
    first = np.arange(n, dtype=float)
    shift = round(1.358 * (2 / n) ** 0.5 * n)
    assert ks_test(first, first + shift - 0.5).p_value == pytest.approx(0.05, abs=0.003)


def test_it_is_symmetric() -> None:
    first, second = [0.1, 0.5, 0.9, 2.0], [0.2, 0.3, 1.5, 1.6, 1.7, 3.0]
    assert ks_test(first, second).p_value == pytest.approx(ks_test(second, first).p_value)


@pytest.mark.parametrize("bad", [[], [float("nan")], [float("inf"), 1]])
def test_bad_samples(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        ks_test(bad, [1, 2])
