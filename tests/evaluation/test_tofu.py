"""TOFU's metrics by hand, and its files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from cmc_server.errors import ConfigError
from cmc_server.evaluation.tofu import (
    ItemLosses,
    SetScores,
    forget_quality,
    item_probability,
    model_utility,
    set_summary,
    truth_ratio_arithmetic,
    truth_ratio_geometric,
    truth_score,
)
from cmc_server.evaluation.tofu_data import PACKAGED_TOFU, read_tofu

# P(answer) = 1/2, P(paraphrase) = 1/4, P(perturbed) = 1/8 and 1/32.
LOSSES = ItemLosses(math.log(2), math.log(4), (math.log(8), math.log(32)))


def scores(name: str, ratios: list[float], probability: float = 0.5, rouge: float = 0.5) -> SetScores:
    size = len(ratios)
    return SetScores(name, "q", [probability] * size, [rouge] * size, ratios, [ratio + 0.125 for ratio in ratios])


def test_probability() -> None:
    assert item_probability("forget", LOSSES) == pytest.approx(1 / 2)
    assert item_probability("retain", LOSSES) == pytest.approx(1 / 2)
    # 1/2 over 1/2 + 1/8 + 1/32
    assert item_probability("real_authors", LOSSES) == pytest.approx(16 / 21)
    assert item_probability("world_facts", LOSSES) == pytest.approx(16 / 21)


def test_truth_ratios() -> None:
    # Geometric mean of 1/8 and 1/32 is 1/16; arithmetic 5/64; both over 1/4.
    assert truth_ratio_geometric(LOSSES) == pytest.approx(1 / 4)
    assert truth_ratio_arithmetic(LOSSES) == pytest.approx(5 / 16)


def test_hopeless_losses_stay_finite() -> None:
    lost = ItemLosses(5000.0, 5000.0, (0.0, 1.0))
    assert math.isfinite(truth_ratio_geometric(lost)) and math.isfinite(truth_ratio_arithmetic(lost))
    assert item_probability("forget", lost) == 0
    assert item_probability("world_facts", lost) == pytest.approx(0)
    assert truth_score(truth_ratio_geometric(lost), forgotten=True) == pytest.approx(0)


def test_truth_scores() -> None:
    assert [truth_score(ratio, forgotten=False) for ratio in (0, 0.25, 1, 4)] == [1, 0.75, 0, 0]
    assert [truth_score(ratio, forgotten=True) for ratio in (0, 0.25, 1, 4)] == [0, 0.25, 1, 0.25]


def test_model_utility_is_the_harmonic_mean_of_nine() -> None:
    # Probability 0.5, ROUGE 0.5 and truth score 1 - 0.5 = 0.5 in all sets but one with ROUGE 0.25.
    sets = {name: scores(name, [0.5, 0.5]) for name in ("forget", "retain", "real_authors")}
    sets["world_facts"] = scores("world_facts", [0.5, 0.5], rouge=0.25)
    utility = model_utility(sets, "truth_ratio_geometric")
    assert utility.mean == utility.low == utility.high == pytest.approx(9 / (8 / 0.5 + 1 / 0.25))
    # Arithmetic ratios here are 0.625, so the three truth scores are 0.375.
    assert model_utility(sets, "truth_ratio_arithmetic").mean == pytest.approx(9 / (5 / 0.5 + 3 / 0.375 + 1 / 0.25))


def test_one_figure_of_zero_makes_the_utility_zero() -> None:
    sets = {name: scores(name, [0.5]) for name in ("retain", "real_authors")}
    sets["world_facts"] = scores("world_facts", [2.0])
    assert model_utility(sets, "truth_ratio_geometric").mean == 0


def test_summaries_know_which_set_they_are_of() -> None:
    assert set_summary(scores("forget", [4.0, 0.25]))["score_truth_ratio_geometric"].mean == 0.25
    assert set_summary(scores("retain", [4.0, 0.25]))["score_truth_ratio_geometric"].mean == 0.375


def test_forget_quality() -> None:
    unlearned, retain_only = scores("forget", [0.1, 0.2, 0.3]), scores("forget", [0.4, 0.5, 0.6])
    quality = forget_quality(unlearned, retain_only)
    assert set(quality) == {"truth_ratio_geometric", "truth_ratio_arithmetic"}
    assert quality["truth_ratio_geometric"].p_value == pytest.approx(0.1)


def test_forget_quality_refuses_itself_and_other_questions() -> None:
    one = scores("forget", [0.1, 0.2])
    with pytest.raises(ConfigError, match="comparing a run with itself"):
        forget_quality(one, scores("forget", [0.1, 0.2]))
    other = SetScores("forget", "other questions", [0.1], [0.1], [0.1], [0.1])
    with pytest.raises(ConfigError, match="other questions"):
        forget_quality(one, other)


def test_the_packaged_part() -> None:
    sets = read_tofu()
    assert {name: len(items) for name, items in sets.items()} == {
        "forget": 40,
        "retain": 160,
        "real_authors": 100,
        "world_facts": 117,
    }
    assert {len(item.perturbed) for name in ("forget", "retain") for item in sets[name]} == {5}
    assert {len(item.perturbed) for name in ("real_authors", "world_facts") for item in sets[name]} == {3}
    assert sets["forget"][1].paraphrase == "Author Basil Mahfouz Al-Kuwaiti identifies as a man."
    assert sets["world_facts"][0].paraphrase == sets["world_facts"][0].answer == "Paris"
    assert len(read_tofu(limit=3)["retain"]) == 3
    assert "MIT License" in (PACKAGED_TOFU / "LICENSE").read_text("utf-8")


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"question": "a"}', json.dumps({"question": "a", "answer": "b", "perturbed_answer": []})]
)
def test_broken_records_are_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "forget01_perturbed.json").write_text(
        json.dumps({"question": "a", "answer": "b", "perturbed_answer": ["c"]}) + "\n" + line + "\n", "utf-8"
    )
    with pytest.raises(ConfigError, match=r"forget01_perturbed.json, line 2"):
        read_tofu(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"forget10_perturbed.json does not exist"):
        read_tofu(tmp_path, "forget10")
