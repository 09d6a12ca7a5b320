"""One safetensors file, read and written in pieces that need not be whole tensors."""

from __future__ import annotations

import json
import os
import struct
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cmc_server.errors import EditingError

#: The format's names of the types that an edit can read, and torch's.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Args:
        dtype: as stored.
        shape: may be empty (a scalar) or hold a 0.
        offset: of its first byte in the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_elements(self) -> int:
        """The product of the shape."""
        product = 1
        for size in self.shape:
            product *= size
        return product

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return self.num_elements * self.dtype.itemsize


class Shard:
    """A safetensors file whose header has been read and checked by the library; no tensor has.

    Pieces are read into memory of their own rather than mapped, so that what is resident is what is being worked on,
    and not the whole file once it has been walked through. The file stays open, so that the system reads ahead. What
    was not in the page cache before can be dropped from it again, see :meth:`forget`.

    Args:
        path: the file.

    Raises:
        EditingError: it is missing, no valid safetensors file, or has a type that torch does not compute with.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            weakref.finalize(self, os.close, self._file)
            self._was_cached = _is_cached(self._file)
            with safe_open(path, framework="pt"):
                pass
            size = os.pread(self._file, 8, 0)
            self.header = size + os.pread(self._file, struct.unpack("<Q", size)[0], 8)
        except (SafetensorError, OSError) as error:
            raise EditingError(f"{path} is not a valid safetensors file: {error}.") from None
        entries = json.loads(self.header[8:])
        entries.pop("__metadata__", None)
        #: In the order of the file.
        self.tensors: dict[str, StoredTensor] = {}
        for name, entry in sorted(entries.items(), key=lambda item: (item[1]["data_offsets"], item[0])):
            if entry["dtype"] not in DTYPES:
                raise EditingError(f"{path} stores {name} as {entry['dtype']}, which cannot be edited.")
            offset = len(self.header) + entry["data_offsets"][0]
            self.tensors[name] = StoredTensor(DTYPES[entry["dtype"]], tuple(entry["shape"]), offset)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements ``start`` to ``stop`` of a tensor.

        Args:
            name: one of :attr:`tensors`.
            start: index of the first element, in row-major order.
            stop: index behind the last one; None is the end.

        Returns:
            [stop - start] in the stored type.

        Raises:
            EditingError: the file has become shorter since it was opened.
        """
        stored = self.tensors[name]
        count = (stored.num_elements if stop is None else stop) - start
        raw = torch.empty(count * stored.dtype.itemsize, dtype=torch.uint8)
        view, offset, filled = raw.numpy().data, stored.offset + start * stored.dtype.itemsize, 0
        while filled < len(view):
            got = os.preadv(self._file, [view[filled:]], offset + filled)
            if not got:
                raise EditingError(f"{self.path} ends within {name}; it was changed while it was read.")
            filled += got
        return raw.view(stored.dtype)

    def forget(self, name: str) -> None:
        """Give the page cache's memory of a tensor back, unless the file was there before we came.

        Memory that is used again at once is much cheaper for the system than more and more of it.
        """
        if not self._was_cached:
            stored = self.tensors[name]
            os.posix_fadvise(self._file, stored.offset, stored.num_bytes, os.POSIX_FADV_DONTNEED)


def _is_cached(file: int) -> bool:
    """Whether the middle of a file is in the page cache; also where the system cannot say."""
    if not hasattr(os, "RWF_NOWAIT"):
        return True
    try:
        return bool(os.preadv(file, [bytearray(1)], os.fstat(file).st_size // 2, os.RWF_NOWAIT))
    except BlockingIOError:
        return False
    except OSError:  # a file system without it
        return True


def write_shard(path: Path, header: bytes, pieces: Iterable[Tensor]) -> None:
    """Write a safetensors file piece by piece.

    The system writes to the disk behind our back; a thread for it was measured, and cost more than it hid.

    Args:
        path: the file to create.
        header: length and JSON, as the format begins; that of another file gives the same layout.
        pieces: the data in the order of the header, flat, in the types that the header says.
    """
    with path.open("wb") as stream:
        stream.write(header)
        for piece in pieces:
            stream.write(piece.contiguous().view(torch.uint8).numpy().data)
