"""Unlearning on two LLMs of different vocabularies: one delta for both, against LoRA and full fine-tuning of each.

    python benchmarks/unlearning.py --work FOLDER [--seeds 1 2 3] [--kept 20] [--steps tune delta lora full evaluate]

Works in FOLDER, step by step; what lies there finished is not made again, so a run can be stopped and gone on with.

tune      both demo models on TOFU's forget01 and 160 retain questions, and on the retain questions alone (the oracle)
delta     the shipped recipe beside the tuned SmolLM2, once for each seed
narrow    the same with gradient difference, and TOFU's other authors alone to keep
lora      gradient difference on LoRA adapters of each tuned LLM, once for each seed
full      gradient difference on all weights of each tuned LLM, once for each seed
evaluate  TOFU and neutral texts in bfloat16: the retain-only LLMs, the deltas at every strength, and the baselines

Prints a table and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from benchmark_report import describe_machine, keep
from numpy.typing import ArrayLike

import cmc_server
from cmc_server.demo.tofu_models import LEARNING_RATES
from cmc_server.evaluation.bootstrap import bootstrap_mean
from cmc_server.evaluation.tofu_data import PACKAGED_TOFU

RECIPES = Path(cmc_server.__file__).parent / "demo" / "recipes"
MODELS = ("smollm2", "gemma3")
STRENGTHS = (0.0, 0.25, 0.5, 1.0, 1.5)
STEPS = ("tune", "delta", "narrow", "lora", "full", "evaluate")
#: What each delta changes in the shipped recipe.
NARROW = {"file": "../data/tofu/retain_perturbed.json", "columns": {"prompt": "question", "response": "answer"}}
GRAD_DIFF = {"name": "grad_diff", "retain_weight": 3.0, "forget_bound": 8.0}
#: Of the baselines: with the weight 3 they forgot next to nothing.
EVEN = GRAD_DIFF | {"retain_weight": 1.0}
DELTAS: dict[str, dict[str, Any]] = {"delta": {}, "narrow": {"retain": NARROW, "objective": GRAD_DIFF}}
#: Each baseline's learning rate and epochs; the data are those of the delta, the objective is gradient difference.
BASELINES: dict[str, dict[str, Any]] = {
    "lora": {"epochs": 5, "batch_size": 4, "learning_rate": 1.0e-3, "mixed_precision": "bf16"},
    "full": {"epochs": 5, "batch_size": 4, "learning_rate": 2.0e-4, "mixed_precision": "bf16"},
}
#: On the baselines' learning rates, in proportion to those with which the LLMs were tuned.
RATES = {model: rate / max(LEARNING_RATES.values()) for model, rate in LEARNING_RATES.items()}
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}


def run(*words: str | Path) -> None:
    """A command of the package; its output passes through."""
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True)


def make(folder: Path, action: Callable[[], None]) -> None:
    """Do something that makes a folder, unless it is there; record how long it took."""
    if folder.exists():
        return
    print(f"making {folder.name}", file=sys.stderr)
    began = time.perf_counter()
    action()
    with (folder.parent / "seconds.jsonl").open("a") as log:
        log.write(json.dumps({"made": folder.name, "seconds": round(time.perf_counter() - began)}) + "\n")


def seconds(work: Path) -> dict[str, dict[str, int]]:
    """How long it took to make what lies in this folder, and to evaluate it."""
    found = {}
    for what, log in (("made", work), ("evaluated", work / "results")):
        entries = [json.loads(line) for line in (log / "seconds.jsonl").read_text().splitlines()]
        found[what] = {entry["made"]: entry["seconds"] for entry in entries}
    return found


def tune(work: Path, models: Sequence[str]) -> None:
    for model in models:
        for files in ("full", "retain"):
            folder = work / f"{model}-{files}"
            make(folder, lambda m=model, f=files, o=folder: run("cmc_server.demo.tofu_models", m, f, "--output", o))


def read_recipe(seed: int, retain: Any = None, objective: Any = None) -> dict[str, Any]:
    """The shipped recipe with another seed, and perhaps with other data to keep and another objective."""
    recipe: dict[str, Any] = yaml.safe_load((RECIPES / "forget-tofu.yaml").read_text())
    data = recipe["data"]
    data["retain"] = dict(retain) if retain else {"file": data["retain"]}
    for source in (data["forget"], data["retain"]):
        source["file"] = str((RECIPES / source["file"]).resolve())
    return recipe | {"seed": seed} | ({"objective": objective} if objective else {})


def train_delta(work: Path, kind: str, seed: int) -> None:
    folder = work / f"{kind}-{seed}"

    def train() -> None:
        path = work / f"{folder.name}.yaml"
        path.write_text(yaml.safe_dump(read_recipe(seed, **DELTAS[kind])))
        run("cmc_server", "train", path, "--template", work / "smollm2-full", "--output", folder)

    make(folder, train)


def train_baseline(work: Path, kind: str, model: str, seed: int) -> None:
    """Unlearn in the tuned LLM's own weights."""
    folder = work / f"{model}-{kind}-{seed}"

    def train() -> None:
        import torch
        from peft import LoraConfig

        from cmc_server.training.direct import train_llm
        from cmc_server.training.recipes import Recipe

        recipe = read_recipe(seed, objective=EVEN)
        optimisation = BASELINES[kind] | {"learning_rate": BASELINES[kind]["learning_rate"] * RATES[model]}
        recipe |= {"template": str(work / f"{model}-full"), "optimisation": optimisation}
        recipe |= {"checkpoint": {"save_strategy": "no"}}
        lora = LoraConfig(**LORA) if kind == "lora" else None
        tuned = train_llm(Recipe.model_validate(recipe), RECIPES, lora)
        part = folder.with_name(f".{folder.name}.part")
        tuned.to(torch.bfloat16).save_pretrained(part)
        for path in (work / f"{model}-full").iterdir():
            if not (part / path.name).exists():
                shutil.copy(path, part)
        part.rename(folder)

    make(folder, train)
    gc.collect()  # the Trainer and what it trained refer to each other, and take gigabytes


def choose_questions(work: Path, kept: int) -> Path:
    """TOFU's files with all questions to forget, and so many of each of the other sets, from all over it."""
    folder = work / f"tofu-{kept}"
    folder.mkdir(exist_ok=True)
    for path in PACKAGED_TOFU.glob("*.json"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        step = 1 if path.name.startswith("forget") else max(1, len(lines) // kept)
        (folder / path.name).write_text("".join(lines[::step][: None if step == 1 else kept]), encoding="utf-8")
    return folder


class Evaluations:
    """TOFU and neutral texts of one LLM after the other; an LLM is loaded once for all deltas.

    Args:
        work: folder with the LLMs and deltas; results go into its folder ``results``.
        tofu: folder with TOFU's files.
    """

    def __init__(self, work: Path, tofu: Path) -> None:
        self._work, self._tofu = work, tofu
        self._loaded: tuple[str, Any] | None = None

    def run(self, name: str, user: str, delta: str | None = None, retain_only: Path | None = None) -> Path:
        """Evaluate an LLM, with a delta at every strength or without one; the file of the results."""
        from cmc_server.config import DeltaSource
        from cmc_server.evaluation.command import evaluate
        from cmc_server.evaluation.options import EvalOptions

        folder = self._work / "results" / name
        folder.parent.mkdir(exist_ok=True)
        results = folder / "results.json"
        if folder.exists() and not (results.exists() and json.loads(results.read_text())["finished"]):
            shutil.rmtree(folder)  # an evaluation that was stopped
        deltas = () if delta is None else (DeltaSource(name="forget", path=str(self._work / delta)),)
        options = EvalOptions(
            user=str(self._work / user),
            deltas=deltas,
            strengths=STRENGTHS if deltas else (),
            suites=("tofu", "retained"),
            tofu=self._tofu,
            dtype="bfloat16",
            batch_size=64,
            retain_only=retain_only,
            output=folder,
        )
        make(folder, lambda: evaluate(options, self._user(user)))
        return results

    def _user(self, name: str) -> Any:
        from cmc_server.fusion.scoring import FusedLM

        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None  # makes room
            self._loaded = name, FusedLM.load(self._work / name, {}, dtype="bfloat16")
        return self._loaded[1]


def evaluate_all(work: Path, models: Sequence[str], seeds: Sequence[int], tofu: Path) -> dict[str, Any]:
    """By LLM and method, for each strength the figures of every seed."""
    evaluations = Evaluations(work, tofu)
    table: dict[str, Any] = {}
    for model in models:
        oracle = evaluations.run(f"{model}-retain", f"{model}-retain")
        table[model] = {"retain only": figures([oracle])}
        for kind in DELTAS:
            made = [name for seed in seeds if (work / (name := f"{kind}-{seed}")).exists()]
            found = [evaluations.run(f"{model}-{name}", f"{model}-full", name, oracle) for name in made]
            if found:
                table[model][kind] = figures(found)
        for kind in BASELINES:
            made = [name for seed in seeds if (work / (name := f"{model}-{kind}-{seed}")).exists()]
            if made:
                table[model][kind] = figures([evaluations.run(name, name, retain_only=oracle) for name in made])
    return table


def figures(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Strength to metric to its mean over the seeds and the mean of each seed.

    Where single questions have figures, the 95% bootstrap interval over the questions comes with them.
    """
    suites = [json.loads(path.read_text())["suites"] for path in paths]
    by_strength = {}
    for index, first in enumerate(suites[0]["tofu"]["by_strength"]):
        tofu = [one["tofu"]["by_strength"][index] for one in suites]
        found: dict[str, Any] = {}
        for name in ("forget", "retain", "real_authors", "world_facts"):
            for figure in ("probability", "rouge_l_recall"):
                items = np.array([one["sets"][name]["items"][figure] for one in tofu])
                found[f"{name}_{figure}"] = asdict(bootstrap_mean(items.mean(0))) | _seeds(items.mean(1))
        for kind in ("geometric", "arithmetic"):
            found[f"model_utility_{kind}"] = _seeds([one[f"model_utility_{kind}"]["mean"] for one in tofu])
            if "forget_quality" in first:
                found[f"forget_quality_{kind}"] = _seeds([one["forget_quality"][kind]["p_value"] for one in tofu])
        found["neutral_loss"] = _seeds([one["retained"]["by_strength"][index]["loss"]["mean"] for one in suites])
        by_strength[f"{first['strength']:g}"] = found
    return by_strength


def _seeds(values: ArrayLike) -> dict[str, Any]:
    each = np.asarray(values, dtype=np.float64)
    return {"mean": float(each.mean()), "seeds": [float(f"{value:.4g}") for value in each]}


SHOWN = {
    "forget_probability": "forget P",
    "forget_rouge_l_recall": "forget ROUGE-L",
    "retain_probability": "retain P",
    "retain_rouge_l_recall": "retain ROUGE-L",
    "model_utility_geometric": "model utility",
    "forget_quality_geometric": "forget quality",
    "neutral_loss": "neutral loss",
}


def show(table: dict[str, Any]) -> None:
    print(f"| LLM | method | strength | {' | '.join(SHOWN.values())} |")
    print(f"|{'---|' * (len(SHOWN) + 3)}")
    for model, methods in table.items():
        for method, by_strength in methods.items():
            for strength, found in by_strength.items():
                cells = [_cell(found[figure]) if figure in found else "" for figure in SHOWN]
                print(f"| {model} | {method} | {strength} | {' | '.join(cells)} |")


def _cell(one: dict[str, Any]) -> str:
    interval = f" [{one['low']:.3g}, {one['high']:.3g}]" if "low" in one else ""
    seeds = f" ({', '.join(f'{value:.3g}' for value in one['seeds'])})" if len(set(one["seeds"])) > 1 else ""
    return f"{one['mean']:.3g}{interval}{seeds}"


def plot(table: dict[str, Any], path: Path) -> None:
    """Probabilities of the right answers by strength, a panel for each LLM; every seed is a thin line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = np.atleast_1d(figure.subplots(1, len(table), sharey=True))
    for axes, (model, methods) in zip(panels, table.items(), strict=True):
        strengths = [float(strength) for strength in methods["delta"]]
        for colour, name in (("tab:red", "forget"), ("tab:blue", "retain")):
            found = [one[f"{name}_probability"] for one in methods["delta"].values()]
            axes.plot(strengths, [one["mean"] for one in found], "o-", color=colour, label=f"{name}, delta")
            axes.plot(strengths, [one["seeds"] for one in found], color=colour, alpha=0.4, linewidth=0.8)
            oracle = methods["retain only"]["0"][f"{name}_probability"]["mean"]
            axes.axhline(oracle, color=colour, linestyle="--", linewidth=1, label=f"{name}, never learned")
        axes.set(title=model, xlabel="strength of the delta", xticks=strengths, ylim=(-0.03, 1.03))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("probability of the right answer")
    panels[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--kept", type=int, default=20, help="questions of each of TOFU's sets that are to be kept")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    options = parser.parse_args()
    work: Path = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    if "tune" in options.steps:
        tune(work, options.models)
    for seed in options.seeds:
        for kind in DELTAS:
            if kind in options.steps:
                train_delta(work, kind, seed)
        for kind in BASELINES:
            for model in options.models if kind in options.steps else ():
                train_baseline(work, kind, model, seed)
    if "evaluate" in options.steps:
        table = evaluate_all(work, options.models, options.seeds, choose_questions(work, options.kept))
        show(table)
        if options.plot is not None:
            plot(table, options.plot)
        report = {"benchmark": "unlearning", "machine": describe_machine("torch", "transformers", "peft")}
        report |= {"kept": options.kept, "seeds": options.seeds, "seconds": seconds(work), "results": table}
        keep(report, options.output)


if __name__ == "__main__":
    main()
