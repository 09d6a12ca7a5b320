"""From examples to batches: what an item of the training set is, and how items lie side by side."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cmc_server.training.bridge import Bridge
from cmc_server.training.template import FrozenTemplate


@dataclass(frozen=True)
class Reading:
    """One answer as one frozen LLM reads and labels it; m response tokens, its eos among them, n of them learned from.

    Args:
        ids: the LLM's prompt and the answer, without the last token, which is only ever a label.
        start: position in ``ids`` before the first response token.
        labels: the n response tokens that are learned from.
        positions: [n] in the delta's input, each before its label.
        hidden: [m, H] the LLM's last hidden states, or None where they are computed for each batch.
        tuned: likewise of a tuned LLM that reads the same ids, where the objective has one.
        steps: [n] which of the m response tokens the labels are; None for all of them.
    """

    ids: list[int]
    start: int
    labels: list[int]
    positions: list[int]
    hidden: Tensor | None = None
    tuned: Tensor | None = None
    steps: list[int] | None = None


@dataclass(frozen=True)
class Example:
    """One answer to learn, to forget or to keep.

    Args:
        delta_ids: prompt as the delta reads it, and the answer, without its last token.
        readings: one for each template LLM.
    """

    delta_ids: list[int]
    readings: tuple[Reading, ...]


#: An example for each role that the objective names, such as ``forget``.
Item = Mapping[str, Example]


class TrainingSet(Dataset[Item]):
    """Items of the objective's main data, each with one retain example beside it if there are any.

    Which one is a function of seed and epoch alone, so that a resumed run draws what an unbroken one does. In one epoch
    none is drawn again before all were drawn.

    Args:
        items: the main data.
        retain: examples to draw from; empty for an objective without them.
        seed: of the draws.
    """

    def __init__(self, items: Sequence[Item], retain: Sequence[Example] = (), seed: int = 0) -> None:
        self.items, self.retain, self._seed = items, retain, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw for an epoch; the Trainer calls this."""
        draw = random.Random(f"retain {self._seed} {epoch}")  # noqa: S311 (not for secrets)
        order: list[int] = []
        while self.retain and len(order) < len(self.items):
            order += draw.sample(range(len(self.retain)), len(self.retain))
        self._order = order

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        if not self.retain:
            return self.items[index]
        return {**self.items[index], "retain": self.retain[self._order[index]]}


@dataclass(frozen=True)
class Collator:
    """Items side by side.

    Args:
        templates: the frozen LLMs, asked for hidden states that no reading holds.
        tuned: the tuned LLM of the objective, if it has one.
        bridges: for each template whose vocabulary is not the delta's, by its number, the way between them.
    """

    templates: Sequence[FrozenTemplate]
    tuned: FrozenTemplate | None = None
    bridges: Mapping[int, Bridge] = field(default_factory=dict)

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """For each role what :meth:`collate` returns."""
        return {role: self.collate([item[role] for item in items]) for role in items[0]}

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """B examples as B rows of L columns; P positions at which some template has a label.

        Returns:
            ``input_ids`` and ``attention_mask`` [B, L], padded on the right; ``positions`` [P] into the flattened
            [B * L]; ``readings``, for each template: ``picks`` [N] into the P positions, ``labels`` and ``rows`` [N],
            ``hidden`` [N, H], and ``tuned`` likewise where there is one. ``picks`` is left out where it would pick
            everything in order. Integers are int64, hidden states of the template's type.
        """
        width = max(len(example.delta_ids) for example in examples)
        input_ids = torch.zeros(len(examples), width, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for row, example in enumerate(examples):
            input_ids[row, : len(example.delta_ids)] = torch.tensor(example.delta_ids)
            attention_mask[row, : len(example.delta_ids)] = 1
        flat = [
            [
                row * width + position
                for row, example in enumerate(examples)
                for position in example.readings[k].positions
            ]
            for k in range(len(self.templates))
        ]
        positions = sorted(set().union(*flat))
        place = {position: index for index, position in enumerate(positions)}
        readings = []
        for k, wanted in enumerate(flat):
            reading = self._side_by_side([example.readings[k] for example in examples], self.templates[k])
            if wanted != positions:
                reading["picks"] = torch.tensor([place[position] for position in wanted])
            readings.append(reading)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "positions": torch.tensor(positions),
            "readings": readings,
        }

    def _side_by_side(self, readings: Sequence[Reading], template: FrozenTemplate) -> dict[str, Tensor]:
        rows = [torch.full((len(reading.labels),), row) for row, reading in enumerate(readings)]
        batch = {
            "labels": torch.tensor([label for reading in readings for label in reading.labels]),
            "rows": torch.cat(rows),
            "hidden": _states(readings, [reading.hidden for reading in readings], template),
        }
        if self.tuned is not None:
            batch["tuned"] = _states(readings, [reading.tuned for reading in readings], self.tuned)
        return batch


def _states(readings: Sequence[Reading], kept: Sequence[Tensor | None], model: FrozenTemplate) -> Tensor:
    states = [tensor for tensor in kept if tensor is not None]
    if len(states) < len(readings):
        by_index = dict(model.hidden_states([reading.ids for reading in readings], [r.start for r in readings]))
        states = [by_index[index] for index in range(len(readings))]
    picked = zip(states, readings, strict=True)
    return torch.cat([state if reading.steps is None else state[reading.steps] for state, reading in picked])
