"""The two-sample Kolmogorov-Smirnov test, exact for any sample size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class KsTest:
    """Result of the test.

    Args:
        statistic: largest distance between the two empirical distribution functions, 0 to 1.
        p_value: two-sided probability of such a distance or a larger one, if both samples come from one continuous
            distribution.
    """

    statistic: float
    p_value: float


def ks_test(first: ArrayLike, second: ArrayLike) -> KsTest:
    """Test whether two samples come from one distribution.

    D = max over x of |F_1(x) - F_2(x)|. The p-value counts lattice paths (Hodges 1957): if both samples come from one
    distribution, all orders of the n + m values are equally likely, each order is a path from (0, 0) to (n, m), and D
    is reached where a path passes a point (i, j) with |i/n - j/m| >= D. Ties are treated as in scipy's exact method:
    the statistic respects them, the count of orders does not.

    Args:
        first: [n] finite values.
        second: [m] finite values.

    Raises:
        ValueError: a sample is empty or holds a value that is not finite.
    """
    one, two = np.sort(np.asarray(first, np.float64)), np.sort(np.asarray(second, np.float64))
    if not one.size or not two.size or not (np.isfinite(one).all() and np.isfinite(two).all()):
        raise ValueError("both samples of a Kolmogorov-Smirnov test must hold finite values, at least one each")
    values = np.concatenate([one, two])
    below_one = np.searchsorted(one, values, side="right")
    below_two = np.searchsorted(two, values, side="right")
    # In integers, so that a path that reaches D exactly is never missed by rounding.
    distance = int(np.abs(below_one * two.size - below_two * one.size).max())
    return KsTest(distance / (one.size * two.size), _share_of_paths(one.size, two.size, distance))


def _share_of_paths(n: int, m: int, distance: int) -> float:
    """Share of the lattice paths to (n, m) that pass a point with |i*m - j*n| >= distance.

    q[i, j], the share among the paths to (i, j), is 1 on such a point and else
    q[i-1, j] * i/(i+j) + q[i, j-1] * j/(i+j), since i of the i + j equally likely last steps come from the left. Only
    positive numbers are added, so that a p-value of 1e-30 is as exact as one of 0.5. One anti-diagonal at a time.
    """
    shares: NDArray[np.float64] = np.array([1.0 if distance <= 0 else 0.0])
    first = 0
    for total in range(1, n + m + 1):
        i = np.arange(max(0, total - m), min(n, total) + 1)
        j = total - i
        # shares[k] belongs to i = first + k on the diagonal before; outside it there are no paths.
        padded = np.concatenate([[0.0], shares, [0.0]])
        place = i - first + 1
        from_left = padded[np.clip(place - 1, 0, len(padded) - 1)]
        from_below = padded[np.clip(place, 0, len(padded) - 1)]
        shares = np.where(np.abs(i * m - j * n) >= distance, 1.0, (from_left * i + from_below * j) / total)
        first = int(i[0])
    return float(min(1.0, shares[-1]))
