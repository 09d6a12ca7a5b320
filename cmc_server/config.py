"""Frozen settings, checked when they are built; they travel to the workers as JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from cmc_server.errors import ConfigError

#: The key under which the settings travel in vLLM's ``additional_config``.
ADDITIONAL_CONFIG_KEY = "cmc_server"
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
Unmapped = Literal["zero", "preserve"]
#: Of strengths in Python, both ways: far beyond any use, and no logits times it leave float32. Servers have bounds.
MAX_STRENGTH = 1000.0
FastPath = Literal["graphs", "head", "layers", "overlap", "rule", "sharing", "spelling"]
#: Each has a slow, obvious equal that runs when it is switched off.
#: graphs: recorded decoding steps (GPU; needs layers). head: packed output heads (CPU). layers: Llamas in few
#: operations. overlap: deltas beside the user LLM. rule: without copies of the logits. sharing: equal beginnings
#: computed once. spelling: only what is new.
FAST_PATHS: frozenset[FastPath] = frozenset(get_args(FastPath))
_Model = TypeVar("_Model", bound=BaseModel)


def is_delta_name(text: str) -> bool:
    """Whether ``text`` may name a delta."""
    return re.fullmatch(NAME_PATTERN, text) is not None


def _checked_name(name: str) -> str:
    if not is_delta_name(name):
        raise ValueError(f"the delta name {name!r} must match {NAME_PATTERN}")
    return name


DeltaName = Annotated[str, AfterValidator(_checked_name)]


class FrozenModel(BaseModel):
    """Base of what is fixed once it is built: unknown keys and numbers that are not finite are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DeltaSource(FrozenModel):
    """Where a delta comes from and how strong it is unless a request says otherwise."""

    name: DeltaName
    path: str
    strength: float | None = None

    @classmethod
    def parse(cls, text: str) -> DeltaSource:
        """Read ``NAME=PATH[@STRENGTH]``; ``@`` splits at the last one, if a finite number follows.

        Raises:
            ConfigError: the text has no ``=``, an empty path or an invalid name.
        """
        name, equals, rest = text.partition("=")
        if not equals or not rest:
            raise ConfigError(f"--delta {text!r} must be written NAME=PATH or NAME=PATH@STRENGTH.")
        head, at, tail = rest.rpartition("@")
        strength = _finite(tail) if at and head else None
        path = rest if strength is None else head
        return build(cls, {"name": name, "path": path, "strength": strength})


class DeltaDose(FrozenModel):
    """A loaded delta and how strong it is to be; None is its own strength."""

    name: DeltaName
    strength: float | None = None

    @classmethod
    def parse(cls, text: str) -> DeltaDose:
        """Read ``NAME[@STRENGTH]``.

        Raises:
            ConfigError: the name is invalid, or no finite number follows the ``@``.
        """
        name, at, tail = text.partition("@")
        strength = _finite(tail) if at else None
        if at and strength is None:
            raise ConfigError(f"{text!r} must be written NAME or NAME@STRENGTH.")
        return build(cls, {"name": name, "strength": strength})


class EngineSettings(FrozenModel):
    """What the front door and every worker must agree on.

    Args:
        deltas: the deltas to load at start.
        default_deltas: steer requests that name neither deltas nor the base model's own ``"deltas": []``.
        required_deltas: steer every request, whatever it names.
        strength_bounds: lowest and highest strength a request may ask for.
        max_deltas_per_request: how many deltas one request may name.
        max_delta_seqs: how many rows may be steered at once; None means the engine's own ``max_num_seqs``.
        delta_memory: GiB for the deltas' weights and key-value cache together.
        delta_dtype: computing type of the deltas. ``auto`` is float32 on a CPU and bfloat16 on a GPU.
        fast_paths: those that are on, to find out whether one of them is at fault.
        min_coverage: below this share of mapped ordinary tokens a delta is refused.
        force_coverage: accept such a delta all the same.
        map_overrides: file with pairs of special tokens, see ``cmc-server map --overrides``.
        cache_dir: folder of the vocabulary maps; None means the default one.
        live: whether deltas may come and go while the server runs.
        delta_roots: folders that hold whatever may be loaded then; empty means anywhere.
        state_file: JSON file with the deltas that came and went, shared by all API processes and read at start.
        watch_folder: its sub-folders are deltas, loaded and unloaded as they come, change and go.
        access_log_format: ``json`` writes the access log as JSON objects.
        reserved_token_id: user token that ends a request whose delta failed; masked for steered rows.
            None (offline use): such a failure raises inside the engine.
    """

    deltas: tuple[DeltaSource, ...] = ()
    default_deltas: tuple[DeltaDose, ...] = ()
    required_deltas: tuple[DeltaDose, ...] = ()
    strength_bounds: tuple[float, float] = (-4.0, 4.0)
    max_deltas_per_request: int = Field(default=4, ge=1, le=64)
    max_delta_seqs: int | None = Field(default=None, ge=1)
    delta_memory: float = Field(default=4.0, gt=0)
    delta_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    fast_paths: frozenset[FastPath] = FAST_PATHS
    min_coverage: float = Field(default=0.5, ge=0, le=1)
    force_coverage: bool = False
    map_overrides: str | None = None
    cache_dir: str | None = None
    live: bool = False
    delta_roots: tuple[str, ...] = ()
    state_file: str | None = None
    watch_folder: str | None = None
    access_log_format: Literal["text", "json"] = "text"
    reserved_token_id: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _check(self) -> EngineSettings:
        low, high = self.strength_bounds
        if not low <= 0 <= high or low == high:
            raise ValueError("strength_bounds must be a range that contains 0")
        names = [delta.name for delta in self.deltas]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"the delta name {repeated[0]!r} is used more than once")
        for option, doses in (("default", self.default_deltas), ("required", self.required_deltas)):
            for dose in doses:
                if dose.name not in names:
                    raise ValueError(f"the {option} delta {dose.name!r} is not among the deltas to load")
            if len({dose.name for dose in doses}) < len(doses):
                raise ValueError(f"a {option} delta is named more than once")
        dosed: tuple[DeltaSource | DeltaDose, ...] = (*self.deltas, *self.default_deltas, *self.required_deltas)
        for delta in dosed:
            if delta.strength is not None and not low <= delta.strength <= high:
                raise ValueError(f"the strength of delta {delta.name!r} must lie within {low} and {high}")
        if any(dose.strength == 0 for dose in self.required_deltas):
            raise ValueError("a required delta of strength 0 would change nothing")
        return self

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> EngineSettings:
        """Settings as they arrive in a vLLM configuration (offline use may give them as a plain mapping).

        Raises:
            ConfigError: a key is unknown or a value invalid.
        """
        raw = additional_config.get(ADDITIONAL_CONFIG_KEY, {}) if isinstance(additional_config, Mapping) else {}
        return build(cls, raw)


def build(model: type[_Model], values: Any) -> _Model:
    """Validate ``values`` and turn pydantic's report into one sentence.

    Raises:
        ConfigError: the values do not fit the model.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(first_problem(error)) from None


def check_unmapped(policy: Unmapped | None) -> None:
    """Refuse a policy that there is none of, which would count as another one.

    Raises:
        ConfigError: it is neither None nor a policy.
    """
    if policy not in (None, *get_args(Unmapped)):
        raise ConfigError(f"unmapped must be {' or '.join(map(repr, get_args(Unmapped)))}, not {policy!r}.")


def check_strength(name: str, strength: float) -> None:
    """Refuse a strength that is no number or beyond :data:`MAX_STRENGTH`.

    Raises:
        ConfigError: as said; it names the delta.
    """
    if not abs(strength) <= MAX_STRENGTH:  # NaN is not either
        bounds = f"-{MAX_STRENGTH:g} to {MAX_STRENGTH:g}"
        raise ConfigError(f"The strength of delta {name!r} is {strength}; it must be a number from {bounds}.")


def first_problem(error: ValidationError) -> str:
    """The first problem of a pydantic report as one sentence with its field."""
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{field}: {message}." if field else f"{message[:1].upper()}{message[1:]}."


def _finite(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
