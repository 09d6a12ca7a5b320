"""Chats from JSONL files, encoded twice: as the template LLM reads them and as the delta will read them when served."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cmc_server.delta.prompt import Message, PromptEncoder, plain_messages
from cmc_server.errors import ConfigError
from cmc_server.training.template import FrozenTemplate

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """One chat whose last message is to be learned; n response tokens, the eos among them.

    Args:
        delta_ids: prompt as the delta reads it, and the response.
        labels: the n response tokens.
        hidden: [n, H] the template's last hidden states, each before the label it predicts.
    """

    delta_ids: list[int]
    labels: list[int]
    hidden: Tensor


def read_chats(path: Path) -> list[list[Message]]:
    """Chats of a file with one ``{"messages": [{"role", "content"}, ...]}`` a line.

    Raises:
        ConfigError: the file is missing or empty, or a record is broken; the message names its line.
    """
    try:
        # Not splitlines(), which also splits at separators that JSON strings may hold.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The data file {path} cannot be read: {error}.") from None
    chats = [_read_chat(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not chats:
        raise ConfigError(f"The data file {path} holds no chats.")
    return chats


def _read_chat(path: Path, number: int, line: str) -> list[Message]:
    try:
        messages = json.loads(line)["messages"]
        known = all(message["role"] in _ROLES and isinstance(message["content"], str) for message in messages)
    except (ValueError, KeyError, TypeError):
        known, messages = False, []
    if not known:
        raise ConfigError(
            f'{path}, line {number}: expected {{"messages": [{{"role": ..., "content": ...}}, ...]}} with the roles '
            f"{', '.join(_ROLES)}."
        )
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise ConfigError(f"{path}, line {number}: the last message must be the assistant's answer to learn.")
    return plain_messages(messages)


def file_hash(path: Path) -> str:
    """SHA-256 of a data file, for the provenance."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def encode_chats(
    chats: Sequence[Sequence[Message]], template: FrozenTemplate, encoder: PromptEncoder, max_length: int
) -> list[Example]:
    """Encode chats for both readers and compute the template's hidden states.

    Template and delta share a vocabulary, so the response tokens are the same for both.

    Args:
        chats: as :func:`read_chats` returns them.
        template: the frozen template LLM.
        encoder: the delta's own prompt encoder, the one that serves it.
        max_length: chats in which the delta would read more tokens are left out.

    Raises:
        ConfigError: no chat is short enough.
    """
    prompts, responses = [], []
    for chat in chats:
        response = template.encode_response(chat[-1]["content"])
        delta_prompt = encoder.encode_messages(chat[:-1])
        if len(delta_prompt) + len(response) <= max_length:
            prompts.append((template.encode_prompt(chat[:-1]), delta_prompt))
            responses.append(response)
    if not responses:
        raise ConfigError(f"No chat fits into data.max_length = {max_length} tokens; raise it.")
    if len(responses) < len(chats):
        message = f"{len(chats) - len(responses)} of {len(chats)} chats are longer than data.max_length and left out."
        warnings.warn(message, stacklevel=2)
    sequences = [[*prompt, *response[:-1]] for (prompt, _), response in zip(prompts, responses, strict=True)]
    hidden = template.hidden_states(sequences, [len(prompt) - 1 for prompt, _ in prompts])
    return [
        Example([*delta_prompt, *response], response, states)
        for (_, delta_prompt), response, states in zip(prompts, responses, hidden, strict=True)
    ]


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Examples side by side: B rows, L columns, N response tokens in all.

    Returns:
        ``input_ids`` and ``attention_mask`` [B, L], padded on the right; ``positions`` [N] into the flattened [B * L],
        each before the label that it predicts; ``labels`` [N]; ``hidden`` [N, H]. All int64 but the last.
    """
    width = max(len(example.delta_ids) for example in examples) - 1
    input_ids = torch.zeros(len(examples), width, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    positions = []
    for row, example in enumerate(examples):
        # The last token is only ever a label.
        length = len(example.delta_ids) - 1
        input_ids[row, :length] = torch.tensor(example.delta_ids[:-1])
        attention_mask[row, :length] = 1
        first = row * width + length - len(example.labels)
        positions.append(torch.arange(first, first + len(example.labels)))
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "positions": torch.cat(positions),
        "labels": torch.tensor([label for example in examples for label in example.labels]),
        "hidden": torch.cat([example.hidden for example in examples]),
    }
