"""TIES-Merging: trim, elect a sign, average those that agree (Yadav et al. 2023, arXiv:2306.01708)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

_HALF = 1 << 16


def trim(delta: Tensor, threshold: float) -> Tensor:
    """Set delta parameters below a magnitude to 0; those equal to it stay.

    With one model this is all that the unified view of delta parameter editing calls TIES (arXiv:2410.13841):
    E = -D where trimmed.

    Args:
        delta: D = W_post - W_base, any shape, float32.
        threshold: of :func:`trim_threshold`.

    Returns:
        float32 in the shape of ``delta``.
    """
    return torch.where(delta.abs() >= threshold, delta, 0.0)


def trim_threshold(pieces: Iterable[Tensor], again: Iterable[Tensor], drop: float) -> float:
    """The magnitude that a share of a model's delta parameters lies below: over the whole model, as published.

    Exact and with little memory: the bits of a non-negative float32 order like its value, so one pass counts their
    upper halves and a second one the lower halves within the one that matters.

    Args:
        pieces: all delta parameters, in pieces of any shape, float32 without NaN.
        again: the same once more.
        drop: share in [0, 1); the paper keeps 20 %, drop 0.8.

    Returns:
        The smallest magnitude that is kept; infinity if there are no parameters.
    """
    counts = np.zeros(_HALF, np.int64)
    for piece in pieces:
        counts += np.bincount(_bits(piece) >> 16, minlength=_HALF)
    rank = round(drop * int(counts.sum()))
    if rank >= counts.sum():
        return float("inf")
    upper = int(np.searchsorted(counts.cumsum(), rank, side="right"))
    rank -= int(counts[:upper].sum())
    lower_counts = np.zeros(_HALF, np.int64)
    for piece in again:
        bits = _bits(piece)
        lower_counts += np.bincount(bits[bits >> 16 == upper] & (_HALF - 1), minlength=_HALF)
    lower = int(np.searchsorted(lower_counts.cumsum(), rank, side="right"))
    return float(np.array([upper * _HALF + lower], np.uint32).view(np.float32)[0])


def _bits(piece: Tensor) -> np.ndarray:
    bits: np.ndarray = piece.abs().flatten().numpy().view(np.int32)
    return bits


def elect_and_merge(deltas: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """Merge trimmed delta parameters of several models: the sign with the greater mass, then the mean of its party.

    Where the sum is 0 though values are not, the sign that most sums of this tensor have decides; the paper counts over
    the whole model, which would take another pass for what rounding almost never lets happen.

    Args:
        deltas: one float32 tensor for each model, all of one shape, trimmed.
        scale: lambda of the paper, on the result.

    Returns:
        The merged delta parameters, float32 in that shape; 0 where all are 0.
    """
    stacked = torch.stack(list(deltas))
    signs = stacked.sum(0).sign()
    majority = 1.0 if float(signs.sum()) >= 0 else -1.0
    signs = torch.where(signs == 0, majority, signs)
    agreeing = stacked * signs > 0
    total = torch.where(agreeing, stacked, 0.0).sum(0)
    return scale * total / agreeing.sum(0).clamp(min=1)
