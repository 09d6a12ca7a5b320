"""The outermost layer: every answer says which deltas steered it, and so does the access log."""

from __future__ import annotations

import logging
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cmc_server.api.controls import STEERED_ROUTES

logger = logging.getLogger("cmc_server.access")

HEADER: Final = b"x-cmc-deltas"
#: Where the front door leaves the header's value in the ASGI scope.
SCOPE_KEY: Final = "cmc_server.deltas"


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
        status = 0

        async def stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (HEADER, _value(scope).encode())]}
            await send(message)

        try:
            await self._app(scope, receive, stamped)
        finally:
            if route_of(scope) in STEERED_ROUTES and logger.isEnabledFor(logging.INFO):
                request_id = Headers(scope=scope).get("x-request-id", "-")
                # Status 0: the client left before there was an answer.
                logger.info("%s %s %d deltas=%s", request_id, route_of(scope), status, _value(scope))


def _value(scope: Scope) -> str:
    value: str = scope.get(SCOPE_KEY, "none")
    return value
