"""The front door: an ASGI middleware that decides about a request's deltas before anything runs.

It sits inside vLLM's authentication. A request for the base model passes byte for byte as it came.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cmc_server.api import metrics
from cmc_server.api.answers import send_controls_error, send_error
from cmc_server.api.catalog import Catalog
from cmc_server.api.controls import GENERATING, STEERED_ROUTES, Controls, format_deltas, read_controls, rewritten
from cmc_server.api.messages import read_chat
from cmc_server.api.readiness import Readiness
from cmc_server.api.rewrite import SteeredAnswer
from cmc_server.api.stamp import REQUEST_ID, SCOPE_KEY, route_of
from cmc_server.errors import ControlsError
from cmc_server.integrations.request_args import MAX_REQUEST_ID, ActiveDelta, RequestControls

logger = logging.getLogger(__name__)

#: Larger than any chat with pictures; a request is held in memory as a whole.
MAX_BODY_BYTES: Final = 256 * 1024 * 1024
_METHODS: Final = ("POST", "PUT", "PATCH", "DELETE")
_FORMS: Final = ("multipart/", "application/x-www-form-urlencoded")


class FrontDoor:
    """Reads the controls of a request, refuses it or hands it on in the form that vLLM understands.

    Args:
        app: the application behind.
        readiness: while it names a problem, nothing is generated.
    """

    def __init__(self, app: ASGIApp, readiness: Readiness) -> None:
        self._app = app
        self._readiness = readiness

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or scope["method"] not in _METHODS:
            await self._app(scope, receive, send)
            return
        route = route_of(scope)
        problem = self._readiness.problem if route.startswith(GENERATING) else None
        if problem is not None:
            metrics.ERRORS.labels("not_ready").inc()
            await send_error(send, HTTPStatus.SERVICE_UNAVAILABLE, f"Not ready: {problem}.", route=route)
            return
        catalog = self._readiness.catalog
        if catalog is None or Headers(scope=scope).get("content-type", "").startswith(_FORMS):
            await self._app(scope, receive, send)
            return
        body = await _read_body(receive)
        if body is None:
            return  # the client left
        if len(body) > MAX_BODY_BYTES:
            metrics.ERRORS.labels("too_large").inc()
            limit = f"The request body may have at most {MAX_BODY_BYTES} bytes."
            await send_error(send, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, limit, route=route)
            return
        try:
            request_id = Headers(scope=scope).get(REQUEST_ID, "")[:MAX_REQUEST_ID]
            steered = await _steer(body, route, catalog, request_id or None)
        except ControlsError as error:
            metrics.ERRORS.labels("controls").inc()
            await send_controls_error(send, error, route)
            return
        if steered is None:
            await self._pass(scope, body, receive, send, route)
        else:
            await self._serve(scope, *steered, receive, send, route)

    async def _pass(self, scope: Scope, body: bytes, receive: Receive, send: Send, route: str) -> None:
        if route in STEERED_ROUTES:
            metrics.count_request(())
        await self._app(scope, _replay(body, receive), send)

    async def _serve(
        self, scope: Scope, controls: Controls, body: bytes, receive: Receive, send: Send, route: str
    ) -> None:
        metrics.count_request(tuple(delta.name for delta in controls.deltas))
        scope[SCOPE_KEY] = format_deltas(controls.deltas)
        MutableHeaders(scope=scope)["content-length"] = str(len(body))
        answer = SteeredAnswer(send, route, controls.model)
        try:
            await self._app(scope, _replay(body, receive), answer)
        except Exception:
            if not await answer.end_with_error():
                raise
            logger.exception("An answer on %s broke off.", route)


async def _steer(body: bytes, route: str, catalog: Catalog, request_id: str | None) -> tuple[Controls, bytes] | None:
    """The controls of a request and its body for vLLM; None if the body is to pass untouched.

    Raises:
        ControlsError: the request cannot be served as written.
    """
    # No look at the bytes alone could tell as surely as parsing, and none that was tried took less time.
    document = _parse(body)
    controls = None if document is None else read_controls(document, route, catalog.offer)
    if document is None or controls is None:
        return None
    xargs = await _engine_arguments(document, controls, route, catalog, request_id)
    changed = rewritten(document, controls, catalog.offer.base_model, xargs)
    try:
        return controls, json.dumps(changed).encode()
    except RecursionError:
        raise ControlsError("The request body is nested too deeply.") from None


async def _engine_arguments(
    document: Mapping[str, Any], controls: Controls, route: str, catalog: Catalog, request_id: str | None
) -> dict[str, str]:
    active = controls.active
    if not active:
        return {}
    chat = read_chat(document, route)
    prompts = [None] * len(active) if chat is None else await catalog.encode(active, chat)
    deltas = tuple(
        ActiveDelta(name=delta.name, strength=delta.strength, version=delta.version, prompt_ids=prompt)
        for delta, prompt in zip(active, prompts, strict=True)
    )
    return RequestControls(deltas=deltas, unmapped=controls.unmapped, request_id=request_id).to_extra_args()


def _parse(body: bytes) -> dict[str, Any] | None:
    """The body if it is a JSON object. What vLLM cannot read either is left to vLLM to refuse."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


async def _read_body(receive: Receive) -> bytes | None:
    """The whole body, or its beginning as soon as it is too long; None if the client leaves first."""
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        chunk = message.get("body", b"")
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_BODY_BYTES or not message.get("more_body", False):
            return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body once and then whatever follows it, such as the client's leaving."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
