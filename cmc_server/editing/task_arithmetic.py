"""Task arithmetic: the weighted sum of several models' delta parameters (Ilharco et al. 2023, arXiv:2212.04089)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def task_arithmetic(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Add task vectors; one with a negative weight is taken away (task negation).

    The joint optimum theta* of base and tasks lies elsewhere, by the gradient mismatch of Daheim et al. 2024
    (arXiv:2310.12808): theta* - theta = -sum_t alpha_t H_0^-1 [grad l_t(theta*) - grad l_t(theta_t)]. See
    :mod:`cmc_server.editing.gradient_matching`.

    Args:
        deltas: D_t = theta_t - theta_0 for each model, all of one shape, float32 or float64.
        weights: alpha_t, one for each model.

    Returns:
        sum_t alpha_t D_t, in their shape and type.
    """
    merged = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        merged.add_(delta, alpha=weight)
    return merged
