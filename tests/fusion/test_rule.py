from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmc_server.config import Unmapped
from cmc_server.fusion.loaded import map_tensor
from cmc_server.fusion.rule import Shift, fuse, fuse_, spread_rows
from cmc_server.vocab.pm_mined import MatchKind
from cmc_server.vocab.vocab_map import VocabularyMap

POLICIES: list[Unmapped] = ["zero", "preserve"]


def make(seed: int, rows: int, columns: int, deltas: int) -> tuple[torch.Tensor, list[Shift]]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, columns, generator=generator)
    logits[torch.rand(rows, columns, generator=generator) < 0.2] = -torch.inf
    shifts = []
    for position in range(deltas):
        size = 5 + position
        ids = torch.randint(-1, size, (columns - position,), generator=generator)
        strength = torch.randn(rows, generator=generator) if position % 2 else -0.5
        delta_logits = torch.randn(rows, size, generator=generator)
        shifts.append(Shift(delta_logits, None if position == 2 else ids, strength))
    return logits, shifts


def test_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, -math.inf]])
    shift = Shift(torch.tensor([[10.0, 20.0]]), torch.tensor([1, -1, 0]), 0.5)
    assert fuse(logits, [shift]).tolist() == [[11.0, 2.0, 8.0, -math.inf]]
    preserved = fuse(logits, [shift], "preserve")
    mapped_before = math.log(math.exp(1) + math.exp(3))
    mapped_after = math.log(math.exp(11) + math.exp(8))
    expected = [11 + mapped_before - mapped_after, 2.0, 8 + mapped_before - mapped_after, -math.inf]
    torch.testing.assert_close(preserved, torch.tensor([expected]))


@pytest.mark.parametrize("unmapped", POLICIES)
@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 4), columns=st.integers(4, 30), deltas=st.integers(0, 3))
def test_in_place_equals_the_definition(unmapped: Unmapped, seed: int, rows: int, columns: int, deltas: int) -> None:
    logits, shifts = make(seed, rows, columns, deltas)
    batch = torch.randn(rows + 3, columns)
    where = torch.randperm(rows + 3)[:rows]
    batch[where] = logits
    before = batch.clone()
    after = fuse_(batch, where, shifts, unmapped)
    torch.testing.assert_close(after[where], fuse(logits, shifts, unmapped), atol=1e-5, rtol=1e-5)
    others = [row for row in range(rows + 3) if row not in where.tolist()]
    assert torch.equal(after[others], before[others])


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 4), columns=st.integers(4, 30))
def test_the_map_may_be_applied_before(seed: int, rows: int, columns: int) -> None:
    logits, (shift, other) = make(seed, rows, columns, 2)
    assert shift.delta_ids is not None
    spread = Shift(spread_rows(shift.delta_logits, shift.delta_ids), None, shift.strength)
    after = fuse_(logits.clone(), torch.arange(rows), [spread, other])
    torch.testing.assert_close(after, fuse(logits, [shift, other]), atol=1e-5, rtol=1e-5)


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), deltas=st.integers(1, 3))
def test_preserve_keeps_the_probability_of_unmapped_tokens(seed: int, deltas: int) -> None:
    logits, shifts = make(seed, 2, 20, deltas)
    logits[:, 0] = 0.0  # at least one token is possible
    mapped = torch.zeros(20, dtype=torch.bool)
    for shift in shifts:
        if shift.delta_ids is None:
            mapped[: shift.delta_logits.shape[1]] = True
        else:
            mapped[: shift.delta_ids.numel()] |= shift.delta_ids >= 0
    before, after = logits.softmax(-1), fuse(logits, shifts, "preserve").softmax(-1)
    torch.testing.assert_close(after[:, ~mapped], before[:, ~mapped], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("unmapped", POLICIES)
def test_strength_zero_changes_nothing(unmapped: Unmapped) -> None:
    logits, shifts = make(3, 3, 12, 1)
    assert torch.equal(fuse(logits, [], unmapped), logits)
    torch.testing.assert_close(
        fuse(logits, [Shift(shifts[0].delta_logits, shifts[0].delta_ids, 0.0)], unmapped), logits
    )


def test_a_row_with_no_possible_mapped_token_is_left_alone() -> None:
    logits = torch.tensor([[-math.inf, 1.0]])
    shift = Shift(torch.tensor([[4.0]]), torch.tensor([0, -1]), 1.0)
    assert fuse(logits, [shift], "preserve").tolist() == [[-math.inf, 1.0]]


def test_gradients_flow_to_the_delta() -> None:
    logits, _ = make(0, 2, 6, 0)
    delta = torch.randn(2, 4, requires_grad=True)
    fuse(logits, [Shift(delta, torch.tensor([0, 1, 2, 3, -1, -1]), 1.0)])[:, 1].sum().backward()
    assert delta.grad is not None
    assert delta.grad[:, 1].tolist() == [1.0, 1.0]


def test_padded_logits_of_a_delta_reach_no_user_token() -> None:
    """The identity is short for the explicit map only where every delta logit belongs to a token."""
    ids = np.arange(4, dtype=np.int32)
    identity = VocabularyMap(ids, np.full(4, MatchKind.EXACT, np.uint8), "same", "same", 1, {})
    assert map_tensor(identity, 4, torch.device("cpu")) is None
    delta_ids = map_tensor(identity, 6, torch.device("cpu"))
    shift = Shift(torch.ones(1, 6), delta_ids, 1.0)
    assert fuse_(torch.zeros(1, 6), torch.tensor([0]), [shift]).tolist() == [[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]]
