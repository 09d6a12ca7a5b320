"""TIES-Merging: trim, elect a sign, average those that agree (Yadav et al. 2023, arXiv:2306.01708).

Trimming is magnitude pruning over a whole model, the smallest 80 % by default, see
:mod:`cmc_server.editing.magnitude`. With one model it is all that the unified view of delta parameter editing calls
TIES (arXiv:2410.13841): E = -D where trimmed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def majority_sign(pieces: Iterable[Sequence[Tensor]]) -> float:
    """The sign that most sums over models have, in a whole model: 1.0 or, where more are negative, -1.0.

    Args:
        pieces: trimmed delta parameters of all models, piece by piece.
    """
    total = sum(float(torch.stack(list(deltas)).sum(0).sign().sum(dtype=torch.float64)) for deltas in pieces)
    return 1.0 if total >= 0 else -1.0


def elect_and_merge(deltas: Sequence[Tensor], scale: float = 1.0, majority: float = 1.0) -> Tensor:
    """Merge trimmed delta parameters of several models: the sign with the greater mass, then the mean of its party.

    Args:
        deltas: one float32 tensor for each model, all of one shape, trimmed.
        scale: lambda of the paper, on the result.
        majority: :func:`majority_sign`, which decides where the sum is 0 though values are not; in bfloat16 that is
            no rarity.

    Returns:
        The merged delta parameters, float32 in that shape; 0 where all are 0.
    """
    stacked = torch.stack(list(deltas))
    signs = stacked.sum(0).sign()
    signs = torch.where(signs == 0, majority, signs)
    agreeing = stacked * signs > 0
    total = torch.where(agreeing, stacked, 0.0).sum(0)
    return scale * total / agreeing.sum(0).clamp(min=1)
