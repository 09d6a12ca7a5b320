"""The endpoint plugin that vLLM loads: it brings the front door, the playground, and the routes about deltas."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse
from starlette.datastructures import State

from cmc_server.api import access_log, metrics
from cmc_server.api.answers import error_body
from cmc_server.api.catalog import Catalog, ServedDelta
from cmc_server.api.changes import Changes, describe_delta
from cmc_server.api.controls import required_deltas
from cmc_server.api.live import LiveDeltas
from cmc_server.api.middleware import FrontDoor
from cmc_server.api.model_id import parse_model_id
from cmc_server.api.openapi import describe_controls
from cmc_server.api.playground.pages import playground_router
from cmc_server.api.readiness import Readiness
from cmc_server.api.stamp import AnswerStamp
from cmc_server.config import EngineSettings
from cmc_server.errors import ControlsError
from cmc_server.integrations.vllm_engine import RowGate, ServedModels, engine_rows, guard_engine, is_dead

_ROOT_LOGGER = logging.getLogger("cmc_server")
#: Engine clients of this process that were shut down, and whether their engine was dead by then; for the launcher.
DIED: dict[Any, bool] = {}


class DeltaEndpoints:
    """vLLM's endpoint plugin of this package (entry point ``vllm.endpoint_plugins``)."""

    name = "cmc_server"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._readiness = Readiness()
        self._changes = Changes(self._readiness)
        self._gate = RowGate(on_waiting=metrics.WAITING_ROWS.set)

    def attach_router(self, app: FastAPI) -> None:
        """Called by vLLM while it builds the application, before it adds authentication around what is there."""
        _log_like_vllm()
        app.add_middleware(FrontDoor, readiness=self._readiness)
        build = app.build_middleware_stack
        # Around everything, starlette's own last-resort error handler included.
        app.build_middleware_stack = lambda: AnswerStamp(build())  # type: ignore[method-assign]
        app.include_router(_Routes(self._readiness).router())
        app.include_router(self._changes.router())
        app.include_router(playground_router())
        describe_controls(app)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Called by vLLM when the engine is up, before the first connection is accepted.

        Raises:
            UserError: the settings or a delta have become invalid since the launcher checked them.
        """

        def shut_down() -> None:
            DIED.setdefault(engine_client, is_dead(engine_client))  # vLLM shuts it down again later, when it is
            self._readiness.drain()

        access_log.logger.disabled = args.disable_uvicorn_access_log
        settings = EngineSettings.from_additional_config(args.additional_config)
        if settings.access_log_format == "json":
            access_log.log_as_json()
        catalog = Catalog(settings, ServedModels(state))
        guard_engine(
            engine_client,
            reserved_token_id=settings.reserved_token_id,
            gate=self._gate,
            required={delta.name: delta.strength for delta in required_deltas(catalog.offer)},
            on_failure=metrics.ERRORS.labels("delta_failed").inc,
            on_shutdown=shut_down,
        )

        def use_rows(rows: int) -> None:
            if rows < engine_rows(engine_client):
                self._gate.limit = catalog.max_rows = max(1, rows // (args.api_server_count or 1))

        await self._readiness.connect(engine_client, catalog, use_rows)
        if settings.live:
            live = LiveDeltas(engine_client, catalog, settings, args.tokenizer or args.model, self._readiness.take)
            self._changes.start(live, settings, several=(args.api_server_count or 1) > 1)


def _log_like_vllm() -> None:
    """Give our loggers vLLM's handlers, unless somebody has configured them."""
    if not _ROOT_LOGGER.handlers:
        _ROOT_LOGGER.handlers = list(logging.getLogger("vllm").handlers)
        _ROOT_LOGGER.setLevel(logging.INFO)
        _ROOT_LOGGER.propagate = not _ROOT_LOGGER.handlers


class _Routes:
    """Handlers of the routes about models, deltas and readiness."""

    def __init__(self, readiness: Readiness) -> None:
        self._readiness = readiness

    def router(self) -> APIRouter:
        """All of them."""
        router = APIRouter(tags=["deltas"])
        router.add_api_route("/v1/models", self.list_models, methods=["GET"])
        router.add_api_route("/v1/models/{model_id:path}", self.get_model, methods=["GET"])
        router.add_api_route("/v1/deltas", self.list_deltas, methods=["GET"])
        router.add_api_route("/v1/deltas/{name}", self.get_delta, methods=["GET"])
        router.add_api_route("/ready", self.ready, methods=["GET"])
        return router

    async def list_models(self) -> JSONResponse:
        """Models that vLLM serves, then one entry per delta."""
        models = await self._models()
        cards = [_card(delta, models[0]) for delta in self._deltas.values()] if models else []
        return JSONResponse({"object": "list", "data": models + cards})

    async def get_model(self, model_id: str) -> JSONResponse:
        """One model: as vLLM serves it, or a delta, with a strength and in combination too."""
        models = await self._models()
        for model in models:
            if model["id"] == model_id:
                return JSONResponse(model)
        card = _delta_card(model_id, self._deltas, models[0]) if models else None
        if card is not None:
            return JSONResponse(card)
        return _not_found(f"The model `{model_id}` does not exist.", "model")

    async def list_deltas(self) -> JSONResponse:
        """Every delta that is loaded."""
        data = [self._describe(delta) for delta in self._deltas.values()]
        return JSONResponse({"object": "list", "data": data})

    async def get_delta(self, name: str) -> JSONResponse:
        """One delta."""
        if name not in self._deltas:
            available = ", ".join(self._deltas) or "none is loaded"
            return _not_found(f"There is no delta named {name[:80]!r}; available: {available}.", "name")
        return JSONResponse(self._describe(self._deltas[name]))

    async def ready(self) -> JSONResponse:
        """200 if requests are served, else 503 with the reason."""
        problem = await self._readiness.check()
        if problem is None:
            return JSONResponse({"status": "ready", "deltas": list(self._deltas)})
        return JSONResponse({"status": "not ready", "reason": problem}, HTTPStatus.SERVICE_UNAVAILABLE)

    @property
    def _deltas(self) -> Mapping[str, ServedDelta]:
        catalog = self._readiness.catalog
        return {} if catalog is None else catalog.deltas

    async def _models(self) -> list[dict[str, Any]]:
        catalog = self._readiness.catalog
        return [] if catalog is None else await catalog.served.cards()

    def _describe(self, delta: ServedDelta) -> dict[str, Any]:
        return describe_delta(delta, self._readiness)


def _card(delta: ServedDelta, base: Mapping[str, Any], model_id: str | None = None) -> dict[str, Any]:
    """A delta as an entry of ``/v1/models``; ``base`` is the entry of the user LLM."""
    name = delta.artifact.name
    return {**base, "id": model_id or name, "owned_by": "cmc-server", "root": name, "parent": base["id"]}


def _delta_card(model_id: str, deltas: Mapping[str, ServedDelta], base: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        parts = parse_model_id(model_id, deltas)
    except ControlsError:
        return None
    if not parts or any(name not in deltas for name, _ in parts):
        return None
    return _card(deltas[parts[0][0]], base, model_id)


def _not_found(message: str, param: str) -> JSONResponse:
    return JSONResponse(error_body(HTTPStatus.NOT_FOUND, message, param=param), HTTPStatus.NOT_FOUND)
