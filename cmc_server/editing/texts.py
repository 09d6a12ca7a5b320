"""Data that an edit is measured or calibrated on: prompts with responses, or plain texts, from JSON lines."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cmc_server.errors import ConfigError
from cmc_server.vocab.surface import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Text:
    """One record.

    Args:
        prompt: what is given, read as it is, without any chat template; empty for a plain text.
        answer: what the loss is about; a plain text itself.
    """

    prompt: str
    answer: str


@dataclass(frozen=True)
class Example:
    """A text in tokens.

    Args:
        ids: [1, length] int64.
        first_label: position of the first token that counts, at least 1.
    """

    ids: Tensor
    first_label: int

    @property
    def num_labels(self) -> int:
        """How many tokens count."""
        return self.ids.shape[1] - self.first_label


def read_texts(path: Path) -> list[Text]:
    """Read a file with one ``{"prompt": ..., "response": ...}`` or ``{"text": ...}`` a line.

    Raises:
        ConfigError: it cannot be read, holds no record, or a broken one, which the message names by its line.
    """
    try:
        # Not splitlines(), which also splits at separators that JSON strings may hold.
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # some editors put a byte-order mark first
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The data file {path} cannot be read: {error}.") from None
    texts = [_text(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not texts:
        raise ConfigError(f"The data file {path} is empty.")
    return texts


def _text(line: str, place: str) -> Text:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if isinstance(record, Mapping):
        fields: list[Any] = [record.get("prompt", ""), record.get("response", record.get("text"))]
        if all(isinstance(field, str) for field in fields) and fields[1].strip():
            return Text(*fields)
    raise ConfigError(f'{place}: expected {{"prompt": ..., "response": ...}} or {{"text": ...}}.')


def encode_all(folder: Path, texts: Iterable[Text], max_length: int | None) -> list[Example]:
    """Tokens of texts, by the tokenizer of a model's folder; see :func:`encode`.

    Raises:
        ConfigError: no token of a text is left to predict.
        MapError: the folder has no usable tokenizer.
    """
    tokenizer = load_tokenizer(str(folder))
    return [encode(tokenizer, text, max_length) for text in texts]


def encode(tokenizer: PreTrainedTokenizerBase, text: Text, max_length: int | None) -> Example:
    """Tokens of a text: the tokenizer's usual beginning, prompt, answer and, after an answer to a prompt, eos.

    Args:
        tokenizer: of the model that reads it.
        text: what to encode.
        max_length: tokens behind it are cut off.

    Raises:
        ConfigError: no token is left to predict.
    """
    ids = list(tokenizer(text.prompt).input_ids) if text.prompt else _beginning(tokenizer)
    if ids and ids[-1] == tokenizer.eos_token_id and ids[-1] != tokenizer.bos_token_id:
        ids.pop()
    first = max(1, len(ids))
    ids += tokenizer(text.answer, add_special_tokens=False).input_ids
    if text.prompt and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    ids = ids[:max_length]
    if len(ids) <= first:
        shown = json.dumps(text.answer[:40], ensure_ascii=False)
        raise ConfigError(f"The text {shown} has no token that the model could predict; leave it out.")
    return Example(torch.tensor([ids]), first)


def packed_sequences(examples: Sequence[Example], length: int, num_sequences: int, seed: int) -> list[Tensor]:
    """Texts joined and cut into sequences of one length, as calibration data for pruning are.

    Args:
        examples: whole texts in tokens, in order.
        length: tokens of a sequence; what is left over at the end is not used.
        num_sequences: so many at most; of more, a sample is drawn.
        seed: of the sample.

    Returns:
        [1, length] int64 each; one sequence of all tokens where there are fewer than ``length``.
    """
    ids = torch.cat([example.ids for example in examples], dim=1)
    length = min(length, ids.shape[1])
    sequences = [ids[:, first : first + length] for first in range(0, ids.shape[1] - length + 1, length)]
    if len(sequences) <= num_sequences:
        return sequences
    draw = random.Random(seed)  # noqa: S311 - nothing secret
    return [sequences[index] for index in sorted(draw.sample(range(len(sequences)), num_sequences))]


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [token for token in tokenizer("").input_ids if token != tokenizer.eos_token_id]
