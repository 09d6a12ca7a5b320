"""TIES-Merging: trim, elect a sign, average those that agree (Yadav et al. 2023, arXiv:2306.01708).

Trimming is magnitude pruning over a whole model, the smallest 80 % by default, see
:mod:`cmc_server.editing.magnitude`. With one model it is all that the unified view of delta parameter editing calls
TIES (arXiv:2410.13841): E = -D where trimmed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
