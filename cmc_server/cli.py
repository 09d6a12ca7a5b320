"""The verbs of ``cmc-server``. Each one imports its area only when it is called."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cmc_server import __version__
from cmc_server.errors import ConfigError, UserError

#: Verbs that SIGTERM ends as Ctrl-C does. The others have their own ways, or leave nothing behind.
_EDITING = ("edit", "merge", "sparsify")


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after the program's name; None takes those of the process.

    Returns:
        The exit code: 0, or 2 for what the user got wrong, after one sentence on stderr. With the words of the process
        also 128 and the number of a signal that ended it: 130 Ctrl-C, 143 SIGTERM, 141 nobody read its output.
    """
    if argv is not None:  # an interruption is the caller's
        return _command(list(argv))
    if sys.argv[1:2] == ["serve"]:  # vLLM heeds signals itself
        return _command(sys.argv[1:])
    return _process(sys.argv[1:])


def _process(words: list[str]) -> int:
    try:
        try:
            with _heeding_termination(words):
                return _command(words)
        finally:
            sys.stdout.flush()  # what this raises could not be caught at exit
    except KeyboardInterrupt as stop:
        print("cmc-server: interrupted before it was done.", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT)
    except BrokenPipeError:
        if not _is_unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the rest would be tried again at exit
        return 128 + signal.SIGPIPE


@contextmanager
def _heeding_termination(words: Sequence[str]) -> Iterator[None]:
    """Lets an editing verb clean up behind itself when it is terminated, unless whoever started it has it ignored."""
    if words[:1] and words[0] in _EDITING and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    else:
        yield


def _terminate(*_: object) -> None:
    raise _Terminated


def _is_unread() -> bool:
    """Whether stdout is a pipe that nobody reads any more; a connection may break as well."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _command(words: list[str]) -> int:
    try:
        if words[:1] == ["serve"]:  # everything behind it belongs to the server's own parser and vLLM's
            from cmc_server.api.server import run_serve

            return run_serve(words[1:])
        if words[:1] == ["bench"]:  # as above
            from cmc_server.api.bench import run_bench

            return run_bench(words[1:])
        if words[:2] == ["merge", "measure"]:  # one verb in two words; a BASE of that name is ./measure
            words[:2] = ["merge measure"]
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
    if args.verb == "eval":
        return _eval(args)
    if args.verb == "edit":
        return _edit(args)
    if args.verb == "merge":
        return _merge(args)
    if args.verb == "sparsify":
        return _sparsify(args)
    if args.verb == "merge measure":
        from cmc_server.editing.measure_command import MeasureOptions, run_measure

        return run_measure(MeasureOptions(**_given(args)), args.json)
    from cmc_server.delta.report import run_inspect

    return run_inspect(args.delta, args.user, args.json)


def _eval(args: argparse.Namespace) -> int:
    from cmc_server.config import DeltaSource
    from cmc_server.evaluation.command import run_eval
    from cmc_server.evaluation.options import EvalOptions

    given = _given(args)
    given["deltas"] = tuple(DeltaSource.parse(text) for text in args.deltas or ())
    for name in ("suites", "strengths", "other"):
        if name in given:
            given[name] = tuple(given[name])
    return run_eval(EvalOptions(**given), args.json)


def _edit(args: argparse.Namespace) -> int:
    from cmc_server.editing.edit_command import run_edit
    from cmc_server.editing.edit_options import EditOptions

    given = _given(args)
    values = {name: given.pop(name) for name in EditOptions.method_options() if name in given}
    for name in ("others", "only", "exclude"):
        if name in given:
            given[name] = tuple(given[name])
    return run_edit(EditOptions(values=values, **given), args.json)


def _merge(args: argparse.Namespace) -> int:
    from cmc_server.editing.merge_command import run_merge
    from cmc_server.editing.merge_options import MergeOptions

    given = _given(args)
    values = {name: given.pop(name) for name in MergeOptions.method_options() if name in given}
    for name in ("models", "curvature", "data", "alphas"):
        if name in given:
            given[name] = tuple(given[name])
    return run_merge(MergeOptions(values=values, **given), args.json)


def _sparsify(args: argparse.Namespace) -> int:
    from cmc_server.editing.sparsify_command import run_sparsify
    from cmc_server.editing.sparsify_options import SparsifyOptions

    given = _given(args)
    values = {name: given.pop(name) for name in SparsifyOptions.tuning_options() if name in given}
    for name in ("only", "exclude"):
        if name in given:
            given[name] = tuple(given[name])
    return run_sparsify(SparsifyOptions(values=values, **given), args.json)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """What was given; the rest is left to the defaults of the settings."""
    return {name: value for name, value in vars(args).items() if value is not None and name not in ("verb", "json")}


def _seed(text: str) -> int:
    """A seed, in the range that a recipe's has."""
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) < 2**32):
        raise ConfigError(f"--seed must be a whole number from 0 to {2**32 - 1}, not {text}.")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cmc-server",
        description="Serve a large language model that small, portable delta models steer at decoding time.",
    )
    parser.add_argument("--version", action="version", version=f"cmc-server {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("serve", help="start the OpenAI-compatible server (cmc-server serve --help)", add_help=False)

    verbs.add_parser("bench", help="measure a running server (cmc-server bench --help)", add_help=False)

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

    _add_eval(verbs.add_parser("eval", help="measure what a delta does to a user LLM, and write a report"))

    _add_edit(verbs.add_parser("edit", help="edit what training changed in a checkpoint, and measure or pack it"))

    _add_merge(
        verbs.add_parser(
            "merge",
            help="merge checkpoints trained from one base, or take training out again",
            epilog="Curvature files are made by another verb, see cmc-server merge measure --help.",
        )
    )

    _add_measure(verbs.add_parser("merge measure", help="measure the curvature that some merges need"))

    _add_sparsify(verbs.add_parser("sparsify", help="prune a checkpoint, and tune what is left"))

    inspect = verbs.add_parser("inspect", help="say what a delta is, and how well it fits a user LLM")
    inspect.add_argument("delta", metavar="DELTA", help="folder or hub id of the delta")
    inspect.add_argument("--user", metavar="MODEL", help="folder or hub id of a user LLM")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("user", metavar="USER", help="folder or hub id of the user LLM")
    parser.add_argument(
        "--delta",
        action="append",
        dest="deltas",
        metavar="NAME=PATH[@S]",
        help="a delta; the first one is under study, others keep their strength; none measures the bare LLM",
    )
    parser.add_argument(
        "--suite",
        action="extend",
        nargs="+",
        dest="suites",
        metavar="SUITE",
        help="tofu, sweep, retained, alpaca, coverage, shift (retained, alpaca and coverage)",
    )
    parser.add_argument("--strengths", nargs="+", type=float, metavar="S", help="of the first delta (0 0.5 1 1.5)")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="prompts for alpaca, sweep and shift")
    parser.add_argument("--tofu", type=Path, metavar="FOLDER", help="TOFU's own files instead of the packaged part")
    parser.add_argument("--forget", metavar="SPLIT", help="forget01, forget05 or forget10 (forget01)")
    parser.add_argument(
        "--retain-only", type=Path, metavar="RESULTS.json", help="results of a retain-only model, for forget quality"
    )
    parser.add_argument("--effect", metavar="EFFECT", help="what the sweep measures: target, forget or length")
    parser.add_argument("--max-loss", type=float, help="harm that the advised range allows, nats per token (0.1)")
    parser.add_argument(
        "--write-manifest", action="store_true", default=None, help="write the advised range into the delta's manifest"
    )
    parser.add_argument("--tuned", metavar="MODEL", help="fine-tuned copy of USER, for shift")
    parser.add_argument(
        "--other", nargs=2, metavar=("BASE", "TUNED"), help="for shift: compare with these instead of with the delta"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder for everything written (cmc-eval)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions, prompts and texts")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest greedy answer (128)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="sequences at once (32)")
    parser.add_argument("--dtype", help="float32 or bfloat16 (float32)")
    parser.add_argument("--device", help="cpu, cuda, ... (cpu)")
    parser.add_argument("--seed", type=_seed, help="of the bootstrap (0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_edit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="folder of the model before training, or the word zero")
    parser.add_argument("post", metavar="POST", type=Path, help="folder of the model after training")
    parser.add_argument("--method", required=True, help="dare, magnitude, bitdelta, twin, ties or expo")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--drop", type=float, metavar="P", help="share to drop (0.9; ties 0.8), of singular values: twin"
    )
    parser.add_argument("--k", type=float, help="dare: what dropped delta parameters are multiplied by (0)")
    parser.add_argument("--alpha", type=float, help="expo: above 0 extrapolates, below 0 interpolates (0.3)")
    parser.add_argument("--rank", type=int, metavar="R", help="twin: singular values to keep instead of --drop")
    parser.add_argument("--levels", type=int, metavar="M", help="bitdelta: magnitude levels (1)")
    parser.add_argument("--magnitudes", help="bitdelta: mean, uniform or normal (mean)")
    parser.add_argument("--granularity", help="bitdelta: scales of a tensor or of each row (tensor; zero base: row)")
    parser.add_argument("--factor", type=float, metavar="C", help="bitdelta, ties: factor on what is kept (1)")
    parser.add_argument(
        "--with", type=Path, action="append", dest="others", metavar="POST", help="ties: one more model to merge"
    )
    parser.add_argument("--only", action="append", metavar="PATTERN", help="edit only tensors of such names (*)")
    parser.add_argument("--exclude", action="append", metavar="PATTERN", help="keep tensors of such names as in POST")
    parser.add_argument("--seed", type=_seed, help="of random masks and magnitudes (0)")
    parser.add_argument("--packed", action="store_true", help="bitdelta: store signs, levels and scales alone")
    parser.add_argument("--calibrate", type=Path, metavar="DATA", help="bitdelta: train the scales on these texts")
    parser.add_argument("--calibration-steps", type=int, metavar="N", help="optimiser steps of --calibrate (200)")
    parser.add_argument("--calibration-rate", type=float, metavar="LR", help="learning rate of --calibrate (1e-4)")
    parser.add_argument("--analyse", type=Path, metavar="DATA", help="take the loss difference on these texts apart")
    parser.add_argument("--analyse-examples", type=int, metavar="N", help="use only the first N texts (16)")
    parser.add_argument("--mask-seeds", type=int, metavar="N", help="seeds for the spread over masks (8)")
    parser.add_argument("--dry-run", action="store_true", help="do everything but write")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint that lies at the output")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="folder of the model before training, or the word zero")
    parser.add_argument("models", metavar="MODEL", type=Path, nargs="+", help="folders of models trained from it")
    parser.add_argument("--method", required=True, help="task-arithmetic, ties, fisher, regmean or gradient-matching")
    parser.add_argument("--weights", nargs="+", type=float, metavar="A", help="of the models (1 each)")
    parser.add_argument("--remove", action="store_true", help="take what the models learned out of BASE")
    parser.add_argument(
        "--curvature", nargs="+", type=Path, metavar="FILE", help="of the models: fisher, regmean, gradient-matching"
    )
    parser.add_argument("--base-curvature", type=Path, metavar="FILE", help="gradient-matching: of BASE")
    parser.add_argument(
        "--damping",
        type=float,
        metavar="D",
        help="fisher: added to every curvature; gradient-matching: to BASE's (1e-12)",
    )
    parser.add_argument(
        "--floor", type=float, metavar="R", help="gradient-matching: least H0 - alpha Ht when removing, of H0 (0.1)"
    )
    parser.add_argument("--off-diagonal", type=float, metavar="R", help="regmean: factor off the diagonal (0.9)")
    parser.add_argument("--drop", type=float, metavar="P", help="ties: share to trim (0.8)")
    parser.add_argument("--factor", type=float, metavar="C", help="ties: factor on the result (1)")
    parser.add_argument("--against", type=Path, metavar="TARGET", help="compare with a jointly trained model")
    parser.add_argument("--data", nargs="+", type=Path, help="the models' data, a file each, to measure losses on")
    parser.add_argument(
        "--alphas", nargs="+", type=float, metavar="A", help="factors on all weights to measure losses for"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--dry-run", action="store_true", help="do everything but write")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint that lies at the output")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_measure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder of the model")
    parser.add_argument("data", metavar="DATA", type=Path, help="JSON lines with prompt and response, or text")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="file to write")
    parser.add_argument("--kind", help="fisher, or gram for regmean (fisher)")
    parser.add_argument("--examples", type=int, metavar="N", help="use only the first N texts")
    parser.add_argument("--dataset-size", type=int, metavar="N", help="texts that MODEL learned from (those in DATA)")
    parser.add_argument("--seed", type=_seed, help="of the labels that the model draws (0)")
    parser.add_argument("--force", action="store_true", help="replace a file that lies at the output")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_sparsify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder of the model")
    parser.add_argument("--method", help="magnitude, wanda or sparsegpt (wanda)")
    parser.add_argument("--sparsity", type=float, metavar="S", help="share of the weights that go, in [0, 1)")
    parser.add_argument("--pattern", metavar="N:M", help="instead: N weights of each M stay, such as 2:4")
    parser.add_argument("--calibrate", type=Path, metavar="DATA", help="texts for the inputs of layers")
    parser.add_argument("--sequences", type=int, metavar="N", help="calibration sequences at most (128)")
    parser.add_argument("--length", type=int, metavar="N", help="their tokens at most (2048, or the model's limit)")
    parser.add_argument("--allocation", help="sparsity of blocks: uniform or cka, by redundancy (uniform)")
    parser.add_argument("--spread", type=float, metavar="D", help="cka: from the mean at most (0.01 to 0.03)")
    parser.add_argument("--beta", type=float, help="cka: how much redundancy counts (1)")
    parser.add_argument("--tuning", metavar="METHOD", help="none, pooled, lora, masked-lora or oracle (none)")
    parser.add_argument("--tuning-data", type=Path, metavar="DATA", help="texts to tune on")
    parser.add_argument("--iterations", type=int, metavar="T", help="rounds of pruning and tuning (5; untuned 1)")
    parser.add_argument("--rank", type=int, metavar="R", help="of LoRA in the mean; pooled: as many parameters (8)")
    parser.add_argument("--budget", help="of a layer's adapter: by its reconstruction loss, or uniform (loss)")
    parser.add_argument("--scale", type=float, metavar="A", help="factor on adapters (2)")
    parser.add_argument("--learning-rate", type=float, metavar="LR", help="highest one (2e-4)")
    parser.add_argument("--weight-decay", type=float, metavar="D", help="of adapters (1e-3)")
    parser.add_argument("--dropout", type=float, metavar="P", help="on what adapters read (0.1)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="texts for each step (16)")
    parser.add_argument("--examples", type=int, metavar="N", help="texts of each round but the last one (1000)")
    parser.add_argument("--final-examples", type=int, metavar="N", help="texts of the last round (6000)")
    parser.add_argument("--heldout", type=Path, metavar="DATA", help="texts to measure losses on")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="prune only tensors of such names (*)")
    parser.add_argument("--exclude", action="append", metavar="PATTERN", help="leave tensors of such names dense")
    parser.add_argument("--seed", type=_seed, help="of samples, first factors and dropout (0)")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--dry-run", action="store_true", help="do everything but write")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint that lies at the output")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
