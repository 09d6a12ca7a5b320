"""Wanda: prune by magnitude times the norm of the input, within each output (Sun et al. 2024, arXiv:2306.11695)."""

from __future__ import annotations

from torch import Tensor

from cmc_server.editing.masks import Pattern, Target, below_all, lowest_dropped_by_row, pattern_kept


def wanda_scores(weight: Tensor, gram: Tensor) -> Tensor:
    """S_ij = |W_ij| * ||X_j||_2, equation 1 of the paper.

    Args:
        weight: W, [out, in] float32.
        gram: X^T X over calibration tokens, [in, in] float32; a factor on it changes no ranking.

    Returns:
        [out, in] float32, at least 0.
    """
    return weight.abs() * gram.diagonal().clamp_min(0).sqrt()


def wanda(weight: Tensor, gram: Tensor, target: Target, kept: Tensor | None = None) -> Tensor:
    """The mask of a linear layer; the weights that stay are not changed.

    Scores are compared within each row, the weights of one output, where the paper found them comparable.

    Args:
        weight: [out, in] float32.
        gram: see :func:`wanda_scores`.
        target: how many weights go, the same in each row up to one, or a pattern.
        kept: the mask before, whose dropped weights go first; None if there was none.

    Returns:
        [out, in] bool, True where a weight stays.
    """
    scores = below_all(wanda_scores(weight, gram), kept)
    if isinstance(target, Pattern):
        return pattern_kept(scores, target)
    return lowest_dropped_by_row(scores, target)
