"""Percentile bootstrap intervals (Efron 1979): of means, of paired differences, and of statistics of several means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000
LEVEL = 0.95
#: Draws in memory at once.
_MAX_DRAWS = 4_000_000

_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A statistic with its percentile bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} [{self.low:.1f}, {self.high:.1f}]"


def bootstrap_mean(values: ArrayLike, seed: int = 0) -> Interval:
    """Mean and 95% percentile bootstrap interval over items.

    Args:
        values: [n] one figure per item.
        seed: of the resampling.

    Raises:
        ValueError: there are no values.
    """
    sample = np.asarray(values, dtype=np.float64)
    return bootstrap_statistic([sample[:, None]], lambda means: means[0][:, 0], seed)


def bootstrap_difference(values: ArrayLike, base: ArrayLike, seed: int = 0) -> Interval:
    """Mean and interval of ``values - base``, item by item: what varies between the items drops out.

    Args:
        values: [n] one figure per item.
        base: [n] the same items under the other condition.
        seed: of the resampling.

    Raises:
        ValueError: there are no values, or not equally many.
    """
    return bootstrap_mean(_paired(values, base), seed)


def bootstrap_ratio(numerators: ArrayLike, denominators: ArrayLike, seed: int = 0) -> Interval:
    """``sum(numerators) / sum(denominators)`` with its interval; items are drawn with both of their figures.

    Args:
        numerators: [n] such as summed losses per text.
        denominators: [n] positive, such as tokens per text.
        seed: of the resampling.

    Raises:
        ValueError: there are no values, or not equally many.
    """
    _paired(numerators, denominators)
    both = np.stack([np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)], axis=1)
    return bootstrap_statistic([both], lambda means: means[0][:, 0] / means[0][:, 1], seed)


def bootstrap_statistic(
    groups: Sequence[_Floats], statistic: Callable[[Sequence[_Floats]], _Floats], seed: int = 0
) -> Interval:
    """A statistic of column means, with its 95% interval; each group of items is resampled on its own.

    Args:
        groups: each [n_g, c_g], one row per item.
        statistic: from the means of the groups, each [r, c_g], to [r] values, for any r.
        seed: of the resampling.

    Raises:
        ValueError: a group has no items.
    """
    if any(group.shape[0] == 0 for group in groups):
        raise ValueError("a mean needs at least one value")
    generator = np.random.default_rng(seed)
    point = statistic([group.mean(axis=0, keepdims=True) for group in groups])
    resampled = statistic([_resampled_means(group, generator) for group in groups])
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(float(point[0]), float(low), float(high))


def _resampled_means(group: _Floats, generator: np.random.Generator) -> _Floats:
    """[RESAMPLES, c] means of draws with replacement, as weights times values, in bounded pieces."""
    num_items = group.shape[0]
    size = max(1, _MAX_DRAWS // num_items)
    pieces = [_piece(group, min(size, RESAMPLES - start), generator) for start in range(0, RESAMPLES, size)]
    return np.concatenate(pieces)


def _piece(group: _Floats, num_resamples: int, generator: np.random.Generator) -> _Floats:
    num_items = group.shape[0]
    draws = generator.integers(num_items, size=(num_resamples, num_items))
    draws += np.arange(num_resamples)[:, None] * num_items
    weights = np.bincount(draws.ravel(), minlength=draws.size).reshape(draws.shape)
    means: _Floats = weights @ group / num_items
    return means


def _paired(values: ArrayLike, base: ArrayLike) -> _Floats:
    left, right = np.asarray(values, dtype=np.float64), np.asarray(base, dtype=np.float64)
    if left.shape != right.shape:
        raise ValueError(f"paired figures must be equally many, not {left.size} and {right.size}")
    return left - right
