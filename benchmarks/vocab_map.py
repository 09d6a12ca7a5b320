"""Time vocabulary maps: reading both vocabularies, building the map, and what all pairs would have cost.

    python benchmarks/vocab_map.py [--pair LABEL USER DELTA]... [--all-pairs NUM] [--output FILE]

Without ``--pair`` the two demo models are used, in both directions. Everything runs on one thread; the first build is
a warm-up, the median of the others counts. ``--all-pairs NUM`` compares NUM random user tokens with every delta token
by rapidfuzz's edit distance, on one thread too, and extrapolates to the whole user vocabulary (labelled so); it also
checks the map of these tokens against the all-pairs reference. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from benchmark_report import describe_machine, keep
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from cmc_server.vocab.pm_mined import characters, match_tokens
from cmc_server.vocab.reference import match_tokens_by_all_pairs
from cmc_server.vocab.surface import Vocabulary, load_tokenizer, read_generation_config, read_vocabulary
from cmc_server.vocab.vocab_map import build_map

T = TypeVar("T")
Pair = tuple[str, str, str]


def main() -> None:
    arguments = _arguments()
    pairs = [tuple(pair) for pair in arguments.pair] or _demo_pairs()
    results = {label: _measure(user, delta, arguments) for label, user, delta in pairs}
    machine = {**describe_machine("numpy", "rapidfuzz", "tokenizers", "transformers"), "threads_used": 1}
    report = {"benchmark": "vocab_map", "machine": machine, "maps": results}
    keep(report, arguments.output)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs=3, action="append", default=[], metavar=("LABEL", "USER", "DELTA"))
    parser.add_argument("--repeat", type=int, default=7, help="timed builds after the warm-up")
    parser.add_argument("--all-pairs", type=int, default=0, metavar="NUM", help="user tokens to compare with all")
    parser.add_argument("--output", type=Path, help="also write the report here")
    return parser.parse_args()


def _demo_pairs() -> list[Pair]:
    from cmc_server.demo.models import demo_model

    gemma3, smollm2 = str(demo_model("gemma3")), str(demo_model("smollm2"))
    return [("Gemma 3 -> SmolLM2", gemma3, smollm2), ("SmolLM2 -> Gemma 3", smollm2, gemma3)]


def _measure(user_path: str, delta_path: str, arguments: argparse.Namespace) -> dict[str, Any]:
    tokenizers = [(load_tokenizer(path), read_generation_config(path)) for path in (user_path, delta_path)]
    read_seconds, (user, delta) = _timed(lambda: [read_vocabulary(*pair) for pair in tokenizers])
    build_map(user, delta)
    wall, cpu = [], []
    for _ in range(arguments.repeat):
        started = time.process_time()
        seconds, built = _timed(lambda: build_map(user, delta))
        wall.append(seconds)
        cpu.append(time.process_time() - started)
    result = {
        "user_tokens": user.size,
        "delta_tokens": delta.size,
        "read_vocabularies_s": round(read_seconds, 3),
        "build_s": {
            "median": round(statistics.median(wall), 4),
            "min": round(min(wall), 4),
            "max": round(max(wall), 4),
        },
        "build_cpu_s": round(statistics.median(cpu), 4),
        "coverage": round(built.coverage, 4),
        "match": dict(built.counts),
    }
    if arguments.all_pairs:
        result["all_pairs"] = _all_pairs(user, delta, arguments.all_pairs)
    print(f"{user_path} -> {delta_path}: {result}", file=sys.stderr)
    return result


def _all_pairs(user: Vocabulary, delta: Vocabulary, num_tokens: int) -> dict[str, Any]:
    """Distances of some user tokens to all delta tokens, and the map of these tokens checked."""
    tokens = random.Random(0).sample(user.ordinary_ids, min(num_tokens, len(user.ordinary_ids)))
    sample = [user.surfaces[token] for token in tokens]
    queries = [characters(surface) for surface in sample if surface is not None]
    choices = [characters(surface) for surface in delta.surfaces if surface is not None]
    seconds, _ = _timed(lambda: cdist(queries, choices, scorer=Levenshtein.distance, workers=1))
    fast_ids, fast_match = match_tokens(sample, delta.surfaces, {}, delta.byte_ids)
    slow_ids, slow_match = match_tokens_by_all_pairs(sample, delta.surfaces, {}, delta.byte_ids)
    return {
        "sample_tokens": len(tokens),
        "rapidfuzz_cdist_sample_s": round(seconds, 3),
        "rapidfuzz_cdist_extrapolated_to_all_tokens_s": round(seconds * len(user.ordinary_ids) / len(tokens), 1),
        "sample_equals_reference": np.array_equal(fast_ids, slow_ids) and np.array_equal(fast_match, slow_match),
    }


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    value = call()
    return time.perf_counter() - started, value


if __name__ == "__main__":
    main()
