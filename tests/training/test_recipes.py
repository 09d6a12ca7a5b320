"""A recipe is checked as a whole before anything runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cmc_server.errors import ConfigError
from cmc_server.training.recipes import read_recipe
from cmc_server.training.record import recipe_hash

Change = Callable[[dict[str, Any]], object]
VALUES: dict[str, Any] = {
    "name": "tiny",
    "template": "some/model",
    "data": {"train": "train.jsonl"},
    "delta": {"hidden_size": 16, "num_heads": 2},
    "optimisation": {"epochs": 8},
    "objective": {"name": "instruction_tuning"},
    "output": {"folder": "delta"},
}
UNLEARNING: dict[str, Any] = {
    "data": {"forget": "forget.jsonl", "retain": {"file": "retain.jsonl"}},
    "objective": {"name": "grad_diff", "retain_weight": 3.0},
}

MISTAKES: dict[str, tuple[Change, str]] = {
    "unknown key": (lambda v: v.update(epochs=3), r"line 14: epochs: Extra inputs"),
    "unknown nested key": (lambda v: v["data"].update(path="x"), r"line 5: data\.path: Extra"),
    "missing key": (lambda v: v.pop("template"), r"line 1: template: Field required"),
    "missing nested key": (lambda v: v.update(output={"dtype": "float32"}), r"line 12: output\.folder: Field required"),
    "wrong type": (lambda v: v["optimisation"].update(epochs="many"), r"line 9: optimisation\.epochs: "),
    "out of range": (lambda v: v["optimisation"].update(learning_rate=0), r"line 10: optimisation\.learning_rate"),
    "not a number": (lambda v: v["optimisation"].update(weight_decay=float("nan")), "weight_decay"),
    "objective": (lambda v: v.update(objective="magic"), r"line 10: objective: .*instruction_tuning.*grad_diff"),
    "option of another objective": (lambda v: v["objective"].update(beta=1), r"line 12: objective\.beta: Extra"),
    "option out of range": (
        lambda v: v["objective"].update(template_weight=1.0),
        r"line 12: objective\.template_weight: ",
    ),
    "name": (lambda v: v.update(name="a b"), "line 1: name: 'a b' cannot name a delta"),
    "heads": (lambda v: v["delta"].update(num_heads=3), "line 5: delta: .*multiple of 2"),
    "two starts": (lambda v: v["delta"].update(start_from="x"), "line 5: delta: start_from brings its own shape"),
    "type of the weights": (lambda v: v["output"].update(dtype="int8"), r"line 14: output\.dtype"),
    "empty folder": (lambda v: v["output"].update(folder=" "), r"line 13: output\.folder: must name a folder"),
    "advised range": (
        lambda v: v["output"].update(advised_range=[2, 1]),
        r"line 14: output\.advised_range: must be \[lowest, highest\]",
    ),
    "scheduler": (lambda v: v["optimisation"].update(lr_scheduler_type="magic"), "lr_scheduler_type.*cosine"),
    "precision": (lambda v: v["optimisation"].update(mixed_precision="int8"), "mixed_precision.*bf16"),
    "prompt template": (lambda v: v["output"].update(prompt_template="{% if"), r"output\.prompt_template: .*Jinja"),
    "no templates": (lambda v: v.update(template=[]), "line 2: template"),
    "two sources": (lambda v: v["data"].update(train={"file": "a", "dataset": "b"}), r"data\.train: give either"),
    "no source": (lambda v: v["data"].update(train={}), r"line 4: data\.train: give either file or dataset"),
    "split of a file": (
        lambda v: v["data"].update(train={"file": "a", "split": "train"}),
        r"line 6: data\.train\.split: belongs to a dataset",
    ),
    "nothing to learn": (
        lambda v: v.update(data={"max_length": 64}),
        "line 3: data: instruction_tuning needs data.train",
    ),
    "forget for tuning": (
        lambda v: v["data"].update(forget="x"),
        r"line 5: data\.forget: instruction_tuning reads data\.train",
    ),
    "retain for tuning": (lambda v: v["data"].update(retain="x"), r"line 5: data\.retain: .*no retain term"),
    "no retain": (
        lambda v: v.update(data={"forget": "x"}, objective="grad_diff"),
        r"line 3: data: grad_diff needs data\.retain",
    ),
    "weight without retain": (
        lambda v: v.update(data={"forget": "x"}, objective={"name": "npo", "retain_weight": 1}),
        r"objective\.retain_weight: needs data\.retain",
    ),
    "held out for unlearning": (
        lambda v: v.update(data=UNLEARNING["data"] | {"heldout": "x"}, objective="grad_diff"),
        r"data\.heldout: is for objectives that read data\.train",
    ),
    "two sources of pairs": (
        lambda v: v.update(data={"train": "x", "forget": "y"}, objective="dpo"),
        r"data: dpo needs data\.train or else data\.forget",
    ),
    "templates and a tuned LLM": (
        lambda v: v.update(template=["a", "b"], objective={"name": "logit_shift", "tuned": "c"}),
        "line 2: template: logit_shift takes one",
    ),
    "checkpoints": (lambda v: v.update(checkpoint={"save_steps": 0}), r"line 15: checkpoint\.save_steps"),
    "cache folder in memory": (
        lambda v: v["data"].update(cache_folder="x"),
        r"line 5: data\.cache_folder: is for cache: disk",
    ),
    "budget of no cache": (
        lambda v: v["data"].update(cache="none", cache_budget_gib=1),
        r"line 6: data\.cache_budget_gib: has no use",
    ),
    "steps of epochs": (
        lambda v: v.update(checkpoint={"save_steps": 5}),
        r"line 15: checkpoint\.save_steps: is for save_strategy: steps",
    ),
    "number of none": (
        lambda v: v.update(checkpoint={"save_strategy": "no", "save_total_limit": 2}),
        r"line 16: checkpoint\.save_total_limit: has no use",
    ),
    "refusals beside pairs": (
        lambda v: v.update(objective={"name": "dpo", "refusals": ["No."]}),
        r"objective\.refusals: is for data\.forget",
    ),
    "columns of pairs": (
        lambda v: v["data"].update(train={"file": "x", "columns": {"chosen": "a"}}),
        r"data\.train\.columns\.chosen: is for the pairs of dpo",
    ),
    "size": (lambda v: v["delta"].update(hidden_size=10**9), r"delta\.hidden_size: .*less than or equal"),
    "empty prompt template": (
        lambda v: v["output"].update(prompt_template=""),
        r"output\.prompt_template: .*at least 1",
    ),
    "cache": (lambda v: v["data"].update(cache="tape"), r"line 5: data\.cache: "),
}


def values_with(change: Change) -> dict[str, Any]:
    values = copy.deepcopy(VALUES)
    change(values)
    return values


def write(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), "utf-8")
    return path


@pytest.mark.parametrize(("change", "expected"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named_by_line_and_key(tmp_path: Path, change: Change, expected: str) -> None:
    path = write(tmp_path, values_with(change))
    with pytest.raises(ConfigError, match=expected) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["name: [", "just text", "", "- a\n- b", "name: a\nname: b", "? [a]\n: b"])
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigError) as caught:
        read_recipe(path)
    assert "\n" not in str(caught.value)


def test_a_key_that_is_given_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: a\ndata:\n  train: a\n  train: b\n", "utf-8")
    with pytest.raises(ConfigError, match="line 4: train: is given twice"):
        read_recipe(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_recipe(tmp_path / "none.yaml")


def test_defaults(recipe_file: Path) -> None:
    recipe = read_recipe(recipe_file)
    assert recipe.objective.name == "instruction_tuning" and recipe.objective.template_weight == 0
    assert recipe.output.default_strength == 1.0
    assert recipe.optimisation.weight_decay == 0.0
    assert recipe.optimisation.lr_scheduler_type == "cosine" and recipe.optimisation.mixed_precision == "no"
    assert recipe.data.cache == "memory" and recipe.main == "train"


def test_unlearning(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, VALUES | UNLEARNING))
    assert recipe.main == "forget" and recipe.objective.name == "grad_diff"
    assert recipe.objective.retain_weight == 3.0 and recipe.objective.forget_bound == 8.0
    assert set(recipe.data.sources) == {"forget", "retain"}


def test_a_bare_no_means_no(tmp_path: Path) -> None:
    path = write(tmp_path, VALUES)
    path.write_text(path.read_text("utf-8") + "checkpoint:\n  save_strategy: no\n", "utf-8")
    text = path.read_text("utf-8").replace("  epochs: 8\n", "  epochs: 8\n  mixed_precision: no\n")
    path.write_text(text, "utf-8")
    recipe = read_recipe(path)
    assert recipe.checkpoint.save_strategy == "no" and recipe.optimisation.mixed_precision == "no"


def test_what_a_recipe_does_not_set_is_not_hashed(tmp_path: Path) -> None:
    """One way or the other of writing the same recipe gives the same hash, and so do options that came later."""
    whole = read_recipe(write(tmp_path, VALUES))
    short = read_recipe(write(tmp_path, VALUES | {"objective": "instruction_tuning"}))
    file = read_recipe(write(tmp_path, VALUES | {"data": {"train": {"file": "train.jsonl"}}}))
    assert recipe_hash(whole) == recipe_hash(short) == recipe_hash(file)
    pulled = VALUES | {"objective": {"name": "instruction_tuning", "template_weight": 0.3}}
    assert recipe_hash(read_recipe(write(tmp_path, pulled))) != recipe_hash(whole)
    assert short.model_dump(mode="json", exclude_unset=True)["objective"] == "instruction_tuning"
    assert short.model_dump(mode="json", exclude_unset=True)["data"] == {"train": "train.jsonl"}


def test_an_anchor_within_itself(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: x\ndata: &data\n  train: *data\n", "utf-8")
    with pytest.raises(ConfigError, match="nested without end"):
        read_recipe(tmp_path / "recipe.yaml")
