"""Tiny deltas for the API's tests."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path

import pytest
from tiny_models import make_delta, make_tokenizer

from cmc_server.delta.manifest import DeltaManifest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch warns of its own past while vLLM is imported
    importlib.import_module("vllm.entrypoints.cli.serve")


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tokenizer trained on the fly."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_delta(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """A delta with that tokenizer and no manifest."""
    return make_delta(tmp_path_factory.mktemp("tiny"), tiny_tokenizer)


@pytest.fixture(scope="session")
def picky_delta(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """A delta whose manifest says something about everything, and whose template refuses some messages."""
    manifest = DeltaManifest(
        description="A delta for tests.",
        default_strength=0.5,
        advised_range=(0.0, 2.0),
        unmapped="preserve",
        context_length=64,
        prompt_template="{% for message in messages %}{{ message.content }}|{% endfor %}"
        "{{ 1 // (messages | length - 3) and '' }}",
    )
    return make_delta(tmp_path_factory.mktemp("picky"), tiny_tokenizer, seed=1, manifest=manifest)
