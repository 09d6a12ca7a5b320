"""Write a BitDelta as it is meant to be stored: one bit for each weight, and scales.

``packed.safetensors`` holds, for each packed tensor W of shape [..., n], ``W.signs`` uint8 [..., ceil(n / 8)] (bit i
of byte j is set where element 8 j + i is positive or 0) and ``W.scales`` float16 or float32, [1, ..., 1] or [..., 1];
every other tensor as it was. Its metadata say the rest: ``format``, ``tensors`` (shape and type of each packed one),
and ``base``: ``{}`` where W = sign * scale; where W = base + sign * scale, the SHA-256 of each weight file of the base.
:mod:`cmc_server.delta.packed` reads it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmc_server.editing.checkpoint import PACKED_FILE
from cmc_server.editing.shards import DTYPES, write_shard
from cmc_server.editing.stream import Edit, told
from cmc_server.errors import EditingError

PACKED_FORMAT = "cmc-packed-1"
#: As :mod:`cmc_server.delta.packed` unpacks.
_PACKABLE = (torch.float32, torch.float16, torch.bfloat16)
_STORED_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def pack_signs(delta: Tensor) -> Tensor:
    """The signs of [..., n] numbers as uint8 [..., ceil(n / 8)], the first element in the lowest bit; 0 counts as +."""
    return torch.from_numpy(np.packbits((delta >= 0).numpy(), axis=-1, bitorder="little"))


def write_packed(edit: Edit, scales: Mapping[str, Tensor], folder: Path, advance: Callable[[int], object]) -> None:
    """Write the packed file of a one-bit BitDelta.

    Args:
        edit: says which tensors are packed, and gives the others.
        scales: float32 of each packed tensor, that broadcast to it.
        folder: exists.
        advance: called with the bytes of each piece, for a progress bar.

    Raises:
        EditingError: a tensor to pack has a type that packed weights cannot be unpacked to.
    """
    post = edit.sources.post
    packed: dict[str, Any] = {}
    layout: list[tuple[str, torch.dtype, list[int]]] = []
    for name in post.names:
        stored = post.stored(name)
        if name not in scales:
            layout.append((name, stored.dtype, list(stored.shape)))
            continue
        if stored.dtype not in _PACKABLE:
            kind = str(stored.dtype).removeprefix("torch.")
            raise EditingError(f"{name} of {post.folder} is {kind}, which cannot be packed; leave out --packed.")
        packed[name] = {"shape": list(stored.shape), "dtype": _STORED_NAMES[stored.dtype]}
        layout.append((f"{name}.signs", torch.uint8, [*stored.shape[:-1], -(-stored.shape[-1] // 8)]))
        layout.append((f"{name}.scales", _scale_type(scales[name]), list(scales[name].shape)))
    metadata = {
        "format": PACKED_FORMAT,
        "tensors": json.dumps(packed),
        "base": json.dumps({} if edit.sources.base is None else edit.sources.base.file_hashes()),
    }
    pieces = (piece for name in post.names for piece in told(_stored_pieces(edit, scales, name), advance))
    write_shard(folder / PACKED_FILE, _header(layout, metadata), pieces)


def _stored_pieces(edit: Edit, scales: Mapping[str, Tensor], name: str) -> Iterator[Tensor]:
    if name not in scales:
        yield from edit.tensor(name)
        return
    for _ in edit.tensor(name):  # for its checks and totals
        pass
    yield from (pack_signs(delta).flatten() for delta in edit.deltas(name))
    yield scales[name].to(_scale_type(scales[name])).flatten()


def _scale_type(scales: Tensor) -> torch.dtype:
    """float16 where it holds them exactly, as it does the rounded scales of rows."""
    return torch.float16 if scales.numel() > 1 and torch.equal(scales.half().float(), scales) else torch.float32


def _header(layout: list[tuple[str, torch.dtype, list[int]]], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape in layout:
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": _STORED_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
