"""Strength sweeps over generated answers: length and share of ended answers, with bootstrap intervals.

Nothing here generates: the answers come from whatever engine served them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cmc_server.evaluation.bootstrap import Interval, bootstrap_mean


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    Args:
        text: what a reader sees.
        num_tokens: its length in the user LLM's tokens, without the end token.
        ended: whether the model ended it, rather than the limit on its length.
    """

    text: str
    num_tokens: int
    ended: bool


@dataclass(frozen=True)
class StrengthResult:
    """The answers to one list of prompts at one strength.

    Args:
        strength: of the delta.
        length: mean length in tokens.
        change: mean change of the length per prompt against the strength before; None for the first.
        ended: share of the answers that the model ended itself.
    """

    strength: float
    length: Interval
    change: Interval | None
    ended: Interval


def summarise_sweep(answers: Mapping[float, Sequence[Answer]]) -> list[StrengthResult]:
    """Results by rising strength.

    Args:
        answers: strength to the answers to one and the same list of prompts.
    """
    results: list[StrengthResult] = []
    before: NDArray[np.float64] | None = None
    for strength in sorted(answers):
        lengths = np.array([answer.num_tokens for answer in answers[strength]], dtype=np.float64)
        results.append(
            StrengthResult(
                strength=strength,
                length=bootstrap_mean(lengths),
                change=None if before is None else bootstrap_mean(lengths - before),
                ended=bootstrap_mean([float(answer.ended) for answer in answers[strength]]),
            )
        )
        before = lengths
    return results


def falls_steadily(results: Sequence[StrengthResult]) -> bool:
    """Whether answers grow shorter from each strength to the next, beyond what chance explains."""
    return all(result.change.high < 0 for result in results if result.change is not None)


def markdown_table(sweeps: Mapping[str, Sequence[StrengthResult]]) -> str:
    """A table with one row per model and strength.

    Args:
        sweeps: name of the user LLM to its results.
    """
    lines = [
        "| user LLM | strength | mean length in tokens | change per prompt | ended by the model |",
        "|---|---|---|---|---|",
    ]
    for model, results in sweeps.items():
        for result in results:
            ended = f"{result.ended.mean:.0%} [{result.ended.low:.0%}, {result.ended.high:.0%}]"
            change = "" if result.change is None else str(result.change)
            lines.append(f"| {model} | {result.strength:g} | {result.length} | {change} | {ended} |")
    return "\n".join(lines) + "\n"


def plot_sweep(sweeps: Mapping[str, Sequence[StrengthResult]], path: Path, title: str) -> None:
    """Draw mean length and share of ended answers over the strength, side by side, with their intervals.

    Args:
        sweeps: name of the user LLM to its results.
        path: the PNG file.
        title: above both.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = (("mean length of the answers, tokens", "length"), ("answers ended by the model, share", "ended"))
    for index, (label, attribute) in enumerate(panels):
        axes = figure.add_subplot(1, 2, index + 1, xlabel="strength", ylabel=label)
        for model, results in sweeps.items():
            intervals = [getattr(result, attribute) for result in results]
            means = np.array([interval.mean for interval in intervals])
            errors = [means - [one.low for one in intervals], [one.high for one in intervals] - means]
            strengths = [result.strength for result in results]
            axes.errorbar(strengths, means, yerr=np.abs(errors), label=model, marker="o", capsize=4)
            axes.set_xticks(strengths)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
