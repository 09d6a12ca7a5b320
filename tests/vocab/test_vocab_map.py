from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from cmc_server.errors import MapError
from cmc_server.vocab import vocab_map
from cmc_server.vocab.pm_mined import MatchKind
from cmc_server.vocab.surface import Vocabulary
from cmc_server.vocab.vocab_map import VocabularyMap, build_map, cached_map, default_cache_dir

MakeVocabulary = Callable[..., Vocabulary]


@pytest.fixture
def pair(make_vocabulary: MakeVocabulary) -> tuple[Vocabulary, Vocabulary]:
    user = make_vocabulary(["<bos>", "<x>", "cat", None, "cats", "ca", "z"], special=["<x>"], bos="<bos>")
    return user, make_vocabulary(["<s>", "cat", "catalog", "d"], bos="<s>")


def test_build(pair: tuple[Vocabulary, Vocabulary]) -> None:
    built = build_map(*pair)
    assert built.delta_ids.tolist() == [0, -1, 1, -1, 1, 1, -1]
    assert built.match.tolist() == [4, 0, 1, 0, 2, 3, 0]
    kinds = {"none": 3, "exact": 1, "prefix": 1, "extension": 1, "special": 1}
    assert built.counts == kinds | {"ordinary": 4, "ordinary_mapped": 3}
    assert built.coverage == 0.75
    assert not built.is_identity
    assert (built.user_fingerprint, built.delta_fingerprint) == (pair[0].fingerprint, pair[1].fingerprint)
    with pytest.raises(ValueError, match="read-only"):
        built.delta_ids[0] = 1


def test_equal_fingerprints_give_the_identity(make_vocabulary: MakeVocabulary) -> None:
    # Two tokens of one surface and a hole: only the fingerprint says that each stands for itself.
    contents = ["<s>", "a", "a2", None, "</s>"]
    user = replace(make_vocabulary(contents, bos="<s>", eos=["</s>"]), surfaces=(None, b"a", b"a", None, None))
    built = build_map(user, replace(user, eos_ids=()))
    assert built.delta_ids.tolist() == [0, 1, 2, 3, 4]
    assert built.match.tolist() == [4, 1, 1, 1, 4]
    assert built.is_identity
    assert built.coverage == 1.0
    overridden = build_map(user, user, {"</s>": "<s>"})
    assert overridden.delta_ids.tolist() == [0, 1, 2, 3, 0]
    assert not overridden.is_identity


def test_overrides_win(pair: tuple[Vocabulary, Vocabulary]) -> None:
    built = build_map(*pair, {"<bos>": None, "<x>": "d", "cats": "catalog"})
    assert built.delta_ids.tolist() == [-1, 3, 1, -1, 2, 1, -1]
    assert built.match.tolist() == [0, 4, 1, 0, 4, 3, 0]
    with pytest.raises(MapError, match="<y>"):
        build_map(*pair, {"<y>": None})


def test_no_ordinary_tokens_is_no_coverage(make_vocabulary: MakeVocabulary) -> None:
    assert build_map(make_vocabulary(["<s>"], bos="<s>"), make_vocabulary(["a"])).coverage == 0.0


def test_file(pair: tuple[Vocabulary, Vocabulary], tmp_path: Path) -> None:
    built = build_map(*pair)
    path = tmp_path / "new" / "map.safetensors"
    built.save(path)
    loaded = VocabularyMap.load(path)
    np.testing.assert_array_equal(loaded.delta_ids, built.delta_ids)
    np.testing.assert_array_equal(loaded.match, built.match)
    assert loaded.counts == built.counts
    assert loaded.user_fingerprint == built.user_fingerprint
    with safe_open(path, framework="numpy") as tensors:
        assert set(tensors.keys()) == {"delta_ids", "match"}
        assert tensors.get_tensor("delta_ids").dtype == np.int32
        assert tensors.get_tensor("match").dtype == np.uint8
        keys = {"format", "user_fingerprint", "delta_fingerprint", "algorithm_version", "counts", "digest"}
        assert set(tensors.metadata()) == keys
    assert [entry.name for entry in path.parent.iterdir()] == ["map.safetensors"]


def test_files_that_are_not_maps(pair: tuple[Vocabulary, Vocabulary], tmp_path: Path) -> None:
    with pytest.raises(MapError, match="does not exist"):
        VocabularyMap.load(tmp_path / "none")
    path = tmp_path / "map.safetensors"
    save_file({"delta_ids": np.zeros(1, np.int32)}, path)
    with pytest.raises(MapError, match="not a vocabulary map"):
        VocabularyMap.load(path)
    metadata = {"format": "cmc-server vocabulary map", "user_fingerprint": "a"}
    save_file({"delta_ids": np.zeros(1, np.int32), "match": np.ones(1, np.uint8)}, path, metadata)
    with pytest.raises(MapError, match="corrupt"):
        VocabularyMap.load(path)
    build_map(*pair).save(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(MapError, match="corrupt"):
        VocabularyMap.load(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(MapError, match="cannot be written"):
        build_map(*pair).save(tmp_path / "file" / "map.safetensors")


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (np.zeros(2, np.int32), np.ones(3, np.uint8)),
        (np.zeros(2, np.int64), np.ones(2, np.uint8)),
        (np.full(2, -2, np.int32), np.ones(2, np.uint8)),
        (np.zeros(2, np.int32), np.full(2, 5, np.uint8)),
        (np.full(2, -1, np.int32), np.ones(2, np.uint8)),
        (np.zeros(2, np.int32), np.zeros(2, np.uint8)),
    ],
)
def test_impossible_maps(ids: Any, match: Any) -> None:
    with pytest.raises(MapError):
        VocabularyMap(ids, match, "a", "b", 1, {})


def test_the_cache_is_used(pair: tuple[Vocabulary, Vocabulary], tmp_path: Path) -> None:
    first = cached_map(*pair, cache_dir=tmp_path)
    [path] = tmp_path.iterdir()
    marked = VocabularyMap(
        first.delta_ids, first.match, first.user_fingerprint, first.delta_fingerprint, 1, {"mark": 1}
    )
    marked.save(path)
    assert cached_map(*pair, cache_dir=tmp_path).counts == {"mark": 1}


def test_the_cache_tells_overrides_roles_and_versions_apart(
    pair: tuple[Vocabulary, Vocabulary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user, delta = pair
    plain = cached_map(user, delta, cache_dir=tmp_path)
    overridden = cached_map(user, delta, {"<x>": "d"}, tmp_path)
    without_bos = cached_map(replace(user, bos_id=None), delta, cache_dir=tmp_path)
    assert len({tuple(found.delta_ids) for found in (plain, overridden, without_bos)}) == 3
    monkeypatch.setattr(vocab_map, "ALGORITHM_VERSION", 2)
    assert cached_map(user, delta, cache_dir=tmp_path).algorithm_version == 2
    assert len(list(tmp_path.iterdir())) == 4


def test_a_cache_that_cannot_be_reached_is_done_without(
    pair: tuple[Vocabulary, Vocabulary], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = cached_map(*pair, cache_dir=tmp_path / ("x" * 300))
    assert (found.delta_ids == build_map(*pair).delta_ids).all()
    assert "Continuing without caching" in caplog.text


def damage_quietly(path: Path, damage: str) -> None:
    """Change one thing, so that what is left is still a map of these vocabularies."""
    with safe_open(path, framework="numpy") as tensors:
        metadata = tensors.metadata()
        arrays = {name: tensors.get_tensor(name) for name in ("delta_ids", "match")}
    if damage == "one token":
        arrays["delta_ids"][2] = 3
    elif damage == "a count":
        metadata["counts"] = metadata["counts"].replace('"ordinary_mapped": ', '"ordinary_mapped": 1')
    else:
        del metadata["digest"]
    path.unlink()
    save_file(arrays, path, metadata)


@pytest.mark.parametrize("damage", ["cut", "other", "one token", "a count", "no digest"])
def test_a_damaged_cache_is_rebuilt_with_a_warning(
    damage: str, pair: tuple[Vocabulary, Vocabulary], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    user, delta = pair
    built = cached_map(user, delta, cache_dir=tmp_path)
    [path] = tmp_path.iterdir()
    if damage == "cut":
        path.write_bytes(b"nonsense")
    elif damage == "other":
        build_map(delta, user).save(path)
    else:
        damage_quietly(path, damage)
    with caplog.at_level(logging.WARNING):
        again = cached_map(user, delta, cache_dir=tmp_path)
    assert "Rebuilding" in caplog.text
    np.testing.assert_array_equal(again.delta_ids, built.delta_ids)
    np.testing.assert_array_equal(VocabularyMap.load(path).delta_ids, built.delta_ids)


def test_a_cache_that_cannot_be_written_is_done_without(
    pair: tuple[Vocabulary, Vocabulary], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert cached_map(*pair, cache_dir=tmp_path / "file" / "maps").counts["exact"] == 1
    assert "without caching" in caplog.text


def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CMC_SERVER_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path / "maps"
    monkeypatch.delenv("CMC_SERVER_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "cmc-server" / "maps"


def _fill(arguments: tuple[Vocabulary, Vocabulary, Path]) -> list[int]:
    user, delta, folder = arguments
    found: list[int] = cached_map(user, delta, cache_dir=folder).delta_ids.tolist()
    return found


def test_several_processes_share_a_cache(pair: tuple[Vocabulary, Vocabulary], tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        results = pool.map(_fill, [(*pair, tmp_path)] * 16)
    assert all(result == build_map(*pair).delta_ids.tolist() for result in results)
    assert len(list(tmp_path.iterdir())) == 1


def test_demo_models(demo_vocabularies: tuple[Vocabulary, Vocabulary]) -> None:
    gemma3, smollm2 = demo_vocabularies
    built = build_map(gemma3, smollm2)
    assert built.delta_ids.shape == (gemma3.size,) == (262_144,)
    assert built.coverage > 0.6
    for content, expected, kind in [
        ("▁the", "Ġthe", MatchKind.EXACT),
        ("\n\n", "ĊĊ", MatchKind.EXACT),
        ("<0x41>", "A", MatchKind.EXACT),
        ("<bos>", "<|im_start|>", MatchKind.SPECIAL),
    ]:
        token = gemma3.ids_by_content[content]
        assert smollm2.contents[built.delta_ids[token]] == expected
        assert built.match[token] == kind
    for vocabulary in demo_vocabularies:
        assert build_map(vocabulary, vocabulary).is_identity
