"""A small application with routes like vLLM's, which answer with what reaches them, and the plugin in it."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

from cmc_server.api.routes import DeltaEndpoints
from cmc_server.config import ADDITIONAL_CONFIG_KEY

#: With the key that the application asks for.
HEADERS = {"Authorization": "Bearer key"}


class Engine:
    """As much of vLLM's engine client as the plugin touches; ``ranks`` is what the workers report."""

    def __init__(self, ranks: Any) -> None:
        self.ranks = ranks
        self.errored = False
        self.stopped = False
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=8))
        self.engine_core = SimpleNamespace(
            resources=SimpleNamespace(engine_dead=False), call_utility_all_async=self.call_utility_all
        )

    async def call_utility_all(self, utility: str, method: str, *_: Any) -> Any:
        """A list of ranks for each engine, as vLLM's client gives it: here every rank is an engine of its own."""
        assert (utility, method) == ("collective_rpc", "cmc_status")
        if isinstance(self.ranks, Exception):
            raise self.ranks
        return [[rank] for rank in self.ranks]

    def generate(self) -> None: ...

    def shutdown(self, timeout: float | None = None) -> None:
        self.stopped = True


class Models:
    """vLLM's list of served models."""

    base_model_paths = (SimpleNamespace(name="base"), SimpleNamespace(name="alias"))
    lora_requests = {"adapter": object()}  # noqa: RUF012

    async def show_available_models(self) -> ModelList:
        return ModelList(data=[ModelCard(id=name, root="/base") for name in ("base", "alias")])


def application(plugin: DeltaEndpoints) -> FastAPI:
    """Routes as vLLM has them, then the plugin, then authentication around both: vLLM's own order."""
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat(request: ChatCompletionRequest, raw: Request) -> Any:
        return await echo(raw)

    @app.post("/v1/completions")
    @app.post("/v1/responses")
    @app.post("/v1/messages")
    @app.post("/v1/messages/count_tokens")
    @app.post("/tokenize")
    @app.post("/v1/audio/transcriptions")
    async def echo(raw: Request) -> Any:
        body = await raw.body()
        if raw.query_params.get("fail"):
            raise RuntimeError("broken")
        reply = {"model": "base", "received": body.decode("utf-8", "replace")}
        if raw.query_params.get("stream"):
            return StreamingResponse(events(reply, raw.query_params["stream"]), media_type="text/event-stream")
        return JSONResponse(reply)

    plugin.attach_router(app)
    app.add_middleware(AuthenticationMiddleware, tokens=["key"])
    app.state.openai_serving_models = Models()
    return app


async def events(reply: dict[str, Any], kind: str) -> AsyncIterator[str]:
    yield f"event: response.created\ndata: {json.dumps({'response': reply})}\n\n"
    if kind == "broken":
        raise RuntimeError("broken")
    yield f"data: {json.dumps(reply)}\n\n"
    yield "data: [DONE]\n\n"


def start(engine: Engine, deltas: dict[str, Path], **settings: Any) -> FastAPI:
    """The application with the plugin as vLLM starts it."""
    plugin = DeltaEndpoints()
    assert isinstance(plugin, EndpointPlugin)
    app = application(plugin)
    sources = [{"name": name, "path": str(folder)} for name, folder in deltas.items()]
    args = Namespace(
        additional_config={ADDITIONAL_CONFIG_KEY: {"deltas": sources, "reserved_token_id": 3, **settings}},
        disable_uvicorn_access_log=False,
        api_server_count=None,
    )
    asyncio.run(plugin.init_state(engine, app.state, args))
    return app
