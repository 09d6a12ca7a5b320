"""MRV2's bookkeeping: slots are taken again, rows change order, and the host learns a token a step after the device."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cmc_server.fusion.streams import Unseen
from cmc_server.integrations.request_args import ActiveDelta, RequestControls
from cmc_server.integrations.vllm_v2 import V2Adapter

NUM_COLUMNS = 100
STEERED = RequestControls(deltas=(ActiveDelta(name="d", strength=1.0),)).to_extra_args()


class Recorder:
    """Stands where the controller does, and remembers what each slot was told."""

    def __init__(self, reads_unseen: bool) -> None:
        self.reads_unseen = reads_unseen
        self.tokens: dict[int, list[int]] = {}
        self.prompts: dict[int, list[int]] = {}
        self.open: set[int] = set()
        self.num_unseen = 0

    def admit(self, slot: int, prompt: Sequence[int], *_: Any) -> None:
        self.prompts[slot], self.tokens[slot] = list(prompt), []

    def advance(self, slot: int, token_ids: Sequence[int]) -> None:
        assert slot not in self.open
        self.tokens[slot] += token_ids

    def can_read_unseen(self, slot: int, num_columns: int) -> bool:
        assert num_columns == NUM_COLUMNS
        return self.reads_unseen and slot in self.prompts

    def advance_unseen(self, slot: int) -> None:
        assert slot not in self.open
        self.open.add(slot)

    def see(self, slot: int, token_id: int) -> None:
        self.open.remove(slot)
        self.tokens[slot].append(token_id)

    def prefill(self, slots: Sequence[int], _: torch.device) -> None:
        assert all(not self.tokens[slot] for slot in slots)
        self.read_ahead = [self.prompts[slot] for slot in slots]

    def release(self, slot: int) -> None:
        self.open.discard(slot)
        self.prompts.pop(slot, None)
        self.tokens.pop(slot, None)

    def shift(self, rows: Sequence[tuple[int, int]], logits: Tensor, unseen: Unseen | None) -> Tensor:
        self.num_unseen += len(self.open)
        ids = [-1] * len(rows) if unseen is None else unseen.ids[unseen.places].tolist()
        assert {slot for (_, slot), one in zip(rows, ids, strict=True) if one >= 0} == self.open
        self.seen = {
            slot: (self.prompts[slot], self.tokens[slot] + ([one] if one >= 0 else []))
            for (_, slot), one in zip(rows, ids, strict=True)
        }
        return logits


class Runner:
    """What MRV2 does with its buffers, in its order; the adapter reads them."""

    def __init__(self, controller: Recorder) -> None:
        self.tokens = torch.zeros(4, 64, dtype=torch.int32)
        self.total = torch.zeros(4, dtype=torch.int32)
        self.prompt, self.prefill = np.zeros(4, dtype=np.int32), np.zeros(4, dtype=np.int32)
        states = SimpleNamespace(
            device=self.tokens.device,
            all_token_ids=SimpleNamespace(gpu=self.tokens),
            total_len=SimpleNamespace(gpu=self.total),
            prompt_len=SimpleNamespace(np=self.prompt),
            prefill_len=SimpleNamespace(np=self.prefill),
        )
        self.controller = controller
        self.adapter = V2Adapter(controller, states)  # type: ignore[arg-type]

    def add(self, slot: int, prompt: list[int], response: Sequence[int] = (), extra_args: Any = STEERED) -> None:
        tokens = [*prompt, *response]
        self.tokens[slot, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        self.total[slot] = self.prefill[slot] = len(tokens)
        self.prompt[slot] = len(prompt)
        self.adapter.add(slot, extra_args)

    def step(self, sampled: dict[int, int], partial: Sequence[int] = ()) -> None:
        """Rows in the order of ``sampled``, then those whose prompt is not complete; each row takes its token."""
        self.adapter.fetch()
        slots = [*sampled, *partial]
        lengths = [int(self.total[slot]) - (slot in partial) for slot in slots]
        context = SimpleNamespace(idx_mapping_np=np.array(slots), seq_lens_upper_bound_np=np.array(lengths))
        self.adapter.apply(torch.zeros(len(slots), NUM_COLUMNS), context)  # type: ignore[arg-type]
        for slot, token in sampled.items():
            self.tokens[slot, self.total[slot]] = token
            self.total[slot] += 1


@pytest.fixture(params=[True, False], ids=["unseen", "waiting"])
def runner(request: pytest.FixtureRequest) -> Runner:
    return Runner(Recorder(request.param))


def seen(runner: Runner) -> dict[int, tuple[list[int], list[int]]]:
    return runner.controller.seen


def test_responses_grow_in_any_order(runner: Runner) -> None:
    runner.add(2, [5, 6, 7])
    runner.step({2: 10})
    assert seen(runner) == {2: ([5, 6, 7], [])}
    runner.add(0, [8])
    runner.step({0: 20, 2: 11})
    assert seen(runner) == {0: ([8], []), 2: ([5, 6, 7], [10])}
    runner.step({2: 12, 0: 21})
    assert seen(runner) == {2: ([5, 6, 7], [10, 11]), 0: ([8], [20])}
    runner.step({0: 22})
    runner.step({0: 23, 2: 13})
    assert seen(runner) == {0: ([8], [20, 21, 22]), 2: ([5, 6, 7], [10, 11, 12])}
    assert (runner.controller.num_unseen > 0) == runner.controller.reads_unseen


def test_base_rows_and_prompts_that_are_not_complete_are_left_out(runner: Runner) -> None:
    runner.add(0, [1, 2])
    runner.add(1, [3], extra_args=None)
    runner.add(3, [4, 4, 4])
    runner.step({1: 9, 0: 10}, partial=[3])
    assert seen(runner) == {0: ([1, 2], [])}
    assert runner.controller.read_ahead == [[4, 4, 4]]
    runner.step({0: 11, 3: 30, 1: 9})
    assert seen(runner) == {0: ([1, 2], [10]), 3: ([4, 4, 4], [])}


def test_a_slot_is_taken_again(runner: Runner) -> None:
    """After preemption a request comes back with what it had; the last token of the one before is not its own."""
    runner.add(0, [1, 2])
    for token in (10, 11):
        runner.step({0: token})
    runner.add(0, [1, 2], response=[10])
    runner.step({0: 12})
    assert seen(runner) == {0: ([1, 2], [10])}
    runner.step({0: 13})
    assert seen(runner) == {0: ([1, 2], [10, 12])}
    runner.add(0, [7, 7, 7, 7])
    runner.step({0: 14})
    assert seen(runner) == {0: ([7, 7, 7, 7], [])}


def test_steps_without_steered_rows_lose_nothing(runner: Runner) -> None:
    runner.add(0, [1])
    runner.add(1, [2], extra_args=None)
    runner.step({0: 10, 1: 9})
    runner.step({0: 11, 1: 9})
    for _ in range(3):
        runner.step({1: 9})
    runner.step({0: 12, 1: 9})
    assert seen(runner) == {0: ([1], [10, 11])}


def test_no_step_waits_for_a_token_that_deltas_of_the_same_vocabulary_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step has just sampled is on its way until the end of the next one, and nobody asks for it before."""
    runner = Runner(Recorder(reads_unseen=True))
    runner.add(0, [1])
    runner.step({0: 10})
    for token in range(20, 25):
        waited = []
        real = V2Adapter._take_in

        def take_in(adapter: V2Adapter, copy: Any, real: Any = real, waited: Any = waited) -> None:
            waited.append(copy.values.values[1].tolist())
            real(adapter, copy)

        monkeypatch.setattr(V2Adapter, "_take_in", take_in)
        newest = int(runner.tokens[0, runner.total[0] - 1])
        runner.step({0: token})
        assert [newest] not in waited
        monkeypatch.undo()
