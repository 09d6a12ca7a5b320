"""Deltas and adapters with random weights: speed does not depend on what the weights are."""

from __future__ import annotations

from pathlib import Path

import torch

from cmc_server.training.recipes import DeltaSize
from cmc_server.training.student import new_delta
from cmc_server.vocab.surface import load_tokenizer

#: About 7 million parameters with SmolLM2's 49,152 tokens.
SEVEN_MILLION = DeltaSize(hidden_size=128, intermediate_size=344, num_layers=4, num_heads=4)
CONTEXT = 4096
RANK = 8


def write_random_delta(folder: Path, template: Path, size: DeltaSize = SEVEN_MILLION, seed: int = 0) -> Path:
    """Write a delta with the vocabulary of a template LLM.

    Returns:
        The folder.
    """
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(str(template))
    new_delta(size, tokenizer, CONTEXT).to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_random_lora(folder: Path, base: Path, seed: int = 0) -> Path:
    """Write a LoRA adapter of rank 8 for all linear layers of an LLM.

    Returns:
        The folder.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(folder)
    return folder
