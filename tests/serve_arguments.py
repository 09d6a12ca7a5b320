"""What deployment files say of the server, asked of those who know: our parser and routes, then vLLM's."""

from __future__ import annotations

import argparse
import importlib
import warnings
from collections.abc import Sequence
from typing import Any

from cmc_server.api.options import parse_options
from cmc_server.api.readiness import Readiness
from cmc_server.config import EngineSettings


def parse_serve(argv: Sequence[str]) -> tuple[EngineSettings, argparse.Namespace]:
    """What ``cmc-server`` makes of a command line that begins with ``serve``; nothing is started."""
    verb, *rest = argv
    assert verb == "serve"
    settings, rest = parse_options(rest)
    server = _quietly("cmc_server.api.server")
    _quietly("vllm.entrypoints.cli.serve")
    _, arguments = server._parse_vllm(rest)
    server._refuse_arguments(arguments)
    return settings, arguments


def vllm_variables() -> set[str]:
    """Names of the environment variables that vLLM reads."""
    return set(_quietly("vllm.envs").environment_variables)


def probe_routes() -> set[str]:
    """Our own routes, and vLLM's about health."""
    ours = _quietly("cmc_server.api.routes")._Routes(Readiness()).router()
    health = _quietly("vllm.entrypoints.serve.instrumentator.health").router
    return {route.path for route in [*ours.routes, *health.routes]}


def _quietly(module: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own past while vLLM is imported
        return importlib.import_module(module)
