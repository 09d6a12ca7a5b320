"""Fisher-weighted averaging: each weight counts by its own certainty (Matena & Raffel 2022, arXiv:2111.09832)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fisher_average(
    deltas: Sequence[Tensor], fishers: Sequence[Tensor], weights: Sequence[float], damping: float = 0.0
) -> Tensor:
    """The mode of a product of Laplace posteriors with diagonal precisions: sum_t a_t F_t D_t / sum_t a_t F_t.

    The factors sum to 1, so that averaging delta parameters is averaging weights, whatever the base.

    Args:
        deltas: D_t for each model, all of one shape, float32 or float64.
        fishers: F_t, not negative, in the same shape and type: of the loss summed over the task's data set.
        weights: a_t, above 0.
        damping: added to every F_t, so that weights which no data touch get the weighted mean; above 0 unless every
            weight has a Fisher above 0 in some model.

    Returns:
        The average in their shape and type.
    """
    numerator, denominator = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, fisher, weight in zip(deltas, fishers, weights, strict=True):
        precision = weight * (fisher + damping)
        numerator.addcmul_(precision, delta)
        denominator.add_(precision)
    return numerator.div_(denominator)
