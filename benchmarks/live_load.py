"""Loading deltas into a busy server: how long a load takes, and what the running answers notice of it.

    python benchmarks/live_load.py --user FOLDER [--streams 8] [--loads 5] [--template FOLDER]

Streams run all the time. Gaps between their tokens are compared: those that overlap the loading of a delta of about 15
million random weights, each of another content, with those in quiet stretches between. ``--template`` gives the delta
another vocabulary than the user LLM's. The first load is shown alone: it also reads a vocabulary, which the later ones
find there. The aims: under 3 s for a load, and a 99th percentile that grows by less than one step. Prints a table and,
as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from benchmark_report import describe_machine, keep
from numpy.typing import NDArray
from random_models import write_random_delta
from servers import OURS, server

from cmc_server.training.recipes import DeltaSize

FIFTEEN_MILLION = DeltaSize(hidden_size=256, intermediate_size=688, num_layers=4, num_heads=4)
ADMIN = {"Authorization": "Bearer admin"}
QUIET_SECONDS = 6.0


async def stream(http: httpx.AsyncClient, stop: asyncio.Event, gaps: list[tuple[float, float]]) -> None:
    """Begin and end of every gap between two tokens."""
    while not stop.is_set():
        body = {"model": "user", "prompt": "It was a dark night, and", "max_tokens": 400, "ignore_eos": True}
        before = None
        async with http.stream("POST", "/v1/completions", json=body | {"stream": True, "temperature": 1}) as answer:
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                now = time.perf_counter()
                if before is not None:
                    gaps.append((before, now))
                before = now
                if stop.is_set():
                    break


async def measure(url: str, deltas: Sequence[Path], num_streams: int) -> tuple[list[tuple[float, float]], list[Any]]:
    """All gaps, and begin and end of every load."""
    gaps: list[tuple[float, float]] = []
    loads = []
    stop = asyncio.Event()
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None)) as http:
        tasks = [asyncio.create_task(stream(http, stop, gaps)) for _ in range(num_streams)]
        for number, delta in enumerate(deltas):
            await asyncio.sleep(QUIET_SECONDS)
            began = time.perf_counter()
            answer = await http.post("/v1/deltas", json={"name": f"d{number}", "path": str(delta)}, headers=ADMIN)
            answer.raise_for_status()
            loads.append((began, time.perf_counter()))
        await asyncio.sleep(QUIET_SECONDS)
        stop.set()
        await asyncio.gather(*tasks)
    return gaps, loads


def gaps_within(
    gaps: Sequence[tuple[float, float]], loads: Sequence[tuple[float, float]], inside: bool = True
) -> NDArray[np.float64]:
    """In milliseconds, the gaps that overlap one of the loads, or none of them."""
    overlaps = [any(begin < end and began < ended for begin, ended in loads) for began, end in gaps]
    return np.array([1e3 * (end - began) for (began, end), one in zip(gaps, overlaps, strict=True) if one is inside])


def describe(milliseconds: NDArray[np.float64]) -> dict[str, float]:
    """How many, and how long."""
    p50, p99 = np.quantile(milliseconds, [0.5, 0.99])
    return {"count": len(milliseconds), "p50": float(p50), "p99": float(p99), "longest": float(milliseconds.max())}


def seconds_of(loads: Sequence[tuple[float, float]]) -> list[float]:
    """Of each."""
    return [round(ended - begin, 2) for begin, ended in loads]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--user", type=Path, required=True)
    parser.add_argument("--template", type=Path, help="whose vocabulary the delta has; the user LLM's by default")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--loads", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    os.environ["CMC_SERVER_ADMIN_KEY"] = "admin"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with tempfile.TemporaryDirectory(prefix="cmc-load-") as folder:
        work = Path(folder)
        template = options.template or options.user
        deltas = [
            write_random_delta(work / f"d{seed}", template, FIFTEEN_MILLION, seed) for seed in range(options.loads)
        ]
        live = ["--delta-root", folder, "--delta-state", f"{folder}/state", "--delta-memory", "4"]
        engine = ["--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16"]
        with server(OURS, options.user, [*engine, *live], work / "log") as url:
            gaps, loads = asyncio.run(measure(url, deltas, options.streams))
    first, later = loads[:1], loads[1:]
    quiet = gaps_within(gaps, loads, inside=False)
    figures: dict[str, Any] = {
        "step_ms": float(np.median(quiet)),
        "quiet": {"gaps_ms": describe(quiet)},
        "first_load": {"seconds": seconds_of(first), "gaps_ms": describe(gaps_within(gaps, first))},
        "later_loads": {"seconds": seconds_of(later), "gaps_ms": describe(gaps_within(gaps, later))},
    }
    for name in ("quiet", "first_load", "later_loads"):
        one = figures[name]
        gap = ", ".join(f"{key} {value:.1f}" for key, value in one["gaps_ms"].items())
        print(f"{name}: {one.get('seconds', '')} s; gaps in ms: {gap}")
    for name in ("first_load", "later_loads"):
        figures[name]["p99_growth_ms"] = figures[name]["gaps_ms"]["p99"] - figures["quiet"]["gaps_ms"]["p99"]
        print(f"{name}: p99 grows by {figures[name]['p99_growth_ms']:.1f} ms, aim: less than {figures['step_ms']:.1f}")
    report = {"benchmark": "live_load", "machine": describe_machine("torch")}
    report |= {"streams": options.streams, "same_vocabulary": options.template is None}
    keep(report | figures, options.output)


if __name__ == "__main__":
    main()
