"""From a request body to the deltas that it asks for. Pure functions: no server, no engine, no tokenizer.

A body names deltas either by its model id or in its ``cmc`` field. What neither does is the base model's, and such a
body is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from cmc_server.api.model_id import parse_model_id
from cmc_server.config import DeltaDose, Unmapped
from cmc_server.errors import ControlsError
from cmc_server.integrations.request_args import EXTRA_ARGS_KEY

CMC_FIELD: Final = "cmc"
XARGS_FIELD: Final = "vllm_xargs"
#: The routes that can be steered.
STEERED_ROUTES: Final = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
#: Where vLLM has its routes that generate; those that can be steered are among them.
GENERATING: Final = ("/v1/", "/v2/", "/inference/", "/cohere/", "/invocations")
#: Ends of routes beneath these that generate nothing.
_HARMLESS: Final = ("/count_tokens", "/cancel", "/render", "/load_lora_adapter", "/unload_lora_adapter")
_FLAG: Final = TypeAdapter(bool)
_COUNT: Final = TypeAdapter(int)


#: Marks a field that a client left out; it may not send null.
_LEFT_OUT: Any = None


def _without_default(schema: dict[str, Any]) -> None:
    schema.pop("default")


class DeltaChoice(BaseModel):
    """One delta of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: str = Field(description="Name of a delta, see GET /v1/deltas.")
    strength: float = Field(
        default=_LEFT_OUT,
        description="Factor on the delta's logits; left out, the delta's own default.",
        json_schema_extra=_without_default,
    )


class CmcField(BaseModel):
    """The `cmc` field of a request body: which deltas steer the answer, and how strongly."""

    model_config = ConfigDict(extra="forbid", strict=True, title="CmcControls")

    deltas: list[DeltaChoice] = Field(default=[], description="An empty list means the base model.")
    unmapped: Unmapped = Field(
        default=_LEFT_OUT,
        description="What happens to tokens that no delta knows: left to compete with the shifted ones (zero), or kept "
        "at the base model's probability (preserve). Left out, the deltas decide.",
        json_schema_extra=_without_default,
    )


@dataclass(frozen=True)
class DeltaOffer:
    """What a request may choose.

    Args:
        name: the delta's name.
        version: hash of its content.
        strength: strength where the request gives none.
        unmapped: the manifest's own policy, if it has one.
    """

    name: str
    version: str
    strength: float
    unmapped: Unmapped | None = None


@dataclass(frozen=True)
class Offer:
    """Everything that a request is checked against.

    Args:
        deltas: by name, in the order of the command line.
        base_model: the id under which vLLM serves the user LLM.
        is_served: whether vLLM itself serves a model of this id.
        bounds: lowest and highest strength.
        max_deltas: deltas per request.
        max_rows: steered rows at once; None is without limit.
        defaults: steer a request that names nothing.
        required: steer every request, with just these strengths.
    """

    deltas: Mapping[str, DeltaOffer]
    base_model: str
    is_served: Callable[[str], bool]
    bounds: tuple[float, float]
    max_deltas: int
    max_rows: int | None = None
    defaults: tuple[DeltaDose, ...] = ()
    required: tuple[DeltaDose, ...] = ()


@dataclass(frozen=True)
class ChosenDelta:
    """A delta with the strength that it will have."""

    name: str
    strength: float
    version: str

    def __str__(self) -> str:
        return f"{self.name}@{format_strength(self.strength)}#{self.version}"


@dataclass(frozen=True)
class Controls:
    """What one request asks for.

    Args:
        deltas: in the client's order; those of strength 0 are named in the answer and never reach the engine.
        unmapped: the policy, already decided.
        model: the model id as the client wrote it, if it named the deltas; the answer repeats it.
    """

    deltas: tuple[ChosenDelta, ...]
    unmapped: Unmapped
    model: str | None

    @property
    def active(self) -> tuple[ChosenDelta, ...]:
        """The deltas that change anything."""
        return tuple(delta for delta in self.deltas if delta.strength != 0)


def format_strength(strength: float) -> str:
    """Shortest decimal that reads back as the same number, without a trailing ``.0``."""
    return repr(float(strength)).removesuffix(".0")


def format_deltas(deltas: Sequence[ChosenDelta]) -> str:
    """Value of the ``x-cmc-deltas`` header: ``name@strength#version``, comma-separated; ``none`` is the base model."""
    return ",".join(map(str, deltas)) or "none"


def read_controls(body: Mapping[str, Any], route: str, offer: Offer) -> Controls | None:
    """What a request body asks for.

    Args:
        body: the parsed JSON object.
        route: path of the request.
        offer: what is available.

    Returns:
        None if no delta is to steer the request and it has no ``cmc`` field; then it is to be passed on untouched.

    Raises:
        ControlsError: the request cannot be served as written.
    """
    _refuse_engine_arguments(body)
    model = body.get("model")
    parts = None
    if isinstance(model, str) and not offer.is_served(model):
        parts = parse_model_id(model, offer.deltas)
    names_any = CMC_FIELD in body or parts is not None
    if route not in STEERED_ROUTES:
        _refuse_route(route, names_any, CMC_FIELD if CMC_FIELD in body else "model", offer)
        return None
    unmapped: Unmapped | None = None
    if parts is not None:
        if CMC_FIELD in body:
            raise ControlsError("Name deltas by the model id or by the cmc field, not by both.", CMC_FIELD)
        chosen = parts
        places = ["model"] * len(parts)
    elif names_any:
        chosen, unmapped = _from_field(body[CMC_FIELD])
        places = [f"{CMC_FIELD}.deltas[{index}]" for index in range(len(chosen))]
    else:
        chosen = [(dose.name, dose.strength) for dose in offer.defaults]
        places = ["model"] * len(chosen)
    if not names_any and not chosen and not offer.required:
        return None
    deltas = _with_required(_choose(chosen, places, offer), places, offer)
    controls = Controls(deltas, unmapped or _own_policy(deltas, offer), None if parts is None else str(model))
    if controls.active:
        _check_options(body, route, offer)
    return controls


def rewritten(body: Mapping[str, Any], controls: Controls, base_model: str, xargs: Mapping[str, str]) -> dict[str, Any]:
    """The body as vLLM gets it: without ``cmc``, with a model that it serves, and with our engine arguments."""
    result = {key: value for key, value in body.items() if key != CMC_FIELD}
    if controls.model is not None:
        result["model"] = base_model
    if xargs:
        result[XARGS_FIELD] = {**(body.get(XARGS_FIELD) or {}), **xargs}
    return result


def flag(body: Mapping[str, Any], field: str, default: bool = False) -> bool:
    """A boolean field, read as leniently as vLLM's own models read it.

    Raises:
        ControlsError: the value is no boolean.
    """
    value = body.get(field)
    if value is None:
        return default
    try:
        return _FLAG.validate_python(value)
    except ValidationError:
        raise ControlsError(f"{field} must be true or false.", field) from None


def _refuse_engine_arguments(body: Mapping[str, Any]) -> None:
    sampling = body.get("sampling_params")
    nested = sampling.get("extra_args") if isinstance(sampling, dict) else None
    for field, values in ((XARGS_FIELD, body.get(XARGS_FIELD)), ("sampling_params.extra_args", nested)):
        reserved = [key for key in values if key.startswith(EXTRA_ARGS_KEY)] if isinstance(values, dict) else []
        if reserved:
            raise ControlsError(f"{field}: the key {reserved[0][:80]!r} is reserved; use the cmc field instead.", field)


def _from_field(value: Any) -> tuple[list[tuple[str, float | None]], Unmapped | None]:
    if not isinstance(value, dict):
        raise ControlsError('cmc must be an object such as {"deltas": [{"name": ..., "strength": ...}]}.', CMC_FIELD)
    try:
        field = CmcField.model_validate(value)
    except ValidationError as error:
        problem = error.errors()[0]
        where = _path(problem["loc"])
        raise ControlsError(f"{where}: {_message(problem)}.", where) from None
    return [(delta.name, delta.strength) for delta in field.deltas], field.unmapped


def _refuse_route(route: str, names_any: bool, field: str, offer: Offer) -> None:
    """What a route that cannot carry a delta may not be asked.

    Raises:
        ControlsError: the request names deltas, or generates past those that are required.
    """
    use = f"use one of {', '.join(STEERED_ROUTES)}."
    if names_any:
        raise ControlsError(f"{route} cannot carry a delta; {use}", field)
    if offer.required and generates(route):
        names = ", ".join(dose.name for dose in offer.required)
        raise ControlsError(f"{route} cannot carry a delta, and this server requires {names}; {use}", field)


def generates(route: str) -> bool:
    """Whether vLLM may generate text on a route; said of a few that it may not, and otherwise assumed of all."""
    return route.startswith(GENERATING) and not route.startswith("/v1/deltas") and not route.endswith(_HARMLESS)


def required_deltas(offer: Offer) -> tuple[ChosenDelta, ...]:
    """What steers every request, with its strengths."""
    return tuple(_dosed(dose, offer) for dose in offer.required)


def _dosed(dose: DeltaDose, offer: Offer) -> ChosenDelta:
    known = offer.deltas[dose.name]
    return ChosenDelta(dose.name, known.strength if dose.strength is None else dose.strength, known.version)


def _with_required(deltas: Sequence[ChosenDelta], places: Sequence[str], offer: Offer) -> tuple[ChosenDelta, ...]:
    """The required deltas, then the others that were chosen.

    Raises:
        ControlsError: one of the chosen is required with another strength.
    """
    required = {delta.name: delta for delta in required_deltas(offer)}
    for delta, place in zip(deltas, places, strict=True):
        wanted = required.get(delta.name, delta)
        if wanted.strength != delta.strength:
            raise ControlsError(
                f"The delta {delta.name!r} is required on this server with the strength "
                f"{format_strength(wanted.strength)}; leave it out or ask for just that.",
                _in(place, "strength"),
            )
    return (*required.values(), *(delta for delta in deltas if delta.name not in required))


def _message(problem: ErrorDetails) -> str:
    return "Input should be an object" if problem["type"] == "model_type" else problem["msg"]


def _path(location: tuple[int | str, ...]) -> str:
    return CMC_FIELD + "".join(f"[{part}]" if isinstance(part, int) else f".{part[:80]}" for part in location)


def _choose(chosen: Sequence[tuple[str, float | None]], places: Sequence[str], offer: Offer) -> tuple[ChosenDelta, ...]:
    if len(chosen) > offer.max_deltas:
        field = places[0].partition("[")[0]
        raise ControlsError(f"A request may name at most {offer.max_deltas} deltas, not {len(chosen)}.", field)
    low, high = offer.bounds
    deltas: dict[str, ChosenDelta] = {}
    for (name, strength), place in zip(chosen, places, strict=True):
        if name not in offer.deltas:
            available = ", ".join(offer.deltas) or "none is loaded"
            raise ControlsError(f"There is no delta named {name[:80]!r}; available: {available}.", _in(place, "name"))
        if name in deltas:
            raise ControlsError(f"The delta {name!r} is named more than once.", _in(place, "name"))
        known = offer.deltas[name]
        value = known.strength if strength is None else strength
        if not low <= value <= high:
            bounds = f"{format_strength(low)} to {format_strength(high)}"
            raise ControlsError(
                f"The strength of delta {name!r} must be a number from {bounds}, not {format_strength(value)}.",
                _in(place, "strength"),
            )
        deltas[name] = ChosenDelta(name, value + 0.0, known.version)  # -0 becomes 0
    return tuple(deltas.values())


def _in(place: str, field: str) -> str:
    return place if place == "model" else f"{place}.{field}"


def _own_policy(deltas: Sequence[ChosenDelta], offer: Offer) -> Unmapped:
    in_play = (offer.deltas[delta.name] for delta in deltas if delta.strength != 0)
    return "preserve" if any(delta.unmapped == "preserve" for delta in in_play) else "zero"


def _check_options(body: Mapping[str, Any], route: str, offer: Offer) -> None:
    """Refuse what a delta could not steer, or could steer only in part."""
    for field, why in _unfit_options(body, route):
        raise ControlsError(f"{field} cannot be combined with a delta: {why}.", field)
    xargs = body.get(XARGS_FIELD)
    if xargs is not None and not isinstance(xargs, dict):
        raise ControlsError(f"{XARGS_FIELD} must be an object.", XARGS_FIELD)
    try:
        rows = _COUNT.validate_python(body.get("n") or 1)
    except ValidationError:
        return  # vLLM's own validation names the problem
    if offer.max_rows is not None and rows > offer.max_rows:
        raise ControlsError(f"n may be at most {offer.max_rows} with a delta on this server, not {rows}.", "n")


def _unfit_options(body: Mapping[str, Any], route: str) -> list[tuple[str, str]]:
    given = [field for field in body if body[field] is not None]
    unfit = [(field, why) for field, why in _UNFIT_IF_GIVEN.get(route, {}).items() if field in given]
    unfit += [(field, why) for field, why in _UNFIT_IF_TRUE.get(route, {}).items() if flag(body, field)]
    if route == "/v1/completions" and flag(body, "echo") and "logprobs" in given:
        unfit.append(("echo", "log probabilities of the prompt are the base model's"))
    if route == "/v1/chat/completions" and flag(body, "echo") and flag(body, "logprobs"):
        unfit.append(("echo", "log probabilities of the prompt are the base model's"))
    if route == "/v1/responses" and _has_server_side_tools(body.get("tools")):
        unfit.append(("tools", "tools that the server runs itself start new requests that it would not steer"))
    return unfit


def _has_server_side_tools(tools: Any) -> bool:
    """Tools run by the client are functions, custom tools, and namespaces of these."""
    if not isinstance(tools, list):
        return False
    return any(isinstance(tool, dict) and tool.get("type") not in ("function", "custom", "namespace") for tool in tools)


_PROMPT_LOGPROBS: Final = "log probabilities of the prompt are the base model's"
_BEAM_SEARCH: Final = "beam search runs outside the steering"
_UNFIT_IF_GIVEN: Final[Mapping[str, Mapping[str, str]]] = {
    "/v1/completions": {
        "prompt_logprobs": _PROMPT_LOGPROBS,
        "prompt_embeds": "a delta reads tokens, not embeddings",
        "suffix": "a delta continues a text and cannot fill a gap",
    },
    "/v1/chat/completions": {"prompt_logprobs": _PROMPT_LOGPROBS},
    "/v1/responses": {
        "previous_response_id": "send the whole conversation as input",
        "previous_input_messages": "send the whole conversation as input",
    },
}
_UNFIT_IF_TRUE: Final[Mapping[str, Mapping[str, str]]] = {
    "/v1/completions": {"use_beam_search": _BEAM_SEARCH},
    "/v1/chat/completions": {"use_beam_search": _BEAM_SEARCH},
    "/v1/responses": {"background": "a stored answer could not show by which deltas it was steered"},
}
