"""What the controller counts, against what a test did; and that looking changes nothing."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from steered import Steered

from cmc_server.fusion.controller import DeltaController
from cmc_server.fusion.counts import LOOK_EVERY, DeltaCounts, TopTokens, TopWatch
from cmc_server.integrations.request_args import ActiveDelta

RESERVED = 5
CPU = torch.device("cpu")


def controller_with(steered: Steered, *names: str, max_seqs: int = 8) -> DeltaController:
    controller = DeltaController(RESERVED)
    for name in names:
        controller.load(steered.load(name, max_seqs=max_seqs))
    return controller


def admit(controller: DeltaController, slot: int, prompt: list[int], *names: str) -> None:
    controller.admit(slot, prompt, [ActiveDelta(name=name, strength=1.0) for name in names])


def shift(controller: DeltaController, size: int, *slots: int) -> None:
    controller.shift(list(enumerate(slots)), torch.randn(len(slots) + 1, size))


def test_rows_tokens_and_passes(steered: Steered) -> None:
    controller, size = controller_with(steered, "same", "words"), steered.vocabulary.size
    admit(controller, 0, [7, 8], "same")
    admit(controller, 1, [9], "same", "words")
    shift(controller, size, 0, 1)
    shift(controller, size, 0, 1)  # once more for the same response: no other token
    controller.advance(0, [20])
    shift(controller, size, 0)
    same, words = controller.counts["same"], controller.counts["words"]
    assert (same.admissions, words.admissions) == (2, 1)
    assert (same.tokens, words.tokens) == (3, 1)
    assert [one.rows for one in same.passes] == [2, 2, 1]
    assert [one.rows for one in words.passes] == [1, 1]
    assert all(0 < one.seconds < 60 for one in same.passes)
    assert same.failures == words.failures == 0
    shift(controller, size)  # base rows only
    assert len(same.passes) == 3


def test_a_row_that_resumes_is_not_counted_twice(steered: Steered) -> None:
    controller, size = controller_with(steered, "same"), steered.vocabulary.size
    for _ in range(2):
        admit(controller, 0, [7], "same")
        controller.advance(0, list(range(20, 30)))
        shift(controller, size, 0)
    assert controller.counts["same"].tokens == 2
    assert controller.counts["same"].admissions == 2


def test_an_exact_map_reads_every_token_once(steered: Steered) -> None:
    controller, size = controller_with(steered, "same"), steered.vocabulary.size
    prompt = list(range(40, 50))
    before = controller.deltas["same"].runner.num_tokens
    admit(controller, 0, prompt, "same")
    for token in range(60, 80):
        shift(controller, size, 0)
        controller.advance(0, [token])
    counts = controller.counts["same"]
    assert counts.read == controller.deltas["same"].runner.num_tokens - before
    assert counts.read == len(controller.deltas["same"].prompt_ids(prompt)) + 19
    assert (counts.recomputed, counts.respellings, counts.rebuilds) == (0, 0, 0)


def test_tokens_that_are_spelled_again_are_read_again(steered: Steered) -> None:
    controller, size = controller_with(steered, "words"), steered.vocabulary.size
    speller = controller.deltas["words"].speller
    draw = random.Random(3)
    response = [draw.randrange(4, size) for _ in range(30)]
    admit(controller, 0, [40, 41], "words")
    total, most = 0, len(controller.deltas["words"].prompt_ids([40, 41]))
    for token in response:
        shift(controller, size, 0)
        controller.advance(0, [token])
        total += not speller.is_followed(token)
        most = max(most, len(controller._requests[0].streams[0].text.ids))
    counts = controller.counts["words"]
    assert 0 < counts.respellings == total < len(response)
    assert 0 < counts.recomputed < counts.read
    # What was read is what the input grew to and what was read more than once.
    assert counts.read - counts.recomputed <= most + counts.respellings
    slow = DeltaController(RESERVED, fast_paths=frozenset())
    slow.load(steered.load("words", fast_paths=frozenset()))
    admit(slow, 0, [40, 41], "words")
    for token in response:
        slow.advance(0, [token])
    assert slow.counts["words"].respellings == total


def test_a_window_that_moves_is_a_rebuild(steered: Steered) -> None:
    """The context of ``other`` is 48."""
    controller, size = controller_with(steered, "other"), steered.vocabulary.size
    admit(controller, 0, [40] * 200, "other")
    shift(controller, size, 0)
    assert controller.counts["other"].rebuilds == 0  # a long prompt begins beyond the window
    for token in range(100, 170):
        controller.advance(0, [token])
        shift(controller, size, 0)
    counts = controller.counts["other"]
    assert counts.rebuilds >= 2
    assert counts.recomputed >= 20 * counts.rebuilds


def test_a_row_that_lost_its_room_is_rebuilt(steered: Steered) -> None:
    controller, size = controller_with(steered, "same", max_seqs=1), steered.vocabulary.size
    for slot in range(2):
        admit(controller, slot, list(range(40, 50)), "same")
    for slot in (0, 1, 0):
        shift(controller, size, slot)
    counts = controller.counts["same"]
    length = len(controller.deltas["same"].prompt_ids(list(range(40, 50))))
    assert (counts.rebuilds, counts.recomputed) == (1, length)
    shift(controller, size, 0, 1)
    assert counts.failures == 1


def test_counts_outlive_the_delta(steered: Steered) -> None:
    controller, size = controller_with(steered, "same"), steered.vocabulary.size
    admit(controller, 0, [7], "same")
    shift(controller, size, 0)
    controller.unload("same")
    admit(controller, 1, [7], "same")
    shift(controller, size, 0, 1)
    controller.load(steered.load("same"))
    assert controller.counts["same"].failures == 1
    assert controller.counts["same"].admissions == 1
    admit(controller, 2, [7], "nobody")
    assert "nobody" not in controller.counts  # names that a client makes up leave no trace


def test_the_top_token_is_compared_before_and_after(steered: Steered) -> None:
    controller, size = controller_with(steered, "same", "words"), steered.vocabulary.size
    controller._watch = TopWatch(every=1)
    admit(controller, 0, [7, 8], "same")
    admit(controller, 1, [9], "same", "words")
    generator = torch.Generator().manual_seed(0)
    changes = []
    for _ in range(20):
        logits = 6 * torch.randn(2, size, generator=generator)
        before = logits.argmax(dim=1)
        after = controller.shift([(0, 0), (1, 1)], logits).argmax(dim=1)
        row = len(changes) % 2  # rows take turns
        changes.append(int(before[row] != after[row]))
    assert 0 < sum(changes) < 20
    assert controller.counts["same"].top.seen_and_changed == (20, sum(changes))
    assert controller.counts["words"].top.seen_and_changed == (10, sum(changes[1::2]))


@pytest.mark.parametrize("every", [1, 4, LOOK_EVERY])
def test_looks_are_as_frequent_as_said_and_rows_take_turns(every: int) -> None:
    watch, logits = TopWatch(every), torch.randn(3, 20)
    steps, looked = 400 * every, []
    for _ in range(steps):
        look = watch.look([0, 2], logits)
        if look is not None:
            looked.append(look.row)
    assert len(looked) == pytest.approx(400, rel=0.1)
    assert abs(looked.count(0) - looked.count(2)) <= 1
    assert watch.look([], logits) is None


def test_gaps_between_looks_differ() -> None:
    watch, logits = TopWatch(), torch.randn(1, 20)
    at = [step for step in range(4000) if watch.look([0], logits) is not None]
    gaps = {after - before for before, after in pairwise(at)}
    assert gaps == set(range(1, 2 * LOOK_EVERY))


def test_a_change_is_another_token_with_more_weight() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -torch.inf]])
    for change, is_changed in (([0.0, 0, 0, 0], False), ([0, 0, 1.5, 0], True), ([0, 0, 1.0, 0], False)):
        top, values = TopTokens(), logits.clone()
        look = TopWatch().look([0], values)
        assert look is not None
        values += torch.tensor(change)
        look.count([top])
        assert top.seen_and_changed == (1, int(is_changed))


def test_a_row_that_failed_is_not_looked_at(steered: Steered, monkeypatch: pytest.MonkeyPatch) -> None:
    controller, size = controller_with(steered, "same"), steered.vocabulary.size
    monkeypatch.setattr(controller, "_apply_rule", lambda *_: 1 / 0)
    admit(controller, 0, [7, 8], "same")
    shift(controller, size, 0)
    assert controller.counts["same"].failures == 1
    assert controller.counts["same"].top.seen_and_changed == (0, 0)
    assert controller.counts["same"].tokens == 0


class Follower:
    """As a rank sees the others that does not run the deltas; it is told what its neighbours are told."""

    is_leader = False

    def broadcast(self, tensor: torch.Tensor) -> None: ...

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def test_only_the_leader_counts_what_the_deltas_did(steered: Steered) -> None:
    controller = DeltaController(RESERVED, Follower())
    controller.load(steered.load("same"))
    admit(controller, 0, [7, 8], "same")
    shift(controller, steered.vocabulary.size, 0)
    assert not controller.is_leader
    assert not controller.counts["same"].passes
    assert controller.counts["same"].read == 0
    assert DeltaController(RESERVED).is_leader


def test_passes_that_nobody_takes_are_forgotten() -> None:
    passes = DeltaCounts().passes
    assert passes.maxlen is not None
