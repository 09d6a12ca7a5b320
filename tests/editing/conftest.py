"""A tiny model before and after a training that never happened, and data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_checkpoints import rewrite, trained
from tiny_models import make_delta, make_tokenizer


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base`` and ``post``, bfloat16, and ``float``, a float32 copy of the base; not to be changed."""
    root = tmp_path_factory.mktemp("editing")
    tokenizer = make_tokenizer(root / "tokenizer")
    make_delta(root / "float", tokenizer)
    shutil.copytree(root / "float", root / "base")
    rewrite(root / "base", lambda weights: {name: tensor.bfloat16() for name, tensor in weights.items()})
    shutil.copytree(root / "base", root / "post")
    rewrite(root / "post", trained)
    return root


@pytest.fixture
def base(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "base", tmp_path / "base"))


@pytest.fixture
def post(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "post", tmp_path / "post"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A few texts of both kinds."""
    records = [
        {"prompt": "Say it in one sentence.", "response": " The fox jumps."},
        {"text": "The quick brown fox jumps over the lazy dog."},
        {"text": "One sentence over the dog."},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path
