"""What ``cmc-server edit`` was asked for, checked before anything is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cmc_server.editing.bitdelta import MAX_PACKED_LEVELS
from cmc_server.editing.methods import METHODS, BitDelta, Method, build_method
from cmc_server.errors import ConfigError

#: Given as BASE: the delta parameters are then the weights themselves.
ZERO = "zero"


@dataclass(frozen=True, kw_only=True)
class EditOptions:
    """Settings of one edit.

    Args:
        base: folder of the model before training, or ``zero``.
        post: folder of the model after training.
        method: of :data:`METHODS`.
        values: options of the method that were given.
        others: further models trained from the same base, which ``ties`` merges with ``post``.
        output: folder to write; None only where nothing is written.
        seed: of methods that draw.
        only: patterns of tensors to edit, all if empty.
        exclude: patterns of tensors to leave as they are in ``post``.
        dry_run: do everything but write.
        force: replace a checkpoint that lies at ``output``.
        packed: store a bit for each weight's sign, and few more for its level; only for BitDelta.
        calibrate: data on which BitDelta's scales are distilled; None leaves them.
        calibration_steps: how many optimiser steps.
        calibration_rate: learning rate, in the scales' own unit.
        analyse: data on which the loss difference is taken apart; None leaves it.
        analyse_examples: how many of the first examples.
        mask_seeds: how many seeds the spread over masks is measured with.

    Raises:
        ConfigError: a value is out of range, or settings do not fit together.
    """

    base: str
    post: Path
    method: str
    values: Mapping[str, Any] = field(default_factory=dict)
    others: tuple[Path, ...] = ()
    output: Path | None = None
    seed: int = 0
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    dry_run: bool = False
    force: bool = False
    packed: bool = False
    calibrate: Path | None = None
    calibration_steps: int = 200
    calibration_rate: float = 1e-4
    analyse: Path | None = None
    analyse_examples: int = 16
    mask_seeds: int = 8

    def __post_init__(self) -> None:
        method = self.build()
        one_bit = isinstance(method, BitDelta) and method.is_one_bit
        can_be_packed = isinstance(method, BitDelta) and method.can_be_packed
        problems = {
            "Give the folder to write with -o, or --dry-run to write nothing.": self.output is None
            and not self.dry_run,
            "--packed stores signs, levels and their scales: --method bitdelta with at most "
            f"{MAX_PACKED_LEVELS} levels and mean magnitudes.": self.packed and not can_be_packed,
            "--calibrate trains the scales of --method bitdelta with 1 level and mean magnitudes.": not one_bit
            and self.calibrate is not None,
            "--with merges further models, which only --method ties does.": bool(self.others) and self.method != "ties",
            "--calibration-steps must be at least 1.": self.calibration_steps < 1,
            "--calibration-rate must be a positive number.": not 0 < self.calibration_rate < math.inf,
            "--analyse-examples must be at least 1.": self.analyse_examples < 1,
            "--mask-seeds must be at least 2.": self.mask_seeds < 2,
        }
        for sentence, wrong in (problems | self._idle(method.draws)).items():
            if wrong:
                raise ConfigError(sentence)

    def _idle(self, draws: bool) -> dict[str, bool]:
        """Settings that would have no effect, told by a value other than the default."""
        calibrated, analysed = self.calibrate is not None, self.analyse is not None
        return {
            "--calibration-steps is for --calibrate.": not calibrated
            and self.calibration_steps != EditOptions.calibration_steps,
            "--calibration-rate is for --calibrate.": not calibrated
            and self.calibration_rate != EditOptions.calibration_rate,
            "--analyse-examples is for --analyse.": not analysed
            and self.analyse_examples != EditOptions.analyse_examples,
            "--mask-seeds is for --analyse of a method that draws.": not (analysed and draws)
            and self.mask_seeds != EditOptions.mask_seeds,
        }

    @property
    def zero_base(self) -> bool:
        """Whether the weights themselves are edited."""
        return self.base == ZERO

    def build(self) -> Method:
        """The method with its options. Without a base, BitDelta has a scale for each row unless told otherwise."""
        values = dict(self.values)
        if self.zero_base and self.method == "bitdelta":
            values = {"granularity": "row"} | values
        return build_method(self.method, values)

    @staticmethod
    def method_options() -> set[str]:
        """The names of all options of all methods."""
        return {option for method in METHODS.values() for option in method.model_fields}
