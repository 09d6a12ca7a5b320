"""The answer to a steered request on its way out: the model id that the client asked for, and errors told."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

from cmc_server.api.answers import error_body

#: Objects of streamed events that hold the whole answer: Responses API, Anthropic's ``message_start``.
_NESTED = ("response", "message")


class SteeredAnswer:
    """Wraps ``send`` for one steered request.

    Args:
        send: the ASGI callable to wrap.
        route: the request's path.
        model: what the answer's ``model`` is to be; None leaves it as it is.
    """

    def __init__(self, send: Send, route: str, model: str | None) -> None:
        self._send = send
        self._route = route
        self._model = model
        self._start: Message | None = None
        self._buffer = b""
        self._num_events = 0
        self._is_stream = False
        self._is_done = False

    async def __call__(self, message: Message) -> None:
        """Pass one ASGI message on."""
        if message["type"] == "http.response.start":
            kind = MutableHeaders(scope=message).get("content-type", "")
            self._is_stream = kind.startswith("text/event-stream")
            if self._model is not None and kind.startswith("application/json"):
                self._start = message  # held back: the length changes with the model's name
                return
        elif message["type"] == "http.response.body":
            self._is_done = not message.get("more_body", False)
            if self._start is not None:
                await self._whole(message)
                return
            if self._is_stream:
                message = {**message, "body": self._events(message.get("body", b""))}
        await self._send(message)

    async def end_with_error(self) -> bool:
        """Close an answer that broke off with an error event.

        Returns:
            False if it is not a stream under way, so that the exception has to go its usual way.
        """
        if not self._is_stream or self._is_done:
            return False
        message = "The server failed while this answer was streamed."
        if self._route == "/v1/responses":
            event: dict[str, Any] = {"type": "error", "code": "server_error", "message": message, "param": None}
            text = f"event: error\ndata: {json.dumps({**event, 'sequence_number': self._num_events})}\n\n"
        else:
            text = f"data: {json.dumps(error_body(HTTPStatus.INTERNAL_SERVER_ERROR, message))}\n\ndata: [DONE]\n\n"
        await self._send({"type": "http.response.body", "body": self._buffer + text.encode()})
        return True

    async def _whole(self, message: Message) -> None:
        self._buffer += message.get("body", b"")
        if not self._is_done or self._start is None:
            return
        body = _renamed(self._buffer, self._model)
        MutableHeaders(scope=self._start)["content-length"] = str(len(body))
        await self._send(self._start)
        await self._send({**message, "body": body})

    def _events(self, chunk: bytes) -> bytes:
        """Complete lines of a stream; a rest without its newline waits for the next chunk."""
        *lines, rest = (self._buffer + chunk).split(b"\n")
        self._buffer = b"" if self._is_done else rest
        if self._is_done:
            lines.append(rest)
        return b"\n".join([self._event_line(line) for line in lines] + ([] if self._is_done else [b""]))

    def _event_line(self, line: bytes) -> bytes:
        if not line.startswith(b"data:"):
            return line
        self._num_events += 1
        if self._model is None or b'"model"' not in line:
            return line
        return b"data: " + _renamed(line[5:].strip(), self._model)


def _renamed(text: bytes, model: str | None) -> bytes:
    """A JSON object with another ``model``; anything else unchanged."""
    try:
        document = json.loads(text)
    except ValueError:
        return text
    if not isinstance(document, dict):
        return text
    for holder in (document, *(document.get(key) for key in _NESTED)):
        if isinstance(holder, dict) and isinstance(holder.get("model"), str):
            holder["model"] = model
    # backslashreplace writes half a surrogate pair as the JSON escape that it came as.
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")
