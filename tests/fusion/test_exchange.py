"""Two ranks of tensor parallelism in two threads: the same logits on both, and the same word on what failed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from steered import Steered
from torch import Tensor

from cmc_server.errors import DeltaRuntimeError
from cmc_server.fusion.controller import DeltaController
from cmc_server.integrations.request_args import ActiveDelta

RESERVED = 5
NAMES = ("other", "same", "other")
PROMPT = list(range(40, 60))


@dataclass
class Board:
    """What the ranks of one group show each other."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=30))
    tensors: dict[int, Tensor] = field(default_factory=dict)


class ThreadExchange:
    def __init__(self, rank: int, board: Board) -> None:
        self._rank, self._board = rank, board

    @property
    def is_leader(self) -> bool:
        return self._rank == 0

    def _shown(self, tensor: Tensor) -> list[Tensor]:
        self._board.tensors[self._rank] = tensor.clone()
        self._board.barrier.wait()
        shown = [self._board.tensors[rank] for rank in (0, 1)]
        self._board.barrier.wait()
        return shown

    def broadcast(self, tensor: Tensor) -> None:
        tensor.copy_(self._shown(tensor)[0])

    def add(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._shown(tensor)).sum(0)


def outcome(future: Future[Any]) -> Any:
    """What was returned, or the error that the test is about."""
    try:
        return future.result()
    except DeltaRuntimeError as error:
        return error


class Ranks:
    """The same calls on both ranks at once."""

    def __init__(self, steered: Steered, reserved: int | None = RESERVED) -> None:
        board = Board()
        self.controllers = [DeltaController(reserved, ThreadExchange(rank, board)) for rank in (0, 1)]
        for controller in self.controllers:
            for name in sorted(set(NAMES)):
                controller.load(steered.load(name))
        self._pool = ThreadPoolExecutor(2)
        self.admit()

    def admit(self) -> None:
        for controller in self.controllers:
            for slot, name in enumerate(NAMES):
                controller.admit(slot, PROMPT, [ActiveDelta(name=name, strength=1.5)])

    def both(self, call: Callable[[DeltaController], Any]) -> list[Any]:
        futures = [self._pool.submit(call, controller) for controller in self.controllers]
        return [outcome(future) for future in futures]

    def step(self, token: int, logits: Tensor) -> list[Any]:
        @torch.inference_mode()  # as in vLLM
        def run(controller: DeltaController) -> Tensor:
            for slot in range(len(NAMES)):
                controller.advance(slot, [token])
            return controller.shift([(slot, slot) for slot in range(len(NAMES))], logits.clone())

        return self.both(run)

    def close(self) -> None:
        self._pool.shutdown()


@pytest.fixture
def ranks(steered: Steered) -> Iterator[Ranks]:
    made = Ranks(steered)
    yield made
    made.close()


@pytest.fixture
def logits(steered: Steered) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(len(NAMES), steered.vocabulary.size)


def fail_in(patch: pytest.MonkeyPatch, controller: DeltaController, what: str) -> None:
    """Let slot 0 fail on one rank, and there alone, at the next step."""

    def fail(*_: Any) -> Any:
        raise RuntimeError("injected")

    if what == "spelling":
        patch.setattr(controller._requests[0].streams[0], "extend", fail)
    elif what == "forward":
        patch.setattr(controller._requests[0].streams[0].delta.runner, "forward", fail)
    else:
        patch.setattr(controller, "_apply", fail)


def test_one_rank_gives_what_two_give(steered: Steered, ranks: Ranks, logits: Tensor) -> None:
    alone = DeltaController(RESERVED)
    for slot, name in enumerate(NAMES):
        if name not in alone.deltas:
            alone.load(steered.load(name))
        alone.admit(slot, PROMPT, [ActiveDelta(name=name, strength=1.5)])
    for token in (50, 51, 52):
        first, second = ranks.step(token, logits)
        assert torch.equal(first, second)
        for slot in range(len(NAMES)):
            alone.advance(slot, [token])
        expected = alone.shift([(slot, slot) for slot in range(len(NAMES))], logits.clone())
        torch.testing.assert_close(first, expected)


@pytest.mark.parametrize(
    ("rank", "what", "failing"),
    [
        (0, "spelling", {0}),
        (1, "spelling", {0}),
        (0, "forward", {0, 2}),
        (0, "adding", {0, 1, 2}),
        (1, "adding", {0, 1, 2}),
    ],
)
def test_a_failure_on_one_rank_is_one_on_both(
    ranks: Ranks, logits: Tensor, rank: int, what: str, failing: set[int]
) -> None:
    healthy, _ = ranks.step(50, logits)
    assert torch.isfinite(healthy).sum(dim=1).min() > 1
    with pytest.MonkeyPatch.context() as patch:
        fail_in(patch, ranks.controllers[rank], what)
        first, second = ranks.step(51, logits)
    assert torch.equal(first, second)
    ended = torch.full_like(first[0], -torch.inf)
    ended[RESERVED] = 0
    assert {slot for slot in range(len(NAMES)) if torch.equal(first[slot], ended)} == failing
    # It stays so, and the next requests of these slots are served on both ranks alike.
    first, second = ranks.step(52, logits)
    assert torch.equal(first, second)
    assert {slot for slot in range(len(NAMES)) if torch.equal(first[slot], ended)} == failing
    ranks.admit()
    first, second = ranks.step(50, logits)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, healthy)


@pytest.mark.parametrize("rank", [0, 1])
def test_without_a_reserved_token_both_ranks_raise(steered: Steered, logits: Tensor, rank: int) -> None:
    """Neither may wait for the other for ever."""
    ranks = Ranks(steered, reserved=None)
    with pytest.MonkeyPatch.context() as patch:
        fail_in(patch, ranks.controllers[rank], "spelling")
        outcomes = ranks.step(51, logits)
    ranks.close()
    assert all(isinstance(outcome, DeltaRuntimeError) for outcome in outcomes), outcomes
