"""A strength sweep: effect against harm, and the range of strengths that it advises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cmc_server.delta.manifest import DeltaManifest
from cmc_server.errors import ConfigError
from cmc_server.evaluation.bootstrap import Interval

#: What a delta is measured by, with its meaning in words.
EFFECTS: Mapping[str, str] = {
    "target": "gain in the log-probability per token of the reference answers over the base, in nats",
    "forget": "fall of the mean probability of the answers of the forget set below the base",
    "length": "mean shortening of the greedy answers against the base, in tokens",
}
#: Objectives that are judged by what is forgotten.
UNLEARNING = frozenset({"grad_ascent", "grad_diff", "kl_retain", "npo", "idk", "dpo"})
#: Retained-ability loss that the advised range allows, in nats per token (perplexity times 1.11).
MAX_LOSS = 0.1
#: Share of the best effect that the advised range asks for.
_ENOUGH = 0.5


@dataclass(frozen=True)
class SweepPoint:
    """One strength.

    Args:
        strength: of the delta under study.
        effect: see :data:`EFFECTS`; above 0 is wanted.
        loss: rise of the NLL per token on neutral texts over the base, in nats.
    """

    strength: float
    effect: Interval
    loss: Interval


@dataclass(frozen=True)
class Advice:
    """The advised range, or why there is none.

    Args:
        range: lowest and highest advised strength among those measured.
        reason: one sentence for people.
    """

    range: tuple[float, float] | None
    reason: str


def advised_range(points: Sequence[SweepPoint], max_loss: float = MAX_LOSS) -> Advice:
    """The measured strengths at which a delta does enough and harms little.

    A strength s > 0 is harmless if its mean loss is at most ``max_loss``. The best strength is the harmless one with
    the largest mean effect; that effect's interval must lie above 0. The range is the longest run of neighbouring
    measured strengths around the best one that are harmless and have at least half of its effect.

    Args:
        points: one per measured strength, in any order.
        max_loss: in nats per token.
    """
    ordered = sorted((point for point in points if point.strength > 0), key=lambda point: point.strength)
    if not ordered:
        return Advice(None, "No strength above 0 was measured.")
    harmless = [point for point in ordered if point.loss.mean <= max_loss]
    if not harmless:
        return Advice(None, f"At every measured strength neutral texts lose more than {max_loss:g} nats per token.")
    best = max(harmless, key=lambda point: point.effect.mean)
    if best.effect.low <= 0:
        return Advice(None, "At no harmless strength does the interval of the effect lie above 0.")
    good = [point.loss.mean <= max_loss and point.effect.mean >= _ENOUGH * best.effect.mean for point in ordered]
    first = last = ordered.index(best)
    while first > 0 and good[first - 1]:
        first -= 1
    while last + 1 < len(ordered) and good[last + 1]:
        last += 1
    low, high = ordered[first].strength, ordered[last].strength
    where = f"{low:g} to {high:g}" if low < high else f"{low:g} alone"
    return Advice(
        (low, high),
        f"Advised strength: {where}. There the effect is at least half of the best that harms little (at "
        f"{best.strength:g}), and neutral texts lose at most {max_loss:g} nats per token.",
    )


def write_advised_range(folder: Path, advised: tuple[float, float]) -> None:
    """Set ``advised_range`` in a delta folder's manifest, which gives the delta a new content version.

    Raises:
        ConfigError: the manifest cannot be written.
        DeltaError: the folder's manifest is invalid.
    """
    manifest = DeltaManifest.read(folder).model_copy(update={"advised_range": advised})
    try:
        manifest.write(folder)
    except OSError as error:
        raise ConfigError(f"The manifest in {folder} cannot be written: {error.strerror}.") from None
