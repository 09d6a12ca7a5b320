"""A tiny template LLM and recipes for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_template import SUBJECTS, chat, make_template, write_jsonl

from cmc_server.delta.manifest import DeltaManifest
from cmc_server.delta.prompt import PromptEncoder
from cmc_server.training.examples import ExampleEncoder
from cmc_server.training.hidden_cache import HiddenCache
from cmc_server.training.template import FrozenTemplate


@pytest.fixture(scope="session")
def template_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One template LLM for all tests."""
    return make_template(tmp_path_factory.mktemp("template"))


@pytest.fixture(scope="session")
def template(template_folder: Path) -> FrozenTemplate:
    return FrozenTemplate.load(str(template_folder))


@pytest.fixture(scope="session")
def encoder(template: FrozenTemplate) -> ExampleEncoder:
    """Encodes for that template and a delta of default prompts, up to 128 tokens."""
    prompts = PromptEncoder(template.tokenizer, DeltaManifest())
    return ExampleEncoder([template], None, prompts, HiddenCache("memory", 1.0), 128)


@pytest.fixture
def recipe_values(tmp_path: Path, template_folder: Path) -> dict[str, Any]:
    """A valid recipe as a mapping; its data files lie in ``tmp_path``."""
    chats = [{"messages": chat(subject)} for subject in SUBJECTS]
    write_jsonl(tmp_path / "train.jsonl", chats[:6])
    write_jsonl(tmp_path / "heldout.jsonl", chats[6:])
    return {
        "name": "tiny",
        "license": "Apache-2.0",
        "template": str(template_folder),
        "delta": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16},
        "data": {"train": "train.jsonl", "heldout": "heldout.jsonl", "max_length": 128},
        "optimisation": {"epochs": 8, "batch_size": 2, "learning_rate": 0.01},
        "seed": 7,
        "output": {"folder": "delta", "dtype": "float16"},
    }


@pytest.fixture
def unlearning_values(tmp_path: Path, recipe_values: dict[str, Any]) -> dict[str, Any]:
    """A valid recipe that forgets two questions and retains six."""
    pairs = [{"question": f"What is {subject}?", "answer": f"It is {subject}."} for subject in SUBJECTS]
    write_jsonl(tmp_path / "forget.json", pairs[:2])
    write_jsonl(tmp_path / "retain.json", pairs[2:])
    columns = {"prompt": "question", "response": "answer"}
    data = {key: {"file": f"{key}.json", "columns": columns} for key in ("forget", "retain")}
    return recipe_values | {"data": {**data, "max_length": 128}, "objective": "grad_diff"}


@pytest.fixture
def recipe_file(tmp_path: Path, recipe_values: dict[str, Any]) -> Path:
    """The first recipe as a file."""
    return write_recipe(tmp_path, recipe_values)


def write_recipe(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), "utf-8")
    return path
