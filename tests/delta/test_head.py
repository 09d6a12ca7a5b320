"""The packed output head gives what the plain layer gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from cmc_server.delta.head import PackedHead, pack_head


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 31, 32, 100])
def test_it_equals_the_linear_layer(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    head = nn.Linear(48, 1001, bias=bias)
    states = torch.randn(1, rows, 48)
    with torch.inference_mode():
        torch.testing.assert_close(PackedHead(head)(states), head(states), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_keeps_its_embedding(tied: bool) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, tie_word_embeddings=tied, **shape)).eval()
    ids = torch.arange(12).unsqueeze(0)
    with torch.inference_mode():
        expected = model(ids).logits
        assert pack_head(model) == 97 * 32 * 4
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_other_heads_stay_as_they_are() -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, **shape)).to(torch.bfloat16)
    head = model.get_output_embeddings()
    assert pack_head(model) == 0
    assert model.get_output_embeddings() is head
