from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cmc_server.demo import ask
from cmc_server.demo.ask import compare, is_ready, main, wait_until_ready
from cmc_server.errors import CmcError, UserError


class Server(ThreadingHTTPServer):
    """A small HTTP server: not ready for the first requests, then it answers chats with the strength it was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.not_ready = 0
        self.constant: str | None = None
        self.bodies: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.not_ready -= 1
        self.reply(503 if self.server.not_ready >= 0 else 200, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        if body["model"] != "smollm2":
            self.reply(404, {"error": {"message": "no such model"}})
            return
        content = self.server.constant or f"strength {body['cmc']['deltas'][0]['strength']}"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        self.reply(
            200,
            {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage},
        )

    def reply(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it so
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_waits_until_the_server_is_ready(server: Server, tmp_path: Path) -> None:
    server.not_ready = 2
    assert wait_until_ready(server.url, os.getpid(), tmp_path / "log", timeout=30) > 0
    assert is_ready(server.url)


def test_shows_what_the_server_says(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log").write_text(
        "first\n(EngineCore pid=15827) INFO 11-21 09:35:20 [core.py:402] init engine took 4 s\n"
    )
    monkeypatch.setattr(ask, "REPORT_SECONDS", 0.0)
    server.not_ready = 1
    wait_until_ready(server.url, os.getpid(), tmp_path / "log", timeout=30)
    assert capsys.readouterr().err.endswith(" s  init engine took 4 s\n")


def test_notices_that_the_server_has_ended(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with pytest.raises(UserError, match="ended before it was ready"):
        wait_until_ready("http://127.0.0.1:9", ended.pid, tmp_path / "log", timeout=30)


def test_gives_up_in_the_end(server: Server, tmp_path: Path) -> None:
    server.not_ready = 1000
    with pytest.raises(UserError, match="not ready after 0 s"):
        wait_until_ready(server.url, os.getpid(), tmp_path / "log", timeout=0.01)


def test_asks_with_each_strength(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(server.url, "smollm2", "concise", [0.0, 1.5], "Why?") == ["strength 0.0", "strength 1.5"]
    assert [body["cmc"] for body in server.bodies] == [
        {"deltas": [{"name": "concise", "strength": strength}], "unmapped": "zero"} for strength in (0.0, 1.5)
    ]
    assert all(body["temperature"] == 0 for body in server.bodies)
    out = capsys.readouterr().out
    assert "Question: Why?" in out
    assert "[concise at strength 1.5: 2 tokens]\nstrength 1.5" in out


def test_a_refusal_is_one_sentence(server: Server) -> None:
    with pytest.raises(CmcError, match="no such model"):
        compare(server.url, "other", "concise", [0.0], "Why?")


def test_command_fails_if_the_delta_changes_nothing(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.constant = "always this"
    assert main(["compare", server.url, "--model", "smollm2", "--delta", "concise"]) == 1
    assert "changed nothing" in capsys.readouterr().err
