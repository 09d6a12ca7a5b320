"""Adapters against the matrices that they stand for, and merges that are exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from cmc_server.editing.adapters import Adapter, Attached, FullAdapter, merged
from cmc_server.editing.lora import LoraAdapter
from cmc_server.editing.pooled_adapter import PooledAdapter, contiguous_groups, pooled_sizes


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapter(kind: str, shape: tuple[int, int] = (10, 7)) -> Adapter:
    """One that has learned something."""
    made: Adapter
    if kind == "pooled":
        made = PooledAdapter(shape, (4, 3), 2.0)
    elif kind == "lora":
        made = LoraAdapter(shape, 2, 2.0, torch.Generator().manual_seed(0))
    else:
        made = FullAdapter(shape)
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            assert not bool(made.delta().any()), "no effect at the start"
            parameter.add_(noise(*parameter.shape, seed=number)) if kind != "lora" or number else None
    return made


def test_groups_are_contiguous_and_even() -> None:
    for length, number in ((10, 3), (7, 7), (8, 1), (30, 4)):
        groups = contiguous_groups(length, number)
        counts = torch.bincount(groups)
        assert bool((groups.diff() >= 0).all()) and len(counts) == number and int(counts.max() - counts.min()) <= 1


def test_pooled_is_pool_linear_expand() -> None:
    made = adapter("pooled")
    assert isinstance(made, PooledAdapter)
    pool, expand = torch.zeros(3, 7), torch.zeros(10, 4)
    for column in range(7):
        group = column * 3 // 7
        pool[group, column] = 1 / sum(other * 3 // 7 == group for other in range(7))
    for row in range(10):
        expand[row, row * 4 // 10] = 1
    torch.testing.assert_close(made.delta(), 2.0 * expand @ made.core @ pool)
    assert int(torch.linalg.matrix_rank(made.delta())) == 3
    x = noise(2, 5, 7, seed=3)
    torch.testing.assert_close(made.change(x), linear(x, made.delta()))


def test_pooled_change_is_constant_in_blocks() -> None:
    delta = PooledAdapter((8, 6), (4, 2), 1.0)
    with torch.no_grad():
        delta.core.copy_(noise(4, 2))
    blocks = delta.delta().detach().reshape(4, 2, 2, 3).transpose(1, 2).reshape(8, 6)
    assert torch.equal(blocks, blocks[:, :1].expand(8, 6))


@pytest.mark.parametrize(("shape", "rank"), [((576, 576), 8), ((576, 1536), 6), ((192, 576), 10), ((32, 32), 8)])
def test_pooled_has_as_many_parameters_as_lora(shape: tuple[int, int], rank: int) -> None:
    rows, columns = pooled_sizes(shape, rank)
    assert rows * columns == pytest.approx(rank * sum(shape), rel=0.1)
    assert rows <= shape[0] and columns <= shape[1]


def test_a_short_axis_leaves_its_share_to_the_other() -> None:
    assert pooled_sizes((4, 1000), 2) == (4, 502) and pooled_sizes((1000, 4), 2) == (502, 4)
    assert pooled_sizes((3, 3), 16) == (3, 3) and pooled_sizes((1, 1), 1) == (1, 1)


def test_lora_is_a_product() -> None:
    made = adapter("lora")
    assert isinstance(made, LoraAdapter)
    x = noise(2, 5, 7, seed=3)
    torch.testing.assert_close(made.delta(), 2.0 * made.up @ made.down)
    torch.testing.assert_close(made.change(x), linear(x, made.delta()))
    assert made.down.abs().max() <= 7**-0.5


@pytest.mark.parametrize("kind", ["pooled", "lora", "full"])
def test_what_is_merged_is_what_was_trained(kind: str) -> None:
    layer, made, mask = nn.Linear(7, 10), adapter(kind), noise(10, 7, seed=5) > 0
    layer.weight.detach().masked_fill_(~mask, 0)
    x = noise(4, 7, seed=6)
    plain = layer(x)
    attached = Attached(layer, made, mask)
    changed = layer(x)
    weight = merged(layer.weight, made, mask)
    assert torch.equal(weight, torch.where(mask, layer.weight + made.delta(), 0.0))
    torch.testing.assert_close(changed, linear(x, weight, layer.bias))
    # Behind the mask, no gradient: that of the whole change is 0 where a weight went.
    torch.testing.assert_close(changed - plain, linear(x, made.delta() * mask))
    attached.remove()
    assert torch.equal(layer(x), plain)


def test_without_a_mask_the_change_is_dense() -> None:
    layer, made = nn.Linear(7, 10), adapter("lora")
    x = noise(4, 7, seed=6)
    plain = layer(x)
    Attached(layer, made, None)
    torch.testing.assert_close(layer(x), plain + linear(x, made.delta()))


def test_dropout_is_on_what_the_adapter_reads() -> None:
    layer, made = nn.Linear(7, 10), adapter("full")
    x = noise(4, 7, seed=6)
    plain = layer(x)
    attached = Attached(layer, made, torch.ones(10, 7, dtype=torch.bool), 0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = layer(x)
        torch.manual_seed(1)
        read = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(first, plain + linear(read, made.delta()))
    attached.rate = 0.0
    torch.testing.assert_close(layer(x), plain + linear(x, made.delta()))


def test_the_oracle_has_no_gradient_where_a_weight_went() -> None:
    layer, made, mask = nn.Linear(7, 10), FullAdapter((10, 7)), noise(10, 7, seed=5) > 0
    Attached(layer, made, mask)
    layer(noise(4, 7, seed=6)).square().sum().backward()
    assert made.full.grad is not None
    assert not bool(made.full.grad[~mask].any()) and bool(made.full.grad[mask].all())
