"""TOFU's metrics (Maini et al. 2024), as Cross-model Control reports them: pure functions of losses and answers.

For an answer a of n user tokens, its eos among them, l(a) = -(1/n) sum_i log p(a_i | question, a_<i) and
P(a) = exp(-l(a)). All losses here are such l, in nats per token.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cmc_server.errors import ConfigError
from cmc_server.evaluation.bootstrap import Interval, bootstrap_mean, bootstrap_statistic
from cmc_server.evaluation.ks import KsTest, ks_test

FORGET = "forget"
#: The sets that must be kept; model utility is made of their three figures each.
KEPT_SETS = ("retain", "real_authors", "world_facts")
#: Sets whose probability is the share of the right answer among the given ones.
_MULTIPLE_CHOICE = ("real_authors", "world_facts")
#: The two definitions of the truth ratio; papers and TOFU's own code differ.
TRUTH_RATIOS = ("truth_ratio_geometric", "truth_ratio_arithmetic")
#: exp() of more overflows; no loss of a real model comes near.
_MAX_EXPONENT = 700.0


@dataclass(frozen=True)
class ItemLosses:
    """Losses l of one question's answers, in nats per token.

    Args:
        answer: of the right answer.
        paraphrase: of the right answer in other words; where the set has none, of the right answer.
        perturbed: of wrong answers of the same form.
    """

    answer: float
    paraphrase: float
    perturbed: tuple[float, ...]


@dataclass(frozen=True)
class SetScores:
    """Figures of one set, one per question.

    Args:
        name: ``forget``, ``retain``, ``real_authors`` or ``world_facts``.
        questions: SHA-256 of the questions, so that only equal sets are compared.
        probability: see :func:`item_probability`.
        rouge_l_recall: see :mod:`cmc_server.evaluation.rouge`.
        truth_ratio_geometric: see :func:`truth_ratio_geometric`.
        truth_ratio_arithmetic: see :func:`truth_ratio_arithmetic`.
    """

    name: str
    questions: str
    probability: list[float]
    rouge_l_recall: list[float]
    truth_ratio_geometric: list[float]
    truth_ratio_arithmetic: list[float]

    def truth_scores(self, kind: str) -> list[float]:
        """One score per question from the truth ratios of a kind, see :func:`truth_score`."""
        return [truth_score(ratio, self.name == FORGET) for ratio in getattr(self, kind)]


def item_probability(name: str, losses: ItemLosses) -> float:
    """P(a) for the invented authors; P(a) / (P(a) + sum_j P(pert_j)) for real authors and world facts."""
    right = math.exp(-losses.answer)
    if name not in _MULTIPLE_CHOICE:
        return right
    # Divided by P(a), so that nothing underflows.
    return 1 / (1 + sum(_exp(losses.answer - loss) for loss in losses.perturbed))


def truth_ratio_geometric(losses: ItemLosses) -> float:
    """R = exp(l(para) - mean_j l(pert_j)): the geometric mean of the wrong answers' P over the right one's."""
    return _exp(losses.paraphrase - float(np.mean(losses.perturbed)))


def truth_ratio_arithmetic(losses: ItemLosses) -> float:
    """R = mean_j P(pert_j) / P(para): the arithmetic mean instead."""
    return float(np.mean([_exp(losses.paraphrase - loss) for loss in losses.perturbed]))


def truth_score(ratio: float, forgotten: bool) -> float:
    """max(0, 1 - R), or min(R, 1/R) on the forget set, where right and wrong answers should look alike."""
    if not forgotten:
        return max(0.0, 1 - ratio)
    return min(ratio, 1 / ratio) if ratio > 0 else 0.0


def harmonic_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """[r, c] non-negative values to [r] means n / sum(1/v); 0 where one of them is 0."""
    with np.errstate(divide="ignore"):
        means: NDArray[np.float64] = values.shape[1] / (1 / values).sum(axis=1)
    return means


def model_utility(scores: Mapping[str, SetScores], kind: str, seed: int = 0) -> Interval:
    """Harmonic mean of nine values: mean probability, ROUGE-L recall and truth score of the three kept sets.

    Args:
        scores: the sets by name.
        kind: which truth ratio, one of :data:`TRUTH_RATIOS`.
        seed: of the bootstrap, which resamples questions within each set.
    """
    groups = [
        np.array([one.probability, one.rouge_l_recall, one.truth_scores(kind)], dtype=np.float64).T
        for one in (scores[name] for name in KEPT_SETS)
    ]
    return bootstrap_statistic(groups, lambda means: harmonic_mean(np.concatenate(means, axis=1)), seed)


def set_summary(scores: SetScores, seed: int = 0) -> dict[str, Interval]:
    """Means over the questions with intervals: probability, ROUGE-L recall, and score by each truth ratio."""
    columns = {"probability": scores.probability, "rouge_l_recall": scores.rouge_l_recall}
    columns |= {f"score_{kind}": scores.truth_scores(kind) for kind in TRUTH_RATIOS}
    return {name: bootstrap_mean(values, seed) for name, values in columns.items()}


def forget_quality(unlearned: SetScores, retain_only: SetScores) -> dict[str, KsTest]:
    """KS test between the truth ratios on the forget set of an unlearned and of a retain-only model.

    A high p-value says that the two cannot be told apart: forgotten as if never learned.

    Args:
        unlearned: the forget set's figures of the model that was to forget.
        retain_only: those of a model that was never trained on the forget set.

    Returns:
        One test per definition of the ratio.

    Raises:
        ConfigError: both are one and the same evaluation, whose p-value is trivially 1, or of different questions.
    """
    check_questions(unlearned.questions, retain_only)
    if ratios_hash(unlearned) == ratios_hash(retain_only):
        raise ConfigError(
            "The retain-only results hold the very numbers of the model under evaluation; comparing a run with itself "
            "gives a forget quality of 1 that means nothing, so give the results of a model trained without the "
            "forget set."
        )
    return {kind: ks_test(getattr(unlearned, kind), getattr(retain_only, kind)) for kind in TRUTH_RATIOS}


def check_questions(questions: str, retain_only: SetScores) -> None:
    """Refuse results of a retain-only model that are about other questions.

    Args:
        questions: hash of those that are asked.
        retain_only: as for :func:`forget_quality`.

    Raises:
        ConfigError: as said.
    """
    if questions != retain_only.questions:
        raise ConfigError(
            "The retain-only results are about other questions; run both evaluations with the same --tofu, --forget "
            "and --limit."
        )


def ratios_hash(scores: SetScores) -> str:
    """SHA-256 of the truth ratios, by content."""
    return hashlib.sha256(json.dumps([getattr(scores, kind) for kind in TRUTH_RATIOS]).encode()).hexdigest()


def questions_hash(questions: Sequence[str]) -> str:
    """SHA-256 of a list of questions."""
    return hashlib.sha256(json.dumps(list(questions)).encode()).hexdigest()


def _exp(exponent: float) -> float:
    return math.exp(min(exponent, _MAX_EXPONENT))
