"""Faults put into a delta while requests run: its requests end, all others go on, bit by bit, as they would anyway."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from steered import CPU, SETTINGS, Steered
from torch import Tensor

from cmc_server.config import DeltaSource
from cmc_server.errors import CapacityError, MapError
from cmc_server.fusion.beside import Beside
from cmc_server.fusion.controller import DeltaController
from cmc_server.fusion.loaded import LoadedDelta, load_delta, map_tensor
from cmc_server.integrations.request_args import ActiveDelta
from cmc_server.vocab.vocab_map import VocabularyMap, build_map

RESERVED = 5
#: The deltas of each slot; ``other`` is the one at fault. The row after the last slot is the base model's.
SLOTS = [("other",), ("same",), ("words",), ("words", "other"), ("same",)]
FAILING = [slot for slot, names in enumerate(SLOTS) if "other" in names]
#: Share a batch with a row that fails. Once that is gone, sums come out in another order.
SMALLER_BATCH = (2, 3)
PROMPT = list(range(40, 80))

Fault = Callable[[LoadedDelta, pytest.MonkeyPatch], None]


def raise_in_forward(delta: LoadedDelta, patch: pytest.MonkeyPatch) -> None:
    def forward(*_: object) -> Tensor:
        raise RuntimeError("injected")

    patch.setattr(delta.runner, "_logits", forward)


def give_nan(delta: LoadedDelta, patch: pytest.MonkeyPatch) -> None:
    real = delta.runner._logits
    patch.setattr(delta.runner, "_logits", lambda *arguments: real(*arguments) * torch.nan)


def give_infinity_in_one_token(delta: LoadedDelta, patch: pytest.MonkeyPatch) -> None:
    real = delta.runner._logits

    def forward(*arguments: object) -> Tensor:
        logits: Tensor = real(*arguments)  # type: ignore[arg-type]
        logits[:, 3] = torch.inf
        return logits

    patch.setattr(delta.runner, "_logits", forward)


def spoil_what_is_cached(delta: LoadedDelta, patch: pytest.MonkeyPatch) -> None:
    real = delta.runner._logits

    def forward(*arguments: object) -> Tensor:
        logits: Tensor = real(*arguments)  # type: ignore[arg-type]
        delta.runner._pool.cached.fill_(torch.nan)
        return logits * torch.nan

    patch.setattr(delta.runner, "_logits", forward)


def run_out_of_blocks(delta: LoadedDelta, patch: pytest.MonkeyPatch) -> None:
    def take(count: int) -> list[int]:
        raise CapacityError("no blocks")

    patch.setattr(delta.runner.blocks, "take", take)


def run_out_of_memory(delta: LoadedDelta, patch: pytest.MonkeyPatch) -> None:
    def forward(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("injected")

    patch.setattr(delta.runner, "forward", forward)


def map_beyond_the_delta(delta: LoadedDelta, patch: pytest.MonkeyPatch) -> None:
    assert delta.delta_ids is not None
    ids = delta.delta_ids.clone()
    ids[-1] = delta.runner.vocab_size + 1000
    object.__setattr__(delta, "delta_ids", ids)  # each test loads deltas of its own


def give_too_few_columns(delta: LoadedDelta, patch: pytest.MonkeyPatch) -> None:
    real = delta.runner._logits
    patch.setattr(delta.runner, "_logits", lambda *arguments: real(*arguments)[:, :10])


IN_THE_STEP: list[Fault] = [
    raise_in_forward,
    give_nan,
    give_infinity_in_one_token,
    spoil_what_is_cached,
    run_out_of_blocks,
    run_out_of_memory,
    map_beyond_the_delta,
    give_too_few_columns,
]


@pytest.fixture(params=["alone", "beside"])
def controllers(steered: Steered, request: pytest.FixtureRequest) -> tuple[DeltaController, DeltaController]:
    """One for faults, and one that goes the same way without them."""
    beside = Beside(frozenset(list(os.sched_getaffinity(0))[:1])) if request.param == "beside" else None
    made = DeltaController(RESERVED, beside=beside), DeltaController(RESERVED, beside=beside)
    for controller in made:
        for name in steered.deltas:
            controller.load(steered.load(name))
        for slot, names in enumerate(SLOTS):
            admit(controller, slot, names)
    return made


def admit(controller: DeltaController, slot: int, names: tuple[str, ...]) -> None:
    steering = [ActiveDelta(name=name, strength=1.0) for name in names]
    controller.admit(slot, PROMPT, steering, "zero", f"request-{slot}")


def step(controller: DeltaController, size: int) -> Tensor:
    controller.begin(range(len(SLOTS)), CPU)
    logits = torch.randn(len(SLOTS) + 1, size, generator=torch.Generator().manual_seed(0))
    return controller.shift([(slot, slot) for slot in range(len(SLOTS))], logits)


def check(after: Tensor, healthy: Tensor, failing: list[int]) -> None:
    for row in range(len(SLOTS) + 1):
        if row in failing:
            assert after[row, RESERVED] == 0
            assert torch.isfinite(after[row]).sum() == 1
        elif row in SMALLER_BATCH:
            torch.testing.assert_close(after[row], healthy[row], atol=1e-4, rtol=1e-4)
        else:
            assert torch.equal(after[row], healthy[row])


def advance(controller: DeltaController, tokens: list[int]) -> None:
    for slot in range(len(SLOTS)):
        controller.advance(slot, tokens)


@pytest.mark.parametrize(
    ("controllers", "when"), [("alone", "at once"), ("beside", "under way")], indirect=["controllers"]
)
@pytest.mark.parametrize("fault", IN_THE_STEP)
def test_in_a_step(
    fault: Fault,
    when: str,
    controllers: tuple[DeltaController, DeltaController],
    steered: Steered,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    size = steered.vocabulary.size
    faulty, healthy = controllers
    if when == "under way":
        for controller in controllers:
            step(controller, size)
            # So many tokens that another block is needed.
            advance(controller, list(range(100, 140)))
    delta = faulty.deltas["other"]
    right_ids = delta.delta_ids
    fault(delta, monkeypatch)
    check(step(faulty, size), step(healthy, size), FAILING)
    assert faulty.counts["other"].failures == len(FAILING)
    assert faulty.counts["same"].failures == 0
    assert all(f"Request request-{slot} ends with an error" in caplog.text for slot in FAILING)

    # It stays failed once the fault is gone, and the others go on.
    monkeypatch.undo()
    object.__setattr__(delta, "delta_ids", right_ids)
    for controller in controllers:
        advance(controller, [90, 91])
    check(step(faulty, size), step(healthy, size), FAILING)

    # The next requests find a delta that works, the same prompts included.
    for controller in controllers:
        for slot in FAILING:
            admit(controller, slot, SLOTS[slot])
    after = step(faulty, size)
    for row, expected in enumerate(step(healthy, size)):
        torch.testing.assert_close(after[row], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("broken", ["_respell", "extend"])
def test_while_a_response_is_spelled(
    broken: str,
    controllers: tuple[DeltaController, DeltaController],
    steered: Steered,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = steered.vocabulary.size
    faulty, healthy = controllers
    check(step(faulty, size), step(healthy, size), [])
    text = faulty._requests[0].streams[0].text

    def spell(*_: object) -> int:
        raise UnicodeError("injected")

    monkeypatch.setattr(text, broken, spell)
    follows = faulty.deltas["other"].speller.follows
    inexact = next(token for token in range(300, size) if not follows[token])
    for controller in controllers:
        advance(controller, [inexact])
    check(step(faulty, size), step(healthy, size), [0])
    assert (faulty.counts["other"].failures, faulty.counts["same"].failures) == (1, 0)
    monkeypatch.undo()
    for controller in controllers:
        admit(controller, 0, SLOTS[0])
        check_alone = controller.shift([(0, 0)], torch.zeros(1, size))
        assert torch.isfinite(check_alone).sum() == size - 1


def test_while_a_prompt_is_spelled(
    controllers: tuple[DeltaController, DeltaController], steered: Steered, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty, healthy = controllers
    monkeypatch.setattr(faulty.deltas["other"].speller, "spell_prompt", lambda _: 1 / 0)
    for slot, names in enumerate(SLOTS):
        admit(faulty, slot, names)
    check(step(faulty, steered.vocabulary.size), step(healthy, steered.vocabulary.size), FAILING)
    assert faulty.counts["other"].failures == len(FAILING)


def test_a_map_that_names_logits_which_are_not_there(steered: Steered) -> None:
    """It would be an error at each token on a CPU, and whatever lies behind the logits on a GPU."""
    delta = steered.load("other")
    ids = delta.vocab_map.delta_ids.copy()
    ids[-1] = delta.runner.vocab_size
    beyond = VocabularyMap(ids, np.maximum(delta.vocab_map.match, 1) * (ids >= 0), "a", "b", 1, {})
    with pytest.raises(MapError, match="logits"):
        map_tensor(beyond, delta.runner.vocab_size, CPU)


@pytest.mark.parametrize("damage", ["cut", "nonsense", "one byte"])
def test_a_damaged_map_in_the_cache_is_never_used(
    damage: str, steered: Steered, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = SETTINGS.model_copy(update={"cache_dir": str(tmp_path)})
    source = DeltaSource(name="other", path=str(steered.deltas["other"]))

    def load() -> LoadedDelta:
        return load_delta(source, steered.vocabulary, settings, max_seqs=2, device=CPU)

    first = load()
    [file] = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    if damage == "cut":
        del data[-7:]
    elif damage == "nonsense":
        data[:] = b"nonsense"
    else:
        # The delta id of one token that is mapped: the lowest byte of an int32, still a token of the delta.
        row = int(np.flatnonzero(first.vocab_map.delta_ids > 0)[-1])
        offset = data.index(first.vocab_map.delta_ids.tobytes()) + 4 * row
        data[offset] ^= 1
    file.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        again = load()
    assert "Rebuilding a cached vocabulary map" in caplog.text
    np.testing.assert_array_equal(again.vocab_map.delta_ids, first.vocab_map.delta_ids)
    rebuilt = VocabularyMap.load(file)
    np.testing.assert_array_equal(rebuilt.delta_ids, build_map(steered.vocabulary, vocabulary_of(again)).delta_ids)


def vocabulary_of(delta: LoadedDelta):  # type: ignore[no-untyped-def]
    from cmc_server.vocab.surface import load_vocabulary

    return load_vocabulary(str(delta.artifact.path))
