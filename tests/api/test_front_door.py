"""The plugin in a small application with the routes of vLLM's, which answer with what reaches them."""

from __future__ import annotations

import json
import logging
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from plugin_app import HEADERS, Engine, start
from starlette.testclient import TestClient

from cmc_server.api import middleware
from cmc_server.delta.manifest import DeltaManifest
from cmc_server.delta.prompt import PromptEncoder
from cmc_server.integrations.request_args import MAX_REQUEST_ID, RequestControls
from cmc_server.vocab.surface import load_tokenizer

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hello"}]


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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-le"])
@pytest.mark.parametrize(
    "text", ['{"model": "ti\\u006ey"}', '{"model": "base", "c\\u006dc": {}}', '{"a": 1, "cmc": {}}']
)
def test_no_way_of_writing_hides_the_controls(client: TestClient, text: str, encoding: str) -> None:
    assert client.post("/tokenize", content=text.encode(encoding)).status_code == 400


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
    same = {"x-request-id": "r1"}
    chat = sent_controls(client.post(CHAT, json={"model": "tiny", "messages": USER}, headers=same))
    assert sent_controls(client.post(route, json={"model": "tiny", **body}, headers=same)) == chat


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
    first, second = dict.fromkeys(caplog.messages)
    assert re.fullmatch(rf"r1 {CHAT} 200 deltas=tiny@1#{versions['tiny']} seconds=\d+\.\d+", first)
    assert re.fullmatch(rf"[0-9a-f]{{32}} {CHAT} 400 deltas=none seconds=\d+\.\d+", second)


def test_the_access_log_as_json(
    engine: Engine, deltas: dict[str, Path], versions: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    app = start(engine, deltas, access_log_format="json")
    with TestClient(app, headers=HEADERS, raise_server_exceptions=False) as client:
        capsys.readouterr()
        client.post(CHAT, json={"model": "tiny", "messages": USER}, headers={"x-request-id": 'r"1'})
        client.post("/v1/completions", json={"model": "base", "prompt": "a"}, params={"fail": 1})
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first.pop("seconds") >= 0
    assert datetime.fromisoformat(first.pop("time")).tzinfo is not None
    tiny = f"tiny@1#{versions['tiny']}"
    assert first == {"request_id": 'r"1', "route": CHAT, "status": 200, "deltas": tiny}
    assert (second["status"], second["deltas"], len(second["request_id"])) == (500, "none", 32)


def test_the_workers_learn_the_request_s_id(client: TestClient) -> None:
    def sent(headers: dict[str, str]) -> str | None:
        return sent_controls(client.post(CHAT, json={"model": "tiny", "messages": USER}, headers=headers)).request_id

    assert sent({"x-request-id": "r1"}) == "r1"
    assert sent({"x-request-id": "r" * 1000}) == "r" * MAX_REQUEST_ID
    made_up = sent({})
    assert made_up is not None
    assert len(made_up) == 32


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
