"""Rows of a forward pass, cut and grouped."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import pytest

from cmc_server.delta.capacity import BLOCK_SIZE
from cmc_server.delta.pieces import Piece, group_rows, split


def groups_of(stops: Sequence[int], limit: int | None, new: int = 1) -> list[list[int]]:
    """By group, its rows: each row's first block has the row's number times 100."""
    pieces = [Piece(row, stop - new, stop) for row, stop in enumerate(stops)]
    blocks = [array("q", range(100 * row, 100 * row - -stop // BLOCK_SIZE)) for row, stop in enumerate(stops)]
    offsets = [row * new for row in range(len(stops))]
    groups = group_rows(pieces, offsets, blocks, limit)
    for group in groups:
        assert all(table.unique().numel() == -(-stops[int(table[0]) // 100] // BLOCK_SIZE) for table in group.blocks)
    return [[int(table[0]) // 100 for table in group.blocks] for group in groups]


@pytest.mark.parametrize(
    ("stops", "limit", "expected"),
    [
        ([5, 40, 9], None, [[0, 1, 2]]),
        ([5, 40, 9], 6, [[0, 1, 2]]),  # two blocks each, padding included
        ([5, 40, 9], 5, [[1, 0], [2]]),
        ([5, 640, 9, 40], 4, [[1], [3, 0], [2]]),  # a row longer than the limit has a group of its own
        ([5, 9, 3], 1, [[0], [1], [2]]),
    ],
)
def test_groups_of_decoding_rows(stops: list[int], limit: int | None, expected: list[list[int]]) -> None:
    assert groups_of(stops, limit) == expected


def test_a_prompt_has_a_group_of_its_own() -> None:
    assert groups_of([40, 50], None, new=30) == [[0], [1]]


def test_a_forward_pass_is_cut_at_its_budget() -> None:
    batch, left = split([Piece(0, 0, 5), Piece(1, 2, 4), Piece(2, 0, 9)], 10)
    assert batch == [Piece(0, 0, 5), Piece(1, 2, 4), Piece(2, 0, 3)]
    assert left == [Piece(2, 3, 9)]
