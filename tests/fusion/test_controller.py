"""The controller, driven as an engine drives it, equals the oracle at every step."""

from __future__ import annotations

import gc
import os
import random
import weakref
from collections.abc import Iterator

import pytest
import torch
from controller_driver import RESERVED, TOLERANCE, Request, assert_ended, base_logits, expected, step
from steered import Steered

from cmc_server.config import FAST_PATHS, Unmapped
from cmc_server.errors import DeltaRuntimeError
from cmc_server.fusion.beside import Beside, spare_cores
from cmc_server.fusion.controller import DeltaController
from cmc_server.fusion.reference import ReferenceFusedLM
from cmc_server.integrations.request_args import ActiveDelta


@pytest.fixture(scope="module")
def oracle(steered: Steered) -> ReferenceFusedLM:
    return ReferenceFusedLM(steered.user, steered.deltas)


@pytest.fixture(params=["all", *(f"without {path}" for path in sorted(FAST_PATHS))])
def controller(steered: Steered, request: pytest.FixtureRequest) -> Iterator[DeltaController]:
    """With every fast path on, and with each one off."""
    fast_paths = FAST_PATHS - {request.param.removeprefix("without ")}
    beside = Beside(frozenset(os.sched_getaffinity(0))) if "overlap" in fast_paths else None
    made = DeltaController(RESERVED, beside=beside, fast_paths=fast_paths)
    for name in steered.deltas:
        made.load(steered.load(name, fast_paths=fast_paths))
    yield made


def random_request(draw: random.Random, oracle: ReferenceFusedLM) -> Request:
    size = oracle.vocabulary.size
    names = draw.sample(sorted(oracle.deltas), draw.randint(0, 3))
    prompt = [draw.randrange(size) for _ in range(draw.randint(1, 30))]
    policy: Unmapped = draw.choice(["zero", "preserve"])
    request = Request(prompt, {name: draw.choice([-1.0, 0.5, 2.0]) for name in names}, policy)
    if draw.random() < 0.5:
        request.delta_prompts = {name: (1, 2, 3 + draw.randrange(50)) for name in names}
    return request


def test_requests_come_and_go(controller: DeltaController, oracle: ReferenceFusedLM) -> None:
    draw = random.Random(0)
    running: dict[int, Request] = {}
    for _ in range(40):
        free = [slot for slot in range(6) if slot not in running]
        if free and draw.random() < 0.5:
            slot = draw.choice(free)
            running[slot] = random_request(draw, oracle)
            controller.admit(slot, running[slot].prompt, running[slot].steering, running[slot].unmapped)
        rows = draw.sample(sorted(running.items()), len(running)) if running else []
        if rows:
            after = step(controller, oracle, rows)
            for row, (slot, request) in enumerate(rows):
                token = int(after[row].argmax()) if draw.random() < 0.7 else draw.randrange(after.shape[1])
                request.response.append(token)
                if request.strengths:
                    controller.advance(slot, [token])
        for slot in [slot for slot in running if draw.random() < 0.08]:
            del running[slot]
            controller.release(slot)


def test_a_resumed_request_goes_on_where_it_was(controller: DeltaController, oracle: ReferenceFusedLM) -> None:
    request = Request([3, 40, 41], {"other": 1.0, "words": -0.5}, response=[50, 60, 70, 80, 90])
    controller.admit(0, request.prompt, request.steering, request.unmapped)
    controller.advance(0, request.response)
    step(controller, oracle, [(0, request)])
    step(controller, oracle, [(0, request)])  # a step without a new token gives the same row
    controller.release(0)
    controller.admit(4, request.prompt, request.steering, request.unmapped)
    controller.advance(4, request.response)
    step(controller, oracle, [(4, request)])


def test_one_prompt_for_many_answers_is_read_once(steered: Steered, oracle: ReferenceFusedLM) -> None:
    controller = DeltaController(RESERVED)
    delta = steered.load("same")
    controller.load(delta)
    draw = random.Random(2)
    prompt = [draw.randrange(oracle.vocabulary.size) for _ in range(70)]
    rows = [(slot, Request(prompt, {"same": 1.0})) for slot in range(4)]
    for slot, request in rows:
        controller.admit(slot, request.prompt, request.steering, request.unmapped)
    before = delta.runner.num_tokens
    for turn in range(6):
        step(controller, oracle, rows)
        if turn == 0:
            read = len(delta.prompt_ids(prompt))
            assert delta.runner.num_tokens - before == read + 3 * (read - (read - 1) // 32 * 32)
        for slot, request in rows:
            token = draw.randrange(oracle.vocabulary.size)
            request.response.append(token)
            controller.advance(slot, [token])
    for slot, _ in rows:
        controller.release(slot)
    again = Request(prompt, {"same": 1.0}, response=rows[0][1].response)
    controller.admit(9, again.prompt, again.steering, again.unmapped)
    controller.advance(9, again.response)
    step(controller, oracle, [(9, again)])


def test_beyond_the_window(controller: DeltaController, oracle: ReferenceFusedLM) -> None:
    """The context of ``other`` is 48: a long answer makes its window move, a long prompt begins beyond it."""
    draw = random.Random(1)
    size = oracle.vocabulary.size
    rows = [
        (slot, Request([draw.randrange(size) for _ in range(length)], {"other": 1.0}))
        for slot, length in ((0, 5), (1, 150))
    ]
    for slot, request in rows:
        controller.admit(slot, request.prompt, request.steering, request.unmapped)
    for _ in range(70):
        step(controller, oracle, rows)
        for slot, request in rows:
            token = draw.randrange(size)
            request.response.append(token)
            controller.advance(slot, [token])


def test_more_rows_than_cached_sequences_take_turns(steered: Steered, oracle: ReferenceFusedLM) -> None:
    controller = DeltaController(RESERVED)
    controller.load(steered.load("same", max_seqs=1))
    first, second = Request([7, 8], {"same": 1.0}), Request([9], {"same": 1.0})
    for slot, request in enumerate((first, second)):
        controller.admit(slot, request.prompt, request.steering, request.unmapped)
    for _ in range(2):
        step(controller, oracle, [(0, first)])
        step(controller, oracle, [(1, second)])
    logits = torch.zeros(2, oracle.vocabulary.size)
    after = controller.shift([(0, 0), (1, 1)], logits)
    ended = [row for row in range(2) if torch.isfinite(after[row]).sum() == 1]
    assert len(ended) == 1, "two rows at once do not fit: one ends with an error, the other goes on"


def test_an_empty_prompt_without_bos(controller: DeltaController, oracle: ReferenceFusedLM) -> None:
    request = Request([oracle.vocabulary.eos_ids[0]], {"words": 1.0}, "preserve")
    controller.admit(0, request.prompt, request.steering, request.unmapped)
    step(controller, oracle, [(0, request)])


def test_what_was_begun_for_others_is_not_used(controller: DeltaController, oracle: ReferenceFusedLM) -> None:
    requests = [Request([1, 2], {"same": 1.0}), Request([3], {"same": 2.0, "other": 1.0}), Request([4], {"same": 1.0})]
    for slot, request in enumerate(requests):
        controller.admit(slot, request.prompt, request.steering, request.unmapped)

    def check(slots: list[int]) -> None:
        logits = torch.stack([base_logits(oracle, requests[slot]) for slot in slots])
        controller.shift(list(enumerate(slots)), logits)
        for row, slot in enumerate(slots):
            torch.testing.assert_close(logits[row], expected(oracle, requests[slot]), **TOLERANCE)

    controller.begin([0, 1, 2], torch.device("cpu"))
    check([2, 0])  # some of them, in another order
    controller.begin([0, 1], torch.device("cpu"))
    controller.advance(1, [7, 8])  # one went on
    requests[1].response += [7, 8]
    check([0, 1])
    controller.begin([0, 1], torch.device("cpu"))
    requests[0] = Request([9], {"same": -1.0})
    controller.admit(0, requests[0].prompt, requests[0].steering, "zero")  # one slot has a new request
    check([0, 1])
    controller.begin([0, 2], torch.device("cpu"))
    controller.begin([1, 2], torch.device("cpu"))
    controller.release(0)
    check([1, 2])


def test_a_delta_loaded_twice_is_forgotten_twice(steered: Steered) -> None:
    """The same content again under the same name: the first copy must not outlive its last request."""
    controller = DeltaController(RESERVED)
    copies = []
    for slot in range(3):
        delta = steered.load("same")
        copies.append(weakref.ref(delta))
        controller.load(delta)
        controller.admit(slot, [1, 2], [ActiveDelta(name="same", strength=1)])
        controller.shift([(slot, slot)], torch.zeros(3, steered.vocabulary.size))
    version = delta.artifact.version
    del delta
    controller.unload("same")
    controller.retire("same", version)
    for slot in range(3):
        assert copies[slot]() is not None
        controller.release(slot)
    gc.collect()
    assert [copy() for copy in copies] == [None] * 3


def test_spare_cores() -> None:
    allowed = frozenset(range(6))
    assert spare_cores("{0,1,2}", allowed) == {3, 4, 5}
    assert spare_cores("granularity=fine,explicit,proclist=[0,5]", allowed) == {1, 2, 3, 4}
    assert spare_cores("0 1 2 3 4 5", allowed) == frozenset()
    assert spare_cores(None, allowed) == frozenset()  # not bound: no core is known to be free


class TestFailure:
    """A failed delta ends its own request and nothing else; never does it turn into base output."""

    def test_in_the_forward_pass(
        self, controller: DeltaController, oracle: ReferenceFusedLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failing, healthy, base = Request([1], {"same": 1.0}), Request([2], {"other": 1.0}), Request([3], {})
        for slot, request in ((0, failing), (1, healthy)):
            controller.admit(slot, request.prompt, request.steering, request.unmapped)

        def explode(*_: object) -> None:
            raise RuntimeError("boom")

        monkeypatch.setattr(controller.deltas["same"].runner, "_logits", explode)
        before = torch.stack([base_logits(oracle, request) for request in (failing, healthy, base)])
        controller.begin([0, 1], before.device)
        after = controller.shift([(0, 0), (1, 1)], before.clone())
        assert_ended(after[0])
        torch.testing.assert_close(after[1], expected(oracle, healthy), **TOLERANCE)
        assert torch.equal(after[2], before[2])
        monkeypatch.undo()
        controller.advance(0, [RESERVED])
        assert_ended(controller.shift([(0, 0)], before[:1].clone())[0])
        fresh = Request([1], {"same": 1.0})
        controller.admit(2, fresh.prompt, fresh.steering, fresh.unmapped)
        step(controller, oracle, [(2, fresh)])

    def test_logits_that_are_not_finite(
        self, controller: DeltaController, oracle: ReferenceFusedLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runner = controller.deltas["same"].runner
        real = runner._logits
        monkeypatch.setattr(runner, "_logits", lambda *arguments: real(*arguments) * torch.tensor([[torch.nan], [1.0]]))
        requests = [Request([1], {"same": 1.0}), Request([2], {"same": 1.0})]
        for slot, request in enumerate(requests):
            controller.admit(slot, request.prompt, request.steering, request.unmapped)
        controller.begin([0, 1], torch.device("cpu"))
        after = controller.shift([(0, 0), (1, 1)], torch.zeros(2, oracle.vocabulary.size))
        assert_ended(after[0])
        assert torch.isfinite(after[1]).sum() == after.shape[1] - 1

    @pytest.mark.parametrize(
        "steering", [ActiveDelta(name="gone", strength=1), ActiveDelta(name="same", strength=1, version="0")]
    )
    def test_a_delta_that_is_not_there(self, controller: DeltaController, steering: ActiveDelta) -> None:
        controller.admit(0, [1], [steering])
        controller.advance(0, [4])
        assert_ended(controller.shift([(0, 0)], torch.zeros(1, 50))[0])

    def test_a_prompt_without_token_ids(self, controller: DeltaController) -> None:
        controller.admit(0, None, [ActiveDelta(name="same", strength=1)])
        assert_ended(controller.shift([(0, 0)], torch.zeros(1, 50))[0])

    def test_without_a_reserved_token_it_is_raised(self, steered: Steered, monkeypatch: pytest.MonkeyPatch) -> None:
        controller = DeltaController()
        with pytest.raises(DeltaRuntimeError, match="not loaded"):
            controller.admit(0, [1], [ActiveDelta(name="gone", strength=1)])
        for beside in (None, Beside(frozenset(os.sched_getaffinity(0)))):
            controller = DeltaController(beside=beside)
            controller.load(steered.load("same"))
            controller.admit(0, [1], [ActiveDelta(name="same", strength=1)])
            monkeypatch.setattr(controller.deltas["same"].runner, "_logits", lambda *_: 1 / 0)
            controller.begin([0], torch.device("cpu"))
            with pytest.raises(DeltaRuntimeError, match="division by zero"):
                controller.shift([(0, 0)], torch.zeros(1, 50))
