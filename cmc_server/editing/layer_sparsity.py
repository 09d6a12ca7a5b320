"""How sparse each layer is to become: more where its input says what others say (CKA), by a small linear programme.

From "Sparse Weight Gradient Interference" (OpenReview 53MDeiZ9mC), of which an abstract and a discussion were at hand,
and no equation: that redundancy is measured by HSIC and that more redundant layers are pruned more is the paper's. The
equations below are inferred, from the published LoSA by some of its authors among others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def hsic(left: Tensor, right: Tensor) -> float:
    """The Hilbert-Schmidt independence criterion, biased: tr(K H L H) / (n - 1)^2 with H = I - 1 1^T / n.

    Gretton et al. 2005, "Measuring statistical dependence with Hilbert-Schmidt norms".

    Args:
        left: K, [n, n] inner products of the samples in one representation, n at least 2.
        right: L, the same in another.
    """
    return float((_centred(left) * _centred(right)).sum()) / (len(left) - 1) ** 2


def cka(left: Tensor, right: Tensor) -> float:
    """Centred kernel alignment: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) (Kornblith et al. 2019, arXiv:1905.00414).

    Args:
        left: as in :func:`hsic`.
        right: as in :func:`hsic`.

    Returns:
        In [0, 1] for kernels; 0 where one of them does not vary.
    """
    scale = math.sqrt(hsic(left, left) * hsic(right, right))
    return hsic(left, right) / scale if scale > 0 else 0.0


def redundancies(grams: Sequence[Tensor]) -> list[float]:
    """r_l = sum over m other than l of CKA(l, m), divided by their sum (inferred).

    Args:
        grams: of each layer, [n, n] inner products of what it reads of n sequences, see :func:`sequence_gram`.

    Returns:
        One number a layer, which sum to 1.
    """
    similar = [[cka(one, other) if one is not other else 0.0 for other in grams] for one in grams]
    sums = [math.fsum(row) for row in similar]
    total = math.fsum(sums)
    return [one / total if total > 0 else 1 / len(sums) for one in sums]


def scheduled(sparsity: float, round_number: int, num_rounds: int) -> float:
    """s_i = s (1 - (1 - i / T)^3): much at first, little at last (Zhu & Gupta 2017, arXiv:1710.01878; inferred here).

    Args:
        sparsity: s, that of the last round.
        round_number: i, from 1.
        num_rounds: T.
    """
    return sparsity * (1 - (1 - round_number / num_rounds) ** 3)


def default_spread(sparsity: float) -> float:
    """How far a layer's sparsity may lie from the mean: LoSA's values, 0.01 up to 50 %, 0.02 up to 60 %, then 0.03."""
    return 0.01 if sparsity <= 0.5 else 0.02 if sparsity <= 0.6 else 0.03


def layer_sparsities(
    redundancy: Sequence[float],
    sizes: Sequence[int],
    sparsity: float,
    spread: float,
    beta: float = 1.0,
    at_least: Sequence[float] | None = None,
) -> list[float]:
    """Minimise sum_l s_l e^(-beta r_l) where |s_l - s| <= spread and the mean over all weights is s (inferred).

    A linear programme with bounds and one equation: from the lower bounds up, those layers fill up first whose
    importance e^(-beta r_l) for each weight is least. All but one layer end at a bound.

    Args:
        redundancy: r_l.
        sizes: weights of each layer.
        sparsity: s in [0, 1).
        spread: at least 0.
        beta: how much redundancy counts.
        at_least: lower bounds that hold besides, such as the sparsities before; their weighted mean may be at most s.

    Returns:
        s_l in [0, 1] for each layer.
    """
    least = at_least or [0.0] * len(sizes)
    values = [max(0.0, sparsity - spread, one) for one in least]
    highest = [max(low, min(1.0, sparsity + spread)) for low in values]
    left = sparsity * sum(sizes) - math.fsum(size * low for size, low in zip(sizes, values, strict=True))
    order = sorted(range(len(sizes)), key=lambda layer: math.exp(-beta * redundancy[layer]) / sizes[layer])
    for layer in order:
        more = min(max(left, 0.0), sizes[layer] * (highest[layer] - values[layer]))
        values[layer] += more / sizes[layer]
        left -= more
    return values


def sequence_gram(inputs: Sequence[Tensor]) -> Tensor:
    """Inner products of whole sequences.

    Args:
        inputs: [..., length, features] for each of n sequences, of one shape.

    Returns:
        [n, n] float32.
    """
    rows = torch.stack([one.flatten() for one in inputs]).float()
    return rows @ rows.T


def _centred(gram: Tensor) -> Tensor:
    gram = gram.double()
    return gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
