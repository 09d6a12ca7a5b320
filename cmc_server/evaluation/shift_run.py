"""Compare logit shifts of models: what fine-tuning changed, against what a delta or another model's tuning does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from cmc_server.errors import ConfigError
from cmc_server.evaluation.bootstrap import bootstrap_mean
from cmc_server.evaluation.engine import Measurement, Pair
from cmc_server.evaluation.logit_shift import (
    TOP_TOKENS,
    ShiftDistance,
    compare_shifts,
    logit_shift,
    shared_steps,
    top_tokens,
)
from cmc_server.evaluation.options import EvalOptions
from cmc_server.evaluation.prompts import Task
from cmc_server.fusion.scoring import FusedLM
from cmc_server.vocab.vocab_map import cached_map

_FIGURES = ("sinkhorn", "cosine", "l1")
_Distances = dict[str, list[ShiftDistance]]


def shift_suite(
    options: EvalOptions, measurement: Measurement, fused: FusedLM, tasks: Sequence[Task]
) -> dict[str, Any]:
    """Distances between logit shifts along the tuned model's own greedy answers.

    The first shift is the tuned copy of the user LLM minus the user LLM; of it, the tokens that the tuned copy scores
    highest are compared. The second one is the steered user LLM minus the bare one, at each strength, and, with
    ``options.other``, another pair of models at the steps where both tokenizers begin a token.

    Args:
        options: the evaluation; ``tuned`` is set.
        measurement: strengths and policy of the deltas.
        fused: the user LLM with its deltas.
        tasks: prompts.

    Returns:
        ``comparisons``: label to means over the prompts, and the figures of each.

    Raises:
        ConfigError: the tuned model has another vocabulary, or no answer could be compared.
    """
    tuned = FusedLM.load(str(options.tuned), {}, dtype=options.dtype, device=options.device)
    if tuned.vocabulary.fingerprint != fused.vocabulary.fingerprint or tuned.model.num_logits != fused.model.num_logits:
        raise ConfigError(
            f"{options.tuned} has another vocabulary than {options.user}; --tuned must be a fine-tuned copy of it, and "
            "models of another vocabulary go behind --other."
        )
    texts = Measurement(tuned, lambda _: {}, batch_size=options.batch_size).answers(
        [task.prompt for task in tasks], 0, options.max_tokens, "answers of the tuned model"
    )
    pairs: list[Pair] = [(task.prompt, text) for task, text in zip(tasks, texts, strict=True) if text]
    distances = _against_delta(options, measurement, fused, tuned, pairs)
    if options.other is not None:
        distances["other models"] = _against_other(options, fused, tuned, pairs)
    empty = [label for label, some in distances.items() if not some]
    if empty or not distances:
        raise ConfigError(
            "No answer could be compared; the tuned model says nothing, or only strength 0 was asked for."
        )
    return {
        "tuned": options.tuned,
        "other": options.other,
        "top_tokens": TOP_TOKENS,
        "comparisons": {label: _summary(some, options.seed) for label, some in distances.items()},
    }


def _against_delta(
    options: EvalOptions, measurement: Measurement, fused: FusedLM, tuned: FusedLM, pairs: Sequence[Pair]
) -> _Distances:
    strengths = [strength for strength in options.measured_strengths if strength]
    distances: _Distances = {f"delta at strength {strength:g}": [] for strength in strengths}
    for pair in pairs:
        base, scores = fused.step_logits(pair, {}), tuned.step_logits(pair, {})
        first, tokens = logit_shift(scores, base), top_tokens(scores)
        for label, strength in zip(distances, strengths, strict=True):
            steered = fused.step_logits(pair, measurement.strengths(strength), unmapped=measurement.unmapped)
            distances[label].append(compare_shifts(first, logit_shift(steered, base), tokens))
    return distances


def _against_other(options: EvalOptions, fused: FusedLM, tuned: FusedLM, pairs: Sequence[Pair]) -> list[ShiftDistance]:
    base, after = (FusedLM.load(path, {}, dtype=options.dtype, device=options.device) for path in options.other or ())
    mapped = torch.from_numpy(cached_map(fused.vocabulary, base.vocabulary).delta_ids.copy()).long()
    delta_ids = torch.full((fused.model.num_logits,), -1)
    delta_ids[: min(len(mapped), len(delta_ids))] = mapped[: len(delta_ids)]
    distances = []
    for pair in pairs:
        sizes, other_sizes = _token_texts(fused, pair), _token_texts(base, pair)
        if b"".join(sizes) != b"".join(other_sizes):
            continue  # one of the tokenizers normalises the text, so that places cannot be matched
        steps = shared_steps([len(one) for one in sizes], [len(one) for one in other_sizes])
        mine, its = ([step[side] for step in steps] for side in (0, 1))
        scores = tuned.step_logits(pair, {})[mine]
        first = logit_shift(scores, fused.step_logits(pair, {})[mine])
        second = logit_shift(after.step_logits(pair, {})[its], base.step_logits(pair, {})[its])
        tokens = top_tokens(scores, delta_ids=delta_ids.to(scores.device))
        distances.append(compare_shifts(first, second, tokens, delta_ids.to(scores.device)))
    return distances


def _token_texts(fused: FusedLM, pair: Pair) -> list[bytes]:
    surfaces = fused.vocabulary.surfaces
    return [surfaces[token] or b"" for token in fused.encode_continuation(pair[1])]


def _summary(distances: Sequence[ShiftDistance], seed: int) -> dict[str, Any]:
    figures = {name: [getattr(one, name) for one in distances] for name in _FIGURES}
    known = {name: [value for value in values if value is not None] for name, values in figures.items()}
    return {
        **{name: asdict(bootstrap_mean(values, seed)) if values else None for name, values in known.items()},
        "num_unconverged": figures["sinkhorn"].count(None),
        "num_steps": sum(one.num_steps for one in distances),
        "items": [asdict(one) for one in distances],
    }
