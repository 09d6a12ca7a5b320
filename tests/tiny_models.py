"""Tiny random models and tokenizers, built on the fly: ``from tiny_models import make_delta``."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cmc_server.delta.manifest import DeltaManifest

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def make_tokenizer(folder: Path, *, vocab_size: int = 400) -> Path:
    """Write a byte-level BPE tokenizer with ChatML's special tokens, trained on a few words.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<spare>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=special)
    backend.train_from_iterator(
        ["The quick brown fox jumps over the lazy dog. " * 3, "Say it in one sentence."], trainer
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    ).save_pretrained(folder)
    return folder


def make_delta(
    folder: Path,
    tokenizer_path: Path | str,
    *,
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    manifest: DeltaManifest | None = None,
) -> Path:
    """Write a random Llama delta with the tokenizer of another folder.

    The weights are drawn wide enough for logits of a few units, so that strength 1 visibly steers a small LLM.

    Args:
        folder: where to write; created if missing.
        tokenizer_path: folder whose tokenizer files are copied.
        seed: equal seeds give equal weights; the global random state is left alone.
        hidden: hidden size, a multiple of 4.
        layers: number of layers.
        manifest: written as ``cmc_delta.json`` if given.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_path))
    config = LlamaConfig(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).float().save_pretrained(folder)
    for name in _TOKENIZER_FILES:
        source = Path(tokenizer_path) / name
        if source.exists():
            shutil.copyfile(source, folder / name)
    if manifest is not None:
        manifest.write(folder)
    return folder
