"""Stretches serve every step with exactly what the oracle reads there."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from steered import Steered

from cmc_server.fusion.reference import ReferenceFusedLM
from cmc_server.fusion.stretches import Stretch, cut_to_window, plan_stretches, windowed_inputs

# Few different ids, so that inputs often begin alike.
INPUTS = st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=12)


def served(stretches: list[Stretch]) -> dict[int, list[int]]:
    """Step to what was read when its logits were taken."""
    return {step: stretch.ids[: position + 1] for stretch in stretches for position, step in stretch.served}


@given(INPUTS)
def test_every_step_is_served_by_its_own_input(inputs: list[list[int]]) -> None:
    stretches = plan_stretches(inputs)
    steps = [step for stretch in stretches for _, step in stretch.served]
    assert steps == [step for step, ids in enumerate(inputs) if ids]
    assert served(stretches) == {step: ids for step, ids in enumerate(inputs) if ids}


@given(INPUTS)
def test_no_stretch_reads_more_than_its_longest_step(inputs: list[list[int]]) -> None:
    for stretch in plan_stretches(inputs):
        assert len(stretch.ids) == max(position for position, _ in stretch.served) + 1


def test_by_hand() -> None:
    plain = plan_stretches([[7], [7, 1], [7, 1, 2]])
    assert plain == [Stretch([7, 1, 2], [(0, 0), (1, 1), (2, 2)])]
    respelled = plan_stretches([[7], [7, 1], [7, 3], [7, 3, 4]])
    assert respelled == [Stretch([7, 1], [(0, 0), (1, 1)]), Stretch([7, 3, 4], [(1, 2), (2, 3)])]
    held_back = plan_stretches([[7, 1], [7], [7, 1], []])
    assert held_back == [Stretch([7, 1], [(1, 0), (0, 1), (1, 2)])]
    assert plan_stretches([[], []]) == []


@given(st.lists(st.integers(0, 3), max_size=40), st.sampled_from([[], [0], [0, 1]]), st.integers(5, 12))
def test_the_window_keeps_the_bos_and_the_newest(ids: list[int], bos: list[int], context: int) -> None:
    cut = cut_to_window(ids, bos, context)
    num_bos = len(bos) if ids[: len(bos)] == bos else 0
    assert len(cut) <= context
    assert cut[:num_bos] == ids[:num_bos]
    assert ids[len(ids) - len(cut) + num_bos :] == cut[num_bos:]
    if len(ids) <= context:
        assert cut == ids


@pytest.mark.parametrize("name", ["same", "other", "words"])
def test_what_is_read_is_what_the_oracle_reads(steered: Steered, name: str) -> None:
    """Random tokens: broken characters, special tokens, ids beyond the vocabulary, windows that move."""
    oracle = ReferenceFusedLM(steered.user, {name: steered.deltas[name]}).deltas[name]
    size = steered.vocabulary.size
    draw = random.Random(0)
    for length in (0, 1, 30, 120):
        prompt = [*oracle.encoder.bos_ids, *draw.choices(range(3, 60), k=length % 47)]
        response = [draw.randrange(size + 3) for _ in range(length)]
        inputs = windowed_inputs(
            oracle.speller,
            prompt,
            response,
            bos_ids=oracle.encoder.bos_ids,
            context_length=oracle.context_length,
        )
        found = served(plan_stretches(inputs))
        expected = {step: oracle.read(prompt, response[:step]) for step in range(length)}
        assert found == {step: ids for step, ids in expected.items() if ids}
