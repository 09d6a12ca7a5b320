"""The arguments of ``cmc-server serve`` that are not vLLM's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from cmc_server.config import FAST_PATHS, DeltaDose, DeltaSource, EngineSettings, build
from cmc_server.errors import ConfigError

_BOUNDS = "--strength-bounds"
_EPILOG = """\
Where the environment variable CMC_SERVER_ADMIN_KEY is set, its holder may load and unload deltas of a running server:
POST /v1/deltas, DELETE /v1/deltas/NAME.

Every other argument goes to vLLM's own server. To see these:
  cmc-server serve --help=all             every one of them
  cmc-server serve --help=Frontend        one group
  cmc-server serve --help=max-model-len   one argument
"""


def parse_options(argv: Sequence[str]) -> tuple[EngineSettings, list[str]]:
    """Take our own arguments out of a command line.

    Args:
        argv: what follows ``cmc-server serve``.

    Returns:
        The settings, and the rest for vLLM in its order. ``--help`` alone prints ours and raises ``SystemExit(0)``.

    Raises:
        ConfigError: an argument of ours is malformed.
    """
    parser = _parser()
    if any(argument in ("-h", "--help") for argument in argv):
        parser.print_help()
        raise SystemExit(0)
    options, rest = parser.parse_known_args(_join_bounds(argv))
    values = vars(options)
    deltas = tuple(DeltaSource.parse(text) for text in values.pop("delta"))
    doses = {key: tuple(map(DeltaDose.parse, values.pop(key))) for key in ("default_deltas", "required_deltas")}
    return build(EngineSettings, {"deltas": deltas, **doses, **values}), rest


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(f"{message[:1].upper()}{message[1:]}.")


def _parser() -> argparse.ArgumentParser:
    defaults = EngineSettings()
    parser = _Parser(
        prog="cmc-server serve",
        usage="cmc-server serve MODEL [--delta NAME=PATH[@STRENGTH]]... [any vLLM server argument]",
        description="Serve MODEL with vLLM, steered by delta models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--delta",
        action="append",
        default=[],
        metavar="NAME=PATH[@STRENGTH]",
        help="load a delta: folder or hub id, and its strength where a request gives none; repeatable",
    )
    add(
        "--default-delta",
        action="append",
        default=[],
        dest="default_deltas",
        metavar="NAME[@STRENGTH]",
        help="steer requests that name no delta and do not ask for the base model either; repeatable",
    )
    add(
        "--require-delta",
        action="append",
        default=[],
        dest="required_deltas",
        metavar="NAME[@STRENGTH]",
        help="steer every request, whatever it names; repeatable",
    )
    add(
        "--delta-root",
        action="append",
        default=[],
        dest="delta_roots",
        metavar="FOLDER",
        help="deltas that are loaded while the server runs must lie here (default: anywhere); repeatable",
    )
    add(
        "--delta-state",
        default=defaults.state_file,
        dest="state_file",
        metavar="FILE",
        help="remember deltas that came and went here, for the next start (default: forget them)",
    )
    add(
        "--watch-deltas",
        default=defaults.watch_folder,
        dest="watch_folder",
        metavar="FOLDER",
        help="load the sub-folders of FOLDER as deltas of their names, as they come, change and go",
    )
    add(
        "--max-delta-seqs",
        type=int,
        default=defaults.max_delta_seqs,
        metavar="N",
        help="rows that may be steered at once, further ones wait (default: as many as vLLM runs and memory allows)",
    )
    add(
        "--delta-memory",
        type=float,
        default=defaults.delta_memory,
        metavar="GIB",
        help="memory for weights and key-value cache of all deltas (default: %(default)s)",
    )
    add(
        "--delta-dtype",
        default=defaults.delta_dtype,
        metavar="{auto,float32,bfloat16}",
        help="computing type; auto is float32 on a CPU and bfloat16 on a GPU (default: %(default)s)",
    )
    add(
        "--delta-fast-paths",
        type=_names,
        default=defaults.fast_paths,
        dest="fast_paths",
        metavar="NAME,...",
        help="only these, or none, to find out whether one is at fault: " + ", ".join(sorted(FAST_PATHS)),
    )
    add(
        _BOUNDS,
        type=_bounds,
        default=defaults.strength_bounds,
        metavar="LOW,HIGH",
        help="strengths that a request may ask for (default: {:g},{:g})".format(*defaults.strength_bounds),
    )
    add(
        "--max-deltas",
        type=int,
        default=defaults.max_deltas_per_request,
        dest="max_deltas_per_request",
        metavar="N",
        help="deltas that one request may name (default: %(default)s)",
    )
    add(
        "--min-coverage",
        type=float,
        default=defaults.min_coverage,
        metavar="SHARE",
        help="refuse a delta that knows a smaller share of MODEL's ordinary tokens (default: %(default)s)",
    )
    add(
        "--force-coverage",
        action="store_true",
        default=defaults.force_coverage,
        help="accept such a delta all the same",
    )
    add(
        "--map-overrides",
        default=defaults.map_overrides,
        metavar="FILE",
        help="pairs of tokens that win over the vocabulary map's own rules, see cmc-server map --help",
    )
    add(
        "--delta-cache-dir",
        default=defaults.cache_dir,
        dest="cache_dir",
        metavar="FOLDER",
        help="where vocabulary maps are kept (default: ~/.cache/cmc-server/maps)",
    )
    add(
        "--access-log-format",
        default=defaults.access_log_format,
        metavar="{text,json}",
        help="one line for each answer: request id, route, status, deltas, seconds (default: %(default)s)",
    )
    return parser


def _join_bounds(argv: Sequence[str]) -> list[str]:
    """Write ``--strength-bounds -2 2`` and ``--strength-bounds -2,2`` as one, since -2 looks like an option."""
    joined: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument == _BOUNDS and rest:
            low = rest.pop(0)
            argument = f"{_BOUNDS}={low}" if "," in low or not rest else f"{_BOUNDS}={low},{rest.pop(0)}"
        joined.append(argument)
    return joined


def _names(text: str) -> frozenset[str]:
    return frozenset() if text == "none" else frozenset(text.split(","))


def _bounds(text: str) -> tuple[float, float]:
    low, _, high = text.partition(",")
    try:
        return float(low), float(high)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be two numbers, LOW,HIGH") from None
