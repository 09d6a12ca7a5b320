"""What ``cmc-server sparsify`` was asked for, checked before anything is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from cmc_server.config import build
from cmc_server.editing.masks import Pattern
from cmc_server.editing.pruning import BLIND, PRUNERS, PruningMethod
from cmc_server.editing.sparse_tuning import Tuning, TuningMethod
from cmc_server.errors import ConfigError

Allocation = Literal["uniform", "cka"]
#: Rounds of pruning and tuning, if there is any tuning.
ROUNDS = 5
#: Options of adapters that are smaller than what they change.
SIZED = frozenset({"rank", "budget", "scale"})


@dataclass(frozen=True, kw_only=True)
class SparsifyOptions:
    """Settings of one run.

    Args:
        model: folder of a causal language model.
        method: of :data:`PRUNERS`.
        sparsity: share of the weights of linear layers that go, in [0, 1); None with a pattern.
        pattern: ``N:M`` instead.
        calibrate: texts that the layers' inputs are taken from; not needed for magnitudes.
        sequences: how many at most.
        length: their tokens at most; None is 2048, or what the model takes.
        allocation: one sparsity for all blocks, or more for blocks that are more redundant by CKA.
        spread: how far a block's sparsity may lie from the mean; None is LoSA's value for the sparsity.
        beta: how much redundancy counts.
        tuning: how the pruned model is tuned.
        tuning_data: texts for that.
        values: options of :class:`Tuning` that were given.
        iterations: rounds of pruning and tuning, each sparser; None is 5, or 1 without tuning.
        heldout: texts that the dense, the pruned and the tuned model are measured on.
        only: patterns of tensors to prune, all linear layers of the blocks if empty.
        exclude: patterns of tensors to leave dense.
        seed: of whatever is drawn.
        output: folder to write; None only where nothing is written.
        dry_run: do everything but write.
        force: replace a checkpoint that lies at ``output``.

    Raises:
        ConfigError: a value is out of range, or settings do not fit together.
    """

    model: Path
    method: PruningMethod = "wanda"
    sparsity: float | None = None
    pattern: str | None = None
    calibrate: Path | None = None
    sequences: int = 128
    length: int | None = None
    allocation: Allocation = "uniform"
    spread: float | None = None
    beta: float = 1.0
    tuning: TuningMethod = "none"
    tuning_data: Path | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    iterations: int | None = None
    heldout: Path | None = None
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    seed: int = 0
    output: Path | None = None
    dry_run: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("method", tuple(PRUNERS)), ("allocation", get_args(Allocation))):
            self._check_choice(name, choices)
        self._check_choice("tuning", get_args(TuningMethod))
        tunes = self.tuning != "none"
        problems = {
            "Give the folder to write with -o, or --dry-run to write nothing.": self.output is None
            and not self.dry_run,
            "Give --sparsity, a share, or --pattern, such as 2:4; not both.": (self.sparsity is None)
            == (self.pattern is None),
            f"--sparsity must lie in [0, 1), not {self.sparsity}.": self.sparsity is not None
            and not 0 <= self.sparsity < 1,
            f"--method {self.method} needs --calibrate, texts that the layers' inputs are taken from.": self.method
            not in BLIND
            and self.calibrate is None,
            "--sequences must be at least 1.": self.sequences < 1,
            "--length must be at least 1.": self.length is not None and self.length < 1,
            "--tuning needs --tuning-data.": tunes and self.tuning_data is None,
            "--tuning-data is for --tuning.": not tunes and self.tuning_data is not None,
            "--iterations must be at least 1.": self.iterations is not None and self.iterations < 1,
            "--iterations prunes and tunes in turn; give --tuning.": not tunes and (self.iterations or 1) > 1,
        }
        for sentence, wrong in (problems | self._allocation_problems() | self._idle()).items():
            if wrong:
                raise ConfigError(sentence)
        self._check_tuning_options(tunes)
        self.build_pattern()

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
            raise ConfigError(f"--{name} must be {listed}, not {getattr(self, name)}.")

    def _idle(self) -> dict[str, bool]:
        """Settings that would have no effect, told by a value other than the default."""
        calibrated = self.calibrate is not None
        return {
            "--sequences is for --calibrate.": not calibrated and self.sequences != SparsifyOptions.sequences,
            "--length is for --calibrate.": not calibrated and self.length is not None,
            "--beta is for --allocation cka.": self.allocation != "cka" and self.beta != SparsifyOptions.beta,
        }

    def _allocation_problems(self) -> dict[str, bool]:
        by_cka = self.allocation == "cka"
        return {
            "--allocation cka needs --calibrate with at least 2 --sequences.": by_cka
            and (self.calibrate is None or self.sequences < 2),
            "--allocation cka chooses sparsities, which a --pattern fixes.": by_cka and self.pattern is not None,
            "--spread is for --allocation cka.": self.spread is not None and not by_cka,
            "--spread must lie in [0, 1].": self.spread is not None and not 0 <= self.spread <= 1,
            "--beta must be a finite number.": not math.isfinite(self.beta),
        }

    def _check_tuning_options(self, tunes: bool) -> None:
        for name in sorted(self.values):
            if not tunes or (self.tuning == "oracle" and name in SIZED):
                other = "--tuning" if not tunes else "adapters, which --tuning oracle has none of"
                raise ConfigError(f"--{name.replace('_', '-')} is for {other}.")
        by_loss = self.build_tuning().budget == "loss" and tunes and self.tuning != "oracle"
        if by_loss and self.calibrate is None:
            raise ConfigError("--budget loss needs --calibrate, texts to measure losses on; or --budget uniform.")

    @property
    def num_rounds(self) -> int:
        """How often the model is pruned."""
        return self.iterations or (1 if self.tuning == "none" else ROUNDS)

    @property
    def final_sparsity(self) -> float:
        """Share of the weights that go in the end."""
        pattern = self.build_pattern()
        return pattern.sparsity if pattern is not None else self.sparsity or 0.0

    def build_pattern(self) -> Pattern | None:
        """The pattern, if there is one."""
        return None if self.pattern is None else Pattern.parse(self.pattern)

    def build_tuning(self) -> Tuning:
        """How to tune."""
        return build(Tuning, dict(self.values))

    @staticmethod
    def tuning_options() -> set[str]:
        """The names of the options of :class:`Tuning`."""
        return set(Tuning.model_fields)
