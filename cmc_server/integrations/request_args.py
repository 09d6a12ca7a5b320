"""The steering part of one request, as it travels from the front door to the workers. Imports nothing heavy.

It travels in ``SamplingParams.extra_args`` under one key: as a JSON document when it comes through HTTP (vLLM's
``vllm_xargs`` carry no nested objects), or as a plain mapping when vLLM is used offline.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError, field_validator

from cmc_server.config import DeltaName, FrozenModel, Unmapped, first_problem
from cmc_server.errors import ControlsError

#: The key in ``extra_args``. Clients may not send keys that begin with it.
EXTRA_ARGS_KEY = "cmc"
MAX_DELTAS = 64
#: Characters; of a longer id, the front door sends the beginning.
MAX_REQUEST_ID = 128


class ActiveDelta(FrozenModel):
    """One delta of a request.

    Args:
        name: name under which the delta is loaded.
        strength: factor on its logits; 0 switches it off.
        version: the content that the front door saw; None (offline use) takes what is loaded.
        prompt_ids: the prompt in the delta's own tokens; None lets the worker spell the user LLM's prompt.
    """

    name: DeltaName
    strength: float
    version: str | None = None
    prompt_ids: tuple[int, ...] | None = None


class RequestControls(FrozenModel):
    """Which deltas steer a request, how strongly, and what happens to tokens outside their maps.

    Args:
        deltas: none is the base model.
        unmapped: None lets the manifests decide, see design.
        request_id: what the workers' log calls the request.
    """

    deltas: tuple[ActiveDelta, ...] = Field(default=(), max_length=MAX_DELTAS)
    unmapped: Unmapped | None = None
    request_id: str | None = Field(default=None, max_length=MAX_REQUEST_ID)

    @field_validator("deltas")
    @classmethod
    def _check_unique(cls, deltas: tuple[ActiveDelta, ...]) -> tuple[ActiveDelta, ...]:
        names = [delta.name for delta in deltas]
        if len(set(names)) != len(names):
            raise ValueError("a delta is named more than once")
        return deltas

    def to_extra_args(self) -> dict[str, str]:
        """The one entry that goes into ``vllm_xargs`` or ``SamplingParams.extra_args``."""
        return {EXTRA_ARGS_KEY: self.model_dump_json(exclude_defaults=True)}


def read_controls(extra_args: Mapping[str, Any] | None) -> RequestControls | None:
    """The controls of a request, or None if it has none or every strength is 0.

    Raises:
        ControlsError: the entry is there but malformed.
    """
    raw = (extra_args or {}).get(EXTRA_ARGS_KEY)
    if raw is None:
        return None
    try:
        controls = RequestControls.model_validate(json.loads(raw) if isinstance(raw, str) else raw)
    except ValidationError as error:
        raise ControlsError(f"The steering arguments are malformed: {first_problem(error)}", EXTRA_ARGS_KEY) from None
    except ValueError:
        raise ControlsError("The steering arguments are not valid JSON.", EXTRA_ARGS_KEY) from None
    active = tuple(delta for delta in controls.deltas if delta.strength != 0)
    return controls.model_copy(update={"deltas": active}) if active else None
