"""An edit as it runs over checkpoints: tensor by tensor, in pieces where the method allows, never all at once."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmc_server.editing.checkpoint import Checkpoint
from cmc_server.editing.methods import Method
from cmc_server.editing.seeds import generator
from cmc_server.editing.shards import StoredTensor, write_shard
from cmc_server.editing.sources import Sources
from cmc_server.errors import EditingError

#: Elements of a piece, if rows are no longer: what is worked on then stays in a processor's cache.
PIECE = 1 << 18
#: Threads that read pieces and take differences while another one edits, and how many pieces they are ahead of it.
_READERS, _AHEAD = 2, 3
#: Largest numbers of types as wide as float32.
_WIDE = torch.finfo(torch.bfloat16).max
#: Bytes that glibc is to keep for reuse, see :func:`_streaming`.
_KEPT_BYTES = 1 << 24


@dataclass(frozen=True)
class _Piece:
    """Rows of a tensor, as they lie in the file."""

    name: str
    rows: slice
    start: int
    stop: int
    shape: tuple[int, ...]

    @property
    def span(self) -> tuple[str, int, int]:
        """Its tensor and which of the elements, in row-major order."""
        return self.name, self.start, self.stop


def _pieces(name: str, stored: StoredTensor, whole: bool) -> Iterator[_Piece]:
    if whole or not stored.shape:
        yield _Piece(name, slice(None), 0, stored.num_elements, stored.shape)
        return
    num_rows = stored.shape[0]
    row = stored.num_elements // max(1, num_rows)
    step = max(1, PIECE // max(1, row))
    for first in range(0, num_rows, step):
        last = min(first + step, num_rows)
        yield _Piece(name, slice(first, last), first * row, last * row, (last - first, *stored.shape[1:]))


@dataclass(frozen=True)
class _Read:
    """A piece as it was read.

    Args:
        piece: which.
        anchor: of the checkpoint that the output is like: float32 in the piece's shape; of what is only copied, as
            stored.
        deltas: delta parameters of each post-trained model, float32; none of what is only copied.
        squares: sum of squares of each one's delta parameters.
    """

    piece: _Piece
    anchor: Tensor
    deltas: list[Tensor]
    squares: list[float]


@dataclass
class Totals:
    """What an edit did, over all tensors that it took.

    Args:
        tensors: how many were edited; the others were copied.
        elements: their delta parameters.
        squares_before: sum of squares of the delta parameters.
        squares_after: the same of the edited ones, before rounding to the stored type.
    """

    tensors: int = 0
    elements: int = 0
    squares_before: float = 0.0
    squares_after: float = 0.0


class Edit:
    """A method at work on checkpoints.

    Args:
        sources: what is read.
        method: what is done.
        seed: of methods that draw.
        measured: what the method measures of each tensor, where that is known already, such as calibrated scales.

    Raises:
        EditingError: a tensor to edit is float64, which float32 arithmetic would round.
    """

    def __init__(self, sources: Sources, method: Method, seed: int, measured: Mapping[str, Any] | None = None) -> None:
        self.sources, self.method, self.seed = sources, method, seed
        self.totals = Totals()
        self._edited_names = {name for name in sources.layout.names if sources.is_edited(name, method)}
        self._refuse_doubles()
        self._measured = dict(measured or {})
        if method.measures == "model":
            names = self.edited_names()
            every = method.measure(lambda model: self._deltas(names, model), len(sources.posts))
            self._measured |= dict.fromkeys(names, every)

    def edited_names(self) -> list[str]:
        """The tensors that the method takes."""
        return [name for name in self.sources.layout.names if name in self._edited_names]

    def measure(self, name: str) -> Any:
        """What the method must know of a tensor before it edits it."""
        if name in self._measured or self.method.measures == "nothing":
            return self._measured.get(name)
        return self.method.measure(lambda model: self._deltas([name], model), len(self.sources.posts))

    def tensor(self, name: str) -> Iterator[Tensor]:
        """One tensor of the edited checkpoint, see :meth:`tensors`."""
        return self.tensors([name])

    def tensors(self, names: Iterable[str]) -> Iterator[Tensor]:
        """Tensors of the edited checkpoint: flat pieces in the stored types of :attr:`Sources.layout`.

        Raises:
            EditingError: a source holds NaN or infinity, or the result does not fit the stored type.
        """
        draws, measured = torch.Generator(), None
        for read in self._read_all(names):
            piece = read.piece
            if read.deltas and piece.start == 0:
                self.totals.tensors += 1
                measured, draws = self.measure(piece.name), generator(self.seed, piece.name)
            if read.deltas:
                yield self._edited(read, self.method.measured_rows(measured, piece.rows), draws)
            else:
                yield self._copied(piece, read.anchor)
            if piece.stop == self.sources.layout.stored(piece.name).num_elements:
                for checkpoint in self.sources.checkpoints:
                    checkpoint.forget(piece.name)

    def delta(self, name: str) -> Tensor:
        """All delta parameters of a tensor in the first post-trained model, float32 in its shape."""
        return next(self._deltas([name], 0, whole=True))

    def deltas(self, name: str) -> Iterator[Tensor]:
        """The same in pieces along the first axis."""
        return self._deltas([name], 0)

    def _deltas(self, names: Iterable[str], model: int, whole: bool = False) -> Iterator[Tensor]:
        for name in names:
            for piece in _pieces(name, self.sources.post.stored(name), whole):
                yield self._delta(piece, model)

    def _read_all(self, names: Iterable[str]) -> Iterator[_Read]:
        """All pieces in order, the next ones while this one is worked on unless they are whole tensors."""
        is_whole = self.method.whole
        pieces = (
            piece
            for name in names
            for piece in _pieces(name, self.sources.post.stored(name), is_whole and name in self._edited_names)
        )
        if is_whole:
            yield from map(self._read, pieces)
            return
        with _streaming() as threads:
            reads: deque[Future[_Read]] = deque()
            for piece in pieces:
                reads.append(threads.submit(self._read, piece))
                if len(reads) > _AHEAD:
                    yield reads.popleft().result()
            yield from (read.result() for read in reads)

    def _read(self, piece: _Piece) -> _Read:
        if piece.name not in self._edited_names:
            return _Read(piece, self.sources.layout.read(*piece.span), [], [])
        anchor, deltas = self._floats(piece)
        squares = [_squares(delta) for delta in deltas]
        if not all(map(math.isfinite, squares)):
            self._refuse_unless_finite(piece)
        return _Read(piece, anchor, deltas, squares)

    def _floats(self, piece: _Piece) -> tuple[Tensor, list[Tensor]]:
        """A piece of the weights that the output is like, and of all models' delta parameters, float32."""
        posts = [_floats_of(post, piece) for post in self.sources.posts]
        if self.sources.base is None:
            return posts[0], posts
        base = _floats_of(self.sources.base, piece)
        return base if self.sources.as_base else posts[0], [post - base for post in posts]

    def _delta(self, piece: _Piece, model: int) -> Tensor:
        post = _floats_of(self.sources.posts[model], piece)
        return post if self.sources.base is None else post - _floats_of(self.sources.base, piece)

    def _edited(self, read: _Read, measured: Any, draws: torch.Generator) -> Tensor:
        edited = self.method.apply(read.deltas, measured, draws)
        self.totals.elements += edited.numel()
        self.totals.squares_before += read.squares[0]
        squares = _squares(edited)
        self.totals.squares_after += squares
        name = read.piece.name
        dtype = self.sources.layout.stored(name).dtype
        if self.sources.base is None:
            result = edited
        elif self.sources.as_base:
            result = edited + read.anchor
        else:  # W_post + E: where nothing changes, not a bit does
            result = edited.sub(read.deltas[0]).add_(read.anchor)
        # What has finite squares, beside weights that fit, can overflow in the narrow types alone.
        if torch.finfo(dtype).max < _WIDE or not math.isfinite(squares + read.squares[0]):
            _check_fit(result, dtype, name)
        return result.to(dtype).flatten()

    def _refuse_doubles(self) -> None:
        for checkpoint in self.sources.checkpoints:
            doubles = [name for name in self.edited_names() if checkpoint.stored(name).dtype == torch.float64]
            if doubles:
                raise EditingError(
                    f"{checkpoint.folder} stores {doubles[0]} as float64, which arithmetic in float32 would round; "
                    "store it as float32 (edit can also leave it alone with --exclude)."
                )

    def _refuse_unless_finite(self, piece: _Piece) -> None:
        for checkpoint in self.sources.checkpoints:
            checkpoint.check_finite(*piece.span)

    def _copied(self, piece: _Piece, values: Tensor) -> Tensor:
        if values.dtype.is_floating_point and not bool(values.float().isfinite().all()):
            raise EditingError(f"{piece.name} of {self.sources.layout.folder} holds NaN or infinity.")
        return values


@contextmanager
def _streaming() -> Iterator[ThreadPoolExecutor]:
    """Threads for pieces. Meanwhile torch uses no threads of its own, which on pieces cost more than they bring.

    glibc gives the memory of a large tensor back to the system at once, and takes as long to get it again as an edit
    takes to fill it. It stops doing so up to the size of the largest block that was ever freed, so one is.
    """
    before = torch.get_num_threads()
    torch.empty(_KEPT_BYTES, dtype=torch.uint8)
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max_workers=_READERS) as threads:
            yield threads
    finally:
        torch.set_num_threads(before)


def write_edited(edit: Edit, folder: Path, advance: Callable[[int], object]) -> None:
    """Write the edited weights in the files and the types of :attr:`Sources.layout`.

    Args:
        edit: what to write.
        folder: exists; the index is not written.
        advance: called with the bytes of each piece, for a progress bar.
    """
    for shard in edit.sources.layout.shards:
        write_shard(folder / shard.path.name, shard.header, told(edit.tensors(shard.tensors), advance))


def told(pieces: Iterator[Tensor], advance: Callable[[int], object]) -> Iterator[Tensor]:
    """The pieces as they are, each one reported when it is done with."""
    for piece in pieces:
        yield piece
        advance(piece.nbytes)


def _floats_of(checkpoint: Checkpoint, piece: _Piece) -> Tensor:
    return checkpoint.read(*piece.span).float().view(piece.shape)


def _squares(values: Tensor) -> float:
    """Sum of squares: finite only if every value is, at a fraction of the cost of asking each one."""
    return float(values.flatten().dot(values.flatten()))


def _check_fit(result: Tensor, dtype: torch.dtype, name: str) -> None:
    low, high = result.aminmax()
    limit = torch.finfo(dtype).max
    if not (float(low) >= -limit and float(high) <= limit):  # NaN is neither
        raise EditingError(f"The edited {name} does not fit its type {dtype}.")
