"""ROUGE-L recall with stemming (Lin 2004), by the package rouge-score, TOFU's own choice."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence

from cmc_server.errors import ConfigError


def require_rouge() -> None:
    """Check that the package is there, before anything slow begins.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("rouge_score") is None:
        raise ConfigError("TOFU's ROUGE-L needs the package rouge-score; run: pip install rouge-score.")


def rouge_l_recall(references: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Longest common subsequence of the stemmed words, over the number of words in the reference.

    Args:
        references: the right answers.
        answers: what the model said, one each.

    Returns:
        One value each, 0 to 1.

    Raises:
        ConfigError: the package rouge-score is not installed.
    """
    require_rouge()
    # Imported by name: the package brings no types, and is not needed for anything else.
    scorer = importlib.import_module("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    return [
        float(scorer.score(reference, answer)["rougeL"].recall)
        for reference, answer in zip(references, answers, strict=True)
    ]
