"""Prompts and continuations in the user LLM's tokens: texts, token ids and chats."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from cmc_server.delta.continuation import read_continuation
from cmc_server.delta.prompt import Message, plain_messages
from cmc_server.errors import ConfigError
from cmc_server.vocab.surface import Vocabulary


@dataclass(frozen=True)
class Chat:
    """A chat that may end in the beginning of the answer.

    Args:
        messages: the turns.
        continue_final_message: the last turn is the answer's beginning, and what follows goes on in it.
    """

    messages: Sequence[Message]
    continue_final_message: bool = False


#: A text, user token ids, or a chat.
Prompt = str | Sequence[int] | Sequence[Message] | Chat


class UserEncoder:
    """Encodes for one user LLM.

    Args:
        tokenizer: its fast tokenizer.
        vocabulary: the vocabulary of that tokenizer.
        num_ids: how many ids the model has embeddings for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, num_ids: int) -> None:
        self._tokenizer = tokenizer
        self._num_ids = num_ids
        self._continuation = read_continuation(tokenizer, vocabulary).tokenizer
        self._special = {str(vocabulary.contents[token]): token for token in vocabulary.special_ids}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None

    def prompt(self, prompt: Prompt) -> list[int]:
        """User token ids of a prompt, at least one.

        A text is encoded as the tokenizer does by default, but never with two bos; a chat is rendered with the
        tokenizer's chat template, up to the answer.

        Raises:
            ConfigError: the prompt is empty, has an id that the model does not know, or is a chat that the
                tokenizer's template cannot render.
        """
        chat = as_chat(prompt)
        if chat is not None:
            ids = self._chat(chat)
        elif isinstance(prompt, str):
            ids = self._text(prompt)
        else:
            ids = self._known(cast(Sequence[int], prompt))
        if not ids:
            raise ConfigError("The prompt has no tokens; give at least one, such as the tokenizer's bos.")
        return ids

    def continuation(self, continuation: str | Sequence[int]) -> list[int]:
        """User token ids of what follows a prompt.

        A text gets no bos, no eos and no leading space; special tokens that are written in it are themselves.

        Raises:
            ConfigError: an id is none that the model knows.
        """
        if not isinstance(continuation, str):
            return self._known(continuation)
        ids: list[int] = []
        for part in self._split.split(continuation) if self._split else [continuation]:
            special = self._special.get(part)
            ids += self._continuation.encode(part, add_special_tokens=False).ids if special is None else [special]
        return ids

    def _text(self, text: str) -> list[int]:
        bos = self._tokenizer.bos_token
        has_bos = bos is not None and text.startswith(bos)
        ids: list[int] = self._tokenizer(text, add_special_tokens=not has_bos)["input_ids"]
        return ids

    def render(self, chat: Chat) -> str:
        """A chat in the tokenizer's chat template, up to the answer or the end of its beginning.

        Raises:
            ConfigError: there is no template, or it cannot render the chat.
        """
        if self._tokenizer.chat_template is None:
            raise ConfigError("The user LLM's tokenizer has no chat template; give the prompt as text or token ids.")
        messages = [dict(message) for message in plain_messages(chat.messages)]
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=not chat.continue_final_message,
                continue_final_message=chat.continue_final_message,
            )
        except Exception as error:  # templates raise whatever they like
            raise ConfigError(f"The user LLM's chat template cannot render this chat: {error}.") from None
        return text

    def _chat(self, chat: Chat) -> list[int]:
        ids: list[int] = self._tokenizer(self.render(chat), add_special_tokens=False)["input_ids"]
        return ids

    def _known(self, ids: Sequence[Any]) -> list[int]:
        try:
            given = [index(token) for token in ids]
        except TypeError:
            raise ConfigError("Token ids are whole numbers; give these, or a text.") from None
        wrong = next((token for token in given if not 0 <= token < self._num_ids), None)
        if wrong is not None:
            raise ConfigError(f"Token id {wrong} does not exist; the user LLM has the ids 0 to {self._num_ids - 1}.")
        return given


def as_chat(prompt: Prompt) -> Chat | None:
    """The chat that a prompt is, if it is one; an empty list is a prompt of no tokens."""
    if isinstance(prompt, Chat):
        return prompt
    if not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping):
        return Chat(cast(Sequence[Message], prompt))
    return None
