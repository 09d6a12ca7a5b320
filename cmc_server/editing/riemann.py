"""What an edit does to a loss: the Riemann sum of the unified view of delta parameter editing, beside the exact value.

With E = W_edit - W_post and phi(t) = L(W_post + t E), the paper (arXiv:2410.13841) writes

    L(W_edit) - L(W_post) = phi(1) - phi(0) = integral of phi' over [0, 1] ~ 1/C sum_{c < C} phi'(c / C),   C = 5,

where phi'(t) = <grad L(W_post + t E), E>. Its reviewers asked for the exact difference beside the sum, for the spread
over masks and for intervals; the first- and second-order terms of phi at 0 say which order an effect is of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor

PARTS = 5
_DRAWS = 10_000


@dataclass(frozen=True)
class LossTerms:
    """A loss difference in four ways, in the unit of the loss.

    Args:
        exact: phi(1) - phi(0).
        riemann: mean of phi'(c / C) over c = 0 .. C - 1.
        first_order: phi'(0).
        second_order: phi''(0) / 2.
    """

    exact: float
    riemann: float
    first_order: float
    second_order: float


TERMS = tuple(LossTerms.__dataclass_fields__)


def loss_terms(phi: Callable[[Tensor], Tensor], parts: int = PARTS) -> LossTerms:
    """Take a loss along the straight path of an edit apart.

    Args:
        phi: from t, a float64 scalar, to the loss, a scalar; twice differentiable by autograd.
        parts: C.
    """
    start = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = phi(start)
    (slope,) = torch.autograd.grad(value, start, create_graph=True)
    # A loss that is linear in t has no second derivative in the graph.
    curvature = torch.autograd.grad(slope, start)[0] if slope.requires_grad else torch.zeros(())
    slopes = [float(slope.detach())]
    for part in range(1, parts):
        point = torch.tensor(part / parts, dtype=torch.float64, requires_grad=True)
        slopes.append(float(torch.autograd.grad(phi(point), point)[0]))
    with torch.no_grad():
        end = float(phi(torch.ones((), dtype=torch.float64)))
    return LossTerms(
        exact=end - float(value.detach()),
        riemann=sum(slopes) / parts,
        first_order=slopes[0],
        second_order=float(curvature) / 2,
    )


def ratio_intervals(sums: np.ndarray, weights: np.ndarray, seed: int = 0) -> np.ndarray:
    """Means with 95 % percentile bootstrap intervals (Efron 1979) over examples, of many columns at once.

    Args:
        sums: [N, K], a total of each example.
        weights: [N], what the totals are divided by, such as tokens.
        seed: of the resampling.

    Returns:
        [3, K]: sum over sum, and the ends of its interval.
    """
    count = len(sums)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=_DRAWS)
    resampled = draws @ sums / (draws @ weights)[:, None]
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    return np.stack([sums.sum(0) / weights.sum(), low, high])


def as_rows(terms: list[LossTerms]) -> np.ndarray:
    """[len(terms), 4] in the order of :data:`TERMS`."""
    return np.array([astuple(one) for one in terms])
