from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from cmc_server.vocab.scripts import script_of
from cmc_server.vocab.stats import map_statistics
from cmc_server.vocab.surface import Vocabulary
from cmc_server.vocab.vocab_map import build_map


@pytest.mark.parametrize(
    ("surface", "script"),
    [
        (" the", "Latin"),
        ("ﬁ", "Latin"),
        ("Ａ", "Latin"),
        ("你好", "Han"),
        ("々", "Han"),
        ("Привет", "Cyrillic"),
        ("ب", "Arabic"),
        ("λ", "Greek"),
        ("ひ", "Hiragana"),
        ("ｶ", "Katakana"),
        ("한", "Hangul"),
        ("ि", "Devanagari"),
        ("12a", "Latin"),
        ("ª", "Other letters"),
        (" 12.", "Digits"),
        ("\n\t", "Whitespace"),
        ("", "Whitespace"),
        (" ->", "Punctuation and symbols"),
        ("😀", "Punctuation and symbols"),
        (b"\xe4\xbd", "Partial characters"),
        (b" \xe4", "Partial characters"),
    ],
)
def test_script_of(surface: str | bytes, script: str) -> None:
    assert script_of(surface.encode() if isinstance(surface, str) else surface) == script


def test_statistics(make_vocabulary: Callable[..., Vocabulary]) -> None:
    contents = ["<s>", "</s>", "<x>", "cat", "cats", "你", "дом", None, "1"]
    user = make_vocabulary(contents, special=["<x>"], bos="<s>", eos=["</s>"])
    delta = make_vocabulary(["<b>", "cat", "д"], bos="<b>")
    statistics = map_statistics(build_map(user, delta), user, delta, [3, 3, 3, 4, 5, 0])
    assert json.loads(json.dumps(statistics)) == statistics
    assert statistics["coverage"] == 3 / 5
    assert statistics["ordinary"] == 5
    assert statistics["match"] == {"none": 5, "exact": 1, "prefix": 2, "extension": 0, "special": 1}
    assert list(statistics["scripts"]) == ["Latin", "Cyrillic", "Digits", "Han"]
    kinds = {"none": 0, "exact": 1, "prefix": 1, "extension": 0, "special": 0}
    assert statistics["scripts"]["Latin"] == {"tokens": 2, "coverage": 1.0, **kinds}
    assert statistics["scripts"]["Han"]["coverage"] == 0.0
    assert statistics["special"] == {"<s>": "<b>", "</s>": None}
    sample = statistics["sample"]
    assert (sample["tokens"], sample["occurrences"], sample["coverage"]) == (4, 6, 5 / 6)
    assert (sample["exact"], sample["prefix"], sample["none"], sample["special"]) == (3, 1, 1, 1)
    assert [band["ranks"] for band in sample["bands"]] == [[1, 4]]
    assert sample["most_frequent_unmapped"] == {"你": 1}
    assert sample["most_frequent_inexact"] == {"cats": 1}


def test_bands_and_an_empty_sample(make_vocabulary: Callable[..., Vocabulary]) -> None:
    user = make_vocabulary([str(token) for token in range(150)])
    delta = make_vocabulary(["1"])
    built = build_map(user, delta)
    bands = map_statistics(built, user, delta, range(150))["sample"]["bands"]
    assert [(band["ranks"], band["tokens"]) for band in bands] == [([1, 100], 100), ([101, 150], 50)]
    empty = map_statistics(built, user, delta, [])["sample"]
    assert (empty["occurrences"], empty["coverage"], empty["bands"]) == (0, 0.0, [])
    assert "sample" not in map_statistics(built, user, delta)
