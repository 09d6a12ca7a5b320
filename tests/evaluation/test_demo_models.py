"""The evaluation sees what concise is known to do, beside both real models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import cmc_server
from cmc_server.cli import main
from cmc_server.evaluation.prompts import PACKAGED_PROMPTS

CONCISE = Path(cmc_server.__file__).parent / "demo" / "concise"


def evaluate(user: Path, output: Path, *words: str) -> dict[str, Any]:
    deltas = ["--delta", f"concise={CONCISE}@0.5", "--prompts", str(PACKAGED_PROMPTS)]
    assert main(["eval", str(user), *deltas, *words, "-o", str(output)]) == 0
    return dict(json.loads((output / "results.json").read_text("utf-8"))["suites"])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["smollm2", "gemma3"])
def test_concise_makes_brief_answers_likelier_and_harms_little(demo_models, model: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    suites = evaluate(getattr(demo_models, model), tmp_path, "--suite", "sweep", "--limit", "4")
    half = suites["sweep"]["by_strength"][1]
    assert half["effect"]["low"] > 0
    assert half["loss"]["mean"] < 0.2
