"""What an edit or a merge reads: checkpoints that agree, and which of their tensors it takes."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from cmc_server.editing.checkpoint import Checkpoint, check_agreement
from cmc_server.editing.methods import Method
from cmc_server.errors import EditingError

#: What output heads are called.
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")


@dataclass(frozen=True)
class Sources:
    """What is read.

    Args:
        base: the model before training; None is zero, so that the delta parameters are the weights themselves.
        posts: the models after it, one or (for methods that merge) more.
        only: patterns of tensors to edit; empty edits all.
        exclude: patterns of tensors to leave alone.
        as_base: whether the output is an edited base, see :attr:`layout`; there must be one.

    Raises:
        EditingError: the checkpoints do not agree, one stores an output head that it ties to its embeddings, or a
            pattern fits no tensor.
    """

    base: Checkpoint | None
    posts: tuple[Checkpoint, ...]
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    as_base: bool = False

    def __post_init__(self) -> None:
        for other in self.checkpoints[1:]:
            check_agreement(self.checkpoints[0], other)
        for checkpoint in self.checkpoints:
            _check_head(checkpoint)
        for pattern in (*self.only, *self.exclude):
            if not any(fnmatchcase(name, pattern) for name in self.post.names):
                raise EditingError(f"No tensor of {self.post.folder} fits the pattern {pattern!r}.")

    @property
    def post(self) -> Checkpoint:
        """The first model after training."""
        return self.posts[0]

    @property
    def layout(self) -> Checkpoint:
        """What the output is like: files, stored types, companions, and all that is not edited are taken from it."""
        assert self.base is not None or not self.as_base
        return self.base if self.as_base and self.base is not None else self.post

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


def _check_head(checkpoint: Checkpoint) -> None:
    """Refuse one matrix under two names, which a random edit would make into two."""
    heads = [name for name in _HEADS if name in checkpoint.names]
    if heads and checkpoint.config.get("tie_word_embeddings"):
        raise EditingError(
            f"{checkpoint.folder} stores {heads[0]} though its config ties the output head to the embeddings; load it "
            "with transformers and save it again (save_pretrained), which leaves that tensor out."
        )
