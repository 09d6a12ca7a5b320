"""Sinkhorn divergences against exact transport of small clouds."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from cmc_server.evaluation.sinkhorn import sinkhorn_divergence


def cloud(seed: int, num_points: int = 5, size: int = 3) -> Tensor:
    return torch.randn(num_points, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(x: Tensor, y: Tensor) -> float:
    """Half the squared Wasserstein-2 distance of two clouds of equal size: the best assignment."""
    costs = [
        sum(0.5 * float(((x[i] - y[j]) ** 2).sum()) for i, j in enumerate(order))
        for order in permutations(range(len(x)))
    ]
    return min(costs) / len(x)


@pytest.mark.parametrize("seed", range(4))
def test_small_clouds_are_transported_exactly(seed: int) -> None:
    x, y = cloud(seed), 2 * cloud(seed + 10) + 1
    assert sinkhorn_divergence(x, y) == pytest.approx(exact(x, y), abs=1e-3)


def test_one_point_against_two() -> None:
    # Half the mass travels to either side: 1/2 * (1/2 * 1 + 1/2 * 9).
    assert sinkhorn_divergence(torch.tensor([[0.0]]), torch.tensor([[1.0], [3.0]])) == pytest.approx(2.5, abs=1e-3)


def test_wide_blur_by_hand() -> None:
    # One point each: the plan is forced, the entropy of it is 0, and only the cost remains, whatever the blur.
    assert sinkhorn_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]), blur=5.0) == pytest.approx(12.5)


def test_a_translated_cloud_is_half_the_squared_shift_away() -> None:
    x, shift = cloud(0, 30, 10), torch.full((10,), 0.7, dtype=torch.float64)
    assert sinkhorn_divergence(x, x + shift) == pytest.approx(0.5 * 10 * 0.7**2, abs=1e-6)


def test_symmetric_and_zero_on_itself() -> None:
    x, y = cloud(1, 8), cloud(2, 6)
    assert sinkhorn_divergence(x, y) == pytest.approx(sinkhorn_divergence(y, x), abs=1e-4)
    assert sinkhorn_divergence(x, x) == 0
    assert sinkhorn_divergence(x, x.flip(0)) == pytest.approx(0, abs=1e-9)  # the order of the points is ignored


def test_far_clouds_keep_their_digits() -> None:
    x = cloud(3)
    assert sinkhorn_divergence(x + 1e6, x + 1e6 + 1) == pytest.approx(1.5, abs=1e-4)


def test_close_points_within_the_blur_converge() -> None:
    x = 1e-3 * cloud(4, 20)
    assert abs(sinkhorn_divergence(x, x + 1e-3 * cloud(5, 20))) < 1e-5


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.zeros(0, 2), torch.zeros(1, 2)),
        (torch.zeros(1, 2), torch.zeros(1, 3)),
        (torch.zeros(2), torch.zeros(2)),
        (torch.tensor([[torch.inf]]), torch.zeros(1, 1)),
    ],
)
def test_bad_clouds(x: Tensor, y: Tensor) -> None:
    with pytest.raises(ValueError, match="cloud"):
        sinkhorn_divergence(x, y)
