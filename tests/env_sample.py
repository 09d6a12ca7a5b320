"""The settings in deploy/env.example."""

from __future__ import annotations

import re
from pathlib import Path

ENV_EXAMPLE = Path(__file__).parents[1] / "deploy" / "env.example"


def sample() -> dict[str, str]:
    """Name and value of every setting; those that are commented out are empty."""
    return dict(re.findall(r"^(?:# )?([A-Z][A-Z_]+)=(.*)$", ENV_EXAMPLE.read_text("utf-8"), re.MULTILINE))
