"""An edit as it runs over checkpoints: tensor by tensor, in pieces where the method allows, never all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from cmc_server.editing.checkpoint import Checkpoint, check_agreement
from cmc_server.editing.methods import Apply, Method
from cmc_server.editing.seeds import generator
from cmc_server.editing.shards import StoredTensor, write_shard
from cmc_server.errors import EditingError

#: Elements of a piece: what is worked on then stays in a processor's cache.
PIECE = 1 << 20


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

    def is_edited(self, name: str, method: Method) -> bool:
        """Whether the patterns and the method take a tensor."""
        stored = self.post.stored(name)
        low, high = method.dims
        chosen = not self.only or any(fnmatchcase(name, pattern) for pattern in self.only)
        chosen = chosen and not any(fnmatchcase(name, pattern) for pattern in self.exclude)
        return chosen and stored.dtype.is_floating_point and low <= len(stored.shape) <= high and 0 not in stored.shape

    def read(self, checkpoint: Checkpoint, name: str, start: int, stop: int) -> Tensor:
        """Elements of a tensor as float32, [stop - start].

        Raises:
            EditingError: they hold NaN or infinity.
        """
        values = checkpoint.read(name, start, stop).float()
        if not _is_finite(values):
            raise EditingError(f"{name} of {checkpoint.folder} holds NaN or infinity.")
        return values


@dataclass
class Totals:
    """What an edit did, over all tensors that it took.

    Args:
        tensors: how many were edited; the others were copied.
        elements: their delta parameters.
        kept: of these, how many are not 0 after the edit.
        delta_squared: sum of squares of the delta parameters D = W_post - W_base.
        edit_squared: sum of squares of the edited delta parameters minus D, before rounding to the stored type.
    """

    tensors: int = 0
    elements: int = 0
    kept: int = 0
    delta_squared: float = 0.0
    edit_squared: float = 0.0


class Edit:
    """A method at work on checkpoints.

    Args:
        sources: what is read.
        method: what is done.
        seed: of methods that draw.
        apply: the prepared method; None prepares it, which may read everything.
    """

    def __init__(self, sources: Sources, method: Method, seed: int, apply: Apply | None = None) -> None:
        self.sources, self.method, self.seed = sources, method, seed
        self._apply = apply or method.prepare(self._all_deltas, len(sources.posts))
        self.totals = Totals()

    def tensor(self, name: str) -> Iterator[Tensor]:
        """One tensor of the edited checkpoint: flat pieces in the stored type of the first post-trained model.

        Raises:
            EditingError: a source holds NaN or infinity, or the result does not fit the stored type.
        """
        sources = self.sources
        stored = sources.post.stored(name)
        if not sources.is_edited(name, self.method):
            yield from self._copied(name, stored)
            return
        self.totals.tensors += 1
        draws = generator(self.seed, name)
        for start, stop, shape in self._pieces(stored):
            base, posts = self._read_all(name, start, stop)
            deltas = [(post if base is None else post - base).view(shape) for post in posts]
            edited = self._apply(name, deltas, draws).flatten()
            delta = deltas[0].flatten()
            self._count(delta, edited)
            if base is not None:
                # Where nothing is changed the weight stays as it is, free of the rounding of base + (post - base).
                edited = torch.where(edited == delta, posts[0], base + edited)
            result = edited.to(stored.dtype)
            if not _is_finite(result.float()):
                raise EditingError(f"The edited {name} does not fit its type {stored.dtype}.")
            yield result

    def delta(self, name: str) -> Tensor:
        """All delta parameters of a tensor in the first post-trained model, float32 in its shape."""
        stored = self.sources.post.stored(name)
        base, posts = self._read_all(name, 0, stored.num_elements)
        return (posts[0] if base is None else posts[0] - base).view(stored.shape)

    def edited_names(self) -> list[str]:
        """The tensors that the method takes."""
        return [name for name in self.sources.post.names if self.sources.is_edited(name, self.method)]

    def _copied(self, name: str, stored: StoredTensor) -> Iterator[Tensor]:
        post = self.sources.post
        for start in range(0, stored.num_elements, PIECE):
            piece = post.read(name, start, min(start + PIECE, stored.num_elements))
            if stored.dtype.is_floating_point and not _is_finite(piece.float()):
                raise EditingError(f"{name} of {post.folder} holds NaN or infinity.")
            yield piece

    def _pieces(self, stored: StoredTensor) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        count = stored.num_elements
        if not self.method.elementwise:
            yield 0, count, stored.shape
            return
        for start in range(0, count, PIECE):
            stop = min(start + PIECE, count)
            yield start, stop, (stop - start,)

    def _read_all(self, name: str, start: int, stop: int) -> tuple[Tensor | None, list[Tensor]]:
        sources = self.sources
        base = None if sources.base is None else sources.read(sources.base, name, start, stop)
        return base, [sources.read(post, name, start, stop) for post in sources.posts]

    def _all_deltas(self, model: int) -> Iterator[Tensor]:
        for name in self.edited_names():
            count = self.sources.post.stored(name).num_elements
            for start in range(0, count, PIECE):
                base, posts = self._read_all(name, start, min(start + PIECE, count))
                yield posts[model] if base is None else posts[model] - base

    def _count(self, delta: Tensor, edited: Tensor) -> None:
        self.totals.elements += delta.numel()
        self.totals.kept += int(edited.count_nonzero())
        self.totals.delta_squared += float(delta.dot(delta))
        difference = edited - delta
        self.totals.edit_squared += float(difference.dot(difference))


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


def _is_finite(values: Tensor) -> bool:
    """Whether no element is NaN or infinite. The sum says so at a fraction of the cost, unless it overflows."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())
