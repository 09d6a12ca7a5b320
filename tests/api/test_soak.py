"""A short soak; the long one, which also judges memory, is ``benchmarks/soak.py`` as it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from bench import import_benchmark, run_benchmark
from tiny_models import make_delta

if TYPE_CHECKING:
    from conftest import DemoModels


def test_two_names_of_one_content_are_two_doses() -> None:
    doses = import_benchmark("soak_traffic").parse_doses("a@1.5#0123456789ab, b@-0.5#0123456789ab")
    assert doses == (("a.0123456789ab", 1.5), ("b.0123456789ab", -0.5))


@pytest.mark.e2e
@pytest.mark.slow
def test_clients_of_every_temper_while_deltas_come_and_go(demo_models: DemoModels, tmp_path: Path) -> None:
    deltas = [make_delta(tmp_path / f"delta-{seed}", demo_models.smollm2, seed=seed) for seed in range(3)]
    short = ("--minutes", "0.7", "--clients", "12", "--tokens", "16", "--sample", "40")
    report = run_benchmark("soak", "--user", demo_models.smollm2, "--deltas", *deltas, *short)
    assert report["judged"]["base"]["answers"] and report["judged"]["steered"]["answers"]
    assert {"answers", "streams", "left", "bad bodies", "loads", "unloads"} == set(report["statuses"])
