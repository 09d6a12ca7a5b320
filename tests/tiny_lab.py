"""What evaluation needs, in tiny: a chat LLM, random deltas and TOFU-like questions: ``from tiny_lab import Lab``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_models import make_delta
from tiny_template import SUBJECTS, make_template, write_jsonl
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Lab:
    """Folders and files of an evaluation."""

    user: Path
    tuned: Path
    same: Path
    other: Path
    tofu: Path
    prompts: Path


def tuned_copy(user: Path, folder: Path, seed: int = 1) -> Path:
    """The same model with noise on its weights, as if it had been trained further."""
    shutil.copytree(user, folder)
    model = AutoModelForCausalLM.from_pretrained(user, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def write_tofu(folder: Path, subjects: Sequence[str] = SUBJECTS[:3]) -> Path:
    folder.mkdir()
    for name in ("forget01", "retain", "real_authors", "world_facts"):
        invented = name in ("forget01", "retain")
        records = []
        for subject in subjects:
            record = {"question": f"What is {subject}?", "answer": f"It is {subject}."}
            if invented:
                record["paraphrased_answer"] = f"{subject}, it is."
            perturbed = [f"{other}, it is." for other in ("wood", "iron")]
            records.append({**record, "perturbed_answer": perturbed})
        write_jsonl(folder / f"{name}_perturbed.json", records)
    return folder


def make_lab(folder: Path, tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> Lab:
    user = make_template(folder / "user")
    tokenizers["sentencepiece_bpe"].save_pretrained(folder / "pieces")
    prompts = folder / "prompts.json"
    prompts.write_text(
        json.dumps(
            [{"instruction": f"Tell me of {subject}.", "output": f"{subject} is wet."} for subject in SUBJECTS[:3]]
        ),
        "utf-8",
    )
    return Lab(
        user=user,
        tuned=tuned_copy(user, folder / "tuned"),
        same=make_delta(folder / "same", user, seed=1),
        other=make_delta(folder / "other", folder / "pieces", seed=2),
        tofu=write_tofu(folder / "tofu"),
        prompts=prompts,
    )
