"""ROUGE-L recall against a longest common subsequence written here, on words that stemming does not change."""

from __future__ import annotations

import random

import pytest

from cmc_server.errors import ConfigError
from cmc_server.evaluation import rouge
from cmc_server.evaluation.rouge import rouge_l_recall

WORDS = ("cat", "dog", "sun", "map", "red", "ten")


def recall(reference: list[str], answer: list[str]) -> float:
    """Longest common subsequence by trying every choice, over the reference's length."""

    def longest(i: int, j: int) -> int:
        if i == len(reference) or j == len(answer):
            return 0
        if reference[i] == answer[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    return longest(0, 0) / len(reference)


def test_against_every_choice() -> None:
    pytest.importorskip("rouge_score")
    draw = random.Random(0)
    for _ in range(50):
        reference = draw.choices(WORDS, k=draw.randint(1, 7))
        answer = draw.choices(WORDS, k=draw.randint(1, 7))
        assert rouge_l_recall([" ".join(reference)], [" ".join(answer)]) == pytest.approx([recall(reference, answer)])


def test_stems_case_and_punctuation() -> None:
    pytest.importorskip("rouge_score")
    assert rouge_l_recall(["He was running, fast!"], ["he was runs fast"]) == [1.0]
    assert rouge_l_recall(["Paris"], [""]) == [0.0]


def test_the_package_is_asked_for_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rouge.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install rouge-score"):
        rouge_l_recall(["a"], ["a"])
