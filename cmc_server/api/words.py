"""Vocabularies in this process: the user LLM's, and tokenizers of the deltas, one for all of the same vocabulary."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Final
from weakref import WeakValueDictionary

from cmc_server.delta.store import DeltaArtifact, vocabulary_version
from cmc_server.vocab.surface import Vocabulary, load_tokenizer, read_generation_config, read_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class DeltaWords:
    """What deltas with the same tokenizer files have in common.

    Args:
        path: folder of the first of them.
        tokenizer: theirs.
        lock: to hold while it encodes, which a fast tokenizer may not do in two threads at once.
    """

    path: str
    tokenizer: PreTrainedTokenizerBase
    lock: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Theirs."""
        return read_vocabulary(self.tokenizer, read_generation_config(self.path))


_held: Final[WeakValueDictionary[tuple[str, int], DeltaWords]] = WeakValueDictionary()
_user: Final[WeakValueDictionary[str, Vocabulary]] = WeakValueDictionary()
_turn: Final = threading.Lock()


def delta_words(artifact: DeltaArtifact) -> DeltaWords:
    """A delta's words; those of a delta that is served already, if it has the same.

    Raises:
        DeltaError: its tokenizer cannot be used.
    """
    key = vocabulary_version(artifact.path), artifact.vocab_size
    with _turn:
        words = _held.get(key)
        if words is None:
            words = _held[key] = DeltaWords(str(artifact.path), artifact.tokenizer())
        return words


def user_vocabulary(path: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Vocabulary:
    """The user LLM's vocabulary; the one that this process holds, if it does: a large one takes seconds to read.

    Args:
        path: folder or hub id of its tokenizer.
        tokenizer: the same, where it has been loaded.

    Raises:
        MapError: it cannot be used.
    """
    with _turn:
        vocabulary = _user.get(path)
        if vocabulary is None:
            vocabulary = read_vocabulary(tokenizer or load_tokenizer(path), read_generation_config(path))
            _user[path] = vocabulary
        return vocabulary
