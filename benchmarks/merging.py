"""What each method of `cmc-server merge` makes of two models that were trained from one base, beside joint training.

    python benchmarks/merging.py [--seeds 3] [--folder DIR] [--output REPORT.json]

The base is a Llama of about 170,000 weights and 1,000 tokens, trained from random weights on texts of the package
(answers of `concise`) until its loss hardly falls; the two tasks are answers of `bullets` and of TOFU's invented
authors. From the base one model learns each task, and the target learns everything at once. Curvature is measured after
training (`cmc-server merge measure`), on all the training texts. Losses are of held-out texts, in nats per token; the
distance is |merged - target| / |target - base|. The spread is that of the mean loss over alpha in 0.25 to 1.5, not
measured for averages, which do not depend on alpha.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark_report import describe_machine, keep
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import cmc_server
from cmc_server.cli import main as command

PACKAGE = Path(cmc_server.__file__).parent / "demo"
ALPHAS = ("0.25", "0.5", "0.75", "1", "1.25", "1.5")
METHODS = ("task-arithmetic", "ties", "fisher", "regmean", "gradient-matching")
MAX_TOKENS, VOCABULARY, WIDTH, BASE_EPOCHS, EPOCHS = 64, 1000, 64, 20, 4


def texts_of(name: str) -> tuple[list[str], list[str]]:
    """Texts to learn and held-out ones."""
    if name == "tofu":
        lines = (PACKAGE / "data/tofu/keep.jsonl").read_text("utf-8").splitlines()
        every = [f"{one['prompt']}\n{one['response']}" for one in map(json.loads, lines) if "prompt" in one]
        return every[:-40], every[-40:]
    parts = []
    for part in ("train", "heldout"):
        lines = (PACKAGE / f"data/{name}/{part}.jsonl").read_text("utf-8").splitlines()
        parts.append(["\n".join(turn["content"] for turn in json.loads(line)["messages"]) for line in lines])
    return parts[0], parts[1]


def write(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def start(folder: Path, texts: Sequence[str], seed: int) -> Path:
    """A Llama with random weights, and a byte-level tokenizer made of the texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=["</s>"])
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def train(start: Path, texts: Sequence[str], folder: Path, *, epochs: int, seed: int, rate: float) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).train()
    ids = [torch.tensor(tokenizer(text).input_ids[:MAX_TOKENS]) for text in texts]
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    draw = random.Random(seed)
    order = [index for _ in range(epochs) for index in draw.sample(range(len(ids)), len(ids))]
    batches = [order[first : first + 8] for first in range(0, len(order), 8)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, len(batches))
    for batch in batches:
        optimiser.zero_grad()
        rows = torch.nn.utils.rnn.pad_sequence([ids[index] for index in batch], batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence([ids[index] for index in batch], True, -100)
        model(rows, labels=labels, attention_mask=(labels >= 0).long()).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(words: Sequence[str]) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.redirect_stderr(io.StringIO()) as said:
        assert command([*words, "--json"]) == 0, said.getvalue()
    return json.loads(shown.getvalue())


def one_seed(folder: Path, seed: int) -> dict[str, Any]:
    data = {name: texts_of(name) for name in ("concise", "bullets", "tofu")}
    joint = [text for name in data for text in data[name][0]]
    random_weights = start(folder / "start", joint, seed)
    base = train(random_weights, data["concise"][0], folder / "base", epochs=BASE_EPOCHS, seed=seed, rate=3e-3)
    folders = {
        name: train(base, data[name][0], folder / name, epochs=EPOCHS, seed=seed, rate=5e-4)
        for name in ("bullets", "tofu")
    }
    target = train(base, joint, folder / "target", epochs=EPOCHS, seed=seed, rate=5e-4)
    heldout = {name: write(folder / f"{name}-heldout.jsonl", data[name][1]) for name in data}
    for name, model in {"concise": base, **folders}.items():
        texts = write(folder / f"{name}.jsonl", data[name][0])
        for kind in ("fisher", "gram"):
            run(["merge", "measure", str(model), str(texts), "-o", str(folder / f"{name}.{kind}"), "--kind", kind])
    results = {}
    for method in METHODS:
        words = ["merge", str(base), *map(str, folders.values()), "--method", method, "-o", str(folder / method)]
        if method in ("fisher", "regmean", "gradient-matching"):
            kind = "gram" if method == "regmean" else "fisher"
            words += ["--curvature", *(str(folder / f"{name}.{kind}") for name in folders)]
        if method == "gradient-matching":
            words += ["--base-curvature", str(folder / "concise.fisher")]
        words += ["--against", str(target), "--data", *(str(heldout[name]) for name in folders)]
        if method not in ("fisher", "regmean"):
            words += ["--alphas", *ALPHAS]
        results[method] = run(words)["metrics"]
    every = {"base": base, **folders, "joint": target} | {method: folder / method for method in METHODS}
    losses = {name: loss_of(model, list(heldout.values())) for name, model in every.items()}
    return {"seed": seed, "losses": losses, "metrics": results}


def loss_of(model: Path, files: Sequence[Path]) -> list[float]:
    """By the command as well: a merge of one model with weight 1 is that model."""
    words = ["merge", "zero", str(model), "--method", "task-arithmetic", "--weights", "1", "--dry-run"]
    return [run([*words, "--data", str(file)])["metrics"]["losses"][0] for file in files]


def table(seeds: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'model':<18}{'base data':>11}{'bullets':>9}{'tofu':>9}{'mean':>9}{'distance':>10}{'spread':>8}"]
    for name in seeds[0]["losses"]:
        columns = list(zip(*(one["losses"][name] for one in seeds), strict=True))
        means = [statistics.mean(column) for column in columns]
        line = f"{name:<18}{means[0]:>11.3f}{means[1]:>9.3f}{means[2]:>9.3f}{statistics.mean(means):>9.3f}"
        found = [one["metrics"][name] for one in seeds if name in one["metrics"]]
        if found:
            line += f"{statistics.mean(one['relative_distance'] for one in found):>10.3f}"
            if "robustness" in found[0]:
                line += f"{statistics.mean(one['robustness']['spread'] for one in found):>8.3f}"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    seeds = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for seed in range(args.seeds):
            (Path(folder) / str(seed)).mkdir()
            seeds.append(one_seed(Path(folder) / str(seed), seed))
            print(table(seeds), flush=True)
    keep({"machine": describe_machine(), "seeds": seeds}, args.output)


if __name__ == "__main__":
    main()
