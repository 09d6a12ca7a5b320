from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from cmc_server.errors import MapError
from cmc_server.vocab.command import run_map
from cmc_server.vocab.vocab_map import VocabularyMap


@pytest.fixture
def folders(tokenizers_by_family: dict[str, PreTrainedTokenizerBase], tmp_path: Path) -> tuple[str, str]:
    paths = [tmp_path / name for name in ("byte_level_bpe", "sentencepiece_bpe")]
    for path in paths:
        tokenizers_by_family[path.name].save_pretrained(path)
    return str(paths[0]), str(paths[1])


def test_json(folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, sample, overrides = tmp_path / "map.safetensors", tmp_path / "sample.txt", tmp_path / "overrides.yaml"
    sample.write_text("The quick brown fox 你好", encoding="utf-8")
    overrides.write_text("<|endoftext|>: null\n")
    assert run_map(*folders, output, overrides, sample, True) == 0
    report = json.loads(capsys.readouterr().out)
    built = VocabularyMap.load(output)
    assert report["match"]["exact"] == built.counts["exact"] > 0
    assert report["coverage"] == built.coverage
    assert report["user_fingerprint"] == built.user_fingerprint
    assert report["special"]["<|endoftext|>"] is None
    assert report["special"]["<|im_end|>"] == "</s>"
    assert report["sample"]["occurrences"] > 0


def test_tables(folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = tmp_path / "sample.txt"
    sample.write_text("The quick brown fox 你好", encoding="utf-8")
    assert run_map(*folders, tmp_path / "m", None, sample, False) == 0
    text = capsys.readouterr().out
    for expected in ("coverage of the ordinary tokens: ", "Latin", '"<|im_end|>" -> "</s>"', "most frequent unmapped"):
        assert expected in text
    assert run_map(folders[0], folders[0], None, None, None, False) == 0
    assert "the same tokenizer on both sides" in capsys.readouterr().out


def test_bad_input(folders: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes(b"\xe9")
    with pytest.raises(MapError, match="sample text"):
        run_map(*folders, None, None, tmp_path / "latin1.txt", True)
    with pytest.raises(MapError, match="overrides file"):
        run_map(*folders, None, tmp_path / "none.yaml", None, True)
    with pytest.raises(MapError, match="does not exist"):
        run_map(folders[0], str(tmp_path / "none"), None, None, None, True)
    with pytest.raises(MapError, match="cannot be written"):
        run_map(*folders, tmp_path / "latin1.txt" / "map", None, None, True)
