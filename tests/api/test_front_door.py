"""The plugin in a small application with the routes of vLLM's, which answer with what reaches them."""

from __future__ import annotations

import asyncio
import json
import logging
from argparse import Namespace
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.testclient import TestClient
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

from cmc_server.api import middleware
from cmc_server.api.controls import STEERED_ROUTES
from cmc_server.api.routes import DeltaEndpoints
from cmc_server.config import ADDITIONAL_CONFIG_KEY
from cmc_server.delta.manifest import DeltaManifest
from cmc_server.delta.prompt import PromptEncoder
from cmc_server.delta.store import content_version
from cmc_server.integrations.request_args import RequestControls
from cmc_server.vocab.surface import load_tokenizer

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hello"}]


class Engine:
    """As much of vLLM's engine client as the plugin touches; ``ranks`` is what the workers report."""

    def __init__(self, ranks: Any) -> None:
        self.ranks = ranks
        self.errored = False
        self.stopped = False
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=8))

    async def collective_rpc(self, name: str) -> Any:
        assert name == "cmc_status"
        if isinstance(self.ranks, Exception):
            raise self.ranks
        return self.ranks

    def generate(self) -> None: ...

    def shutdown(self, timeout: float | None = None) -> None:
        self.stopped = True


class Models:
    """vLLM's list of served models."""

    base_model_paths = (SimpleNamespace(name="base"), SimpleNamespace(name="alias"))
    lora_requests = {"adapter": object()}  # noqa: RUF012

    async def show_available_models(self) -> ModelList:
        return ModelList(data=[ModelCard(id=name, root="/base") for name in ("base", "alias")])


def application(plugin: DeltaEndpoints) -> FastAPI:
    """Routes as vLLM has them, then the plugin, then authentication around both: vLLM's own order."""
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat(request: ChatCompletionRequest, raw: Request) -> Any:
        return await echo(raw)

    @app.post("/v1/completions")
    @app.post("/v1/responses")
    @app.post("/v1/messages")
    @app.post("/v1/messages/count_tokens")
    @app.post("/tokenize")
    @app.post("/v1/audio/transcriptions")
    async def echo(raw: Request) -> Any:
        body = await raw.body()
        if raw.query_params.get("fail"):
            raise RuntimeError("broken")
        reply = {"model": "base", "received": body.decode("utf-8", "replace")}
        if raw.query_params.get("stream"):
            return StreamingResponse(events(reply, raw.query_params["stream"]), media_type="text/event-stream")
        return JSONResponse(reply)

    plugin.attach_router(app)
    app.add_middleware(AuthenticationMiddleware, tokens=["key"])
    app.state.openai_serving_models = Models()
    return app


async def events(reply: dict[str, Any], kind: str) -> AsyncIterator[str]:
    yield f"event: response.created\ndata: {json.dumps({'response': reply})}\n\n"
    if kind == "broken":
        raise RuntimeError("broken")
    yield f"data: {json.dumps(reply)}\n\n"
    yield "data: [DONE]\n\n"


@pytest.fixture(scope="module")
def deltas(tiny_delta: Path, picky_delta: Path) -> dict[str, Path]:
    return {"tiny": tiny_delta, "picky": picky_delta}


@pytest.fixture(scope="module")
def versions(deltas: dict[str, Path]) -> dict[str, str]:
    return {name: content_version(folder) for name, folder in deltas.items()}


@pytest.fixture
def rank(versions: dict[str, str]) -> dict[str, Any]:
    """A worker's report."""
    details = {"num_parameters": 1, "memory_bytes": 2, "dtype": "float32", "coverage": 1.0, "match": {"exact": 3}}
    reports = [{"name": name, "version": version, **details} for name, version in versions.items()]
    return {"processor": True, "runner": "v1", "max_delta_seqs": 8, "deltas": reports}


@pytest.fixture
def engine(rank: dict[str, Any]) -> Engine:
    return Engine([rank])


def start(engine: Engine, deltas: dict[str, Path], **settings: Any) -> tuple[FastAPI, DeltaEndpoints]:
    plugin = DeltaEndpoints()
    assert isinstance(plugin, EndpointPlugin)
    app = application(plugin)
    sources = [{"name": name, "path": str(folder)} for name, folder in deltas.items()]
    args = Namespace(
        additional_config={ADDITIONAL_CONFIG_KEY: {"deltas": sources, "reserved_token_id": 3, **settings}},
        disable_uvicorn_access_log=False,
        api_server_count=None,
    )
    asyncio.run(plugin.init_state(engine, app.state, args))
    return app, plugin


@pytest.fixture
def client(engine: Engine, deltas: dict[str, Path]) -> Iterator[TestClient]:
    app, _ = start(engine, deltas)
    with TestClient(app, headers={"Authorization": "Bearer key"}, raise_server_exceptions=False) as client:
        yield client


def received(answer: Any) -> dict[str, Any]:
    """The body that came through the front door."""
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = json.loads(answer.json()["received"])
    return document


def sent_controls(answer: Any) -> RequestControls:
    return RequestControls.model_validate_json(received(answer)["vllm_xargs"]["cmc"])


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"base",  "messages": [] }',
        b'{"model":"alias", "messages": [{"role":"user","content":"cmc \\u0063"}]}',
        b'{"model":"adapter","messages":[]}',
        b'{"model":"unknown","messages":[]}',
        b'{"messages": []}',
    ],
)
def test_base_requests_pass_byte_for_byte(client: TestClient, body: bytes) -> None:
    answer = client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.json()["received"].encode() == body
    assert answer.json()["model"] == "base"
    assert answer.headers["x-cmc-deltas"] == "none"


@pytest.mark.parametrize("body", [b"not json", b"[1]", b"", b"\xff", b'{"cmc": ' + b"9" * 5000 + b"}"])
def test_what_is_no_json_object_is_left_to_vllm(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/completions", content=body)
    assert answer.json()["received"] == body.decode("utf-8", "replace")


def test_absurd_nesting_is_refused_or_passed_on(client: TestClient) -> None:
    for depth in (100, 900, 5_000, 200_000):
        body = b'{"model":"tiny","prompt":' + b"[" * depth + b"]" * depth + b"}"
        answer = client.post("/v1/completions", content=body)
        assert answer.status_code in (200, 400), (depth, answer.text[:300])


def test_a_form_is_not_read(client: TestClient) -> None:
    answer = client.post("/v1/audio/transcriptions", files={"file": b"cmc"}, data={"model": "tiny"})
    assert "cmc" in answer.json()["received"]


def test_a_delta_as_model_id(client: TestClient, versions: dict[str, str], tiny_delta: Path) -> None:
    answer = client.post(CHAT, json={"model": "tiny@0.8", "messages": USER, "n": 2})
    assert answer.headers["x-cmc-deltas"] == f"tiny@0.8#{versions['tiny']}"
    assert answer.json()["model"] == "tiny@0.8"
    assert int(answer.headers["content-length"]) == len(answer.content)
    body = received(answer)
    assert (body["model"], body["n"], body["messages"]) == ("base", 2, USER)
    (delta,) = sent_controls(answer).deltas
    assert (delta.name, delta.strength, delta.version) == ("tiny", 0.8, versions["tiny"])
    encoder = PromptEncoder(load_tokenizer(str(tiny_delta)), DeltaManifest())
    assert delta.prompt_ids == tuple(encoder.encode("<|user|>\nHello\n<|assistant|>\n"))


def test_deltas_in_the_body(client: TestClient, versions: dict[str, str]) -> None:
    cmc = {"deltas": [{"name": "picky"}, {"name": "tiny", "strength": 0}]}
    answer = client.post(CHAT, json={"model": "alias", "messages": USER, "cmc": cmc, "vllm_xargs": {"mine": 1}})
    assert answer.headers["x-cmc-deltas"] == f"picky@0.5#{versions['picky']},tiny@0#{versions['tiny']}"
    assert answer.json()["model"] == "base"  # as vLLM answered; the client did not ask for a delta's id
    assert received(answer)["vllm_xargs"]["mine"] == 1
    assert "cmc" not in received(answer)
    controls = sent_controls(answer)
    assert [delta.name for delta in controls.deltas] == ["picky"]
    assert controls.unmapped == "preserve"


@pytest.mark.parametrize("body", [{"cmc": {"deltas": []}, "model": "base"}, {"model": "tiny@0"}])
def test_the_base_model_asked_for_through_controls(client: TestClient, body: dict[str, Any]) -> None:
    answer = client.post(CHAT, json={"messages": USER, **body})
    assert received(answer) == {"messages": USER, "model": "base"}


def test_completions_send_no_prompt_ids(client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"model": "tiny", "prompt": [1, 2, 3]})
    assert sent_controls(answer).deltas[0].prompt_ids is None


@pytest.mark.parametrize(
    ("route", "body"),
    [("/v1/responses", {"input": "Hello"}), ("/v1/messages", {"messages": USER, "max_tokens": 5})],
)
def test_other_chats_are_encoded(client: TestClient, route: str, body: dict[str, Any]) -> None:
    chat = sent_controls(client.post(CHAT, json={"model": "tiny", "messages": USER}))
    assert sent_controls(client.post(route, json={"model": "tiny", **body})) == chat


def test_streams_repeat_the_model_that_was_asked_for(client: TestClient) -> None:
    answer = client.post("/v1/responses?stream=1", json={"model": "tiny@1", "input": "Hello"})
    data = [json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: {")]
    assert [data[0]["response"]["model"], data[1]["model"]] == ["tiny@1", "tiny@1"]
    assert answer.text.endswith("data: [DONE]\n\n")
    untouched = client.post("/v1/responses?stream=1", json={"model": "base", "input": "Hello"})
    assert untouched.text.count('"model": "base"') == 2


def test_a_stream_that_breaks_off_ends_with_an_error(client: TestClient) -> None:
    answer = client.post("/v1/responses?stream=broken", json={"model": "tiny", "input": "Hello"})
    assert answer.text.split("\n\n")[-2].startswith("event: error\n")


def test_a_crash_is_still_stamped(client: TestClient, versions: dict[str, str]) -> None:
    answer = client.post("/v1/completions?fail=1", json={"model": "tiny", "prompt": "a"})
    assert answer.status_code == 500
    assert answer.headers["x-cmc-deltas"] == f"tiny@1#{versions['tiny']}"


@pytest.mark.parametrize("stream", [False, True])
def test_a_mistake_is_a_400_in_openai_s_shape(client: TestClient, stream: bool) -> None:
    body = {"model": "base", "messages": USER, "stream": stream, "cmc": {"deltas": [{"name": "nope"}]}}
    answer = client.post(CHAT, json=body)
    assert answer.status_code == 400
    assert answer.headers["x-cmc-deltas"] == "none"
    error = answer.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("BadRequestError", 400, "cmc.deltas[0].name")
    assert "tiny, picky" in error["message"]


@pytest.mark.parametrize("route", ["/v1/messages", "/v1/messages/count_tokens"])
def test_a_mistake_in_anthropic_s_shape(client: TestClient, route: str) -> None:
    answer = client.post(route, json={"model": "tiny@9", "messages": USER, "max_tokens": 5})
    assert answer.status_code == 400
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "BadRequestError"


def test_not_a_number_as_json_allows_it_in_python(client: TestClient) -> None:
    body = b'{"model": "base", "messages": [], "cmc": {"deltas": [{"name": "tiny", "strength": NaN}]}}'
    answer = client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "cmc.deltas[0].strength")


def test_other_routes_refuse_deltas(client: TestClient) -> None:
    assert client.post("/tokenize", json={"model": "base", "prompt": "cmc"}).status_code == 200
    for body in ({"model": "tiny", "prompt": "a"}, {"cmc": {}}, {"vllm_xargs": {"cmc": 1}}):
        assert client.post("/tokenize", json=body).status_code == 400


def test_what_a_template_cannot_render_is_a_400(client: TestClient) -> None:
    answer = client.post(CHAT, json={"model": "picky", "messages": USER * 3})
    assert answer.status_code == 400
    assert "picky" in answer.json()["error"]["message"]


@pytest.mark.parametrize("text", ["\ud83d", "a\ud83d b", "\x00", "👩‍👩‍👧", "<|im_end|>", ""])
def test_odd_text_is_served_or_refused(client: TestClient, text: str) -> None:
    answer = client.post(
        CHAT,
        content=json.dumps({"model": "tiny", "messages": [{"role": "user", "content": text}]}),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == (400 if "\ud83d" in text else 200)


def test_a_body_beyond_all_measure(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "MAX_BODY_BYTES", 100)
    assert client.post(CHAT, json={"model": "base", "messages": [], "x": "a" * 100}).status_code == 413
    assert client.post(CHAT, json={"model": "base", "messages": []}).status_code == 200


def test_authentication_comes_first(client: TestClient) -> None:
    for body in ({"cmc": 5}, {"model": "tiny", "messages": USER}):
        answer = client.post(CHAT, json=body, headers={"Authorization": "Bearer wrong"})
        assert answer.status_code == 401
        assert answer.headers["x-cmc-deltas"] == "none"
    assert client.get("/v1/deltas", headers={"Authorization": ""}).status_code == 401
    assert client.get("/ready", headers={"Authorization": ""}).status_code == 200


def test_the_list_of_models(client: TestClient) -> None:
    models = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    assert list(models) == ["base", "alias", "tiny", "picky"]
    assert models["tiny"]["parent"] == "base"
    assert models["base"]["parent"] is None
    for model_id in ("base", "tiny", "tiny@0.8", "tiny@0.8+picky"):
        assert client.get(f"/v1/models/{model_id}").json()["id"] == model_id
    for model_id in ("nope", "tiny@", "tiny+nope", "org/nope"):
        answer = client.get(f"/v1/models/{model_id}")
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "NotFoundError"


def test_the_list_of_deltas(client: TestClient, versions: dict[str, str]) -> None:
    listing = client.get("/v1/deltas").json()
    assert [delta["name"] for delta in listing["data"]] == ["tiny", "picky"]
    picky = client.get("/v1/deltas/picky").json()
    assert picky == listing["data"][1]
    assert picky["version"] == versions["picky"]
    assert picky["strength"] == 0.5
    assert picky["advised_range"] == [0.0, 2.0]
    assert picky["unmapped"] == "preserve"
    assert picky["context_length"] == 64
    assert (picky["state"], picky["coverage"], picky["match"]) == ("loaded", 1.0, {"exact": 3})
    answer = client.get("/v1/deltas/nope")
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "name")


def test_the_field_is_in_the_schema(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert schemas["ChatCompletionRequest"]["properties"]["cmc"] == {"$ref": "#/components/schemas/CmcControls"}
    assert set(schemas["CmcControls"]["properties"]) == {"deltas", "unmapped"}
    assert schemas["CmcControls"]["properties"]["deltas"]["items"] == {"$ref": "#/components/schemas/DeltaChoice"}


def test_ready(client: TestClient) -> None:
    assert client.get("/ready").json() == {"status": "ready", "deltas": ["tiny", "picky"]}


def broken_ranks(rank: dict[str, Any]) -> list[tuple[Any, str]]:
    other = {**rank, "deltas": [{**rank["deltas"][0], "version": "0" * 12}, rank["deltas"][1]]}
    return [
        (RuntimeError("no such method"), "no such method"),
        ([], "without the delta processor"),
        ([{"processor": False, "runner": None, "deltas": []}], "without the delta processor"),
        ([rank, {"processor": False, "runner": None, "deltas": []}], "without the delta processor"),
        ([None], "without the delta processor"),
        ([{**rank, "deltas": []}], "no worker has loaded"),
        ([other], "the workers have loaded"),
        ([rank, other], "the workers have loaded"),
    ]


@pytest.mark.parametrize("index", range(8))
def test_a_half_wired_server_never_serves(rank: dict[str, Any], deltas: dict[str, Path], index: int) -> None:
    ranks, reason = broken_ranks(rank)[index]
    engine = Engine(ranks)
    app, _ = start(engine, deltas)
    client = TestClient(app, headers={"Authorization": "Bearer key"})
    answer = client.get("/ready")
    assert answer.status_code == 503
    assert reason in answer.json()["reason"]
    for route in STEERED_ROUTES:
        for model in ("base", "tiny"):
            answer = client.post(route, json={"model": model, "messages": USER, "input": "a", "prompt": "a"})
            assert answer.status_code == 503
            assert answer.headers["retry-after"]
    engine.ranks = [rank, {**rank, "deltas": []}]  # what was missing arrives; the second rank does not sample
    assert client.get("/ready").status_code == 200
    assert client.post(CHAT, json={"model": "tiny", "messages": USER}).status_code == 200


def test_shutting_down_and_failing(engine: Engine, deltas: dict[str, Path]) -> None:
    app, _ = start(engine, deltas)
    client = TestClient(app, headers={"Authorization": "Bearer key"})
    assert client.get("/ready").status_code == 200
    engine.errored = True
    assert "failed" in client.get("/ready").json()["reason"]
    engine.errored = False
    engine.shutdown(timeout=1)
    assert engine.stopped
    assert "shutting down" in client.get("/ready").json()["reason"]
    assert client.post(CHAT, json={"model": "base", "messages": USER}).status_code == 503


def test_rows_are_limited_only_where_the_workers_cannot_steer_all(
    rank: dict[str, Any], deltas: dict[str, Path]
) -> None:
    for rows, status in ((8, 200), (4, 400)):
        app, _ = start(Engine([{**rank, "max_delta_seqs": rows}]), deltas)
        client = TestClient(app, headers={"Authorization": "Bearer key"})
        answer = client.post(CHAT, json={"model": "tiny", "messages": USER, "n": 5})
        assert answer.status_code == status


def test_a_server_without_deltas(rank: dict[str, Any]) -> None:
    app, _ = start(Engine([{**rank, "deltas": []}]), {})
    client = TestClient(app, headers={"Authorization": "Bearer key"})
    assert client.get("/ready").status_code == 200
    assert client.get("/v1/deltas").json() == {"object": "list", "data": []}
    assert client.post(CHAT, json={"model": "base", "messages": USER}).status_code == 200
    answer = client.post(CHAT, json={"model": "base", "messages": USER, "cmc": {"deltas": [{"name": "tiny"}]}})
    assert "none is loaded" in answer.json()["error"]["message"]


def test_the_access_log(client: TestClient, versions: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("cmc_server.access")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger="cmc_server.access"):
            client.post(CHAT, json={"model": "tiny", "messages": USER}, headers={"x-request-id": "r1"})
            client.post(CHAT, json={"model": "tiny@9", "messages": USER})
            client.post("/tokenize", json={"prompt": "a"})
    finally:
        logger.removeHandler(caplog.handler)
    assert list(dict.fromkeys(caplog.messages)) == [
        f"r1 {CHAT} 200 deltas=tiny@1#{versions['tiny']}",
        f"- {CHAT} 400 deltas=none",
    ]


def test_metrics_count_what_happened(client: TestClient) -> None:
    from prometheus_client import REGISTRY

    def value(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, labels) or 0.0

    before = (
        value("cmc_requests_total", delta="tiny"),
        value("cmc_requests_total", delta="none"),
        value("cmc_request_errors_total", reason="controls"),
    )
    client.post(CHAT, json={"model": "tiny", "messages": USER})
    client.post(CHAT, json={"model": "base", "messages": USER})
    client.post(CHAT, json={"model": "tiny@9", "messages": USER})
    client.post("/tokenize", json={"prompt": "a"})
    after = (
        value("cmc_requests_total", delta="tiny"),
        value("cmc_requests_total", delta="none"),
        value("cmc_request_errors_total", reason="controls"),
    )
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 1]
