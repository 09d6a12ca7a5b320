"""PM-MinED by all pairs: slow and obvious, to check :mod:`cmc_server.vocab.pm_mined` against."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein

from cmc_server.vocab.pm_mined import MatchKind, Surfaces, characters


def match_tokens_by_all_pairs(
    user: Surfaces, delta: Surfaces, user_bytes: Mapping[int, int], delta_bytes: Mapping[int, int]
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """As :func:`cmc_server.vocab.pm_mined.match_tokens`, rule by rule, comparing every token with every other."""
    byte_of_user_token = {token: value for value, token in user_bytes.items()}
    delta_byte_tokens = set(delta_bytes.values())
    ordinary_surfaces = {s for token, s in enumerate(delta) if token not in delta_byte_tokens}
    candidates = [
        (token, characters(surface))
        for token, surface in enumerate(delta)
        if surface is not None and (token not in delta_byte_tokens or surface not in ordinary_surfaces)
    ]
    ids = np.full(len(user), -1, dtype=np.int32)
    match = np.full(len(user), MatchKind.NONE, dtype=np.uint8)
    for token, surface in enumerate(user):
        value = byte_of_user_token.get(token)
        if surface is None:
            continue
        if value is not None and value in delta_bytes:
            ids[token], match[token] = delta_bytes[value], MatchKind.EXACT
        else:
            ids[token], match[token] = _best(characters(surface), candidates)
    return ids, match


def _best(string: str, candidates: list[tuple[int, str]]) -> tuple[int, MatchKind]:
    best = (-1, MatchKind.NONE)
    best_key: tuple[int, int] | None = None
    for token, surface in candidates:
        if surface == string:
            kind = MatchKind.EXACT
        elif not surface or not string:
            continue
        elif string.startswith(surface) and (surface != " " or set(string) == {" "}):
            kind = MatchKind.PREFIX
        elif surface.startswith(string):
            kind = MatchKind.EXTENSION
        else:
            continue
        key = (Levenshtein.distance(string, surface), token)
        if best_key is None or key < best_key:
            best_key, best = key, (token, kind)
    return best
