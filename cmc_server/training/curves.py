"""Loss curves as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOSS_CURVE = "training_loss.png"
#: Key of Trainer's log and its label, in the order of drawing.
_CURVES = (("loss", "training loss"), ("eval_loss", "held-out loss"))
_TERMS = ("train", "forget", "preference", "retain")


def draw_losses(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the loss over the epochs, and below it each term by itself where the loss has several.

    Args:
        history: Trainer's log.
        path: the PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    terms = [term for term in _TERMS if any(term in entry for entry in history)]
    names = ["loss", *(f"{term} term" for term in terms)]
    figure = Figure(figsize=(6, 1.5 + 2 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        axes.set_ylabel(name)
    for key, label in _CURVES:
        _draw(panels[0], history, key, label, marker="." if key == "eval_loss" else None)
    for axes, term in zip(panels[1:], terms, strict=True):
        _draw(axes, history, term, f"{term}, without its weight", marker=None)
    for axes in panels:
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0), max(high, 0))
        if axes.lines:
            axes.legend()
    panels[-1].set_xlabel("epoch")
    figure.savefig(path, dpi=110)


def _draw(axes: Any, history: Sequence[Mapping[str, Any]], key: str, label: str, marker: str | None) -> None:
    points = [(entry["epoch"], entry[key]) for entry in history if key in entry]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, marker=marker)
