"""Retained ability: how much worse an LLM predicts neutral texts when a delta steers it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cmc_server.evaluation.bootstrap import Interval, bootstrap_ratio
from cmc_server.evaluation.engine import Measurement, Pair
from cmc_server.evaluation.prompts import Task


@dataclass(frozen=True)
class TextLosses:
    """What scoring a list of texts gave.

    Args:
        total: summed NLL of each text, in nats.
        num_tokens: user tokens of each text.
    """

    total: list[float]
    num_tokens: list[int]

    def mean(self, seed: int = 0) -> Interval:
        """NLL per token over all texts, sum of losses over sum of tokens, in nats."""
        return bootstrap_ratio(self.total, self.num_tokens, seed)

    def change(self, base: TextLosses, seed: int = 0) -> Interval:
        """NLL per token minus that of the base, text by text, in nats. Above 0 is worse than the base."""
        differences = [mine - its for mine, its in zip(self.total, base.total, strict=True)]
        return bootstrap_ratio(differences, self.num_tokens, seed)

    def perplexity(self, seed: int = 0) -> Interval:
        """exp of :meth:`mean`."""
        loss = self.mean(seed)
        return Interval(*(math.exp(min(value, 700.0)) for value in (loss.mean, loss.low, loss.high)))


def score_references(measurement: Measurement, tasks: Sequence[Task], strength: float, label: str) -> TextLosses:
    """Score what should follow each prompt: after a chat with the eos, after plain text without.

    Args:
        measurement: the steered model.
        tasks: all with a reference.
        strength: of the delta under study.
        label: of the progress bar.
    """
    pairs: list[Pair] = []
    for task in tasks:
        reference = task.reference or ""
        chatted = not isinstance(task.prompt, str)
        pairs.append((task.prompt, measurement.answer_ids(reference) if chatted else reference))
    log_probs = measurement.log_probs(pairs, strength, label)
    return TextLosses([-float(one.double().sum()) for one in log_probs], [one.numel() for one in log_probs])
