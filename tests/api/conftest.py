"""Tiny deltas for the API's tests."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from tiny_models import make_delta, make_tokenizer

from cmc_server.delta.manifest import DeltaManifest
from cmc_server.delta.store import content_version

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch warns of its own past while vLLM is imported
    importlib.import_module("vllm.entrypoints.cli.serve")
    from plugin_app import HEADERS, Engine, start


@pytest.fixture(autouse=True)
def own_loggers() -> Iterator[None]:
    """The plugin gives our loggers vLLM's handlers; other tests want them as they were."""
    root, access = logging.getLogger("cmc_server"), logging.getLogger("cmc_server.access")
    before = (root.handlers, root.level, root.propagate)
    before_access = (access.handlers, access.disabled, access.propagate)
    yield
    root.handlers, root.level, root.propagate = before
    access.handlers, access.disabled, access.propagate = before_access


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


@pytest.fixture(scope="session")
def deltas(tiny_delta: Path, picky_delta: Path) -> dict[str, Path]:
    return {"tiny": tiny_delta, "picky": picky_delta}


@pytest.fixture(scope="session")
def versions(deltas: dict[str, Path]) -> dict[str, str]:
    return {name: content_version(folder) for name, folder in deltas.items()}


@pytest.fixture
def rank(versions: dict[str, str]) -> dict[str, Any]:
    """A worker's report."""
    details = {"num_parameters": 1, "memory_bytes": 2, "dtype": "float32", "coverage": 1.0, "match": {"exact": 3}}
    reports = [{"name": name, "version": version, **details} for name, version in versions.items()]
    return {"processor": True, "runner": "v1", "max_delta_seqs": 8, "deltas": reports}


@pytest.fixture
def engine(rank: dict[str, Any]) -> Engine:
    return Engine([rank])


@pytest.fixture
def client(engine: Engine, deltas: dict[str, Path]) -> Iterator[TestClient]:
    app = start(engine, deltas)
    with TestClient(app, headers=HEADERS, raise_server_exceptions=False) as client:
        yield client
