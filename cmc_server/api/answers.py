"""Error bodies in the shapes that vLLM itself answers with."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from starlette.types import Send

from cmc_server.errors import ControlsError

_TYPES = {
    HTTPStatus.BAD_REQUEST: "BadRequestError",
    HTTPStatus.FORBIDDEN: "PermissionDeniedError",
    HTTPStatus.NOT_FOUND: "NotFoundError",
    HTTPStatus.CONFLICT: "ConflictError",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "RequestEntityTooLarge",
    HTTPStatus.INTERNAL_SERVER_ERROR: "InternalServerError",
    HTTPStatus.GATEWAY_TIMEOUT: "GatewayTimeoutError",
    HTTPStatus.SERVICE_UNAVAILABLE: "ServiceUnavailableError",
}


def error_body(status: HTTPStatus, message: str, *, param: str | None = None, route: str = "") -> dict[str, Any]:
    """OpenAI's error object, or Anthropic's on the routes below ``/v1/messages``."""
    kind = _TYPES[status]
    if route.startswith("/v1/messages"):
        return {"type": "error", "error": {"type": kind, "message": message}}
    return {"error": {"message": message, "type": kind, "param": param, "code": int(status)}}


async def send_error(
    send: Send, status: HTTPStatus, message: str, *, param: str | None = None, route: str = ""
) -> None:
    """Answer a request with an error."""
    content = json.dumps(error_body(status, message, param=param, route=route)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append((b"retry-after", b"5"))
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": content})


async def send_controls_error(send: Send, error: ControlsError, route: str) -> None:
    """Answer with what is wrong with a request's controls."""
    await send_error(send, HTTPStatus(error.http_status), str(error), param=error.param, route=route)
