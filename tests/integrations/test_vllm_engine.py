"""The guard around vLLM's engine client, with vLLM's own sampling parameters and outputs."""

from __future__ import annotations

import asyncio
import importlib
import warnings
from collections.abc import AsyncGenerator
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch warns of its own past while vLLM is imported
    importlib.import_module("vllm.outputs")

from vllm.exceptions import GenerationError
from vllm.outputs import CompletionOutput
from vllm.sampling_params import SamplingParams

from cmc_server.errors import CapacityError
from cmc_server.integrations.vllm_engine import RowGate, guard_engine

RESERVED = 7
CMC = {"cmc": '{"deltas": []}'}


class Output:
    """A request's output: one choice per list of token ids."""

    def __init__(self, *choices: list[int], stop_reason: int | None = None) -> None:
        self.outputs = [
            CompletionOutput(index, "text", ids, None, None, stop_reason=stop_reason)
            for index, ids in enumerate(choices)
        ]


class Engine:
    """Gives out prepared outputs and remembers what happened."""

    def __init__(self, *outputs: Output) -> None:
        self.prepared = outputs
        self.params: list[SamplingParams] = []
        self.running = self.most = self.closed = 0
        self.stopped: list[Any] = []

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, *, priority: int = 0
    ) -> AsyncGenerator[Output, None]:
        self.params.append(sampling_params)
        self.running += sampling_params.n
        self.most = max(self.most, self.running)
        try:
            for output in self.prepared:
                await asyncio.sleep(0)
                yield output
        finally:
            self.running -= sampling_params.n
            self.closed += 1

    def shutdown(self, timeout: float | None = None) -> None:
        self.stopped.append(timeout)


def guard(engine: Any, gate: RowGate | None = None, required: dict[str, float] | None = None) -> dict[str, int]:
    seen = {"failures": 0, "shutdowns": 0}

    def count(what: str) -> None:
        seen[what] += 1

    guard_engine(
        engine,
        reserved_token_id=RESERVED,
        gate=gate or RowGate(),
        required=required or {},
        on_failure=lambda: count("failures"),
        on_shutdown=lambda: count("shutdowns"),
    )
    return seen


async def collect(engine: Any, params: SamplingParams) -> list[Any]:
    return [output async for output in engine.generate("prompt", params, "id", priority=1)]


def test_requests_without_deltas_pass_through() -> None:
    engine = Engine(Output([RESERVED]))
    guard(engine)
    params = SamplingParams(extra_args={"other": 1})
    assert len(asyncio.run(collect(engine, params))) == 1
    assert engine.params[0] is params
    assert params.stop_token_ids == []


@pytest.mark.parametrize(
    "extra_args",
    [
        None,
        {"other": 1},
        {"cmc": '{"deltas": []}'},
        {"cmc": '{"deltas": [{"name": "a", "strength": 0}, {"name": "b", "strength": -1}]}'},
        {"cmc": '{"deltas": [{"name": "a", "strength": 1}, {"name": "b", "strength": -1}]}'},
        {"cmc": '{"deltas": [{"name": "a", "strength": 2}]}'},
    ],
)
def test_nothing_runs_without_the_required_deltas(extra_args: dict[str, Any] | None) -> None:
    engine = Engine(Output([1]))
    guard(engine, required={"a": 2.0, "b": -1.0})
    with pytest.raises(ValueError, match="requires a, b"):
        asyncio.run(collect(engine, SamplingParams(extra_args=extra_args)))
    assert engine.params == []


def test_with_the_required_deltas_it_runs() -> None:
    engine = Engine(Output([1]))
    guard(engine, required={"a": 2.0})
    deltas = '[{"name": "b", "strength": 1}, {"name": "a", "strength": 2}]'
    assert len(asyncio.run(collect(engine, SamplingParams(extra_args={"cmc": f'{{"deltas": {deltas}}}'})))) == 1


def test_the_reserved_token_stops_a_steered_request() -> None:
    engine = Engine(Output([1, 2]), Output([3]))
    guard(engine)
    params = SamplingParams(extra_args=CMC, stop_token_ids=[5], min_tokens=3)
    assert len(asyncio.run(collect(engine, params))) == 2
    assert engine.params[0].stop_token_ids == [5, RESERVED]
    assert engine.params[0].all_stop_token_ids == {5, RESERVED}
    assert params.stop_token_ids == [5]
    assert params.all_stop_token_ids == {5}


@pytest.mark.parametrize("failing", [Output([1, RESERVED]), Output([1], [RESERVED]), Output([], stop_reason=RESERVED)])
def test_a_failed_delta_ends_the_request_before_its_text_goes_out(failing: Output) -> None:
    engine = Engine(Output([1]), failing, Output([2]))
    seen = guard(engine)
    received: list[Any] = []

    async def run() -> None:
        async for output in engine.generate("prompt", SamplingParams(extra_args=CMC), "id"):
            received.append(output)

    with pytest.raises(GenerationError, match="delta"):
        asyncio.run(run())
    assert len(received) == 1
    assert engine.closed == 1
    assert seen["failures"] == 1


def test_rows_beyond_the_limit_wait_in_order() -> None:
    engine = Engine(*[Output([1])] * 5)
    waiting: list[int] = []
    gate = RowGate(on_waiting=waiting.append)
    gate.limit = 3
    guard(engine, gate)

    async def run() -> None:
        counts = [2, 2, 1, 3, 1, 1]
        await asyncio.gather(*(collect(engine, SamplingParams(extra_args=CMC, n=count)) for count in counts))

    asyncio.run(run())
    assert engine.most == 3
    assert engine.running == 0
    assert [params.n for params in engine.params] == [2, 2, 1, 3, 1, 1]
    assert max(waiting) > 0
    assert waiting[-1] == 0


def test_clients_that_leave_free_their_places() -> None:
    engine = Engine(*[Output([1])] * 1000)
    gate = RowGate()
    gate.limit = 1
    guard(engine, gate)
    params = SamplingParams(extra_args=CMC)

    async def run() -> None:
        running = asyncio.create_task(collect(engine, params))
        waiting = asyncio.create_task(collect(engine, params))
        next_one = asyncio.create_task(collect(engine, params))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.sleep(0.01)
        running.cancel()
        assert len(await next_one) == 1000
        stream = engine.generate("prompt", params, "id")
        await anext(stream)
        await stream.aclose()
        assert len(await collect(engine, params)) == 1000

    asyncio.run(run())
    assert (engine.running, engine.most) == (0, 1)


def test_cancelled_in_the_moment_of_admission() -> None:
    async def run() -> None:
        gate = RowGate()
        gate.limit = 1
        entered = asyncio.Event()

        async def hold() -> None:
            async with gate.rows(1):
                entered.set()
                await asyncio.sleep(60)

        first = asyncio.create_task(hold())
        await entered.wait()
        second = asyncio.create_task(hold())
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)  # the first leaves and admits the second, which has not run yet
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        async with asyncio.timeout(1), gate.rows(1):
            pass

    asyncio.run(run())


def test_more_rows_than_there_are() -> None:
    async def run() -> None:
        gate = RowGate()
        gate.limit = 2
        async with gate.rows(3):
            pass

    with pytest.raises(CapacityError, match="at most 2"):
        asyncio.run(run())


def test_shutdown_is_announced_first() -> None:
    engine = Engine()
    seen = guard(engine)
    engine.shutdown(timeout=5)
    assert seen["shutdowns"] == 1
    assert engine.stopped == [5]
