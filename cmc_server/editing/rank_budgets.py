"""How many adapter parameters each layer gets: more where pruning hurt its outputs more.

From "Sparse Weight Gradient Interference" (OpenReview 53MDeiZ9mC): that layers of a higher reconstruction loss get more
parameters is the paper's. Inferred: the proportion, the limits and the loss itself, with LoSA's values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

#: LoSA's limits of a rank.
LOWEST, HIGHEST = 1, 16


def scheduled_rank(rank: int, round_number: int, num_rounds: int) -> float:
    """The mean rank of a round, from 2 below to 2 above in equal steps: LoSA's 6 to 10 for 8 (inferred).

    Args:
        rank: in the mean over the rounds, and that of a single one.
        round_number: from 1.
        num_rounds: how many there are.
    """
    if num_rounds == 1:
        return rank
    return max(float(LOWEST), rank - 2 + 4 * (round_number - 1) / (num_rounds - 1))


def reconstruction_loss(dense: Tensor, sparse: Tensor, gram: Tensor) -> float:
    """How much of a layer's outputs pruning changed: the mean over outputs j of ||(Y - Y')_j||^2 / ||Y_j||^2.

    Y = X W^T and Y' = X W'^T on the same inputs, columns of Y being outputs. That each is measured by its own norm is
    how "column-normalised L2" is read here.

    Args:
        dense: W, [out, in] float32.
        sparse: W', the same.
        gram: X^T X, [in, in] float32.

    Returns:
        At least 0; outputs that are always 0 count only if they are no longer.
    """
    change = dense - sparse
    changed, whole = (((one @ gram) * one).sum(1).clamp_min(0) for one in (change, dense))
    ratios = (changed / whole).where(whole > 0, (changed > 0).float())
    return float(ratios.mean())


def rank_budgets(losses: Sequence[float], mean: float, lowest: int = LOWEST, highest: int = HIGHEST) -> list[int]:
    """Ranks in proportion to losses, within limits, that have the right sum.

    What the limits cut off one layer goes to the others: the factor of proportion is the one at which the clipped ranks
    sum to layers times mean, and rounding gives what is missing to those that lost most by it.

    Args:
        losses: of each layer, at least 0.
        mean: rank in the mean.
        lowest: a layer has at least so much.
        highest: and at most so much.

    Returns:
        One rank a layer; their sum is layers times the mean, rounded, the mean being brought within the limits first.
    """
    count = len(losses)
    total = round(count * min(max(mean, lowest), highest))
    scale = max(losses)
    if not (0 < scale < math.inf):
        shares = [total / count] * count
    else:
        parts = [max(loss / scale, 1e-9) for loss in losses]
        low, high = 0.0, highest / min(parts)
        for _ in range(200):
            middle = (low + high) / 2
            reached = math.fsum(min(max(middle * part, lowest), highest) for part in parts) >= total
            low, high = (low, middle) if reached else (middle, high)
        shares = [min(max(high * part, lowest), highest) for part in parts]
    ranks = [math.floor(share) for share in shares]
    by_rest = sorted(range(count), key=lambda layer: ranks[layer] - shares[layer])
    missing = total - sum(ranks)
    for layer in [one for one in by_rest if ranks[one] < highest][:missing]:
        ranks[layer] += 1
    return ranks
