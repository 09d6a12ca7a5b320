"""The real server, asked as clients ask it: OpenAI's Python client and plain HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from running_server import API_KEY, RunningServer, events_of, new_text, text_of
from safetensors.numpy import load_file, save_file
from tiny_models import make_delta

from cmc_server.delta.store import content_version
from cmc_server.vocab.surface import load_tokenizer

if TYPE_CHECKING:
    from conftest import DemoModels

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

CHAT, COMPLETIONS, RESPONSES, MESSAGES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
)
QUESTION = [{"role": "user", "content": "Name three colors."}]
#: The same question on every route, with the parameter that limits the answer.
ASK: dict[str, dict[str, Any]] = {
    CHAT: {"messages": QUESTION, "max_tokens": 8, "temperature": 0},
    COMPLETIONS: {"prompt": "The colors are", "max_tokens": 8, "temperature": 0},
    RESPONSES: {"input": "Name three colors.", "max_output_tokens": 8, "temperature": 0},
    MESSAGES: {"messages": QUESTION, "max_tokens": 8, "temperature": 0},
}


@pytest.fixture(scope="module")
def folders(demo_models: DemoModels, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two random deltas, and one that fails as soon as it reads the word "colors"."""
    root = tmp_path_factory.mktemp("deltas")
    made = {
        name: make_delta(root / name, demo_models.smollm2, seed=seed) for seed, name in enumerate(("tiny", "other"))
    }
    made["broken"] = make_delta(root / "broken", demo_models.smollm2)
    weights = made["broken"] / "model.safetensors"
    tensors = load_file(weights)
    (token,) = load_tokenizer(str(demo_models.smollm2)).encode(" colors", add_special_tokens=False)
    tensors["model.embed_tokens.weight"][token] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    return made


@pytest.fixture(scope="module")
def server(
    demo_models: DemoModels, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    deltas = [f"--delta={name}={folder}" for name, folder in folders.items()]
    arguments = [
        *[str(demo_models.smollm2), "--served-model-name", "smollm2", "alias", "--enforce-eager"],
        *["--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "16", "--max-delta-seqs", "4"],
        # Without free whitespace in JSON, of which a random delta may want a lot.
        *["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'],
        *["--enable-auto-tool-choice", "--tool-call-parser", "hermes", *deltas],
    ]
    with pytest.MonkeyPatch.context() as patch:
        # Weights that are not finite are refused; here they stand for a delta that fails while it runs.
        patch.setenv("CMC_TEST_ANY_WEIGHTS", "1")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "cpu_engine"))
        running = RunningServer(arguments, tmp_path_factory.mktemp("server") / "log")
    yield running.wait_until_ready()
    assert running.stop() == 0, running.log.read_text(errors="replace")[-4000:]


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0)


def ask(server: RunningServer, route: str, model: str, **changes: Any) -> httpx.Response:
    return server.http.post(route, json={**ASK[route], "model": model, **changes})


def cmc(*deltas: tuple[str, float], **rest: Any) -> dict[str, Any]:
    return {"deltas": [{"name": name, "strength": strength} for name, strength in deltas], **rest}


@pytest.mark.parametrize("route", ASK)
def test_a_delta_steers_every_route(server: RunningServer, folders: dict[str, Path], route: str) -> None:
    version = content_version(folders["tiny"])
    base = ask(server, route, "smollm2")
    assert base.headers["x-cmc-deltas"] == "none"
    steered = ask(server, route, "tiny@1.5")
    assert text_of(steered) != text_of(base)
    assert steered.headers["x-cmc-deltas"] == f"tiny@1.5#{version}"
    assert steered.json()["model"] == "tiny@1.5"
    by_field = ask(server, route, "smollm2", cmc=cmc(("tiny", 1.5)))
    assert text_of(by_field) == text_of(steered)
    assert by_field.json()["model"] == "smollm2"
    off = ask(server, route, "tiny@0")
    assert text_of(off) == text_of(base)
    assert off.headers["x-cmc-deltas"] == f"tiny@0#{version}"
    assert text_of(ask(server, route, "smollm2", cmc={"deltas": []})) == text_of(base)


@pytest.mark.parametrize("route", ASK)
def test_streams_say_the_same(server: RunningServer, route: str) -> None:
    whole = text_of(ask(server, route, "tiny@1+other@0.5"))
    stream = ask(server, route, "tiny@1+other@0.5", stream=True)
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert stream.headers["x-cmc-deltas"].startswith("tiny@1#")
    events = events_of(stream)
    models = [holder["model"] for event in events for holder in holders(event) if "model" in holder]
    assert models
    assert set(models) == {"tiny@1+other@0.5"}
    assert "".join(map(new_text, events)) == whole


def holders(event: dict[str, Any]) -> list[dict[str, Any]]:
    return [event, *(event[key] for key in ("response", "message") if isinstance(event.get(key), dict))]


def test_openai_client(client: openai.OpenAI) -> None:
    def complete(model: str, **options: Any) -> str:
        answer = client.chat.completions.create(
            model=model,
            messages=QUESTION,
            max_tokens=8,
            temperature=0,
            **options,  # type: ignore[arg-type]
        )
        assert answer.model == model
        return answer.choices[0].message.content or ""

    assert complete("tiny@1.5") == complete("smollm2", extra_body={"cmc": cmc(("tiny", 1.5))}) != complete("smollm2")
    response = client.responses.create(model="tiny@0.5", input="Name three colors.", max_output_tokens=8)
    assert response.model == "tiny@0.5"
    chunks = list(client.completions.create(model="tiny", prompt="The colors are", max_tokens=4, stream=True))
    assert {chunk.model for chunk in chunks} == {"tiny"}
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=QUESTION, max_tokens=2)  # type: ignore[arg-type]
    assert raw.headers["x-cmc-deltas"].startswith("tiny@1#")
    ids = [model.id for model in client.models.list()]
    assert ids == ["smollm2", "alias", "tiny", "other", "broken"]
    assert client.models.retrieve("tiny@0.8").id == "tiny@0.8"
    assert client.models.retrieve("tiny").model_extra["parent"] == "smollm2"  # type: ignore[index]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")
    with pytest.raises(openai.NotFoundError):
        complete("nope")
    with pytest.raises(openai.BadRequestError) as caught:
        complete("tiny@9")
    assert caught.value.param == "model"


def test_several_choices_and_prompts(server: RunningServer) -> None:
    options = {"temperature": 1, "seed": 7, "n": 2, "max_tokens": 6}
    first, again = (ask(server, CHAT, "tiny", **options).json()["choices"] for _ in range(2))
    assert [choice["message"]["content"] for choice in first] == [choice["message"]["content"] for choice in again]
    assert len(first) == 2
    prompts = {"prompt": ["The colors are", "One, two,"]}
    both = ask(server, COMPLETIONS, "tiny", **prompts).json()["choices"]
    assert both[0]["text"] == text_of(ask(server, COMPLETIONS, "tiny"))
    ids = server.http.post("/tokenize", json={"model": "smollm2", "prompt": "The colors are"}).json()["tokens"]
    assert text_of(ask(server, COMPLETIONS, "tiny", prompt=ids)) == both[0]["text"]


def test_log_probabilities_are_the_final_ones(server: RunningServer) -> None:
    def first(model: str) -> dict[str, Any]:
        answer = ask(server, CHAT, model, logprobs=True, top_logprobs=5, max_tokens=1)
        return dict(answer.json()["choices"][0]["logprobs"]["content"][0])

    steered, base = first("tiny@3"), first("smollm2")
    assert steered["token"] == steered["top_logprobs"][0]["token"]
    assert steered["top_logprobs"] != base["top_logprobs"]
    assert first("tiny@0") == base
    completion = ask(server, COMPLETIONS, "tiny@3", logprobs=2).json()["choices"][0]["logprobs"]
    for token, top in zip(completion["tokens"], completion["top_logprobs"], strict=True):
        assert max(top, key=top.__getitem__) == token


COLOR = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "green"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["color", "count"],
    "additionalProperties": False,
}


def test_structured_outputs_hold_under_a_delta(server: RunningServer) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "color", "schema": COLOR}}
    for model in ("smollm2", "tiny@2"):
        answer = json.loads(text_of(ask(server, CHAT, model, response_format=form, max_tokens=60)))
        assert answer["color"] in ("red", "green")
        assert 0 <= answer["count"] <= 9


def test_tools_hold_under_a_delta(server: RunningServer) -> None:
    tool = {"type": "function", "function": {"name": "paint", "parameters": COLOR, "strict": True}}
    for model in ("smollm2", "tiny@1"):
        answer = ask(server, CHAT, model, tools=[tool], tool_choice="required", max_tokens=80).json()
        call = answer["choices"][0]["message"]["tool_calls"][0]["function"]
        assert call["name"] == "paint"
        assert json.loads(call["arguments"])["color"] in ("red", "green")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"cmc": cmc(("nope", 1))}, "cmc.deltas[0].name"),
    ({"cmc": cmc(("tiny", 1), ("tiny", 1))}, "cmc.deltas[1].name"),
    ({"cmc": {"deltas": [{"name": "tiny", "strength": "1"}]}}, "cmc.deltas[0].strength"),
    ({"cmc": cmc(("tiny", 5))}, "cmc.deltas[0].strength"),
    ({"cmc": cmc(*[("tiny", 1)] * 5)}, "cmc.deltas"),
    ({"cmc": None}, "cmc"),
    ({"cmc": {"delta": []}}, "cmc.delta"),
    ({"model": "tiny@"}, "model"),
    ({"model": "tiny+nope"}, "model"),
    ({"model": "tiny", "cmc": {"deltas": []}}, "cmc"),
    ({"vllm_xargs": {"cmc": "{}"}}, "vllm_xargs"),
    ({"model": "tiny", "use_beam_search": True}, "use_beam_search"),
    ({"model": "tiny", "prompt_logprobs": 1}, "prompt_logprobs"),
    ({"model": "tiny", "echo": True, "logprobs": 1}, "echo"),
    ({"model": "tiny", "n": 5}, "n"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("index", range(len(WRONG)))
def test_mistakes_are_real_400s(server: RunningServer, index: int, stream: bool) -> None:
    changes, param = WRONG[index]
    for route in (CHAT, COMPLETIONS):
        answer = server.http.post(route, json={"model": "smollm2", **ASK[route], "stream": stream, **changes})
        assert answer.status_code == 400, answer.text
        assert answer.headers["x-cmc-deltas"] == "none"
        error = answer.json()["error"]
        assert (error["param"], error["type"], error["code"]) == (param, "BadRequestError", 400)


@pytest.mark.parametrize(
    ("route", "changes"),
    [
        (COMPLETIONS, {"suffix": "end"}),
        (COMPLETIONS, {"prompt_embeds": "AAAA"}),
        (RESPONSES, {"previous_response_id": "resp_1"}),
        (RESPONSES, {"tools": [{"type": "web_search_preview"}]}),
        (RESPONSES, {"background": True}),
    ],
)
def test_options_without_a_delta_s_support(server: RunningServer, route: str, changes: dict[str, Any]) -> None:
    for stream in (False, True):
        answer = ask(server, route, "tiny", stream=stream, **changes)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(changes)))


def test_not_a_number(server: RunningServer) -> None:
    for literal in ("NaN", "Infinity", "-Infinity"):
        body = '{"model":"smollm2","messages":[],"cmc":{"deltas":[{"name":"tiny","strength":' + literal + "}]}}"
        answer = server.http.post(CHAT, content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "cmc.deltas[0].strength")


@pytest.mark.parametrize(
    "route", ["/tokenize", "/v1/chat/completions/batch", "/v1/messages/count_tokens", "/invocations", "/nothing"]
)
def test_other_routes_carry_no_delta(server: RunningServer, route: str) -> None:
    for body in ({"model": "tiny"}, {"model": "smollm2", "cmc": {}}):
        answer = server.http.post(route, json={**ASK[CHAT], "prompt": "a", **body})
        assert answer.status_code == 400
        assert "cannot carry a delta" in answer.text


def test_authentication_comes_first(server: RunningServer) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        with httpx.Client(base_url=server.url, headers=headers) as stranger:
            answer = stranger.post(CHAT, json={"model": "tiny@9", "messages": "bad"})
            assert answer.status_code == 401
            assert answer.headers["x-cmc-deltas"] == "none"
            assert stranger.get("/v1/models").status_code == 401
            assert stranger.get("/v1/deltas/tiny").status_code == 401
            assert stranger.get("/ready").status_code == stranger.get("/health").status_code == 200


def test_the_deltas_are_described(server: RunningServer, folders: dict[str, Path]) -> None:
    listing = server.http.get("/v1/deltas").json()["data"]
    assert [delta["name"] for delta in listing] == ["tiny", "other", "broken"]
    tiny = server.http.get("/v1/deltas/tiny").json()
    assert tiny["version"] == content_version(folders["tiny"])
    assert (tiny["state"], tiny["coverage"], tiny["context_length"]) == ("loaded", 1.0, 512)
    assert tiny["memory_bytes"] > 0
    assert sum(tiny["match"][kind] for kind in ("none", "exact", "prefix", "extension", "special")) == 49152
    assert server.http.get("/v1/deltas/nope").status_code == 404


def test_schema_and_metrics(server: RunningServer) -> None:
    schemas = server.http.get("/openapi.json").json()["components"]["schemas"]
    for name in ("ChatCompletionRequest", "CompletionRequest", "ResponsesRequest", "AnthropicMessagesRequest"):
        assert schemas[name]["properties"]["cmc"] == {"$ref": "#/components/schemas/CmcControls"}
    ask(server, CHAT, "tiny")
    metrics = server.http.get("/metrics").text
    assert 'cmc_requests_total{delta="tiny"}' in metrics
    assert "vllm:request_success_total" in metrics


@pytest.mark.parametrize("route", ASK)
def test_a_delta_that_fails_ends_its_request_with_an_error(server: RunningServer, route: str) -> None:
    with ThreadPoolExecutor() as pool:
        neighbour = pool.submit(ask, server, route, "tiny@1.5")
        failed = ask(server, route, "broken")
        assert failed.status_code == 500, failed.text
        assert failed.headers["x-cmc-deltas"].startswith("broken@1#")
        assert "delta" in failed.json()["error"]["message"]
        assert text_of(neighbour.result()) == text_of(ask(server, route, "tiny@1.5"))
    stream = ask(server, route, "broken+tiny@0.5", stream=True)
    events = events_of(stream)
    errors = [event for event in events if "error" in event or event.get("type") == "error"]
    assert len(errors) == 1, stream.text
    assert "".join(map(new_text, events)) == ""
    assert text_of(ask(server, route, "smollm2"))


@pytest.mark.parametrize(
    "text", ["", "\x00", "👩‍👩‍👧 \u202e ﷽ a\u0301", "<|im_end|><|endoftext|>", "🎉" * 300, "one two three " * 220]
)
def test_odd_prompts_are_served(server: RunningServer, text: str) -> None:
    messages = [{"role": "user", "content": text}]
    assert ask(server, CHAT, "tiny", messages=messages, max_tokens=3).status_code == 200
    if text:
        assert ask(server, COMPLETIONS, "tiny", prompt=text, max_tokens=3).status_code == 200


def test_half_a_surrogate_pair_is_no_worse_than_without_deltas(server: RunningServer) -> None:
    for route in ASK:
        for model in ("smollm2", "tiny"):
            body = json.dumps({**ASK[route], "model": model}).replace("colors", "\\ud83d")
            answer = server.http.post(route, content=body, headers={"content-type": "application/json"})
            assert model == "smollm2" or answer.status_code < 500, answer.text


def test_a_partial_answer_is_continued(server: RunningServer) -> None:
    messages = [*QUESTION, {"role": "assistant", "content": "Red, green and"}]
    options = {"continue_final_message": True, "add_generation_prompt": False}
    assert ask(server, CHAT, "tiny", messages=messages, **options).status_code == 200
    clash = ask(server, CHAT, "tiny", messages=messages, continue_final_message=True)
    assert clash.status_code == ask(server, CHAT, "smollm2", messages=messages, continue_final_message=True).status_code


def test_rows_beyond_the_limit_wait_and_clients_that_leave_free_theirs(server: RunningServer) -> None:
    long = {"max_tokens": 900, "ignore_eos": True, "stream": True}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(server, CHAT, "tiny", n=2, temperature=1), range(6)))
    assert {answer.status_code for answer in answers} == {200}
    with ExitStack() as streams, ThreadPoolExecutor() as pool:
        body = {**ASK[CHAT], "model": "tiny", **long, "n": 2, "temperature": 1}
        opened = [streams.enter_context(server.http.stream("POST", CHAT, json=body)).iter_lines() for _ in range(2)]
        for lines in opened:
            next(lines)
        blocked = pool.submit(ask, server, CHAT, "tiny")
        deadline = time.monotonic() + 10
        while waiting_rows(server) != 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert waiting_rows(server) == 1
        assert text_of(ask(server, CHAT, "smollm2"))  # the base model waits for nobody
        assert not blocked.done()
        streams.close()
        assert text_of(blocked.result(timeout=30))
    assert waiting_rows(server) == 0


def waiting_rows(server: RunningServer) -> float:
    (line,) = (line for line in server.http.get("/metrics").text.split("\n") if line.startswith("cmc_waiting_rows"))
    return float(line.split()[-1])


def test_the_access_log_tells_the_deltas(server: RunningServer, folders: dict[str, Path]) -> None:
    server.http.post(CHAT, json={**ASK[CHAT], "model": "tiny@0.25"}, headers={"x-request-id": "find-me"})
    line = f"find-me {CHAT} 200 deltas=tiny@0.25#{content_version(folders['tiny'])}"
    assert line in server.log.read_text(errors="replace")
