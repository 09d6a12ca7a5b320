"""The plugin's routes: models, deltas, readiness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from plugin_app import HEADERS, Engine, start
from starlette.testclient import TestClient

from cmc_server.api.controls import STEERED_ROUTES

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hello"}]


def test_the_list_of_models(client: TestClient) -> None:
    models = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    assert list(models) == ["base", "alias", "tiny", "picky"]
    assert models["tiny"]["parent"] == "base"
    assert models["base"]["parent"] is None
    for model_id in ("base", "tiny", "tiny@0.8", "tiny@0.8+picky"):
        assert client.get(f"/v1/models/{model_id}").json()["id"] == model_id
    for model_id in ("nope", "tiny@", "tiny+nope", "org/nope"):
        answer = client.get(f"/v1/models/{model_id}")
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "NotFoundError"


def test_the_list_of_deltas(client: TestClient, versions: dict[str, str]) -> None:
    listing = client.get("/v1/deltas").json()
    assert [delta["name"] for delta in listing["data"]] == ["tiny", "picky"]
    picky = client.get("/v1/deltas/picky").json()
    assert picky == listing["data"][1]
    assert picky["version"] == versions["picky"]
    assert picky["strength"] == 0.5
    assert picky["advised_range"] == [0.0, 2.0]
    assert picky["strength_bounds"] == [-4.0, 4.0]
    assert picky["unmapped"] == "preserve"
    assert picky["context_length"] == 64
    assert (picky["state"], picky["coverage"], picky["match"]) == ("loaded", 1.0, {"exact": 3})
    answer = client.get("/v1/deltas/nope")
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "name")


def test_the_field_is_in_the_schema(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert schemas["ChatCompletionRequest"]["properties"]["cmc"] == {"$ref": "#/components/schemas/CmcControls"}
    assert set(schemas["CmcControls"]["properties"]) == {"deltas", "unmapped"}
    assert schemas["CmcControls"]["properties"]["deltas"]["items"] == {"$ref": "#/components/schemas/DeltaChoice"}


def test_ready(client: TestClient) -> None:
    assert client.get("/ready").json() == {"status": "ready", "deltas": ["tiny", "picky"]}


def broken_ranks(rank: dict[str, Any]) -> list[tuple[Any, str]]:
    other = {**rank, "deltas": [{**rank["deltas"][0], "version": "0" * 12}, rank["deltas"][1]]}
    return [
        (RuntimeError("no such method"), "no such method"),
        ([], "without the delta processor"),
        ([{"processor": False, "runner": None, "deltas": []}], "without the delta processor"),
        ([rank, {"processor": False, "runner": None, "deltas": []}], "without the delta processor"),
        ([None], "without the delta processor"),
        ([{**rank, "deltas": []}], "no worker has loaded"),
        ([other], "the workers have loaded"),
        ([rank, other], "the workers have loaded"),
    ]


@pytest.mark.parametrize("index", range(8))
def test_a_half_wired_server_never_serves(rank: dict[str, Any], deltas: dict[str, Path], index: int) -> None:
    ranks, reason = broken_ranks(rank)[index]
    engine = Engine(ranks)
    app = start(engine, deltas)
    client = TestClient(app, headers=HEADERS)
    answer = client.get("/ready")
    assert answer.status_code == 503
    assert reason in answer.json()["reason"]
    for route in (*STEERED_ROUTES, "/v1/chat/completions/batch", "/inference/v1/generate", "/invocations"):
        for model in ("base", "tiny"):
            answer = client.post(route, json={"model": model, "messages": USER, "input": "a", "prompt": "a"})
            assert answer.status_code == 503
            assert answer.headers["retry-after"]
    engine.ranks = [rank, {**rank, "deltas": []}]  # what was missing arrives; the second rank does not sample
    assert client.get("/ready").status_code == 200
    assert client.post(CHAT, json={"model": "tiny", "messages": USER}).status_code == 200


def test_shutting_down_and_failing(engine: Engine, deltas: dict[str, Path]) -> None:
    app = start(engine, deltas)
    client = TestClient(app, headers=HEADERS)
    assert client.get("/ready").status_code == 200
    engine.errored = True
    assert "failed" in client.get("/ready").json()["reason"]
    engine.errored = False
    engine.shutdown(timeout=1)
    assert engine.stopped
    assert "shutting down" in client.get("/ready").json()["reason"]
    assert client.post(CHAT, json={"model": "base", "messages": USER}).status_code == 503


def test_rows_are_limited_only_where_the_workers_cannot_steer_all(
    rank: dict[str, Any], deltas: dict[str, Path]
) -> None:
    for rows, status in ((8, 200), (4, 400)):
        app = start(Engine([{**rank, "max_delta_seqs": rows}]), deltas)
        client = TestClient(app, headers=HEADERS)
        answer = client.post(CHAT, json={"model": "tiny", "messages": USER, "n": 5})
        assert answer.status_code == status


def test_a_server_without_deltas(rank: dict[str, Any]) -> None:
    app = start(Engine([{**rank, "deltas": []}]), {})
    client = TestClient(app, headers=HEADERS)
    assert client.get("/ready").status_code == 200
    assert client.get("/v1/deltas").json() == {"object": "list", "data": []}
    assert client.post(CHAT, json={"model": "base", "messages": USER}).status_code == 200
    answer = client.post(CHAT, json={"model": "base", "messages": USER, "cmc": {"deltas": [{"name": "tiny"}]}})
    assert "none is loaded" in answer.json()["error"]["message"]
