"""The delta while it learns: its shape, its forward pass at response positions, its folder afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cmc_server.delta.manifest import DeltaManifest
from cmc_server.errors import ConfigError, MapError, one_line
from cmc_server.training.recipes import DeltaSize
from cmc_server.vocab.surface import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


#: One sentence of a run that failed; what the run would have replaced is still there.
DIVERGED = "The training {}; nothing was written: lower optimisation.learning_rate and train again with --restart."


def new_delta(size: DeltaSize, tokenizer: PreTrainedTokenizerBase, max_positions: int) -> PreTrainedModel:
    """A Llama with random float32 weights and the template's vocabulary. Seed torch before the call.

    Raises:
        ConfigError: there is not memory enough for it.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary_size(tokenizer),
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
    try:
        return LlamaForCausalLM(config)
    except (RuntimeError, MemoryError) as error:
        raise ConfigError(f"A delta of this size cannot be made ({one_line(error)[:200]}); lower delta.*.") from None


def load_delta(path: str, tokenizer: PreTrainedTokenizerBase, max_positions: int) -> PreTrainedModel:
    """A model that exists, as float32, to start from.

    Args:
        path: folder or hub id of any causal LM in safetensors.
        tokenizer: the template LLM's.
        max_positions: longest input of the training.

    Raises:
        ConfigError: it cannot be loaded, has another vocabulary, or reads shorter inputs.
    """
    from transformers import AutoModelForCausalLM

    try:
        own = load_tokenizer(path)
        delta = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, MapError, SafetensorError) as error:
        reason = one_line(error)[:300]
        raise ConfigError(f"delta.start_from {path} cannot be loaded: {reason}") from None
    size, rows = vocabulary_size(tokenizer), delta.get_input_embeddings().weight.shape[0]
    if own.get_vocab() != tokenizer.get_vocab() or rows < size:
        raise ConfigError(
            f"The vocabulary of delta.start_from {path} ({len(own.get_vocab())} tokens) differs from that of the "
            f"template {tokenizer.name_or_path} ({len(tokenizer.get_vocab())} tokens); train beside a template with "
            "the delta's vocabulary (served, the delta steers other LLMs through a map), or give a size instead of it."
        )
    positions = getattr(delta.config, "max_position_embeddings", None)
    if positions is not None and positions < max_positions:
        raise ConfigError(
            f"delta.start_from {path} reads up to {positions} tokens; lower data.max_length = {max_positions}."
        )
    _check_head(path, delta)
    return delta


@torch.no_grad()
def _check_head(path: str, delta: PreTrainedModel) -> None:
    """What a :class:`Student` gives must be what the delta gives when it is served."""
    ids = torch.arange(min(5, delta.get_input_embeddings().weight.shape[0]))[None]
    hidden = delta.eval().base_model(input_ids=ids, use_cache=False).last_hidden_state
    expected = delta(input_ids=ids, use_cache=False).logits
    if not torch.allclose(delta.get_output_embeddings()(hidden), expected, rtol=1e-4, atol=1e-4):
        raise ConfigError(
            f"delta.start_from {path} ({delta.config.model_type}) changes its logits after the output head, which "
            "training does not support; start from a model without scaled or capped logits, or give a size."
        )


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the highest token id."""
    return int(max(tokenizer.get_vocab().values())) + 1


class Student(nn.Module):
    """A delta whose forward pass gives logits at chosen positions only, since most tokens of a chat are prompt.

    Args:
        delta: any causal language model.
        vocab_size: D; columns beyond it pad the delta's logits, and serving never reads them.
    """

    def __init__(self, delta: PreTrainedModel, vocab_size: int) -> None:
        super().__init__()
        self.delta, self._vocab_size = delta, vocab_size

    def forward(self, batch: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
        """Logits [P, D] of each role of a :class:`~cmc_server.training.batches.Collator`'s batch.

        All roles go through one call, since data parallelism expects one call for each step.
        """
        return {role: self._logits(**_inputs(part)) for role, part in batch.items()}

    def _logits(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        output = self.delta.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        hidden = output.last_hidden_state.flatten(0, 1).index_select(0, positions)
        logits: Tensor = self.delta.get_output_embeddings()(hidden)
        # Even a slice of everything costs a copy in the backward pass.
        return logits if logits.shape[1] <= self._vocab_size else logits[:, : self._vocab_size]


def _inputs(part: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: part[name] for name in ("input_ids", "attention_mask", "positions")}


def save_delta(
    delta: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    manifest: DeltaManifest,
    folder: Path,
    dtype: torch.dtype,
) -> None:
    """Write into a folder: weights cast to ``dtype``, configuration, tokenizer and manifest."""
    delta.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    manifest.write(folder)


def check_finite(delta: nn.Module, dtype: torch.dtype) -> None:
    """Refuse weights that must not be stored.

    Args:
        delta: as it was trained.
        dtype: type of the stored weights.

    Raises:
        ConfigError: a weight is not finite, or is not once it is stored.
    """
    if not all(bool(weights.isfinite().all()) for weights in delta.parameters()):
        raise ConfigError(DIVERGED.format("ended with weights that are not finite"))
    if not all(bool(weights.to(dtype).isfinite().all()) for weights in delta.parameters()):
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(DIVERGED.format(f"ended with weights too large for output.dtype: {name}"))
