"""The frozen partner: its chat template, its last hidden states in batches, its output head, its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from cmc_server.errors import ConfigError, MapError, one_line
from cmc_server.fusion.states import similar_lengths
from cmc_server.vocab.surface import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Padded tokens in one forward pass over the template LLM.
TOKENS_PER_BATCH = 2048
#: Entries of a configuration that say where and with what it was written, not what the model computes.
_NOT_HASHED = {"_name_or_path", "transformers_version", "architectures"}


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

    #: Whether it has no logits to be steered.
    silent: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
            raise ConfigError(
                "The template LLM's tokenizer needs a chat template and an eos token; choose a chat model as template."
            )
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.eos_id: int = tokenizer.eos_token_id
        self._head_checked = False

    @property
    def name(self) -> str:
        """Folder or hub id."""
        return str(self.tokenizer.name_or_path)

    @property
    def hidden_size(self) -> int:
        """H, the width of the hidden states."""
        return int(self.model.get_output_embeddings().weight.shape[1])

    @property
    def max_positions(self) -> int | None:
        """Longest input of the architecture, or None if its config does not say."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return positions if isinstance(positions, int) else None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the hidden states."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the configuration and every weight as loaded.

        Sizes and headers of the files would not do: a tuned LLM has those of its base. Hashing all of it takes a second
        or two per GiB, far less than the forward passes that a cache saves.
        """
        config = {key: value for key, value in self.model.config.to_dict().items() if key not in _NOT_HASHED}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, weights in self.model.state_dict().items():
            digest.update(f"{name} {weights.dtype} {tuple(weights.shape)}\0".encode())
            digest.update(weights.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

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
        except (OSError, ValueError, MapError, SafetensorError) as error:
            reason = one_line(error)[:300]
            raise ConfigError(
                f"The template LLM {path} cannot be loaded; give a folder with --template. ({reason})"
            ) from error
        return cls(model.to(device), tokenizer)

    def encode(self, prompt: Sequence[Mapping[str, Any]] | str, answer: str) -> tuple[list[int], list[int]]:
        """Ids of a prompt, and of what follows it.

        Args:
            prompt: a chat, whose answer ends with eos; or the beginning of a plain text, which has no end.
            answer: what follows.
        """
        if not isinstance(prompt, str):
            return self.encode_prompt(prompt), self.encode_response(answer)
        # In one call, since a text is not spelled like its parts; special tokens as a server adds them.
        encoded = self.tokenizer(prompt + answer, return_offsets_mapping=True)
        ids: list[int] = encoded["input_ids"]
        starts = (place for place, (start, _) in enumerate(encoded["offset_mapping"]) if start >= len(prompt))
        first = next(starts, len(ids) - 1)
        return ids[:first], ids[first:]

    def encode_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of a chat up to the answer, in the template LLM's own format.

        Raises:
            ConfigError: the chat template refuses the chat, or is broken.
        """
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template refuses a chat by jinja2's errors, and its expressions fail by any
            beginning = str(messages[0]["content"])[:80]
            raise ConfigError(
                f"The chat template of the template LLM {self.name} fails on the record that begins with "
                f"{beginning!r} ({one_line(error)[:300]}); change or remove that record, or choose another template."
            ) from None
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def encode_response(self, text: str) -> list[int]:
        """Ids of an answer with its eos."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, self.eos_id]

    def check_ids(self, ids: Sequence[int]) -> None:
        """Refuse ids that the tokenizer gives and the model does not know.

        Raises:
            ConfigError: as said; names the first one.
        """
        rows = self.model.get_output_embeddings().weight.shape[0]
        unknown = next((one for one in ids if one >= rows), None)
        if unknown is not None:
            raise ConfigError(
                f"The tokenizer of the template LLM {self.name} gives the token "
                f"{self.tokenizer.convert_ids_to_tokens(unknown)!r} the id {unknown}, but the model has {rows} "
                "embeddings; resize them, or choose another template."
            )

    @torch.no_grad()
    def hidden_states(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Last hidden states from a position on, in batches of similar length.

        Padding stands on the right, where no position of a causal model sees it, so no mask is needed.

        Args:
            sequences: token ids.
            starts: the first position wanted of each.

        Yields:
            Index of a sequence and its states [length - start, H], in the model's type, on the CPU; the longest
            sequences come first, so that what does not fit into memory fails at once.

        Raises:
            ConfigError: the model's logits are not its head times these states.
        """
        for batch in similar_lengths([len(ids) for ids in sequences], TOKENS_PER_BATCH):
            width = max(len(sequences[index]) for index in batch)
            rows = [[*sequences[index], *[self.eos_id] * (width - len(sequences[index]))] for index in batch]
            input_ids = torch.tensor(rows, device=self.model.device)
            hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            for row, index in enumerate(batch):
                states = hidden[row, starts[index] : len(sequences[index])]
                if not self._head_checked:
                    self._check_head(input_ids[row : row + 1, : len(sequences[index])], starts[index], states)
                    self._head_checked = True
                yield index, states.to("cpu", copy=True)

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
