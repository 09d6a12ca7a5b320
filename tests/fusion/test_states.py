"""The split model keeps what it has read, within its room."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from cmc_server.errors import ConfigError
from cmc_server.fusion.controller import DeltaController
from cmc_server.fusion.generation import GreedyRequest, decode_greedily
from cmc_server.fusion.states import Row, SplitModel, similar_lengths

HIDDEN = 16
ROW_BYTES = 2 * HIDDEN * 4  # two positions, float32


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": HIDDEN, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape)).eval()


def rows(*firsts: int) -> list[Row]:
    return [Row([first, 2, 3, 4], [1, 3]) for first in firsts]


class Reads:
    """Counts the rows that a model reads."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.count = 0
        model.base_model.register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, module: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        self.count += len(kwargs["input_ids"])


def test_a_row_is_read_once_and_equals_a_plain_pass(model: LlamaForCausalLM) -> None:
    split, reads = SplitModel(model, "x"), Reads(model)
    first = split.states(rows(5, 6, 5))
    assert reads.count == 2
    second = split.states([*rows(6, 7), Row([6, 2, 3, 4], [2])])
    assert reads.count == 4  # other positions of a row are another row
    assert torch.equal(first[0], first[2]) and torch.equal(first[1], second[0])
    plain = model.base_model(input_ids=torch.tensor([[6, 2, 3, 4]])).last_hidden_state[0]
    torch.testing.assert_close(second[0], plain[[1, 3]])
    torch.testing.assert_close(second[2], plain[[2]])


def test_the_oldest_states_make_room(model: LlamaForCausalLM) -> None:
    split, reads = SplitModel(model, "x", kept_bytes=2 * ROW_BYTES), Reads(model)
    for first in (5, 6, 7):
        split.states(rows(first))
    split.states(rows(6, 7))
    assert reads.count == 3
    split.states(rows(5))
    assert reads.count == 4


def test_nothing_is_kept_without_room(model: LlamaForCausalLM) -> None:
    split, reads = SplitModel(model, "x", kept_bytes=0), Reads(model)
    before, after = split.states(rows(5)), split.states(rows(5))
    assert reads.count == 2 and torch.equal(before[0], after[0])


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200), st.sampled_from([0.0, 0.75]))
def test_similar_lengths(lengths: list[int], max_tokens: int, least_filled: float) -> None:
    batches = similar_lengths(lengths, max_tokens, least_filled)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * longest <= max_tokens
        assert min(lengths[index] for index in batch) >= least_filled * longest
    order = [lengths[index] for batch in batches for index in batch]
    assert order == sorted(order, reverse=True)


def test_what_is_longer_than_the_model_reads_is_refused(model: LlamaForCausalLM) -> None:
    model.config.max_position_embeddings = 4
    split = SplitModel(model, "The user LLM x")
    assert len(split.states(rows(5))) == 1
    with pytest.raises(ConfigError, match="An input of 5 tokens is longer than the 4 that The user LLM x reads"):
        split.states([*rows(5), Row([1, 2, 3, 4, 5], [4])])


def test_answers_end_where_the_model_reads_no_further() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=6, n_embd=16, n_layer=1, n_head=2)).eval()
    split, controller = SplitModel(model, "x"), DeltaController()
    requests = [GreedyRequest([1, 2, 3, 4, 5]), GreedyRequest([1, 2]), GreedyRequest([1, 2, 3]), GreedyRequest([4])]

    def answers(some: list[GreedyRequest]) -> list[list[int]]:
        return decode_greedily(
            split, controller, some, unmapped="zero", max_tokens=9, has_ended=lambda answer: len(answer) == 0
        )

    found = answers(requests)
    assert [len(answer) for answer in found] == [2, 5, 4, 6]
    assert found == [answer for request in requests for answer in answers([request])]
    with pytest.raises(ConfigError, match="An input of 7 tokens"):
        answers([GreedyRequest([1] * 7)])
