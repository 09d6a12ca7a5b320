"""BitDelta: signs and a few magnitudes instead of delta parameters (Liu et al. 2024, arXiv:2402.10193), and variants.

The variants (several magnitude levels, a scaled statistic, random magnitudes) are those of the unified view of delta
parameter editing (arXiv:2410.13841). Like the original code, the sign of 0 is taken as +1. A scale for each row is not
in the papers: it is for weights without a base to be relative to, where one scale for a matrix is too coarse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

Granularity = Literal["tensor", "row"]
Magnitudes = Literal["mean", "uniform", "normal"]
#: Beyond 8 bits and a sign, packed weights would be no smaller than whole ones.
MAX_PACKED_LEVELS = 256


def signs(delta: Tensor) -> Tensor:
    """+1 or -1 for each element, float32 in the shape of ``delta``; 0 counts as +1."""
    return torch.copysign(torch.ones(()), delta + 0.0)  # -0.0 + 0.0 is 0.0


def tensor_mean(pieces: Iterable[Tensor]) -> Tensor:
    """mean|D| of a tensor, the scale that minimises the squared error of sign(D) * scale.

    Args:
        pieces: D = W_post - W_base in pieces along the first axis, float32.

    Returns:
        float32 with as many dimensions as the pieces, all of size 1.
    """
    total, count, num_dims = 0.0, 0, 0
    for piece in pieces:
        total += float(piece.abs().sum(dtype=torch.float64))
        count, num_dims = count + piece.numel(), piece.dim()
    return torch.tensor(total / max(1, count)).reshape([1] * num_dims)


def row_means(delta: Tensor) -> Tensor:
    """mean|D| of each row, a stretch of the last axis: [..., n] float32 to [..., 1] float32."""
    return delta.abs().mean(-1, keepdim=True)


def rounded_scales(scales: Tensor) -> Tensor:
    """Scales as float16 holds them, if that moves none by more than 1/1024 of the largest, else as they are; float32.

    For those of rows, which are many and are stored beside one bit for each weight.
    """
    rounded = scales.half().float()
    error, largest = (rounded - scales).abs().max(), scales.abs().max()
    return rounded if bool(error <= largest / 1024) else scales


def bitdelta(delta: Tensor, scales: Tensor) -> Tensor:
    """sign(D) * scale, so that E = (scale - |D|) sign(D).

    Args:
        delta: D = W_post - W_base, [..., n] float32.
        scales: float32 that broadcast to it: c mean|D| of the tensor or of rows, or what a calibration made of them.
            c = 1 is BitDelta, another one the statistic variant.

    Returns:
        The edited delta parameters, float32 in the shape of ``delta``.
    """
    return signs(delta) * scales


def multilevel(delta: Tensor, levels: int, granularity: Granularity = "tensor", factor: float = 1.0) -> Tensor:
    """sign(D) times the mean magnitude of its block, of ``levels`` blocks ordered by magnitude.

    log2(levels) bits beside the sign; 1 level is BitDelta, as many as there are elements is lossless. Blocks of equal
    count within each matrix are inferred, the paper does not say; counts differ by at most 1.

    Args:
        delta: D = W_post - W_base, [..., n] float32.
        levels: at least 1; more than there are elements is as many as there are.
        granularity: blocks of the tensor, or of each row.
        factor: c on all magnitudes.

    Returns:
        The edited delta parameters, float32 in the shape of ``delta``.

    Raises:
        ValueError: fewer than 1 level.
    """
    blocks, means = magnitude_blocks(delta, levels, granularity)
    scales = factor * means
    return signs(delta) * scales.expand(*delta.shape[:-1], -1).gather(-1, blocks)


def magnitude_blocks(delta: Tensor, levels: int, granularity: Granularity = "tensor") -> tuple[Tensor, Tensor]:
    """What :func:`multilevel` keeps beside signs.

    Args:
        delta: as there.
        levels: as there.
        granularity: as there.

    Returns:
        The block of each element, int64 in the shape of ``delta``, 0 is that of the smallest magnitudes and of equal
        ones the first come first; and the blocks' means, float32 [..., M], or [1, ..., 1, M] of a tensor's blocks, with
        M the number of levels, or of elements if those are fewer.

    Raises:
        ValueError: fewer than 1 level.
    """
    if levels < 1:
        raise ValueError(f"at least 1 level is needed, not {levels}")
    rows = delta.reshape(1, -1) if granularity == "tensor" else delta.reshape(-1, delta.shape[-1])
    ordered, order = rows.abs().sort(stable=True, dim=-1)
    parts = ordered.tensor_split(min(levels, rows.shape[-1]), dim=-1)
    blocks = torch.cat([torch.full(part.shape, index) for index, part in enumerate(parts)], dim=-1)
    means = torch.stack([part.mean(-1) for part in parts], dim=-1)
    kept = delta.shape[:-1] if granularity == "row" else [1] * (delta.dim() - 1)
    return torch.empty_like(order).scatter_(-1, order, blocks).view_as(delta), means.view(*kept, -1)


def random_magnitudes(
    delta: Tensor,
    kind: Literal["uniform", "normal"],
    generator: torch.Generator,
    granularity: Granularity = "tensor",
    factor: float = 1.0,
) -> Tensor:
    """sign(D) times random magnitudes whose mean is c mean|D|.

    The paper does not say how far they spread; inferred here, in proportion to the mean m: U(0, 2 m), or the absolute
    value of a normal variable with that mean.

    Args:
        delta: D = W_post - W_base, [..., n] float32.
        kind: the distribution.
        generator: where the magnitudes come from.
        granularity: of the mean.
        factor: c.

    Returns:
        The edited delta parameters, float32 in the shape of ``delta``.
    """
    scales = factor * (tensor_mean([delta]) if granularity == "tensor" else row_means(delta))
    if kind == "uniform":
        relative = 2 * torch.rand(delta.shape, generator=generator)
    else:
        relative = torch.randn(delta.shape, generator=generator).abs() * math.sqrt(math.pi / 2)
    return signs(delta) * scales * relative
