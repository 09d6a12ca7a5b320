"""What `cmc-server sparsify` makes of an LLM at 50 and 70 %: perplexity of held-out texts by method, nothing tuned.

    python benchmarks/sparsify.py [--model FOLDER] [--sparsity 0.5 0.7] [--seeds 3] [--output REPORT.json]

The LLM is SmolLM2-135M-Instruct unless another folder is given. Texts come from the package: calibration reads one part
of the answers of `concise` (questions and answers, plain), figures are of another one and of neutral texts. Magnitude
pruning, Wanda and SparseGPT stand beside the dense model, Wanda also with the sparsity of blocks by CKA. Seeds draw
calibration sequences, which magnitude pruning has none of. Tuning of what is left is compared in
``benchmarks/healing.py``. Prints a table after each run; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
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
METHODS = {
    "magnitude": ["magnitude"],
    "wanda": ["wanda"],
    "wanda, blocks by CKA": ["wanda", "--allocation", "cka"],
    "sparsegpt": ["sparsegpt"],
}
VALIDATION, TEST = 60, 120
MEASURED = ("test", "neutral")


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


def measure(given: argparse.Namespace, files: dict[str, Path], folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """Sparsify, and measure what was written on both kinds of texts."""
    calibrate = ["--calibrate", str(files["train"]), "--sequences", str(given.sequences), "--length", str(given.length)]
    began = time.perf_counter()
    result = run(["sparsify", str(given.model), *words, *calibrate, "-o", str(folder), "--force"])["result"]
    seconds = time.perf_counter() - began
    losses = {kind: loss_of(folder, files[kind]) for kind in MEASURED}
    return {"seconds": round(seconds, 1), "reached": result["sparsity"], "losses": losses}


def perplexities(found: Sequence[dict[str, float]]) -> list[str]:
    """Cells of a table: of each kind of texts the mean over seeds, and each seed's in brackets."""
    cells = []
    for kind in MEASURED:
        values = [math.exp(losses[kind]) for losses in found]
        spread = f" ({', '.join(f'{value:.2f}' for value in values)})" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.2f}{spread}")
    return cells


def table(results: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = ["| sparsity | method | perplexity, answers | perplexity, neutral texts |", "|---|---|---|---|"]
    for sparsity, method in dict.fromkeys((one["sparsity"], one["method"]) for one in results):
        found = [one["losses"] for one in results if (one["sparsity"], one["method"]) == (sparsity, method)]
        lines.append(f"| {sparsity:g} | {method} | {' | '.join(perplexities(found))} |")
    return "\n".join(lines)


def main() -> None:
    given = _arguments()
    given.model = given.model or demo_model("smollm2")
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        files = split(Path(name))
        dense = {kind: loss_of(given.model, files[kind]) for kind in MEASURED}
        results: list[dict[str, Any]] = [{"method": "dense", "sparsity": 0.0, "losses": dense}]
        for sparsity, method in itertools.product(given.sparsity, METHODS):
            for seed in range(given.seeds if method != "magnitude" else 1):
                words = ["--method", *METHODS[method], "--sparsity", str(sparsity), "--seed", str(seed)]
                found = measure(given, files, Path(name) / "sparse", words)
                results.append({"method": method, "sparsity": sparsity, "seed": seed} | found)
                print(table(results), flush=True)
    report = {
        "benchmark": "sparsify",
        "machine": describe_machine("torch", "transformers"),
        "settings": {key: getattr(given, key) for key in ("seeds", "sequences", "length")},
        "runs": results,
    }
    keep(report, given.output)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of another LLM than SmolLM2-135M-Instruct")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="where to put temporary files")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
