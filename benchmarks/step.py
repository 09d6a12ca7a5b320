"""Where a steered step's time goes on a CPU: spelling, laying out rows, the delta's layers, its head, and the rule.

    python benchmarks/step.py --user USER_LLM --template TEMPLATE_LLM [--rows 1 8 32 256 --tokens 200]

Runs the controller as the engine would, without an engine: rows of chat length that grow by one token a step, and
random logits of the user LLM's size. The delta has 7 million random weights and the template LLM's vocabulary; with
``--delta`` it is another one. Prints, for each number of rows, the bound of the arithmetic alone and the milliseconds
of each part (medians over the steps), the host's microseconds for each token, and how many delta tokens were computed
for each output token: over the whole response and in each quarter of it. Host time is what is neither the model nor the
rule; what the model's pass leaves in the processor's cache makes it dearer, which --without-model leaves out. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark_report import describe_machine, keep
from bounds import delta_cost, machine_limits
from random_models import CONTEXT, write_random_delta
from torch import Tensor

import cmc_server.demo
from cmc_server.config import FAST_PATHS, DeltaSource, EngineSettings, FastPath
from cmc_server.fusion.controller import DeltaController
from cmc_server.fusion.loaded import load_delta
from cmc_server.integrations.request_args import ActiveDelta
from cmc_server.vocab.surface import load_tokenizer, read_generation_config, read_vocabulary

TEXTS = Path(cmc_server.demo.__file__).parent / "data" / "concise" / "train.jsonl"
PROMPT = 40
PARTS = ("spelling", "rows", "layers", "head", "rule", "rest")
WARM_UP = 5


class Clock:
    """Seconds spent inside the functions that it wraps, by name, since it was last read."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[name] += time.perf_counter() - began

        return timed

    def parts(self) -> dict[str, float]:
        """Milliseconds of each part, and a fresh start."""
        spent, self.spent = self.spent, defaultdict(float)
        found = {
            "spelling": spent["advance"],
            "rows": spent["forward"] - spent["model"],
            "layers": spent["model"] - spent["head"],
            "head": spent["head"],
            "rule": spent["rule"],
            "rest": spent["shift"] - spent["forward"] - spent["rule"],
        }
        return {name: 1e3 * seconds for name, seconds in found.items()}


def user_tokens(user: Path) -> list[int]:
    """Plain English in the user LLM's tokens."""
    records = [json.loads(line) for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    text = " ".join(message["content"] for record in records for message in record["messages"])
    ids: list[int] = load_tokenizer(str(user))(text, add_special_tokens=False)["input_ids"]
    return ids


def measure(
    user: Path, delta: Path, num_rows: int, tokens: int, fast_paths: frozenset[FastPath], *, with_model: bool = True
) -> dict[str, Any]:
    """Decode ``tokens`` tokens in ``num_rows`` rows."""
    vocabulary = read_vocabulary(load_tokenizer(str(user)), read_generation_config(str(user)))
    source = DeltaSource(name="delta", path=str(delta))
    settings = EngineSettings(fast_paths=fast_paths)
    loaded = load_delta(source, vocabulary, settings, max_seqs=num_rows, device=torch.device("cpu"))
    controller = DeltaController(fast_paths=fast_paths)
    controller.load(loaded)
    clock = Clock()
    runner: Any = loaded.runner
    steered: Any = controller
    head = runner._model.get_output_embeddings()
    head.forward = clock.wrap("head", head.forward)
    runner._logits = clock.wrap("model", runner._logits if with_model else always_the_same(runner.vocab_size))
    runner.forward = clock.wrap("forward", runner.forward)
    steered._apply_rule = clock.wrap("rule", steered._apply_rule)
    advance, shift = clock.wrap("advance", controller.advance), clock.wrap("shift", controller.shift)
    stream = user_tokens(user)
    starts = [row * 997 % (len(stream) - PROMPT - tokens) for row in range(num_rows)]
    for row, start in enumerate(starts):
        controller.admit(row, stream[start : start + PROMPT], [ActiveDelta(name="delta", strength=1.0)], "zero")
    logits = torch.randn(num_rows, vocabulary.size)
    pairs = [(row, row) for row in range(num_rows)]
    steps, read = [], []
    with torch.inference_mode():
        shift(pairs, logits.clone())  # the prompts
        clock.parts()
        for step in range(tokens):
            before = runner.num_tokens
            for row, start in enumerate(starts):
                advance(row, [stream[start + PROMPT + step]])
            shift(pairs, logits)
            steps.append(clock.parts())
            read.append(runner.num_tokens - before)
    medians = {name: statistics.median(step[name] for step in steps[WARM_UP:]) for name in PARTS}
    host = [1e3 * (step["spelling"] + step["rows"] + step["rest"]) / num_rows for step in steps]
    spelling = statistics.fmean(step["spelling"] for step in steps[WARM_UP:])
    return {
        "rows": num_rows,
        "milliseconds": {name: round(value, 3) for name, value in medians.items()}
        | {"all": round(sum(medians.values()), 3)},
        "spelling_microseconds_per_token": round(1e3 * spelling / num_rows, 1),
        "host_microseconds_per_token": round(statistics.fmean(host[WARM_UP:]), 1),
        "host_microseconds_per_token_by_quarter": by_quarter(host, 1),
        "delta_tokens_per_token": round(statistics.fmean(read) / num_rows, 3),
        "delta_tokens_per_token_by_quarter": by_quarter([count / num_rows for count in read], 3),
    }


def always_the_same(vocab_size: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """In place of a delta's model: the same random logits for every step with as many rows."""
    kept: dict[int, Tensor] = {}

    def logits(_ids: Tensor, _positions: Tensor, wanted: Tensor) -> Tensor:
        if len(wanted) not in kept:
            kept[len(wanted)] = torch.randn(len(wanted), vocab_size)
        return kept[len(wanted)]

    return logits


def by_quarter(values: Sequence[float], digits: int) -> list[float]:
    """Means over the first to the last quarter of the response."""
    size = len(values) // 4
    return [round(statistics.fmean(values[size * part : size * (part + 1)]), digits) for part in range(4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--user", type=Path, required=True)
    parser.add_argument("--template", type=Path, help="LLM whose vocabulary a random delta gets")
    parser.add_argument("--delta", type=Path, help="a delta folder, instead of a random delta")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 256])
    parser.add_argument("--tokens", type=int, nargs="+", default=[200], help="lengths of the responses")
    parser.add_argument("--fast-paths", nargs="*", choices=sorted(FAST_PATHS), default=sorted(FAST_PATHS))
    parser.add_argument("--without-model", action="store_true", help="the host's work alone, with a warm cache")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if (options.template is None) == (options.delta is None):
        parser.error("give either --template or --delta")
    peak, bandwidth = machine_limits(1)
    print(f"GEMM peak {peak / 1e9:.1f} GFLOP/s, bandwidth {bandwidth / 1e9:.1f} GB/s on one thread")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        delta = options.delta or write_random_delta(Path(folder) / "delta", options.template)
        for tokens in options.tokens:
            for rows in options.rows:
                flops, moved = delta_cost(delta, rows, min(PROMPT + tokens // 2, CONTEXT))
                bound = round(1e3 * max(flops / peak, moved / bandwidth), 3)
                paths = frozenset(options.fast_paths)
                found = measure(options.user, delta, rows, tokens, paths, with_model=not options.without_model)
                found = {"tokens": tokens, "bound_milliseconds": bound, **found}
                print(json.dumps(found))
                results.append(found)
    report = {"benchmark": "step", "machine": describe_machine("torch", "transformers"), "user": options.user.name}
    report |= {"delta": options.delta.name if options.delta else "7M, random", "results": results}
    report["with_model"] = not options.without_model
    report |= {
        "fast_paths": options.fast_paths,
        "gemm_gflops": round(peak / 1e9, 1),
        "bandwidth_gb_s": round(bandwidth / 1e9, 1),
    }
    keep(report, options.output)


if __name__ == "__main__":
    main()
