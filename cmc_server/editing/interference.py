"""Sparse weight gradient interference: how much a dense change of a pruned model works on what is not there.

From "Sparse Weight Gradient Interference" (OpenReview 53MDeiZ9mC): that a dense adapter on a pruned model also receives
gradient at masked positions, which compete with the weights that survive, is the paper's. How it is measured here is
ours: the paper's own measure, if there is one, was not at hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cmc_server.editing.blocks import LinearLayer
from cmc_server.editing.losses import nll, num_labels
from cmc_server.editing.texts import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def interference_ratio(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """||(1 - M) * grad L|| / ||grad L|| over all layers together, the gradient being that of a dense change dW.

    Args:
        pairs: gradient and mask of each layer, of one shape; the mask is bool, True where a weight stays.

    Returns:
        In [0, 1]; 0 where there is no gradient at all.
    """
    masked = whole = 0.0
    for gradient, mask in pairs:
        squares = gradient.double().square()
        masked += float(squares.masked_fill(mask, 0.0).sum())
        whole += float(squares.sum())
    return math.sqrt(masked / whole) if whole > 0 else 0.0


def weight_gradients(
    model: PreTrainedModel, layers: Sequence[LinearLayer], examples: Sequence[Example]
) -> Iterator[Tensor]:
    """The gradient of the mean loss by each layer's weight, which is that by a dense change of it.

    Args:
        model: float32 in eval mode; adapters that are attached count as part of it.
        layers: of it.
        examples: texts, one at a time.

    Returns:
        [out, in] float32 for each layer, in order.
    """
    weights = [layer.parameter for layer in layers]
    totals = [torch.zeros_like(weight, requires_grad=False) for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for example in examples:
            loss = nll(model, example) / num_labels(examples)
            found = torch.autograd.grad(loss, weights, allow_unused=True)
            for total, gradient in zip(totals, found, strict=True):
                if gradient is not None:
                    total += gradient
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return (layer.turned(total) for layer, total in zip(layers, totals, strict=True))


def merge_gap(merged_loss: float, trained_loss: float) -> float:
    """L(M * (W + dW)) - L(M * W + dW): what masking a dense change only when it is merged costs, in nats per token.

    Args:
        merged_loss: of the sparse model that is kept.
        trained_loss: of the model as it was trained.
    """
    return merged_loss - trained_loss
