"""Answers on their way out: the model that the client asked for, in any cut of the stream."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmc_server.api.rewrite import SteeredAnswer

STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]


def start(headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": 200, "headers": headers}


def send_through(messages: list[dict[str, Any]], model: str | None, route: str = "/v1/responses") -> list[Any]:
    sent: list[Any] = []

    async def run() -> None:
        async def collect(message: Any) -> None:
            sent.append(message)

        answer = SteeredAnswer(collect, route, model)
        for message in messages:
            await answer(message)

    asyncio.run(run())
    return sent


def stream_through(chunks: list[bytes], model: str | None) -> bytes:
    bodies = [{"type": "http.response.body", "body": chunk, "more_body": True} for chunk in chunks]
    end = {"type": "http.response.body", "body": b"", "more_body": False}
    return b"".join(message.get("body", b"") for message in send_through([start(STREAM), *bodies, end], model))


EVENTS = [
    {"model": "base", "choices": [{"delta": {"content": 'é 🎉 "model":"base"'}}]},
    {"type": "response.created", "response": {"model": "base", "metadata": {"model": "base"}, "tools": [1.5e-7]}},
    {"type": "message_start", "message": {"model": "base", "content": []}},
    {"error": {"message": "half a pair: \ud83d, model", "code": 500}},
    {"model": None},
]
TEXT = b"".join(
    [b": keep-alive\n\n", b"event: x\n"]
    + [b"data: " + json.dumps(event).encode() + b"\n\n" for event in EVENTS]
    + [b'data: not json, "model"\n\n', b"data: [DONE]\n\n"]
)


def expected_events() -> list[Any]:
    events = json.loads(json.dumps(EVENTS))
    events[0]["model"] = events[1]["response"]["model"] = events[2]["message"]["model"] = "mine@0.8"
    return list(events)


@given(st.lists(st.integers(0, len(TEXT)), max_size=20))
def test_streams_in_any_cut(cuts: list[int]) -> None:
    edges = sorted({0, len(TEXT), *cuts})
    chunks = [TEXT[a:b] for a, b in itertools.pairwise(edges)]
    assert stream_through(chunks, None) == TEXT
    lines = stream_through(chunks, "mine@0.8").decode().split("\n")
    assert lines[:3] == [": keep-alive", "", "event: x"]
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert [json.loads(text) for text in data[:-2]] == expected_events()
    assert data[-2:] == ['not json, "model"', "[DONE]"]


def test_a_stream_that_ends_without_a_newline() -> None:
    assert stream_through([b'data: {"model":"base"}'], "m") == b'data: {"model":"m"}'


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_json_answer_and_its_length(pieces: int) -> None:
    body = json.dumps({"model": "base", "text": "häßlich \ud83d", "usage": {"model": "base"}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    size = -(-len(body) // pieces)
    chunks = [body[i : i + size] for i in range(0, len(body), size)]
    messages = [
        {"type": "http.response.body", "body": chunk, "more_body": index + 1 < len(chunks)}
        for index, chunk in enumerate(chunks)
    ]
    first, second = send_through([start(headers), *messages], "mine")
    assert json.loads(second["body"]) == {"model": "mine", "text": "häßlich \ud83d", "usage": {"model": "base"}}
    assert (b"content-length", str(len(second["body"])).encode()) in first["headers"]


@pytest.mark.parametrize("body", [b"[1]", b'"text"', b"not json", b""])
def test_other_answers_are_left_alone(body: bytes) -> None:
    headers = [(b"content-type", b"application/json")]
    _, second = send_through([start(headers), {"type": "http.response.body", "body": body}], "m")
    assert second["body"] == body


def end_with_error(messages: list[dict[str, Any]], route: str) -> tuple[bool, bytes]:
    sent: list[Any] = []

    async def run() -> bool:
        async def collect(message: Any) -> None:
            sent.append(message)

        answer = SteeredAnswer(collect, route, None)
        for message in messages:
            await answer(message)
        return await answer.end_with_error()

    return asyncio.run(run()), b"".join(message.get("body", b"") for message in sent)


def test_a_stream_that_breaks_off_ends_with_an_error_event() -> None:
    begun = [start(STREAM), {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}]
    ended, text = end_with_error(begun, "/v1/responses")
    assert ended
    event, data = text.decode().strip().split("\n")[-2:]
    assert event == "event: error"
    assert json.loads(data.removeprefix("data: "))["sequence_number"] == 1
    ended, text = end_with_error(begun, "/v1/chat/completions")
    assert ended
    assert b'"code": 500' in text
    assert text.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    "messages",
    [[], [start([(b"content-type", b"application/json")])], [start(STREAM), {"type": "http.response.body"}]],
)
def test_other_failures_go_their_usual_way(messages: list[dict[str, Any]]) -> None:
    ended, _ = end_with_error(messages, "/v1/responses")
    assert not ended
