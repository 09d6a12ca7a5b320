"""PM-MinED: prefix match with minimal edit distance (Cross-model Control, NeurIPS 2024).

Candidates of a token are the delta tokens of which one is a prefix of the other; the candidate at the least edit
distance wins, the lowest id in a tie. Between a string and its own prefix the edit distance is the difference of their
lengths, so only two candidates can win: the longest prefix and the shortest extension. A hash of the delta's surfaces
finds the first and their sorted list the second, so the cost is about linear, not all pairs.

Surfaces are compared as characters: UTF-8 with surrogateescape, under which every byte string has one spelling.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cpdist

#: A candidate: delta token and its surface.
Candidate = tuple[int, str]
Surfaces = Sequence[bytes | None]


class MatchKind(IntEnum):
    """How a user token found its delta token."""

    NONE = 0
    EXACT = 1
    PREFIX = 2
    EXTENSION = 3
    SPECIAL = 4


def characters(surface: bytes) -> str:
    """A surface as characters; bytes that are not valid UTF-8 become lone surrogates."""
    return surface.decode("utf-8", "surrogateescape")


def match_tokens(
    user: Surfaces, delta: Surfaces, user_bytes: Mapping[int, int], delta_bytes: Mapping[int, int]
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Map the ordinary tokens of a user vocabulary to those of a delta.

    A token with an empty surface pairs only with another such token: the empty string is a prefix of everything.

    Args:
        user: surfaces by user id; None for what is not to be matched.
        delta: surfaces by delta id; None likewise.
        user_bytes: byte value to the user's byte token.
        delta_bytes: byte value to the delta's byte token.

    Returns:
        delta ids, int32 [num_user_tokens], -1 for unmapped; match kinds, uint8 [num_user_tokens].
    """
    ids_by_surface = _ids_by_surface(delta, delta_bytes)
    delta_ids = [-1 if surface is None else ids_by_surface.get(surface, -1) for surface in user]
    for value, token in user_bytes.items():
        delta_ids[token] = delta_bytes.get(value, delta_ids[token])
    pending = [token for token, found in enumerate(delta_ids) if found < 0 and user[token]]
    ids = np.array(delta_ids, dtype=np.int32)
    match = np.where(ids < 0, MatchKind.NONE, MatchKind.EXACT).astype(np.uint8)
    if pending:
        strings = [characters(user[token] or b"") for token in pending]
        ids[pending], match[pending] = _nearest(strings, _Index(ids_by_surface))
    return ids, match


def _ids_by_surface(delta: Surfaces, delta_bytes: Mapping[int, int]) -> dict[bytes, int]:
    """The lowest id of every surface; byte tokens stand for their byte only where no other token does."""
    others = list(delta)
    for token in delta_bytes.values():
        others[token] = None
    ids = dict(zip(reversed(others), range(len(others) - 1, -1, -1), strict=True))
    for value, token in delta_bytes.items():
        ids.setdefault(bytes([value]), token)
    return {surface: token for surface, token in ids.items() if surface is not None}


class _Index:
    """Finds the two candidates that can win."""

    def __init__(self, ids_by_surface: Mapping[bytes, int]) -> None:
        self._ids = {characters(surface): token for surface, token in ids_by_surface.items() if surface}
        self._sorted = sorted(self._ids)
        self._longest = max(map(len, self._sorted), default=0)

    def longest_prefix(self, string: str) -> Candidate | None:
        """The longest delta surface that ``string`` begins with and is longer than."""
        ids = self._ids
        # The lone space begins half of all tokens and says nothing of them.
        shortest = 2 if string[0] == " " and string.strip(" ") else 1
        for length in range(min(len(string) - 1, self._longest), shortest - 1, -1):
            token = ids.get(string[:length])
            if token is not None:
                return token, string[:length]
        return None

    def shortest_extension(self, string: str) -> Candidate | None:
        """The shortest delta surface that begins with ``string`` and is longer, the lowest id among equals."""
        position = bisect_left(self._sorted, string)
        best: tuple[int, int, str] | None = None
        # All extensions follow each other. Over distinct strings the walks add up to no more than the delta's text.
        while position < len(self._sorted) and self._sorted[position].startswith(string):
            surface = self._sorted[position]
            key = (len(surface), self._ids[surface], surface)
            best = key if best is None else min(best, key)
            position += 1
        return None if best is None else best[1:]


def _nearest(strings: Sequence[str], index: _Index) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Delta ids and match kinds of strings that no delta surface equals."""
    ids = np.full(len(strings), -1, dtype=np.int32)
    match = np.full(len(strings), MatchKind.NONE, dtype=np.uint8)
    distances = np.full(len(strings), np.iinfo(np.int32).max, dtype=np.int32)
    for kind, find in ((MatchKind.PREFIX, index.longest_prefix), (MatchKind.EXTENSION, index.shortest_extension)):
        found = [(row, candidate) for row, string in enumerate(strings) if (candidate := find(string)) is not None]
        if not found:
            continue
        rows = np.array([row for row, _ in found])
        tokens = np.array([token for _, (token, _) in found], dtype=np.int32)
        found_distances = cpdist(
            [strings[row] for row in rows],
            [surface for _, (_, surface) in found],
            scorer=Levenshtein.distance,
            dtype=np.int32,
        )
        best, current = distances[rows], ids[rows]
        wins = (found_distances < best) | ((found_distances == best) & (tokens < current))
        distances[rows[wins]], ids[rows[wins]], match[rows[wins]] = found_distances[wins], tokens[wins], kind
    return ids, match
