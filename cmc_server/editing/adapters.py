"""Adapters of sparse linear layers: what is trained beside a pruned weight, with its mask or not, and their merge."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from torch.utils.hooks import RemovableHandle


class Adapter(nn.Module):
    """A trainable change of a linear layer, 0 at the start."""

    def delta(self) -> Tensor:
        """The change of the weight, dW: [out, in] float32, with gradient."""
        raise NotImplementedError

    def change(self, inputs: Tensor) -> Tensor:
        """What the change adds to the outputs, dW x, [..., out] of [..., in]; where dW need not be formed, faster."""
        return linear(inputs, self.delta())


class FullAdapter(Adapter):
    """A change of every weight: with a mask, fine-tuning of nothing but the weights that stay, the oracle.

    Args:
        shape: of the weight, (out, in).
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.full = nn.Parameter(torch.zeros(shape))

    def delta(self) -> Tensor:
        """The parameter itself."""
        return self.full


class Attached:
    """An adapter at work on a layer of a model, until it is taken off.

    With a mask M the layer computes (M * W + M * dW) x, which is what is left after the merge M * (W + dW): masked
    positions get no gradient, and nothing is lost by merging. Without one it computes (M * W + dW) x. M * dW of a
    low-rank or pooled change has no cheaper form than the full matrix, which therefore is made in each forward.

    Args:
        layer: a linear layer, whose pruned weights are 0.
        adapter: its change.
        mask: [out, in] bool, True where a weight stays; None leaves the change dense.
        rate: of dropout on what the adapter reads.
    """

    def __init__(self, layer: nn.Module, adapter: Adapter, mask: Tensor | None, rate: float = 0.0) -> None:
        self.adapter, self.mask, self.rate = adapter, mask, rate
        self._handle: RemovableHandle = layer.register_forward_hook(self._add)

    def _add(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        read = dropout(inputs[0], self.rate, training=self.rate > 0)
        changed = self.adapter.change(read) if self.mask is None else linear(read, self.adapter.delta() * self.mask)
        return output + changed

    def remove(self) -> None:
        """Give the layer back as it was."""
        self._handle.remove()


@torch.no_grad()
def merged(weight: Tensor, adapter: Adapter, mask: Tensor) -> Tensor:
    """M * (W + dW).

    Args:
        weight: W, [out, in] float32.
        adapter: has dW.
        mask: M, [out, in] bool.

    Returns:
        [out, in] float32, exactly 0 where M is False.
    """
    return (weight + adapter.delta()).masked_fill(~mask, 0.0)
