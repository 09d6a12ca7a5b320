"""Throughput and latency through HTTP: base traffic, one and two deltas, mixed traffic, and vLLM's LoRA.

    python benchmarks/serving.py --user USER_LLM [--template TEMPLATE_LLM] [--concurrent 1 8 32 --pairs 15 --tokens 64]
    python benchmarks/serving.py --user USER_LLM --kinds base delta --concurrent 8 --tokens 2000 --pairs 3

Up to three servers run at once and are asked in turn, in a new order in each round, so that every pair of figures is
taken within seconds of each other: plain vLLM, ours with two deltas loaded, and vLLM with a LoRA adapter of rank 8 on
all linear layers. Deltas (7 million weights, vocabulary of the template LLM, which is the user LLM unless given) and
adapter have random weights. All requests of a round are sent at once and stream.

kinds: plain (vLLM), base (ours, no delta), delta, two (deltas), mixed (every second request has a delta), lora

The bound: t_base / (t_base + max(delta FLOPs / GEMM peak, delta bytes / bandwidth)) per step, peak and bandwidth
measured in this run on as many threads as vLLM's worker uses. It supposes that a delta waits for the user LLM; where a
core is to spare the two run at once, and the bound can be passed. Prints a line for each number of concurrent requests
and kind and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
from benchmark_report import describe_machine, keep
from bounds import delta_cost, interval, machine_limits
from random_models import write_random_delta, write_random_lora
from servers import OURS, PLAIN_VLLM, server

PROMPT = "Tell me everything that you know about number {number}, from the beginning to the end, in your own words."
PROMPT_TOKENS = 30
KINDS = ("plain", "base", "delta", "two", "mixed", "lora")
#: How many deltas run.
NUM_DELTAS = {"delta": 1, "two": 2, "mixed": 1}


@dataclass(frozen=True)
class Round:
    """One round of requests: output tokens per second, seconds to first tokens, seconds between tokens."""

    throughput: float
    first: list[float]
    between: list[float]


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[list[float], int]:
    """When each part of a streamed completion came, and how many tokens it had."""
    times, counted = [], 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if ("cmc" in body) != (answer.headers.get("x-cmc-deltas", "none") != "none"):
            raise SystemExit(f"asked for {body.get('cmc')}, answered with {answer.headers.get('x-cmc-deltas')}")
        async for line in answer.aiter_lines():
            if line.startswith('data: {"'):
                times.append(time.perf_counter())
                if '"usage":{' in line:
                    counted = json.loads(line[6:])["usage"]["completion_tokens"]
    return times[:-1], counted  # the last part holds the usage alone


async def play(url: str, extras: Sequence[dict[str, Any]], tokens: int) -> Round:
    """Send one request for each of ``extras`` at once."""
    shared = {"model": "user", "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    shared |= {"stream_options": {"include_usage": True}}
    prompts = [PROMPT.format(number=random.randrange(10**6)) for _ in extras]
    async with httpx.AsyncClient(base_url=url, timeout=1800) as client:
        bodies = [shared | {"prompt": prompt} | extra for prompt, extra in zip(prompts, extras, strict=True)]
        began = time.perf_counter()
        answers = await asyncio.gather(*(ask(client, body) for body in bodies))
        seconds = time.perf_counter() - began
    if any(counted != tokens for _, counted in answers):
        raise SystemExit(f"expected {tokens} tokens each, got {[counted for _, counted in answers]}")
    between = [late - early for times, _ in answers for early, late in pairwise(times)]
    return Round(len(extras) * tokens / seconds, [times[0] - began for times, _ in answers], between)


def extras(kind: str, concurrent: int) -> list[dict[str, Any]]:
    """What each request of a round has besides its prompt."""
    names = ["delta", "second"] if kind == "two" else ["delta"]
    steered = {"cmc": {"deltas": [{"name": name, "strength": 0.5} for name in names], "unmapped": "zero"}}
    if kind == "lora":
        return [{"model": "lora"}] * concurrent
    if kind in ("plain", "base"):
        return [{}] * concurrent
    # A single request of mixed traffic has the delta.
    return [{} if kind == "mixed" and number % 2 else steered for number in range(concurrent)]


def measure(
    options: argparse.Namespace, urls: dict[str, str], delta: Path, limits: tuple[float, float]
) -> Iterator[dict[str, Any]]:
    """For each number of concurrent requests the figures of every kind."""
    for concurrent in options.concurrent:
        rounds: dict[str, list[Round]] = {kind: [] for kind in options.kinds}
        for number in range(options.pairs + 1):  # the first round warms up
            for kind in random.sample(options.kinds, len(options.kinds)):
                played = asyncio.run(play(urls[kind], extras(kind, concurrent), options.tokens))
                if number:
                    rounds[kind].append(played)
            print(f"{concurrent} concurrent, round {number} of {options.pairs}", file=sys.stderr)
        costs = {}
        for kind in NUM_DELTAS:
            # Half of the rows do not halve the cost: the weights are read once for any number of rows.
            rows = sum(bool(extra) for extra in extras(kind, concurrent))
            flops, moved = delta_cost(delta, rows, PROMPT_TOKENS + options.tokens // 2)
            costs[kind] = NUM_DELTAS[kind] * max(flops / limits[0], moved / limits[1])
        found = {"concurrent": concurrent, "delta_milliseconds": round(1e3 * costs["delta"], 2)}
        yield found | summarise(rounds, concurrent, costs)


def summarise(rounds: dict[str, list[Round]], concurrent: int, costs: dict[str, float]) -> dict[str, Any]:
    """Medians, ratios of pairs with their intervals, and the bounds; ``costs`` is seconds of a step's deltas."""
    found: dict[str, Any] = {}
    base_kind = "base" if "base" in rounds else "plain"
    step = concurrent / statistics.median(one.throughput for one in rounds[base_kind])
    for kind, played in rounds.items():
        between = sorted(gap for one in played for gap in one.between)
        found[kind] = {
            "tokens_per_second": round(statistics.median(one.throughput for one in played), 1),
            "first_token_ms": round(1e3 * statistics.median(first for one in played for first in one.first), 1),
            "between_tokens_ms_p50": round(1e3 * between[len(between) // 2], 1),
            "between_tokens_ms_p99": round(1e3 * between[int(0.99 * len(between))], 1),
        }
        against = "plain" if kind in ("base", "lora") and "plain" in rounds else base_kind
        if kind != against:
            ratios = [one.throughput / other.throughput for one, other in zip(played, rounds[against], strict=True)]
            found[kind] |= {f"over_{against}": round(statistics.median(ratios), 4), "interval": interval(ratios)}
        if kind in costs:
            found[kind]["bound"] = round(step / (step + costs[kind]), 4)
        print(f"{concurrent:>3} concurrent, {kind}: {json.dumps(found[kind])}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--user", type=Path, required=True)
    parser.add_argument("--template", type=Path, help="LLM whose vocabulary the deltas have (default: the user LLM)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--output", type=Path, help="also write the report here")
    parser.add_argument("--ours", nargs="*", default=[], help="more arguments of our server, without their dashes")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=["--enforce-eager"], help="more server arguments")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    limits = machine_limits(options.threads)
    print(f"GEMM peak {limits[0] / 1e9:.1f} GFLOP/s, bandwidth {limits[1] / 1e9:.1f} GB/s on {options.threads} threads")
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        template = options.template or options.user
        deltas = [
            write_random_delta(folder / name, template, seed=seed) for seed, name in enumerate(("delta", "second"))
        ]
        ours = [word for path in deltas for word in ("--delta", f"{path.name}={path}")]
        ours += [f"--{word}" for word in options.ours]
        shared = ["--max-num-seqs", str(max(options.concurrent)), "--max-model-len", str(max(1024, 2 * options.tokens))]
        shared += options.serve

        def start(command: Sequence[str], more: Sequence[str], log: str) -> str:
            return stack.enter_context(server(command, options.user, [*shared, *more], folder / log))

        urls = {}
        if "plain" in options.kinds:
            urls["plain"] = start(PLAIN_VLLM, [], "plain.log")
        if set(options.kinds) - {"plain", "lora"}:
            url = start(OURS, ours, "ours.log")
            urls |= dict.fromkeys(("base", "delta", "two", "mixed"), url)
        if "lora" in options.kinds:
            adapter = write_random_lora(folder / "lora", options.user)
            lora = ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"lora={adapter}"]
            urls["lora"] = start(PLAIN_VLLM, lora, "lora.log")
        results = list(measure(options, urls, deltas[0], limits))
    report = {"benchmark": "serving", "machine": describe_machine("torch", "transformers", "vllm-cpu")}
    report |= {"user": options.user.name, "template": template.name, "tokens": options.tokens, "pairs": options.pairs}
    report |= {"ours": options.ours, "serve": options.serve, "threads": options.threads, "results": results}
    report |= {"gemm_gflops": round(limits[0] / 1e9, 1), "bandwidth_gb_s": round(limits[1] / 1e9, 1)}
    keep(report, options.output)


if __name__ == "__main__":
    main()
