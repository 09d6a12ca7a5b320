"""Twin-Merging's compression of delta parameters: a truncated SVD (Lu et al. 2024, arXiv:2406.15479)."""

from __future__ import annotations

import torch
from torch import Tensor


def truncate(delta: Tensor, rank: int) -> Tensor:
    """The best approximation of given rank: U_r S_r V_r^T, so that E = U_r S_r V_r^T - D.

    Args:
        delta: D = W_post - W_base, [rows, columns] float32.
        rank: r, at least 1; one of at least min(rows, columns) returns ``delta`` itself.

    Returns:
        The edited delta parameters, [rows, columns] float32.

    Raises:
        ValueError: the rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"the rank must be at least 1, not {rank}")
    if rank >= min(delta.shape):
        return delta
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    truncated: Tensor = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return truncated


def rank_of_rate(shape: tuple[int, ...], drop: float) -> int:
    """The rank that is left when a share of the singular values is dropped; at least 1.

    Args:
        shape: [rows, columns] of the matrix.
        drop: share in [0, 1); the unified view's experiments use 0.9 (arXiv:2410.13841, figure 3).
    """
    return max(1, round((1 - drop) * min(shape)))
