"""The chat in a request body, as each route writes it."""

from __future__ import annotations

from typing import Any

import pytest

from cmc_server.api.messages import read_chat
from cmc_server.delta.prompt import plain_messages
from cmc_server.errors import ControlsError


def turns(body: dict[str, Any], route: str) -> list[tuple[str, str]]:
    chat = read_chat(body, route)
    assert chat is not None
    return [(message["role"], message["content"]) for message in plain_messages(chat.messages)]


def options(body: dict[str, Any], route: str) -> dict[str, bool]:
    chat = read_chat(body, route)
    assert chat is not None
    return dict(chat.options)


def test_completions_carry_no_chat() -> None:
    assert read_chat({"prompt": "hello"}, "/v1/completions") is None


def test_chat_completions() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "u"}]}]
    assert turns({"messages": messages}, "/v1/chat/completions") == [("system", "s"), ("user", "u")]
    assert options({"messages": messages}, "/v1/chat/completions") == {
        "continue_final_message": False,
        "add_generation_prompt": True,
    }
    flags = {"continue_final_message": True, "add_generation_prompt": False}
    assert options({"messages": messages, **flags}, "/v1/chat/completions") == flags


def test_responses_with_plain_input() -> None:
    assert turns({"input": "u"}, "/v1/responses") == [("user", "u")]
    assert turns({"input": "u", "instructions": "s"}, "/v1/responses") == [("system", "s"), ("user", "u")]


def test_responses_with_items() -> None:
    items = [
        {"role": "user", "content": "q"},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hidden"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "wait"}]},
        {"type": "function_call", "name": "f", "call_id": "1", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "42"},
        {"type": "function_call", "name": "f", "call_id": "2", "arguments": "{}"},
        {"type": "custom_tool_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "43"}]},
        {"type": "item_reference", "id": "x"},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
    ]
    assert turns({"input": items}, "/v1/responses") == [
        ("user", "q"),
        ("assistant", "wait"),
        ("tool", "42"),
        ("assistant", ""),
        ("tool", "43"),
        ("user", "a\nb"),
    ]
    assert options({"input": items}, "/v1/responses") == {"continue_final_message": False}


@pytest.mark.parametrize(("status", "expected"), [("in_progress", True), ("incomplete", True), ("completed", False)])
def test_responses_that_continue_an_unfinished_message(status: str, expected: bool) -> None:
    last = {"type": "message", "role": "assistant", "status": status, "content": "Once"}
    assert options({"input": [last]}, "/v1/responses") == {"continue_final_message": expected}


def test_messages_of_anthropic_clients() -> None:
    body = {
        "system": [{"type": "text", "text": "s"}],
        "messages": [
            {"role": "user", "content": "q"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hidden"},
                    {"type": "text", "text": "wait"},
                    {"type": "tool_use", "id": "1", "name": "f", "input": {}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "42"}]},
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "2", "content": [{"type": "text", "text": "43"}]},
                    {"type": "text", "text": "and?"},
                ],
            },
        ],
    }
    assert turns(body, "/v1/messages") == [
        ("system", "s"),
        ("user", "q"),
        ("assistant", "wait"),
        ("tool", "42"),
        ("tool", "43"),
        ("user", "and?"),
    ]


@pytest.mark.parametrize(
    ("body", "route"),
    [
        ({}, "/v1/chat/completions"),
        ({"messages": "hello"}, "/v1/chat/completions"),
        ({"messages": ["hello"]}, "/v1/chat/completions"),
        ({"messages": [], "continue_final_message": "perhaps"}, "/v1/chat/completions"),
        ({"input": 5}, "/v1/responses"),
        ({"input": [None]}, "/v1/responses"),
        ({"messages": {}}, "/v1/messages"),
    ],
)
def test_what_is_no_chat(body: dict[str, Any], route: str) -> None:
    with pytest.raises(ControlsError):
        read_chat(body, route)
