"""Uncertainty-based gradient matching: merge, or take away again, with Hessians (Daheim et al. 2024, arXiv:2310.12808).

Model t minimises l_t(theta) + 1/2 |theta - theta_0|^2 in the norm of H_0, the curvature of the base. Expanding its
gradient around theta_t, the joint optimum of the base and of sum_t alpha_t l_t is

    theta = theta_0 + sum_t alpha_t Hbar^-1 (H_0 + H_t) (theta_t - theta_0),   Hbar = H_0 + sum_t alpha_t H_t,

exactly so for quadratic losses. Data are removed by a negative alpha_t: the optimum of the base without alpha l_t. With
H_t = 0 it is task arithmetic, with H_0 = 0 Fisher averaging. All Hessians are diagonal here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gradient_matching(
    deltas: Sequence[Tensor], hessians: Sequence[Tensor], weights: Sequence[float], base_hessian: Tensor
) -> Tensor:
    """Merge delta parameters so that the gradients match at the joint optimum.

    Args:
        deltas: D_t = theta_t - theta_0 for each model, all of one shape, float32 or float64.
        hessians: the diagonals H_t of the tasks' losses, summed over their data; not negative, same shape and type.
        weights: alpha_t; negative ones remove.
        base_hessian: the diagonal H_0 likewise, any damping included.

    Returns:
        theta - theta_0 in their shape and type.

    Raises:
        ValueError: Hbar is not above 0 everywhere; see :func:`guarded`.
    """
    total = base_hessian.clone()
    merged = torch.zeros_like(deltas[0])
    for delta, hessian, weight in zip(deltas, hessians, weights, strict=True):
        total.add_(hessian, alpha=weight)
        merged.add_((base_hessian + hessian).mul_(delta), alpha=weight)
    if not bool((total > 0).all()):
        raise ValueError("H0 + sum alpha_t Ht must be above 0 everywhere")
    return merged.div_(total)


def guarded(
    hessians: Sequence[Tensor], weights: Sequence[float], base_hessian: Tensor, floor: float
) -> tuple[list[Tensor], int]:
    """Make removal well posed: it needs H_0 above alpha H_t, and near equality any step becomes huge.

    Where Hbar falls below a share of what adds up in it (H_0 and the H_t of positive weight), the Hessians of negative
    weight are scaled down until it does not. This one guard is ours; the paper leaves the choice open. Removing one
    model with alpha 1, no weight then moves by more than (2 - floor) / floor times its delta parameter.

    Args:
        hessians: as for :func:`gradient_matching`.
        weights: likewise.
        base_hessian: likewise.
        floor: the share, in (0, 1).

    Returns:
        The Hessians to merge with, and for how many weights they were scaled down.
    """
    if all(weight >= 0 for weight in weights):
        return list(hessians), 0
    added, removed = base_hessian.clone(), torch.zeros_like(base_hessian)
    for hessian, weight in zip(hessians, weights, strict=True):
        (added if weight > 0 else removed).add_(hessian, alpha=abs(weight))
    most = added.mul_(1 - floor)
    wrong = removed > most
    num_clamped = int(wrong.sum())
    if not num_clamped:
        return list(hessians), 0
    factor = torch.where(wrong, most / removed, 1.0)
    pairs = zip(hessians, weights, strict=True)
    return [hessian * factor if weight < 0 else hessian for hessian, weight in pairs], num_clamped
