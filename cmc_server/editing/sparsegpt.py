"""SparseGPT: prune by columns, and let those behind make up for it (Frantar & Alistarh 2023, arXiv:2301.00774)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cmc_server.editing.masks import Pattern, Target, below_all, lowest_dropped, pattern_kept, shared_out

#: Share of the Hessian's mean diagonal that is added to its diagonal.
DAMPING = 0.01
#: Columns that the mask is chosen for at once.
BLOCK = 128


def sparsegpt(
    weight: Tensor, gram: Tensor, target: Target, kept: Tensor | None = None, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """Prune a linear layer so that its outputs on the calibration data change little.

    With H = 2 X X^T / n, damped, and U the upper Cholesky factor of H^-1, columns are walked from left to right: a
    weight w_ij that goes costs w_ij^2 / U_jj^2, and the weights behind it change by -w_ij U_j / U_jj, the optimal
    brain surgeon's update where all weights before j are fixed. The mask is chosen for a block of columns at once, from
    the weights as they then are, over all rows together; a pattern is chosen for each M columns when they are reached.
    Weights of inputs that are always 0 cost nothing and go first. (The authors' code sets those to 0 that may stay as
    well; here a weight becomes 0 only where the mask says so.)

    Args:
        weight: [out, in] float32.
        gram: X^T X over calibration tokens, [in, in] float32; a factor on it changes nothing.
        target: how many weights go, shared evenly over the blocks of columns, or a pattern.
        kept: the mask before, whose dropped weights go first; None if there was none.
        damping: share of the mean diagonal that is added to the diagonal; 1 % as published.

    Returns:
        The weights, [out, in] float32, 0 where they went; and the mask, [out, in] bool, True where a weight stays.

    Raises:
        ValueError: the damped Hessian is not positive definite, or the pattern does not divide the width.
    """
    width = weight.shape[1]
    if isinstance(target, Pattern) and width % target.of:
        raise ValueError(f"the pattern {target} does not divide the width {width}")
    factor, weight, mask = _inverse_factor(gram, damping), weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    silent = gram.diagonal() == 0
    size = BLOCK if isinstance(target, int) else max(BLOCK // target.of, 1) * target.of
    blocks = [slice(first, min(first + size, width)) for first in range(0, width, size)]
    kept = torch.ones_like(mask) if kept is None else kept
    numbers = _numbers(blocks, kept, target) if isinstance(target, int) else None
    for index, block in enumerate(blocks):
        before = kept[:, block]
        own, errors = weight[:, block], torch.empty_like(weight[:, block])
        upper = factor[block, block]
        if numbers is not None:
            scores = below_all(_costs(own, upper, silent[block]), before)
            mask[:, block] = lowest_dropped(scores, numbers[index])
        for column in range(own.shape[1]):
            if isinstance(target, Pattern) and column % target.of == 0:
                group = slice(column, column + target.of)
                scores = _costs(own[:, group], upper[group, group], silent[block][group])
                mask[:, block][:, group] = pattern_kept(below_all(scores, before[:, group]), target)
            gone = ~mask[:, block][:, column]
            errors[:, column] = own[:, column] * gone / upper[column, column]
            own[:, column:] -= errors[:, column, None] * upper[column, None, column:]
            own[gone, column] = 0  # not merely nearly
        weight[:, block.stop :] -= errors @ factor[block, block.stop :]
    return weight, mask


def _numbers(blocks: Sequence[slice], kept: Tensor, target: int) -> list[int]:
    """How many weights go in each block of columns."""
    areas = [kept[:, block].numel() for block in blocks]
    gone = [int((~kept[:, block]).sum()) for block in blocks]
    return shared_out(areas, [target / kept.numel()] * len(areas), gone)


def _costs(weight: Tensor, upper: Tensor, silent: Tensor) -> Tensor:
    return (weight / upper.diagonal()).square().masked_fill(silent, 0.0)


def _inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """U with U^T U = H^-1; its trailing parts are the factors of the inverses of H's trailing parts."""
    hessian = gram.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if not int(failed):
        lower, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower))
    if int(failed):
        raise ValueError("the Hessian is not positive definite; give more calibration data")
    upper: Tensor = lower.T
    return upper
