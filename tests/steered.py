"""A tiny user LLM and tiny deltas of other vocabularies, for tests of everything that applies the rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_models import make_delta
from transformers import PreTrainedTokenizerBase

from cmc_server.config import FAST_PATHS, DeltaSource, EngineSettings, FastPath
from cmc_server.delta.manifest import DeltaManifest
from cmc_server.fusion.loaded import load_delta
from cmc_server.vocab.surface import Vocabulary, load_vocabulary

CPU = torch.device("cpu")
SETTINGS = EngineSettings(force_coverage=True)


@dataclass(frozen=True)
class Steered:
    """Folders of a user LLM and of deltas by name."""

    user: Path
    deltas: Mapping[str, Path]

    @property
    def vocabulary(self) -> Vocabulary:
        return load_vocabulary(str(self.user))

    def load(  # type: ignore[no-untyped-def]
        self, name: str, max_seqs: int = 8, fast_paths: frozenset[FastPath] = FAST_PATHS, device: torch.device = CPU
    ):
        source = DeltaSource(name=name, path=str(self.deltas[name]))
        settings = SETTINGS.model_copy(update={"fast_paths": fast_paths})
        return load_delta(source, self.vocabulary, settings, max_seqs=max_seqs, device=device)


def make_steered(folder: Path, tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> Steered:
    """A user LLM with a byte-level vocabulary; ``same`` shares it, ``other`` and ``words`` have their own."""
    families = {"user": "byte_level_bpe", "same": "byte_level_bpe", "other": "sentencepiece_bpe", "words": "wordpiece"}
    made = {}
    for seed, (name, family) in enumerate(families.items()):
        tokenizers[family].save_pretrained(folder / f"{name}-tokenizer")
        manifest = DeltaManifest(context_length=48) if name == "other" else None
        made[name] = make_delta(folder / name, folder / f"{name}-tokenizer", seed=seed, manifest=manifest)
    return Steered(made.pop("user"), made)
