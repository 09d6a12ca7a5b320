"""Starting and stopping: what the launcher refuses, a server without deltas, and SIGTERM under way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from running_server import RunningServer
from tiny_models import make_delta, make_tokenizer

from cmc_server.api.server import METRICS_VARIABLE, _metrics_folder, run_serve
from cmc_server.errors import UserError

if TYPE_CHECKING:
    from conftest import DemoModels

CHAT = "/v1/chat/completions"
QUESTION: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}


@pytest.fixture
def restored_environment() -> Iterator[None]:
    """The launcher writes variables that vLLM reads."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny user LLM; a delta is a causal LM like any other."""
    root = tmp_path_factory.mktemp("models")
    return make_delta(root / "model", make_tokenizer(root / "tokenizer"))


@pytest.mark.usefixtures("restored_environment")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--speculative-config", "{}"], "Speculative decoding"),
        (["--spec-method", "ngram"], "Speculative decoding"),
        (["--enable-batch-sharded-sampling"], "--enable-batch-sharded-sampling"),
        (["--enable-sleep-mode"], "--enable-sleep-mode"),
        (["--grpc"], "gRPC"),
        (["--runner", "pooling"], "pooling"),
        (["--worker-extension-cls", "mine.Extension"], "--worker-extension-cls"),
        (["--additional-config", '{"cmc_server": {}}'], "--additional-config"),
        (["--served-model-name", "tiny"], "served model"),
        (["--lora-modules", "tiny=/adapter"], "served model"),
        (["--skip-tokenizer-init"], "--skip-tokenizer-init"),
        (["--port", "many"], "invalid int value"),
        (["--no-such-argument"], "Unrecognized arguments: --no-such-argument"),
        (["--enable-auto-tool-choice"], "--tool-call-parser"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--map-overrides", "missing.json"], "missing.json"),
        (["--delta-memory", "0.0001"], "--delta-memory is 0.0001 GiB"),
        (["--delta-memory", "0.01", "--max-delta-seqs", "500", "--max-num-seqs", "500"], "rows fit"),
    ],
)
def test_refused_before_vllm_starts(model: Path, tiny_delta: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        run_serve([str(model), "--delta", f"tiny={tiny_delta}", *arguments])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("restored_environment")
@pytest.mark.parametrize("argv", [[], ["--delta", "tiny=/nowhere"], ["/no/such/model"]])
def test_no_model(argv: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        run_serve(argv)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("restored_environment")
def test_no_server_without_our_routes(model: Path, tiny_delta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself vLLM would log that it cannot load them, and answer as if no delta had been asked for."""

    def broken(_: object) -> None:
        raise RuntimeError("broken\nas can be")

    monkeypatch.setattr("cmc_server.api.routes.DeltaEndpoints.__init__", broken)
    with pytest.raises(UserError) as caught:
        run_serve([str(model), "--delta", f"tiny={tiny_delta}"])
    assert str(caught.value).endswith("install cmc-server again: RuntimeError: broken as can be")


def test_metrics_begin_in_a_fresh_folder_that_goes_with_the_server(tmp_path: Path) -> None:
    for given in (None, str(tmp_path / "metrics")):
        environment = {"OTHER": "1", **({METRICS_VARIABLE: given} if given else {})}
        before = dict(environment)
        with pytest.raises(SystemExit), _metrics_folder(environment):
            folder = Path(environment[METRICS_VARIABLE])
            assert list(folder.iterdir()) == []
            assert given is None or str(folder.parent) == given
            (folder / "counter_1.db").touch()
            raise SystemExit
        assert not folder.exists()
        assert environment == before


@pytest.mark.slow
def test_nothing_of_prometheus_is_imported_before_its_folder_is_named() -> None:
    """Or the processes of the server would count each for itself."""
    code = "import sys, cmc_server.__main__, cmc_server.cli, cmc_server.api.server; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert not {name for name in done.stdout.split() if name.startswith(("prometheus", "vllm"))}


@pytest.mark.slow
def test_the_command_ends_with_code_2_and_one_sentence(model: Path) -> None:
    command = [sys.executable, "-m", "cmc_server", "serve", str(model), "--delta", "tiny=/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().split("\n")[-1] == "cmc-server: The delta folder /nowhere does not exist."
    assert "Traceback" not in done.stderr


@pytest.mark.e2e
@pytest.mark.slow
def test_without_deltas_and_at_sigterm(demo_models: DemoModels, tmp_path: Path) -> None:
    arguments = [
        *[str(demo_models.smollm2), "--served-model-name", "base", "--enforce-eager", "--dtype", "float32"],
        *["--max-model-len", "1024", "--logprobs-mode", "raw_logprobs", "--shutdown-timeout", "60"],
    ]
    server = RunningServer(arguments, tmp_path / "log").wait_until_ready()
    assert "warning: with --logprobs-mode raw_logprobs" in server.log.read_text(errors="replace")
    assert server.http.get("/v1/deltas").json()["data"] == []
    assert [model["id"] for model in server.http.get("/v1/models").json()["data"]] == ["base"]
    assert server.http.post(CHAT, json=QUESTION).headers["x-cmc-deltas"] == "none"
    answer = server.http.post(CHAT, json={**QUESTION, "cmc": {"deltas": [{"name": "tiny"}]}})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "cmc.deltas[0].name")

    lines: list[str] = []
    begun = threading.Event()

    def follow() -> None:
        body = {**QUESTION, "stream": True, "max_tokens": 300, "ignore_eos": True}
        with server.http.stream("POST", CHAT, json=body) as stream:
            for line in stream.iter_lines():
                lines.append(line)
                begun.set()

    reader = threading.Thread(target=follow)
    reader.start()
    assert begun.wait(60)
    with httpx.Client(base_url=server.url) as probe:
        assert probe.get("/ready").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while (answer := probe.get("/ready")).status_code == 200 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "shutting down" in answer.json()["reason"]
        assert reader.is_alive()  # the stream goes on after /ready has failed
    reader.join(120)
    assert lines[-2] == "data: [DONE]"
    finished = json.loads(lines[-4].removeprefix("data: "))["choices"][0]["finish_reason"]
    assert finished == "length"
    assert server.stop() == 0
