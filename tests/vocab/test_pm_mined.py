from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmc_server.vocab.pm_mined import MatchKind, Surfaces, match_tokens
from cmc_server.vocab.reference import match_tokens_by_all_pairs
from cmc_server.vocab.surface import Vocabulary, read_vocabulary

NONE, EXACT, PREFIX, EXTENSION = MatchKind.NONE, MatchKind.EXACT, MatchKind.PREFIX, MatchKind.EXTENSION


def one(token: str | bytes, *delta: str | bytes, delta_bytes: dict[int, int] | None = None) -> tuple[int, MatchKind]:
    """The match of a single user token."""
    surfaces = [surface.encode() if isinstance(surface, str) else surface for surface in (token, *delta)]
    ids, match = match_tokens(surfaces[:1], surfaces[1:], {}, delta_bytes or {})
    return int(ids[0]), MatchKind(match[0])


@pytest.mark.parametrize(
    ("token", "delta", "expected"),
    [
        ("cat", ["dog", "cat"], (1, EXACT)),
        ("cat", ["cat", "cat"], (0, EXACT)),
        ("cats", ["c", "cat", "ca"], (1, PREFIX)),
        ("ca", ["cattle", "cat"], (1, EXTENSION)),
        ("ca", ["cat", "car"], (0, EXTENSION)),
        ("cat", ["cats", "ca"], (0, EXTENSION)),
        ("cat", ["ca", "cats"], (0, PREFIX)),
        ("cat", ["c", "cats"], (1, EXTENSION)),
        ("cat", ["at", "act", "dog"], (-1, NONE)),
        (" WARRAN", [" W", " "], (0, PREFIX)),
        (" cat", [" "], (-1, NONE)),
        ("  cat", [" ", "  "], (1, PREFIX)),
        ("   ", [" "], (0, PREFIX)),
        (" ", ["  "], (0, EXTENSION)),
        ("", ["a"], (-1, NONE)),
        ("", ["", ""], (0, EXACT)),
        ("cat", [""], (-1, NONE)),
        # Distances count characters, not bytes: é is one, so the longer prefix in characters wins.
        ("éab", ["é", "éabcd"], (0, PREFIX)),
    ],
)
def test_each_rule(token: str, delta: list[str], expected: tuple[int, MatchKind]) -> None:
    assert one(token, *delta) == expected


def test_parts_of_characters() -> None:
    # Surrogateescape: half of a character is no prefix of the whole one, but it is of a longer half.
    assert one("你".encode(), b"\xe4", b"\xe4\xbd") == (-1, NONE)
    assert one(b"\xe4\xbd", b"\xe4") == (0, PREFIX)
    assert one(b"\xe4", b"\xe4\xbd") == (0, EXTENSION)
    assert one("你".encode() + b"\xe5", "你") == (0, PREFIX)


def test_byte_tokens_pair_with_byte_tokens() -> None:
    # The user's byte token goes to the delta's, although an ordinary token has that surface as well.
    ids, match = match_tokens([b"A", b"A"], [b"A", b"A"], {65: 1}, {65: 1})
    assert ids.tolist() == [0, 1]
    assert match.tolist() == [EXACT, EXACT]
    # Without byte tokens in the delta the surface decides.
    ids, match = match_tokens([b"\xe4"], [b"B", b"\xe4"], {0xE4: 0}, {})
    assert (ids.tolist(), match.tolist()) == ([1], [EXACT])


def test_a_byte_token_stands_for_its_byte_only_where_no_other_does() -> None:
    assert one("A", "A", "A", delta_bytes={65: 0}) == (1, EXACT)
    assert one("A", "A", "B", delta_bytes={65: 0}) == (0, EXACT)
    assert one("\nfoo", "\n", "foo", delta_bytes={10: 0}) == (0, PREFIX)
    assert one("\nfoo", "\n", "\n", delta_bytes={10: 0}) == (1, PREFIX)


def test_shapes_and_empty_vocabularies() -> None:
    ids, match = match_tokens([None, b"a", None], [], {}, {})
    assert (ids.tolist(), match.tolist()) == ([-1] * 3, [0] * 3)
    assert ids.dtype == np.dtype(np.int32)
    assert match.dtype == np.dtype(np.uint8)
    ids, match = match_tokens([], [b"a"], {}, {})
    assert ids.shape == match.shape == (0,)


PIECES = [b"a", b"b", b" ", b"\n", "é".encode(), "你".encode(), b"\xe4", b"\xbd"]
SURFACE = st.lists(st.sampled_from(PIECES), max_size=4).map(b"".join)


@st.composite
def vocabularies(draw: st.DrawFn) -> tuple[Surfaces, dict[int, int]]:
    surfaces = draw(st.lists(st.none() | SURFACE, max_size=12))
    byte_values = draw(st.lists(st.sampled_from(sorted(b"ab \n\xe4\xbd")), unique=True, max_size=6))
    byte_ids = {value: len(surfaces) + rank for rank, value in enumerate(byte_values)}
    return [*surfaces, *(bytes([value]) for value in byte_values)], byte_ids


@given(vocabularies(), vocabularies())
def test_equals_comparing_all_pairs(
    user: tuple[Surfaces, dict[int, int]], delta: tuple[Surfaces, dict[int, int]]
) -> None:
    assert_equals_reference(user[0], delta[0], user[1], delta[1])


def assert_equals_reference(
    user: Surfaces, delta: Surfaces, user_bytes: dict[int, int], delta_bytes: dict[int, int]
) -> None:
    fast = match_tokens(user, delta, user_bytes, delta_bytes)
    slow = match_tokens_by_all_pairs(user, delta, user_bytes, delta_bytes)
    np.testing.assert_array_equal(fast[0], slow[0])
    np.testing.assert_array_equal(fast[1], slow[1])


def test_equals_comparing_all_pairs_for_trained_tokenizers(tokenizers_by_family: dict[str, object]) -> None:
    vocabularies = [read_vocabulary(tokenizer) for tokenizer in tokenizers_by_family.values()]
    for user in vocabularies:
        for delta in vocabularies:
            assert_equals_reference(user.surfaces, delta.surfaces, dict(user.byte_ids), dict(delta.byte_ids))


def test_equals_comparing_all_pairs_for_samples_of_real_vocabularies(
    demo_vocabularies: tuple[Vocabulary, Vocabulary],
) -> None:
    for user, delta in (demo_vocabularies, demo_vocabularies[::-1]):
        chosen = random.Random(0).sample(range(user.size), 40)
        surfaces = [user.surfaces[token] for token in chosen]
        user_bytes = {value: chosen.index(token) for value, token in user.byte_ids.items() if token in chosen}
        assert_equals_reference(surfaces, delta.surfaces, user_bytes, dict(delta.byte_ids))


def test_spelling_does_not_matter(make_vocabulary: Callable[..., Vocabulary]) -> None:
    user = make_vocabulary([" the", "the", "你"])
    delta = make_vocabulary(["the", "x", " the"])
    ids, _ = match_tokens(user.surfaces, delta.surfaces, {}, {})
    assert ids.tolist() == [2, 0, -1]
