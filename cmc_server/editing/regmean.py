"""RegMean: linear layers merged by regression on what goes into them (Jin et al. 2023, arXiv:2212.09849)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Share of the mean diagonal that is added to each Gram matrix: it decides only where inputs never vary.
RIDGE = 1e-6


def regmean(
    deltas: Sequence[Tensor], grams: Sequence[Tensor], weights: Sequence[float], off_diagonal: float = 0.9
) -> Tensor:
    """The layer whose outputs are nearest to each model's on that model's own inputs; solved in float64.

    W = (sum_t a_t G_t)^-1 sum_t a_t G_t W_t with G_t = X_t^T X_t, the paper's closed form with W_t as [in, out].
    Entries of G_t off its diagonal are multiplied by ``off_diagonal`` first, as the paper advises. It is
    gradient matching without a base for the quadratic losses |X_t (W - W_t)|^2. The factors sum to 1, so that merging
    delta parameters is merging weights.

    Args:
        deltas: D_t for each model, [out, in] as torch keeps linear layers, float32 or float64.
        grams: G_t, [in, in] in the same type.
        weights: a_t, above 0.
        off_diagonal: in [0, 1]; the paper's 0.9.

    Returns:
        The merged delta parameters, [out, in].

    Raises:
        ValueError: the summed matrix is singular, which takes an ``off_diagonal`` of 1.
    """
    size = deltas[0].shape[1]
    gram_sum = torch.zeros(size, size, dtype=torch.float64)
    right = torch.zeros(size, len(deltas[0]), dtype=torch.float64)
    for delta, gram, weight in zip(deltas, (gram.double() for gram in grams), weights, strict=True):
        scaled = weight * off_diagonal * gram
        diagonal = weight * gram.diagonal()
        # Of a layer that saw nothing at all the ridge makes the weighted mean.
        ridge = RIDGE * float(diagonal.mean()) or weight
        scaled.diagonal().copy_(diagonal + ridge)
        gram_sum += scaled
        right += scaled @ delta.T.double()
    factor, failed = torch.linalg.cholesky_ex(gram_sum)
    if int(failed):
        raise ValueError("the Gram matrices are singular; lower off_diagonal")
    return torch.cholesky_solve(right, factor).T.to(deltas[0].dtype).contiguous()
