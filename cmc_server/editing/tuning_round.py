"""One round of tuning a pruned model: adapters of the right sizes put on, trained, measured and merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cmc_server.editing.adapters import Adapter, merged
from cmc_server.editing.interference import interference_ratio, merge_gap, weight_gradients
from cmc_server.editing.losses import mean_loss
from cmc_server.editing.pruning import Pruned
from cmc_server.editing.rank_budgets import rank_budgets, scheduled_rank
from cmc_server.editing.sparse_tuning import attach, drawn, fit, is_masked, make_adapter
from cmc_server.editing.sparsify_inputs import SparsifyInputs
from cmc_server.editing.texts import Example

#: Texts that interference and merge gap are measured on.
DIAGNOSED = 16


class TuningRound:
    """Tuning between one pruning and the next.

    Args:
        inputs: the model, pruned.
        pruned: its masks, and what pruning did to each layer.
        number: of the round, from 1.
    """

    def __init__(self, inputs: SparsifyInputs, pruned: Pruned, number: int) -> None:
        self.inputs, self.pruned, self.number = inputs, pruned, number
        self.options, self.tuning = inputs.options, inputs.options.build_tuning()
        # Another seed for each round of each run; equal ones for all methods.
        self.seed = 1000 * inputs.options.seed + number
        self.ranks: list[int] = []

    def run(self) -> dict[str, Any]:
        """Tune and merge.

        Returns:
            JSON values: ``examples``, ``steps``, ``parameters``, ``loss`` of the first and the last batch; in the last
            round also ``dense_interference``, ``interference``, ``merge_gap``, see
            :mod:`cmc_server.editing.interference`.

        Raises:
            EditingError: a loss is not finite.
        """
        last = self.number == self.options.num_rounds
        number = self.tuning.final_examples if last else self.tuning.examples
        examples = drawn(self.inputs.tuning, number, self.seed)
        shown, figures = examples[:DIAGNOSED], dict[str, Any]()
        if last:
            figures["dense_interference"] = self._interference(shown)
        adapters = self._adapters()
        masks = self.pruned.masks if is_masked(self.options.tuning) else None
        attached = attach(self.inputs.layers, adapters, masks, self.tuning.dropout)
        losses = fit(self.inputs.model, adapters, examples, self.tuning, self.seed)
        figures |= {"examples": len(examples), "steps": len(losses), "loss": [losses[0], losses[-1]]}
        figures["parameters"] = self._count(adapters)
        for one in attached:
            one.rate = 0.0
        if last:
            # Behind a mask there is no gradient at masked positions: 0 by construction.
            figures["interference"] = self._interference(shown) if masks is None else 0.0
            trained_loss = self._loss(shown)
        for one in attached:
            one.remove()
        for layer in self.inputs.layers:
            layer.weight.copy_(merged(layer.weight, adapters[layer.name], self.pruned.masks[layer.name]))
        if last:
            figures["merge_gap"] = merge_gap(self._loss(shown), trained_loss)
        return figures

    def _adapters(self) -> dict[str, Adapter]:
        layers, kind = self.inputs.layers, self.options.tuning
        mean = scheduled_rank(self.tuning.rank, self.number, self.options.num_rounds)
        if kind != "oracle" and self.tuning.budget == "loss":
            self.ranks = rank_budgets([self.pruned.losses[layer.name] for layer in layers], mean)
        else:
            self.ranks = [round(mean)] * len(layers)
        return {
            layer.name: make_adapter(kind, layer.name, layer.shape, rank, self.tuning.scale, self.seed)
            for layer, rank in zip(layers, self.ranks, strict=True)
        }

    def _count(self, adapters: Mapping[str, Adapter]) -> int:
        """Parameters that are trained: of the oracle only those of weights that stay."""
        if self.options.tuning == "oracle":
            return sum(int(mask.sum()) for mask in self.pruned.masks.values())
        return sum(parameter.numel() for adapter in adapters.values() for parameter in adapter.parameters())

    def _interference(self, examples: Sequence[Example]) -> float:
        layers = self.inputs.layers
        gradients = weight_gradients(self.inputs.model, layers, examples)
        pairs = zip(gradients, layers, strict=True)
        return interference_ratio((gradient, self.pruned.masks[layer.name]) for gradient, layer in pairs)

    @torch.no_grad()
    def _loss(self, examples: Sequence[Example]) -> float:
        return float(mean_loss(self.inputs.model, examples))
