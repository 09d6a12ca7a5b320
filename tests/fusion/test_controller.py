"""The controller, driven as an engine drives it, equals the oracle at every step."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from steered import Steered

from cmc_server.config import FAST_PATHS, Unmapped
from cmc_server.errors import DeltaRuntimeError
from cmc_server.fusion.beside import Beside, spare_cores
from cmc_server.fusion.controller import DeltaController
from cmc_server.fusion.reference import ReferenceFusedLM
from cmc_server.fusion.streams import Unseen
from cmc_server.integrations.request_args import ActiveDelta

RESERVED = 5
TOLERANCE = {"atol": 2e-4, "rtol": 2e-4}


@dataclass
class Request:
    """A request of the driver below; ``strengths`` empty is base traffic."""

    prompt: list[int]
    strengths: dict[str, float]
    unmapped: Unmapped = "zero"
    delta_prompts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    response: list[int] = field(default_factory=list)

    @property
    def steering(self) -> list[ActiveDelta]:
        return [
            ActiveDelta(name=name, strength=strength, prompt_ids=self.delta_prompts.get(name))
            for name, strength in self.strengths.items()
        ]


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


def base_logits(oracle: ReferenceFusedLM, request: Request) -> torch.Tensor:
    (last,) = oracle.steps(request.prompt, request.response, {}, start=len(request.response))
    return last


def expected(oracle: ReferenceFusedLM, request: Request) -> torch.Tensor:
    (last,) = oracle.steps(
        request.prompt,
        request.response,
        request.strengths,
        delta_prompts=request.delta_prompts,
        unmapped=request.unmapped,
        start=len(request.response),
    )
    if request.strengths:
        last[RESERVED] = -torch.inf
    return last


def step(controller: DeltaController, oracle: ReferenceFusedLM, rows: Sequence[tuple[int, Request]]) -> torch.Tensor:
    """One engine step over (slot, request) rows, checked row by row; base rows bit by bit."""
    before = torch.stack([base_logits(oracle, request) for _, request in rows])
    named = [(row, slot) for row, (slot, request) in enumerate(rows) if request.strengths]
    controller.begin([slot for _, slot in named], before.device)
    after = controller.shift(named, before.clone())
    for row, (_, request) in enumerate(rows):
        if request.strengths:
            torch.testing.assert_close(after[row], expected(oracle, request), **TOLERANCE)
        else:
            assert torch.equal(after[row], before[row])
    return after


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


class TestReadingAhead:
    """Deltas that read prompts while the user LLM is not done with its own."""

    def test_in_pieces_beside_others(
        self, steered: Steered, oracle: ReferenceFusedLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("cmc_server.fusion.passes.MAX_TOKENS", 32)
        controller = DeltaController(RESERVED)
        for name in steered.deltas:
            controller.load(steered.load(name))
        size = oracle.vocabulary.size
        draw = random.Random(0)
        shared = [draw.randrange(size) for _ in range(70)]
        running = Request([3, 4], {"same": 1.0})
        late = [
            Request([*shared, 7], {"same": 1.0, "other": 0.5}),
            Request([*shared, 8], {"same": -1.0}),
            Request([5], {"words": 1}),
        ]
        controller.admit(0, running.prompt, running.steering)
        for slot, request in enumerate(late, 1):
            controller.admit(slot, request.prompt, request.steering)
        for _ in range(6):
            step(controller, oracle, [(0, running)])
            before = controller.counts["same"].read
            controller.prefill([1, 2, 3], torch.device("cpu"))
            assert controller.counts["same"].read - before <= 32
            running.response.append(draw.randrange(size))
            controller.advance(0, running.response[-1:])
        before = controller.counts["same"].read
        step(controller, oracle, [(0, running), *enumerate(late, 1)])
        assert controller.counts["same"].read == before + 3  # each row's last token
        assert controller.counts["same"].recomputed == 0
        window = controller.deltas["other"].runner.context_length
        assert len(shared) > window > controller.counts["other"].read - 1

    def test_a_fault_ends_only_those_that_read(
        self, steered: Steered, oracle: ReferenceFusedLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        controller = DeltaController(RESERVED)
        controller.load(steered.load("same"))
        controller.admit(0, [3, 4], Request([], {"same": 1.0}).steering)
        controller.admit(1, list(range(40, 80)), Request([], {"same": 1.0}).steering)

        def explode(*_: object) -> None:
            raise RuntimeError("boom")

        monkeypatch.setattr(controller.deltas["same"].runner, "_logits", explode)
        controller.prefill([1], torch.device("cpu"))
        monkeypatch.undo()
        after = controller.shift([(0, 0), (1, 1)], torch.zeros(2, oracle.vocabulary.size))
        assert_ended(after[1])
        assert torch.isfinite(after[0]).sum() == after.shape[1] - 1

    def test_switched_off(self, steered: Steered) -> None:
        controller = DeltaController(RESERVED, fast_paths=FAST_PATHS - {"overlap"})
        controller.load(steered.load("same"))
        controller.admit(0, list(range(40, 80)), Request([], {"same": 1.0}).steering)
        controller.prefill([0], torch.device("cpu"))
        assert controller.counts["same"].read == 0


class TestUnseen:
    """Tokens that the device knows before the host does."""

    def test_equal_to_the_oracle(self, steered: Steered, oracle: ReferenceFusedLM) -> None:
        """Rows of the user LLM's vocabulary beside such as are admitted in the same step, across blocks and windows."""
        controller = DeltaController(RESERVED)
        controller.load(steered.load("same", max_seqs=3))
        size = oracle.vocabulary.size
        draw = random.Random(0)
        running: dict[int, Request] = {}
        for moment in range(40):
            if moment in (0, 3, 11):
                request = running[len(running)] = Request([draw.randrange(size) for _ in range(11)], {"same": 1.5})
                controller.admit(len(running) - 1, request.prompt, request.steering, request.unmapped)
            ids = []
            for slot, request in running.items():
                if request.response:
                    assert controller.can_read_unseen(slot, size)
                    controller.advance_unseen(slot)
                ids.append(request.response[-1] if request.response else -1)
            logits = torch.stack([base_logits(oracle, request) for request in running.values()])
            rows = [(slot, slot) for slot in running]
            after = controller.shift(rows, logits, Unseen(torch.tensor(ids), list(running)) if max(ids) >= 0 else None)
            for slot, request in running.items():
                torch.testing.assert_close(after[slot], expected(oracle, request), **TOLERANCE)
                if request.response:
                    controller.see(slot, request.response[-1])
                request.response.append(draw.randrange(size))
        counts = controller.counts["same"]
        assert counts.tokens == sum(len(request.response) for request in running.values())
        assert counts.recomputed == counts.rebuilds == 0

    def test_only_where_no_token_is_ever_spelled(self, steered: Steered) -> None:
        controller = DeltaController(RESERVED)
        for name in steered.deltas:
            controller.load(steered.load(name))
        size = steered.vocabulary.size
        for slot, names in enumerate([("same",), ("other",), ("same", "words")]):
            controller.admit(slot, [1, 2], [ActiveDelta(name=name, strength=1) for name in names])
        assert [controller.can_read_unseen(slot, size) for slot in range(3)] == [True, False, False]
        assert not controller.can_read_unseen(0, size + 1)  # the last column's token, if sampled, has no text
        for fast_path in ("overlap", "spelling"):
            slow = DeltaController(RESERVED, fast_paths=FAST_PATHS - {fast_path})
            slow.load(steered.load("same"))
            slow.admit(0, [1, 2], [ActiveDelta(name="same", strength=1)])
            assert not slow.can_read_unseen(0, size)

    def test_a_fault_ends_the_row_at_once_and_is_noted_a_step_later(
        self, steered: Steered, oracle: ReferenceFusedLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        controller = DeltaController(RESERVED)
        controller.load(steered.load("same"))
        runner = controller.deltas["same"].runner
        prompt = list(range(40, 80))
        faulty, healthy = Request(prompt, {"same": 1.0}, response=[9]), Request([2], {"same": 1.0}, response=[9])
        for slot, request in enumerate((faulty, healthy)):
            controller.admit(slot, request.prompt, request.steering, request.unmapped)
            controller.advance_unseen(slot)
        real = runner._logits
        monkeypatch.setattr(runner, "_logits", lambda *arguments: real(*arguments) * torch.tensor([[torch.nan], [1.0]]))
        logits = torch.stack([base_logits(oracle, request) for request in (faulty, healthy)])
        after = controller.shift([(0, 0), (1, 1)], logits, Unseen(torch.tensor([9, 9]), [0, 1]))
        monkeypatch.undo()
        assert_ended(after[0])
        torch.testing.assert_close(after[1], expected(oracle, healthy), **TOLERANCE)
        assert controller.counts["same"].failures == 0  # the host has not looked
        for slot in (0, 1):
            controller.see(slot, 9)
        controller.release(0)  # before the verdict is heard: nobody may find what it has read
        step(controller, oracle, [(1, healthy)])
        assert controller.counts["same"].failures == 1
        read = controller.counts["same"].read
        again = Request(prompt, {"same": 1.0})
        controller.admit(2, again.prompt, again.steering, again.unmapped)
        step(controller, oracle, [(2, again)])
        assert controller.counts["same"].read == read + len(controller.deltas["same"].prompt_ids(prompt))


def test_spare_cores() -> None:
    allowed = frozenset(range(6))
    assert spare_cores("{0,1,2}", allowed) == {3, 4, 5}
    assert spare_cores("granularity=fine,explicit,proclist=[0,5]", allowed) == {1, 2, 3, 4}
    assert spare_cores("0 1 2 3 4 5", allowed) == frozenset()
    assert spare_cores(None, allowed) == frozenset()  # not bound: no core is known to be free


def assert_ended(row: torch.Tensor) -> None:
    assert row[RESERVED] == 0
    assert torch.isfinite(row).sum() == 1


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
