"""``cmc-server bench``: vLLM's own serving benchmark, with deltas in every request."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from cmc_server.config import DeltaDose
from cmc_server.errors import ConfigError

_HELP = """usage: cmc-server bench [--delta NAME[@STRENGTH]]... [--unmapped zero|preserve] [--json]
                        [argument of vLLM's benchmark]...

Measures a running server with vLLM's serving benchmark. --delta, which may be given several times, steers every
request; without it the requests are as vLLM sends them. --json prints the figures as one JSON object, and everything
else to stderr. What follows are the arguments of vLLM's benchmark:
"""


def run_bench(words: Sequence[str]) -> int:
    """Run one benchmark.

    Args:
        words: those after ``bench``.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: a delta is malformed, or the request body would say it twice.
    """
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="cmc-server bench", usage=argparse.SUPPRESS, description=_HELP)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_cli_args(parser)
    own, rest = _own_parser().parse_known_args(list(words))
    arguments = parser.parse_args(rest)
    arguments.extra_body = with_deltas(arguments.extra_body, own.deltas or (), own.unmapped)
    with contextlib.redirect_stdout(sys.stderr) if own.json else contextlib.nullcontext():
        figures = main(arguments)
    if own.json:
        sys.stdout.write(json.dumps(_finite(figures)) + "\n")
    return 0


def with_deltas(body: Mapping[str, Any] | None, deltas: Sequence[str], unmapped: str | None) -> dict[str, Any] | None:
    """The benchmark's extra body with the field ``cmc``.

    Args:
        body: what ``--extra-body`` gave.
        deltas: ``NAME`` or ``NAME@STRENGTH`` each.
        unmapped: policy, or None to leave it to the server.

    Raises:
        ConfigError: a delta is malformed, the policy has none to apply to, or ``body`` has the field already.
    """
    if not deltas:
        if unmapped is not None:
            raise ConfigError("--unmapped needs a --delta, which it is about.")
        return None if body is None else dict(body)
    if body is not None and "cmc" in body:
        raise ConfigError("--delta and --extra-body both say which deltas to use; leave one of them out.")
    doses = [DeltaDose.parse(text) for text in deltas]
    chosen = [{"name": one.name} | ({} if one.strength is None else {"strength": one.strength}) for one in doses]
    controls = {"deltas": chosen} | ({} if unmapped is None else {"unmapped": unmapped})
    return {**(body or {}), "cmc": controls}


def _own_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--delta", action="append", dest="deltas")
    parser.add_argument("--unmapped", choices=("zero", "preserve"))
    parser.add_argument("--json", action="store_true")
    return parser


def _finite(value: Any) -> Any:
    """JSON knows no NaN: such a figure is null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
