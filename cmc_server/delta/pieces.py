"""How the new tokens of many rows are cut into forward passes, and which rows are attended to together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
    pieces: Sequence[Piece], offsets: Sequence[int], blocks: Sequence[Sequence[int]], limit: int | None
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
    groups = [[index] for index, piece in enumerate(pieces) if piece.stop - piece.start > _SHORT]
    if short:
        groups += [short] if limit is None else _within(limit, pieces, short)
    return [_row_group(pieces, offsets, blocks, members) for members in groups]


def _within(limit: int, pieces: Sequence[Piece], short: list[int]) -> list[list[int]]:
    """The rows in their order if they all fit one group; else the longest first, as many to a group as fit."""
    held = {index: _num_blocks(pieces[index]) for index in short}
    if len(short) * max(held.values()) <= limit:
        return [short]
    groups: list[list[int]] = []
    room = 0
    for index in sorted(short, key=lambda index: held[index], reverse=True):
        if room == 0:
            groups.append([])
            room = max(1, limit // held[index])
        groups[-1].append(index)
        room -= 1
    return groups


def _num_blocks(piece: Piece) -> int:
    return -(-piece.stop // BLOCK_SIZE)


def _row_group(
    pieces: Sequence[Piece], offsets: Sequence[int], blocks: Sequence[Sequence[int]], members: list[int]
) -> RowGroup:
    """Few tensors whatever the number of rows: this runs in every step."""
    held = max(_num_blocks(pieces[index]) for index in members)
    # Blocks that pad a row lie behind its last position, so that no query sees them.
    tables = [[*blocks[index], *[blocks[index][0]] * held][:held] for index in members]
    counts = [pieces[index].stop - pieces[index].start for index in members]
    width = max(counts)
    starts = torch.tensor([[pieces[index].start] for index in members])
    tokens = torch.tensor([[offsets[index]] for index in members])
    token_index: Tensor | None
    if width == 1:
        query_positions, real = starts, None
        token_index = None if len(members) == len(pieces) else tokens
    else:
        steps = torch.arange(width)
        real = steps < torch.tensor(counts).unsqueeze(1)
        token_index = torch.where(real, tokens + steps, tokens)
        query_positions = torch.where(real, starts + steps, -1)
        real = None if min(counts) == width else real
    return RowGroup(
        token_index=token_index,
        blocks=torch.tensor(tables),
        query_positions=query_positions,
        query_mask=real,
    )
