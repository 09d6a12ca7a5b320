"""A tiny template LLM and a recipe for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_template import SUBJECTS, chat, make_template, write_jsonl


@pytest.fixture(scope="session")
def template_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One template LLM for all tests."""
    return make_template(tmp_path_factory.mktemp("template"))


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
def recipe_file(tmp_path: Path, recipe_values: dict[str, Any]) -> Path:
    """The same recipe as a file."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_values), "utf-8")
    return path
