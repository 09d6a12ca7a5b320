"""How strongly a trained behaviour changes the answers of LLMs, seed by seed, and whether several templates help.

    python benchmarks/behaviours.py concise --work FOLDER --trained "alone=A" --on "SmolLM2 135M=A" "Gemma 3 270M=C"
    python benchmarks/behaviours.py bullets --work FOLDER --trained "alone=A" "two=A,B" "bridged=A,C" --on "other=D"

``--trained NAME=FOLDER[,FOLDER]`` names the template LLMs of one condition, ``--on`` the LLMs to measure on. Recipe,
data and steps are the same for all conditions; each is trained with every seed. The answers are greedy ones to
held-out prompts, through vLLM. Every figure is a mean over seeds and prompts, with a 95% bootstrap interval over the
prompts, and the means of the single seeds beside it. Prints a table for each condition and, as its last line, one JSON
object.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from benchmark_report import describe_machine, keep
from concise_sweep import DEMO, generate, read_prompts
from unlearning import RECIPES, make, run

from cmc_server.demo.bullets_data import is_bullets
from cmc_server.evaluation.bootstrap import bootstrap_mean
from cmc_server.evaluation.generation import Answer

#: What is measured of each answer.
FIGURES: dict[str, Callable[[Answer], float]] = {
    "length": lambda answer: answer.num_tokens,
    "ended": lambda answer: answer.ended,
    "bullets": lambda answer: is_bullets(answer.text),
}
#: What is measured of each behaviour.
BEHAVIOURS = {"concise": ("length", "ended"), "bullets": ("bullets", "length", "ended")}


def summarise(behaviour: str, by_seed: Sequence[dict[float, list[Answer]]]) -> list[dict[str, Any]]:
    """By strength, the figures over all seeds."""
    rows = []
    for strength in by_seed[0]:
        row: dict[str, Any] = {"strength": strength}
        for figure in BEHAVIOURS[behaviour]:
            values = np.array([[float(FIGURES[figure](one)) for one in answers[strength]] for answers in by_seed])
            row[figure] = asdict(bootstrap_mean(values.mean(0))) | {"seeds": values.mean(1).round(4).tolist()}
        rows.append(row)
    return rows


def table(behaviour: str, found: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown, a row for each LLM and strength."""
    figures = BEHAVIOURS[behaviour]
    lines = [f"| user LLM | strength | {' | '.join(figures)} |", f"|{'---|' * (len(figures) + 2)}"]
    for model, rows in found.items():
        for row in rows:
            cells = []
            for figure in figures:
                one = row[figure]
                seeds = "" if row["strength"] == 0 else f" ({', '.join(f'{value:.3g}' for value in one['seeds'])})"
                cells.append(f"{one['mean']:.3g} [{one['low']:.3g}, {one['high']:.3g}]{seeds}")
            lines.append(f"| {model} | {row['strength']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def train(work: Path, recipe_name: str, condition: str, templates: list[str], seed: int) -> Path:
    """The delta's folder."""
    recipe = yaml.safe_load((RECIPES / f"{recipe_name}.yaml").read_text())
    for key in ("train", "heldout"):
        recipe["data"][key] = str((RECIPES / recipe["data"][key]).resolve())
    # What the template LLMs make of the data is the same for every seed.
    recipe["data"] |= {"cache": "disk", "cache_folder": str(work / "hidden")}
    path = work / f"{recipe_name}-{condition}-{seed}.yaml"
    path.write_text(yaml.safe_dump(recipe | {"seed": seed, "template": templates}))
    folder = path.with_suffix("")
    make(folder, lambda: run("cmc_server", "train", path, "--output", folder))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("behaviour", choices=tuple(BEHAVIOURS))
    parser.add_argument("--trained", nargs="+", required=True, metavar="NAME=FOLDER[,FOLDER]")
    parser.add_argument("--on", nargs="+", required=True, metavar="NAME=FOLDER", help="LLMs to measure on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.5, 1.0, 1.5])
    parser.add_argument("--prompts", type=Path, default=DEMO / "data" / "concise" / "heldout.jsonl")
    parser.add_argument("--limit", type=int, default=80, help="answers are cut after so many tokens")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    work: Path = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    deltas = {}
    for entry in options.trained:
        condition, _, folders = entry.partition("=")
        templates = [str(Path(folder).absolute()) for folder in folders.split(",")]
        for seed in options.seeds:
            deltas[f"{condition}-{seed}"] = train(work, options.behaviour, condition, templates, seed)
    conditions = [entry.partition("=")[0] for entry in options.trained]
    chats = read_prompts(options.prompts)
    results: dict[str, dict[str, list[dict[str, Any]]]] = {condition: {} for condition in conditions}
    for entry in options.on:
        model, _, folder = entry.partition("=")
        answers = generate(folder, deltas, chats, options.strengths, options.limit)
        for condition in conditions:
            by_seed = [answers[f"{condition}-{seed}"] for seed in options.seeds]
            results[condition][model] = summarise(options.behaviour, by_seed)
    for condition in conditions:
        print(f"\n{condition}\n\n{table(options.behaviour, results[condition])}")
    report = {"benchmark": f"behaviour {options.behaviour}", "machine": describe_machine("torch", "transformers")}
    keep(report | {"seeds": options.seeds, "prompts": len(chats), "results": results}, options.output)


if __name__ == "__main__":
    main()
