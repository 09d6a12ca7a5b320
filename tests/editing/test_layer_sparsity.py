"""CKA against its definition, the linear programme against all its corners, and the budgets of adapters."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from cmc_server.editing.layer_sparsity import (
    cka,
    default_spread,
    hsic,
    layer_sparsities,
    redundancies,
    scheduled,
    sequence_gram,
)
from cmc_server.editing.rank_budgets import rank_budgets, reconstruction_loss, scheduled_rank


def features(num: int, seed: int, samples: int = 6) -> Tensor:
    return torch.randn(samples, num, generator=torch.Generator().manual_seed(seed)).double()


def test_hsic_is_the_trace() -> None:
    left, right = (one @ one.T for one in (features(3, 0), features(5, 1)))
    centre = torch.eye(6).double() - torch.ones(6, 6).double() / 6
    assert hsic(left, right) == pytest.approx(float((left @ centre @ right @ centre).trace()) / 25)


def test_cka_is_that_of_centred_features() -> None:
    x, y = features(3, 0) + 4, features(5, 1) - 2
    a, b = x - x.mean(0), y - y.mean(0)
    expected = float((b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm()))
    assert cka(x @ x.T, y @ y.T) == pytest.approx(expected)
    rotation = torch.linalg.qr(features(3, 2, 3)).Q
    turned = 7 * x @ rotation + 1
    assert cka(x @ x.T, turned @ turned.T) == pytest.approx(1)
    assert cka(x @ x.T, torch.ones(6, 6)) == 0


def test_redundancy_is_the_sum_over_the_others() -> None:
    grams = [one @ one.T for one in (features(4, 0), features(4, 0) + 0.1 * features(4, 1), features(4, 2))]
    sums = [sum(cka(one, other) for other in grams if other is not one) for one in grams]
    assert redundancies(grams) == pytest.approx([one / sum(sums) for one in sums])
    assert redundancies([torch.ones(2, 2)] * 4) == [0.25] * 4
    assert redundancies(grams[:1]) == [1.0]


def test_sequences_are_compared_whole() -> None:
    inputs = [torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    expected = [[float((one * other).sum()) for other in inputs] for one in inputs]
    torch.testing.assert_close(sequence_gram(inputs), torch.tensor(expected))


def corners(sizes: list[int], low: list[float], high: list[float], total: float) -> list[list[float]]:
    """All points at which all but one variable are at a bound and the equation holds."""
    found = []
    for free in range(len(sizes)):
        for ends in itertools.product((0, 1), repeat=len(sizes)):
            point = [(low, high)[end][index] for index, end in enumerate(ends)]
            rest = sum(
                size * value for index, (size, value) in enumerate(zip(sizes, point, strict=True)) if index != free
            )
            point[free] = (total - rest) / sizes[free]
            if low[free] - 1e-9 <= point[free] <= high[free] + 1e-9:
                found.append(point)
    return found


@pytest.mark.parametrize("sizes", [[10, 10, 10, 10], [10, 20, 5, 40], [7, 7, 7]])
@pytest.mark.parametrize(("sparsity", "spread"), [(0.5, 0.02), (0.01, 0.05), (0.98, 0.1), (0.3, 0.0)])
@pytest.mark.parametrize("least", [None, 0.9])
def test_no_corner_of_the_programme_is_better(
    sizes: list[int], sparsity: float, spread: float, least: float | None
) -> None:
    redundancy = [0.3, 0.1, 0.4, 0.2][: len(sizes)]
    at_least = None if least is None else [sparsity * least + spread * (index % 2) / 4 for index in range(len(sizes))]
    low = [max(0.0, sparsity - spread, one) for one in at_least or [0.0] * len(sizes)]
    high = [max(lowest, min(1.0, sparsity + spread)) for lowest in low]
    total = sparsity * sum(sizes)
    points = corners(sizes, low, high, total)
    found = layer_sparsities(redundancy, sizes, sparsity, spread, 1.0, at_least)
    if points:
        assert sum(size * value for size, value in zip(sizes, found, strict=True)) == pytest.approx(total)
        assert all(a - 1e-9 <= value <= b + 1e-9 for a, value, b in zip(low, found, high, strict=True))

        def cost(point: list[float]) -> float:
            return sum(value * math.exp(-one) for value, one in zip(point, redundancy, strict=True))

        assert cost(found) == pytest.approx(min(map(cost, points)))


def test_more_redundant_layers_become_sparser() -> None:
    assert layer_sparsities([0.1, 0.4, 0.2, 0.3], [8] * 4, 0.5, 0.02) == pytest.approx([0.48, 0.52, 0.48, 0.52])
    assert layer_sparsities([0.1, 0.4, 0.2], [8] * 3, 0.5, 0.02) == pytest.approx([0.48, 0.52, 0.5])
    assert [default_spread(one) for one in (0.3, 0.5, 0.55, 0.6, 0.7, 0.9)] == [0.01, 0.01, 0.02, 0.02, 0.03, 0.03]


def test_the_schedule_is_cubic() -> None:
    assert [scheduled(0.5, number, 5) for number in range(1, 6)] == pytest.approx([0.244, 0.392, 0.468, 0.496, 0.5])
    assert scheduled(0.7, 1, 1) == 0.7
    assert [scheduled_rank(8, number, 5) for number in range(1, 6)] == [6, 7, 8, 9, 10]
    assert scheduled_rank(8, 1, 1) == 8 and scheduled_rank(1, 1, 3) == 1


def test_reconstruction_loss_is_of_outputs() -> None:
    inputs, dense, sparse = features(4, 0, 9), features(4, 1, 3), features(4, 2, 3)
    dense[2], sparse[2] = 0, 0
    y, z = inputs @ dense.T, inputs @ sparse.T
    ratios = [float((y[:, j] - z[:, j]).norm() ** 2 / y[:, j].norm() ** 2) for j in (0, 1)]
    assert reconstruction_loss(dense, sparse, inputs.T @ inputs) == pytest.approx(sum(ratios) / 3)
    sparse[2] = 1
    assert reconstruction_loss(dense, sparse, inputs.T @ inputs) == pytest.approx((sum(ratios) + 1) / 3)


@pytest.mark.parametrize("mean", [1, 6, 7.5, 10, 16])
@pytest.mark.parametrize(
    "losses", [[0.1, 0.2, 0.3, 0.4], [1.0, 0.0, 0.0], [1e-3, 5.0, 1e3, 2.0, 2.0], [0.0, 0.0], [3.0]]
)
def test_ranks_follow_losses_within_limits(losses: list[float], mean: float) -> None:
    ranks = rank_budgets(losses, mean)
    assert sum(ranks) == round(len(losses) * mean) and all(1 <= rank <= 16 for rank in ranks)
    order = sorted(range(len(losses)), key=lambda layer: losses[layer])
    assert all(ranks[low] <= ranks[high] + 1 for low, high in itertools.pairwise(order))


def test_ranks_in_proportion() -> None:
    assert rank_budgets([0.1, 0.2, 0.3, 0.4], 5) == [2, 4, 6, 8]
    assert rank_budgets([1.0, 1.0, 100.0], 8) == [4, 4, 16]
    assert rank_budgets([1.0, 1.0], 99) == [16, 16]
