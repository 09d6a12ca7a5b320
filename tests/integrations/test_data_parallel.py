"""Two engines behind one server: both hold the deltas, and both take part when one is loaded or unloaded."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from running_server import RunningServer, text_of
from tiny_models import make_delta

if TYPE_CHECKING:
    from conftest import DemoModels

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
ADMIN = {"Authorization": "Bearer admin"}
SYNC_SECONDS = 10


@pytest.fixture(scope="module")
def folders(demo_models: DemoModels, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("deltas")
    return [make_delta(root / name, demo_models.smollm2, seed=seed) for seed, name in enumerate("ab")]


@pytest.fixture(scope="module")
def server(
    demo_models: DemoModels, folders: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    arguments = [
        *[str(demo_models.smollm2), "--served-model-name", "user", "--enforce-eager", "--dtype", "float32"],
        *["--max-model-len", "256", "--max-num-seqs", "4", "--data-parallel-size", "2", "--delta-memory", "0.5"],
        *["--delta", f"a={folders[0]}", "--delta-root", str(folders[0].parent)],
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMC_SERVER_ADMIN_KEY", "admin")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        running = RunningServer(arguments, tmp_path_factory.mktemp("server") / "log")
    yield running.wait_until_ready()
    running.stop()


def answers(server: RunningServer, model: str) -> set[str]:
    """Of eight requests at once, which the two engines share."""
    body = {"model": model, "prompt": "The colors of the rainbow are", "max_tokens": 8, "temperature": 0}
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(server.http.post, "/v1/completions", json=body) for _ in range(8)]
        return {text_of(one.result()) for one in asked}


def number(server: RunningServer, metric: str, label: str) -> list[float]:
    found = re.findall(rf"^{metric}\{{[^}}]*{label}[^}}]*\}} (\S+)$", server.http.get("/metrics").text, re.MULTILINE)
    return [float(value) for value in found]


def soon(condition: Callable[[], bool]) -> bool:
    """Whether a condition comes true in time: API processes and metrics follow a change within a second or two."""
    deadline = time.monotonic() + SYNC_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def known_everywhere(server: RunningServer, name: str) -> bool:
    """Whether each of many new connections finds a delta: at once, so that no API process takes them all."""

    def knows(_: int) -> bool:
        listing = server.http.get("/v1/deltas", headers={"Connection": "close"}).json()["data"]
        return name in [delta["name"] for delta in listing]

    with ThreadPoolExecutor(16) as threads:
        return all(threads.map(knows, range(64)))


def test_both_engines_have_every_delta(server: RunningServer, folders: list[Path]) -> None:
    (base,) = answers(server, "user")
    (steered,) = answers(server, "a@1")
    assert steered != base
    assert soon(lambda: number(server, "cmc_delta_loaded", 'delta="a"') == [2])
    assert all(number(server, "vllm:request_success_total", 'finished_reason="length"')), "one engine did nothing"

    loaded = server.http.post("/v1/deltas", json={"name": "b", "path": str(folders[1])}, headers=ADMIN)
    assert loaded.status_code == 201, loaded.text
    assert soon(lambda: known_everywhere(server, "b"))
    (other,) = answers(server, "b@1")
    assert other not in (base, steered)
    assert soon(lambda: number(server, "cmc_delta_loaded", 'delta="b"') == [2])

    assert server.http.delete("/v1/deltas/b", headers=ADMIN).status_code == 200
    assert soon(lambda: number(server, "cmc_delta_loaded", 'delta="b"') == [0])
    assert answers(server, "a@1") == {steered}
    assert server.http.get("/ready").status_code == 200
