"""How strongly the seeds of one delta change the answers of two LLMs, on held-out prompts, through vLLM.

    python benchmarks/behaviours.py concise --deltas SEED1 SEED2 SEED3 "SmolLM2 135M=FOLDER" "Gemma 3 270M=FOLDER"
    python benchmarks/behaviours.py bullets --deltas SEED1 SEED2 SEED3 "SmolLM2 135M=FOLDER" "Gemma 3 270M=FOLDER"

Every figure is a mean over seeds and prompts, with a 95% bootstrap interval over the prompts, and the means of the
single seeds beside it. Prints a table and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_report import describe_machine, keep
from concise_sweep import DEMO, generate, read_prompts

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("behaviour", choices=tuple(BEHAVIOURS))
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER", help="user LLMs")
    parser.add_argument("--deltas", type=Path, nargs="+", required=True, help="the delta of each seed")
    parser.add_argument("--prompts", type=Path, default=DEMO / "data" / "concise" / "heldout.jsonl")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.5, 1.0, 1.5])
    parser.add_argument("--limit", type=int, default=80, help="answers are cut after so many tokens")
    parser.add_argument("--samples", type=int, default=3, help="prompts whose answers are shown")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    chats = read_prompts(options.prompts)
    found = {}
    for entry in options.models:
        model, _, folder = entry.partition("=")
        deltas = {f"seed{index}": path for index, path in enumerate(options.deltas, start=1)}
        answers = generate(folder, deltas, chats, options.strengths, options.limit)
        for index in range(0, len(chats), max(1, len(chats) // max(1, options.samples))):
            print(f"\n{model}: {chats[index][-1]['content']}")
            for strength, some in answers["seed1"].items():
                print(f"  {strength:g}: {some[index].text!r}")
        found[model] = summarise(options.behaviour, list(answers.values()))
    print(f"\n{table(options.behaviour, found)}")
    machine = describe_machine("torch", "transformers")
    report = {"benchmark": f"behaviour {options.behaviour}", "machine": machine, "prompts": len(chats)}
    keep(report | {"limit": options.limit, "results": found}, options.output)


if __name__ == "__main__":
    main()
