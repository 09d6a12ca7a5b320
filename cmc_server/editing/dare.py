"""DARE: drop delta parameters at random and rescale the rest (Yu et al. 2024, arXiv:2311.03099), and its k-form."""

from __future__ import annotations

import torch
from torch import Tensor

#: The numbers that masks come from are 2^-24 apart, so that a higher rate could not be told from 1.
MAX_DROP = 1 - 2**-20


def dare(delta: Tensor, drop: float, generator: torch.Generator, k: float = 0.0) -> Tensor:
    """DARE in the general form of the unified view of delta parameter editing (arXiv:2410.13841).

    With M ~ Bernoulli(p) elementwise, M = 1 marking what DARE drops, the result is

        k M D + (1 - k p) / (1 - p) (1 - M) D,    so that    E = (k - 1) (M - p) / (1 - p) D.

    k = 0 is DARE, k = 1 leaves D as it is, and negative k flips signs. The mean of E over masks is 0 for every k, its
    variance is not: see :func:`edit_intensity`.

    Args:
        delta: D = W_post - W_base, any shape, float32.
        drop: p in [0, 1), at most :data:`MAX_DROP`.
        generator: where the mask comes from; one number is drawn for each element, in row-major order, so that a
            tensor may be given in pieces.
        k: what the marked parameters are multiplied by.

    Returns:
        The edited delta parameters, float32 in the shape of ``delta``.

    Raises:
        ValueError: p lies outside that.
    """
    if not 0 <= drop <= MAX_DROP:
        raise ValueError(f"the drop rate must lie in [0, {MAX_DROP}], not {drop}")
    kept = torch.rand(delta.shape, generator=generator).ge_(drop)  # 1.0 and 0.0: far faster than bool and where
    return delta * kept.mul_((1 - k * drop) / (1 - drop) - k).add_(k)


def edit_intensity(drop: float, k: float = 0.0) -> float:
    """(k - 1)^2 p / (1 - p): variance of the factor on each delta parameter.

    Both the variance of the first-order term of the loss difference and the mean of its second-order term grow with
    it; for k = 0 and p = 0.999 it is 999.

    Raises:
        ValueError: p lies outside [0, 1).
    """
    if not 0 <= drop < 1:
        raise ValueError(f"the drop rate must lie in [0, 1), not {drop}")
    return (k - 1) ** 2 * drop / (1 - drop)


def first_order_variance(delta: Tensor, gradient: Tensor, drop: float, k: float = 0.0) -> float:
    """Variance over masks of <gradient, E>: (k - 1)^2 p / (1 - p) * sum (D_ij g_ij)^2.

    The published argument is about the mean alone, which is 0; how far single masks lie from it is this.

    Args:
        delta: D, any shape.
        gradient: of the loss at W_post, same shape.
        drop: p in [0, 1).
        k: as for :func:`dare`.
    """
    return edit_intensity(drop, k) * float((delta.double() * gradient.double()).square().sum())
