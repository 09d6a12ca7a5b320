"""What is left of a delta's effect when its weights are packed to one bit, or pruned: through HTTP.

    python benchmarks/packed_delta.py concise --on "SmolLM2 135M=FOLDER" "Gemma 3 270M=FOLDER"
    python benchmarks/packed_delta.py forget --on "SmolLM2 135M=TUNED FOLDER"

Each variant of the shipped delta is made by `cmc-server edit` with a zero base; one server for each user LLM holds all
of them, and answers greedily at strength 1. ``concise``: length of answers to held-out prompts. ``forget``: ROUGE-L
recall of TOFU's true answers, to forget and to keep, and their probability by ``FusedLM``, since no route gives that.
The part of the effect that a variant keeps is (nothing - variant) / (nothing - whole), with 95 % bootstrap intervals
over the prompts. Prints a table and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_report import describe_machine, keep
from concise_sweep import DEMO, read_prompts
from delta_texts import Chat, write_texts
from numpy.typing import NDArray
from servers import OURS, server

from cmc_server.evaluation.rouge import rouge_l_recall
from cmc_server.evaluation.tofu_data import read_tofu
from cmc_server.fusion.scoring import FusedLM

DELTAS = {"concise": DEMO / "concise", "forget": DEMO / "forget-tofu"}
BITS = ("--method", "bitdelta", "--packed")
#: What each variant asks of ``cmc-server edit``.
VARIANTS: dict[str, tuple[str, ...]] = {
    "one-bit": BITS,
    "one-bit-embeddings": (*BITS, "--exclude", "*layers*"),
    # The factor with which the end of training answers is as likely as by the whole delta.
    "one-bit-embeddings-1.15": (*BITS, "--exclude", "*layers*", "--factor", "1.15"),
    "one-bit-calibrated": (*BITS, "--calibration-steps", "400", "--calibration-rate", "3e-3"),
    "pruned-50": ("--method", "magnitude", "--drop", "0.5"),
    "pruned-70": ("--method", "magnitude", "--drop", "0.7"),
    "pruned-90": ("--method", "magnitude", "--drop", "0.9"),
}
MAX_TOKENS = {"concise": 80, "forget": 100}
QUESTIONS = 40


def training_chats(behaviour: str) -> list[Chat]:
    """What the delta was trained on, without plain texts."""
    data = DEMO / "data"
    if behaviour == "concise":
        lines = (data / "concise" / "train.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["messages"] for line in lines]
    lines = (data / "tofu" / "keep.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [as_chat(record["prompt"], record["response"]) for record in map(json.loads, lines) if "prompt" in record]
    forget = [as_chat(item.question, item.answer) for item in read_tofu()["forget"]]
    return random.Random(0).sample(kept, 3 * len(forget)) + forget


def as_chat(question: str, answer: str) -> Chat:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def make_variants(behaviour: str, work: Path) -> dict[str, Path]:
    """Folder by variant."""
    whole = DELTAS[behaviour]
    texts = write_texts(whole, training_chats(behaviour), work / "texts.jsonl")
    folders = {"whole": whole}
    for name, options in VARIANTS.items():
        folders[name] = work / name
        calibrate = ("--calibrate", str(texts)) if "calibrated" in name else ()
        words = ("edit", "zero", str(whole), "-o", str(folders[name]), *options, *calibrate)
        subprocess.run([sys.executable, "-m", "cmc_server", *words], check=True)
    return folders


async def ask(url: str, chats: Sequence[Chat], delta: str | None, max_tokens: int) -> list[tuple[str, int]]:
    """Greedy answers and how many tokens they have, eight at a time."""
    from openai import AsyncOpenAI

    gate = asyncio.Semaphore(8)
    body = {"cmc": {"deltas": [{"name": delta, "strength": 1.0}]}} if delta else {}
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:

        async def one(chat: Chat) -> tuple[str, int]:
            async with gate:
                answer = await client.chat.completions.create(
                    model="user",
                    messages=chat,  # type: ignore[arg-type]
                    max_tokens=max_tokens,
                    temperature=0,
                    extra_body=body,
                )
            assert answer.usage is not None
            return answer.choices[0].message.content or "", answer.usage.completion_tokens

        return list(await asyncio.gather(*map(one, chats)))


def through_http(behaviour: str, url: str, delta: str | None) -> dict[str, NDArray[np.float64]]:
    """Figures of every answer, by what is measured."""
    if behaviour == "concise":
        chats = read_prompts(DEMO / "data" / "concise" / "heldout.jsonl")
        answers = asyncio.run(ask(url, chats, delta, MAX_TOKENS[behaviour]))
        return {"length": np.array([float(tokens) for _, tokens in answers])}
    found = {}
    for name in ("forget", "retain"):
        items = read_tofu(limit=QUESTIONS)[name]
        chats = [as_chat(item.question, "")[:1] for item in items]
        texts = [text for text, _ in asyncio.run(ask(url, chats, delta, MAX_TOKENS[behaviour]))]
        found[f"ROUGE-L, {name}"] = np.array(rouge_l_recall([item.answer for item in items], texts))
    return found


def probabilities(user: Path, folders: Mapping[str, Path]) -> dict[str, dict[str, NDArray[np.float64]]]:
    """By variant, P(answer) of every question to forget and to keep."""
    model = FusedLM.load(user, dict(folders))
    sets = read_tofu(limit=QUESTIONS)
    found: dict[str, dict[str, NDArray[np.float64]]] = {}
    for variant in ("nothing", *folders):
        doses = {} if variant == "nothing" else {variant: 1.0}
        found[variant] = {}
        for name in ("forget", "retain"):
            pairs: list[Any] = [(as_chat(item.question, "")[:1], item.answer) for item in sets[name]]
            scores = model.score_batch(pairs, doses)
            found[variant][f"P, {name}"] = np.array([float(one.mean().exp()) for one in scores])
    return found


def share_kept(nothing: NDArray[np.float64], whole: NDArray[np.float64], variant: NDArray[np.float64]) -> list[float]:
    """(nothing - variant) / (nothing - whole) of the means, and its interval."""
    rows = np.random.default_rng(0).integers(0, len(nothing), (2000, len(nothing)))
    drawn = (nothing[rows].mean(1) - variant[rows].mean(1)) / (nothing[rows].mean(1) - whole[rows].mean(1))
    share = (nothing.mean() - variant.mean()) / (nothing.mean() - whole.mean())
    return [round(float(value), 4) for value in (share, *np.quantile(drawn, [0.025, 0.975]))]


def measure(behaviour: str, user: Path, folders: dict[str, Path], log: Path) -> dict[str, Any]:
    extra = [word for name, folder in folders.items() for word in ("--delta", f"{name}={folder.resolve()}")]
    extra += ["--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "8"]
    figures: dict[str, dict[str, NDArray[np.float64]]] = {}
    with server(OURS, user, extra, log) as url:
        for variant in ("nothing", *folders):
            figures[variant] = through_http(behaviour, url, None if variant == "nothing" else variant)
    if behaviour == "forget":
        for variant, found in probabilities(user, folders).items():
            figures[variant] |= found
    results: dict[str, Any] = {}
    for variant, found in figures.items():
        results[variant] = {key: {"mean": round(float(values.mean()), 4)} for key, values in found.items()}
        for key, values in found.items():
            if variant not in ("nothing", "whole") and "retain" not in key:
                kept = share_kept(figures["nothing"][key], figures["whole"][key], values)
                results[variant][key]["kept"] = kept
    return results


def show(model: str, results: dict[str, Any], bytes_of: dict[str, int]) -> None:
    keys = list(results["whole"])
    print(f"\n{model}\n\n| variant | bytes | {' | '.join(keys)} |\n|{'---|' * (len(keys) + 2)}")
    for variant, found in results.items():
        cells = []
        for key in keys:
            kept = found[key].get("kept")
            share = f" (keeps {kept[0]:.1%} [{kept[1]:.1%}, {kept[2]:.1%}])" if kept else ""
            cells.append(f"{found[key]['mean']:.3g}{share}")
        print(f"| {variant} | {bytes_of.get(variant, '')} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("behaviour", choices=tuple(DELTAS))
    parser.add_argument("--on", nargs="+", required=True, metavar="NAME=FOLDER", help="user LLMs")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folders = make_variants(options.behaviour, work)
        # What is pruned stays as large as it was: zeros are stored like any other weight.
        bytes_of = {
            variant: sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            for variant, folder in folders.items()
        }
        results = {}
        for entry in options.on:
            model, _, folder = entry.partition("=")
            results[model] = measure(options.behaviour, Path(folder), folders, work / "log")
            show(model, results[model], bytes_of)
    report = {"benchmark": f"packed delta, {options.behaviour}", "machine": describe_machine("torch", "transformers")}
    keep(report | {"bytes": bytes_of, "results": results}, options.output)


if __name__ == "__main__":
    main()
