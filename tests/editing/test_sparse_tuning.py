"""Tuning of pruned models: zeros stay zeros, equal data for all, and what interferes is measured right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, LlamaForCausalLM

from cmc_server.editing import losses
from cmc_server.editing.adapters import merged
from cmc_server.editing.blocks import LinearLayer, decoder_blocks
from cmc_server.editing.interference import interference_ratio, merge_gap, weight_gradients
from cmc_server.editing.losses import mean_loss
from cmc_server.editing.masks import lowest_dropped_by_row
from cmc_server.editing.sparse_tuning import Tuning, attach, drawn, fit, is_masked, make_adapter
from cmc_server.editing.texts import Example, packed_sequences
from cmc_server.errors import EditingError

METHODS: list[Any] = ["pooled", "lora", "masked-lora", "oracle"]
TUNING = Tuning(learning_rate=0.02, batch_size=2, rank=2)


def pruned_model() -> tuple[LlamaForCausalLM, list[LinearLayer], dict[str, Tensor]]:
    config = LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    layers = [one for block in decoder_blocks(model, lambda name: True) for one in block.layers]
    masks = {one.name: lowest_dropped_by_row(one.weight.abs(), one.weight.numel() // 2) for one in layers}
    for one in layers:
        one.weight.masked_fill_(~masks[one.name], 0)
    return model, layers, masks


def loss_of(model: LlamaForCausalLM, data: list[Example]) -> float:
    with torch.no_grad():
        return float(mean_loss(model, data))


def examples(count: int = 6) -> list[Example]:
    ids = torch.randint(23, (count, 7), generator=torch.Generator().manual_seed(1))
    return [Example(row[None], 2) for row in ids]


@pytest.mark.parametrize("method", METHODS)
def test_tuning_lowers_the_loss_and_merges_into_a_sparse_model(method: Any) -> None:
    model, layers, masks = pruned_model()
    data = examples()
    before = loss_of(model, data)
    adapters = {one.name: make_adapter(method, one.name, one.shape, 2, 2.0, 0) for one in layers}
    attached = attach(layers, adapters, masks if is_masked(method) else None, 0.0)
    assert loss_of(model, data) == pytest.approx(before, rel=1e-6), "no effect at the start"
    by_step = fit(model, adapters, data * 5, TUNING, 0)
    trained = loss_of(model, data)
    assert len(by_step) == 15 and trained < before - 0.1
    for one in attached:
        one.remove()
    for one in layers:
        one.weight.copy_(merged(one.weight, adapters[one.name], masks[one.name]))
        assert not bool(one.weight[~masks[one.name]].any())
    gap = merge_gap(loss_of(model, data), trained)
    if is_masked(method):
        assert gap == pytest.approx(0, abs=1e-5)
    else:
        assert abs(gap) > 1e-3, "what was trained is not what is left"
    assert all(weight.grad is None for weight in model.parameters())


def test_the_oracle_is_training_of_the_weights_that_stay() -> None:
    """Against AdamW on the weights themselves with their gradients masked, no decay."""
    model, layers, masks = pruned_model()
    data, tuning = examples(4), TUNING.model_copy(update={"weight_decay": 0.0, "dropout": 0.0})
    adapters = {one.name: make_adapter("oracle", one.name, one.shape, 0, 1.0, 0) for one in layers}
    attach(layers, adapters, masks, 0.0)
    fit(model, adapters, data, tuning, 0)
    other, others, _ = pruned_model()
    weights = [one.parameter.requires_grad_(True) for one in others]
    optimiser = torch.optim.AdamW(weights, lr=0.02, weight_decay=0.0)
    for step, factor in enumerate((1.0, 0.5)):
        optimiser.zero_grad()
        optimiser.param_groups[0]["lr"] = 0.02 * factor
        mean_loss(other, data[2 * step : 2 * step + 2]).backward()
        for weight, one in zip(weights, others, strict=True):
            weight.grad.mul_(masks[one.name])
        torch.nn.utils.clip_grad_norm_(weights, 0.3)
        optimiser.step()
    for one, reference in zip(layers, others, strict=True):
        expected = reference.weight
        torch.testing.assert_close(
            merged(one.weight, adapters[one.name], masks[one.name]), expected, atol=1e-5, rtol=1e-4
        )


def test_runs_repeat_and_dropout_depends_on_the_seed() -> None:
    def run(seed: int) -> list[float]:
        model, layers, masks = pruned_model()
        adapters = {one.name: make_adapter("pooled", one.name, one.shape, 2, 2.0, 0) for one in layers}
        attach(layers, adapters, masks, 0.5)
        return fit(model, adapters, examples(), TUNING, seed)

    assert run(0) == run(0) != run(1)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_texts_read_in_one_pass_are_what_they_are_alone(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    configs: dict[str, Any] = {
        "llama": LlamaConfig(
            vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        ),
        "gpt2": GPT2Config(vocab_size=23, n_positions=64, n_embd=16, n_layer=2, n_head=2),
        "gemma3": Gemma3TextConfig(
            vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"],
        ),
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(configs[architecture]).eval()
    draw = torch.Generator().manual_seed(2)
    texts = [
        Example(torch.randint(23, (1, length), generator=draw), first)
        for length, first in ((9, 1), (3, 2), (20, 5), (4, 1), (9, 8), (50, 10))
    ]
    monkeypatch.setattr(losses, "_PASS_TOKENS", 40)
    groups = losses.passes(texts)
    assert [len(group) for group in groups] == [4, 1, 1] and {id(one) for group in groups for one in group} == {
        id(one) for one in texts
    }
    alone = torch.stack([losses.nll(model, one) for one in texts]).sum()
    alone_gradients = torch.autograd.grad(alone, list(model.parameters()))
    together = torch.stack([losses.batched_nll(model, group) for group in groups]).sum()
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(together, list(model.parameters()))
    torch.testing.assert_close(gradients, alone_gradients, rtol=1e-3, atol=1e-4)


def test_data_are_the_same_for_every_method() -> None:
    data = examples()
    assert [id(one) for one in drawn(data, 4, 3)] == [id(one) for one in drawn(data, 4, 3)]
    assert len(drawn(data, 100, 0)) == 6 and len({id(drawn(data, 6, seed)[0]) for seed in range(9)}) > 1


def test_calibration_sequences_are_of_one_length() -> None:
    data = [Example(torch.arange(first, first + 7)[None], 1) for first in range(0, 70, 7)]
    sequences = packed_sequences(data, 8, 100, 0)
    assert len(sequences) == 8 and torch.equal(torch.cat(sequences, 1)[0], torch.arange(64))
    some = packed_sequences(data, 8, 3, 0)
    assert len(some) == 3 and all(int(one[0, 0]) % 8 == 0 for one in some)
    assert [one.shape for one in packed_sequences(data, 2048, 100, 0)] == [(1, 70)]


def test_loss_that_is_not_finite() -> None:
    model, layers, masks = pruned_model()
    adapters = {one.name: make_adapter("oracle", one.name, one.shape, 0, 1.0, 0) for one in layers}
    attach(layers, adapters, masks, 0.0)
    layers[-1].weight.fill_(torch.nan)
    with pytest.raises(EditingError, match="in step 1; lower --learning-rate"):
        fit(model, adapters, examples(), TUNING, 0)


def test_interference_by_hand() -> None:
    gradient = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    mask = torch.tensor([[True, True], [True, False]])
    assert interference_ratio([(gradient, mask)]) == pytest.approx(4 / 5)
    assert interference_ratio([(gradient, torch.ones(2, 2, dtype=torch.bool))]) == 0
    assert interference_ratio([(gradient, mask), (torch.tensor([[12.0]]), torch.tensor([[True]]))]) == pytest.approx(
        4 / 13
    )
    assert interference_ratio([(torch.zeros(2, 2), mask)]) == 0
    assert merge_gap(2.5, 2.0) == 0.5


def test_gradients_are_those_of_the_mean_loss() -> None:
    model, layers, _ = pruned_model()
    found = list(weight_gradients(model, layers, examples()))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_(True)
    mean_loss(model, examples()).backward()
    for gradient, one in zip(found, layers, strict=True):
        torch.testing.assert_close(gradient, one.parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_dense_change_meets_gradient_where_weights_went() -> None:
    model, layers, masks = pruned_model()
    pairs = zip(weight_gradients(model, layers, examples()), masks.values(), strict=True)
    assert 0.3 < interference_ratio(pairs) < 0.95
