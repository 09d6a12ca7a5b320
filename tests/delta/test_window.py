"""What a delta reads of a long input: in large steps, and without a copy of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmc_server.delta.window import Window, window_drop
from cmc_server.fusion.stretches import cut_to_window


@given(st.integers(0, 5000), st.integers(8, 600))
def test_the_window_moves_in_large_steps(length: int, context: int) -> None:
    dropped = window_drop(length, context)
    assert dropped % (context // 2) == 0
    assert 0 <= length - dropped <= context or length <= context
    if length > context:
        assert length - dropped > context - context // 2 - 1


@given(
    length=st.integers(0, 60),
    context=st.integers(4, 70),
    num_bos=st.integers(0, 2),
    stop=st.none() | st.integers(0, 70),
    part=st.tuples(st.integers(-3, 70), st.integers(-3, 70)),
)
def test_a_window_is_what_a_copy_would_be(
    length: int, context: int, num_bos: int, stop: int | None, part: tuple[int, int]
) -> None:
    ids = list(range(100, 100 + length))
    bos = ids[:num_bos]
    window = Window(ids, len(bos), window_drop(length, context), stop)
    expected = cut_to_window(ids, bos, context)[:stop]
    assert len(window) == len(expected)
    assert list(window) == expected
    assert window[part[0] : part[1]] == expected[part[0] : part[1]]
    if expected:
        assert window[-1] == expected[-1]
    with pytest.raises(IndexError):
        window[len(expected)]
