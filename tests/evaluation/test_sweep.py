"""The advised range by hand, and its place in the manifest."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmc_server.delta.manifest import DeltaManifest
from cmc_server.evaluation.bootstrap import Interval
from cmc_server.evaluation.sweep import SweepPoint, advised_range, write_advised_range


def points(*rows: tuple[float, float, float]) -> list[SweepPoint]:
    """Rows of strength, effect and loss, with narrow intervals."""
    return [
        SweepPoint(strength, Interval(effect, effect - 0.01, effect + 0.01), Interval(loss, loss, loss))
        for strength, effect, loss in rows
    ]


def test_half_of_the_best_effect_within_the_bound() -> None:
    sweep = points((0, 0, 0), (0.25, 0.3, 0), (0.5, 0.5, 0.01), (1, 0.9, 0.05), (1.5, 1.0, 0.3), (2, 1.2, 2))
    # 1.5 and 2 harm; the best of the others is 0.9 at 1, and 0.5 is more than half of it.
    assert advised_range(sweep).range == (0.5, 1)
    assert advised_range(sweep, max_loss=0.5).range == (0.5, 1.5)
    assert advised_range(sweep, max_loss=5).range == (1, 2)
    assert advised_range(list(reversed(sweep))).range == (0.5, 1)


def test_the_range_has_no_holes() -> None:
    sweep = points((0.5, 0.9, 0), (1, 0.1, 0), (1.5, 1, 0), (2, 0.8, 0.2), (3, 0.9, 0))
    assert advised_range(sweep).range == (1.5, 1.5)
    assert "1.5 alone" in advised_range(sweep).reason


def test_no_range_without_an_effect_or_without_harmless_strengths() -> None:
    none = advised_range(points((0, 0, 0), (1, 0.005, 0), (2, -1, 0)))
    assert none.range is None and "interval" in none.reason
    harmful = advised_range(points((0, 0, 0), (1, 5, 0.2)))
    assert harmful.range is None and "0.1 nats" in harmful.reason
    # A negative strength is measured, but never advised.
    assert advised_range(points((-1, 5, 0), (0, 0, 0))).reason == "No strength above 0 was measured."


def test_the_manifest_keeps_everything_else(tmp_path: Path) -> None:
    DeltaManifest(name="d", default_strength=0.7, training={"seed": 3}).write(tmp_path)
    write_advised_range(tmp_path, (0.5, 1.0))
    manifest = DeltaManifest.read(tmp_path)
    assert manifest == DeltaManifest(name="d", default_strength=0.7, training={"seed": 3}, advised_range=(0.5, 1.0))


def test_a_folder_without_manifest_gets_one(tmp_path: Path) -> None:
    write_advised_range(tmp_path, (1.0, 1.0))
    assert DeltaManifest.read(tmp_path).advised_range == pytest.approx((1, 1))
