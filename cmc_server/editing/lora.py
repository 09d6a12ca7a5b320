"""LoRA: a change of low rank, two thin factors (Hu et al. 2022, arXiv:2106.09685)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from cmc_server.editing.adapters import Adapter


class LoraAdapter(Adapter):
    """dW = scale * B A, with B 0 and A uniform as torch's linear layers are.

    Args:
        shape: of the weight, (out, in).
        rank: r; that many columns of B and rows of A.
        scale: the paper's alpha / r.
        draws: of A.
    """

    def __init__(self, shape: tuple[int, int], rank: int, scale: float, draws: torch.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(shape[1])
        self.down = nn.Parameter((2 * torch.rand(rank, shape[1], generator=draws) - 1) * bound)
        self.up = nn.Parameter(torch.zeros(shape[0], rank))
        self.scale = scale

    def delta(self) -> Tensor:
        """The product of the factors."""
        return self.scale * self.up @ self.down

    def change(self, inputs: Tensor) -> Tensor:
        """One factor after the other."""
        return self.scale * linear(linear(inputs, self.down), self.up)
