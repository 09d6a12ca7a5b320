"""How alike two logit shifts are: as point clouds (Sinkhorn divergence, as Cross-model Control does), and step by step.

A shift is log_softmax(tuned) - log_softmax(base), one vector over the vocabulary at every step of a text. Shapes: T
steps, V tokens of the first model's vocabulary, W of the second's, K compared tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cmc_server.evaluation.sinkhorn import BLUR, sinkhorn_divergence

TOP_TOKENS = 100


@dataclass(frozen=True)
class ShiftDistance:
    """Distances of two shifts along one text.

    Args:
        sinkhorn: debiased Sinkhorn divergence of the T points in R^K, divided by K; ignores the order of the steps.
            None where its iteration did not converge.
        cosine: mean over the steps of the cosine between the two vectors; a step at which one is zero counts as 0.
        l1: mean over steps and tokens of |difference|, in nats.
        num_steps: T.
    """

    sinkhorn: float | None
    cosine: float
    l1: float
    num_steps: int


def logit_shift(tuned: Tensor, base: Tensor) -> Tensor:
    """log_softmax(tuned) - log_softmax(base), [T, V] float64, from [T, V] logits.

    A token that both models rule out (-inf) has shift 0; one that only one of them rules out is an error, since its
    shift is infinite.

    Raises:
        ValueError: the shapes differ, or a shift is infinite.
    """
    if tuned.shape != base.shape:
        raise ValueError(f"tuned and base logits must have one shape, not {list(tuned.shape)} and {list(base.shape)}")
    difference = tuned.double().log_softmax(-1) - base.double().log_softmax(-1)
    neither = (tuned == -torch.inf) & (base == -torch.inf)
    difference = difference.masked_fill(neither, 0.0)
    if not difference.isfinite().all():
        raise ValueError("a token is ruled out by one of the two models only, so its shift is infinite")
    return difference


def top_tokens(scores: Tensor, k: int = TOP_TOKENS, delta_ids: Tensor | None = None) -> Tensor:
    """The k tokens with the highest scores at each step, best first.

    Args:
        scores: [T, V] of the model that decides, which the caller names; the paper's scripts take the tuned model
            across vocabularies and the base model within one.
        k: how many; fewer where fewer tokens exist.
        delta_ids: [V] int64 map into the other vocabulary; only mapped tokens are chosen. None allows all.

    Returns:
        [T, K] int64, K = k or all that may be chosen.
    """
    if delta_ids is not None:
        allowed = delta_ids >= 0
        scores = scores.masked_fill(~allowed, -torch.inf)
        k = min(k, int(allowed.sum()))
    return scores.topk(min(k, scores.shape[-1]), dim=-1).indices


def compare_shifts(
    first: Tensor, second: Tensor, tokens: Tensor, delta_ids: Tensor | None = None, blur: float = BLUR
) -> ShiftDistance:
    """Distances of two shifts at the same steps of one text.

    Args:
        first: [T, V] shift of the first model.
        second: [T, V] shift of the second one, or [T, W] with another vocabulary.
        tokens: [T, K] int64 tokens of the first vocabulary to compare, as :func:`top_tokens` gives them.
        delta_ids: [V] int64 map from the first vocabulary into the second; None if it is the same one. Every compared
            token must be mapped.
        blur: of the Sinkhorn divergence.

    Raises:
        ValueError: there are no steps, the shapes do not fit, or a compared token is unmapped.
    """
    if not first.shape[0] == second.shape[0] == tokens.shape[0] > 0:
        raise ValueError("both shifts and the compared tokens need the same steps, at least one")
    targets = tokens if delta_ids is None else delta_ids[tokens]
    if int(targets.min()) < 0:
        raise ValueError("a compared token is not mapped into the second vocabulary")
    x, y = first.double().gather(1, tokens), second.double().gather(1, targets)
    try:
        sinkhorn = sinkhorn_divergence(x, y, blur) / tokens.shape[1]
    except ArithmeticError:
        sinkhorn = None  # the other two figures stand, and so does the rest of an evaluation
    return ShiftDistance(
        sinkhorn=sinkhorn,
        cosine=float(torch.cosine_similarity(x, y, dim=1).mean()),
        l1=float((x - y).abs().mean()),
        num_steps=x.shape[0],
    )


def shared_steps(first: Sequence[int], second: Sequence[int]) -> list[tuple[int, int]]:
    """Where two tokenizations of one text begin a token at the same place: the steps that can be compared.

    Args:
        first: number of bytes of each token of the first tokenization.
        second: the same of the second one.

    Returns:
        Pairs of step numbers, rising; the first is (0, 0) unless a text is empty.
    """
    starts = _starts(second)
    return [(step, starts[place]) for place, step in _starts(first).items() if place in starts]


def _starts(sizes: Sequence[int]) -> dict[int, int]:
    """Byte offset to the step whose token begins there; of tokens without bytes the last one."""
    places: dict[int, int] = {}
    offset = 0
    for step, size in enumerate(sizes):
        places[offset] = step
        offset += size
    return places
