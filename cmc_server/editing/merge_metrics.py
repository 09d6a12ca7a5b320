"""How good a merge is: its distance to a jointly trained model, the gradient mismatch, and how much its weights matter.

Daheim et al. 2024 (arXiv:2310.12808) trace the error of task arithmetic back to the gradient mismatch
grad l_t(theta*) - grad l_t(theta_t) between the jointly trained target theta* and each model theta_t on its own task,
and draw the loss against one factor alpha on all weights: a merge that needs no tuning has a flat curve around 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def relative_distance(pieces: Iterable[tuple[Tensor, Tensor, Tensor]]) -> float:
    """|merged - target| / |target - base|: 0 where the target is met, 1 for a merge that is as far as the base is.

    Args:
        pieces: merged, target and base, of one shape each, of any floating-point type.

    Returns:
        The ratio of Euclidean norms over all pieces; infinity if target and base are equal and the merged is not.
    """
    distance = span = 0.0
    for merged, target, base in pieces:
        distance += _squares(merged.float() - target.float())
        span += _squares(target.float() - base.float())
    if span == 0:
        return 0.0 if distance == 0 else math.inf
    return math.sqrt(distance / span)


def gradient_mismatch(at_target: Iterable[Tensor], at_model: Iterable[Tensor]) -> float:
    """The norm of grad l_t(theta*) - grad l_t(theta_t) over all weights, in the loss's unit.

    Args:
        at_target: the gradient of one task's loss at the jointly trained model, weight by weight.
        at_model: the same at the model that was trained on this task.
    """
    return math.sqrt(
        sum(_squares(one.double() - other.double()) for one, other in zip(at_target, at_model, strict=True))
    )


def robustness_curve(losses: Callable[[float], Sequence[float]], alphas: Iterable[float]) -> dict[str, Any]:
    """Losses of a merge against a factor on all its weights.

    Args:
        losses: from alpha to each task's loss.
        alphas: where to measure, in the order of the curve.

    Returns:
        JSON values: ``points`` (each ``alpha``, ``losses``, ``mean``), ``best_alpha`` by the mean, and ``spread``, the
        highest mean minus the lowest.
    """
    points = []
    for alpha in alphas:
        values = list(losses(alpha))
        points.append({"alpha": alpha, "losses": values, "mean": sum(values) / len(values)})
    means = [float(point["mean"]) for point in points]  # type: ignore[arg-type]
    best = min(range(len(means)), key=means.__getitem__)
    return {"points": points, "best_alpha": points[best]["alpha"], "spread": max(means) - min(means)}


def _squares(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
