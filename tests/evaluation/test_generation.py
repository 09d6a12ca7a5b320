"""Sweeps over strengths: figures by hand, table and picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmc_server.evaluation.bootstrap import bootstrap_mean
from cmc_server.evaluation.generation import (
    Answer,
    falls_steadily,
    markdown_table,
    plot_sweep,
    summarise_sweep,
)


def answers(lengths: list[int], limit: int = 80) -> list[Answer]:
    return [Answer("x" * length, length, ended=length < limit) for length in lengths]


SWEEP = {1.0: answers([10, 20, 30]), 0.0: answers([80, 80, 50]), 0.5: answers([80, 30, 40])}


def test_results_are_by_rising_strength_and_paired_by_prompt() -> None:
    base, half, full = summarise_sweep(SWEEP)
    assert [base.strength, half.strength, full.strength] == [0.0, 0.5, 1.0]
    assert base.length.mean == 70 and half.length.mean == 50 and full.length.mean == 20
    assert base.change is None
    assert half.change is not None and half.change.mean == -20
    assert half.change.low == -50 and half.change.high == 0
    assert [result.ended.mean for result in (base, half, full)] == pytest.approx([1 / 3, 2 / 3, 1])


def test_the_interval_of_equal_values_is_a_point_and_repeats() -> None:
    point = bootstrap_mean([4, 4, 4])
    assert (point.mean, point.low, point.high) == (4, 4, 4)
    values = [1, 2, 3, 10, 20]
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_the_interval_is_about_as_wide_as_theory_says() -> None:
    # 100 values of 0 and 100 of 1: the standard error of the mean is 0.5 / sqrt(200).
    interval = bootstrap_mean([0, 1] * 100)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.5 / 200**0.5, rel=0.1)


def test_no_values() -> None:
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_mean([])


def test_steady_means_falling_at_every_step_beyond_chance() -> None:
    falling = {0.0: answers([8, 9, 10]), 0.5: answers([5, 7, 6]), 1.0: answers([2, 3, 4])}
    assert falls_steadily(summarise_sweep(falling))
    # The mean falls from 3 to 2.5, but of the four answers one grew.
    doubtful = {0.0: answers([3, 3, 3, 3]), 1.0: answers([2, 2, 2, 4])}
    assert not falls_steadily(summarise_sweep(doubtful))


def test_table_and_picture(tmp_path: Path) -> None:
    results = summarise_sweep(SWEEP)
    table = markdown_table({"A": results, "B": results})
    assert table.count("\n") == 8
    assert "| A | 0.5 | 50.0 [" in table and "| B | 1 | 20.0 [" in table
    plot_sweep({"A": results}, tmp_path / "plot.png", "title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
