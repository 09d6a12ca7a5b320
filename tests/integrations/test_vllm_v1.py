"""V1's batch bookkeeping, with vLLM's own update objects: rows come, go, move and are evicted without a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cmc_server.errors import DeltaRuntimeError
from cmc_server.integrations.request_args import ActiveDelta, RequestControls

vllm = pytest.importorskip("vllm", reason="needs vLLM")

from vllm import SamplingParams  # noqa: E402
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality  # noqa: E402

from cmc_server.integrations.vllm_v1 import V1Adapter  # noqa: E402

STEERED = SamplingParams(
    extra_args=RequestControls(deltas=(ActiveDelta(name="d", strength=1.0),)).to_extra_args()  # type: ignore[arg-type]
)
BASE = SamplingParams()
OFF = SamplingParams(extra_args={"cmc": {"deltas": [{"name": "d", "strength": 0}]}})


class Recorder:
    """Stands where the controller does, and remembers what each slot was told."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.prompts: dict[int, Any] = {}
        self.begun: list[Any] | None = None

    def admit(self, slot: int, prompt: Sequence[int] | None, *rest: Any) -> None:
        self.prompts[slot], self.tokens[slot] = prompt, []
        self.request_id = rest[-1]

    def advance(self, slot: int, token_ids: Sequence[int]) -> None:
        self.tokens[slot] += token_ids

    def release(self, slot: int) -> None:
        self.prompts.pop(slot, None)
        self.tokens.pop(slot, None)

    def begin(self, slots: Sequence[int], device: torch.device) -> None:
        self.begun = [(self.prompts[slot], list(self.tokens[slot])) for slot in slots]

    def shift(self, rows: Sequence[tuple[int, int]], logits: Tensor) -> Tensor:
        self.rows = {row: (self.prompts[slot], self.tokens[slot]) for row, slot in rows}
        return logits


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def adapter(recorder: Recorder) -> V1Adapter:
    return V1Adapter(recorder)  # type: ignore[arg-type]


def update(*, removed: Any = (), added: Any = (), moved: Any = (), size: int = 4) -> BatchUpdate:
    return BatchUpdate(batch_size=size, removed=removed, added=added, moved=moved)


def test_rows_follow_their_requests(adapter: V1Adapter, recorder: Recorder) -> None:
    outputs: list[list[int]] = [[], [], []]
    adapter.update(update(added=[(0, STEERED, [1], outputs[0]), (1, BASE, [2], []), (2, STEERED, [3], outputs[2])]))
    adapter.apply(torch.zeros(3, 4))
    assert recorder.rows == {0: ([1], []), 2: ([3], [])}
    outputs[0].append(10)
    outputs[2].append(30)
    adapter.update(update(moved=[(0, 2, MoveDirectionality.SWAP)]))
    adapter.apply(torch.zeros(3, 4))
    assert recorder.rows == {2: ([1], [10]), 0: ([3], [30])}
    adapter.update(update(removed=[0], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    adapter.apply(torch.zeros(2, 4))
    assert recorder.rows == {0: ([1], [10])}
    assert len(recorder.tokens) == 1


def test_an_addition_and_a_move_evict_without_a_removal(adapter: V1Adapter, recorder: Recorder) -> None:
    adapter.update(update(added=[(0, STEERED, [1], []), (1, STEERED, [2], [])]))
    adapter.apply(torch.zeros(2, 4))
    adapter.update(update(added=[(0, BASE, [5], [])], moved=[]))
    adapter.apply(torch.zeros(2, 4))
    assert recorder.rows == {1: ([2], [])}
    adapter.update(update(moved=[(0, 1, MoveDirectionality.UNIDIRECTIONAL)]))
    adapter.apply(torch.zeros(1, 4))
    assert recorder.tokens == {}


def test_tokens_that_vllm_takes_back(adapter: V1Adapter, recorder: Recorder) -> None:
    outputs = [10, 11, 12]
    adapter.update(update(added=[(0, STEERED, [1], outputs)]))
    adapter.apply(torch.zeros(1, 4))
    del outputs[1:]
    adapter.apply(torch.zeros(1, 4))
    assert recorder.rows == {0: ([1], [10])}


def test_rows_that_are_not_sampled_this_step_wait(adapter: V1Adapter, recorder: Recorder) -> None:
    adapter.update(update(added=[(3, STEERED, [1], [])]))
    adapter.apply(torch.zeros(2, 4))
    assert recorder.rows == {}


def test_strength_zero_is_base_traffic(adapter: V1Adapter, recorder: Recorder) -> None:
    adapter.update(update(added=[(0, OFF, [1], [])]))
    logits = torch.zeros(1, 4)
    assert adapter.apply(logits) is logits
    assert recorder.tokens == {}


def test_the_log_can_name_the_request(adapter: V1Adapter, recorder: Recorder) -> None:
    controls = RequestControls(deltas=(ActiveDelta(name="d", strength=1.0),), request_id="r1")
    params = SamplingParams(extra_args=controls.to_extra_args())  # type: ignore[arg-type]
    adapter.update(update(added=[(0, params, [1], [])]))
    adapter.apply(torch.zeros(1, 4))
    assert recorder.request_id == "r1"


def test_placeholders_are_never_taken_for_tokens(adapter: V1Adapter) -> None:
    adapter.update(update(added=[(0, STEERED, [1], [7, -1])]))
    with pytest.raises(DeltaRuntimeError, match="--logits-processors"):
        adapter.apply(torch.zeros(1, 4))


def test_deltas_begin_before_the_forward_pass_once_all_tokens_are_there(adapter: V1Adapter, recorder: Recorder) -> None:
    cpu = torch.device("cpu")
    adapter.begin(cpu)
    assert recorder.begun is None  # no steered rows: not even a call
    first, second = [10], [20, -1]
    adapter.update(update(added=[(1, STEERED, [2], second), (0, STEERED, [1], first), (2, BASE, [3], [])]))
    adapter.begin(cpu)
    assert recorder.begun is None
    second[-1] = 21
    adapter.begin(cpu)
    assert recorder.begun == [([1], [10]), ([2], [20, 21])]
    adapter.apply(torch.zeros(3, 4))
    assert recorder.rows == {0: ([1], [10]), 1: ([2], [20, 21])}
