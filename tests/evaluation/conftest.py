"""One tiny laboratory for all tests of evaluation."""

from __future__ import annotations

import pytest
from tiny_lab import Lab, make_lab
from transformers import PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory, tokenizers_by_family: dict[str, PreTrainedTokenizerBase]) -> Lab:
    return make_lab(tmp_path_factory.mktemp("lab"), tokenizers_by_family)
