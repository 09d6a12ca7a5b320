"""Deltas written as a model id: ``concise``, ``concise@0.8``, ``concise@0.8+forget-tofu``.

    id       = part *( "+" part )
    part     = NAME [ "@" STRENGTH ]
    STRENGTH = [ "-" ] decimal [ "e" [ "-" ] digits ]

``+`` separates deltas and so cannot stand in a strength.
"""

from __future__ import annotations

import re
from collections.abc import Container

from cmc_server.config import NAME_PATTERN
from cmc_server.errors import ControlsError

_NUMBER = r"-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE]-?[0-9]+)?"
_PART = re.compile(rf"({NAME_PATTERN})(?:@({_NUMBER}))?")


def parse_model_id(model: str, known: Container[str]) -> list[tuple[str, float | None]] | None:
    """Read a model id that is not a served model.

    Args:
        model: the id as the client sent it.
        known: names of the deltas.

    Returns:
        Names with their strengths (None: not given), or None if the id does not mean deltas, which leaves it to vLLM.

    Raises:
        ControlsError: the id means deltas but is malformed. Whether the names exist is not checked here.
    """
    texts = model.split("+")
    parts = [_PART.fullmatch(text) for text in texts]
    well_formed = [part for part in parts if part is not None]
    names_a_delta = any(text.partition("@")[0] in known for text in texts)
    if len(well_formed) < len(parts):
        if not names_a_delta:
            return None
        raise ControlsError(
            f"The model id {model[:200]!r} is malformed: write NAME, NAME@STRENGTH or several joined with +.", "model"
        )
    if not names_a_delta and len(parts) == 1 and "@" not in model:
        return None
    return [(part[1], None if part[2] is None else float(part[2])) for part in well_formed]
