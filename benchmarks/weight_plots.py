"""Draw what `merged_deltas.py`, `expo_strength.py` and `healing.py` found, from the results they left.

python benchmarks/weight_plots.py merged benchmarks/results/merged_deltas.json docs/images/merged.png
python benchmarks/weight_plots.py expo benchmarks/results/expo_strength.json docs/images/expo.png
python benchmarks/weight_plots.py healing benchmarks/results/healing.json docs/images/healing.png
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

#: Colour-blind safe, and a marker for each way as well.
STYLES = {
    "nothing": ("#000000", "o"),
    "concise": ("#56b4e9", "s"),
    "forget": ("#0072b2", "v"),
    "both deltas": ("#009e73", "*"),
    "joint": ("#e69f00", "P"),
    "task-arithmetic": ("#d55e00", "X"),
    "ties": ("#d55e00", "+"),
    "fisher": ("#cc79a7", "D"),
    "regmean": ("#999999", "x"),
    "gradient-matching": ("#cc79a7", "1"),
}


#: What perplexities are of.
TEXTS = ("held-out answers", "neutral texts")


def draw_merged(report: dict[str, Any]) -> Figure:
    """Length of answers against P of the answers to forget, a point for each seed; both behaviours are lower left."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, (model, ways) in zip(figure.subplots(1, len(report["results"])), report["results"].items(), strict=True):
        for way, (colour, marker) in STYLES.items():
            points = [ways[way][key]["seeds"] for key in ("length", "P, forget")]
            axes.scatter(*points, c=colour, marker=marker, s=60, label=way, alpha=0.8)
        axes.set(title=model, xlabel="mean tokens of an answer", ylabel="P of the answers to forget")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def draw_expo(report: dict[str, Any]) -> Figure:
    """Length of answers by factor, on the logits and on the weights, with intervals."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, (model, found) in zip(figure.subplots(1, len(report["results"])), report["results"].items(), strict=True):
        for way, label in (("strength", "logits: strength"), ("weights", "weights: ExPO")):
            # At 0 and 1 the two are the same.
            lengths = {float(factor): one.get(way, one["strength"])["length"] for factor, one in found.items()}
            factors = sorted(lengths)
            means, lows, highs = ([lengths[factor][key] for factor in factors] for key in ("mean", "low", "high"))
            axes.plot(factors, means, marker="o", label=label)
            axes.fill_between(factors, lows, highs, alpha=0.2)
        axes.set(title=model, xlabel="factor", ylabel="mean tokens of an answer", ylim=(0, None))
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def draw_healing(report: dict[str, Any]) -> Figure:
    """Perplexity by what healed a pruned LLM, a point for each seed, on the texts learned from and on neutral ones."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    names = [f"{one['by']}, {one['sparsity']:.0%} pruned" for one in report["results"]]
    for axes, kind, title in zip(figure.subplots(1, 2, sharey=True), ("test", "neutral"), TEXTS, strict=True):
        for row, one in enumerate(report["results"]):
            values = [math.exp(losses[kind]) for losses in one["losses"]]
            axes.scatter(values, [row] * len(values), s=40, alpha=0.7, color="#0072b2")
        axes.set(title=title, xlabel="perplexity", yticks=range(len(names)), yticklabels=names)
        axes.grid(alpha=0.3)
    axes.invert_yaxis()
    return figure


DRAWINGS = {"merged": draw_merged, "expo": draw_expo, "healing": draw_healing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=DRAWINGS)
    parser.add_argument("report", type=Path)
    parser.add_argument("image", type=Path)
    options = parser.parse_args()
    figure = DRAWINGS[options.what](json.loads(options.report.read_text("utf-8")))
    FigureCanvasAgg(figure)
    figure.savefig(options.image, dpi=120)


if __name__ == "__main__":
    main()
