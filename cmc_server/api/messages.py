"""The chat that a request body carries, as role-and-content messages: what the deltas' prompt renderer reads.

Each route writes a chat in its own way. vLLM validates the bodies in full; here only what is read is checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cmc_server.api.controls import flag
from cmc_server.errors import ControlsError

_CALLS = ("function_call", "custom_tool_call", "reasoning")
_CALL_OUTPUTS = ("function_call_output", "custom_tool_call_output")


@dataclass(frozen=True)
class Chat:
    """A chat and how its prompt ends.

    Args:
        messages: with ``role`` and ``content``; content may be text, text parts or None.
        options: keyword arguments of ``PromptEncoder.encode_messages``.
    """

    messages: list[dict[str, Any]]
    options: Mapping[str, bool] = field(default_factory=dict)


def read_chat(body: Mapping[str, Any], route: str) -> Chat | None:
    """The chat of a request, or None on a route that carries plain text.

    Raises:
        ControlsError: the body's messages are not what the route asks for.
    """
    if route == "/v1/chat/completions":
        return Chat(
            _objects(body.get("messages"), "messages"),
            {
                "continue_final_message": flag(body, "continue_final_message"),
                "add_generation_prompt": flag(body, "add_generation_prompt", default=True),
            },
        )
    if route == "/v1/responses":
        return _responses_chat(body)
    if route == "/v1/messages":
        return Chat(_anthropic_messages(body))
    return None


def _objects(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ControlsError(f"{name} must be a list of objects.", name)
    return value


def _responses_chat(body: Mapping[str, Any]) -> Chat:
    instructions, given = body.get("instructions"), body.get("input")
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return Chat([*messages, {"role": "user", "content": given}])
    items = _objects(given, "input")
    for item in items:
        _add_item(messages, item)
    # A last message that its sender marked as unfinished is to be continued, as vLLM does.
    last = items[-1] if items else {}
    unfinished = last.get("type", "message") in ("message", "reasoning") and last.get("status") in (
        "in_progress",
        "incomplete",
    )
    return Chat(messages, {"continue_final_message": unfinished})


def _add_item(messages: list[dict[str, Any]], item: Mapping[str, Any]) -> None:
    """Append one item of the Responses API. Calls and reasoning share one assistant turn with the text after them."""
    kind = item.get("type", "message")
    turn = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if kind in _CALLS:
        if turn is None:
            messages.append({"role": "assistant", "content": None})
    elif kind in _CALL_OUTPUTS:
        messages.append({"role": "tool", "content": item.get("output")})
    elif kind == "message":
        if turn is not None and turn["content"] is None and item.get("role") == "assistant":
            turn["content"] = item.get("content")
        else:
            messages.append({"role": item.get("role", "user"), "content": item.get("content")})


def _anthropic_messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.get("system"):
        messages.append({"role": "system", "content": body["system"]})
    for message in _objects(body.get("messages"), "messages"):
        content = message.get("content")
        blocks: Sequence[Any] = content if isinstance(content, list) else ()
        results = [block for block in blocks if isinstance(block, dict) and block.get("type") == "tool_result"]
        messages += ({"role": "tool", "content": block.get("content")} for block in results)
        if not results or len(results) < len(blocks):
            messages.append({"role": message.get("role", "user"), "content": content})
    return messages
