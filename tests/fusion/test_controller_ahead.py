"""What the controller does before the host knows it all: tokens that only the device has, prompts read ahead."""

from __future__ import annotations

import random

import pytest
import torch
from controller_driver import RESERVED, TOLERANCE, Request, assert_ended, base_logits, expected, step
from steered import Steered

from cmc_server.config import FAST_PATHS
from cmc_server.fusion.controller import DeltaController
from cmc_server.fusion.reference import ReferenceFusedLM
from cmc_server.fusion.streams import Unseen
from cmc_server.integrations.request_args import ActiveDelta


@pytest.fixture(scope="module")
def oracle(steered: Steered) -> ReferenceFusedLM:
    return ReferenceFusedLM(steered.user, steered.deltas)


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
