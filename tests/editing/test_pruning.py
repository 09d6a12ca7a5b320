"""Wanda, SparseGPT and magnitude against slow formulas, and the walk through a model against its whole forward."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cmc_server.editing import sparsegpt as module
from cmc_server.editing.blocks import Block, Walk, decoder_blocks
from cmc_server.editing.masks import Pattern, Target
from cmc_server.editing.pruning import PRUNERS, check_pattern, prune_blocks, targets_of
from cmc_server.editing.sparsegpt import sparsegpt
from cmc_server.editing.wanda import wanda
from cmc_server.errors import EditingError

METHODS = ["magnitude", "wanda", "sparsegpt"]


def layer(rows: int = 6, width: int = 8, samples: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, correlated inputs of very different sizes, and their Gram matrix."""
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=draws)
    inputs = torch.randn(samples, width, generator=draws) @ torch.randn(width, width, generator=draws)
    inputs *= torch.logspace(-1, 1, width)
    return weight, inputs, inputs.T @ inputs


def test_wanda_by_loops() -> None:
    weight, inputs, gram = layer()
    mask = wanda(weight, gram, 18)
    for i in range(6):
        scores = [abs(float(weight[i, j])) * sum(float(x) ** 2 for x in inputs[:, j]) ** 0.5 for j in range(8)]
        order = sorted(range(8), key=lambda j: scores[j])
        assert sorted(order[:3]) == (~mask[i]).nonzero()[:, 0].tolist()
    patterned = wanda(weight, gram, Pattern(1, 4))
    scores = weight.abs() * inputs.norm(dim=0)
    for i in range(6):
        for first in (0, 4):
            best = first + int(scores[i, first : first + 4].argmax())
            assert patterned[i, first : first + 4].nonzero()[:, 0].tolist() == [best - first]


def surgeon(
    weight: Tensor, gram: Tensor, block: int, choose: Callable[[Tensor, int, int], Tensor]
) -> tuple[Tensor, Tensor]:
    """Optimal brain surgeon in float64, row by row, with an explicit inverse for each column.

    Args:
        choose: from the costs of the rows in some columns, [out, columns], and these columns' limits to their mask.
    """
    weight, hessian = weight.double().clone(), gram.double().clone()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    mask, width = torch.ones_like(weight, dtype=torch.bool), weight.shape[1]
    for first in range(0, width, block):
        stop = min(first + block, width)
        inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(first, stop)]
        costs = torch.stack([weight[:, first + k] ** 2 / inverse[0, 0] for k, inverse in enumerate(inverses)], 1)
        mask[:, first:stop] = choose(costs, first, stop)
        for k, inverse in enumerate(inverses):
            for i in range(len(weight)):
                if not mask[i, first + k]:
                    weight[i, first + k :] -= weight[i, first + k] / inverse[0, 0] * inverse[0]
                    weight[i, first + k] = 0
    return weight, mask


def cheapest(number: Callable[[int, int], int]) -> Callable[[Tensor, int, int], Tensor]:
    def choose(costs: Tensor, first: int, stop: int) -> Tensor:
        order = sorted(range(costs.numel()), key=costs.flatten().tolist().__getitem__)
        mask = torch.ones(costs.numel(), dtype=torch.bool)
        mask[order[: number(first, stop)]] = False
        return mask.view(costs.shape)

    return choose


def by_group(costs: Tensor, first: int, stop: int) -> Tensor:
    keep = costs.argsort(dim=1)[:, -2:]
    return torch.zeros_like(costs, dtype=torch.bool).scatter_(1, keep, True)


@pytest.mark.parametrize(("block", "num_dropped"), [(128, 24), (128, 41), (4, 24), (3, 24)])
def test_sparsegpt_is_the_surgeon(monkeypatch: pytest.MonkeyPatch, block: int, num_dropped: int) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    weight, _, gram = layer()

    def number(first: int, stop: int) -> int:
        return round(6 * stop * num_dropped / 48) - round(6 * first * num_dropped / 48)

    pruned, mask = sparsegpt(weight, gram, num_dropped)
    expected, chosen = surgeon(weight, gram, min(block, 8), cheapest(number))
    assert torch.equal(mask, chosen) and int((~mask).sum()) == num_dropped
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-3, atol=1e-4)
    assert not bool(pruned[~mask].any())


@pytest.mark.parametrize("block", [4, 8, 128])
def test_sparsegpt_with_a_pattern_chooses_group_by_group(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    weight, _, gram = layer()
    pruned, mask = sparsegpt(weight, gram, Pattern(2, 4))
    expected, chosen = surgeon(weight, gram, 4, by_group)
    assert torch.equal(mask, chosen)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("target", [100, 200, Pattern(2, 4)])
def test_what_knows_the_inputs_keeps_the_outputs(target: Target) -> None:
    weight, inputs, gram = layer(16, 24, 200)
    errors = {}
    for method in METHODS:
        pruned, mask = PRUNERS[method](weight, gram, target, None)
        errors[method] = float((inputs @ (pruned - weight).T).norm())
        assert not bool(pruned[~mask].any()) and bool(pruned[mask].all())
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


@pytest.mark.parametrize("method", METHODS)
def test_what_was_pruned_stays_pruned(method: str) -> None:
    weight, _, gram = layer()
    first, before = PRUNERS[method](weight, gram, 20, None)
    first[before] += 0.1
    # A live weight that costs nothing must not be taken for one that is gone.
    first[0, int(before[0].nonzero()[0, 0])] = 0
    _, after = PRUNERS[method](first, gram, 30, before)
    assert int((~after).sum()) == 30 and not bool((after & ~before).any())


@pytest.mark.parametrize("method", METHODS)
def test_rounds_are_nested_to_the_weight(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Blocks of columns and rows whose shares are no whole numbers, and a weight more in each round."""
    monkeypatch.setattr(module, "BLOCK", 3)
    weight, _, gram = layer(5, 11)
    before = torch.ones(5, 11, dtype=torch.bool)
    for target in range(1, 50):
        weight, mask = PRUNERS[method](weight, gram, target, before)
        assert int((~mask).sum()) == target and not bool((mask & ~before).any())
        before = mask


def test_layers_never_get_weights_back() -> None:
    _, blocks, _ = tiny(llama)
    before: dict[str, Tensor] = {}
    total = sum(one.weight.numel() for block in blocks for one in block.layers)
    for share in (0.1, 0.1003, 0.2, 0.33, 0.3301):
        targets = targets_of(blocks, [share] * 3, before)
        assert sum(targets.values()) == round(total * share)
        for block in blocks:
            for one in block.layers:
                lost = int((~before[one.name]).sum()) if one.name in before else 0
                assert lost <= targets[one.name] <= one.weight.numel() * share + 2
                flat = torch.arange(one.weight.numel()) >= targets[one.name]
                before[one.name] = flat.view(one.shape)


def test_inputs_that_are_always_0_go_first() -> None:
    weight, inputs, _ = layer()
    inputs[:, 3] = 0
    pruned, mask = sparsegpt(weight, inputs.T @ inputs, 8)
    assert not bool(mask[:, 3].any())
    pruned, mask = sparsegpt(weight, inputs.T @ inputs, 2)
    assert int((~mask[:, 3]).sum()) == 2 and int((pruned == 0).sum()) == 2


def test_a_hessian_without_a_factor() -> None:
    weight, _, gram = layer()
    with pytest.raises(ValueError, match="not positive definite"):
        sparsegpt(weight, -gram, 8)
    with pytest.raises(ValueError, match="does not divide the width"):
        sparsegpt(weight, gram, Pattern(2, 3))


def llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=23, n_embd=16, n_layer=3, n_head=2, n_positions=32))


def tiny(make: Callable[[], PreTrainedModel]) -> tuple[PreTrainedModel, list[Block], list[Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval().requires_grad_(False)
    ids = torch.randint(23, (4, 12), generator=torch.Generator().manual_seed(1))
    return model, decoder_blocks(model, lambda name: True), [row[None] for row in ids]


def test_blocks_and_their_layers() -> None:
    _, blocks, _ = tiny(llama)
    assert [block.name for block in blocks] == [f"model.layers.{index}" for index in range(3)]
    assert len(blocks[0].layers) == 7 and blocks[0].layers[0].name == "model.layers.0.self_attn.q_proj.weight"
    model, blocks, _ = tiny(gpt2)
    names = [one.name for one in blocks[1].layers]
    assert names == [
        f"transformer.h.1.{part}.weight" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert blocks[0].layers[0].shape == (48, 16) and set(names) <= set(model.state_dict())
    some = decoder_blocks(model, lambda name: "h.1.mlp" in name)
    assert [len(block.layers) for block in some] == [0, 2, 0]
    with pytest.raises(EditingError, match="No weight that is to be pruned"):
        decoder_blocks(model, lambda name: "wte" in name)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_each_block_is_pruned_on_what_the_pruned_ones_hand_on(make: Callable[[], PreTrainedModel]) -> None:
    """The last block's mask, from a whole forward of the model that came out, with hooks of the test's own."""
    model, blocks, sequences = tiny(make)
    dense = {one.name: one.weight.clone() for block in blocks for one in block.layers}
    targets = targets_of(blocks, [0.5] * 3, {})
    pruned = prune_blocks(blocks, Walk(model, blocks, sequences), "wanda", targets, dense, {})
    total = sum(weight.numel() for weight in dense.values())
    assert sum(int((~mask).sum()) for mask in pruned.masks.values()) == total // 2
    last = blocks[2].layers[0]
    seen: list[Tensor] = []
    hook = last.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for ids in sequences:
            model(ids)
    hook.remove()
    inputs = torch.cat(seen)
    gram = inputs.T @ inputs
    assert torch.equal(pruned.masks[last.name], wanda(dense[last.name], gram, targets[last.name]))
    assert torch.equal(last.weight, dense[last.name].masked_fill(~pruned.masks[last.name], 0))
    change = inputs @ (last.weight - dense[last.name]).T
    expected = float((change.norm(dim=0) / (inputs @ dense[last.name].T).norm(dim=0)).square().mean())
    assert pruned.losses[last.name] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes_a_model_to_the_number(method: Any) -> None:
    model, blocks, sequences = tiny(llama)
    dense = {one.name: one.weight.clone() for block in blocks for one in block.layers}
    walk = None if method == "magnitude" else Walk(model, blocks, sequences)
    pruned = prune_blocks(blocks, walk, method, targets_of(blocks, [0.3, 0.55, 0.71], {}), dense, {})
    sizes = [sum(one.weight.numel() for one in block.layers) for block in blocks]
    dropped = [sum(int((~pruned.masks[one.name]).sum()) for one in block.layers) for block in blocks]
    assert sum(dropped) == round(sum(size * share for size, share in zip(sizes, (0.3, 0.55, 0.71), strict=True)))
    assert dropped == pytest.approx([size * share for size, share in zip(sizes, (0.3, 0.55, 0.71), strict=True)], abs=1)
    zeros = sum(int((one.weight == 0).sum()) for block in blocks for one in block.layers)
    assert zeros == sum(dropped) and bool(pruned.losses) == (walk is not None)


def test_a_pattern_that_divides_no_width_names_the_layer() -> None:
    _, blocks, _ = tiny(llama)
    check_pattern(blocks, Pattern(4, 8))
    with pytest.raises(EditingError, match=r"3:5 does not divide the 16 inputs of model\.layers\.0\.self_attn\.q_proj"):
        check_pattern(blocks, Pattern(3, 5))


class Odd(nn.Module):
    """Blocks that are called otherwise than one after the other."""

    def __init__(self, factor: float, times: int) -> None:
        super().__init__()
        self.embed, self.factor, self.times = nn.Embedding(23, 8), factor, times
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))

    def forward(self, ids: Tensor, use_cache: bool) -> Any:
        states = self.embed(ids)
        for _ in range(self.times):
            for block in self.blocks:
                states = block(states) * self.factor
        return SimpleNamespace(logits=states)


@pytest.mark.parametrize(
    ("factor", "times", "message"), [(2, 1, "does not hand its output"), (1, 2, "each of its blocks once")]
)
def test_models_that_are_no_simple_stack(factor: float, times: int, message: str) -> None:
    model: Any = Odd(factor, times).requires_grad_(False)
    blocks = decoder_blocks(model, lambda name: True)
    with pytest.raises(EditingError, match=message):
        Walk(model, blocks, [torch.tensor([[1, 2, 3]])])


def test_activations_that_are_not_finite_are_refused() -> None:
    model, blocks, sequences = tiny(llama)
    model.get_input_embeddings().weight[:, 3] = torch.inf
    dense = {one.name: one.weight.clone() for block in blocks for one in block.layers}
    with pytest.raises(EditingError, match="are not finite"):
        prune_blocks(blocks, Walk(model, blocks, sequences), "wanda", targets_of(blocks, [0.5] * 3, {}), dense, {})
