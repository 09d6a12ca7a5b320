"""From results to the sections of the report: numbers become tables and sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmc_server.evaluation.plots import PLOTS
from cmc_server.evaluation.report import Sample, Section, Table

Json = Mapping[str, Any]
_SET_TITLES = {
    "forget": "Forget set (should fall)",
    "retain": "Retain set (should stay)",
    "real_authors": "Real authors (should stay)",
    "world_facts": "World facts (should stay)",
}
_NUM_SAMPLES = 5
_NUM_SCRIPTS = 10


def build_sections(results: Json, folder: Path) -> list[Section]:
    """The sections of all suites that ran, in their order; draws the plots on the way.

    Args:
        results: as :func:`cmc_server.evaluation.results.write_results` writes them.
        folder: where the plots go.
    """
    sections = []
    for name, suite in results["suites"].items():
        plot = None
        if name in PLOTS:
            file, draw = PLOTS[name]
            plot = folder / file
            draw(suite, plot)
        sections.append(_BUILDERS[name](suite, plot))
    return sections


def _tofu(suite: Json, plot: Path | None) -> Section:
    entries = suite["by_strength"]
    first, last = entries[0], entries[-1]

    def probability(entry: Json, name: str) -> str:
        return f"{entry['sets'][name]['summary']['probability']['mean']:.3f}"

    headline = (
        f"From strength {first['strength']:g} to {last['strength']:g} the probability of the answers that should be "
        f"forgotten goes from {probability(first, 'forget')} to {probability(last, 'forget')}, of those that should "
        f"be kept from {probability(first, 'retain')} to {probability(last, 'retain')}."
        if len(entries) > 1
        else f"The answers of the forget set have probability {probability(first, 'forget')}, those of the retain set "
        f"{probability(first, 'retain')}."
    )
    metrics = {
        "probability": "probability",
        "rouge_l_recall": "ROUGE-L",
        "score_truth_ratio_geometric": "truth, geometric",
        "score_truth_ratio_arithmetic": "truth, arithmetic",
    }
    tables = [
        Table(
            ["strength", *metrics.values(), "change of P"],
            [
                [
                    f"{entry['strength']:g}",
                    *(interval(entry["sets"][name]["summary"][metric]) for metric in metrics),
                    interval(entry["sets"][name]["change"]["probability"]),
                ]
                for entry in entries
            ],
            title,
        )
        for name, title in _SET_TITLES.items()
    ]
    tables.append(_tofu_overall(entries))
    samples = [
        Sample(
            suite["questions"][name][index],
            [
                ("right", suite["references"][name][index]),
                *((f"{entry['strength']:g}", entry["sets"][name]["answers"][index]) for entry in entries),
            ],
        )
        for name, wanted in (("forget", 3), ("retain", 2))
        for index in range(min(wanted, len(suite["questions"][name])))
    ]
    words = (
        "Questions about invented authors, of which some should be forgotten and the others kept, and about real "
        "authors and the world. Probability is that of the right answer per token (for real authors and world facts, "
        "its share among the given answers). ROUGE-L is the share of the right answer's words, in order, in the greedy "
        "answer. The truth score says on kept sets how much likelier right answers are than wrong ones, and on the "
        "forget set how alike the two have become; it is given by the geometric and by the arithmetic mean over the "
        "wrong answers. Model utility is the harmonic mean of the nine figures of the kept sets. Forget quality is the "
        "p-value of a test between the truth ratios of this model and of one that never saw the forget set: near 0 "
        "the two differ, near 1 they cannot be told apart."
    )
    return Section(f"TOFU ({suite['forget']})", headline, words, tables, plot, samples)


def _tofu_overall(entries: Sequence[Json]) -> Table:
    columns = ["strength", "model utility, geometric", "model utility, arithmetic"]
    rows = [
        [f"{entry['strength']:g}", *(interval(entry[f"model_utility_{kind}"]) for kind in ("geometric", "arithmetic"))]
        for entry in entries
    ]
    if "forget_quality" in entries[0]:
        columns += ["forget quality (p), geometric", "forget quality (p), arithmetic"]
        for row, entry in zip(rows, entries, strict=True):
            row += [f"{entry['forget_quality'][kind]['p_value']:.3g}" for kind in ("geometric", "arithmetic")]
    return Table(columns, rows, "Overall")


def _sweep(suite: Json, plot: Path | None) -> Section:
    table = Table(
        ["strength", f"effect: {suite['effect']}", "loss on neutral texts"],
        [[f"{one['strength']:g}", interval(one["effect"]), interval(one["loss"])] for one in suite["by_strength"]],
    )
    words = (
        f"The effect is the {suite['meaning']}. The loss is the rise of the negative log-likelihood of neutral texts, "
        "in nats per token. A range of strengths is advised where the effect is at least half of its best and the mean "
        f"loss is at most {suite['max_loss']:g}."
    )
    headline = suite["reason"] if suite["advised_range"] else f"No range is advised. {suite['reason']}"
    return Section("Strength sweep", headline, words, [table], plot)


def _retained(suite: Json, plot: Path | None) -> Section:
    entries = suite["by_strength"]
    table = Table(
        ["strength", "NLL per token", "perplexity", "change of NLL"],
        [
            [f"{one['strength']:g}", interval(one["loss"]), interval(one["perplexity"], 2), interval(one["change"])]
            for one in entries
        ],
    )
    tables = [table, _most_hurt(suite)] if len(entries) > 1 else [table]
    headline = f"The perplexity of {len(suite['texts'])} neutral texts is {entries[0]['perplexity']['mean']:.2f}" + (
        " without the delta, and "
        + ", ".join(f"{one['perplexity']['mean']:.2f} at strength {one['strength']:g}" for one in entries[1:])
        + "."
        if len(entries) > 1
        else "."
    )
    words = (
        "How well the LLM predicts texts that the delta should leave alone. A change above 0 is ability lost; its "
        "interval is paired, text by text, and therefore narrower than those of the two figures."
    )
    return Section("Retained ability", headline, words, tables, plot)


def _most_hurt(suite: Json) -> Table:
    """The texts whose NLL per token rises most at the highest strength."""
    base, strongest = suite["by_strength"][0], max(suite["by_strength"], key=lambda one: float(one["strength"]))
    rises = [
        (after - before) / num_tokens
        for before, after, num_tokens in zip(
            base["items"]["total"], strongest["items"]["total"], strongest["items"]["num_tokens"], strict=True
        )
    ]
    worst = sorted(range(len(rises)), key=lambda index: -rises[index])[:_NUM_SAMPLES]
    return Table(
        ["text", "change of NLL"],
        [[suite["texts"][index], f"{rises[index]:.3f}"] for index in worst],
        f"The texts that lose most at strength {strongest['strength']:g}",
    )


def _alpaca(suite: Json, plot: Path | None) -> Section:
    entries = suite["by_strength"]
    table = Table(
        ["strength", "mean length in tokens", "change per prompt", "file"],
        [
            [f"{one['strength']:g}", interval(one["length"], 1), interval(one["change"], 1), one["file"]]
            for one in entries
        ],
    )
    lengths = ", ".join(f"{one['length']['mean']:.1f} at strength {one['strength']:g}" for one in entries)
    words = (
        f"Greedy answers to the prompts of {suite['prompts']}, cut at {suite['max_tokens']} tokens. The files are in "
        "the format that AlpacaEval judges."
    )
    samples = [Sample(one["prompt"], one["answers"]) for one in suite["samples"][:_NUM_SAMPLES]]
    return Section("Answers", f"Mean length in tokens: {lengths}.", words, [table], plot, samples)


def _coverage(suite: Json, plot: Path | None) -> Section:
    tables = [
        Table(
            ["script", "tokens", "mapped", "same text", "unmapped"],
            [
                [script, f"{row['tokens']:,}", f"{row['coverage']:.1%}", f"{row['exact']:,}", f"{row['none']:,}"]
                for script, row in list(statistics["scripts"].items())[:_NUM_SCRIPTS]
            ],
            f"{name}: tokens of the user LLM by script, the largest first",
        )
        for name, statistics in suite["deltas"].items()
    ]
    parts = [
        f"{name} covers {one['coverage']:.1%} of the vocabulary and {one['sample']['coverage']:.1%} of the tokens of "
        "the evaluation's own texts"
        for name, one in suite["deltas"].items()
    ]
    words = (
        "A token of the user LLM that the map leaves out is never moved by the delta. Tokens mapped to the same text "
        "are moved as the delta was trained; shortened and extended ones stand for the nearest text that the delta has."
    )
    return Section("Coverage", "; ".join(parts) + ".", words, tables, plot)


def _shift(suite: Json, plot: Path | None) -> Section:
    comparisons = suite["comparisons"]
    table = Table(
        ["compared with", "Sinkhorn divergence", "cosine per step", "L1 per step", "steps"],
        [
            [label, _sinkhorn(one), interval(one["cosine"]), interval(one["l1"]), f"{one['num_steps']:,}"]
            for label, one in comparisons.items()
        ],
    )
    best = max(comparisons, key=lambda label: float(comparisons[label]["cosine"]["mean"]))
    words = (
        f"What fine-tuning changed in the logits of the user LLM ({suite['tuned']} minus the user LLM), compared with "
        "what the delta adds, or with what fine-tuning changed in another model, at every step of the tuned model's "
        f"greedy answers and for the {suite['top_tokens']} tokens that it scores highest there. The Sinkhorn "
        "divergence compares all steps as two clouds of points, whatever their order, and is divided by the number of "
        "tokens; cosine and L1 compare step by step."
    )
    headline = f"The shifts point most alike for {best}, with a mean cosine of {interval(comparisons[best]['cosine'])}."
    return Section("Logit shifts", headline, words, [table], plot)


def _sinkhorn(comparison: Json) -> str:
    figure = "none" if comparison["sinkhorn"] is None else interval(comparison["sinkhorn"])
    missing = comparison["num_unconverged"]
    return f"{figure} (without {missing} answers on which it did not converge)" if missing else figure


def interval(value: Json, digits: int = 3) -> str:
    """Mean and interval as text."""
    return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


_BUILDERS: Mapping[str, Callable[[Json, Path | None], Section]] = {
    "tofu": _tofu,
    "sweep": _sweep,
    "retained": _retained,
    "alpaca": _alpaca,
    "coverage": _coverage,
    "shift": _shift,
}
