"""What a vocabulary map covers: by match kind, by script and, given sample text, by how often tokens occur."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from cmc_server.vocab.pm_mined import MatchKind
from cmc_server.vocab.scripts import script_of
from cmc_server.vocab.surface import Vocabulary
from cmc_server.vocab.vocab_map import VocabularyMap

KIND_NAMES = tuple(kind.name.lower() for kind in MatchKind)
#: Ranks at which the bands of a sample's tokens end, most frequent first; the last band is open.
_BAND_ENDS = (100, 1_000, 10_000)
_NUM_EXAMPLES = 10


def map_statistics(
    vocabulary_map: VocabularyMap, user: Vocabulary, delta: Vocabulary, sample_ids: Iterable[int] | None = None
) -> dict[str, Any]:
    """Statistics of a map as plain JSON values.

    Args:
        vocabulary_map: the map from ``user`` to ``delta``.
        user: the user vocabulary.
        delta: the delta vocabulary.
        sample_ids: user token ids of a sample text.

    Returns:
        ``user_tokens``, ``delta_tokens``, ``ordinary``, ``coverage``, ``identity``, ``match`` (tokens by kind),
        ``scripts`` (the same by script of the ordinary tokens, largest first), ``special`` (delta content, or None,
        of every user special token that is mapped or has a role) and, given a sample, ``sample``.
    """
    kinds = [KIND_NAMES[kind] for kind in vocabulary_map.match.tolist()]
    statistics = {
        "user_tokens": user.size,
        "delta_tokens": delta.size,
        "ordinary": vocabulary_map.counts["ordinary"],
        "coverage": vocabulary_map.coverage,
        "identity": vocabulary_map.is_identity,
        "match": {name: vocabulary_map.counts[name] for name in KIND_NAMES},
        "scripts": _by_script(kinds, user),
        "special": _special(vocabulary_map, user, delta),
    }
    if sample_ids is not None:
        statistics["sample"] = _by_frequency(Counter(sample_ids), kinds, user)
    return statistics


def _by_script(kinds: list[str], user: Vocabulary) -> dict[str, dict[str, float]]:
    counters: dict[str, Counter[str]] = {}
    for kind, surface in zip(kinds, user.surfaces, strict=True):
        if surface is not None:
            counters.setdefault(script_of(surface), Counter())[kind] += 1
    ordered = sorted(counters.items(), key=lambda item: (-item[1].total(), item[0]))
    return {script: {"tokens": counter.total(), **_shares(counter)} for script, counter in ordered}


def _special(vocabulary_map: VocabularyMap, user: Vocabulary, delta: Vocabulary) -> dict[str, str | None]:
    roles = {user.bos_id, *user.eos_ids, user.unk_id, user.pad_id} - {None}
    pairs: dict[str, str | None] = {}
    for token, kind in enumerate(vocabulary_map.match):
        content = user.contents[token]
        if content is not None and (kind == MatchKind.SPECIAL or token in roles):
            delta_token = int(vocabulary_map.delta_ids[token])
            pairs[content] = None if delta_token < 0 else delta.contents[delta_token]
    return pairs


def _by_frequency(occurrences: Counter[int], kinds: list[str], user: Vocabulary) -> dict[str, Any]:
    ranked = [token for token, _ in occurrences.most_common()]
    starts = [0, *(end for end in _BAND_ENDS if end < len(ranked))]
    ends = [*starts[1:], len(ranked)]
    bands = [
        {"ranks": [start + 1, end], **_summary(occurrences, ranked[start:end], kinds)}
        for start, end in zip(starts, ends, strict=True)
        if end > start
    ]

    def most_frequent(*wanted: str) -> dict[str, int]:
        tokens = [token for token in ranked if kinds[token] in wanted][:_NUM_EXAMPLES]
        return {user.contents[token] or str(token): occurrences[token] for token in tokens}

    return {
        **_summary(occurrences, ranked, kinds),
        "bands": bands,
        "most_frequent_unmapped": most_frequent("none"),
        "most_frequent_inexact": most_frequent("prefix", "extension"),
    }


def _summary(occurrences: Mapping[int, int], tokens: list[int], kinds: list[str]) -> dict[str, float]:
    counter: Counter[str] = Counter()
    for token in tokens:
        counter[kinds[token]] += occurrences[token]
    return {"tokens": len(tokens), "occurrences": counter.total(), **_shares(counter)}


def _shares(counter: Counter[str]) -> dict[str, float]:
    """Counts by match kind and the mapped share."""
    total = counter.total()
    return {"coverage": 1 - counter["none"] / total if total else 0.0, **{name: counter[name] for name in KIND_NAMES}}
