"""Prune a model and tune what is left, in turn: the rounds of sparse fine-tuning, and what is measured on the way.

From "Sparse Weight Gradient Interference" (OpenReview 53MDeiZ9mC): that pruning and tuning alternate is the paper's.
Inferred: the cubic schedule, what is calibrated anew in each round, and which weights are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmc_server.editing.blocks import LinearLayer, Walk
from cmc_server.editing.layer_sparsity import default_spread, layer_sparsities, redundancies, scheduled, sequence_gram
from cmc_server.editing.losses import mean_loss
from cmc_server.editing.masks import Pattern, Target
from cmc_server.editing.pruning import Pruned, prune_blocks, targets_of
from cmc_server.editing.sparsify_inputs import SparsifyInputs
from cmc_server.editing.tuning_round import TuningRound

#: Sequences that blocks are compared on.
COMPARED = 64


@dataclass
class Sparsified:
    """What came out.

    Args:
        weights: float32 by name, as the checkpoint keeps them.
        masks: bool in their shapes, True where a weight stays.
        figures: JSON values for the report.
    """

    weights: dict[str, Tensor]
    masks: dict[str, Tensor]
    figures: dict[str, Any]


class Sparsification:
    """A model on its way to being sparse.

    Args:
        inputs: what was read; the model is changed in place.
    """

    def __init__(self, inputs: SparsifyInputs) -> None:
        self.inputs, self.options = inputs, inputs.options
        self.blocks, self.layers = inputs.blocks, inputs.layers
        self.dense = {layer.name: layer.weight.clone() for layer in self.layers}
        self.pruned = Pruned()
        self.losses: dict[str, float] = {}
        self.rounds: list[dict[str, Any]] = []
        self.by_block: dict[str, dict[str, float]] = {}
        self.ranks: list[int] = []

    def run(self) -> Sparsified:
        """Prune, and tune if that was asked for, round by round.

        Raises:
            EditingError: activations or losses are not finite, or the model's blocks cannot be run one by one.
        """
        options, checkpoint = self.options, self.inputs.checkpoint
        self._measure("dense")
        for number in range(1, options.num_rounds + 1):
            self._prune(number)
            self.rounds.append({"sparsity": self._dropped(self.layers) / self._size(self.layers)})
            if options.tuning != "none":
                if number == options.num_rounds:
                    self._measure("pruned")
                tuning = TuningRound(self.inputs, self.pruned, number)
                self.rounds[-1] |= tuning.run()
                self.ranks = tuning.ranks
        for layer in self.layers:  # rounded as it will be stored
            layer.weight.copy_(layer.weight.to(checkpoint.stored(layer.name).dtype))
        self._measure("sparse")
        weights = {layer.name: layer.turned(layer.weight) for layer in self.layers}
        masks = {layer.name: layer.turned(self.pruned.masks[layer.name]) for layer in self.layers}
        return Sparsified(weights, masks, self._figures())

    def _prune(self, number: int) -> None:
        options, pattern = self.options, self.options.build_pattern()
        level = scheduled(options.final_sparsity, number, options.num_rounds)
        walk = Walk(self.inputs.model, self.blocks, self.inputs.sequences) if self.inputs.sequences else None
        targets: dict[str, Target]
        if pattern is None:
            targets = targets_of(self.blocks, self._sparsities(level, walk), self.pruned.masks)
        else:
            # Fewer weights stay from round to round, in the last one as many as the pattern says.
            kept = max(pattern.kept, min(pattern.of - 1, pattern.of - round(level * pattern.of)))
            targets = dict.fromkeys((layer.name for layer in self.layers), Pattern(kept, pattern.of))
        self.pruned = prune_blocks(self.blocks, walk, options.method, targets, self.dense, self.pruned.masks)

    def _sparsities(self, level: float, walk: Walk | None) -> list[float]:
        """Of each block; by CKA none is given less than it has."""
        if self.options.allocation == "uniform" or walk is None:
            return [level] * len(self.blocks)
        redundancy = dict(zip(self.blocks, self._redundancies(walk), strict=True))
        taken = [block for block in self.blocks if block.layers]
        sizes = [self._size(block.layers) for block in taken]
        chosen = layer_sparsities(
            [redundancy[block] for block in taken],
            sizes,
            level,
            default_spread(level) if self.options.spread is None else self.options.spread,
            self.options.beta,
            [self._dropped(block.layers) / size for block, size in zip(taken, sizes, strict=True)],
        )
        sparsities = dict(zip(taken, chosen, strict=True))
        self.by_block = {
            block.name: {"sparsity": sparsity, "redundancy": redundancy[block]}
            for block, sparsity in sparsities.items()
        }
        return [sparsities.get(block, 0.0) for block in self.blocks]

    def _redundancies(self, walk: Walk) -> list[float]:
        """Of each block, by what it reads."""
        inputs, grams = walk.inputs()[:COMPARED], []
        for index, block in enumerate(self.blocks):
            grams.append(sequence_gram(inputs))
            if index + 1 < len(self.blocks):
                inputs = walk.run(index, block, inputs)
        return redundancies(grams)

    @torch.no_grad()
    def _measure(self, stage: str) -> None:
        if self.inputs.heldout:
            self.losses[stage] = float(mean_loss(self.inputs.model, self.inputs.heldout))

    def _dropped(self, layers: tuple[LinearLayer, ...] | list[LinearLayer]) -> int:
        masks = (self.pruned.masks.get(layer.name) for layer in layers)
        return sum(int((~mask).sum()) for mask in masks if mask is not None)

    def _size(self, layers: tuple[LinearLayer, ...] | list[LinearLayer]) -> int:
        return sum(layer.weight.numel() for layer in layers)

    def _figures(self) -> dict[str, Any]:
        checkpoint, dropped, weights = self.inputs.checkpoint, self._dropped(self.layers), self._size(self.layers)
        whole = sum(checkpoint.stored(name).num_elements for name in checkpoint.names)
        figures: dict[str, Any] = {"weights": weights, "dropped": dropped, "sparsity": dropped / weights}
        figures |= {"share_of_model": dropped / whole, "rounds": self.rounds}
        if self.losses:
            figures["losses"] = self.losses
        if self.by_block:
            figures["blocks"] = self.by_block
        layers: dict[str, dict[str, float]] = {}
        for layer in self.layers:
            layers[layer.name] = {"sparsity": self._dropped([layer]) / self._size([layer])}
            if layer.name in self.pruned.losses:
                layers[layer.name]["reconstruction_loss"] = self.pruned.losses[layer.name]
        if self.options.tuning not in ("none", "oracle"):
            for layer, rank in zip(self.layers, self.ranks, strict=True):
                layers[layer.name]["rank"] = rank
        return figures | {"layers": layers}
