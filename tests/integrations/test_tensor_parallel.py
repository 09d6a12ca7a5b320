"""Two ranks of tensor parallelism behind the HTTP API, one of which fails; deltas come and go on both."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from running_server import RunningServer, text_of
from tiny_models import make_delta

import cmc_server.demo

if TYPE_CHECKING:
    from conftest import DemoModels

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
CONCISE = Path(cmc_server.demo.__file__).parent / "concise"
ADMIN = {"Authorization": "Bearer admin"}
HERE = str(Path(__file__).parents[1] / "cpu_engine")


@pytest.fixture(scope="module")
def late(demo_models: DemoModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A delta that is not there at the start."""
    return make_delta(tmp_path_factory.mktemp("deltas") / "late", demo_models.smollm2)


@pytest.fixture(scope="module")
def server(demo_models: DemoModels, late: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    arguments = [
        *[str(demo_models.gemma3), "--served-model-name", "gemma", "--enforce-eager", "--dtype", "float32"],
        *["--max-model-len", "256", "--max-num-seqs", "4", "--tensor-parallel-size", "2"],
        *["--delta", f"concise={CONCISE}", "--delta-root", str(late.parent), "--delta-memory", "0.5"],
    ]
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    patch.setenv("CMC_TEST_FAULT_RANK", "1")
    patch.setenv("CMC_SERVER_ADMIN_KEY", "admin")
    patch.setenv("PYTHONPATH", os.pathsep.join([HERE, *filter(None, [os.environ.get("PYTHONPATH")])]))
    with patch.context():
        running = RunningServer(arguments, tmp_path_factory.mktemp("server") / "log")
    yield running.wait_until_ready()
    running.stop()
    patch.undo()


def complete(server: RunningServer, model: str) -> Any:
    body = {"model": model, "prompt": "Question: Why is the sky blue?\nAnswer:", "max_tokens": 24, "temperature": 0}
    return server.http.post("/v1/completions", json=body | {"ignore_eos": True})


def test_a_failure_on_one_rank_fails_the_request_and_nothing_else(server: RunningServer) -> None:
    base, steered = text_of(complete(server, "gemma")), text_of(complete(server, "concise@1"))
    assert steered != base
    failed = complete(server, "concise@1.25")
    assert failed.status_code == 500, failed.text
    # The rank that did not fail must not go on with other tokens than the one that did.
    assert text_of(complete(server, "gemma")) == base
    assert text_of(complete(server, "concise@1")) == steered
    assert server.http.get("/ready").status_code == 200


def test_both_ranks_load_and_unload_a_delta(server: RunningServer, late: Path) -> None:
    base, concise = text_of(complete(server, "gemma")), text_of(complete(server, "concise@1"))
    loaded = server.http.post("/v1/deltas", json={"name": "late", "path": str(late)}, headers=ADMIN)
    assert loaded.status_code == 201, loaded.text
    # Ranks that added other logits would part ways within a few tokens, and the answer would not come again.
    steered = text_of(complete(server, "late@4"))
    assert steered not in (base, concise) and text_of(complete(server, "late@4")) == steered
    assert server.http.get("/ready").status_code == 200
    assert server.http.delete("/v1/deltas/late", headers=ADMIN).status_code == 200
    assert complete(server, "late@4").status_code == 400
    assert [text_of(complete(server, model)) for model in ("gemma", "concise@1")] == [base, concise]
