"""Magnitude pruning of delta parameters: the smallest ones go, the rest stays as it is, without rescaling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
from torch import Tensor
from torch.nn.functional import hardshrink

_HALF = 1 << 16


def prune_below(delta: Tensor, threshold: float) -> Tensor:
    """Set delta parameters of a smaller magnitude to 0, which gives the weights of the base back.

    The baseline of DARE's paper (Yu et al. 2024, arXiv:2311.03099): E = -D where pruned and 0 elsewhere.

    Args:
        delta: D = W_post - W_base, any shape, float32.
        threshold: the smallest magnitude that is kept, as :func:`pruning_threshold` finds it.

    Returns:
        The edited delta parameters, float32 in the shape of ``delta``.
    """
    if threshold <= 0:
        return delta
    return hardshrink(delta, float(np.nextafter(np.float32(threshold), np.float32(0))))


def pruning_threshold(pieces: Callable[[], Iterable[Tensor]], drop: float) -> float:
    """The magnitude that a share of delta parameters lies below.

    Exact and with little memory: the bits of a non-negative float32 order like its value, so one pass counts their
    upper halves and a second one the lower halves within the one that matters.

    Args:
        pieces: gives the delta parameters, in pieces of any shape, float32 without NaN; called twice.
        drop: share p in [0, 1).

    Returns:
        The magnitude of rank round(p n) from below, counted from 0: at most so many elements lie below it, fewer where
        several equal it, since all of those are kept. Infinity if rounding drops all, or there are none.

    Raises:
        ValueError: the share lies outside [0, 1).
    """
    if not 0 <= drop < 1:
        raise ValueError(f"the share to prune must lie in [0, 1), not {drop}")
    counts = np.zeros(_HALF, np.int64)
    for piece in pieces():
        counts += np.bincount(_bits(piece) >> 16, minlength=_HALF)
    rank = round(drop * int(counts.sum()))
    if rank >= counts.sum():
        return math.inf
    upper = int(np.searchsorted(counts.cumsum(), rank, side="right"))
    rank -= int(counts[:upper].sum())
    counts = np.zeros(_HALF, np.int64)
    for piece in pieces():
        bits = _bits(piece)
        counts += np.bincount(bits[bits >> 16 == upper] & (_HALF - 1), minlength=_HALF)
    lower = int(np.searchsorted(counts.cumsum(), rank, side="right"))
    return float(np.array([upper * _HALF + lower], np.uint32).view(np.float32)[0])


def _bits(piece: Tensor) -> np.ndarray:
    bits: np.ndarray = piece.abs().flatten().numpy().view(np.int32)
    return bits
