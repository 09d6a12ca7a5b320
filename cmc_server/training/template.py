"""The frozen partner: its chat template, and its last hidden states, computed once before training begins."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from cmc_server.errors import ConfigError, MapError
from cmc_server.vocab.surface import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class FrozenTemplate:
    """A template LLM that is never trained.

    What training needs of it at a response token is one vector, its last hidden state; only the output head is applied
    again in every epoch.

    Args:
        model: any causal language model whose logits are its output embeddings times its last hidden states.
        tokenizer: its fast tokenizer, with a chat template.

    Raises:
        ConfigError: the tokenizer has no chat template or no eos.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
            raise ConfigError(
                "The template LLM's tokenizer needs a chat template and an eos token; choose a chat model as template."
            )
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.eos_id: int = tokenizer.eos_token_id

    @classmethod
    def load(cls, path: str, device: torch.device | str = "cpu") -> FrozenTemplate:
        """Load a folder or hub id in the type that its weights are stored in.

        Raises:
            ConfigError: it cannot be found or loaded.
        """
        from transformers import AutoModelForCausalLM

        try:
            tokenizer = load_tokenizer(path)
            model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", use_safetensors=True)
        except (OSError, ValueError, MapError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"The template LLM {path} cannot be loaded; give a folder with --template. ({reason})"
            ) from error
        return cls(model.to(device), tokenizer)

    def encode_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of a chat up to the answer, in the template LLM's own format."""
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def encode_response(self, text: str) -> list[int]:
        """Ids of an answer with its eos."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, self.eos_id]

    @torch.no_grad()
    def hidden_states(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
        """Last hidden states from a position on, one forward pass per sequence.

        Args:
            sequences: token ids.
            starts: the first position wanted of each.

        Returns:
            One [length - start, H] per sequence, in the model's type, on its device.

        Raises:
            ConfigError: the model's logits are not its head times these states.
        """
        states: list[Tensor] = []
        for ids, start in tqdm(list(zip(sequences, starts, strict=True)), desc="template LLM", file=sys.stderr):
            input_ids = torch.tensor([list(ids)], device=self.model.device)
            hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[0, start:]
            if not states:
                self._check_head(input_ids, start, hidden)
            states.append(hidden.clone())
        return states

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """The output head: [N, H] to [N, V], float32."""
        head = self.model.get_output_embeddings()
        logits: Tensor = head(hidden).float()
        return logits

    def _check_head(self, input_ids: Tensor, start: int, hidden: Tensor) -> None:
        expected = self.model(input_ids=input_ids, use_cache=False).logits[0, start:].float()
        if not torch.allclose(self.logits(hidden), expected, rtol=1e-2, atol=1e-2):
            raise ConfigError(
                f"The template LLM ({self.model.config.model_type}) changes its logits after the output head, which "
                "training does not support; choose a template without scaled or capped logits."
            )
