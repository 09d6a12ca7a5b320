"""The token that reports a failed delta."""

from __future__ import annotations

import pytest

from cmc_server.errors import MapError
from cmc_server.vocab.reserved import pick_reserved_token
from cmc_server.vocab.surface import Vocabulary


def vocabulary(
    *contents: str | None,
    special: tuple[int, ...] = (),
    bos: int | None = None,
    eos: tuple[int, ...] = (),
    unk: int | None = None,
    pad: int | None = None,
) -> Vocabulary:
    return Vocabulary(
        contents=contents,
        surfaces=tuple(None if text is None or i in special else text.encode() for i, text in enumerate(contents)),
        special_ids=frozenset(special),
        byte_ids={},
        bos_id=bos,
        eos_ids=eos,
        unk_id=unk,
        pad_id=pad,
        fingerprint="",
    )


def test_an_id_without_a_token_comes_first() -> None:
    user = vocabulary("a", "<unused0>", "<pad>", special=(1, 2), pad=2)
    assert pick_reserved_token(user, 5) == 3
    assert pick_reserved_token(user, 5, avoid={3}) == 4
    assert pick_reserved_token(vocabulary("a", None, "<unused0>", special=(2,)), 3) == 1


@pytest.mark.parametrize("content", ["<unused7>", "[unused7]", "<|reserved_special_token_7|>", "<RESERVED_1>"])
def test_then_a_placeholder(content: str) -> None:
    user = vocabulary("reserved", "<pad>", content, "<other>", special=(1, 3), pad=1)
    assert pick_reserved_token(user, 4) == 2


def test_a_placeholder_with_a_role_is_none() -> None:
    user = vocabulary("a", "<unused0>", "<pad>", special=(1, 2), eos=(1,), pad=2)
    assert pick_reserved_token(user, 3) == 2


def test_then_pad_unless_it_ends_texts() -> None:
    assert pick_reserved_token(vocabulary("a", "<pad>", "<x>", special=(1, 2), pad=1), 3) == 1
    assert pick_reserved_token(vocabulary("a", "<pad>", "<x>", special=(1, 2), pad=1, eos=(1,)), 3) == 2


def test_then_a_special_token_without_a_role_that_the_template_does_not_write() -> None:
    user = vocabulary("a", "<s>", "</s>", "<tool>", "<x>", special=(1, 2, 3, 4), bos=1, eos=(2,))
    assert pick_reserved_token(user, 5, avoid={1, 2, 3}) == 4


def test_bos_comes_last() -> None:
    user = vocabulary("a", "<s>", "</s>", special=(1, 2), bos=1, eos=(2,))
    assert pick_reserved_token(user, 3, avoid={1, 2}) == 1


def test_none_to_spare() -> None:
    with pytest.raises(MapError, match="no token to spare"):
        pick_reserved_token(vocabulary("a", "<end>", special=(1,), bos=1, eos=(1,)), 2)
    with pytest.raises(MapError):
        pick_reserved_token(vocabulary("a", "<pad>", special=(1,), pad=1), 1)  # beyond the logits
