"""Magnitude pruning of delta parameters: the smallest ones go, the rest stays as it is, without rescaling."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def prune_smallest(delta: Tensor, drop: float) -> Tensor:
    """Set the smallest delta parameters of one tensor to 0, which gives the weights of the base back.

    The baseline of DARE's paper (Yu et al. 2024, arXiv:2311.03099): E = -D where pruned and 0 elsewhere.

    Args:
        delta: D = W_post - W_base, any shape, float32.
        drop: share to prune in [0, 1]; exactly round(drop * n) elements go, of equal ones the first in row-major order.

    Returns:
        The edited delta parameters, float32 in the shape of ``delta``.

    Raises:
        ValueError: the share lies outside [0, 1].
    """
    if not 0 <= drop <= 1:
        raise ValueError(f"the share to prune must lie in [0, 1], not {drop}")
    return delta.masked_fill(smallest(delta.abs(), round(drop * delta.numel())), 0.0)


def smallest(values: Tensor, count: int) -> Tensor:
    """Mark the ``count`` smallest values; of equal ones the first in row-major order.

    Args:
        values: any shape, float32, no NaN.
        count: 0 to the number of elements.

    Returns:
        bool in the shape of ``values``, with exactly ``count`` True.
    """
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    # numpy partitions a copy in place, where torch.kthvalue would also carry 64-bit indices around.
    threshold = float(np.partition(values.flatten().numpy(), count - 1)[count - 1])
    below, equal = values < threshold, values == threshold
    missing = count - int(below.sum())
    if missing < int(equal.sum()):
        equal &= equal.flatten().cumsum(0).view_as(equal) <= missing
    return below | equal
