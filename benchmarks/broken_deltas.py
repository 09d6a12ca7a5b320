"""Broken delta folders, posted to a running server: is every one refused with one sentence, and nothing harmed?

    python benchmarks/broken_deltas.py --delta FOLDER --user FOLDER [--count 1000] [--seed 1]
    python benchmarks/broken_deltas.py --delta FOLDER --url URL --admin-key KEY --work FOLDER [--count 60]

Copies of a good delta are broken in one way each: files that are missing, cut off, or have flipped bits; tensors that
are missing, superfluous, of other shapes, of other types, or not finite; an index or links that lead out of the folder.
A bit may flip where it changes a weight a little and nothing else; only such a folder may be loaded, and is unloaded
again. With ``--user`` a server is started for it; with ``--url`` it must allow the folder ``--work``. Prints how each
kind was answered and, as its last line, one JSON object. Exit code 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from benchmark_report import describe_machine, keep
from breakages import BREAKAGES, flip
from servers import OURS, server


def post_all(http: httpx.Client, delta: Path, work: Path, count: int, seed: int) -> tuple[dict[str, Any], list[str]]:
    """Break, post and clean up, one folder after the other; statuses by kind, and what was wrong."""
    draw = random.Random(seed)
    statuses: dict[str, Counter[int]] = {one.__name__: Counter() for one in BREAKAGES}
    problems: list[str] = []
    for number in range(count):
        breakage = BREAKAGES[number % len(BREAKAGES)]
        folder = work / f"broken-{number}"
        shutil.copytree(delta, folder)
        breakage(folder, draw)
        answer = http.post("/v1/deltas", json={"name": "broken", "path": str(folder)})
        statuses[breakage.__name__][answer.status_code] += 1
        what = f"{breakage.__name__} (folder {number} of seed {seed})"
        if answer.status_code < 300:
            if breakage is not flip:
                problems.append(f"{what} was loaded")
            http.delete("/v1/deltas/broken").raise_for_status()
        elif answer.status_code >= 500 or "\n" in answer.json()["error"]["message"].strip():
            problems.append(f"{what}: {answer.status_code} {answer.text[:300]}")
        shutil.rmtree(folder)
        print(f"\r{number + 1} of {count}", end="", file=sys.stderr)
    print(file=sys.stderr)
    if http.get("/ready").status_code != 200:
        problems.append("the server is not ready any more")
    left = [one["name"] for one in http.get("/v1/deltas").json()["data"]]
    if "broken" in left:
        problems.append("a broken delta is still listed")
    return {kind: {str(status): n for status, n in some.items()} for kind, some in statuses.items()}, problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delta", type=Path, required=True, help="a good delta; the smaller the faster")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--user", type=Path, help="start a server of this LLM")
    where.add_argument("--url", help="a running server")
    parser.add_argument("--admin-key", default="admin")
    parser.add_argument("--work", type=Path, help="folder for the broken ones, which the server allows")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cmc-broken-") as made:
        work = options.work or Path(made)
        work.mkdir(exist_ok=True)

        def run(url: str) -> tuple[dict[str, Any], list[str]]:
            headers = {"Authorization": f"Bearer {options.admin_key}"}
            with httpx.Client(base_url=url, headers=headers, timeout=120) as http:
                return post_all(http, options.delta, work, options.count, options.seed)

        if options.url:
            statuses, problems = run(options.url)
        else:
            os.environ["CMC_SERVER_ADMIN_KEY"] = options.admin_key
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
            engine = ["--enforce-eager", "--max-model-len", "512", "--delta-root", str(work)]
            with server(OURS, options.user, [*engine, "--delta-state", f"{made}/state"], Path(made) / "log") as url:
                statuses, problems = run(url)
    for kind, some in statuses.items():
        print(f"{kind}: {some}")
    for problem in problems[:20]:
        print(f"PROBLEM {problem}", file=sys.stderr)
    report = {"benchmark": "broken_deltas", "machine": describe_machine("torch", "safetensors")}
    report |= {"count": options.count, "seed": options.seed, "statuses": statuses, "problems": problems}
    keep(report, options.output)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
