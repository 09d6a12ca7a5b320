"""Random bodies never bring the server to an error of its own that plain vLLM would not have with the same body.

CMC_TEST_FUZZ_BODIES says how many of them (240), over all routes.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from running_server import RunningServer
from tiny_models import make_delta

if TYPE_CHECKING:
    from conftest import DemoModels

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}]},
}
NUM_BODIES = int(os.environ.get("CMC_TEST_FUZZ_BODIES", "240"))
SHORT = {"max_tokens": 2, "max_completion_tokens": 2, "max_output_tokens": 2}
names = st.sampled_from(["tiny", "tiny", "nope", "smollm2", ""])
strengths = st.sampled_from([0, 0.5, 1, -1, 9, True, None, "1", 1e999]) | st.floats()
choices = st.fixed_dictionaries({"name": names}, optional={"strength": strengths, "more": st.none()})
controls = (
    st.fixed_dictionaries(
        {}, optional={"deltas": st.lists(choices, max_size=3), "unmapped": st.sampled_from(["zero", 1])}
    )
    | st.just({"deltas": [{"name": "tiny", "strength": 0.5}]})
    | st.none()
    | st.lists(choices, max_size=1)
)
models = st.sampled_from(["smollm2", "tiny", "tiny@0.5", "tiny@", "tiny+nope", "nope", None, 5])
stream = st.fixed_dictionaries({}, optional={"stream": st.booleans()})
right = st.sampled_from([{"model": "tiny"}, {"cmc": {"deltas": [{"name": "tiny", "strength": -2}]}}])
any_ours = st.fixed_dictionaries({}, optional={"cmc": controls, "model": models})
ours = st.builds(dict.__or__, stream, right | right | any_ours)


@pytest.fixture(scope="module")
def server(demo_models: DemoModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    delta: Path = make_delta(tmp_path_factory.mktemp("delta") / "tiny", demo_models.smollm2)
    arguments = [
        *[str(demo_models.smollm2), "--served-model-name", "smollm2", "--enforce-eager", "--dtype", "float32"],
        *["--max-model-len", "512", "--delta", f"tiny={delta}"],
    ]
    running = RunningServer(arguments, tmp_path_factory.mktemp("server") / "log")
    yield running.wait_until_ready()
    running.stop()


@pytest.fixture(scope="module")
def bodies(server: RunningServer) -> dict[str, st.SearchStrategy[Any]]:
    """Bodies as the server's own schema describes them, by route."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import schemathesis

        schema = schemathesis.openapi.from_dict(server.http.get("/openapi.json").json())
        return {route: schema[route]["POST"].as_strategy() for route in VALID}


@pytest.mark.parametrize("route", VALID)
def test_no_error_of_our_own(server: RunningServer, bodies: dict[str, st.SearchStrategy[Any]], route: str) -> None:
    @settings(
        max_examples=NUM_BODIES // len(VALID),
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(bodies[route], st.none() | st.sets(st.integers(0, 60), max_size=4), ours)
    def check(case: Any, kept: set[int] | None, changes: dict[str, Any]) -> None:
        body = dict(case.body) if isinstance(case.body, dict) else {}
        if kept is not None:  # mostly valid: a prompt that can be answered, and few random fields
            body = {key: value for index, (key, value) in enumerate(body.items()) if index in kept} | VALID[route]
        body |= SHORT | {"n": 1, "model": "smollm2"} | changes
        answer = post(server, route, body)
        if answer < 500:
            return
        plain = {key: value for key, value in body.items() if key not in ("cmc", "model")}
        assert post(server, route, {**plain, "model": "smollm2"}) >= 500, body

    check()
    assert server.process.poll() is None
    assert server.http.get("/ready").status_code == 200


def post(server: RunningServer, route: str, body: dict[str, Any]) -> int:
    """Send a body, any float and any text as Python's JSON writes it; the status, or 500 if the answer breaks off."""
    # After an exception, the server closes a connection that the client would use again.
    headers = {"content-type": "application/json", "connection": "close"}
    try:
        return server.http.post(route, content=json.dumps(body), headers=headers).status_code
    except httpx.RemoteProtocolError:
        return 500  # vLLM failed after it had begun to stream
