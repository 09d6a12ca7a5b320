"""Deltas of a real server come, are replaced and go, while requests run."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from bench import run_benchmark
from prometheus_client.parser import text_string_to_metric_families
from running_server import API_KEY, RunningServer, text_of
from tiny_models import make_delta, make_tokenizer

from cmc_server.delta.store import content_version

if TYPE_CHECKING:
    from conftest import DemoModels

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ADMIN = {"Authorization": "Bearer admin"}
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def folders(root: Path, demo_models: DemoModels) -> dict[str, Path]:
    """Two deltas to take turns, one that is too large, and one that knows next to nothing of the vocabulary."""
    made = {name: make_delta(root / name, demo_models.smollm2, seed=seed) for seed, name in enumerate("ab")}
    made["large"] = make_delta(root / "large", demo_models.smollm2, hidden=512, layers=12)
    made["strange"] = make_delta(root / "strange", make_tokenizer(root / "strange-tokenizer", vocab_size=270))
    return made


def start(root: Path, user: Path, log: Path) -> RunningServer:
    arguments = [
        *[str(user), "--served-model-name", "smollm2", "--enforce-eager", "--dtype", "float32"],
        *["--max-model-len", "1024", "--max-num-seqs", "8", "--delta-memory", "0.2", "--delta-root", str(root)],
        *["--delta-state", str(root / "state.json"), "--watch-deltas", str(root / "watched")],
        *["--access-log-format", "json"],
    ]
    return RunningServer(arguments, log).wait_until_ready()


@pytest.fixture(scope="module")
def server(
    root: Path, folders: dict[str, Path], demo_models: DemoModels, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    os.environ["CMC_SERVER_ADMIN_KEY"] = "admin"
    running = start(root, demo_models.smollm2, tmp_path_factory.mktemp("server") / "log")
    yield running
    running.stop()
    del os.environ["CMC_SERVER_ADMIN_KEY"]


def load(server: RunningServer, name: str, path: Path | str, **more: Any) -> Any:
    return server.http.post("/v1/deltas", json={"name": name, "path": str(path), **more}, headers=ADMIN)


def unload(server: RunningServer, name: str) -> Any:
    return server.http.delete(f"/v1/deltas/{name}", headers=ADMIN)


def names(server: RunningServer) -> list[str]:
    return [delta["name"] for delta in server.http.get("/v1/deltas").json()["data"]]


def complete(server: RunningServer, model: str, tokens: int = 12, **more: Any) -> Any:
    body = {"model": model, "prompt": "The colors are", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return server.http.post(COMPLETIONS, json={**body, **more})


def test_a_delta_comes_and_goes(server: RunningServer, folders: dict[str, Path]) -> None:
    assert names(server) == []
    answer = load(server, "fresh", folders["a"], strength=1.5)
    assert answer.status_code == 201, answer.text
    assert (answer.json()["state"], answer.json()["strength"]) == ("loaded", 1.5)
    version = content_version(folders["a"])
    steered = complete(server, "fresh")
    assert steered.headers["x-cmc-deltas"] == f"fresh@1.5#{version}"
    assert text_of(steered) != text_of(complete(server, "smollm2"))
    assert "fresh" in [model["id"] for model in server.http.get("/v1/models").json()["data"]]
    assert unload(server, "fresh").json() == {"object": "delta", "name": "fresh", "deleted": True}
    assert names(server) == []
    assert complete(server, "fresh").status_code == 404
    assert unload(server, "fresh").status_code == 404


def test_metrics_of_the_workers(server: RunningServer, folders: dict[str, Path]) -> None:
    assert load(server, "counted", folders["b"]).status_code == 201
    answer = complete(server, "counted", 8, n=2, temperature=1)
    time.sleep(2)  # they publish once a second
    after = samples(server)
    request_id = answer.json()["id"].removeprefix("cmpl-")
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if f'"{request_id}"' in line]
    assert [(line["status"], line["deltas"]) for line in lines] == [(200, answer.headers["x-cmc-deltas"])]

    assert after["cmc_requests_total", "counted"] == 1
    assert after["cmc_delta_admissions_total", "counted"] == 2
    assert after["cmc_delta_tokens_total", "counted"] == 16
    assert after["cmc_delta_step_rows_sum", "counted"] >= 16
    assert 8 <= after["cmc_delta_step_rows_count", "counted"] == after["cmc_delta_step_seconds_count", "counted"]
    assert 0 < after["cmc_delta_step_seconds_sum", "counted"] < 60
    assert after["cmc_delta_read_tokens_total", "counted"] > 16
    for name in ("failures", "recomputed_tokens", "respellings", "rebuilds", "top_token_looks", "top_token_changes"):
        assert (f"cmc_delta_{name}_total", "counted") in after
    assert after["cmc_delta_loaded", "counted"] == after["cmc_delta_mapped_share", "counted"] == 1
    assert after["cmc_delta_memory_bytes", "counted"] > 0
    assert any(name == "vllm:request_success_total" for name, _ in after)
    assert any(name == "http_requests_total" for name, _ in after)

    assert unload(server, "counted").status_code == 200
    time.sleep(2)
    gone = samples(server)
    assert gone["cmc_delta_loaded", "counted"] == 0
    assert gone["cmc_delta_tokens_total", "counted"] == 16


def samples(server: RunningServer) -> dict[tuple[str, str], float]:
    """What ``/metrics`` says, by name and delta; each series is there once."""
    families = text_string_to_metric_families(server.http.get("/metrics").text)
    found = [sample for family in families for sample in family.samples]
    assert len({(sample.name, *sorted(sample.labels.items())) for sample in found}) == len(found)
    return {(sample.name, sample.labels.get("delta", "")): sample.value for sample in found}


def test_requests_finish_on_the_version_that_they_chose(server: RunningServer, folders: dict[str, Path]) -> None:
    assert load(server, "x", folders["b"]).status_code == 201
    by_b = text_of(complete(server, "x", 60))
    assert load(server, "x", folders["a"]).status_code == 200
    by_a = text_of(complete(server, "x", 60))
    assert by_a != by_b
    body = {"model": "x", "prompt": "The colors are", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    for change, follows in ((lambda: load(server, "x", folders["b"]), by_b), (lambda: unload(server, "x"), None)):
        running = text_of(complete(server, "x", 60))
        parts: list[str] = []
        with server.http.stream("POST", COMPLETIONS, json={**body, "stream": True}) as stream:
            for line in stream.iter_lines():
                if line.startswith('data: {"'):
                    parts.append(json.loads(line[6:])["choices"][0]["text"])
                if len(parts) == 3:
                    assert change().status_code == 200
                    parts.append("")  # not again
        assert "".join(parts) == running
        if follows is not None:
            assert text_of(complete(server, "x", 60)) == follows


def test_only_the_admin_key_changes_anything(server: RunningServer, folders: dict[str, Path]) -> None:
    body = {"name": "y", "path": str(folders["a"])}
    for headers, status in (({}, 403), ({"Authorization": "Bearer wrong"}, 401)):
        assert server.http.post("/v1/deltas", json=body, headers=headers).status_code == status
        assert server.http.delete("/v1/deltas/x", headers=headers).status_code == status
    assert server.http.get("/v1/deltas", headers=ADMIN).status_code == 200  # one of vLLM's keys as well
    assert server.http.get("/v1/deltas", headers={"Authorization": f"Bearer {API_KEY}"}).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"name": "y"}, 400, "path"),
        ({"name": "y", "path": "a", "more": 1}, 400, "more"),
        ({"name": "a b", "path": "a"}, 400, "must match"),
        ({"name": "smollm2", "path": "{a}"}, 400, "served model"),
        ({"name": "y", "path": "{a}", "strength": 9}, 400, "strength"),
        ({"name": "y", "path": "/nowhere"}, 404, "does not exist"),
        ({"name": "y", "path": "{root}/../.."}, 400, "outside"),
        ({"name": "y", "path": "{strange}"}, 400, "knows only"),
        ({"name": "y", "path": "{large}"}, 409, "--delta-memory"),
        ([], 400, ""),
    ],
)
def test_what_cannot_be_loaded(
    server: RunningServer, root: Path, folders: dict[str, Path], body: Any, status: int, words: str
) -> None:
    if isinstance(body, dict) and "path" in body:
        places = {name: str(folder) for name, folder in folders.items()}
        body = body | {"path": body["path"].format(root=root, **places)}
    before = names(server)
    answer = server.http.post("/v1/deltas", json=body, headers=ADMIN)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]
    assert names(server) == before
    assert server.http.get("/ready").status_code == 200


def test_folders_broken_at_random(server: RunningServer, root: Path, folders: dict[str, Path]) -> None:
    where = ("--url", server.url, "--admin-key", "admin", "--work", root / "broken")
    run_benchmark("broken_deltas", "--delta", folders["a"], *where, "--count", "33", "--seed", "2")


def test_a_watched_folder(server: RunningServer, root: Path, folders: dict[str, Path]) -> None:
    watched = root / "watched"
    shutil.copytree(folders["a"], watched / "seen")
    wait_for(lambda: "seen" in names(server))
    assert complete(server, "seen").headers["x-cmc-deltas"].endswith(content_version(folders["a"]))
    shutil.copytree(folders["b"], watched / "seen", dirs_exist_ok=True)
    wait_for(lambda: server.http.get("/v1/deltas/seen").json()["version"] == content_version(folders["b"]))
    shutil.rmtree(watched / "seen")
    wait_for(lambda: "seen" not in names(server))


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)


def test_the_set_outlives_a_restart(
    server: RunningServer, root: Path, folders: dict[str, Path], demo_models: DemoModels, tmp_path: Path
) -> None:
    assert load(server, "stays", folders["b"], strength=0.5).status_code == 201
    expected = text_of(complete(server, "stays"))
    server.stop()
    again = start(root, demo_models.smollm2, tmp_path / "log")
    try:
        assert names(again) == ["stays"]
        assert again.http.get("/v1/deltas/stays").json()["strength"] == 0.5
        assert text_of(complete(again, "stays")) == expected
    finally:
        again.stop()
