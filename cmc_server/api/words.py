"""Tokenizers of the served deltas in this process: one for all deltas of the same vocabulary."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Final
from weakref import WeakValueDictionary

from cmc_server.delta.store import DeltaArtifact, vocabulary_version
from cmc_server.vocab.surface import Vocabulary, read_generation_config, read_vocabulary

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
