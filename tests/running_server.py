"""A real server in a process of its own: ``from running_server import RunningServer``."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

API_KEY = "secret"
_START_SECONDS = 240
_STOP_SECONDS = 90


class RunningServer:
    """``cmc-server serve`` with a free port and a log file.

    Args:
        arguments: what follows ``serve``.
        log: file for everything that the server prints.
    """

    def __init__(self, arguments: list[str], log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        command = [sys.executable, "-m", "cmc_server", "serve", *arguments, "--host", "127.0.0.1", "--port", str(port)]
        with log.open("wb") as stream:
            self.process = subprocess.Popen([*command, "--api-key", API_KEY], stdout=stream, stderr=stream)
        self.http = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {API_KEY}"}, timeout=httpx.Timeout(120)
        )

    def wait_until_ready(self) -> RunningServer:
        """Wait for ``/ready``; what the server printed is in the error if it does not come."""
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.http.get("/ready").status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        text = self.log.read_text(errors="replace")[-4000:]
        self.stop()
        raise AssertionError(f"The server did not become ready:\n{text}")

    def stop(self) -> int:
        """Ask the server to stop and wait for it; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self.http.close()


def text_of(answer: httpx.Response) -> str:
    """The answer's text, on any route."""
    assert answer.status_code == 200, answer.text
    body = answer.json()
    if "choices" in body:
        choice = body["choices"][0]
        return str(choice["text"] if "text" in choice else choice["message"]["content"])
    parts = body["content"] if "content" in body else body["output"][0]["content"]
    return "".join(part["text"] for part in parts)


def events_of(answer: httpx.Response) -> list[Any]:
    """The JSON documents of a stream."""
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def new_text(event: dict[str, Any]) -> str:
    """The text that a streamed event brings, on any route."""
    if event.get("type") == "response.output_text.delta":
        return str(event["delta"])
    if event.get("type") == "content_block_delta":
        return str(event["delta"]["text"])
    return "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in event.get("choices", ()))
