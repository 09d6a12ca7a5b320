"""What ``cmc-server merge`` was asked for, checked before anything is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cmc_server.editing.edit_options import ZERO
from cmc_server.editing.merge_methods import MERGE_METHODS, GradientMatching, MergeMethod, TaskArithmetic
from cmc_server.editing.methods import Method, Ties, build_method
from cmc_server.errors import ConfigError

#: What can be added to curvatures: so little or so much that times a delta parameter it still is a float32.
DAMPING = (1e-30, 1e30)
#: Least share that a removal can leave of a curvature: rounding in float32 takes some 1e-7.
FLOOR = 1e-6


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Settings of one merge.

    Args:
        base: folder of the model that the others were trained from, or ``zero``.
        models: their folders.
        method: of :data:`MERGE_METHODS`.
        values: options of the method that were given; ``weights`` among them, one for each model, all 1 by default.
        curvature: a file for each model, for methods that need it.
        base_curvature: a file for the base; only for gradient matching.
        remove: take the models' training out of the base.
        output: folder to write; None only where nothing is written.
        dry_run: do everything but write.
        force: replace a checkpoint that lies at ``output``.
        against: a jointly trained model that the merged one is compared with.
        data: the models' data, a file for each, for what needs a loss.
        alphas: factors on all weights, for which losses are measured.

    Raises:
        ConfigError: a value is out of range, or settings do not fit together.
    """

    base: str
    models: tuple[Path, ...]
    method: str
    values: Mapping[str, Any] = field(default_factory=dict)
    curvature: tuple[Path, ...] = ()
    base_curvature: Path | None = None
    remove: bool = False
    output: Path | None = None
    dry_run: bool = False
    force: bool = False
    against: Path | None = None
    data: tuple[Path, ...] = ()
    alphas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        method, num_models = self.build(), len(self.models)
        removes, needs = getattr(method, "removes", False), getattr(method, "needs", None)
        num_weights = len(self.values.get("weights", self.models))
        problems = {
            "Give the folder to write with -o, or --dry-run to write nothing.": self.output is None
            and not self.dry_run,
            f"--weights has {num_weights} numbers for {num_models} models.": num_weights != num_models,
            "--remove takes training out of BASE, which must be a folder then, not zero.": self.remove
            and self.zero_base,
            "--method task-arithmetic with BASE zero adds whole weights up; give --weights.": self.zero_base
            and isinstance(method, TaskArithmetic)
            and "weights" not in self.values,
            f"--method {self.method} reads no --curvature.": bool(self.curvature) and needs is None,
            f"--method {self.method} needs --curvature, a {needs} file for each of the {num_models} models (cmc-server "
            f"merge measure makes them), and was given {len(self.curvature)}.": needs is not None
            and len(self.curvature) != num_models,
            "--alphas measures losses: give --data too, a file for each model.": bool(self.alphas) and not self.data,
            f"--data has {len(self.data)} files for {num_models} models.": len(self.data) not in (0, num_models),
            "--alphas must be finite numbers.": not all(math.isfinite(alpha) for alpha in self.alphas),
            f"--alphas multiplies the weights, on which --method {self.method} does not depend.": bool(self.alphas)
            and not removes
            and not isinstance(method, Ties),
        }
        problems |= self._base_problems(isinstance(method, GradientMatching)) | self._curvature_problems(method)
        for sentence, wrong in problems.items():
            if wrong:
                raise ConfigError(sentence)

    def _base_problems(self, matching: bool) -> dict[str, bool]:
        given = self.base_curvature is not None
        return {
            "--base-curvature is for --method gradient-matching.": given and not matching,
            "--base-curvature is of a BASE that is a folder, not zero.": given and self.zero_base,
            "--method gradient-matching needs --base-curvature, or --damping as the curvature of BASE.": matching
            and not given
            and "damping" not in self.values,
        }

    def _curvature_problems(self, method: Method) -> dict[str, bool]:
        low, high = DAMPING
        alphas, weights = (1.0, *self.alphas), getattr(method, "weights", ())
        negative = any(alpha * weight < 0 for alpha in alphas for weight in weights)
        return {
            f"--damping must lie in [{low:g}, {high:g}], where products in float32 are exact enough.": not low
            <= getattr(method, "damping", low)
            <= high,
            f"--floor must be at least {FLOOR:g}; float32 cannot tell a smaller share from 0.": getattr(
                method, "floor", FLOOR
            )
            < FLOOR,
            "--floor is for removals: --remove, or negative --weights or --alphas.": "floor" in self.values
            and not negative,
        }

    @property
    def zero_base(self) -> bool:
        """Whether whole weights are merged."""
        return self.base == ZERO

    def build(self, alpha: float = 1.0) -> Method:
        """The method with its options.

        Args:
            alpha: factor on all weights, or on the result of TIES.
        """
        values, kind = dict(self.values), MERGE_METHODS.get(self.method, Method)
        if self.remove and kind is not Method and not getattr(kind, "removes", False):
            raise ConfigError(f"--method {self.method} has no --remove; task-arithmetic and gradient-matching have.")
        if issubclass(kind, MergeMethod):
            weights = values.get("weights", [1.0] * len(self.models))
            if self.remove and any(weight <= 0 for weight in weights):
                raise ConfigError("--remove makes all weights negative; give --weights above 0.")
            sign = -1.0 if self.remove else 1.0
            values["weights"] = tuple(sign * alpha * weight for weight in weights)
        elif alpha != 1:
            values["factor"] = alpha * values.get("factor", 1.0)
        return build_method(self.method, values, MERGE_METHODS)

    @staticmethod
    def method_options() -> set[str]:
        """The names of all options of all methods."""
        return {option for method in MERGE_METHODS.values() for option in method.model_fields}
