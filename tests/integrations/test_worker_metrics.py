"""The worker's metrics: what they say, that several processes add up, and that what is gone says 0."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from prometheus_client import REGISTRY, CollectorRegistry, multiprocess
from steered import Steered

from cmc_server.fusion.controller import DeltaController
from cmc_server.integrations import worker_metrics
from cmc_server.integrations.request_args import ActiveDelta
from cmc_server.integrations.worker_metrics import FOLDER_VARIABLE, Publisher, publish_metrics

RESERVED = 5


def value(name: str, delta: str = "same", **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, {"delta": delta, **labels})


def added(before: float | None, name: str) -> float:
    return (value(name) or 0) - (before or 0)


@pytest.fixture
def controller(steered: Steered) -> DeltaController:
    controller = DeltaController(RESERVED)
    controller.load(steered.load("same"))
    return controller


def run(controller: DeltaController, size: int, slots: int = 2) -> None:
    """One step of some new requests."""
    for slot in range(slots):
        controller.admit(slot, [7, 8, 9], [ActiveDelta(name="same", strength=1.0)])
    controller.shift([(slot, slot) for slot in range(slots)], torch.randn(slots, size))


def test_counters_and_histograms_grow_by_what_happened(controller: DeltaController, steered: Steered) -> None:
    names = [f"cmc_delta_{name}" for name in ("admissions_total", "tokens_total", "read_tokens_total")]
    names += ["cmc_delta_step_rows_sum", "cmc_delta_step_seconds_count", "cmc_delta_top_token_looks_total"]
    before = [value(name) for name in names]
    publisher = Publisher(controller)
    publisher.publish()
    assert [added(old, name) for old, name in zip(before, names, strict=True)] == [0] * len(names)
    assert None not in [value(name) for name in names]  # or the first increase would be lost
    for _ in range(2):
        run(controller, steered.vocabulary.size)
        publisher.publish()
        publisher.publish()
    num_read = controller.counts["same"].read
    assert num_read > 0
    growth = [added(old, name) for old, name in zip(before, names, strict=True)]
    assert growth == [4, 4, num_read, 4, 2, 1]
    assert not controller.counts["same"].passes


def test_failures_are_counted(controller: DeltaController, steered: Steered, monkeypatch: pytest.MonkeyPatch) -> None:
    before = value("cmc_delta_failures_total")
    monkeypatch.setattr(controller.deltas["same"].runner, "_logits", lambda *_: 1 / 0)
    run(controller, steered.vocabulary.size)
    Publisher(controller).publish()
    assert added(before, "cmc_delta_failures_total") == 2


def test_a_delta_that_goes_leaves_no_residency_behind(controller: DeltaController, steered: Steered) -> None:
    publisher = Publisher(controller)
    publisher.publish()
    delta = controller.deltas["same"]
    assert value("cmc_delta_loaded") == 1
    assert value("cmc_delta_memory_bytes") == delta.runner.memory_bytes
    assert value("cmc_delta_mapped_share") == delta.vocab_map.coverage
    run(controller, steered.vocabulary.size)
    controller.unload("same")
    controller.retire("same", delta.artifact.version)
    publisher.publish()
    assert value("cmc_delta_loaded") == value("cmc_delta_mapped_share") == 0
    assert value("cmc_delta_memory_bytes") == delta.runner.memory_bytes  # a request still runs on it
    for slot in range(2):
        controller.release(slot)
    publisher.publish()
    assert value("cmc_delta_memory_bytes") == 0
    controller.load(delta)
    publisher.publish()
    assert value("cmc_delta_loaded") == 1


def test_it_publishes_by_itself_where_somebody_reads_it(
    controller: DeltaController, steered: Steered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_metrics, "_SECONDS", 0.01)
    before = value("cmc_delta_tokens_total")
    for folder in ("", str(tmp_path / "nowhere")):
        monkeypatch.setenv(FOLDER_VARIABLE, folder)
        publish_metrics(controller)
    run(controller, steered.vocabulary.size)
    time.sleep(0.1)
    assert value("cmc_delta_tokens_total") == before
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    publish_metrics(controller)
    run(controller, steered.vocabulary.size)
    deadline = time.monotonic() + 10
    while added(before, "cmc_delta_tokens_total") < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert added(before, "cmc_delta_tokens_total") == 4


WORKER = """
from types import SimpleNamespace
from cmc_server.fusion.counts import DeltaCounts, Pass
from cmc_server.integrations.worker_metrics import Publisher

delta = SimpleNamespace(runner=SimpleNamespace(memory_bytes=100), vocab_map=SimpleNamespace(coverage=0.75))
counts = DeltaCounts(tokens=3)
counts.passes += [Pass(2, 0.003), Pass(5, 0.1)]
controller = SimpleNamespace(counts={"tone": counts}, deltas={"tone": delta}, kept={})
publisher = Publisher(controller)
publisher.publish()
counts.tokens += 4
publisher.publish()
"""


def test_several_workers_add_up(tmp_path: Path) -> None:
    """Each in a process of its own, as vLLM runs them; read as vLLM's ``/metrics`` does."""
    for _ in range(2):
        subprocess.run([sys.executable, "-c", WORKER], env={**os.environ, FOLDER_VARIABLE: str(tmp_path)}, check=True)
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(tmp_path))

    def total(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"delta": "tone", **labels})

    assert total("cmc_delta_tokens_total") == 14
    assert total("cmc_delta_failures_total") == 0
    assert total("cmc_delta_step_rows_count") == 4
    assert total("cmc_delta_step_rows_bucket", le="4.0") == 2
    assert total("cmc_delta_step_seconds_bucket", le="0.004") == 2
    assert (total("cmc_delta_loaded"), total("cmc_delta_memory_bytes")) == (2, 200)
    assert total("cmc_delta_mapped_share") == 0.75
