"""The delta while it learns: its shape, its forward pass at response positions, its folder afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cmc_server.delta.manifest import DeltaManifest
from cmc_server.training.recipes import DeltaSize

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def new_delta(size: DeltaSize, tokenizer: PreTrainedTokenizerBase, max_positions: int) -> PreTrainedModel:
    """A Llama with random float32 weights and the template's vocabulary. Seed torch before the call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        initializer_range=size.initializer_range,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


class Student(nn.Module):
    """A delta whose forward pass gives logits at chosen positions only, since most tokens of a chat are prompt.

    Args:
        delta: any causal language model.
    """

    def __init__(self, delta: PreTrainedModel) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """Logits after the tokens at ``positions`` of the flattened [B * L] input: [N, D]."""
        output = self.delta.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        hidden = output.last_hidden_state.flatten(0, 1).index_select(0, positions)
        logits: Tensor = self.delta.get_output_embeddings()(hidden)
        return logits


def save_delta(
    delta: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    manifest: DeltaManifest,
    folder: Path,
    dtype: torch.dtype,
) -> None:
    """Write the delta folder: weights cast to ``dtype``, configuration, tokenizer and manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    delta.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # save_pretrained leaves the weights readable by their owner only; a server may run as another user.
    for path in folder.iterdir():
        path.chmod(0o644)
    manifest.write(folder)
