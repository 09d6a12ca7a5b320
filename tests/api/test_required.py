"""A required delta on the real server: no route, header, model id or engine argument gets around it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from running_server import RunningServer, text_of
from tiny_models import make_delta

if TYPE_CHECKING:
    from conftest import DemoModels

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

#: Something for every route to find its fields in.
ANYTHING: dict[str, Any] = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "Name three colors."}],
    "prompt": "The colors are",
    "input": "Name three colors.",
    "token_ids": [1, 2, 3],
    "tokens": [1, 2, 3],
    "sampling_params": {"max_tokens": 4, "temperature": 0},
    "temperature": 0,
}
LIMITS = {"max_tokens": 4, "max_completion_tokens": 4, "max_output_tokens": 4}
#: Routes that answer without generating anything.
QUIET = {"/tokenize", "/detokenize", "/v1/messages/count_tokens", "/ping", "/is_scaling_elastic_ep"}


@pytest.fixture(scope="module")
def server(demo_models: DemoModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    root = tmp_path_factory.mktemp("deltas")
    names = ("must", "may")
    folders = [make_delta(root / name, demo_models.smollm2, seed=seed) for seed, name in enumerate(names)]
    arguments = [
        *[str(demo_models.smollm2), "--served-model-name", "smollm2", "alias", "--enforce-eager", "--dtype", "float32"],
        *["--max-model-len", "512", *[f"--delta={folder.name}={folder}" for folder in folders]],
        *["--require-delta", "must@1.5", "--default-delta", "may@0.5"],
    ]
    running = RunningServer(arguments, tmp_path_factory.mktemp("server") / "log")
    yield running.wait_until_ready()
    running.stop()


def names(answer: Any) -> list[str]:
    value: str = answer.headers["x-cmc-deltas"]
    return [part.partition("#")[0] for part in value.split(",")]


def post(server: RunningServer, route: str, headers: dict[str, str] | None = None, **changes: Any) -> Any:
    return server.http.post(route, json={**ANYTHING, **LIMITS, **changes}, headers=headers)


def test_every_answer_carries_it(server: RunningServer) -> None:
    route = "/v1/chat/completions"
    assert names(post(server, route)) == ["must@1.5", "may@0.5"]
    assert names(post(server, route, model="alias")) == ["must@1.5", "may@0.5"]
    steered = post(server, route, cmc={"deltas": []})
    assert names(steered) == ["must@1.5"]
    assert names(post(server, route, model="may@0")) == ["must@1.5", "may@0"]
    assert text_of(post(server, route, model="may@0+must@1.5")) == text_of(steered)
    assert post(server, route, model="must@0").status_code == 400
    assert post(server, route, model="must").status_code == 400


def test_no_route_gets_around_it(server: RunningServer) -> None:
    paths = server.http.get("/openapi.json").json()["paths"]
    routes = [path for path, operations in paths.items() if "post" in operations and "{" not in path]
    assert len(routes) > 8
    through = set()
    for route in routes:
        for changes in ({}, {"stream": True}, {"n": 2, "logprobs": None}):
            answer = post(server, route, **changes)
            if answer.status_code < 400 and "must@1.5" not in names(answer):
                through.add(route)
    assert through <= QUIET


@pytest.mark.parametrize(
    "changes",
    [
        {"vllm_xargs": {"cmc": '{"deltas": []}'}},
        {"vllm_xargs": {"cmc_off": 1}},
        {"prompt_logprobs": 1},
        {"echo": True, "logprobs": 1},
        {"use_beam_search": True, "n": 2},
    ],
)
def test_no_argument_gets_around_it(server: RunningServer, changes: dict[str, Any]) -> None:
    assert post(server, "/v1/completions", **changes).status_code == 400


@pytest.mark.parametrize(
    "headers", [{"x-cmc-deltas": "none"}, {"content-type": "text/plain"}, {"content-encoding": "identity"}]
)
def test_no_header_gets_around_it(server: RunningServer, headers: dict[str, str]) -> None:
    answer = post(server, "/v1/completions", headers=headers)
    assert answer.status_code >= 400 or "must@1.5" in names(answer)


def test_no_way_of_writing_gets_around_it(server: RunningServer, tmp_path: Path) -> None:
    body = '{"model": "smollm2", "prompt": "a", "max_tokens": 4}'
    headers = {"content-type": "application/json"}
    for content in (body.encode("utf-16"), b"\xef\xbb\xbf" + body.encode(), body.replace("{", "[{", 1).encode()):
        answer = server.http.post("/v1/completions", content=content, headers=headers)
        assert answer.status_code >= 400 or "must@1.5" in names(answer)
    for route in ("/v1/completions/", "//v1/completions", "/v1//completions", "/V1/completions"):
        answer = server.http.post(route, content=body, headers=headers)
        assert answer.status_code >= 300 or "must@1.5" in names(answer)
