"""Output tokens per second through HTTP: plain vLLM, base traffic beside loaded deltas, and steered traffic.

    python benchmarks/serving.py --user USER_LLM --delta DELTA [--concurrent 1 8 32 --pairs 15 --tokens 64]

Two servers run at once, plain vLLM and ours with the delta loaded, and are asked in turn, so that each pair of figures
is taken within seconds. The bound: t_base / (t_base + max(delta FLOPs / GEMM peak, delta bytes / bandwidth)) per step,
with peak and bandwidth measured in this run on as many threads as vLLM's worker uses. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmark_report import describe_machine, keep

PLAIN_VLLM = """
import sys
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser
command = ServeSubcommand()
parser = FlexibleArgumentParser()
command.subparser_init(parser.add_subparsers(dest="subparser"))
arguments = parser.parse_args(["serve", *sys.argv[1:]])
command.validate(arguments)
command.cmd(arguments)
"""
PROMPT = "Tell me everything that you know about number {number}, from the beginning to the end, in your own words."
KINDS = ("plain", "base", "delta")


@contextmanager
def server(command: Sequence[str], user: Path, extra: Sequence[str], log: Path) -> Iterator[str]:
    """A running server; its base URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [*command, str(user), "--port", str(port), "--served-model-name", "user", "--max-num-seqs", "32"]
    words += ["--max-model-len", "1024", "--no-enable-prefix-caching", "--disable-uvicorn-access-log", *extra]
    with log.open("w") as stream:
        process = subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(f"the server ended while it started; see {log}\n{log.read_text()[-2000:]}")
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2)
                break
            except OSError:
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


async def throughput(url: str, body: dict[str, Any], concurrent: int, tokens: int) -> float:
    """Output tokens per second of ``concurrent`` requests sent at once."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        prompts = [PROMPT.format(number=random.randrange(10**6)) for _ in range(concurrent)]
        began = time.perf_counter()
        answers = await asyncio.gather(
            *(
                client.completions.create(
                    model="user",
                    prompt=prompt,
                    max_tokens=tokens,
                    temperature=0,
                    extra_body={"ignore_eos": True, **body},
                )
                for prompt in prompts
            )
        )
        seconds = time.perf_counter() - began
    counted = sum(answer.usage.completion_tokens for answer in answers if answer.usage)
    if counted != concurrent * tokens:
        raise SystemExit(f"expected {concurrent * tokens} tokens, got {counted}")
    return counted / seconds


def machine_limits(threads: int) -> tuple[float, float]:
    """GEMM peak in FLOP/s and copy bandwidth in bytes/s, float32, best of several."""
    import torch

    torch.set_num_threads(threads)
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    source = torch.zeros(64 * 2**20)
    target = torch.empty_like(source)

    def best(action: Any) -> float:
        times = []
        for _ in range(8):
            began = time.perf_counter()
            action()
            times.append(time.perf_counter() - began)
        return min(times)

    peak = 2 * 1024**3 / best(lambda: torch.mm(left, right))
    bandwidth = 2 * source.nbytes / best(lambda: target.copy_(source))
    return peak, bandwidth


def delta_cost(delta: Path, rows: int, context: int) -> tuple[float, float]:
    """FLOPs and bytes of one step of a delta: every weight once (embeddings only as the output head), and the cache."""
    from transformers import AutoConfig

    from cmc_server.delta.capacity import cache_shape

    config = AutoConfig.from_pretrained(delta)
    layers, heads, head_size = cache_shape(config)
    queries = config.num_attention_heads * head_size
    per_layer = config.hidden_size * (2 * queries + 2 * heads * head_size + 3 * config.intermediate_size)
    weights = layers * per_layer + config.hidden_size * config.vocab_size
    flops = 2 * weights * rows + layers * 4 * queries * context * rows
    cached = 2 * layers * heads * head_size * context * rows
    return float(flops), 4.0 * (weights + cached)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Bootstrap 95 % interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return round(medians[50], 4), round(medians[1949], 4)


def measure(args: argparse.Namespace, plain: str, ours: str, limits: tuple[float, float]) -> list[dict[str, Any]]:
    steered = {"cmc": {"deltas": [{"name": "delta", "strength": 1.0}], "unmapped": "zero"}}
    targets = {"plain": (plain, {}), "base": (ours, {}), "delta": (ours, steered)}
    results = []
    for concurrent in args.concurrent:
        rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for number in range(args.pairs + 1):  # the first round warms up
            for kind in random.sample(KINDS, len(KINDS)):
                rate = asyncio.run(throughput(*targets[kind], concurrent, args.tokens))
                if number:
                    rates[kind].append(rate)
            print(f"{concurrent} concurrent, round {number} of {args.pairs}", file=sys.stderr)
        results.append(summary(args, concurrent, rates, limits))
    return results


def summary(
    args: argparse.Namespace, concurrent: int, rates: dict[str, list[float]], limits: tuple[float, float]
) -> dict[str, Any]:
    medians = {kind: round(statistics.median(values), 1) for kind, values in rates.items()}
    flops, moved = delta_cost(args.delta, concurrent, 30 + args.tokens // 2)
    base_step = concurrent / medians["base"]
    bound = base_step / (base_step + max(flops / limits[0], moved / limits[1]))
    with_delta = [delta / base for delta, base in zip(rates["delta"], rates["base"], strict=True)]
    loaded = [base / plain for base, plain in zip(rates["base"], rates["plain"], strict=True)]
    result = {
        "concurrent": concurrent,
        "tokens_per_second": medians,
        "bound_of_delta_over_base": round(bound, 4),
        "delta_over_base": {"median": round(statistics.median(with_delta), 4), "interval": interval(with_delta)},
        "base_over_plain_vllm": {"median": round(statistics.median(loaded), 4), "interval": interval(loaded)},
    }
    ratio = result["delta_over_base"]
    print(
        f"{concurrent:>3} concurrent: bound {bound:.3f}, delta/base {ratio['median']:.3f} {ratio['interval']}, "
        f"base/plain {result['base_over_plain_vllm']['median']:.3f}, tokens/s {medians}"
    )
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--user", type=Path, required=True)
    parser.add_argument("--delta", type=Path, required=True)
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--output", type=Path, help="also write the report here")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=["--enforce-eager"], help="more server arguments")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    limits = machine_limits(args.threads)
    print(f"GEMM peak {limits[0] / 1e9:.1f} GFLOP/s, bandwidth {limits[1] / 1e9:.1f} GB/s on {args.threads} threads")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        logs = Path(folder)
        plain = stack.enter_context(
            server([sys.executable, "-c", PLAIN_VLLM], args.user, args.serve, logs / "plain.log")
        )
        ours = stack.enter_context(
            server(
                [sys.executable, "-m", "cmc_server", "serve"],
                args.user,
                [*args.serve, "--delta", f"delta={args.delta}"],
                logs / "ours.log",
            )
        )
        results = measure(args, plain, ours, limits)
    report = {
        "benchmark": "serving",
        "machine": describe_machine("torch", "transformers"),
        "user": args.user.name,
        "delta": args.delta.name,
        "tokens": args.tokens,
        "pairs": args.pairs,
        "results": results,
        "gemm_gflops": round(limits[0] / 1e9, 1),
        "bandwidth_gb_s": round(limits[1] / 1e9, 1),
        "threads": args.threads,
    }
    keep(report, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
