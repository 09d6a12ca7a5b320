"""A recipe is checked as a whole before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cmc_server.errors import ConfigError
from cmc_server.training.recipes import read_recipe

Change = Callable[[dict[str, Any]], object]

MISTAKES: dict[str, tuple[Change, str]] = {
    "unknown key": (lambda values: values.update(epochs=3), "epochs: Extra inputs"),
    "unknown nested key": (lambda values: values["data"].update(path="x"), "data.path"),
    "missing key": (lambda values: values.pop("template"), "template: Field required"),
    "wrong type": (lambda values: values["optimisation"].update(epochs="many"), "optimisation.epochs"),
    "out of range": (lambda values: values["optimisation"].update(learning_rate=0), "optimisation.learning_rate"),
    "not a number": (lambda values: values["optimisation"].update(weight_decay=float("nan")), "weight_decay"),
    "objective": (lambda values: values.update(objective="magic"), "instruction_tuning"),
    "name": (lambda values: values.update(name="a b"), "cannot name a delta"),
    "heads": (lambda values: values["delta"].update(num_heads=3), "multiple of 2"),
    "type of the weights": (lambda values: values["output"].update(dtype="int8"), "output.dtype"),
}


@pytest.mark.parametrize(("change", "expected"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named(tmp_path: Path, recipe_values: dict[str, Any], change: Change, expected: str) -> None:
    change(recipe_values)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_values), "utf-8")
    with pytest.raises(ConfigError, match=expected) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["name: [", "just text", "", "- a\n- b"])
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigError):
        read_recipe(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_recipe(tmp_path / "none.yaml")


def test_defaults(recipe_file: Path) -> None:
    recipe = read_recipe(recipe_file)
    assert recipe.objective.name == "instruction_tuning" and recipe.objective.template_weight == 0
    assert recipe.output.default_strength == 1.0
    assert recipe.optimisation.weight_decay == 0.0
