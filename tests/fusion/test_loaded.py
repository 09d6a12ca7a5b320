"""What deltas of one vocabulary have in common is made once, in a worker and in an API process."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch
from tiny_models import make_delta, make_tokenizer

from cmc_server.api.words import delta_words
from cmc_server.config import DeltaSource, EngineSettings
from cmc_server.delta.store import DeltaArtifact, open_delta
from cmc_server.delta.turns import short_turns
from cmc_server.fusion.loaded import DeltaLoader
from cmc_server.vocab.surface import load_vocabulary


def artifacts(folder: Path) -> tuple[DeltaArtifact, DeltaArtifact, DeltaArtifact]:
    """Two of one vocabulary and one of another."""
    one, other = make_tokenizer(folder / "one"), make_tokenizer(folder / "other", vocab_size=300)
    made = [make_delta(folder / f"d{seed}", of, seed=seed) for seed, of in enumerate((one, one, other))]
    first, second, third = (open_delta(DeltaSource(name=path.name, path=str(path))) for path in made)
    return first, second, third


def test_words_of_a_worker(tmp_path: Path) -> None:
    first, second, third = artifacts(tmp_path)
    settings = EngineSettings(cache_dir=str(tmp_path), min_coverage=0)
    loader = DeltaLoader(load_vocabulary(str(first.path)), settings, max_seqs=2, device=torch.device("cpu"))
    one, two, three = loader.load(first), loader.load(second), loader.load(third)
    assert one.words is two.words is not three.words
    assert one.speller.spell([40, 41]) == [40, 41] and one.vocab_map.is_identity and not three.vocab_map.is_identity
    del three
    gc.collect()
    assert len(loader._words) == 1


def test_words_are_kept_where_asked(tmp_path: Path) -> None:
    first, second, third = artifacts(tmp_path)
    settings = EngineSettings(cache_dir=str(tmp_path), min_coverage=0)
    loader = DeltaLoader(load_vocabulary(str(first.path)), settings, max_seqs=2, device=torch.device("cpu"))
    loader.keep_words(first)
    gc.collect()
    (kept,) = loader._words.values()
    assert loader.load(second).words is kept is not loader.load(third).words


def test_words_of_an_api_process(tmp_path: Path) -> None:
    first, second, third = artifacts(tmp_path)
    one, two, three = delta_words(first), delta_words(second), delta_words(third)
    assert one is two is not three
    assert one.vocabulary.fingerprint == load_vocabulary(str(second.path)).fingerprint != three.vocabulary.fingerprint


def test_turns_are_short_for_a_while() -> None:
    before = sys.getswitchinterval()
    with short_turns():
        assert sys.getswitchinterval() < before / 10
    assert sys.getswitchinterval() == before
