"""Can a delta learn what tuning changed in an LLM, from that LLM's logits? CMC's authors say it did not converge.

    python benchmarks/logit_shift.py --base FOLDER --tuned FOLDER --work FOLDER

``--base`` and ``--tuned`` are an LLM before and after it learned TOFU's answers. Beside the base, one delta learns the
tuned LLM's distribution (``logit_shift``) and one the answers themselves (``instruction_tuning``), on the 160 retain
questions; the 40 of forget01, which the tuned LLM knows too, are held out. Then: the loss before and after, how alike
the shifts are step by step, and how likely the base finds TOFU's answers with each delta. Prints a table and one JSON
line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml
from benchmark_report import describe_machine, keep
from unlearning import RECIPES, make, run

TOFU = RECIPES.parent / "data" / "tofu"
SETS = {"learned": "retain_perturbed.json", "held out": "forget01_perturbed.json"}
OBJECTIVES = ("logit_shift", "instruction_tuning")
QUESTIONS = 20


def train(work: Path, base: Path, tuned: Path, objective: str, epochs: int) -> Path:
    """The delta's folder."""
    columns = {"prompt": "question", "response": "answer"}
    data = {
        key: {"file": str(TOFU / file), "columns": columns}
        for key, file in zip(("train", "heldout"), SETS.values(), strict=True)
    }
    recipe = yaml.safe_load((RECIPES / "forget-tofu.yaml").read_text())
    recipe |= {"name": objective, "template": str(base), "data": {**data, "max_length": 512}}
    recipe["objective"] = {"name": objective} | ({"tuned": str(tuned)} if objective == "logit_shift" else {})
    recipe["optimisation"] |= {"epochs": epochs}
    path, folder = work / f"{objective}.yaml", work / objective
    path.write_text(yaml.safe_dump(recipe))
    make(folder, lambda: run("cmc_server", "train", path, "--output", folder))
    return folder


def evaluate(work: Path, base: Path, tuned: Path, objective: str, delta: Path) -> dict[str, Any]:
    """Losses, likeness of the shifts, and probabilities of TOFU's answers."""
    found: dict[str, Any] = {"loss": json.loads((delta / "cmc_delta.json").read_text())["training"]["metrics"]}
    steered = ("--delta", f"d={delta}", "--strengths", "1")
    for name, file in SETS.items():
        prompts = work / f"{name.replace(' ', '-')}.jsonl"
        records = [json.loads(line) for line in (TOFU / file).read_text().splitlines()[:QUESTIONS]]
        prompts.write_text("".join(json.dumps({"instruction": one["question"]}) + "\n" for one in records))
        folder = work / f"shift-{objective}-{prompts.stem}"
        words = ("--suite", "shift", "--tuned", tuned, "--prompts", prompts, "--output", folder)
        make(folder, lambda w=words: run("cmc_server", "eval", base, *steered, *w))
        shift = json.loads((folder / "results.json").read_text())["suites"]["shift"]["comparisons"]
        found[f"shift, {name}"] = {key: value for key, value in shift["delta at strength 1"].items() if key != "items"}
    folder = work / f"tofu-{objective}"
    words = ("--suite", "tofu", "--limit", str(QUESTIONS), "--output", folder)
    make(folder, lambda: run("cmc_server", "eval", base, *steered, *words))
    tofu = json.loads((folder / "results.json").read_text())["suites"]["tofu"]["by_strength"]
    for name, key in zip(SETS, ("retain", "forget"), strict=True):
        found[f"probability, {name}"] = {
            f"{one['strength']:g}": one["sets"][key]["summary"]["probability"] for one in tofu
        }
    return found


def show(results: dict[str, Any]) -> None:
    print("| objective | questions | loss without, with | cosine per step | P(answer) without, with |")
    print("|---|---|---|---|---|")
    for objective, found in results.items():
        for name, key in zip(SETS, ("train", "heldout"), strict=True):
            loss = f"{found['loss'][f'{key}_loss_without_delta']:.3f}, {found['loss'][f'{key}_loss']:.3f}"
            cosine = found[f"shift, {name}"]["cosine"]
            likeness = f"{cosine['mean']:.3f} [{cosine['low']:.3f}, {cosine['high']:.3f}]"
            chance = ", ".join(f"{one['mean']:.3f}" for one in found[f"probability, {name}"].values())
            print(f"| {objective} | {name} | {loss} | {likeness} | {chance} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--tuned", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    work: Path = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    base, tuned = options.base.absolute(), options.tuned.absolute()
    results = {}
    for objective in OBJECTIVES:
        delta = train(work, base, tuned, objective, options.epochs)
        results[objective] = evaluate(work, base, tuned, objective, delta)
    show(results)
    report = {"benchmark": "logit_shift", "machine": describe_machine("torch", "transformers")}
    keep(report | {"epochs": options.epochs, "results": results}, options.output)


if __name__ == "__main__":
    main()
