"""What an edit or a merge reads: checkpoints that agree, and which of their tensors it takes."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from cmc_server.editing.checkpoint import Checkpoint, check_agreement
from cmc_server.editing.methods import Method
from cmc_server.errors import EditingError


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
