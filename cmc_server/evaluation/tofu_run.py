"""Run TOFU on a steered model: ask every question, score every answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from cmc_server.errors import ConfigError
from cmc_server.evaluation.engine import Measurement, Pair, chat
from cmc_server.evaluation.rouge import rouge_l_recall
from cmc_server.evaluation.tofu import (
    ItemLosses,
    SetScores,
    item_probability,
    questions_hash,
    truth_ratio_arithmetic,
    truth_ratio_geometric,
)
from cmc_server.evaluation.tofu_data import TofuItem

#: Prompt and answer together have at most so many user tokens, as in TOFU.
MAX_TOTAL_TOKENS = 200


@dataclass(frozen=True)
class TofuRun:
    """What one strength gave.

    Args:
        scores: the sets by name.
        answers: greedy answers by set, in the order of the questions.
    """

    scores: dict[str, SetScores]
    answers: dict[str, list[str]]


def run_tofu(measurement: Measurement, sets: Mapping[str, Sequence[TofuItem]], strength: float) -> TofuRun:
    """Evaluate all sets at one strength.

    Raises:
        ConfigError: a question alone is longer than :data:`MAX_TOTAL_TOKENS`.
    """
    scores, answers = {}, {}
    room = {name: _room(measurement, items) for name, items in sets.items()}
    for name, items in sets.items():
        losses = set_losses(measurement, items, strength, f"TOFU {name}")
        answers[name] = _answers(measurement, items, room[name], strength, f"TOFU {name}, answers")
        scores[name] = SetScores(
            name=name,
            questions=questions_hash([item.question for item in items]),
            probability=[item_probability(name, one) for one in losses],
            rouge_l_recall=rouge_l_recall([item.answer for item in items], answers[name]),
            truth_ratio_geometric=[truth_ratio_geometric(one) for one in losses],
            truth_ratio_arithmetic=[truth_ratio_arithmetic(one) for one in losses],
        )
    return TofuRun(scores, answers)


def set_losses(measurement: Measurement, items: Sequence[TofuItem], strength: float, label: str) -> list[ItemLosses]:
    """Mean token NLL, eos included, of every answer of every question; a text that occurs twice is scored once."""
    pairs: dict[tuple[int, str], Pair] = {}
    for index, item in enumerate(items):
        for text in (item.answer, item.paraphrase, *item.perturbed):
            pairs[index, text] = (chat(item.question), measurement.answer_ids(text))
    log_probs = measurement.log_probs(list(pairs.values()), strength, label)
    losses = {key: mean_loss(one) for key, one in zip(pairs, log_probs, strict=True)}
    return [
        ItemLosses(
            losses[index, item.answer],
            losses[index, item.paraphrase],
            tuple(losses[index, text] for text in item.perturbed),
        )
        for index, item in enumerate(items)
    ]


def mean_loss(log_probs: Tensor) -> float:
    """l = -mean of [n] log-probabilities, in nats per token."""
    return -float(log_probs.double().mean())


def _room(measurement: Measurement, items: Sequence[TofuItem]) -> list[int]:
    """How many tokens the answer to each question may have."""
    room = [MAX_TOTAL_TOKENS - len(measurement.model.encode_prompt(chat(item.question))) for item in items]
    if min(room) < 1:
        question = items[room.index(min(room))].question
        raise ConfigError(
            f"A question leaves no room for an answer within {MAX_TOTAL_TOKENS} tokens: {question[:80]!r}."
        )
    return room


def _answers(
    measurement: Measurement, items: Sequence[TofuItem], room: Sequence[int], strength: float, label: str
) -> list[str]:
    # One call, bounded by the shortest prompt; what goes beyond a longer prompt's own room is cut afterwards.
    answers = measurement.answers([chat(item.question) for item in items], strength, max(room), label)
    return [_cut(measurement, answer, tokens) for answer, tokens in zip(answers, room, strict=True)]


def _cut(measurement: Measurement, answer: str, num_tokens: int) -> str:
    ids = measurement.model.encode_continuation(answer)
    if len(ids) <= num_tokens:
        return answer
    return str(measurement.model.tokenizer.decode(ids[:num_tokens], skip_special_tokens=True))
