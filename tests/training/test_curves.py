"""The picture of the losses."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from cmc_server.training.curves import draw_losses


def height(path: Path) -> int:
    """Of a PNG, from its header."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return int(struct.unpack(">I", data[20:24])[0])


def test_each_term_has_a_panel_of_its_own(tmp_path: Path) -> None:
    plain: list[dict[str, Any]] = [
        {"epoch": 0.5, "loss": 2.0},
        {"epoch": 1.0, "eval_loss": 1.8},
        {"epoch": 1.0, "loss": 1.5, "train_runtime": 3.0},
    ]
    terms = [entry | {"forget": -3.0, "retain": 1.0} if "loss" in entry else entry for entry in plain]
    draw_losses(plain, tmp_path / "plain.png")
    draw_losses(terms, tmp_path / "terms.png")
    one, three = height(tmp_path / "plain.png"), height(tmp_path / "terms.png")
    assert three - one == 2 * 2 * 110  # two more panels of two inches


def test_a_run_too_short_to_be_logged_is_drawn_as_well(tmp_path: Path) -> None:
    draw_losses([], tmp_path / "empty.png")
    assert height(tmp_path / "empty.png") > 0
