from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmc_server.delta.blocks import BlockPool, CachedSequence
from cmc_server.errors import CapacityError


def test_a_sequence_holds_just_the_blocks_it_needs() -> None:
    pool = BlockPool(num_blocks=4, block_size=8)
    sequence = CachedSequence(pool)
    sequence.reserve(17)
    assert len(sequence.blocks) == 3
    sequence.length = 17
    sequence.truncate(8)
    assert (sequence.length, len(sequence.blocks), pool.num_free) == (8, 1, 3)
    sequence.free()
    assert pool.num_free == 4


def test_too_long_a_sequence_is_refused_and_nothing_is_lost() -> None:
    pool = BlockPool(num_blocks=2, block_size=8)
    sequence = CachedSequence(pool)
    sequence.reserve(8)
    with pytest.raises(CapacityError, match="--max-delta-seqs"):
        sequence.reserve(25)
    assert (len(sequence.blocks), pool.num_free) == (1, 1)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40)), max_size=60))
def test_no_block_is_ever_lost_or_shared(steps: list[tuple[int, int]]) -> None:
    pool = BlockPool(num_blocks=12, block_size=4)
    sequences = [CachedSequence(pool) for _ in range(3)]
    for which, length in steps:
        sequence = sequences[which]
        sequence.truncate(length)
        try:
            sequence.reserve(length)
        except CapacityError:
            continue
        sequence.length = length
    held = [block for sequence in sequences for block in sequence.blocks]
    assert len(set(held)) == len(held)
    assert len(held) + pool.num_free == pool.num_blocks
