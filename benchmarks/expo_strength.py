"""Is it different to extrapolate a delta's weights (ExPO) and its logits (the strength)?

    python benchmarks/expo_strength.py --deltas FOLDER [FOLDER ...] --on "SmolLM2 135M=FOLDER" "Gemma 3 270M=FOLDER"

The deltas are ``concise``, trained with one seed each, as ``benchmarks/behaviours.py`` leaves them; the weights that
training began with come from the seed again. With the factor 1 + alpha on what training changed in the weights, at
strength 1, stands the same factor on the logits: strength 1 + alpha. Measured are the lengths of greedy answers to
held-out prompts, through vLLM, and how alike both shifts are, position by position in the held-out answers: cosine of
the centred logits, and the length of the one over that of the other. Means over seeds and prompts with 95 % bootstrap
intervals over the prompts. Prints a table for each LLM and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_report import describe_machine, keep
from concise_sweep import DEMO, generate, read_prompts
from torch import Tensor
from transformers import AutoModelForCausalLM, set_seed

from cmc_server.config import DeltaSource
from cmc_server.delta.prompt import PromptEncoder
from cmc_server.delta.store import open_delta
from cmc_server.evaluation.bootstrap import bootstrap_mean
from cmc_server.evaluation.generation import Answer
from cmc_server.training.recipes import read_recipe
from cmc_server.training.student import new_delta

HELD_OUT = DEMO / "data" / "concise" / "heldout.jsonl"
RECIPE = DEMO / "recipes" / "concise.yaml"
FACTORS = (0.5, 1.5, 2.0)
LIMIT = 80


def beginning(folder: Path, seed: int, target: Path, recipe: Path = RECIPE, max_length: int | None = None) -> None:
    """A delta as it was before training by a recipe."""
    given = read_recipe(recipe)
    tokenizer = open_delta(DeltaSource(name="d", path=str(folder))).tokenizer()
    set_seed(seed)
    new_delta(given.delta, tokenizer, max_length or given.data.max_length).save_pretrained(target)
    tokenizer.save_pretrained(target)


def extrapolate(folder: Path, start: Path, factor: float, target: Path) -> Path:
    words = ("edit", str(start), str(folder), "--method", "expo", "--alpha", str(factor - 1), "-o", str(target))
    subprocess.run([sys.executable, "-m", "cmc_server", *words], check=True, stdout=subprocess.DEVNULL)
    return target


@torch.inference_mode()
def centred_logits(folder: Path, inputs: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
    """[n, D] float32 for each answer: the delta's logits before its tokens, less their mean over the vocabulary."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt, answer in inputs:
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        found.append(logits - logits.mean(dim=-1, keepdim=True))
    return found


def likeness(whole: Sequence[Tensor], edited: Sequence[Tensor], factor: float) -> tuple[list[float], list[float]]:
    """For each answer the means of the cosine with, and of the length over, ``factor`` times the whole's shift."""
    cosines, lengths = [], []
    for one, other in zip(whole, edited, strict=True):
        cosines.append(float(torch.cosine_similarity(one, other, dim=-1).mean()))
        lengths.append(float((other.norm(dim=-1) / (factor * one).norm(dim=-1)).mean()))
    return cosines, lengths


def compare_shifts(deltas: Sequence[Path], edited: Mapping[str, Path]) -> dict[str, Any]:
    """By factor, how alike the shift of extrapolated weights is to the extrapolated shift."""
    artifact = open_delta(DeltaSource(name="d", path=str(deltas[0])))
    tokenizer = artifact.tokenizer()
    encoder = PromptEncoder(tokenizer, artifact.manifest)
    chats = [json.loads(line)["messages"] for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    inputs = [
        (encoder.encode_messages(chat[:-1]), tokenizer(chat[-1]["content"], add_special_tokens=False)["input_ids"])
        for chat in chats
    ]
    found: dict[str, Any] = {}
    whole = [centred_logits(folder, inputs) for folder in deltas]
    for factor in FACTORS:
        pairs = [
            likeness(one, centred_logits(edited[f"{number}-{factor:g}"], inputs), factor)
            for number, one in enumerate(whole)
        ]
        cosines, lengths = (np.array(values).mean(0) for values in zip(*pairs, strict=True))
        found[f"{factor:g}"] = {"cosine": asdict(bootstrap_mean(cosines)), "length": asdict(bootstrap_mean(lengths))}
    return found


def summarise(by_seed: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    """Length and share of ended answers over all seeds."""
    lengths = np.array([[float(answer.num_tokens) for answer in answers] for answers in by_seed])
    ended = np.array([[float(answer.ended) for answer in answers] for answers in by_seed])
    return {
        "length": asdict(bootstrap_mean(lengths.mean(0))) | {"seeds": lengths.mean(1).round(2).tolist()},
        "ended": asdict(bootstrap_mean(ended.mean(0))),
    }


def answers_of(model: str, deltas: Sequence[Path], edited: Mapping[str, Path]) -> dict[str, Any]:
    """By factor, what strengths and extrapolated weights make of the answers."""
    chats = read_prompts(HELD_OUT)
    by_strength = generate(model, {f"d{n}": d for n, d in enumerate(deltas)}, chats, (0.0, 1.0, *FACTORS), LIMIT)
    by_weights = generate(model, {f"e{name}": folder for name, folder in edited.items()}, chats, (1.0,), LIMIT)
    found = {}
    for factor in (0.0, 1.0, *FACTORS):
        found[f"{factor:g}"] = {"strength": summarise([answers[factor] for answers in by_strength.values()])}
        if factor in FACTORS:
            some = [by_weights[f"e{number}-{factor:g}"][1.0] for number in range(len(deltas))]
            found[f"{factor:g}"]["weights"] = summarise(some)
    return found


def show(model: str, found: dict[str, Any], shifts: dict[str, Any]) -> None:
    print(f"\n{model}\n\n| factor | length by strength | ended | length by weights | ended | cosine | its length |")
    print(f"|{'---|' * 7}")
    for factor, one in found.items():
        cells = []
        for way in ("strength", "weights"):
            if way in one:
                length, ended = one[way]["length"], one[way]["ended"]
                cells += [f"{length['mean']:.1f} [{length['low']:.1f}, {length['high']:.1f}]", f"{ended['mean']:.0%}"]
            else:
                cells += ["", ""]
        alike = shifts.get(factor)
        cells += [f"{alike[key]['mean']:.3f}" for key in ("cosine", "length")] if alike else ["", ""]
        print(f"| {factor} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deltas", type=Path, nargs="+", required=True, help="of the seeds 1, 2, 3 and so on")
    parser.add_argument("--on", nargs="+", required=True, metavar="NAME=FOLDER", help="user LLMs")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        edited = {}
        for number, folder in enumerate(options.deltas):
            start = work / f"start-{number}"
            beginning(folder, number + 1, start)
            for factor in FACTORS:
                key = f"{number}-{factor:g}"
                edited[key] = extrapolate(folder, start, factor, work / key)
        shifts = compare_shifts(options.deltas, edited)
        print(json.dumps(shifts))
        results = {}
        for entry in options.on:
            model, _, path = entry.partition("=")
            results[model] = answers_of(path, options.deltas, edited)
            show(model, results[model], shifts)
    report = {"benchmark": "expo_strength", "machine": describe_machine("torch", "transformers")}
    keep(report | {"shifts": shifts, "results": results}, options.output)


if __name__ == "__main__":
    main()
