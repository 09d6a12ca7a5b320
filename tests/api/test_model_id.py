"""Deltas written as a model id."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmc_server.api.controls import format_strength
from cmc_server.api.model_id import parse_model_id
from cmc_server.config import NAME_PATTERN
from cmc_server.errors import ControlsError

KNOWN = ("concise", "forget-tofu", "1.5")
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
names = st.from_regex(rf"\A{NAME_PATTERN}\Z", alphabet=st.characters(codec="ascii"))
strengths = st.none() | st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: "e+" not in repr(x))


@patient
@given(st.lists(st.tuples(names, strengths), min_size=1, max_size=6), st.sampled_from(KNOWN))
def test_what_is_written_is_read(parts: list[tuple[str, float | None]], known: str) -> None:
    parts = [*parts, (known, None)]
    text = "+".join(name if value is None else f"{name}@{format_strength(value)}" for name, value in parts)
    assert parse_model_id(text, KNOWN) == parts


@patient
@given(st.text() | st.lists(st.sampled_from([*KNOWN, "@", "+", "-", ".", "0.8", "e", "nan", " "])).map("".join))
def test_any_text_is_read_refused_or_left_alone(text: str) -> None:
    try:
        parts = parse_model_id(text, KNOWN)
    except ControlsError as error:
        assert error.param == "model"
        assert any(name in text for name in KNOWN)
    else:
        for name, strength in parts or []:
            assert name in text
            assert strength is None or math.isfinite(strength)


@pytest.mark.parametrize("model", ["gpt-4o", "org/model", "org/model@main", "org/model+lora", "", "a b", "llama:8b"])
def test_other_models_are_left_to_vllm(model: str) -> None:
    assert parse_model_id(model, KNOWN) is None


@pytest.mark.parametrize(
    "model",
    ["concise@", "concise@x", "concise@nan", "concise@inf", "concise@1@2", "+concise", "concise+", "concise@ 1"],
)
def test_malformed(model: str) -> None:
    with pytest.raises(ControlsError, match="malformed"):
        parse_model_id(model, KNOWN)


def test_a_strength_alone_shows_that_a_delta_is_meant() -> None:
    assert parse_model_id("nope@0.8", KNOWN) == [("nope", 0.8)]
    assert parse_model_id("nope+other", KNOWN) == [("nope", None), ("other", None)]
