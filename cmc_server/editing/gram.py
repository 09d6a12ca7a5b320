"""What goes into linear layers, as RegMean needs it: Gram matrices X^T X, collected by hooks in forward passes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cmc_server.editing.texts import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def gram_matrices(model: PreTrainedModel, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Mean over examples of X^T X, X the inputs of a linear layer at every position of a text.

    Layers are torch's ``nn.Linear``, an output head among them unless it is tied to the embeddings: then one matrix
    serves two purposes, and RegMean says nothing of the other one. GPT-2's ``Conv1D`` is not among them.

    Args:
        model: float32 in eval mode.
        examples: texts, read one at a time.

    Returns:
        By the name of a layer's weight: [in, in] float32.
    """
    layers = {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    embeddings = model.get_input_embeddings().weight
    layers = {name: layer for name, layer in layers.items() if layer.weight is not embeddings}
    sums = {name: torch.zeros(layer.in_features, layer.in_features) for name, layer in layers.items()}
    hooks = [layer.register_forward_pre_hook(adds_to(sums[name])) for name, layer in layers.items()]
    try:
        for example in tqdm(examples, desc="gram", unit="example", file=sys.stderr):
            model(example.ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total.div_(len(examples)) for name, total in sums.items()}


def adds_to(total: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A forward pre-hook of a linear layer that adds X^T X of its inputs to ``total``, [in, in] float32."""

    def add(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        rows = inputs[0].flatten(0, -2).float()
        total.addmm_(rows.T, rows)

    return add
