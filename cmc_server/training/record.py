"""What a training run leaves beside the weights: the manifest with its provenance, and the loss curve."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cmc_server import __version__
from cmc_server.delta.manifest import DeltaManifest
from cmc_server.training.data import Example, file_hash
from cmc_server.training.recipes import Recipe

LOSS_CURVE = "training_loss.png"


def build_manifest(
    recipe: Recipe,
    files: Mapping[str, Path],
    examples: Mapping[str, Sequence[Example]],
    steps: int,
    metrics: Mapping[str, float],
) -> DeltaManifest:
    """The manifest of a trained delta.

    Args:
        recipe: as it was run.
        files: data files by role (``train``, ``heldout``).
        examples: what was read from them.
        steps: optimiser steps taken.
        metrics: figures of the finished delta.

    Returns:
        A manifest whose context length is the longest input that the delta was trained on.
    """
    return DeltaManifest(
        name=recipe.name,
        description=recipe.description,
        license=recipe.license,
        template_llm=recipe.template,
        objective=recipe.objective.name,
        default_strength=recipe.output.default_strength,
        advised_range=recipe.output.advised_range,
        context_length=max(8, *(len(example.delta_ids) - 1 for example in examples["train"])),
        training={
            "software": {"cmc_server": __version__} | {name: version(name) for name in ("torch", "transformers")},
            "recipe_sha256": recipe_hash(recipe),
            "data": {
                role: {"file": path.name, "sha256": file_hash(path), "examples": len(examples[role])}
                for role, path in files.items()
            },
            "response_tokens": sum(len(example.labels) for example in examples["train"]),
            "seed": recipe.seed,
            "steps": steps,
            "objective": recipe.objective.model_dump(),
            "optimisation": recipe.optimisation.model_dump(),
            "metrics": dict(metrics),
        },
    )


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 over the values that a recipe sets: comments, order, and settings that came later make no difference."""
    values = recipe.model_dump(mode="json", exclude_unset=True)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def draw_losses(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the training and held-out loss over the epochs.

    Args:
        history: Trainer's log.
        path: the PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="epoch", ylabel="cross-entropy per response token")
    for key, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(entry["epoch"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if key == "eval_loss" else None)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=110)
