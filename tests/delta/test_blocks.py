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


def fill(sequence: CachedSequence, ids: list[int], settled: int | None = None) -> None:
    """What a runner does in one step."""
    sequence.adopt(ids)
    sequence.reserve(len(ids))
    sequence.length = len(ids)
    sequence.publish(ids, len(ids) if settled is None else settled)


def test_an_equal_beginning_is_held_by_both() -> None:
    pool = BlockPool(num_blocks=8, block_size=4)
    first, second = CachedSequence(pool), CachedSequence(pool)
    fill(first, list(range(10)))
    second.adopt([*range(8), 90, 91])
    assert (second.length, second.blocks, pool.num_free) == (8, first.blocks[:2], 5)
    first.free()
    assert pool.num_free == 6  # the last block and nothing else
    second.free()
    assert (pool.num_free, pool.num_kept) == (8, 2)


def test_the_last_id_is_left_to_be_fed() -> None:
    pool = BlockPool(num_blocks=8, block_size=4)
    first, second = CachedSequence(pool), CachedSequence(pool)
    fill(first, list(range(8)))
    second.adopt(list(range(8)))
    assert second.length == 4


def test_what_is_not_settled_is_not_shared() -> None:
    pool = BlockPool(num_blocks=8, block_size=4)
    first, second = CachedSequence(pool), CachedSequence(pool)
    fill(first, list(range(10)), settled=7)
    second.adopt(list(range(10)))
    assert second.length == 4


def test_kept_blocks_are_evicted_only_for_want_of_others_and_from_the_end() -> None:
    pool = BlockPool(num_blocks=4, block_size=4)
    first, second = CachedSequence(pool), CachedSequence(pool)
    fill(first, list(range(12)))
    first.free()
    assert pool.num_kept == 3
    second.reserve(8)
    assert pool.num_kept == 2
    first.adopt(list(range(12)))
    assert first.length == 8  # the beginning survived


def test_a_rollback_into_a_shared_block_leaves_it_alone() -> None:
    pool = BlockPool(num_blocks=8, block_size=4)
    first, second = CachedSequence(pool), CachedSequence(pool)
    fill(first, list(range(9)))
    second.adopt(list(range(9)))
    second.truncate(6)
    assert (second.length, second.blocks) == (4, first.blocks[:1])
    first.truncate(6)  # nobody else holds the second block now
    assert first.length == 6
    third = CachedSequence(pool)
    third.adopt(list(range(9)))
    assert third.length == 4  # what is written to is not found any more


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 30), st.lists(st.integers(0, 1), max_size=24), st.integers(0, 40)),
        max_size=40,
    )
)
def test_shared_blocks_always_hold_what_their_sequences_read(
    steps: list[tuple[int, int, list[int], int]],
) -> None:
    pool = BlockPool(num_blocks=14, block_size=4)
    sequences = [CachedSequence(pool) for _ in range(3)]
    inputs: list[list[int]] = [[], [], []]
    settled = [0, 0, 0]
    content = [[-1] * 4 for _ in range(14)]
    for which, keep, grown, sure in steps:
        sequence = sequences[which]
        # Settled ids stay until the sequence begins anew.
        keep = 0 if keep < settled[which] else min(keep, len(inputs[which]))
        settled[which] = settled[which] if keep else 0
        ids = inputs[which][:keep] + grown or [1]
        sequence.truncate(min(keep, len(ids) - 1))
        sequence.adopt(ids)
        try:
            sequence.reserve(len(ids))
        except CapacityError:
            sequence.free()
            inputs[which], settled[which] = [], 0
            continue
        for position in range(sequence.length, len(ids)):
            content[sequence.blocks[position // 4]][position % 4] = ids[position]
        sequence.length = len(ids)
        settled[which] = max(settled[which], min(sure, len(ids)))
        sequence.publish(ids, settled[which])
        inputs[which] = ids
        for one, read in zip(sequences, inputs, strict=True):
            cached = [content[one.blocks[position // 4]][position % 4] for position in range(one.length)]
            assert cached == read[: one.length]
    held = {block for sequence in sequences for block in sequence.blocks}
    assert len(held) + pool.num_free == pool.num_blocks


def test_what_may_be_at_fault_is_found_by_nobody_and_kept_by_those_who_hold_it() -> None:
    pool = BlockPool(num_blocks=8, block_size=4)
    first, second, third = (CachedSequence(pool) for _ in range(3))
    fill(first, list(range(10)))
    fill(second, list(range(12)))
    assert second.blocks[:2] == first.blocks[:2]
    for block in first.blocks:
        pool.hide(block)
    fill(third, list(range(10)))
    assert not set(third.blocks) & set(first.blocks)
    first.free()
    second.truncate(6)  # nobody else is there any more, so that it may write to its second block
    assert second.length == 6
    for sequence in (second, third):
        sequence.free()
    assert pool.num_free == 8
    fourth = CachedSequence(pool)
    fourth.adopt(list(range(10)))
    assert fourth.length == 8  # of the third's, which are sound
