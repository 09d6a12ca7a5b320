"""What `cmc-server sparsify` makes of an LLM at 50 and 70 %: perplexity of held-out texts by method, on equal data.

    python benchmarks/sparsify.py [--model FOLDER] [--sparsity 0.5 0.7] [--seeds 3] [--output REPORT.json]

The LLM is SmolLM2-135M-Instruct unless another folder is given. Texts come from the package: calibration and tuning
read one part of the answers of `concise` (questions and answers, plain), rates are chosen on a second part, and figures
are of a third one and of neutral texts. Untuned magnitude pruning, Wanda and SparseGPT stand beside the dense model.
With tuning, each method prunes by Wanda (or --prune) in the same rounds, reads the same texts in the same order for the
same number of steps, and has its own best learning rate among --rates, found with the first seed. The oracle trains all
weights that stay, and so many more parameters than the others. Seeds draw calibration sequences, texts and factors.
Interference and merge gap are those of the last round. Prints a table after each run; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark_report import describe_machine, keep

import cmc_server
from cmc_server.cli import main as command
from cmc_server.demo.models import demo_model

DATA = Path(cmc_server.__file__).parent / "demo" / "data"
UNTUNED = ("magnitude", "wanda", "sparsegpt")
TUNED = ("pooled", "lora", "masked-lora", "oracle")
VALIDATION, TEST = 60, 120


def read(path: Path) -> list[str]:
    """Chats a turn a line, and prompts with what follows them."""
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [
        "\n".join(turn["content"] for turn in one["messages"]) if "messages" in one else one["prompt"] + one["response"]
        for one in records
    ]


def split(folder: Path) -> dict[str, Path]:
    """Files of texts to learn from, to choose rates on, and to measure."""
    answers, neutral = (read(DATA / name) for name in ("concise/answered.jsonl", "neutral/texts.jsonl"))
    random.Random(0).shuffle(answers)
    parts = {
        "validation": answers[:VALIDATION],
        "test": answers[VALIDATION : VALIDATION + TEST],
        "train": answers[VALIDATION + TEST :],
        "neutral": neutral,
    }
    for name, texts in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return {name: folder / f"{name}.jsonl" for name in parts}


class Runs:
    """Runs of the command on one model, kept as they come."""

    def __init__(self, arguments: argparse.Namespace, files: dict[str, Path], folder: Path) -> None:
        self.arguments, self.files, self.folder = arguments, files, folder
        self.results: list[dict[str, Any]] = []

    def sparsify(self, words: Sequence[str], seed: int, heldout: str, output: Path | None = None) -> dict[str, Any]:
        """One run's report."""
        given = self.arguments
        calibrate = ["--calibrate", str(self.files["train"]), "--sequences", str(given.sequences)]
        calibrate += ["--length", str(given.length), "--heldout", str(self.files[heldout]), "--seed", str(seed)]
        where = ["--dry-run"] if output is None else ["-o", str(output), "--force"]
        return run(["sparsify", str(given.model), *words, *calibrate, *where])

    def tuned(self, method: str, sparsity: float, rate: float) -> list[str]:
        given = self.arguments
        words = ["--method", given.prune, "--sparsity", str(sparsity), "--allocation", given.allocation]
        words += ["--tuning", method, "--tuning-data", str(self.files["train"]), "--learning-rate", str(rate)]
        words += ["--iterations", str(given.iterations), "--batch-size", str(given.batch_size)]
        return [*words, "--examples", str(given.examples), "--final-examples", str(given.final_examples)]

    def best_rate(self, method: str, sparsity: float) -> tuple[float, dict[str, float]]:
        """By the loss of validation texts, with the first seed."""
        losses = {
            rate: self.sparsify(self.tuned(method, sparsity, rate), 0, "validation")["result"]["losses"]["sparse"]
            for rate in self.arguments.rates
        }
        return min(losses, key=lambda rate: losses[rate]), {str(rate): loss for rate, loss in losses.items()}

    def measure(self, method: str, sparsity: float, words: Sequence[str], seed: int, **more: Any) -> None:
        """Sparsify, and measure what was written on both kinds of texts."""
        began = time.perf_counter()
        report = self.sparsify(words, seed, "test", self.folder / "sparse")
        seconds = time.perf_counter() - began
        result = report["result"]
        entry = {
            "method": method,
            "sparsity": sparsity,
            "seed": seed,
            "seconds": round(seconds, 1),
            "reached": result["sparsity"],
            "losses": result["losses"],
            "neutral": loss_of(self.folder / "sparse", self.files["neutral"]),
            "rounds": result["rounds"],
        }
        self.results.append(entry | more)
        print(table(self.results), flush=True)


def run(words: Sequence[str]) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.redirect_stderr(io.StringIO()) as said:
        assert command([*words, "--json"]) == 0, said.getvalue()
    report: dict[str, Any] = json.loads(shown.getvalue())
    return report


def loss_of(model: Path, texts: Path) -> float:
    """In nats per token, by the command as well: a merge of one model with weight 1 is that model."""
    words = ["merge", "zero", str(model), "--method", "task-arithmetic", "--weights", "1", "--dry-run"]
    loss: float = run([*words, "--data", str(texts)])["metrics"]["losses"][0]
    return loss


def table(results: Sequence[dict[str, Any]]) -> str:
    """Means over seeds and their deviation."""
    lines = [f"{'method':<14}{'sparsity':>9}{'seeds':>6}{'perplexity':>12}{'deviation':>10}{'neutral':>9}{'gap':>9}"]
    keys = dict.fromkeys((one["sparsity"], one["method"]) for one in results)
    for sparsity, method in keys:
        found = [one for one in results if (one["sparsity"], one["method"]) == (sparsity, method)]
        values = [math.exp(one["losses"]["sparse"]) for one in found]
        spread = f"{statistics.stdev(values):>10.3f}" if len(values) > 1 else f"{'':>10}"
        neutral = statistics.mean(math.exp(one["neutral"]) for one in found)
        gaps = [one["rounds"][-1]["merge_gap"] for one in found if "merge_gap" in one["rounds"][-1]]
        gap = f"{statistics.mean(gaps):>9.4f}" if gaps else ""
        mean = statistics.mean(values)
        lines.append(f"{method:<14}{sparsity:>9.4g}{len(found):>6}{mean:>12.3f}{spread}{neutral:>9.2f}{gap}")
    return "\n".join(lines)


def main() -> None:
    arguments = _arguments()
    arguments.model = arguments.model or demo_model("smollm2")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        files = split(folder)
        runs = Runs(arguments, files, folder)
        dense = {kind: loss_of(arguments.model, files[kind]) for kind in ("test", "neutral")}
        shown = {kind: round(math.exp(loss), 3) for kind, loss in dense.items()}
        print(f"perplexity of the dense model: {shown}", flush=True)
        for sparsity in arguments.sparsity:
            for method in UNTUNED:
                for seed in range(arguments.seeds if method != "magnitude" else 1):
                    runs.measure(method, sparsity, ["--method", method, "--sparsity", str(sparsity)], seed)
            for method in TUNED:
                rate, losses = runs.best_rate(method, sparsity)
                for seed in range(arguments.seeds):
                    words = runs.tuned(method, sparsity, rate)
                    runs.measure(f"+ {method}", sparsity, words, seed, rate=rate, validation=losses)
    report = {
        "benchmark": "sparsify",
        "machine": describe_machine("torch", "transformers"),
        "settings": {key: str(value) for key, value in vars(arguments).items()},
        "dense": dense,
        "runs": runs.results,
    }
    keep(report, arguments.output)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, help="folder of another LLM than SmolLM2-135M-Instruct")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--prune", default="wanda", help="how models that are tuned are pruned")
    parser.add_argument("--allocation", default="uniform", help="uniform or cka, for models that are tuned")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 2e-4, 5e-4, 1e-3])
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--examples", type=int, default=250, help="texts of each round but the last one")
    parser.add_argument("--final-examples", type=int, default=1000, help="texts of the last round")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where to put temporary files")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
