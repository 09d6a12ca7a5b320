"""A delta folder up to the Hugging Face hub and down again, the network replaced by a stand-in on this machine."""

from __future__ import annotations

import base64
import hashlib
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
from steered import Steered

from cmc_server.delta.store import content_version

SHA = "1" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as one small repository of regular files needs."""

    files: dict[str, bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            kinds = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]
            self._answer({"files": kinds})
        elif self.path.endswith("/commit/main"):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self._answer({"commitUrl": f"{self._repository()}/commit/{SHA}", "commitOid": SHA})
        else:
            self._answer({"url": self._repository(), "id": "me/delta", "name": "me/delta"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            files = self.files.items()
            self._answer([{"type": "file", "path": name, "size": len(one), "oid": SHA} for name, one in files])
            return
        if "/resolve/" not in self.path:
            names = [{"rfilename": name} for name in self.files]
            self._answer({"_id": "1", "id": "me/delta", "modelId": "me/delta", "sha": SHA, "siblings": names})
            return
        content = self.files.get(self.path.partition(f"/resolve/{SHA}/")[2])
        if content is None:
            self.send_error(404)
            return
        self._send(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', **{"X-Repo-Commit": SHA})

    def _repository(self) -> str:
        return f"http://{self.headers['Host']}/me/delta"

    def _answer(self, body: Any) -> None:
        self._send(json.dumps(body).encode(), **{"Content-Type": "application/json"})

    def _send(self, content: bytes, **headers: str) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, bytes]]]:
    files: dict[str, bytes] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("_Hub", (Hub,), {"files": files}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", files
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_up_and_down(steered: Steered, hub: tuple[str, dict[str, bytes]], tmp_path: Path) -> None:
    url, files = hub
    folder = steered.deltas["other"]
    offline = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_none"}

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], env=os.environ | offline, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    up = "import sys; from huggingface_hub.cli.hf import main; sys.argv = ['hf', *sys.argv[1:]]; main()"
    run("-c", up, "upload", "me/delta", str(folder), ".")
    assert files["config.json"] == (folder / "config.json").read_bytes()
    files["pytorch_model.bin"] = b"never fetched"
    found = json.loads(run("-m", "cmc_server", "inspect", "me/delta", "--json"))
    assert found["version"] == content_version(folder)
    assert not list(tmp_path.rglob("pytorch_model.bin"))
