"""The routes by which the holder of the admin key loads and unloads deltas of a running server."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from cmc_server.api.answers import error_body
from cmc_server.api.catalog import ServedDelta
from cmc_server.api.live import LiveDeltas
from cmc_server.api.readiness import Readiness
from cmc_server.api.server import ADMIN_KEY_VARIABLE
from cmc_server.api.watch import FolderWatch
from cmc_server.config import DeltaSource, EngineSettings, build
from cmc_server.errors import CmcError

_BEARER: Final = "bearer "


class Changes:
    """``POST /v1/deltas`` and ``DELETE /v1/deltas/{name}``.

    Args:
        readiness: what the workers report.
    """

    def __init__(self, readiness: Readiness) -> None:
        self._readiness = readiness
        self._live: LiveDeltas | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def router(self) -> APIRouter:
        """Both of them."""
        router = APIRouter(tags=["deltas"])
        router.add_api_route("/v1/deltas", self.load, methods=["POST"])
        router.add_api_route("/v1/deltas/{name}", self.unload, methods=["DELETE"])
        return router

    def start(self, live: LiveDeltas, settings: EngineSettings, *, several: bool) -> None:
        """From now on deltas may change.

        Args:
            live: changes them.
            settings: the server's settings.
            several: whether other API processes serve the same deltas.
        """
        self._live = live
        if several:
            self._tasks.append(asyncio.create_task(live.follow()))
        if settings.watch_folder and settings.state_file:
            watch = FolderWatch(Path(settings.watch_folder), live)
            self._tasks.append(asyncio.create_task(watch.run(Path(f"{settings.state_file}.watch"))))

    async def load(self, request: Request) -> JSONResponse:
        """Load a delta, or replace the one of that name: ``{"name": ..., "path": ..., "strength": ...}``."""
        refused = self._refusal(request)
        if refused is not None or self._live is None:
            return refused or _forbidden()
        try:
            source = build(DeltaSource, json.loads(await request.body()))
            served, is_new = await self._live.load(source)
        except ValueError:
            return _error(HTTPStatus.BAD_REQUEST, "The body must be a JSON object with name and path.")
        except TimeoutError:
            return _error(HTTPStatus.GATEWAY_TIMEOUT, "The workers did not answer in time; see the server's log.")
        except CmcError as error:
            return _error(error.http_status, str(error))
        status = HTTPStatus.CREATED if is_new else HTTPStatus.OK
        return JSONResponse(describe_delta(served, self._readiness), status)

    async def unload(self, name: str, request: Request) -> JSONResponse:
        """Take a delta out of use; requests that run on it finish."""
        refused = self._refusal(request)
        if refused is not None or self._live is None:
            return refused or _forbidden()
        try:
            await self._live.unload(name)
        except TimeoutError:
            return _error(HTTPStatus.GATEWAY_TIMEOUT, "The workers did not answer in time; see the server's log.")
        except CmcError as error:
            return _error(error.http_status, str(error))
        return JSONResponse({"object": "delta", "name": name, "deleted": True})

    def _refusal(self, request: Request) -> JSONResponse | None:
        key = os.environ.get(ADMIN_KEY_VARIABLE)
        given = request.headers.get("authorization", "")
        token = given[len(_BEARER) :] if given.lower().startswith(_BEARER) else ""
        if key and secrets.compare_digest(token.encode(), key.encode()):
            return None
        return _forbidden()


def _forbidden() -> JSONResponse:
    what = f"Deltas are changed with the admin key only, which {ADMIN_KEY_VARIABLE} gives the server at its start."
    return _error(HTTPStatus.FORBIDDEN, what)


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse(error_body(HTTPStatus(status), message), status)


def describe_delta(delta: ServedDelta, readiness: Readiness) -> dict[str, Any]:
    """A delta as an entry of ``/v1/deltas``."""
    artifact, manifest = delta.artifact, delta.artifact.manifest
    loaded, catalog = readiness.loaded(artifact.name), readiness.catalog
    return {
        "object": "delta",
        "name": artifact.name,
        "version": artifact.version,
        "state": "loaded" if loaded else "unknown",
        "strength": artifact.strength,
        "strength_bounds": None if catalog is None else catalog.offer.bounds,
        "advised_range": manifest.advised_range,
        "description": manifest.description,
        "template_llm": manifest.template_llm,
        "objective": manifest.objective,
        "license": manifest.license,
        "unmapped": manifest.unmapped or "zero",
        "context_length": artifact.context_length,
        "vocab_size": artifact.vocab_size,
        "weight_bytes": artifact.weight_bytes,
        **{key: loaded.get(key) for key in ("num_parameters", "memory_bytes", "dtype", "coverage", "match")},
    }
