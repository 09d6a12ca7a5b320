"""What is checked before vLLM starts, so that a mistake costs seconds and one sentence."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmc_server.api.words import DeltaWords, delta_words, user_vocabulary
from cmc_server.config import EngineSettings
from cmc_server.delta.capacity import VALUE_BYTES, plan_seqs
from cmc_server.delta.mapping import map_delta
from cmc_server.delta.store import DeltaArtifact, open_delta
from cmc_server.errors import ConfigError
from cmc_server.vocab.reserved import pick_reserved_token
from cmc_server.vocab.surface import Vocabulary, load_tokenizer


@dataclass(frozen=True)
class UserModel:
    """The user LLM as far as deltas are concerned.

    Args:
        tokenizer: folder or hub id of its tokenizer.
        num_logits: columns of its logits.
        chat_template: a template, or the path of one, that replaces the tokenizer's own.
        max_num_seqs: rows that the engine runs at once, where the user said so.
        on_cpu: whether the deltas run in float32 unless told otherwise, as they do on a CPU.
    """

    tokenizer: str
    num_logits: int
    chat_template: str | None = None
    max_num_seqs: int | None = None
    on_cpu: bool = True


@dataclass(frozen=True)
class Checked:
    """The outcome.

    Args:
        settings: complete for the workers.
        lines: one for each delta, for people.
        held: what has been read and the server needs again, in this process; to be kept until it has started.
    """

    settings: EngineSettings
    lines: list[str]
    held: Sequence[Vocabulary | DeltaWords]


def check_names(settings: EngineSettings, served: Collection[str]) -> None:
    """A delta may not be called like a model.

    Raises:
        ConfigError: one is.
    """
    for source in settings.deltas:
        if source.name in served:
            raise ConfigError(f"The delta name {source.name!r} is also the name of a served model; rename one of them.")


def check_deltas(settings: EngineSettings, model: UserModel) -> Checked:
    """Open every delta, map it to the user LLM's vocabulary and choose the reserved token.

    Raises:
        DeltaError: a delta cannot be used, or knows too little of the vocabulary.
        MapError: the user LLM's tokenizer or the overrides cannot be used.
        ConfigError: a delta's own strength lies outside the bounds.
        CapacityError: the deltas do not fit into their memory.
    """
    tokenizer = load_tokenizer(model.tokenizer)
    user = user_vocabulary(model.tokenizer, tokenizer)
    artifacts = [open_delta(source) for source in settings.deltas]
    _check_memory(settings, artifacts, model)
    _check_required(settings, artifacts)
    words = [delta_words(artifact) for artifact in artifacts]
    lines = [check_delta(artifact, settings, user) for artifact in artifacts]
    reserved = pick_reserved_token(user, model.num_logits, _template_tokens(user, tokenizer, model.chat_template))
    held: list[Vocabulary | DeltaWords] = [*words, *([user] if settings.live else [])]
    return Checked(settings.model_copy(update={"reserved_token_id": reserved}), lines, held)


def _check_required(settings: EngineSettings, artifacts: Sequence[DeltaArtifact]) -> None:
    strengths = {artifact.name: artifact.strength for artifact in artifacts}
    for dose in settings.required_deltas:
        if dose.strength is None and strengths[dose.name] == 0:
            raise ConfigError(f"The required delta {dose.name!r} has the strength 0; write {dose.name}@STRENGTH.")


def _check_memory(settings: EngineSettings, artifacts: Sequence[DeltaArtifact], model: UserModel) -> None:
    """Refuse now what the workers would refuse later; without a number of rows, at least one must fit."""
    value_bytes = VALUE_BYTES[settings.delta_dtype] or (4 if model.on_cpu else 2)
    max_num_seqs = model.max_num_seqs or settings.max_delta_seqs or 1
    plan_seqs(settings, artifacts, max_num_seqs, value_bytes, model.on_cpu)


def check_delta(artifact: DeltaArtifact, settings: EngineSettings, user: Vocabulary) -> str:
    """Map a delta to the user LLM's vocabulary, and check its strength; a line about it for people.

    Raises:
        DeltaError: its tokenizer cannot be used, or it knows too little of the vocabulary.
        MapError: the map cannot be built.
        ConfigError: its own strength lies outside the bounds.
    """
    low, high = settings.strength_bounds
    if not low <= artifact.strength <= high:
        raise ConfigError(
            f"The delta {artifact.name!r} has the strength {artifact.strength:g}, outside {low:g} to {high:g}; "
            f"give another with --delta {artifact.name}=PATH@STRENGTH or widen --strength-bounds."
        )
    # The map is left in the cache for the workers.
    coverage = map_delta(artifact.name, delta_words(artifact).vocabulary, user, settings).coverage
    return (
        f"delta {artifact.name}: version {artifact.version}, coverage {coverage:.1%}, strength {artifact.strength:g}, "
        f"from {artifact.path}"
    )


def _template_tokens(user: Vocabulary, tokenizer: Any, override: str | None) -> set[int]:
    """Special tokens that the chat template writes; an answer may contain them."""
    text = "".join(_template_texts(tokenizer.chat_template, override))
    return {token for token in user.special_ids if (content := user.contents[token]) and content in text}


def _template_texts(own: Any, override: str | None) -> Sequence[str]:
    if override is None:
        return list(own.values()) if isinstance(own, dict) else [own or ""]
    path = Path(override)
    try:
        return [path.read_text(encoding="utf-8") if path.is_file() else override]
    except (OSError, ValueError):  # a template given in full may be too long for a path
        return [override]
