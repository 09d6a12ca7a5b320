"""Losses of a model on texts, in nats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from cmc_server.editing.texts import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Tokens of one pass with their padding, unless one text alone is longer: logits of a large vocabulary must fit.
_PASS_TOKENS = 512


def mean_loss(model: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """Negative log-likelihood in nats per labelled token over all examples, a scalar."""
    return torch.stack([nll(model, example) for example in examples]).sum() / num_labels(examples)


def nll(model: PreTrainedModel, example: Example) -> Tensor:
    """Negative log-likelihood of an example's labelled tokens in nats, a scalar."""
    logits = model(example.ids, use_cache=False).logits[0, example.first_label - 1 : -1].float()
    return cross_entropy(logits, example.ids[0, example.first_label :], reduction="sum")


def batched_nll(model: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """The sum of :func:`nll` over examples, in one pass: what is dear once a pass is paid once.

    Texts are padded on the right, where causal attention does not look.

    Args:
        model: a causal language model.
        examples: at least one, better of one length, see :func:`passes`.

    Returns:
        Nats, a scalar; but for rounding what :func:`nll` gives one by one.
    """
    lengths = torch.tensor([example.ids.shape[1] for example in examples])
    firsts = torch.tensor([example.first_label for example in examples])
    ids = pad_sequence([example.ids[0] for example in examples], batch_first=True)
    positions = torch.arange(ids.shape[1])
    counts = (positions >= firsts[:, None]) & (positions < lengths[:, None])
    logits = model(ids, attention_mask=(positions < lengths[:, None]).long(), use_cache=False).logits
    return cross_entropy(logits[:, :-1][counts[:, 1:]].float(), ids[:, 1:][counts[:, 1:]], reduction="sum")


def passes(examples: Sequence[Example]) -> list[list[Example]]:
    """Examples as :func:`batched_nll` is best given them: like lengths together, and no more than fit."""
    groups: list[list[Example]] = []
    for example in sorted(examples, key=lambda one: one.ids.shape[1]):
        if not groups or (len(groups[-1]) + 1) * example.ids.shape[1] > _PASS_TOKENS:
            groups.append([])
        groups[-1].append(example)
    return groups


def num_labels(examples: Sequence[Example]) -> int:
    """How many tokens count."""
    return sum(example.num_labels for example in examples)
