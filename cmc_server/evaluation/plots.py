"""The pictures of an evaluation: PNG, drawn without a display."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cmc_server.errors import ConfigError

_SET_LABELS = {"forget": "forget", "retain": "retain", "real_authors": "real authors", "world_facts": "world facts"}
_DPI = 110


def require_matplotlib() -> None:
    """Check that matplotlib is there, before anything slow begins.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("The plots need matplotlib; run: pip install matplotlib.")


def plot_tofu(suite: Mapping[str, Any], path: Path) -> None:
    """Probability and ROUGE-L of the four sets, and model utility, over the strength."""
    entries = sorted(suite["by_strength"], key=lambda entry: float(entry["strength"]))
    figure, panels = _figure(3, "TOFU: what is forgotten and what is kept")
    for axes, (metric, label) in zip(
        panels, (("probability", "mean probability of the answer"), ("rouge_l_recall", "ROUGE-L recall")), strict=False
    ):
        for index, (name, set_label) in enumerate(_SET_LABELS.items()):
            intervals = [entry["sets"][name]["summary"][metric] for entry in entries]
            _curve(axes, entries, intervals, set_label, dodge=index - 1.5)
        axes.set_ylabel(label)
        axes.set_ylim(-0.03, 1.03)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, ncols=4, loc="outside lower left")
    for index, kind in enumerate(("geometric", "arithmetic")):
        intervals = [entry[f"model_utility_{kind}"] for entry in entries]
        _curve(panels[2], entries, intervals, f"{kind} truth ratio", f"tab:{('purple', 'brown')[index]}", index - 0.5)
    panels[2].set_ylabel("model utility")
    panels[2].set_ylim(bottom=0)
    figure.legend(*panels[2].get_legend_handles_labels(), fontsize=8, ncols=2, loc="outside lower right")
    _save(figure, path)


def plot_sweep(suite: Mapping[str, Any], path: Path) -> None:
    """Effect and harm over the strength, with the advised range as a band."""
    entries = sorted(suite["by_strength"], key=lambda entry: float(entry["strength"]))
    figure, (effect, loss) = _figure(2, "Effect against harm")
    _curve(effect, entries, [entry["effect"] for entry in entries])
    effect.set_ylabel(
        {"target": "gain, nats per token", "forget": "fall of the probability"}.get(
            suite["effect"], "shortening, tokens"
        )
    )
    _curve(loss, entries, [entry["loss"] for entry in entries], colour="tab:red")
    loss.axhline(suite["max_loss"], color="grey", linestyle="--", linewidth=1, label="bound")
    loss.set_ylabel("loss on neutral texts, nats per token")
    for axes in (effect, loss):
        if suite["advised_range"] is not None:
            low, high = suite["advised_range"]
            # A single strength gets a band that can be seen.
            width = 0.02 * max(1e-9, entries[-1]["strength"] - entries[0]["strength"])
            axes.axvspan(low - width, high + width, color="tab:green", alpha=0.15, label="advised")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    _save(figure, path)


def plot_retained(suite: Mapping[str, Any], path: Path) -> None:
    """Change of the NLL per token on neutral texts over the strength."""
    entries = sorted(suite["by_strength"], key=lambda entry: float(entry["strength"]))
    figure, (axes,) = _figure(1, "Neutral texts")
    axes.axhline(0, color="grey", linewidth=1)
    _curve(axes, entries, [entry["change"] for entry in entries], colour="tab:red")
    axes.set_ylabel("change of NLL, nats per token")
    _save(figure, path)


def plot_alpaca(suite: Mapping[str, Any], path: Path) -> None:
    """Mean length of the answers over the strength."""
    entries = sorted(suite["by_strength"], key=lambda entry: float(entry["strength"]))
    figure, (axes,) = _figure(1, "Greedy answers")
    _curve(axes, entries, [entry["length"] for entry in entries])
    axes.axhline(suite["max_tokens"], color="grey", linestyle="--", linewidth=1, label="limit")
    axes.set_ylabel("mean length, tokens")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    _save(figure, path)


def plot_coverage(suite: Mapping[str, Any], path: Path) -> None:
    """Shares of the user vocabulary by match kind, for each delta: of all ordinary tokens and of the sample's text."""
    figure, (axes,) = _figure(1, "Coverage of the vocabulary map", width=7)
    labels, shares = [], []
    for name, statistics in suite["deltas"].items():
        tokens = {kind: sum(row[kind] for row in statistics["scripts"].values()) for kind in _KINDS}
        for label, row in ((f"{name}: vocabulary", tokens), (f"{name}: text", statistics["sample"])):
            total = max(1, sum(row[kind] for kind in _KINDS))
            labels.append(label)
            shares.append([row[kind] / total for kind in _KINDS])
    left = np.zeros(len(labels))
    for index, (text, colour) in enumerate(_KINDS.values()):
        values = np.array([row[index] for row in shares])
        axes.barh(labels, values, left=left, label=text, color=colour)
        left += values
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the tokens")
    axes.grid(visible=False)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, ncols=len(_KINDS), loc="outside lower center")
    _save(figure, path)


_KINDS = {
    "exact": ("same text", "tab:green"),
    "prefix": ("shortened", "tab:olive"),
    "extension": ("extended", "tab:orange"),
    "special": ("special", "tab:blue"),
    "none": ("unmapped", "lightgrey"),
}


def _figure(num_panels: int, title: str, width: float | None = None) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width or (5 if num_panels == 1 else 4 * num_panels), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    panels = [figure.add_subplot(1, num_panels, index + 1) for index in range(num_panels)]
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure, panels


def _curve(
    axes: Any,
    entries: Sequence[Mapping[str, Any]],
    intervals: Sequence[Mapping[str, float]],
    label: str | None = None,
    colour: str | None = None,
    dodge: float = 0,
) -> None:
    """One line with its intervals over the strength; ``dodge`` moves it aside, so that intervals do not hide others."""
    strengths = np.array([entry["strength"] for entry in entries], dtype=np.float64)
    means = np.array([interval["mean"] for interval in intervals])
    errors = np.abs([means - [one["low"] for one in intervals], [one["high"] for one in intervals] - means])
    places = strengths + dodge * 0.012 * np.ptp(strengths)
    axes.errorbar(places, means, yerr=errors, label=label, marker="o", markersize=4, capsize=3, color=colour)
    axes.set_xticks(strengths)
    axes.set_xlabel("strength")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=_DPI)


#: File name and drawing function by suite.
PLOTS = {
    "tofu": ("tofu.png", plot_tofu),
    "sweep": ("sweep.png", plot_sweep),
    "retained": ("retained.png", plot_retained),
    "alpaca": ("alpaca.png", plot_alpaca),
    "coverage": ("coverage.png", plot_coverage),
}
