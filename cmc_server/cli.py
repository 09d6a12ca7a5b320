"""The verbs of ``cmc-server``. Each one imports its area only when it is called."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cmc_server import __version__
from cmc_server.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after the program's name; None takes those of the process.

    Returns:
        The exit code: 0, or 2 for what the user got wrong, after one sentence on stderr.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["serve"]:  # everything behind it belongs to the server's own parser and vLLM's
            from cmc_server.api.server import run_serve

            return run_serve(words[1:])
        return _run(_parser().parse_args(words))
    except UserError as error:
        print(f"cmc-server: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    if args.verb == "map":
        from cmc_server.vocab.command import run_map

        return run_map(args.user, args.delta, args.output, args.overrides, args.sample, args.json)
    if args.verb == "train":
        from cmc_server.training.command import run_train

        return run_train(args.recipe, args.output, args.template, restart=args.restart)
    from cmc_server.delta.report import run_inspect

    return run_inspect(args.delta, args.user, args.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cmc-server",
        description="Serve a large language model that small, portable delta models steer at decoding time.",
    )
    parser.add_argument("--version", action="version", version=f"cmc-server {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("serve", help="start the OpenAI-compatible server (cmc-server serve --help)", add_help=False)

    vocabulary_map = verbs.add_parser("map", help="build the vocabulary map from a user LLM to a delta")
    vocabulary_map.add_argument("user", metavar="USER", help="folder or hub id of the user LLM")
    vocabulary_map.add_argument("delta", metavar="DELTA", help="folder or hub id of the delta")
    vocabulary_map.add_argument("-o", "--output", type=Path, help="write the map to this safetensors file")
    vocabulary_map.add_argument("--overrides", type=Path, help="JSON or YAML file with pairs of special tokens")
    vocabulary_map.add_argument("--sample", type=Path, help="text file; adds statistics by token frequency")
    vocabulary_map.add_argument("--json", action="store_true", help="print one JSON object")

    train = verbs.add_parser("train", help="train a delta beside a frozen template LLM")
    train.add_argument("recipe", metavar="RECIPE.yaml", type=Path)
    train.add_argument("-o", "--output", type=Path, help="folder of the delta instead of the recipe's")
    train.add_argument(
        "--template",
        action="append",
        help="template LLM instead of the recipe's, such as a local copy of it; once for each template of the recipe",
    )
    train.add_argument("--restart", action="store_true", help="begin again instead of going on with an unfinished run")

    inspect = verbs.add_parser("inspect", help="say what a delta is, and how well it fits a user LLM")
    inspect.add_argument("delta", metavar="DELTA", help="folder or hub id of the delta")
    inspect.add_argument("--user", metavar="MODEL", help="folder or hub id of a user LLM")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
