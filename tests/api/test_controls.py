"""From a request body to its controls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmc_server.api.controls import (
    STEERED_ROUTES,
    ChosenDelta,
    CmcField,
    DeltaOffer,
    Offer,
    format_deltas,
    format_strength,
    read_controls,
    rewritten,
)
from cmc_server.config import DeltaDose
from cmc_server.errors import ControlsError

CHAT, COMPLETIONS, RESPONSES, MESSAGES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
)
OFFER = Offer(
    deltas={
        "concise": DeltaOffer("concise", "aaaaaaaaaaaa", 1.0),
        "forget": DeltaOffer("forget", "bbbbbbbbbbbb", 0.5, "preserve"),
        "third": DeltaOffer("third", "cccccccccccc", 1.0),
    },
    base_model="base",
    is_served=lambda model: model in ("base", "alias", "concise@2"),
    bounds=(-4.0, 4.0),
    max_deltas=2,
    max_rows=4,
)


#: The machine may be busy.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def read(body: dict[str, Any], route: str = CHAT) -> Any:
    return read_controls(body, route, OFFER)


def refused(body: dict[str, Any], route: str = CHAT) -> ControlsError:
    with pytest.raises(ControlsError) as caught:
        read(body, route)
    return caught.value


def cmc(*deltas: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"model": "base", "cmc": {"deltas": list(deltas), **rest}}


@pytest.mark.parametrize("body", [{}, {"model": "base"}, {"model": "alias"}, {"model": "unknown"}, {"model": 1}])
def test_a_base_request_has_no_controls(body: dict[str, Any]) -> None:
    assert read(body) is None


def test_strengths_given_and_not_given() -> None:
    controls = read(cmc({"name": "concise", "strength": 2}, {"name": "forget"}))
    assert format_deltas(controls.deltas) == "concise@2#aaaaaaaaaaaa,forget@0.5#bbbbbbbbbbbb"
    assert controls.model is None
    controls = read({"model": "forget+concise@-0.25"})
    assert format_deltas(controls.deltas) == "forget@0.5#bbbbbbbbbbbb,concise@-0.25#aaaaaaaaaaaa"
    assert controls.model == "forget+concise@-0.25"


def test_exact_ids_win_over_parsing() -> None:
    assert read({"model": "concise@2"}) is None


@pytest.mark.parametrize("field", [{}, {"deltas": []}, {"unmapped": "zero"}])
def test_no_delta_is_the_base_model(field: dict[str, Any]) -> None:
    controls = read({"model": "base", "cmc": field})
    assert controls.deltas == ()
    assert format_deltas(controls.deltas) == "none"


def test_strength_zero_is_named_but_not_active() -> None:
    controls = read(cmc({"name": "concise", "strength": -0.0}, {"name": "forget", "strength": 1}))
    assert format_deltas(controls.deltas) == "concise@0#aaaaaaaaaaaa,forget@1#bbbbbbbbbbbb"
    assert [delta.name for delta in controls.active] == ["forget"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (cmc({"name": "concise"}), "zero"),
        (cmc({"name": "concise"}, {"name": "forget"}), "preserve"),
        (cmc({"name": "concise"}, {"name": "forget", "strength": 0}), "zero"),
        (cmc({"name": "forget"}, unmapped="zero"), "zero"),
        (cmc({"name": "concise"}, unmapped="preserve"), "preserve"),
        ({"model": "forget"}, "preserve"),
    ],
)
def test_who_decides_about_unmapped_tokens(body: dict[str, Any], expected: str) -> None:
    assert read(body).unmapped == expected


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (cmc({"name": "nope"}), "cmc.deltas[0].name", "available: concise, forget, third"),
        ({"model": "concise+nope"}, "model", "available: concise, forget, third"),
        ({"model": "nope@1"}, "model", "available: concise, forget, third"),
        (cmc({"name": "concise"}, {"name": "concise"}), "cmc.deltas[1].name", "more than once"),
        ({"model": "concise+concise@2"}, "model", "more than once"),
        (cmc({"name": "concise", "strength": 4.5}), "cmc.deltas[0].strength", "from -4 to 4, not 4.5"),
        ({"model": "concise@-5"}, "model", "from -4 to 4, not -5"),
        (cmc({"name": "concise", "strength": True}), "cmc.deltas[0].strength", "number"),
        (cmc({"name": "concise", "strength": "1"}), "cmc.deltas[0].strength", "number"),
        (cmc({"name": "concise", "strength": None}), "cmc.deltas[0].strength", "number"),
        (cmc({"name": "concise", "strength": float("nan")}), "cmc.deltas[0].strength", "finite"),
        (cmc({"name": "concise", "strength": float("inf")}), "cmc.deltas[0].strength", "finite"),
        (cmc({"name": "concise", "strength": 10**400}), "cmc.deltas[0].strength", "number"),
        (cmc({"name": "concise"}, {"name": "forget"}, {"name": "third"}), "cmc.deltas", "at most 2 deltas, not 3"),
        ({"model": "concise+forget+third"}, "model", "at most 2 deltas, not 3"),
        ({"model": "base", "cmc": None}, "cmc", "must be an object"),
        ({"model": "base", "cmc": []}, "cmc", "must be an object"),
        ({"model": "base", "cmc": {"deltas": None}}, "cmc.deltas", "list"),
        ({"model": "base", "cmc": {"deltas": ["concise"]}}, "cmc.deltas[0]", "object"),
        ({"model": "base", "cmc": {"deltas": [], "more": 1}}, "cmc.more", "not permitted"),
        ({"model": "base", "cmc": {"unmapped": "keep"}}, "cmc.unmapped", "zero"),
        (cmc({"name": "concise", "alpha": 1}), "cmc.deltas[0].alpha", "not permitted"),
        (cmc({"strength": 1}), "cmc.deltas[0].name", "required"),
        ({"model": "concise@much"}, "model", "malformed"),
        ({"model": "concise", "cmc": {"deltas": []}}, "cmc", "not by both"),
        ({"vllm_xargs": {"cmc": "{}"}}, "vllm_xargs", "reserved"),
        ({"vllm_xargs": {"cmc_x": 1}, "model": "concise"}, "vllm_xargs", "reserved"),
        ({"vllm_xargs": 5, "model": "concise"}, "vllm_xargs", "object"),
        ({"model": "concise", "n": 5}, "n", "at most 4"),
    ],
)
def test_refused(body: dict[str, Any], param: str, words: str) -> None:
    error = refused(body)
    assert error.param == param
    assert words in str(error)
    assert str(error).endswith(".")


@pytest.mark.parametrize("route", ["/tokenize", "/v1/chat/completions/batch", "/v1/embeddings", "/invocations"])
@pytest.mark.parametrize("body", [{"cmc": {}}, {"model": "concise"}, {"cmc": {"deltas": []}, "model": "base"}])
def test_other_routes_carry_no_delta(route: str, body: dict[str, Any]) -> None:
    assert "cannot carry a delta" in str(refused(body, route))


def test_engine_arguments_cannot_be_smuggled_in_anywhere() -> None:
    body = {"sampling_params": {"extra_args": {"cmc": "{}"}}}
    assert refused(body, "/inference/v1/generate").param == "sampling_params.extra_args"
    assert refused({"vllm_xargs": {"cmc": "{}"}}, "/v1/chat/completions/batch").param == "vllm_xargs"


@pytest.mark.parametrize(
    ("route", "options", "param"),
    [
        (CHAT, {"use_beam_search": True}, "use_beam_search"),
        (CHAT, {"use_beam_search": "true"}, "use_beam_search"),
        (CHAT, {"prompt_logprobs": 0}, "prompt_logprobs"),
        (CHAT, {"echo": True, "logprobs": True}, "echo"),
        (COMPLETIONS, {"use_beam_search": 1}, "use_beam_search"),
        (COMPLETIONS, {"prompt_logprobs": 1}, "prompt_logprobs"),
        (COMPLETIONS, {"echo": True, "logprobs": 0}, "echo"),
        (COMPLETIONS, {"suffix": ""}, "suffix"),
        (COMPLETIONS, {"prompt_embeds": "AAAA"}, "prompt_embeds"),
        (RESPONSES, {"previous_response_id": "resp_1"}, "previous_response_id"),
        (RESPONSES, {"previous_input_messages": []}, "previous_input_messages"),
        (RESPONSES, {"background": True}, "background"),
        (RESPONSES, {"tools": [{"type": "function"}, {"type": "web_search_preview"}]}, "tools"),
        (RESPONSES, {"tools": [{"type": "mcp"}]}, "tools"),
    ],
)
def test_options_that_cannot_carry_a_delta(route: str, options: dict[str, Any], param: str) -> None:
    assert refused({"model": "concise", **options}, route).param == param
    assert refused({**cmc({"name": "concise"}), **options}, route).param == param
    # The base model can do all of that, also where it is asked for by name.
    assert read({**cmc(), **options}, route).deltas == ()
    assert read({"model": "concise@0", **options}, route).active == ()


@pytest.mark.parametrize(
    ("route", "options"),
    [
        (CHAT, {"echo": True}),
        (CHAT, {"logprobs": True, "top_logprobs": 3}),
        (COMPLETIONS, {"echo": True}),
        (COMPLETIONS, {"logprobs": 3, "suffix": None, "prompt_embeds": None}),
        (RESPONSES, {"tools": [{"type": "function"}, {"type": "custom"}], "previous_response_id": None}),
        (CHAT, {"n": 4}),
    ],
)
def test_options_that_can(route: str, options: dict[str, Any]) -> None:
    assert read({"model": "concise", **options}, route).active


def test_the_body_that_vllm_gets() -> None:
    body = {"model": "base", "cmc": {"deltas": [{"name": "concise"}]}, "vllm_xargs": {"mine": 1}, "n": 2}
    assert rewritten(body, read(body), "base", {"cmc": "{}"}) == {
        "model": "base",
        "vllm_xargs": {"mine": 1, "cmc": "{}"},
        "n": 2,
    }
    body = {"model": "concise@0", "n": 2}
    assert rewritten(body, read(body), "base", {}) == {"model": "base", "n": 2}


@patient
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_strength_reads_back_as_itself(value: float) -> None:
    assert float(format_strength(value)) == value


def test_the_header() -> None:
    assert str(ChosenDelta("a", 1.0, "v")) == "a@1#v"
    assert str(ChosenDelta("a", -0.125, "v")) == "a@-0.125#v"


keys = st.sampled_from(["model", "cmc", "vllm_xargs", "messages", "x"])
json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.sampled_from(["base", "concise", "concise@0.5", "a", "cmc"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys | st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@patient
@given(json_values, st.sampled_from(STEERED_ROUTES), st.dictionaries(keys, json_values))
def test_any_controls_are_read_or_refused(value: Any, route: str, rest: dict[str, Any]) -> None:
    try:
        controls = read_controls({**rest, "cmc": value}, route, OFFER)
    except ControlsError as error:
        assert error.param
    else:
        assert controls is not None


def test_the_schema_of_the_field() -> None:
    schema = CmcField.model_json_schema()
    assert schema["additionalProperties"] is False
    assert "default" not in schema["properties"]["unmapped"]
    assert schema["$defs"]["DeltaChoice"]["properties"]["strength"]["type"] == "number"
    assert schema["$defs"]["DeltaChoice"]["required"] == ["name"]


class TestDefault:
    """Deltas of requests that name none."""

    offer = replace(OFFER, defaults=(DeltaDose(name="forget"), DeltaDose(name="concise", strength=2)))

    def steered(self, body: dict[str, Any], route: str = CHAT) -> str:
        controls = read_controls(body, route, self.offer)
        return "nothing" if controls is None else format_deltas(controls.deltas).replace("aaaaaaaaaaaa", "a")

    @pytest.mark.parametrize("body", [{}, {"model": "base"}, {"model": "alias"}, {"model": "unknown"}])
    def test_a_request_that_names_nothing(self, body: dict[str, Any]) -> None:
        controls = read_controls(body, CHAT, self.offer)
        assert controls is not None
        assert [(delta.name, delta.strength) for delta in controls.deltas] == [("forget", 0.5), ("concise", 2.0)]
        assert controls.unmapped == "preserve"
        assert controls.model is None  # the answer's model stays what it is

    def test_a_request_that_names_something(self) -> None:
        assert self.steered({"cmc": {"deltas": []}}) == "none"
        assert self.steered({"cmc": {}}) == "none"
        assert self.steered({"model": "concise"}) == "concise@1#a"
        assert self.steered(cmc({"name": "concise", "strength": 0})) == "concise@0#a"

    def test_other_routes_go_without(self) -> None:
        assert self.steered({"model": "base"}, "/v1/embeddings") == "nothing"

    def test_options_that_no_delta_supports_need_the_base_model(self) -> None:
        with pytest.raises(ControlsError, match="prompt_logprobs"):
            read_controls({"prompt_logprobs": 1}, COMPLETIONS, self.offer)
        assert self.steered({"prompt_logprobs": 1, "cmc": {"deltas": []}}, COMPLETIONS) == "none"


class TestRequired:
    """No body gets around a required delta."""

    offer = replace(OFFER, required=(DeltaDose(name="forget", strength=2),))

    @pytest.mark.parametrize(
        ("body", "others"),
        [
            ({}, []),
            ({"model": "base"}, []),
            ({"model": "unknown"}, []),
            ({"model": 1}, []),
            ({"cmc": {"deltas": []}}, []),
            ({"model": "forget@2"}, []),
            ({"model": "concise@0+forget@2"}, [("concise", 0.0)]),
            (cmc({"name": "concise", "strength": -1}, {"name": "third"}), [("concise", -1.0), ("third", 1.0)]),
        ],
    )
    @pytest.mark.parametrize("route", STEERED_ROUTES)
    def test_it_is_added(self, body: dict[str, Any], others: list[tuple[str, float]], route: str) -> None:
        controls = read_controls(body, route, self.offer)
        assert controls is not None
        assert [(delta.name, delta.strength) for delta in controls.deltas] == [("forget", 2.0), *others]

    @pytest.mark.parametrize(
        "body",
        [{"model": "forget"}, {"model": "forget@0"}, cmc({"name": "forget", "strength": 2.5}), {"model": "forget@-2"}],
    )
    def test_it_cannot_be_changed(self, body: dict[str, Any]) -> None:
        with pytest.raises(ControlsError, match="required on this server with the strength 2"):
            read_controls(body, CHAT, self.offer)

    @pytest.mark.parametrize(
        ("route", "body"),
        [
            (COMPLETIONS, {"prompt_logprobs": 0}),
            (COMPLETIONS, {"echo": True, "logprobs": 1}),
            (COMPLETIONS, {"use_beam_search": True}),
            (RESPONSES, {"background": True}),
            (CHAT, {"vllm_xargs": {"cmc": "{}"}}),
        ],
    )
    def test_no_option_shows_the_base_model(self, route: str, body: dict[str, Any]) -> None:
        with pytest.raises(ControlsError):
            read_controls(body, route, self.offer)

    @pytest.mark.parametrize(
        "route", ["/v1/embeddings", "/inference/v1/generate", "/v1/audio/transcriptions", "/v2/chat", "/invocations"]
    )
    def test_routes_that_cannot_carry_it_are_closed(self, route: str) -> None:
        with pytest.raises(ControlsError, match="this server requires forget"):
            read_controls({"model": "base"}, route, self.offer)

    @pytest.mark.parametrize("route", ["/tokenize", "/v1/messages/count_tokens", "/v1/load_lora_adapter"])
    def test_routes_that_generate_nothing_stay_open(self, route: str) -> None:
        assert read_controls({"model": "base"}, route, self.offer) is None
