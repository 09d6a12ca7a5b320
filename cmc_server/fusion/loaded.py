"""A delta made ready for one user LLM: weights, map, speller and prompt encoder together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from cmc_server.config import DeltaSource, EngineSettings
from cmc_server.delta.mapping import map_delta
from cmc_server.delta.prompt import PromptEncoder
from cmc_server.delta.runner import DeltaRunner
from cmc_server.delta.spelling import Speller
from cmc_server.delta.store import DeltaArtifact, open_delta, vocabulary_version
from cmc_server.errors import MapError
from cmc_server.vocab.surface import Vocabulary, read_generation_config, read_vocabulary
from cmc_server.vocab.vocab_map import VocabularyMap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Words:
    """What depends on two vocabularies and on nothing else of a delta.

    Args:
        tokenizer: the delta's.
        vocab_map: user tokens to delta tokens.
        speller: user tokens in delta tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    vocab_map: VocabularyMap
    speller: Speller


@dataclass(frozen=True, eq=False)
class LoadedDelta:
    """Everything that the controller needs of one delta. Equal only to itself, so that it can be a key.

    Args:
        artifact: the checked folder.
        runner: its forward pass and cache.
        words: what it shares with other deltas of its vocabulary.
        encoder: its prompt rendering.
        delta_ids: the map as int64 on the runner's device; None is the identity.
    """

    artifact: DeltaArtifact
    runner: DeltaRunner
    words: Words
    encoder: PromptEncoder
    delta_ids: Tensor | None

    @property
    def name(self) -> str:
        """The name it is served under."""
        return self.artifact.name

    @property
    def speller(self) -> Speller:
        """User tokens in its own tokens."""
        return self.words.speller

    @cached_property
    def reads_user_ids(self) -> bool:
        """Whether every token of the user LLM is the same token of the delta, so that nothing is ever spelled."""
        return self.vocab_map.is_identity and all(self.speller.follows)

    @property
    def vocab_map(self) -> VocabularyMap:
        """User tokens to delta tokens."""
        return self.words.vocab_map

    def prompt_ids(self, user_prompt: Sequence[int]) -> list[int]:
        """The delta's prompt where the caller rendered none: bos as the delta wants it, then the prompt spelled."""
        return [*self.encoder.bos_ids, *self.speller.spell_prompt(user_prompt)]


class DeltaLoader:
    """Makes deltas ready for one user LLM.

    What deltas of one vocabulary have in common is made once, and kept while one of them lives.

    Args:
        user: the user LLM's vocabulary.
        settings: the server's settings.
        max_seqs: rows that each delta may run at once.
        device: where deltas run.
    """

    def __init__(self, user: Vocabulary, settings: EngineSettings, *, max_seqs: int, device: torch.device) -> None:
        self._user = user
        self._settings = settings
        self._max_seqs = max_seqs
        self._device = device
        self._words: WeakValueDictionary[str, Words] = WeakValueDictionary()
        self._kept: list[Words] = []

    def load(self, artifact: DeltaArtifact) -> LoadedDelta:
        """Map and load a delta.

        Raises:
            DeltaError: the artifact cannot be used, or its map covers too little of the user vocabulary.
            MapError: the map cannot be built, or does not fit the delta.
        """
        words = self._words_of(artifact)
        settings = self._settings
        runner = DeltaRunner(
            artifact,
            max_seqs=self._max_seqs,
            device=self._device,
            dtype=delta_dtype(settings, self._device),
            fast_paths=settings.fast_paths,
        )
        return LoadedDelta(
            artifact=artifact,
            runner=runner,
            words=words,
            encoder=PromptEncoder(words.tokenizer, artifact.manifest),
            delta_ids=map_tensor(words.vocab_map, runner.vocab_size, self._device),
        )

    def keep_words(self, artifact: DeltaArtifact) -> None:
        """Make what deltas of its vocabulary have in common, and keep it: reading it later would halt a step.

        Raises:
            DeltaError: its tokenizer cannot be used, or its map covers too little of the user vocabulary.
            MapError: the map cannot be built.
        """
        self._kept.append(self._words_of(artifact))

    def _words_of(self, artifact: DeltaArtifact) -> Words:
        # The size of the logits is checked against the tokenizer when that is loaded, so it belongs to the key.
        key = f"{vocabulary_version(artifact.path)} {artifact.vocab_size}"
        words = self._words.get(key)
        if words is None:
            tokenizer = artifact.tokenizer()
            delta = read_vocabulary(tokenizer, read_generation_config(str(artifact.path)))
            vocab_map = map_delta(artifact.name, delta, self._user, self._settings)
            words = Words(tokenizer, vocab_map, Speller(self._user, delta, vocab_map, tokenizer))
            self._words[key] = words
        return words


def load_delta(
    source: DeltaSource, user: Vocabulary, settings: EngineSettings, *, max_seqs: int, device: torch.device
) -> LoadedDelta:
    """Check one delta and make it ready, see :class:`DeltaLoader`."""
    return DeltaLoader(user, settings, max_seqs=max_seqs, device=device).load(open_delta(source))


def map_tensor(vocab_map: VocabularyMap, num_delta_logits: int, device: torch.device) -> Tensor | None:
    """The map as the rule takes it: int64, or None for the identity over every delta logit.

    A delta whose logits are padded beyond its vocabulary keeps the explicit map, which leaves the padding out.

    Raises:
        MapError: the map names logits that the delta does not have; a GPU would read what lies behind them.
    """
    highest = int(vocab_map.delta_ids.max(initial=-1))
    if highest >= num_delta_logits:
        raise MapError(f"The vocabulary map names the delta's token {highest}, but it has {num_delta_logits} logits.")
    if vocab_map.is_identity and len(vocab_map.delta_ids) == num_delta_logits:
        return None
    return torch.tensor(vocab_map.delta_ids, device=device, dtype=torch.int64)


def delta_dtype(settings: EngineSettings, device: torch.device) -> torch.dtype:
    """The computing type: as set, else float32 on a CPU and bfloat16 elsewhere."""
    if settings.delta_dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.delta_dtype]
    return torch.float32 if device.type == "cpu" else torch.bfloat16
