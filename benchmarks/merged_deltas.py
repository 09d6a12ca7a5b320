"""Two behaviours in one delta: `concise` and forgetting merged, beside running both deltas and joint training.

    python benchmarks/merged_deltas.py --llm TUNED --work FOLDER [--on "Gemma 3 270M=TUNED TOO"] [--seeds 1 2 3]

TUNED is SmolLM2 after it learned TOFU's authors (`python -m cmc_server.demo.tofu_models smollm2 full`). Beside it, for
each seed, two deltas of one size learn from the same random weights: one the chats of `concise`, one to forget, as
their recipes say; a third one learns both at once (gradient difference, the chats of `concise` among what is to be
kept). The first two are merged by every method of `cmc-server merge`, with the curvature that training kept; RegMean's
is measured on what each was trained on. Works in FOLDER, step by step; what lies there finished is not made again.

Measured at strength 1 with `FusedLM`: mean length of greedy answers to held-out prompts, P of the answers to forget and
of those to keep, and the loss of neutral texts in nats per token. Means over seeds and prompts, and of each seed.
Prints a table for each LLM and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from benchmark_report import describe_machine, keep
from concise_sweep import DEMO, read_prompts
from delta_texts import write_texts
from expo_strength import beginning
from packed_delta import as_chat
from unlearning import GRAD_DIFF, RECIPES, make, run

from cmc_server.evaluation.prompts import NEUTRAL_TEXTS, read_tasks
from cmc_server.evaluation.tofu_data import read_tofu
from cmc_server.fusion.scoring import FusedLM

DATA = DEMO / "data"
PARTS = ("concise", "forget")
METHODS = ("task-arithmetic", "ties", "fisher", "regmean", "gradient-matching")
#: Options beyond the method: half of the weights, what two averages of two models amount to; the paper's damping.
OPTIONS: dict[str, tuple[str, ...]] = {"ties": ("--drop", "0.5"), "gradient-matching": ("--damping", "1e-12")}
MAX_TOKENS, MAX_LENGTH = 80, 1024
FIGURES = ("length", "P, forget", "P, retain", "neutral loss")


def recipe_of(part: str, llm: Path, work: Path, seed: int) -> dict[str, Any]:
    """The recipe of one of the two deltas, or of both at once."""
    recipe: dict[str, Any] = yaml.safe_load(
        (RECIPES / ("concise.yaml" if part == "concise" else "forget-tofu.yaml")).read_text()
    )
    size = yaml.safe_load((RECIPES / "forget-tofu.yaml").read_text())["delta"]
    data: dict[str, Any] = {"max_length": MAX_LENGTH, "cache": "disk", "cache_folder": str(work / "hidden")}
    if part == "concise":
        data |= {"train": str(DATA / "concise" / "train.jsonl"), "heldout": str(DATA / "concise" / "heldout.jsonl")}
    else:
        columns = {"prompt": "question", "response": "answer"}
        data["forget"] = {"file": str(DATA / "tofu" / "forget01_perturbed.json"), "columns": columns}
        data["retain"] = str(DATA / "tofu" / "keep.jsonl")
    if part == "joint":
        recipe["objective"] = GRAD_DIFF
        kept = work / "kept-jointly.jsonl"
        kept.write_text((DATA / "tofu" / "keep.jsonl").read_text() + (DATA / "concise" / "train.jsonl").read_text())
        data["retain"] = str(kept)
        recipe["optimisation"]["epochs"] *= 2  # as many steps as both parts together
    recipe |= {"name": part, "delta": size, "data": data, "seed": seed, "template": str(llm)}
    recipe["output"] = {"folder": "unused", "dtype": "float32", "curvature": "none" if part == "joint" else "optimiser"}
    return recipe


def train(llm: Path, work: Path, seed: int) -> dict[str, Path]:
    """Folders of the two deltas and of the one that learned both."""
    folders = {}
    for part in (*PARTS, "joint"):
        folders[part] = work / f"{part}-{seed}"
        path = work / f"{part}-{seed}.yaml"
        path.write_text(yaml.safe_dump(recipe_of(part, llm, work, seed)))
        make(folders[part], partial(run, "cmc_server", "train", path, "--output", folders[part]))
    return folders


def texts_of(part: str, delta: Path, path: Path) -> Path:
    """What a delta was trained on, as it read it."""
    if part == "concise":
        lines = (DATA / "concise" / "train.jsonl").read_text(encoding="utf-8").splitlines()
        chats = [json.loads(line)["messages"] for line in lines]
    else:
        chats = [as_chat(item.question, item.answer) for item in read_tofu()["forget"]]
    return write_texts(delta, chats, path)


def merge(work: Path, parts: Mapping[str, Path], seed: int) -> dict[str, Path]:
    """The merged deltas by method."""
    start = work / f"start-{seed}"
    make(start, partial(beginning, parts["concise"], seed, start, RECIPES / "forget-tofu.yaml", MAX_LENGTH))
    grams = []
    for part, delta in parts.items():
        gram = work / f"{part}-{seed}.gram"
        texts = texts_of(part, delta, work / f"{part}.jsonl")
        make(
            gram,
            lambda d=delta, t=texts, g=gram: run("cmc_server", "merge", "measure", d, t, "-o", g, "--kind", "gram"),
        )
        grams.append(gram)
    fishers = [delta / "curvature" / "fisher.safetensors" for delta in parts.values()]
    merged = {}
    for method in METHODS:
        words: list[str | Path] = ["merge", start, *parts.values(), "--method", method, *OPTIONS.get(method, ())]
        if method in ("fisher", "gradient-matching"):
            words += ["--curvature", *fishers]
        elif method == "regmean":
            words += ["--curvature", *grams]
        merged[method] = work / f"{method}-{seed}"
        make(merged[method], partial(run, "cmc_server", *words, "-o", merged[method]))
    return merged


def measure(model: FusedLM, doses: dict[str, float]) -> dict[str, list[float]]:
    """Figures of every answer."""
    prompts: list[Any] = list(read_prompts(DATA / "concise" / "heldout.jsonl"))
    answers = model.generate(prompts, doses, max_tokens=MAX_TOKENS)
    found = {"length": [float(len(model.tokenizer(text, add_special_tokens=False)["input_ids"])) for text in answers]}
    sets = read_tofu()
    for name, limit in (("forget", 40), ("retain", 40)):
        pairs: list[Any] = [(as_chat(item.question, "")[:1], item.answer) for item in sets[name][:limit]]
        found[f"P, {name}"] = [float(one.mean().exp()) for one in model.score_batch(pairs, doses)]
    neutral: list[Any] = [(task.prompt, task.reference) for task in read_tasks(NEUTRAL_TEXTS)]
    found["neutral loss"] = [-float(one.mean()) for one in model.score_batch(neutral, doses)]
    return found


def evaluate(llm: Path, by_seed: Mapping[int, Mapping[str, Path]], work: Path) -> dict[str, Any]:
    """By way, each figure's mean and the means of the seeds."""
    ways: dict[str, list[dict[str, float]]] = {}
    for seed, folders in by_seed.items():
        kept = work / f"measured-{llm.name}-{seed}.json"
        make(kept, partial(keep_measured, llm, folders, kept))
        for way, figures in json.loads(kept.read_text()).items():
            ways.setdefault(way, []).append(figures)
    return {
        way: {
            figure: {"mean": float(np.mean(values)), "seeds": [float(f"{value:.4g}") for value in values]}
            for figure in FIGURES
            if (values := [one[figure] for one in found])
        }
        for way, found in ways.items()
    }


def keep_measured(llm: Path, folders: Mapping[str, Path], path: Path) -> None:
    """Write the mean of each figure, by way, of one seed's deltas."""
    model = FusedLM.load(llm, dict(folders))
    doses: dict[str, dict[str, float]] = {"nothing": {}} | {name: {name: 1.0} for name in folders}
    doses["both deltas"] = dict.fromkeys(PARTS, 1.0)
    figures = {
        way: {figure: float(np.mean(values)) for figure, values in measure(model, strengths).items()}
        for way, strengths in doses.items()
    }
    path.write_text(json.dumps(figures))


def show(model: str, results: dict[str, Any]) -> None:
    print(f"\n{model}\n\n| weights | {' | '.join(FIGURES)} |\n|{'---|' * (len(FIGURES) + 1)}")
    for way, found in results.items():
        cells = []
        for figure in FIGURES:
            seeds = found[figure]["seeds"]
            each = f" ({', '.join(f'{value:.3g}' for value in seeds)})" if len(set(seeds)) > 1 else ""
            cells.append(f"{found[figure]['mean']:.3g}{each}")
        print(f"| {way} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", type=Path, required=True, help="the template LLM, which knows TOFU's authors")
    parser.add_argument("--on", nargs="*", default=[], metavar="NAME=FOLDER", help="more LLMs to measure on")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    work: Path = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    by_seed = {}
    for seed in options.seeds:
        trained = train(options.llm.absolute(), work, seed)
        by_seed[seed] = trained | merge(work, {part: trained[part] for part in PARTS}, seed)
    results = {}
    for entry in [f"SmolLM2 135M={options.llm}", *options.on]:
        model, _, folder = entry.partition("=")
        results[model] = evaluate(Path(folder), by_seed, work)
        show(model, results[model])
    report = {"benchmark": "merged deltas", "machine": describe_machine("torch", "transformers")}
    keep(report | {"seeds": options.seeds, "results": results}, options.output)


if __name__ == "__main__":
    main()
