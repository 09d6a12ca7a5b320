"""Write a BitDelta as it is meant to be stored: one bit for each weight, few more where there are levels, and scales.

``packed.safetensors`` holds, for each packed tensor W of shape [..., n], ``W.signs`` uint8 [..., ceil(n / 8)] (bit i
of byte j is set where element 8 j + i is positive or 0) and ``W.scales`` float16 or float32, [1, ..., 1] or [..., 1].
With M magnitude levels it has their places as ``W.levels`` uint8 [ceil(log2 M), ..., ceil(n / 8)], the lowest bit
first and each packed as signs are, and ``W.scales`` is float32, [1, ..., 1, M] or [..., M]. Every other tensor is as it
was. The metadata say the rest: ``format``, ``tensors`` (shape and type of each packed one), and ``base``: ``{}`` where
W = sign * scale; where W = base + sign * scale, the SHA-256 of each weight file of the base.
:mod:`cmc_server.delta.packed` reads it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmc_server.editing.bitdelta import magnitude_blocks
from cmc_server.editing.checkpoint import PACKED_FILE
from cmc_server.editing.methods import BitDelta
from cmc_server.editing.shards import DTYPES, write_shard
from cmc_server.editing.stream import Edit, told
from cmc_server.errors import EditingError

PACKED_FORMAT = "cmc-packed-1"
#: As :mod:`cmc_server.delta.packed` unpacks.
_PACKABLE = (torch.float32, torch.float16, torch.bfloat16)
_STORED_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_Layout = list[tuple[str, torch.dtype, list[int]]]


def pack_signs(delta: Tensor) -> Tensor:
    """The signs of [..., n] numbers as uint8 [..., ceil(n / 8)], the first element in the lowest bit; 0 counts as +."""
    return _pack_bits(delta >= 0)


def packed_header(edit: Edit) -> tuple[bytes, int]:
    """What the packed file begins with, and how many bytes it has in all. A base is read whole, for its hashes.

    Args:
        edit: by :class:`BitDelta`, with mean magnitudes; says which tensors are packed.

    Raises:
        EditingError: a tensor to pack has a type that packed weights cannot be unpacked to.
    """
    metadata = {
        "format": PACKED_FORMAT,
        "tensors": json.dumps({name: _entry(edit, name) for name in edit.edited_names()}),
        "base": json.dumps({} if edit.sources.base is None else edit.sources.base.file_hashes()),
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, dtype, shape in _layout(edit):
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": _STORED_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, 8 + len(text) + end


def write_packed(edit: Edit, header: bytes, folder: Path, advance: Callable[[int], object]) -> None:
    """Write the packed file of a BitDelta.

    Args:
        edit: as for :func:`packed_header`.
        header: what that gave.
        folder: exists.
        advance: called with the bytes of each piece, for a progress bar.
    """
    pieces = (piece for name in edit.sources.post.names for piece in told(_stored_pieces(edit, name), advance))
    write_shard(folder / PACKED_FILE, header, pieces)


def _entry(edit: Edit, name: str) -> dict[str, Any]:
    post = edit.sources.post
    stored = post.stored(name)
    if stored.dtype not in _PACKABLE:
        kind = str(stored.dtype).removeprefix("torch.")
        raise EditingError(f"{name} of {post.folder} is {kind}, which cannot be packed; leave out --packed.")
    return {"shape": list(stored.shape), "dtype": _STORED_NAMES[stored.dtype]}


def _layout(edit: Edit) -> _Layout:
    """Names, types and shapes of what the packed file holds, in its order."""
    post, edited = edit.sources.post, set(edit.edited_names())
    layout: _Layout = []
    for name in post.names:
        stored = post.stored(name)
        layout += _packed_layout(edit, name) if name in edited else [(name, stored.dtype, list(stored.shape))]
    return layout


def _packed_layout(edit: Edit, name: str) -> _Layout:
    stored, scales = edit.sources.post.stored(name), edit.measure(name)
    *rows, length = stored.shape
    packed = [*rows, -(-length // 8)]
    layout: _Layout = [(f"{name}.signs", torch.uint8, packed)]
    if scales is not None:
        return [*layout, (f"{name}.scales", _scale_type(scales), list(scales.shape))]
    method = _method(edit)
    by_row = method.granularity == "row"
    num_levels = min(method.levels, length if by_row else stored.num_elements)
    layout.append((f"{name}.levels", torch.uint8, [_num_bits(num_levels), *packed]))
    return [*layout, (f"{name}.scales", torch.float32, [*(rows if by_row else [1] * len(rows)), num_levels])]


def _stored_pieces(edit: Edit, name: str) -> Iterator[Tensor]:
    if name not in edit.edited_names():
        yield from edit.tensor(name)
        return
    for _ in edit.tensor(name):  # for its checks and totals
        pass
    yield from (pack_signs(delta).flatten() for delta in edit.deltas(name))
    scales = edit.measure(name)
    if scales is not None:
        yield scales.to(_scale_type(scales)).flatten()
        return
    method = _method(edit)
    places, means = magnitude_blocks(edit.delta(name), method.levels, method.granularity)
    yield from (_pack_bits(places >> bit & 1).flatten() for bit in range(_num_bits(means.shape[-1])))
    yield (method.factor * means).flatten()


def _method(edit: Edit) -> BitDelta:
    assert isinstance(edit.method, BitDelta) and edit.method.can_be_packed
    return edit.method


def _num_bits(num_levels: int) -> int:
    return (num_levels - 1).bit_length()


def _pack_bits(bits: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(bits.numpy(), axis=-1, bitorder="little"))


def _scale_type(scales: Tensor) -> torch.dtype:
    """float16 where it holds them exactly, as it does the rounded scales of rows."""
    return torch.float16 if scales.numel() > 1 and torch.equal(scales.half().float(), scales) else torch.float32
