"""The pooled adapter: inputs pooled, a small matrix, outputs repeated, so that a change is constant in blocks.

From "Sparse Weight Gradient Interference" (OpenReview 53MDeiZ9mC): pool, linear, expand instead of two low-rank factors
is the paper's, as its abstract says; of its text there was no more. Inferred: averages over contiguous groups, repeated
outputs, a start at 0, and as many parameters as LoRA of a rank has.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from cmc_server.editing.adapters import Adapter


def pooled_sizes(shape: tuple[int, int], rank: int) -> tuple[int, int]:
    """How many groups give about as many parameters as LoRA of a rank: g_out g_in = r (out + in) (inferred).

    Args:
        shape: of the weight, (out, in).
        rank: r, at least 1.

    Returns:
        (g_out, g_in), equal where both axes are long enough, each at least 1 and at most the length of its axis.
    """
    budget = rank * sum(shape)
    sizes = [min(round(math.sqrt(budget)), length) for length in shape]
    for axis in (0, 1):  # what a short axis cannot take the other one does
        if sizes[axis] == shape[axis]:
            sizes[1 - axis] = min(shape[1 - axis], round(budget / shape[axis]))
    return max(1, sizes[0]), max(1, sizes[1])


def contiguous_groups(length: int, num_groups: int) -> Tensor:
    """The group of each position, int64 [length]: contiguous, in order, of sizes that differ by at most 1."""
    return torch.arange(length) * num_groups // length


class PooledAdapter(Adapter):
    """dW = scale * E G P: P averages each group of inputs, G is trained, E repeats each group's output.

    dW is constant in blocks, and its rank is at most that of G.

    Args:
        shape: of the weight, (out, in).
        sizes: of G, (g_out, g_in).
        scale: factor on the change.
    """

    rows: Tensor
    columns: Tensor
    counts: Tensor

    def __init__(self, shape: tuple[int, int], sizes: tuple[int, int], scale: float) -> None:
        super().__init__()
        self.core = nn.Parameter(torch.zeros(sizes))
        self.scale = scale
        self.register_buffer("rows", contiguous_groups(shape[0], sizes[0]))
        self.register_buffer("columns", contiguous_groups(shape[1], sizes[1]))
        self.register_buffer("counts", torch.bincount(self.columns, minlength=sizes[1]).float())

    def delta(self) -> Tensor:
        """scale * G[row's group, column's group] / size of the column's group."""
        return (self.core * (self.scale / self.counts))[self.rows][:, self.columns]

    def change(self, inputs: Tensor) -> Tensor:
        """The same without the full matrix."""
        pooled = inputs.new_zeros(*inputs.shape[:-1], len(self.counts)).index_add(-1, self.columns, inputs)
        return linear(pooled, self.core * (self.scale / self.counts))[..., self.rows]
