"""The debiased Sinkhorn divergence between two point clouds (Feydy et al. 2019), in the log domain and float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Regularisation as in the paper: eps = BLUR**2 for the cost 1/2 |x - y|^2.
BLUR = 0.01
#: eps shrinks by this factor from the squared diameter down to BLUR**2.
_SCALING = 0.9
#: Most sweeps at each eps on the way down, and at the last one. Ties between plans need many of them early: at the last
#: eps, which is tiny beside the costs, what is still undecided moves hardly any more.
_SWEEPS = 100
_MAX_SWEEPS = 20_000
#: Converged: the transport plan's marginals are off by less than this in total (1 would be everything).
_TOLERANCE = 1e-4
#: On the way down it is enough to be this close.
_COARSE_TOLERANCE = 1e-3


def sinkhorn_divergence(x: Tensor, y: Tensor, blur: float = BLUR) -> float:
    """S(x, y) = OT(x, y) - OT(x, x)/2 - OT(y, y)/2, all points of a cloud weighing the same.

    OT(x, y) = min over plans P of <P, C> + eps * KL(P || a b^T) with C_ij = 1/2 |x_i - y_j|^2 and eps = blur^2. As blur
    falls this is half the squared Wasserstein-2 distance. It compares clouds: the order of the points is ignored.

    Args:
        x: [n, d] points.
        y: [m, d] points.
        blur: the square root of eps, in the units of the points.

    Returns:
        S, in squared units of the points; 0 for equal clouds.

    Raises:
        ValueError: the shapes do not fit, or a value is not finite.
        ArithmeticError: the iteration did not converge.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not x.shape[0] or not y.shape[0]:
        raise ValueError(
            f"clouds must be [n, d] and [m, d] with points in both, not {list(x.shape)} and {list(y.shape)}"
        )
    x, y = x.double(), y.double()
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("a cloud holds values that are not finite")
    if x.shape == y.shape and torch.equal(x, y):
        return 0.0
    # Moving both clouds together changes no distance, and small coordinates keep their digits.
    centre = torch.cat([x, y]).mean(0)
    x, y = x - centre, y - centre
    return _transport_cost(x, y, blur) - 0.5 * _transport_cost(x, x, blur) - 0.5 * _transport_cost(y, y, blur)


def _transport_cost(x: Tensor, y: Tensor, blur: float) -> float:
    """OT(x, y) as the dual value <a, f> + <b, g> once both marginals hold."""
    cost = 0.5 * torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    target = blur**2
    log_a, log_b = -math.log(x.shape[0]), -math.log(y.shape[0])
    f, g = x.new_zeros(x.shape[0]), y.new_zeros(y.shape[0])
    eps = max(2 * float(cost.max()), target)
    while True:
        num_sweeps, tolerance = (_SWEEPS, _COARSE_TOLERANCE) if eps > target else (_MAX_SWEEPS, _TOLERANCE)
        for sweep in range(num_sweeps):
            new_f = -eps * torch.logsumexp((g - cost) / eps + log_b, dim=1)
            # Before this update the columns hold exactly, so what is left is the error of the rows.
            error = float((torch.exp((f - new_f) / eps) - 1).abs().mean()) if sweep else math.inf
            f = new_f
            g = -eps * torch.logsumexp((f.unsqueeze(1) - cost) / eps + log_a, dim=0)
            if error < tolerance:
                break
        else:
            if eps <= target:
                raise ArithmeticError(f"the Sinkhorn iteration is off by {error:.2g} after {_MAX_SWEEPS} sweeps")
        if eps <= target:
            return float(f.mean() + g.mean())
        eps = max(eps * _SCALING, target)
