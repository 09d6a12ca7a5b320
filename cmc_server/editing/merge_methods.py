"""The methods of ``cmc-server merge`` by name: options, what must be measured, and how each one merges a piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from cmc_server.editing import fisher_averaging, gradient_matching, regmean, task_arithmetic
from cmc_server.editing.curvature import CurvatureFile, Kind
from cmc_server.editing.methods import Method, Ties
from cmc_server.errors import EditingError


@dataclass
class Guard:
    """How many weights the guard of a removal touched, over all tensors."""

    num_clamped: int = 0


@dataclass(frozen=True)
class Curvatures:
    """What is known of a tensor, or of some rows of it.

    Args:
        name: of the tensor.
        shape: of these rows.
        models: curvature files of the models to merge.
        base: of the base, if there is one.
        guard: counts.
        start: index of the first element of these rows.
    """

    name: str
    shape: tuple[int, ...]
    models: tuple[CurvatureFile, ...]
    base: CurvatureFile | None = None
    guard: Guard = field(default_factory=Guard)
    start: int = 0

    def rows(self, rows: slice) -> Curvatures:
        """The part that belongs to some rows."""
        if rows == slice(None):
            return self
        shape = (rows.stop - rows.start, *self.shape[1:])
        start = rows.start * torch.Size(self.shape[1:]).numel()
        return Curvatures(self.name, shape, self.models, self.base, self.guard, start)

    def read(self, file: CurvatureFile) -> Tensor:
        """The Fisher of these rows in one file, float32 in their shape."""
        stop = self.start + torch.Size(self.shape).numel()
        return file.read(self.name, self.start, stop).view(self.shape)


class MergeMethod(Method):
    """A method with a weight for each model."""

    #: The kind of curvature that every model must have; None needs none.
    needs: ClassVar[Kind | None] = None
    #: Whether weights may be negative, so that models can be removed.
    removes: ClassVar[bool] = False
    weights: tuple[float, ...]

    def measured_rows(self, measured: Any, rows: slice) -> Any:
        """The curvatures of some rows."""
        return None if measured is None else measured.rows(rows)


Positive = tuple[Annotated[float, Field(gt=0)], ...]


class TaskArithmetic(MergeMethod):
    """Options of :mod:`cmc_server.editing.task_arithmetic`."""

    removes = True

    def apply(self, deltas: Sequence[Tensor], measured: Any, generator: torch.Generator) -> Tensor:
        """Add up."""
        return task_arithmetic.task_arithmetic(deltas, self.weights)


class FisherAveraging(MergeMethod):
    """Options of :mod:`cmc_server.editing.fisher_averaging`."""

    needs = "fisher"
    weights: Positive
    damping: float = Field(default=1e-12, gt=0)

    def apply(self, deltas: Sequence[Tensor], measured: Any, generator: torch.Generator) -> Tensor:
        """Average by Fisher."""
        fishers = [measured.read(file) for file in measured.models]
        return fisher_averaging.fisher_average(deltas, fishers, self.weights, self.damping)


class RegMean(MergeMethod):
    """Options of :mod:`cmc_server.editing.regmean`. What is no linear layer is averaged plainly."""

    needs = "gram"
    weights: Positive
    off_diagonal: float = Field(default=0.9, ge=0, le=1)

    @property
    def whole(self) -> bool:
        """A regression is of a whole layer."""
        return True

    def apply(self, deltas: Sequence[Tensor], measured: Any, generator: torch.Generator) -> Tensor:
        """Solve the regression, or average."""
        if any(measured.name not in file for file in measured.models):
            return task_arithmetic.task_arithmetic(deltas, [weight / sum(self.weights) for weight in self.weights])
        size = measured.shape[-1]
        grams = [file.read(measured.name).view(size, size) for file in measured.models]
        try:
            return regmean.regmean(deltas, grams, self.weights, self.off_diagonal)
        except ValueError:
            raise EditingError(
                f"The Gram matrices of {measured.name} are singular; give --off-diagonal below {self.off_diagonal}."
            ) from None


class GradientMatching(MergeMethod):
    """Options of :mod:`cmc_server.editing.gradient_matching`.

    ``damping`` is added to the base's Hessian: without a curvature file of the base it is all there is of it. Weights
    that no data touch have nothing else, and get the sum of their delta parameters.
    """

    needs = "fisher"
    removes = True
    damping: float = Field(default=1e-12, gt=0)
    floor: float = Field(default=0.1, gt=0, lt=1)

    def apply(self, deltas: Sequence[Tensor], measured: Any, generator: torch.Generator) -> Tensor:
        """Match gradients, with the guard where models are removed."""
        hessians = [measured.read(file) for file in measured.models]
        base = torch.zeros_like(deltas[0]) if measured.base is None else measured.read(measured.base)
        base += self.damping
        hessians, num_clamped = gradient_matching.guarded(hessians, self.weights, base, self.floor)
        measured.guard.num_clamped += num_clamped
        try:
            return gradient_matching.gradient_matching(deltas, hessians, self.weights, base)
        except ValueError:
            raise EditingError(
                f"The weighted curvatures of {measured.name} leave float32's range; give --weights nearer to 0."
            ) from None


MERGE_METHODS: dict[str, type[Method]] = {
    "task-arithmetic": TaskArithmetic,
    "ties": Ties,
    "fisher": FisherAveraging,
    "regmean": RegMean,
    "gradient-matching": GradientMatching,
}
