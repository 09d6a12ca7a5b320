"""Losses of a model on texts, in nats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cmc_server.editing.texts import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def mean_loss(model: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """Negative log-likelihood in nats per labelled token over all examples, a scalar."""
    return torch.stack([nll(model, example) for example in examples]).sum() / num_labels(examples)


def nll(model: PreTrainedModel, example: Example) -> Tensor:
    """Negative log-likelihood of an example's labelled tokens in nats, a scalar."""
    logits = model(example.ids, use_cache=False).logits[0, example.first_label - 1 : -1].float()
    return cross_entropy(logits, example.ids[0, example.first_label :], reduction="sum")


def num_labels(examples: Sequence[Example]) -> int:
    """How many tokens count."""
    return sum(example.num_labels for example in examples)
