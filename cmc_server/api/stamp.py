"""The outermost layer: every answer says which deltas steered it, and so does the access log."""

from __future__ import annotations

import time
from typing import Final
from uuid import uuid4

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cmc_server.api.access_log import log_access
from cmc_server.api.controls import STEERED_ROUTES

HEADER: Final = b"x-cmc-deltas"
#: Where the front door leaves the header's value in the ASGI scope.
SCOPE_KEY: Final = "cmc_server.deltas"
#: vLLM takes its ids from it as well.
REQUEST_ID: Final = "x-request-id"


def route_of(scope: Scope) -> str:
    """The request's path within the application, without a trailing slash."""
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path.rstrip("/") or "/"


class AnswerStamp:
    """ASGI layer that adds ``x-cmc-deltas`` to every answer, those to rejected keys and crashes included."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route, status, begin = route_of(scope), 0, time.monotonic()
        if route in STEERED_ROUTES:
            request_id = MutableHeaders(scope=scope).setdefault(REQUEST_ID, uuid4().hex)

        async def stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (HEADER, _value(scope).encode())]}
            await send(message)

        try:
            await self._app(scope, receive, stamped)
        finally:
            if route in STEERED_ROUTES:
                log_access(request_id, route, status, _value(scope), time.monotonic() - begin)


def _value(scope: Scope) -> str:
    value: str = scope.get(SCOPE_KEY, "none")
    return value
