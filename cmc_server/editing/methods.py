"""The methods of ``cmc-server edit`` by name: their options, and how each one edits a tensor's delta parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from cmc_server.config import FrozenModel, build
from cmc_server.editing import bitdelta, dare, expo, magnitude, ties, twin
from cmc_server.errors import ConfigError

#: From the number of a post-trained model to delta parameters of it, in pieces of whole rows, float32.
Deltas = Callable[[int], Iterable[Tensor]]


class Method(FrozenModel):
    """One way to edit delta parameters; the fields are its options."""

    #: How few and how many dimensions a tensor must have; the others stay as in the post-trained model.
    dims: ClassVar[tuple[int, int]] = (0, 99)
    #: What must be known before the first piece can be edited: of each tensor, or of the whole model.
    measures: ClassVar[Literal["nothing", "tensor", "model"]] = "nothing"

    @property
    def whole(self) -> bool:
        """Whether a tensor can only be edited in one piece."""
        return False

    @property
    def draws(self) -> bool:
        """Whether the result depends on the seed."""
        return False

    def measure(self, deltas: Deltas, num_models: int) -> Any:
        """What :meth:`apply` must know of the tensor, or of the model, that ``deltas`` gives."""
        return None

    def measured_rows(self, measured: Any, rows: slice) -> Any:
        """The part of what was measured that belongs to some rows of a tensor."""
        return measured

    def apply(self, deltas: Sequence[Tensor], measured: Any, generator: torch.Generator) -> Tensor:
        """Edit a piece of a tensor.

        Args:
            deltas: its delta parameters in each post-trained model, float32 of one shape.
            measured: what :meth:`measure` gave, for these rows.
            generator: of this tensor; the pieces come in order.

        Returns:
            The edited delta parameters, float32 in that shape.
        """
        raise NotImplementedError


class Dare(Method):
    """Options of :mod:`cmc_server.editing.dare`."""

    drop: float = Field(default=0.9, ge=0, le=dare.MAX_DROP)
    k: float = 0.0

    @property
    def draws(self) -> bool:
        """Masks are random unless nothing is dropped."""
        return self.drop > 0

    def apply(self, deltas: Sequence[Tensor], measured: Any, generator: torch.Generator) -> Tensor:
        """Drop and rescale."""
        return dare.dare(deltas[0], self.drop, generator, self.k)


class Magnitude(Method):
    """Options of :mod:`cmc_server.editing.magnitude`."""

    measures = "tensor"
    drop: float = Field(default=0.9, ge=0, lt=1)

    def measure(self, deltas: Deltas, num_models: int) -> float:
        """The tensor's threshold, which takes two passes over it."""
        return magnitude.pruning_threshold(lambda: deltas(0), self.drop)

    def apply(self, deltas: Sequence[Tensor], measured: Any, generator: torch.Generator) -> Tensor:
        """Prune within the tensor."""
        return magnitude.prune_below(deltas[0], measured)


class BitDelta(Method):
    """Options of :mod:`cmc_server.editing.bitdelta`."""

    dims = (2, 99)
    measures = "tensor"
    levels: int = Field(default=1, ge=1)
    factor: float = Field(default=1.0, gt=0)
    magnitudes: bitdelta.Magnitudes = "mean"
    granularity: bitdelta.Granularity = "tensor"

    @model_validator(mode="after")
    def _one_variant(self) -> BitDelta:
        if self.levels > 1 and self.magnitudes != "mean":
            raise ValueError("magnitudes must be mean where there are several levels")
        return self

    @property
    def draws(self) -> bool:
        """Only the random variants draw."""
        return self.magnitudes != "mean"

    @property
    def is_one_bit(self) -> bool:
        """Whether signs and scales say everything."""
        return self.levels == 1 and self.magnitudes == "mean"

    @property
    def can_be_packed(self) -> bool:
        """Whether few bits for each weight say everything."""
        return self.levels <= bitdelta.MAX_PACKED_LEVELS and self.magnitudes == "mean"

    @property
    def whole(self) -> bool:
        """Levels are told apart by a sort, and random magnitudes drawn beside it."""
        return not self.is_one_bit

    def measure(self, deltas: Deltas, num_models: int) -> Tensor | None:
        """The scales, float32 [rows, ..., 1] or [1, ..., 1]; None for the variants that see the tensor whole."""
        if not self.is_one_bit:
            return None
        if self.granularity == "row":
            return bitdelta.rounded_scales(self.factor * torch.cat([bitdelta.row_means(one) for one in deltas(0)]))
        return self.factor * bitdelta.tensor_mean(deltas(0))

    def measured_rows(self, measured: Any, rows: slice) -> Any:
        """The scales of some rows; a scale of the tensor is everybody's."""
        return measured[rows] if self.is_one_bit and self.granularity == "row" else measured

    def apply(self, deltas: Sequence[Tensor], measured: Any, generator: torch.Generator) -> Tensor:
        """Keep the signs, and the magnitudes that the variant says."""
        if self.magnitudes != "mean":
            return bitdelta.random_magnitudes(deltas[0], self.magnitudes, generator, self.granularity, self.factor)
        if self.levels > 1:
            return bitdelta.multilevel(deltas[0], self.levels, self.granularity, self.factor)
        return bitdelta.bitdelta(deltas[0], measured)


class Twin(Method):
    """Options of :mod:`cmc_server.editing.twin`: a share of singular values to drop, or a rank to keep."""

    dims = (2, 2)
    drop: float = Field(default=0.9, ge=0, lt=1)
    rank: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_of_two(self) -> Twin:
        if {"drop", "rank"} <= self.model_fields_set:
            raise ValueError("give either drop or rank")
        return self

    @property
    def whole(self) -> bool:
        """An SVD is of a whole matrix."""
        return True

    def apply(self, deltas: Sequence[Tensor], measured: Any, generator: torch.Generator) -> Tensor:
        """Truncate the SVD."""
        delta = deltas[0]
        return twin.truncate(delta, self.rank or twin.rank_of_rate(tuple(delta.shape), self.drop))


class Ties(Method):
    """Options of :mod:`cmc_server.editing.ties`. With one model the edit is the trimming alone, times ``factor``."""

    measures = "model"
    drop: float = Field(default=0.8, ge=0, lt=1)
    factor: float = 1.0

    def measure(self, deltas: Deltas, num_models: int) -> tuple[list[float], float]:
        """Every model's threshold, which takes two passes over its delta parameters, and the majority's sign: one."""
        models = range(num_models)
        thresholds = [magnitude.pruning_threshold(partial(deltas, model), self.drop) for model in models]
        if num_models == 1:
            return thresholds, 1.0
        pieces = zip(*(deltas(model) for model in models), strict=True)
        return thresholds, ties.majority_sign(_trimmed(piece, thresholds) for piece in pieces)

    def apply(self, deltas: Sequence[Tensor], measured: Any, generator: torch.Generator) -> Tensor:
        """Trim and, of several models, elect and merge."""
        thresholds, majority = measured
        trimmed = _trimmed(deltas, thresholds)
        return trimmed[0] * self.factor if len(trimmed) == 1 else ties.elect_and_merge(trimmed, self.factor, majority)


def _trimmed(deltas: Sequence[Tensor], thresholds: Sequence[float]) -> list[Tensor]:
    return [magnitude.prune_below(delta, threshold) for delta, threshold in zip(deltas, thresholds, strict=True)]


class Expo(Method):
    """Options of :mod:`cmc_server.editing.expo`."""

    alpha: float = 0.3

    def apply(self, deltas: Sequence[Tensor], measured: Any, generator: torch.Generator) -> Tensor:
        """Extrapolate, or interpolate."""
        return expo.expo(deltas[0], self.alpha)


METHODS: dict[str, type[Method]] = {
    "dare": Dare,
    "magnitude": Magnitude,
    "bitdelta": BitDelta,
    "twin": Twin,
    "ties": Ties,
    "expo": Expo,
}


def build_method(name: str, given: Mapping[str, Any], methods: Mapping[str, type[Method]] = METHODS) -> Method:
    """A method with its options.

    Args:
        name: of ``methods``.
        given: options by name, without those left to their defaults.
        methods: what there is to choose from.

    Raises:
        ConfigError: there is no such method, an option is not one of its own, or a value is out of range.
    """
    if name not in methods:
        raise ConfigError(f"There is no method {name!r}; choose among {', '.join(methods)}.")
    own = methods[name].model_fields
    for option in given:
        if option not in own:
            words = ", ".join(f"--{field}".replace("_", "-") for field in own)
            raise ConfigError(f"--{option.replace('_', '-')} is no option of --method {name}, which has {words}.")
    try:
        return build(methods[name], dict(given))
    except ConfigError as error:
        raise ConfigError(f"--method {name}: {error}") from None
