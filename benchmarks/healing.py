"""Can a delta heal a pruned LLM? SmolLM2 pruned by Wanda, then a delta beside it, against adapters in its weights.

    python benchmarks/healing.py --work FOLDER [--sparsity 0.5 0.7] [--seeds 1 2 3] [--output REPORT.json]

The delta has no weights to interfere with: it is trained beside the pruned LLM and added to its logits, at strength 1.
The pooled adapter, LoRA and masked LoRA are merged into the weights that stay, and have about as many parameters as the
delta (2.4 million); the oracle trains all the weights that stay. All read the same texts in one round, in batches of
one size; each has its best learning rate of --rates (the oracle, whose parameters are weights, of --oracle-rates),
found with the first seed on other texts than those measured.
--passes is how often the delta reads the texts: adapters read them once. Texts are those of ``benchmarks/sparsify.py``.
Works in FOLDER, step by step: what lies there finished is not made again. --only makes some of the ways alone, so that
two processes can share the work before a third one collects it. Prints perplexities, interference and merge gaps and,
as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from benchmark_report import describe_machine, keep
from sparsify import MEASURED, loss_of, perplexities, split
from sparsify import run as report_of
from unlearning import RECIPES, make, run

from cmc_server.demo.models import demo_model
from cmc_server.fusion.scoring import FusedLM

ADAPTERS = ("pooled", "lora", "masked-lora", "oracle")
#: In the reports of `sparsify`.
DIAGNOSED = ("parameters", "dense_interference", "interference", "merge_gap", "steps")


class Lab:
    """What is made of one LLM at one sparsity.

    Args:
        options: the command line.
        files: of texts, by what they are for.
        sparsity: share of the weights that go.
    """

    def __init__(self, options: argparse.Namespace, files: dict[str, Path], sparsity: float) -> None:
        self.options, self.files, self.sparsity = options, files, sparsity
        self.work: Path = options.work / f"{sparsity:g}"
        self.work.mkdir(exist_ok=True)
        self.pruned = self.work / "pruned"
        make(self.pruned, partial(run, "cmc_server", *self._words("-o", self.pruned)))

    def _words(self, *more: str | Path) -> list[str | Path]:
        words: list[str | Path] = ["sparsify", demo_model("smollm2"), "--sparsity", str(self.sparsity)]
        words += ["--calibrate", self.files["train"], "--sequences", str(self.options.sequences), "--length", "512"]
        return [*words, *more]

    def adapter(self, method: str, rate: float, seed: int) -> dict[str, float]:
        """Losses of the LLM with an adapter merged into it, and what was measured while it was tuned."""
        kept = self.work / f"{method}-{rate:g}-{seed}.json"
        if not kept.exists():
            folder = kept.with_suffix("")
            words = self._words("--tuning", method, "--tuning-data", self.files["train"], "--iterations", "1")
            words += ["--final-examples", str(self.options.texts), "--batch-size", str(self.options.batch_size)]
            words += ["--learning-rate", str(rate), "--seed", str(seed)]
            report = report_of([*map(str, words), "-o", str(folder), "--force"])
            losses = {kind: loss_of(folder, self.files[kind]) for kind in ("validation", *MEASURED)}
            kept.write_text(json.dumps(losses | {name: report["result"]["rounds"][-1][name] for name in DIAGNOSED}))
            shutil.rmtree(folder)
        found: dict[str, float] = json.loads(kept.read_text())
        return found

    def delta(self, passes: int, rate: float, seed: int) -> dict[str, float]:
        """Losses of the LLM with a delta beside it."""
        folder = self.work / f"delta-{passes}-{rate:g}-{seed}"
        recipe: dict[str, Any] = yaml.safe_load((RECIPES / "concise.yaml").read_text())
        recipe |= {"name": "healing", "template": str(self.pruned), "seed": seed}
        train = folder.with_suffix(".jsonl")
        texts = self.files["train"].read_text().splitlines(keepends=True)
        # As `sparsify` draws the texts of a first round.
        train.write_text("".join(random.Random(1000 * seed + 1).sample(texts, self.options.texts)))
        recipe["data"] = {"train": str(train), "cache": "disk", "cache_folder": str(self.work / "hidden")}
        recipe["objective"] = {"name": "instruction_tuning"}
        recipe["optimisation"] = {
            "epochs": passes,
            "batch_size": self.options.batch_size,
            "learning_rate": rate,
        }
        recipe["output"] = {"folder": "unused", "dtype": "float32"}
        path = folder.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(recipe))
        make(folder, partial(run, "cmc_server", "train", path, "--output", folder))
        model = FusedLM.load(self.pruned, {"healing": folder})
        return {kind: self._loss(model, self.files[kind]) for kind in ("validation", *MEASURED)}

    @staticmethod
    def _loss(model: FusedLM, texts: Path) -> float:
        """In nats per token, weighed as ``loss_of`` does: the mean over all tokens but each text's first one."""
        total, count = 0.0, 0
        ids = [model.encode_continuation(json.loads(line)["text"]) for line in texts.read_text().splitlines()]
        for scores in model.score_batch([(text[:1], text[1:]) for text in ids], {"healing": 1.0}):
            total, count = total - float(scores.sum()), count + len(scores)
        return total / count

    def best(self, measure: Any, rates: Sequence[float]) -> tuple[float, dict[str, float]]:
        """The learning rate of the least loss of validation texts, with the first seed."""
        losses = {rate: measure(rate, self.options.seeds[0])["validation"] for rate in rates}
        return min(losses, key=lambda rate: losses[rate]), {f"{rate:g}": loss for rate, loss in losses.items()}


def table(results: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| sparsity | healed by | rate | perplexity, answers | perplexity, neutral texts | interference | merge gap |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in results:
        cells = perplexities(one["losses"])
        for name in ("interference", "merge_gap"):
            known = [losses[name] for losses in one["losses"] if name in losses]
            cells.append(f"{statistics.mean(known):.3g}" if known else "")
        lines.append(f"| {one['sparsity']:g} | {one['by']} | {one.get('rate', '')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--oracle-rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--sequences", type=int, default=128, help="of 512 tokens that pruning is calibrated on")
    parser.add_argument("--batch-size", type=int, default=4, help="texts of a step")
    parser.add_argument("--only", nargs="+", help="adapters, or `delta`, to make alone")
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    options.work = options.work.absolute()
    options.work.mkdir(parents=True, exist_ok=True)
    files = split(options.work)
    dense = {kind: loss_of(demo_model("smollm2"), files[kind]) for kind in MEASURED}
    results: list[dict[str, Any]] = [{"sparsity": 0.0, "by": "nothing", "losses": [dense]}]
    for sparsity in options.sparsity:
        lab = Lab(options, files, sparsity)
        pruned = {kind: loss_of(lab.pruned, files[kind]) for kind in MEASURED}
        results.append({"sparsity": sparsity, "by": "nothing", "losses": [pruned]})
        ways = {name: partial(lab.adapter, name) for name in ADAPTERS}
        ways |= {f"delta, {passes} passes": partial(lab.delta, passes) for passes in options.passes}
        for name, measure in ways.items():
            if options.only and name.partition(",")[0] not in options.only:
                continue
            rate, tried = lab.best(measure, options.oracle_rates if name == "oracle" else options.rates)
            losses = [measure(rate, seed) for seed in options.seeds]
            results.append({"sparsity": sparsity, "by": name, "rate": rate, "tried": tried, "losses": losses})
            print(table(results), flush=True)
    report = {"benchmark": "healing", "machine": describe_machine("torch", "transformers"), "texts": options.texts}
    report |= {"sequences": options.sequences, "batch_size": options.batch_size}
    keep(report | {"results": results}, options.output)


if __name__ == "__main__":
    main()
