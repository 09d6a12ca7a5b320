"""Time training with the template's hidden states kept, against its forward pass in every step.

    python benchmarks/training_cache.py [--data FILE] [--chats NUM] [--epochs NUM] [--output FILE]

Both runs train the same delta (Llama, hidden 128, 4 layers, about 7M parameters) beside SmolLM2-135M-Instruct on the
same chats, drawn from what ``concise`` learned from, with the same seed, one after the other in one process, after a
warm-up of a step each. The first one's time includes making the cache. The bound comes first: the ratio of the matrix
products' floating-point operations, which leaves out whatever is bound by memory, such as the softmax over the
vocabulary. Beside the wall clock stands the process's own CPU time, which other work on the machine disturbs less. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from benchmark_report import describe_machine, keep
from transformers import set_seed

import cmc_server
from cmc_server.config import build
from cmc_server.delta.manifest import DeltaManifest
from cmc_server.delta.prompt import PromptEncoder
from cmc_server.demo.models import demo_model
from cmc_server.training.batches import Collator, TrainingSet
from cmc_server.training.data import Records, read_records
from cmc_server.training.examples import ExampleEncoder, training_set
from cmc_server.training.hidden_cache import HiddenCache
from cmc_server.training.recipes import DataSource, Recipe
from cmc_server.training.student import Student, new_delta, vocabulary_size
from cmc_server.training.template import FrozenTemplate
from cmc_server.training.trainer import DeltaTrainer, measure_losses

DATA = Path(cmc_server.__file__).parent / "demo" / "data" / "concise" / "train.jsonl"
DELTA = {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "intermediate_size": 384}


def main() -> None:
    arguments = _arguments()
    recipe = build(
        Recipe,
        {
            "name": "benchmark",
            "template": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "delta": DELTA,
            "data": {"train": arguments.data.name},
            "optimisation": {
                "epochs": arguments.epochs,
                "batch_size": arguments.batch_size,
                "learning_rate": 2e-3,
            },
            "checkpoint": {"save_strategy": "no"},
            "output": {"folder": "unused"},
        },
    )
    template = FrozenTemplate.load(str(demo_model("smollm2")), "cuda" if torch.cuda.is_available() else "cpu")
    records = read_records(DataSource(file=arguments.data.name), arguments.data.parent)
    draw = random.Random(0)  # of all lengths that the data have
    records = Records(draw.sample(records.items, min(arguments.chats, len(records.items))), records.provenance)
    warm_up = recipe.model_copy(update={"optimisation": recipe.optimisation.model_copy(update={"epochs": 1})})
    few = Records(records.items[: arguments.batch_size], records.provenance)
    for mode in ("memory", "none"):
        _train(mode, warm_up, template, few)
    work = _count(recipe, template, records)
    bound = _bound(work, arguments.epochs)
    print(f"{work}\nbound by matrix products: {bound:.2f} times faster with the cache", flush=True)
    runs = {mode: _train(mode, recipe, template, records) for mode in ("memory", "none")}
    speedup = runs["none"]["seconds"] / runs["memory"]["seconds"]
    report = {
        "benchmark": "training_cache",
        "machine": {
            **describe_machine("torch", "transformers", "accelerate"),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads_used": torch.get_num_threads(),
        },
        "data": {**records.provenance, **work},
        "template_dtype": str(template.dtype).removeprefix("torch."),
        "epochs": arguments.epochs,
        "batch_size": arguments.batch_size,
        "runs": {"with_cache": runs["memory"], "without_cache": runs["none"]},
        "speedup": round(speedup, 2),
        "speedup_in_cpu_seconds": round(runs["none"]["cpu_seconds"] / runs["memory"]["cpu_seconds"], 2),
        "speedup_bound": round(bound, 2),
    }
    keep(report, arguments.output)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="chats to train on")
    parser.add_argument("--chats", type=int, default=32, help="how many of them")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--output", type=Path, help="also write the report here")
    return parser.parse_args()


def _encode(mode: Any, recipe: Recipe, template: FrozenTemplate, records: Records) -> TrainingSet:
    prompts = PromptEncoder(template.tokenizer, DeltaManifest())
    encoder = ExampleEncoder([template], None, prompts, HiddenCache(mode, 8.0), recipe.data.max_length)
    return training_set(encoder, recipe.objective, "train", {"train": records}, recipe.seed)


def _train(mode: str, recipe: Recipe, template: FrozenTemplate, records: Records) -> dict[str, float]:
    set_seed(recipe.seed)
    delta = new_delta(recipe.delta, template.tokenizer, recipe.data.max_length)
    student, collator = Student(delta, vocabulary_size(template.tokenizer)), Collator([template])
    start, start_cpu = time.perf_counter(), time.process_time()
    items = _encode(mode, recipe, template, records)
    encoded = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = DeltaTrainer(student, collator, recipe, items, None, Path(folder))
        trainer.train()
    end, end_cpu = time.perf_counter(), time.process_time()
    loss = measure_losses(student, collator, recipe.objective, items)["loss"][0]
    steps = trainer.state.global_step
    print(f"{mode}: {end - start:.1f} s for {steps} steps, loss {loss}", flush=True)
    return {
        "seconds": round(end - start, 2),
        "cpu_seconds": round(end_cpu - start_cpu, 2),
        "making_the_cache_seconds": round(encoded - start, 2),
        "steps": steps,
        "loss": loss,
    }


def _count(recipe: Recipe, template: FrozenTemplate, records: Records) -> dict[str, int]:
    """Tokens of an epoch, and parameters in matrix products: bodies see every token, heads only the labels."""
    examples = [item["train"] for item in _encode("none", recipe, template, records).items]
    delta = new_delta(recipe.delta, template.tokenizer, recipe.data.max_length)
    return {
        "chats": len(examples),
        "template_tokens": sum(len(example.readings[0].ids) for example in examples),
        "delta_tokens": sum(len(example.delta_ids) for example in examples),
        "labels": sum(len(example.readings[0].labels) for example in examples),
        "template_body": _body(template.model),
        "template_head": template.model.get_output_embeddings().weight.numel(),
        "delta_body": _body(delta),
        "delta_head": delta.get_output_embeddings().weight.numel(),
    }


def _body(model: Any) -> int:
    embeddings = model.get_input_embeddings().weight.numel()
    return sum(parameter.numel() for parameter in model.base_model.parameters()) - embeddings


def _bound(work: dict[str, int], epochs: int) -> float:
    frozen = 2 * work["template_body"] * work["template_tokens"]
    rest = 2 * work["template_head"] * work["labels"]
    rest += 6 * (work["delta_body"] * work["delta_tokens"] + work["delta_head"] * work["labels"])
    return epochs * (frozen + rest) / (frozen + epochs * rest)


if __name__ == "__main__":
    main()
