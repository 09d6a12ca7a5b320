"""What a training run leaves beside the weights: the manifest with its provenance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from cmc_server import __version__
from cmc_server.delta.manifest import DeltaManifest
from cmc_server.training.batches import TrainingSet
from cmc_server.training.data import Records
from cmc_server.training.recipes import Recipe
from cmc_server.training.template import FrozenTemplate


def prompt_manifest(recipe: Recipe) -> DeltaManifest:
    """The part of the manifest that says how the delta reads its prompts, in training as when it is served."""
    return DeltaManifest(prompt_template=recipe.output.prompt_template, bos=recipe.output.bos)


def build_manifest(
    recipe: Recipe,
    records: Mapping[str, Records],
    sets: Mapping[str, TrainingSet],
    templates: Sequence[FrozenTemplate],
    steps: int,
    metrics: Mapping[str, float],
) -> DeltaManifest:
    """The manifest of a trained delta.

    Args:
        recipe: as it was run.
        records: what was read, by key of ``data``.
        sets: what was made of it: ``train`` and, if there is one, ``heldout``.
        templates: the frozen LLMs: the recipe's templates in their order, and the tuned one if there is one.
        steps: optimiser steps taken.
        metrics: figures of the finished delta.

    Returns:
        A manifest whose context length is the longest input that the delta was trained on.
    """
    train = sets["train"]
    examples = [*(example for item in train.items for example in item.values()), *train.retain]
    used = {recipe.main: len(train.items), "retain": len(train.retain)}
    if "heldout" in sets:
        used["heldout"] = len(sets["heldout"].items)
    return DeltaManifest(
        name=recipe.name,
        description=recipe.description,
        license=recipe.license,
        template_llm=", ".join(recipe.templates),
        objective=recipe.objective.name,
        default_strength=recipe.output.default_strength,
        advised_range=recipe.output.advised_range,
        prompt_template=recipe.output.prompt_template,
        bos=recipe.output.bos,
        context_length=max(8, *(len(example.delta_ids) for example in examples)),
        training={
            "software": {"cmc_server": __version__} | {name: version(name) for name in ("torch", "transformers")},
            "recipe_sha256": recipe_hash(recipe),
            "templates": [_template(name, llm) for name, llm in zip(_llms(recipe), templates, strict=True)],
            "objective": _compact(recipe.objective.model_dump(mode="json")),
            "data": {key: {**found.provenance, "examples": used[key]} for key, found in records.items()},
            "response_tokens": sum(len(example.readings[0].labels) for example in examples),
            "seed": recipe.seed,
            "steps": steps,
            "optimisation": recipe.optimisation.model_dump(),
            "metrics": dict(metrics),
        },
    )


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 over the values that a recipe sets: comments, order, and settings that came later make no difference."""
    values = recipe.model_dump(mode="json", exclude_unset=True)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def run_hash(recipe: Recipe, records: Mapping[str, Records], llms: Sequence[FrozenTemplate]) -> str:
    """SHA-256 over all that decides the weights of a run: recipe, data, frozen LLMs."""
    data = {key: found.provenance["sha256"] for key, found in records.items()}
    parts = [recipe_hash(recipe), data, [llm.fingerprint for llm in llms]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _llms(recipe: Recipe) -> list[str]:
    tuned = getattr(recipe.objective, "tuned", None)
    return [*recipe.templates, *([] if tuned is None else [tuned])]


def _template(name: str, llm: FrozenTemplate) -> dict[str, str]:
    return {"name": name, "weights_sha256": llm.fingerprint}


def _compact(options: dict[str, Any]) -> dict[str, Any]:
    """Options without long lists, which the recipe's hash covers: their length and hash instead."""
    return {
        key: {"count": len(value), "sha256": hashlib.sha256(json.dumps(value).encode()).hexdigest()}
        if isinstance(value, list)
        else value
        for key, value in options.items()
    }
