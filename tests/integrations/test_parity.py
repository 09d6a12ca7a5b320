"""Every engine against the oracle, on the two real LLMs with the shipped delta: greedy, mixed strengths, mixed batches.

The script that also takes the larger measurement does the work; each case is an engine of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench import run_benchmark

import cmc_server.demo

ROOT = Path(__file__).parents[2]
CONCISE = Path(cmc_server.demo.__file__).parent / "concise"
MRV2 = {"CMC_TEST_TRITON_INTERPRETER": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
ASYNC = {"CMC_TEST_ASYNC_SCHEDULING": "1"}
FULL = "--prompts 5 --tokens 24 --strengths 0 1 2"
# Few cache blocks force preemption and resumption, small batches split the prompts.
PREEMPTED = "--batch 6 --kv-blocks 4 --max-model-len 96 --batched-tokens 16"


def parity(user: Path, engine: str, options: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    words = ["--engine", engine, "--user", user, "--delta", CONCISE, *options.split()]
    variables = {"PYTHONPATH": str(ROOT / "tests" / "cpu_engine"), **(environment or {})}
    report: dict[str, Any] = run_benchmark("parity", *words, timeout=1200, **variables)["parity"]
    assert report["passed"], report
    assert report["answers_changed"] > 0, "the delta must have changed something for this to mean anything"
    return report


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("user", ["smollm2", "gemma3"])
class TestParity:
    def test_v1(self, demo_models: Any, user: str) -> None:
        report = parity(getattr(demo_models, user), "v1", FULL)
        assert report["runner"] == ["v1"]
        assert report["base_rows_compared"] > 0

    def test_v1_without_fast_paths(self, demo_models: Any, user: str) -> None:
        parity(getattr(demo_models, user), "v1", f"{FULL} --fast-paths")

    def test_generate(self, demo_models: Any, user: str) -> None:
        parity(getattr(demo_models, user), "generate", FULL)

    def test_v2(self, demo_models: Any, user: str) -> None:
        report = parity(getattr(demo_models, user), "v2", "--prompts 1 --tokens 8 --strengths 0 2", MRV2)
        assert report["runner"] == ["v2"]
        assert report["base_rows_compared"] > 0
        # Tokens of one vocabulary stay on the device; those of two are spelled on the host.
        assert (report["rows_with_unseen_tokens"] > 0) == (user == "smollm2")


@pytest.mark.e2e
@pytest.mark.slow
class TestParityUnderPreemption:
    """Partial prefill, preemption and resumption, also with asynchronous scheduling as on a GPU."""

    @pytest.mark.parametrize("environment", [{}, ASYNC], ids=["in step", "asynchronous"])
    def test_v1(self, demo_models: Any, environment: dict[str, str]) -> None:
        report = parity(demo_models.smollm2, "v1", f"--prompts 3 --tokens 32 --strengths 0 2 {PREEMPTED}", environment)
        assert report["preemptions"] > 0
        assert report["async_scheduling"] == bool(environment)

    def test_v2(self, demo_models: Any) -> None:
        options = f"--prompts 2 --tokens 32 --strengths 0 2 {PREEMPTED}"
        report = parity(demo_models.smollm2, "v2", options, {**MRV2, **ASYNC})
        assert report["preemptions"] > 0
        assert report["async_scheduling"]
        assert report["rows_with_unseen_tokens"] > 0


@pytest.mark.e2e
@pytest.mark.slow
def test_v1_on_two_ranks(demo_models: Any) -> None:
    """SmolLM2's nine heads cannot be halved; Gemma's four can."""
    options = "--prompts 2 --tokens 16 --strengths 0 2 --tensor-parallel 2"
    report = parity(demo_models.gemma3, "v1", options, {"VLLM_CPU_OMP_THREADS_BIND": "0|1"})
    assert report["base_rows_compared"] > 0
