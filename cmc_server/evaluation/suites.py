"""The suites of ``cmc-server eval``: each measures at every strength and returns plain JSON values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cmc_server.evaluation.bootstrap import Interval, bootstrap_difference, bootstrap_mean
from cmc_server.evaluation.engine import Measurement
from cmc_server.evaluation.options import EvalOptions
from cmc_server.evaluation.prompts import Task
from cmc_server.evaluation.retained import TextLosses, score_references
from cmc_server.evaluation.sweep import EFFECTS, SweepPoint, advised_range
from cmc_server.evaluation.tofu import (
    FORGET,
    TRUTH_RATIOS,
    SetScores,
    forget_quality,
    item_probability,
    model_utility,
    set_summary,
)
from cmc_server.evaluation.tofu_data import TofuItem
from cmc_server.evaluation.tofu_run import TofuRun, run_tofu, set_losses
from cmc_server.vocab.stats import map_statistics
from cmc_server.vocab.surface import load_tokenizer, load_vocabulary, read_generation_config, read_vocabulary
from cmc_server.vocab.vocab_map import cached_map

Json = dict[str, Any]
#: Figures of a TOFU set that are kept for every question.
_ITEM_FIGURES = ("probability", "rouge_l_recall", *TRUTH_RATIOS)


def tofu_suite(
    options: EvalOptions,
    measurement: Measurement,
    sets: Mapping[str, Sequence[TofuItem]],
    retain_only: SetScores | None,
) -> Json:
    """TOFU at every strength.

    Args:
        options: the evaluation.
        measurement: the steered model.
        sets: as ``read_tofu`` returns them.
        retain_only: figures of a retain-only model on the forget set; None leaves out the forget quality.

    Returns:
        ``questions`` and references by set, and by strength the summary, the change against strength 0, the figures and
        answers of every question, the model utility by each truth ratio and, if possible, the forget quality.

    Raises:
        ConfigError: the retain-only figures cannot be compared with.
    """
    by_strength: list[Json] = []
    base: TofuRun | None = None
    for strength in options.measured_strengths:
        run = run_tofu(measurement, sets, strength)
        base = base or run
        entry: Json = {
            "strength": strength,
            "sets": {name: _tofu_set(run, base, name, options.seed) for name in sets},
            **{
                f"model_utility_{_short(kind)}": _plain(model_utility(run.scores, kind, options.seed))
                for kind in TRUTH_RATIOS
            },
        }
        if retain_only is not None:
            tests = forget_quality(run.scores[FORGET], retain_only)
            entry["forget_quality"] = {_short(kind): asdict(test) for kind, test in tests.items()}
        by_strength.append(entry)
    return {
        "forget": options.forget,
        "questions": {name: [item.question for item in items] for name, items in sets.items()},
        "references": {name: [item.answer for item in items] for name, items in sets.items()},
        "by_strength": by_strength,
    }


def _tofu_set(run: TofuRun, base: TofuRun, name: str, seed: int) -> Json:
    scores, before = run.scores[name], base.scores[name]
    changes = {
        figure: bootstrap_difference(getattr(scores, figure), getattr(before, figure), seed)
        for figure in ("probability", "rouge_l_recall")
    }
    changes |= {
        f"score_{kind}": bootstrap_difference(scores.truth_scores(kind), before.truth_scores(kind), seed)
        for kind in TRUTH_RATIOS
    }
    return {
        "summary": _plain_all(set_summary(scores, seed)),
        "change": _plain_all(changes),
        "questions_sha256": scores.questions,
        "items": {figure: getattr(scores, figure) for figure in _ITEM_FIGURES},
        "answers": run.answers[name],
    }


def _short(kind: str) -> str:
    return kind.removeprefix("truth_ratio_")


def retained_suite(
    options: EvalOptions, measurement: Measurement, texts: Sequence[Task]
) -> tuple[Json, dict[float, Interval]]:
    """NLL and perplexity of neutral texts at every strength.

    Returns:
        The suite's results, and the change of the NLL per token by strength.
    """
    by_strength, changes = [], {}
    base: TextLosses | None = None
    for strength in options.measured_strengths:
        losses = score_references(measurement, texts, strength, "neutral texts")
        base = base or losses
        changes[strength] = losses.change(base, options.seed)
        by_strength.append(
            {
                "strength": strength,
                "loss": _plain(losses.mean(options.seed)),
                "perplexity": _plain(losses.perplexity(options.seed)),
                "change": _plain(changes[strength]),
                "items": asdict(losses),
            }
        )
    return {"texts": [task.instruction for task in texts], "by_strength": by_strength}, changes


def sweep_suite(
    options: EvalOptions,
    measurement: Measurement,
    effect: str,
    tasks: Sequence[Task],
    forget: Sequence[TofuItem],
    losses: Mapping[float, Interval],
) -> Json:
    """Effect against harm at every strength, and the advised range.

    Args:
        options: the evaluation.
        measurement: the steered model.
        effect: of :data:`~cmc_server.evaluation.sweep.EFFECTS`.
        tasks: prompts, for the effects ``target`` (with references) and ``length``.
        forget: the forget set, for the effect ``forget``.
        losses: change of the NLL per token on neutral texts by strength.
    """
    effects = effect_by_strength(options, measurement, effect, tasks, forget)
    points = [SweepPoint(strength, effects[strength], losses[strength]) for strength in effects]
    advice = advised_range(points, options.max_loss)
    return {
        "effect": effect,
        "meaning": EFFECTS[effect],
        "max_loss": options.max_loss,
        "advised_range": advice.range,
        "reason": advice.reason,
        "by_strength": [
            {"strength": point.strength, "effect": _plain(point.effect), "loss": _plain(point.loss)} for point in points
        ],
    }


def effect_by_strength(
    options: EvalOptions,
    measurement: Measurement,
    effect: str,
    tasks: Sequence[Task],
    forget: Sequence[TofuItem],
) -> dict[float, Interval]:
    """The effect at every measured strength, paired with strength 0 item by item."""
    if effect == "target":
        scored = {
            strength: score_references(measurement, tasks, strength, "reference answers")
            for strength in options.measured_strengths
        }
        base = scored[0.0]
        # The gain is a fall of the loss; the interval turns round with its sign.
        changes = {strength: losses.change(base, options.seed) for strength, losses in scored.items()}
        return {strength: Interval(0.0 - one.mean, 0.0 - one.high, 0.0 - one.low) for strength, one in changes.items()}
    figures: dict[float, Sequence[float]] = {}
    for strength in options.measured_strengths:
        if effect == "forget":
            losses = set_losses(measurement, forget, strength, "forget set")
            figures[strength] = [item_probability(FORGET, one) for one in losses]
        else:
            answers = measurement.answers([task.prompt for task in tasks], strength, options.max_tokens, "answers")
            figures[strength] = measurement.count_tokens(answers)
    return {strength: bootstrap_difference(figures[0.0], some, options.seed) for strength, some in figures.items()}


def alpaca_suite(
    options: EvalOptions, measurement: Measurement, tasks: Sequence[Task]
) -> tuple[Json, dict[float, list[str]]]:
    """Greedy answers to prompts at every strength, and how long they are.

    Returns:
        The suite's results, and the answers by strength.
    """
    by_strength, answers = [], {}
    lengths: dict[float, list[int]] = {}
    for strength in options.measured_strengths:
        prompts = [task.prompt for task in tasks]
        answers[strength] = measurement.answers(prompts, strength, options.max_tokens, "answers")
        lengths[strength] = measurement.count_tokens(answers[strength])
        by_strength.append(
            {
                "strength": strength,
                "length": _plain(bootstrap_mean(lengths[strength], options.seed)),
                "change": _plain(bootstrap_difference(lengths[strength], lengths[0.0], options.seed)),
                "items": {"length": lengths[strength]},
            }
        )
    return {"prompts": options.prompts_file.name, "max_tokens": options.max_tokens, "by_strength": by_strength}, answers


def coverage_suite(options: EvalOptions, folders: Mapping[str, str], texts: Iterable[str]) -> Json:
    """What the vocabulary map of each delta covers, also of the tokens of given texts.

    Args:
        options: the evaluation.
        folders: delta name to folder.
        texts: a sample of what the deltas meet.
    """
    tokenizer = load_tokenizer(options.user)
    user = read_vocabulary(tokenizer, read_generation_config(options.user))
    sample = tokenizer.backend_tokenizer.encode("\n".join(texts), add_special_tokens=False).ids
    results = {}
    for name, folder in folders.items():
        delta = load_vocabulary(folder)
        results[name] = map_statistics(cached_map(user, delta), user, delta, sample)
    return {"deltas": results}


def _plain(interval: Interval) -> Json:
    return asdict(interval)


def _plain_all(intervals: Mapping[str, Interval]) -> Json:
    return {name: _plain(interval) for name, interval in intervals.items()}
