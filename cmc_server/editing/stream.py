"""An edit as it runs over checkpoints: tensor by tensor, in pieces where the method allows, never all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmc_server.editing.checkpoint import Checkpoint, check_agreement
from cmc_server.editing.methods import Method
from cmc_server.editing.seeds import generator
from cmc_server.editing.shards import StoredTensor, write_shard
from cmc_server.errors import EditingError

#: Elements of a piece, if rows are no longer: what is worked on then stays in a processor's cache.
PIECE = 1 << 17


@dataclass(frozen=True)
class Sources:
    """What is read.

    Args:
        base: the model before training; None is zero, so that the delta parameters are the weights themselves.
        posts: the models after it, one or (for methods that merge) more. What is not edited is taken from the first,
            and so are layout, stored types and companions of the output.
        only: patterns of tensors to edit; empty edits all.
        exclude: patterns of tensors to leave alone.

    Raises:
        EditingError: the checkpoints do not agree, or a pattern fits no tensor.
    """

    base: Checkpoint | None
    posts: tuple[Checkpoint, ...]
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for other in self.checkpoints[1:]:
            check_agreement(self.checkpoints[0], other)
        for pattern in (*self.only, *self.exclude):
            if not any(fnmatchcase(name, pattern) for name in self.post.names):
                raise EditingError(f"No tensor of {self.post.folder} fits the pattern {pattern!r}.")

    @property
    def post(self) -> Checkpoint:
        """The first model after training."""
        return self.posts[0]

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Everything that is read, the base first."""
        return [*([] if self.base is None else [self.base]), *self.posts]

    def is_chosen(self, name: str) -> bool:
        """Whether the patterns take a tensor."""
        chosen = not self.only or any(fnmatchcase(name, pattern) for pattern in self.only)
        return chosen and not any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def is_edited(self, name: str, method: Method) -> bool:
        """Whether the patterns and the method take a tensor."""
        stored = self.post.stored(name)
        low, high = method.dims
        fits = low <= len(stored.shape) <= high and 0 not in stored.shape
        return self.is_chosen(name) and stored.dtype.is_floating_point and fits


@dataclass(frozen=True)
class _Piece:
    """Rows of a tensor, as they lie in the file."""

    rows: slice
    start: int
    stop: int
    shape: tuple[int, ...]


def _pieces(stored: StoredTensor, whole: bool) -> Iterator[_Piece]:
    if whole or not stored.shape:
        yield _Piece(slice(None), 0, stored.num_elements, stored.shape)
        return
    num_rows = stored.shape[0]
    row = stored.num_elements // max(1, num_rows)
    step = max(1, PIECE // max(1, row))
    for first in range(0, num_rows, step):
        last = min(first + step, num_rows)
        yield _Piece(slice(first, last), first * row, last * row, (last - first, *stored.shape[1:]))


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
    """

    def __init__(self, sources: Sources, method: Method, seed: int, measured: Mapping[str, Any] | None = None) -> None:
        self.sources, self.method, self.seed = sources, method, seed
        self.totals = Totals()
        self._measured = dict(measured or {})
        if method.measures == "model":
            names = self.edited_names()
            every = method.measure(lambda model: self._deltas(names, model), len(sources.posts))
            self._measured |= dict.fromkeys(names, every)

    def edited_names(self) -> list[str]:
        """The tensors that the method takes."""
        return [name for name in self.sources.post.names if self.sources.is_edited(name, self.method)]

    def measure(self, name: str) -> Any:
        """What the method must know of a tensor before it edits it."""
        if name in self._measured or self.method.measures == "nothing":
            return self._measured.get(name)
        return self.method.measure(lambda model: self._deltas([name], model), len(self.sources.posts))

    def tensor(self, name: str) -> Iterator[Tensor]:
        """One tensor of the edited checkpoint: flat pieces in the stored type of the first post-trained model.

        Raises:
            EditingError: a source holds NaN or infinity, or the result does not fit the stored type.
        """
        stored = self.sources.post.stored(name)
        if not self.sources.is_edited(name, self.method):
            yield from self._copied(name, stored)
            return
        self.totals.tensors += 1
        measured, draws = self.measure(name), generator(self.seed, name)
        for piece in _pieces(stored, self.method.whole):
            posts, deltas = self._read(name, piece)
            squares = [_squares(delta) for delta in deltas]
            if not all(square.isfinite() for square in squares):
                self._refuse_unless_finite(name, piece)
            edited = self.method.apply(deltas, self.method.measured_rows(measured, piece.rows), draws)
            self.totals.elements += edited.numel()
            self.totals.squares_before += float(squares[0])
            self.totals.squares_after += float(_squares(edited))
            # As W_post + E: where nothing changes, not a bit does.
            result = edited if self.sources.base is None else edited.sub(deltas[0]).add_(posts[0])
            yield _stored(result, stored.dtype, name).flatten()

    def delta(self, name: str) -> Tensor:
        """All delta parameters of a tensor in the first post-trained model, float32 in its shape."""
        return self._read(name, next(_pieces(self.sources.post.stored(name), True)))[1][0]

    def deltas(self, name: str) -> Iterator[Tensor]:
        """The same in pieces along the first axis."""
        return self._deltas([name], 0)

    def _deltas(self, names: Iterable[str], model: int) -> Iterator[Tensor]:
        for name in names:
            for piece in _pieces(self.sources.post.stored(name), False):
                yield self._read(name, piece)[1][model]

    def _read(self, name: str, piece: _Piece) -> tuple[list[Tensor], list[Tensor]]:
        """A piece of the post-trained models' weights and of their delta parameters, float32."""
        posts = [post.read(name, piece.start, piece.stop).float().view(piece.shape) for post in self.sources.posts]
        if self.sources.base is None:
            return posts, posts
        base = self.sources.base.read(name, piece.start, piece.stop).float().view(piece.shape)
        return posts, [post - base for post in posts]

    def _refuse_unless_finite(self, name: str, piece: _Piece) -> None:
        for checkpoint in self.sources.checkpoints:
            checkpoint.check_finite(name, piece.start, piece.stop)

    def _copied(self, name: str, stored: StoredTensor) -> Iterator[Tensor]:
        post = self.sources.post
        for piece in _pieces(stored, False):
            values = post.read(name, piece.start, piece.stop)
            if stored.dtype.is_floating_point and not bool(values.float().isfinite().all()):
                raise EditingError(f"{name} of {post.folder} holds NaN or infinity.")
            yield values


def write_edited(edit: Edit, folder: Path, advance: Callable[[int], object]) -> None:
    """Write the edited weights in the files and the layout of the first post-trained model.

    Args:
        edit: what to write.
        folder: exists; the index is not written.
        advance: called with the bytes of each piece, for a progress bar.
    """
    for shard in edit.sources.post.shards:
        pieces = (piece for name in shard.tensors for piece in told(edit.tensor(name), advance))
        write_shard(folder / shard.path.name, shard.header, pieces)


def told(pieces: Iterator[Tensor], advance: Callable[[int], object]) -> Iterator[Tensor]:
    """The pieces as they are, each one reported when it is done with."""
    for piece in pieces:
        yield piece
        advance(piece.nbytes)


def _squares(values: Tensor) -> Tensor:
    """Sum of squares: finite only if every value is, at a fraction of the cost of asking each one."""
    return values.flatten().dot(values.flatten())


def _stored(result: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    low, high = result.aminmax()
    limit = torch.finfo(dtype).max
    if not (float(low) >= -limit and float(high) <= limit):  # NaN is neither
        raise EditingError(f"The edited {name} does not fit its type {dtype}.")
    return result.to(dtype)
