"""How the new tokens of many rows are cut into forward passes, and which rows are attended to together."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from cmc_server.delta.attention import RowGroup
from cmc_server.delta.capacity import BLOCK_SIZE

#: Rows with at most this many new tokens are attended to together, padded to one length.
_SHORT = 4


@dataclass(frozen=True)
class Piece:
    """New tokens of one row: the positions ``start`` up to ``stop``."""

    row: int
    start: int
    stop: int


def split(pieces: Sequence[Piece], budget: int) -> tuple[list[Piece], list[Piece]]:
    """The pieces of one forward pass of at most ``budget`` tokens, and what is left for later ones."""
    batch: list[Piece] = []
    left: list[Piece] = []
    for piece in pieces:
        count = min(piece.stop - piece.start, budget)
        if count:
            batch.append(Piece(piece.row, piece.start, piece.start + count))
        if piece.start + count < piece.stop:
            left.append(Piece(piece.row, piece.start + count, piece.stop))
        budget -= count
    return batch, left


def group_rows(
    pieces: Sequence[Piece], offsets: Sequence[int], blocks: Sequence[array[int]], limit: int | None
) -> list[RowGroup]:
    """Short pieces (decoding) together, every long one (prefill) in a group of its own.

    Args:
        pieces: of one forward pass.
        offsets: where each begins among the packed tokens.
        blocks: of each piece's row.
        limit: blocks that a group of short pieces may hold, padding included, unless it is of one row; None is any
            number. Rows of like length are then grouped, so that a long one does not pad the others.
    """
    short = [index for index, piece in enumerate(pieces) if piece.stop - piece.start <= _SHORT]
    groups: list[RowGroup] = []
    if short:
        members, sizes = _within(limit, pieces, short)
        groups += _row_groups(pieces, offsets, blocks, members, sizes)
    for index, piece in enumerate(pieces):
        if piece.stop - piece.start > _SHORT:
            groups += _row_groups(pieces, offsets, blocks, [index], [1])
    return groups


def _within(limit: int | None, pieces: Sequence[Piece], short: list[int]) -> tuple[list[int], list[int]]:
    """The rows in the order of their groups, and how many each group has.

    One group in the given order if it may hold them all; else the longest first, as many to a group as fit.
    """
    held = {index: _num_blocks(pieces[index]) for index in short}
    if limit is None or len(short) * max(held.values()) <= limit:
        return short, [len(short)]
    order = sorted(short, key=held.__getitem__, reverse=True)
    sizes: list[int] = []
    done = 0
    while done < len(order):
        sizes.append(min(max(1, limit // held[order[done]]), len(order) - done))
        done += sizes[-1]
    return order, sizes


def _num_blocks(piece: Piece) -> int:
    return -(-piece.stop // BLOCK_SIZE)


def block_tables(blocks: Sequence[array[int]], held: Sequence[int], width: int) -> NDArray[np.int64]:
    """[R, width]: each row's first ``held`` blocks, padded by its first one.

    Blocks that pad a row lie behind its last position, so that no query sees them.
    """
    tables = np.empty((len(blocks), width), dtype=np.int64)
    for table, own, count in zip(tables, blocks, held, strict=True):
        table[:count] = own if len(own) == count else own[:count]
        if count < width:
            table[count:] = own[0]
    return tables


def _row_groups(
    pieces: Sequence[Piece],
    offsets: Sequence[int],
    blocks: Sequence[array[int]],
    members: list[int],
    sizes: list[int],
) -> list[RowGroup]:
    """Groups of rows one after the other. Few operations, by numpy, which is cheaper: it runs in every step."""
    rows = [pieces[index] for index in members]
    counts = [piece.stop - piece.start for piece in rows]
    positions = np.array([piece.start for piece in rows], dtype=np.int64)[:, None]
    tokens = np.array([offsets[index] for index in members], dtype=np.int64)[:, None]
    real: NDArray[np.bool_] | None = None
    if (width := max(counts)) > 1:
        steps = np.arange(width)
        real = steps < np.array(counts)[:, None]
        tokens, positions = np.where(real, tokens + steps, tokens), np.where(real, positions + steps, -1)
        real = None if min(counts) == width else real
    held = [_num_blocks(piece) for piece in rows]
    tables = block_tables([blocks[index] for index in members], held, max(held))
    in_order = width == 1 and len(sizes) == 1 and len(members) == len(pieces)
    groups = []
    for stop, size in zip(accumulate(sizes), sizes, strict=True):
        part = slice(stop - size, stop)
        groups.append(
            RowGroup(
                None if in_order else torch.from_numpy(tokens[part]),
                torch.from_numpy(tables[part, : max(held[part])]),
                torch.from_numpy(positions[part]),
                None if real is None else torch.from_numpy(real[part]),
            )
        )
    return groups
