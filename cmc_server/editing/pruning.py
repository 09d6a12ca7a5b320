"""A model pruned block by block, each on what the pruned ones before it make of the calibration data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from cmc_server.editing.blocks import Block, LinearLayer, Walk
from cmc_server.editing.masks import Pattern, Target, below_all, lowest_dropped, pattern_kept, shared_out
from cmc_server.editing.rank_budgets import reconstruction_loss
from cmc_server.editing.sparsegpt import sparsegpt
from cmc_server.editing.wanda import wanda
from cmc_server.errors import EditingError

PruningMethod = Literal["magnitude", "wanda", "sparsegpt"]
#: From a weight, the Gram matrix of its inputs, a target and the mask before to the pruned weight and its mask.
Pruner = Callable[[Tensor, Tensor, Target, Tensor | None], tuple[Tensor, Tensor]]


@dataclass
class Pruned:
    """What pruning made of a model, whose weights have been changed in place.

    Args:
        masks: [out, in] bool by the name of a weight, True where a weight stays.
        losses: of each layer against the dense weights, see :func:`reconstruction_loss`; empty without data.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)


def prune_by_magnitude(
    weight: Tensor, gram: Tensor, target: Target, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The baseline: the smallest weights of a tensor go, whatever they are multiplied by.

    Args:
        weight: [out, in] float32.
        gram: not used.
        target: how many weights go, or a pattern.
        kept: the mask before, whose dropped weights go first.

    Returns:
        The weights, 0 where they went, and the mask.
    """
    scores = below_all(weight.abs(), kept)
    mask = pattern_kept(scores, target) if isinstance(target, Pattern) else lowest_dropped(scores, target)
    return weight.masked_fill(~mask, 0.0), mask


def prune_by_wanda(weight: Tensor, gram: Tensor, target: Target, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """:func:`cmc_server.editing.wanda.wanda` as the other methods are called."""
    mask = wanda(weight, gram, target, kept)
    return weight.masked_fill(~mask, 0.0), mask


PRUNERS: dict[str, Pruner] = {"magnitude": prune_by_magnitude, "wanda": prune_by_wanda, "sparsegpt": sparsegpt}
#: What needs no calibration data.
BLIND = frozenset({"magnitude"})


def check_pattern(blocks: Sequence[Block], pattern: Pattern) -> None:
    """Refuse a pattern that does not divide the width of a layer.

    Raises:
        EditingError: and says which one.
    """
    for layer in (layer for block in blocks for layer in block.layers):
        if layer.shape[1] % pattern.of:
            raise EditingError(
                f"The pattern {pattern} does not divide the {layer.shape[1]} inputs of {layer.name}; leave it out "
                "with --exclude, or choose another pattern."
            )


def targets_of(blocks: Sequence[Block], sparsities: Sequence[float], before: Mapping[str, Tensor]) -> dict[str, Target]:
    """How many weights of each layer go, so that the number over all of them is right.

    Args:
        blocks: what is pruned.
        sparsities: of the layers of each block.
        before: masks of an earlier round; no layer is given less than it lost there.
    """
    layers = [(layer, share) for block, share in zip(blocks, sparsities, strict=True) for layer in block.layers]
    sizes = [layer.weight.numel() for layer, _ in layers]
    gone = [int((~before[layer.name]).sum()) if layer.name in before else 0 for layer, _ in layers]
    numbers = shared_out(sizes, [share for _, share in layers], gone)
    return {layer.name: number for (layer, _), number in zip(layers, numbers, strict=True)}


@torch.no_grad()
def prune_blocks(
    blocks: Sequence[Block],
    walk: Walk | None,
    method: PruningMethod,
    targets: Mapping[str, Target],
    dense: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
) -> Pruned:
    """Prune the layers of a model in place.

    Args:
        blocks: all of the model, in order.
        walk: with the calibration data; None only for methods that need none.
        method: of :data:`PRUNERS`.
        targets: for each weight by name.
        dense: the weights that outputs are compared with, [out, in] float32.
        before: masks of an earlier round; empty in the first one.

    Raises:
        EditingError: the activations of a layer are not finite, or its Hessian cannot be inverted.
    """
    pruned, inputs = Pruned(), [] if walk is None else walk.inputs()
    for index, block in enumerate(tqdm(blocks, "prune", unit="block", file=sys.stderr)):
        grams = {} if walk is None else walk.grams(index, block, inputs)
        for layer in block.layers:
            gram = grams.get(layer.name)
            if gram is not None and not bool(gram.isfinite().all()):
                raise EditingError(f"The inputs of {layer.name} on the calibration data are not finite.")
            weight, mask = _prune(layer, method, gram, targets[layer.name], before.get(layer.name))
            layer.weight.copy_(weight)
            pruned.masks[layer.name] = mask
            if gram is not None:
                pruned.losses[layer.name] = reconstruction_loss(dense[layer.name], weight, gram)
        if walk is not None and index + 1 < len(blocks):
            inputs = walk.run(index, block, inputs)
    return pruned


def _prune(
    layer: LinearLayer, method: PruningMethod, gram: Tensor | None, target: Target, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    unused = layer.weight if gram is None else gram
    try:
        weight, mask = PRUNERS[method](layer.weight, unused, target, before)
    except ValueError as error:
        raise EditingError(f"{layer.name} cannot be pruned: {error}.") from None
    if not bool(weight.isfinite().all()):
        raise EditingError(f"The pruned {layer.name} is not finite; give more calibration data.")
    return weight, mask
