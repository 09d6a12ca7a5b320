"""A guard around vLLM's engine client, in the API process.

It sees every request on its way into the engine and every output on its way out, whichever of vLLM's serving classes
is at work. Requests without deltas pass through the original method.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from vllm.exceptions import GenerationError

from cmc_server.errors import CapacityError
from cmc_server.integrations.request_args import EXTRA_ARGS_KEY, read_controls


class RowGate:
    """Lets a limited number of steered rows run; the others wait in the order in which they came.

    Args:
        on_waiting: called with the number of waiting rows whenever it changes.
    """

    def __init__(self, on_waiting: Callable[[int], None] = lambda rows: None) -> None:
        self.limit: int | None = None  # no limit
        self._running = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._on_waiting = on_waiting

    @asynccontextmanager
    async def rows(self, count: int) -> AsyncIterator[None]:
        """Hold ``count`` places.

        Raises:
            CapacityError: there are not so many places at all.
        """
        await self._acquire(count)
        try:
            yield
        finally:
            self._running -= count
            self._admit()

    async def _acquire(self, count: int) -> None:
        if self.limit is not None and count > self.limit:
            raise CapacityError(f"A request may have at most {self.limit} steered rows on this server, not {count}.")
        if not self._waiting and self._fits(count):
            self._running += count
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (count, turn)
        self._waiting.append(entry)
        self._report()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._running -= count  # admitted and cancelled in the same moment
            else:
                self._waiting.remove(entry)
                self._report()
            self._admit()
            raise

    def _admit(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            count, turn = self._waiting.popleft()
            self._running += count
            turn.set_result(None)
            self._report()

    def _fits(self, count: int) -> bool:
        return self.limit is None or self._running + count <= self.limit

    def _report(self) -> None:
        self._on_waiting(sum(count for count, _ in self._waiting))


class ServedModels:
    """The models that vLLM itself serves: the user LLM under its names, and adapters.

    Args:
        state: the application's state as vLLM's ``init_app_state`` left it.
    """

    def __init__(self, state: Any) -> None:
        self._models = state.openai_serving_models
        self.base_ids: list[str] = [base.name for base in self._models.base_model_paths]

    def __contains__(self, model_id: str) -> bool:
        return model_id in self.base_ids or model_id in self._models.lora_requests

    async def cards(self) -> list[dict[str, Any]]:
        """Their entries in ``/v1/models``, the user LLM's first."""
        listing = await self._models.show_available_models()
        cards: list[dict[str, Any]] = listing.model_dump()["data"]
        return cards


def engine_rows(engine_client: Any) -> int:
    """How many rows the engine runs at once."""
    rows: int = engine_client.vllm_config.scheduler_config.max_num_seqs
    return rows


async def ask_workers(engine_client: Any, method: str, *arguments: Any) -> list[Any]:
    """Call a method of our worker extension on every rank of every engine; what each of them answers.

    ``AsyncLLM.collective_rpc`` calls it everywhere, too, but under data parallelism hears the first engine alone.
    """
    asked = engine_client.engine_core.call_utility_all_async("collective_rpc", method, None, arguments, {})
    return [answer for of_engine in await asked for answer in of_engine]


def is_dead(engine_client: Any) -> bool:
    """Whether the engine has ended by itself; only known until it is shut down, which vLLM notes in the same way."""
    return bool(engine_client.engine_core.resources.engine_dead)


def guard_engine(
    engine_client: Any,
    *,
    reserved_token_id: int | None,
    gate: RowGate,
    required: Mapping[str, float],
    on_failure: Callable[[], None],
    on_shutdown: Callable[[], None],
) -> None:
    """Install the guard on this engine client.

    Nothing is generated without the required deltas, whichever way it came: the front door adds them to the requests
    that it knows, and what it does not know ends here.

    A steered request gets the reserved token among its stop tokens, waits at the gate, and ends with vLLM's own
    ``GenerationError`` as soon as the reserved token comes out: a 500, or an error event in a stream. No text of that
    output goes out.

    Args:
        engine_client: vLLM's ``AsyncLLM``.
        reserved_token_id: the token by which the workers report a failed delta.
        gate: limits the rows that are steered at once.
        required: strengths of the deltas that every request must have, by name.
        on_failure: called for each request that fails.
        on_shutdown: called when vLLM begins to stop the engine, before it waits for running requests.
    """
    generate, shutdown = engine_client.generate, engine_client.shutdown

    def guarded_generate(
        prompt: Any, sampling_params: Any, request_id: str, **arguments: Any
    ) -> AsyncGenerator[Any, None]:
        if required:
            _check_required(sampling_params.extra_args, required)
        if EXTRA_ARGS_KEY not in (sampling_params.extra_args or {}):
            outputs: AsyncGenerator[Any, None] = generate(prompt, sampling_params, request_id, **arguments)
            return outputs
        params = _with_stop_token(sampling_params, reserved_token_id)
        return steered(prompt, params, request_id, arguments)

    async def steered(
        prompt: Any, params: Any, request_id: str, arguments: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        async with gate.rows(params.n):
            outputs = generate(prompt, params, request_id, **arguments)
            try:
                async for output in outputs:
                    if _has_failed(output, reserved_token_id):
                        on_failure()
                        raise GenerationError("A delta of this request failed; see the server's log.")
                    yield output
            finally:
                await outputs.aclose()  # aborts the request if it still runs

    def guarded_shutdown(*arguments: Any, **keywords: Any) -> None:
        on_shutdown()
        shutdown(*arguments, **keywords)

    engine_client.generate = guarded_generate
    engine_client.shutdown = guarded_shutdown


def _check_required(extra_args: Mapping[str, Any] | None, required: Mapping[str, float]) -> None:
    """Refuse what would run without a required delta.

    Raises:
        ValueError: one is missing, or has another strength; vLLM answers 400.
    """
    controls = read_controls(extra_args)
    given = {delta.name: delta.strength for delta in controls.deltas} if controls else {}
    if any(given.get(name) != strength for name, strength in required.items()):
        raise ValueError(f"This server requires {', '.join(required)}, which this request cannot carry.")


def _with_stop_token(params: Any, token: int | None) -> Any:
    """A copy of the sampling parameters that also stops at ``token``."""
    if token is None:
        return params
    copy = params.clone()
    copy.stop_token_ids = [*(params.stop_token_ids or ()), token]
    # vLLM derives this set from the list when the parameters are made; min_tokens reads it.
    copy._all_stop_token_ids = {*params.all_stop_token_ids, token}
    return copy


def _has_failed(output: Any, token: int | None) -> bool:
    return token is not None and any(
        choice.stop_reason == token or token in choice.token_ids for choice in output.outputs
    )
