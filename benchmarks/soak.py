"""Does a server break, leak or answer wrongly under clients of every temper while its deltas come and go?

    python benchmarks/soak.py --user FOLDER --deltas FOLDER [FOLDER ...] [--minutes 30] [--clients 32] [--seed 1]

The clients ask the base model and deltas, whole and streamed, go away in the middle, and send bad bodies, while three
delta names are loaded, replaced by other folders and unloaded every few seconds. Afterwards:

- every request that was answered with 500 or more is sent to plain vLLM, without its deltas, and must fail there too;
- memory of the server's processes that no file backs: the last tenth of the time against the first after the warm-up,
  which begins with prompts of many lengths, since vLLM's CPU layers remember each;
- a sample of the finished greedy answers, base and steered, is read by the oracle: at every step the token that was
  emitted is the best one or within 1e-3 of it.

Prints what was seen and, as its last line, one JSON object. Exit code 1 if anything was wrong. With --plain the same
clients ask plain vLLM, all of them for the base model: what grows there is not ours.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
from benchmark_report import describe_machine, keep
from servers import OURS, PLAIN_VLLM, server
from soak_traffic import ADMIN_KEY, USER, Answered, Client, Seen, operate

NAMES = ("a", "b", "c")
TOLERANCE = 1e-3
MAX_GROWTH = 0.05
ENGINE = ["--enforce-eager", "--dtype", "float32", "--generation-config", "vllm", "--max-model-len", "512"]
_SAMPLE_SECONDS = 2.0


async def soak(
    url: str, options: argparse.Namespace, names: Sequence[str] = NAMES
) -> tuple[Seen, list[tuple[float, int]]]:
    """The traffic; what was seen, and the memory in bytes by second."""
    seen, stop = Seen(), asyncio.Event()
    limits = httpx.Limits(max_connections=None)
    memory: list[tuple[float, int]] = []
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        if options.minutes > options.warm_up:  # memory will be judged
            await visit_shapes(http)
        clients = [
            Client(http, seen, names, 1000 * options.seed + place, options.tokens, options.sample)
            for place in range(options.clients)
        ]
        tasks = [asyncio.create_task(client.run(stop)) for client in clients]
        if names:
            tasks.append(asyncio.create_task(operate(http, seen, names, options.deltas, stop, options.seed)))
        began = time.monotonic()
        while (passed := time.monotonic() - began) < 60 * options.minutes:
            memory.append((passed, await asyncio.to_thread(memory_of_children)))
            print(
                f"\r{passed:6.0f} s, {memory[-1][1] / 2**20:.0f} MiB, {seen.num_answered} answers", end="", flush=True
            )
            await asyncio.sleep(_SAMPLE_SECONDS)
        stop.set()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, BaseException):
                seen.broken.append(repr(outcome))
        answer = await http.get("/ready")
        if answer.status_code != 200:
            seen.broken.append(f"/ready: {answer.status_code}")
    print(file=sys.stderr)
    return seen, memory


def memory_of_children() -> int:
    """Bytes of the server and all its processes that are backed by no file; what is shared counts once."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it is gone
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total


async def visit_shapes(http: httpx.AsyncClient) -> None:
    """Prompts of more lengths than vLLM's CPU linear layers remember, one after the other.

    A step with a number of tokens that was not there before has oneDNN write code for each shape of weight, about a
    megabyte in all. vLLM keeps it for the last 128 numbers (``primitive_cache_size`` in its ``_custom_ops.py``), oneDNN
    itself for the last 1,024 pairs of number and shape. Until both are full, memory grows, under plain vLLM as well.
    """
    for length in range(2, 302):
        body = {"model": USER, "prompt": [100 + length % 1000] * length, "max_tokens": 1}
        (await http.post("/v1/completions", json=body)).raise_for_status()


def growth(memory: Sequence[tuple[float, int]], warm_up: float) -> float | None:
    """Of the median memory: the last tenth of the time after the warm-up against the first; None if there are few."""
    warm = [size for seconds, size in memory if seconds >= warm_up]
    part = len(warm) // 10
    if part < 3:
        return None
    return statistics.median(warm[-part:]) / statistics.median(warm[:part]) - 1


def without_controls(body: Any) -> Any:
    """The body as plain vLLM may get it."""
    if not isinstance(body, dict):
        return body
    plain = {key: value for key, value in body.items() if key != "cmc"}
    names_delta = str(plain.get("model", "")).partition("@")[0].split("+")[0] in NAMES
    return plain | ({"model": USER} if names_delta else {})


def answered_by_plain(url: str, failed: Sequence[tuple[str, Any]]) -> list[str]:
    """Of the requests that failed, those that plain vLLM answers."""
    answered = []
    for path, body in failed:
        content = body if isinstance(body, str) else json.dumps(without_controls(body))
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(f"{url}{path}", content=content, headers=headers, timeout=300)
        if answer.status_code < 500:
            answered.append(f"{path} {content[:300]}")
    return answered


def judge(user: Path, folders: Sequence[Path], answers: Sequence[Answered]) -> dict[str, Any]:
    """By base and steered: worst distance of an emitted token from the oracle's best one, and what was wrong."""
    from cmc_server.delta.store import content_version
    from cmc_server.fusion.scoring import FusedLM

    versions = {content_version(folder): folder for folder in folders}
    model = FusedLM.load(user, {f"{name}.{version}": versions[version] for name in NAMES for version in versions})
    gaps: dict[str, list[float]] = {"base": [], "steered": []}
    wrong: dict[str, list[str]] = {"base": [], "steered": []}
    for answer in answers:
        logits = model.step_logits((answer.prompt, list(answer.ids)), dict(answer.doses), unmapped="zero")
        emitted = logits.gather(1, logits.new_tensor(answer.ids).long()[:, None])[:, 0]
        kind = "steered" if any(strength for _, strength in answer.doses) else "base"
        gap = (logits.amax(dim=1) - emitted).max().item()
        gaps[kind].append(gap)
        if gap > TOLERANCE:
            wrong[kind].append(f"gap {gap:.3f}: {answer}")
    return {
        kind: {"answers": len(some), "worst_gap": max(some, default=0.0), "wrong": wrong[kind]}
        for kind, some in gaps.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--user", type=Path, required=True, help="the user LLM's folder")
    parser.add_argument("--deltas", type=Path, nargs="+", required=True, help="folders that the names take turns with")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--warm-up", type=float, default=5, help="minutes before memory is compared")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48, help="longest answer")
    parser.add_argument("--sample", type=int, default=300, help="answers that the oracle reads")
    parser.add_argument("--plain", action="store_true", help="ask plain vLLM instead")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    options.deltas = [folder.resolve() for folder in options.deltas]
    os.environ["CMC_SERVER_ADMIN_KEY"] = ADMIN_KEY
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    roots = [word for folder in options.deltas for word in ("--delta-root", str(folder.parent))]
    with tempfile.TemporaryDirectory(prefix="cmc-soak-") as work:
        words = [*ENGINE, "--max-num-seqs", "32"]
        if not options.plain:
            words += ["--delta-state", f"{work}/state.json", "--delta-memory", "2", *roots]
        with server(PLAIN_VLLM if options.plain else OURS, options.user, words, Path(work) / "server.log") as url:
            seen, memory = asyncio.run(soak(url, options, () if options.plain else NAMES))
        answered_there: list[str] = []
        if seen.failed:
            with server(PLAIN_VLLM, options.user, ENGINE, Path(work) / "plain.log") as url:
                answered_there = answered_by_plain(url, seen.failed)
    judged = judge(options.user, options.deltas, seen.answered)
    grown = growth(memory, 60 * options.warm_up)
    statuses = {what: {str(status): count for status, count in some.items()} for what, some in seen.statuses.items()}
    problems = [*seen.broken, *(f"plain vLLM answers {one}" for one in answered_there)]
    problems += [f"wrong {kind} answer, {what}" for kind, one in judged.items() for what in one["wrong"]]
    problems += [f"memory grew by {grown:.1%}"] if grown is not None and grown > MAX_GROWTH else []
    for what, some in statuses.items():
        print(f"{what}: {some}")
    change = "not judged" if grown is None else f"{grown:+.1%} after the warm-up"
    print(f"memory {memory[0][1] >> 20} -> {memory[-1][1] >> 20} MiB, {change}")
    print(f"judged by the oracle: {judged}")
    for problem in problems[:20]:
        print(f"PROBLEM {problem}", file=sys.stderr)
    report = {"benchmark": "soak", "machine": describe_machine("torch", "transformers")}
    report |= {"server": "plain vLLM" if options.plain else "cmc-server"}
    report |= {"minutes": options.minutes, "clients": options.clients, "seed": options.seed, "statuses": statuses}
    report |= {"failed": len(seen.failed), "finished_greedy": seen.num_answered, "judged": judged}
    report |= {"memory_mib": [[round(at), size >> 20] for at, size in memory[:: max(1, len(memory) // 30)]]}
    keep(report | {"memory_growth": grown, "problems": problems}, options.output)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
