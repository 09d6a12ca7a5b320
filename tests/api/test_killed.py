"""A worker that is killed under load: the server says so, clients are told, and a supervisor can start it again."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
from running_server import RunningServer
from tiny_models import make_delta

if TYPE_CHECKING:
    from conftest import DemoModels

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def stream(server: RunningServer, model: str, lines: list[str]) -> None:
    """A long answer, line by line; a connection that is cut off is a line of its own."""
    body = {"model": model, "prompt": "The colors are", "max_tokens": 400, "ignore_eos": True, "stream": True}
    try:
        with server.http.stream("POST", "/v1/completions", json=body) as answer:
            lines.append(str(answer.status_code))
            lines.extend(line for line in answer.iter_lines() if line)
    except httpx.HTTPError as error:
        lines.append(f"cut off: {error!r}")


def is_healthy(server: RunningServer) -> bool:
    try:
        return server.http.get("/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def worker_of(server: RunningServer) -> psutil.Process:
    """The process that holds the user LLM."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return max(children, key=lambda child: child.memory_info().rss)


def test_kill_minus_nine(demo_models: DemoModels, tmp_path: Path) -> None:
    delta = make_delta(tmp_path / "tiny", demo_models.smollm2)
    server = RunningServer(
        [
            *[str(demo_models.smollm2), "--served-model-name", "smollm2", "--enforce-eager", "--dtype", "float32"],
            *["--max-model-len", "512", "--delta", f"tiny={delta}"],
        ],
        tmp_path / "log",
    ).wait_until_ready()
    seen: dict[str, list[str]] = {"smollm2": [], "tiny": []}
    threads = [threading.Thread(target=stream, args=(server, *one)) for one in seen.items()]
    try:
        for thread in threads:
            thread.start()
        wait_for(lambda: all(len(lines) > 3 for lines in seen.values()), 60)
        assert is_healthy(server)
        os.kill(worker_of(server).pid, signal.SIGKILL)
        wait_for(lambda: not is_healthy(server), 10)
        # compose, systemd and Kubernetes start again what has ended badly.
        assert server.process.wait(30) != 0
        for thread in threads:
            thread.join(30)
        for lines in seen.values():
            assert lines[0] == "200"
            assert any('"error"' in line for line in lines), lines[-3:]
    finally:
        server.stop()


def wait_for(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
