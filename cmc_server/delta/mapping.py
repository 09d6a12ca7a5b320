"""The map from a user LLM's vocabulary to a delta's, as the settings want it."""

from __future__ import annotations

from pathlib import Path

from cmc_server.config import EngineSettings
from cmc_server.errors import DeltaError
from cmc_server.vocab.special import read_overrides
from cmc_server.vocab.surface import Vocabulary
from cmc_server.vocab.vocab_map import VocabularyMap, cached_map


def map_delta(name: str, delta: Vocabulary, user: Vocabulary, settings: EngineSettings) -> VocabularyMap:
    """Build the map, or take it from the cache.

    Args:
        name: of the delta, for messages.
        delta: its vocabulary.
        user: the user LLM's.
        settings: overrides, cache and the least coverage.

    Raises:
        DeltaError: the map covers too little.
        MapError: it cannot be built.
    """
    overrides = read_overrides(Path(settings.map_overrides)) if settings.map_overrides else None
    cache = Path(settings.cache_dir) if settings.cache_dir else None
    vocab_map = cached_map(user, delta, overrides, cache)
    if vocab_map.coverage < settings.min_coverage and not settings.force_coverage:
        raise DeltaError(
            f"The delta {name!r} knows only {vocab_map.coverage:.1%} of the user LLM's ordinary tokens, less than "
            f"{settings.min_coverage:.0%}; use one with a closer vocabulary, or --force-coverage."
        )
    return vocab_map
