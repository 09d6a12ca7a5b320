"""What ``cmc-server eval`` was asked for, checked before anything slow begins."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cmc_server.config import DeltaSource
from cmc_server.errors import ConfigError
from cmc_server.evaluation.prompts import PACKAGED_PROMPTS
from cmc_server.evaluation.sweep import EFFECTS, MAX_LOSS
from cmc_server.evaluation.tofu_data import FORGET_SPLITS, PACKAGED_TOFU

#: Every suite, in the order of the report.
SUITES = ("tofu", "sweep", "retained", "alpaca", "coverage", "shift")
#: What runs if nothing is chosen: all that needs no further files.
DEFAULT_SUITES = ("retained", "alpaca", "coverage")
DEFAULT_STRENGTHS = (0.0, 0.5, 1.0, 1.5)
#: The suites that heed a setting, of those settings that not every suite heeds.
_HEEDED_BY = {
    "prompts": ("alpaca", "sweep", "coverage", "shift"),
    "tofu": ("tofu", "sweep"),
    "forget": ("tofu", "sweep"),
    "effect": ("sweep",),
    "max_loss": ("sweep",),
    "tuned": ("shift",),
    "other": ("shift",),
    "max_tokens": ("alpaca", "sweep", "shift"),
}


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Settings of one evaluation.

    Args:
        user: folder or hub id of the user LLM.
        deltas: the deltas; the first one is under study, the others keep their own strength. None is the bare LLM.
        suites: of :data:`SUITES`; ``sweep`` brings ``retained`` along.
        strengths: of the delta under study; 0, the base, is always added. Empty is 0 and the delta's own strength
            where the caller gave one, else :data:`DEFAULT_STRENGTHS`.
        prompts: file of prompts for ``alpaca`` and ``sweep``; None is the packaged one.
        tofu: folder with TOFU's files.
        forget: which forget set.
        retain_only: results of a retain-only model, for the forget quality.
        effect: what the sweep measures, of :data:`EFFECTS`; None is ``forget`` for deltas that were trained to
            forget, and ``target`` otherwise.
        max_loss: retained-ability loss that the advised range allows, in nats per token.
        write_manifest: write the advised range into the manifest of the delta under study.
        tuned: fine-tuned copy of the user LLM, which ``shift`` compares the delta with.
        other: base and tuned LLM of another vocabulary, which ``shift`` compares instead of the delta.
        output: folder for everything that is written.
        limit: only so many questions, prompts and texts of each kind.
        max_tokens: longest greedy answer of ``alpaca``, ``sweep`` and ``shift``.
        batch_size: sequences at once.
        dtype: computing type.
        device: of torch.
        seed: of the bootstrap.

    Raises:
        ConfigError: a value is out of range, or settings do not fit together.
    """

    user: str
    deltas: tuple[DeltaSource, ...]
    suites: tuple[str, ...] = DEFAULT_SUITES
    strengths: tuple[float, ...] = ()
    prompts: Path | None = None
    tofu: Path = PACKAGED_TOFU
    forget: str = FORGET_SPLITS[0]
    retain_only: Path | None = None
    effect: str | None = None
    max_loss: float = MAX_LOSS
    write_manifest: bool = False
    tuned: str | None = None
    other: tuple[str, str] | None = None
    output: Path = Path("cmc-eval")
    limit: int | None = None
    max_tokens: int = 128
    batch_size: int = 32
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        names = [delta.name for delta in self.deltas]
        unknown = [suite for suite in self.suites if suite not in SUITES]
        problems = {
            "--suite sweep, coverage and shift need a --delta NAME=PATH.": not names
            and bool({"sweep", "coverage", "shift"} & set(self.suites)),
            "Two deltas have the same name; give each --delta its own.": len(set(names)) < len(names),
            f"There is no suite {unknown[0] if unknown else ''!r}; choose among {', '.join(SUITES)}.": bool(unknown),
            "--strengths must be finite numbers.": not all(math.isfinite(strength) for strength in self.strengths),
            "--limit must be at least 1.": self.limit is not None and self.limit < 1,
            "--max-tokens must be at least 1.": self.max_tokens < 1,
            "--batch-size must be at least 1.": self.batch_size < 1,
            "--max-loss must be a finite number of at least 0.": not 0 <= self.max_loss < math.inf,
            f"--forget must be one of {', '.join(FORGET_SPLITS)}.": self.forget not in FORGET_SPLITS,
            f"--effect must be one of {', '.join(EFFECTS)}.": self.effect not in (None, *EFFECTS),
            "--dtype must be float32 or bfloat16.": self.dtype not in ("float32", "bfloat16"),
            "--write-manifest needs --suite sweep, which computes the advised range.": self.write_manifest
            and "sweep" not in self.suites,
            "--retain-only needs --suite tofu.": self.retain_only is not None and "tofu" not in self.suites,
            "--suite shift needs --tuned, a fine-tuned copy of the user LLM.": "shift" in self.suites
            and self.tuned is None,
            f"--output {self.output} is a file; give a folder.": self.output.exists() and not self.output.is_dir(),
        }
        for sentence, wrong in problems.items():
            if wrong:
                raise ConfigError(sentence)

    @property
    def measured_strengths(self) -> list[float]:
        """0 first, since everything is compared with it, then the others, rising. Without a delta only 0."""
        if not self.deltas:
            return [0.0]
        own = self.deltas[0].strength
        return [0.0, *sorted({*(self.strengths or (DEFAULT_STRENGTHS if own is None else (own,)))} - {0.0})]

    @property
    def idle(self) -> list[str]:
        """A sentence for each setting that was changed and that no chosen suite heeds."""
        return [
            f"--{name.replace('_', '-')} changes nothing, since it is for --suite {' or '.join(suites)}."
            for name, suites in _HEEDED_BY.items()
            if getattr(self, name) != getattr(EvalOptions, name) and not set(suites) & set(self.suites)
        ]

    @property
    def prompts_file(self) -> Path:
        """The file of prompts, the packaged one unless another was given."""
        return self.prompts or PACKAGED_PROMPTS
