"""The methods of ``cmc-server edit`` by name: their options, and how each one edits a tensor's delta parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from cmc_server.config import FrozenModel, build
from cmc_server.editing import bitdelta, dare, expo, magnitude, ties, twin
from cmc_server.errors import ConfigError

#: From a tensor's name, its delta parameters in each post-trained model (float32, of one shape) and a generator of
#: its own to the edited delta parameters, float32 in that shape.
Apply = Callable[[str, Sequence[Tensor], torch.Generator], Tensor]
#: From the number of a post-trained model to all delta parameters that are edited, in pieces.
AllDeltas = Callable[[int], Iterator[Tensor]]


class Method(FrozenModel):
    """One way to edit delta parameters; the fields are its options."""

    #: Whether each element is edited by itself, so that a tensor may come in pieces.
    elementwise: ClassVar[bool] = False
    #: How few and how many dimensions a tensor must have; the others stay as in the post-trained model.
    dims: ClassVar[tuple[int, int]] = (0, 99)

    @property
    def draws(self) -> bool:
        """Whether the result depends on the seed."""
        return False

    def prepare(self, deltas: AllDeltas, num_models: int) -> Apply:
        """The edit, after whatever must be known of the whole model."""
        return self.apply

    def apply(self, name: str, deltas: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """Edit one tensor, see :data:`Apply`."""
        raise NotImplementedError


class Dare(Method):
    """Options of :mod:`cmc_server.editing.dare`."""

    elementwise = True
    drop: float = Field(default=0.9, ge=0, lt=1)
    k: float = 0.0

    @property
    def draws(self) -> bool:
        """Masks are random unless nothing is dropped."""
        return self.drop > 0

    def apply(self, name: str, deltas: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """Drop and rescale."""
        return dare.dare(deltas[0], self.drop, generator, self.k)


class Magnitude(Method):
    """Options of :mod:`cmc_server.editing.magnitude`."""

    drop: float = Field(default=0.9, ge=0, lt=1)

    def apply(self, name: str, deltas: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """Prune within the tensor."""
        return magnitude.prune_smallest(deltas[0], self.drop)


class BitDelta(Method):
    """Options of :mod:`cmc_server.editing.bitdelta`."""

    dims = (2, 99)
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

    def scales(self, delta: Tensor) -> Tensor:
        """Scales of one tensor, before any calibration."""
        return bitdelta.mean_scales(delta, self.granularity, self.factor)

    def apply(self, name: str, deltas: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """Keep the signs, and the magnitudes that the variant says."""
        if self.magnitudes != "mean":
            return bitdelta.random_magnitudes(deltas[0], self.magnitudes, generator, self.granularity, self.factor)
        if self.levels > 1:
            return bitdelta.multilevel(deltas[0], self.levels, self.granularity, self.factor)
        return bitdelta.bitdelta(deltas[0], self.scales(deltas[0]))


class Twin(Method):
    """Options of :mod:`cmc_server.editing.twin`. A rank wins over a share of singular values to drop."""

    dims = (2, 2)
    drop: float = Field(default=0.9, ge=0, lt=1)
    rank: int | None = Field(default=None, ge=1)

    def apply(self, name: str, deltas: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """Truncate the SVD."""
        delta = deltas[0]
        return twin.truncate(delta, self.rank or twin.rank_of_rate(tuple(delta.shape), self.drop))


class Ties(Method):
    """Options of :mod:`cmc_server.editing.ties`. With one model the edit is the trimming alone, times ``factor``."""

    elementwise = True
    drop: float = Field(default=0.8, ge=0, lt=1)
    factor: float = 1.0

    def prepare(self, deltas: AllDeltas, num_models: int) -> Apply:
        """Find every model's threshold, which takes two passes over its delta parameters."""
        thresholds = [ties.trim_threshold(deltas(model), deltas(model), self.drop) for model in range(num_models)]
        return partial(self._merge, thresholds)

    def _merge(self, thresholds: list[float], name: str, deltas: Sequence[Tensor], _: torch.Generator) -> Tensor:
        trimmed = [ties.trim(delta, threshold) for delta, threshold in zip(deltas, thresholds, strict=True)]
        return trimmed[0] * self.factor if len(trimmed) == 1 else ties.elect_and_merge(trimmed, self.factor)


class Expo(Method):
    """Options of :mod:`cmc_server.editing.expo`."""

    elementwise = True
    alpha: float = 0.3

    def apply(self, name: str, deltas: Sequence[Tensor], generator: torch.Generator) -> Tensor:
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


def build_method(name: str, given: Mapping[str, Any]) -> Method:
    """A method with its options.

    Args:
        name: of :data:`METHODS`.
        given: options by name, without those left to their defaults.

    Raises:
        ConfigError: there is no such method, an option is not one of its own, or a value is out of range.
    """
    if name not in METHODS:
        raise ConfigError(f"There is no method {name!r}; choose among {', '.join(METHODS)}.")
    own = METHODS[name].model_fields
    for option in given:
        if option not in own:
            raise ConfigError(f"--{option} is no option of --method {name}, which has --{', --'.join(own)}.")
    try:
        return build(METHODS[name], dict(given))
    except ConfigError as error:
        raise ConfigError(f"--method {name}: {error}") from None
