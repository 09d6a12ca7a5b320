"""A checkpoint as a transformers model, where an edit needs its loss or its logits and not only its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cmc_server.editing.checkpoint import Checkpoint
from cmc_server.errors import EditingError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model in eval mode, without gradients, on the CPU.

    Raises:
        EditingError: transformers cannot load it, or names its weights otherwise than the checkpoint does.
    """
    from transformers import AutoModelForCausalLM

    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder, dtype=dtype, attn_implementation="sdpa", use_safetensors=True, local_files_only=True
        )
    except Exception as error:  # transformers raises nearly anything here
        reason = one_line(error)[:300]
        raise EditingError(f"{checkpoint.folder} cannot be loaded as a causal language model: {reason}") from None
    unknown = sorted(set(checkpoint.names) - set(model.state_dict()))
    if unknown:
        raise EditingError(f"transformers knows no {unknown[0]} in {checkpoint.folder}, so that it cannot be measured.")
    return model.eval().requires_grad_(False)
