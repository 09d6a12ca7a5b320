"""The merging methods against closed forms on quadratics, against their formulas, and against each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cmc_server.editing.fisher_averaging import fisher_average
from cmc_server.editing.gradient_matching import gradient_matching, guarded
from cmc_server.editing.regmean import regmean
from cmc_server.editing.task_arithmetic import task_arithmetic

EXACT = {"rtol": 1e-12, "atol": 1e-12}
seeds = st.integers(0, 1000)


class Quadratics:
    """A base and T tasks with diagonal quadratic losses, and models that were fine-tuned from the base.

    Task t has the loss 1/2 sum_i h_ti (x_i - m_ti)^2; model t minimises it plus 1/2 sum_i h_0i (x_i - base_i)^2.
    """

    def __init__(self, num_tasks: int, seed: int, size: int = 50) -> None:
        draw = np.random.default_rng(seed)
        self.base = draw.normal(size=size)
        self.base_hessian = np.exp(draw.normal(size=size))
        self.hessians = np.exp(draw.normal(size=(num_tasks, size)))
        self.minima = draw.normal(size=(num_tasks, size))
        self.models = (self.base_hessian * self.base + self.hessians * self.minima) / (
            self.base_hessian + self.hessians
        )
        self.weights = draw.uniform(0.2, 2, size=num_tasks).tolist()

    def optimum(self, weights: list[float]) -> np.ndarray:
        """Where the gradient of base and weighted tasks together is 0."""
        factors = np.array(weights)[:, None] * self.hessians
        return (self.base_hessian * self.base + (factors * self.minima).sum(0)) / (self.base_hessian + factors.sum(0))

    @property
    def deltas(self) -> list[Tensor]:
        return [torch.from_numpy(model - self.base) for model in self.models]

    @property
    def curvatures(self) -> list[Tensor]:
        return list(torch.from_numpy(self.hessians))


@given(st.integers(1, 5), seeds)
def test_gradient_matching_is_exact_on_quadratics(num_tasks: int, seed: int) -> None:
    tasks = Quadratics(num_tasks, seed)
    merged = gradient_matching(tasks.deltas, tasks.curvatures, tasks.weights, torch.from_numpy(tasks.base_hessian))
    np.testing.assert_allclose(tasks.base + merged.numpy(), tasks.optimum(tasks.weights), **EXACT)


@given(st.integers(1, 3), seeds)
def test_removal_is_exact_on_quadratics(num_tasks: int, seed: int) -> None:
    tasks = Quadratics(num_tasks, seed)
    tasks.base_hessian += 2 * np.abs(np.array(tasks.weights)[:, None] * tasks.hessians).sum(0)
    # The models must have been trained from the stiffer base.
    tasks.models = (tasks.base_hessian * tasks.base + tasks.hessians * tasks.minima) / (
        tasks.base_hessian + tasks.hessians
    )
    weights = [-weight for weight in tasks.weights]
    base_hessian = torch.from_numpy(tasks.base_hessian)
    hessians, num_clamped = guarded(tasks.curvatures, weights, base_hessian, 0.1)
    assert num_clamped == 0
    merged = gradient_matching(tasks.deltas, hessians, weights, base_hessian)
    np.testing.assert_allclose(tasks.base + merged.numpy(), tasks.optimum(weights), **EXACT)


def test_what_was_merged_can_be_removed_again() -> None:
    tasks = Quadratics(2, 0)
    both = tasks.optimum([1.0, 1.0])
    # The joint model as the base, whose curvature holds both tasks; the second task fine-tuned from it, then removed.
    base_hessian = tasks.base_hessian + tasks.hessians.sum(0)
    model = (base_hessian * both + tasks.hessians[1] * tasks.minima[1]) / (base_hessian + tasks.hessians[1])
    removed = gradient_matching(
        [torch.from_numpy(model - both)], [tasks.curvatures[1]], [-1.0], torch.from_numpy(base_hessian)
    )
    np.testing.assert_allclose(both + removed.numpy(), tasks.optimum([1.0, 0.0]), **EXACT)


def test_task_arithmetic_is_wrong_by_the_gradient_mismatch() -> None:
    tasks = Quadratics(3, 1)
    target = tasks.optimum(tasks.weights)
    merged = tasks.base + task_arithmetic(tasks.deltas, tasks.weights).numpy()
    mismatch = tasks.hessians * (target - tasks.minima) - tasks.hessians * (tasks.models - tasks.minima)
    error = -(np.array(tasks.weights)[:, None] * mismatch).sum(0) / tasks.base_hessian
    np.testing.assert_allclose(target - merged, error, **EXACT)


def test_special_cases_of_gradient_matching() -> None:
    tasks = Quadratics(3, 2)
    zero = torch.zeros(50, dtype=torch.float64)
    base_hessian = torch.from_numpy(tasks.base_hessian)
    nothing = gradient_matching(tasks.deltas, [zero] * 3, tasks.weights, base_hessian)
    torch.testing.assert_close(nothing, task_arithmetic(tasks.deltas, tasks.weights), **EXACT)
    no_base = gradient_matching(tasks.deltas, tasks.curvatures, tasks.weights, zero)
    torch.testing.assert_close(no_base, fisher_average(tasks.deltas, tasks.curvatures, tasks.weights), **EXACT)
    equal = fisher_average(tasks.deltas, [base_hessian] * 3, [1.0] * 3)
    torch.testing.assert_close(equal, torch.stack(tasks.deltas).mean(0), **EXACT)


@pytest.mark.parametrize("order", [[1, 2, 0], [2, 1, 0]])
def test_the_order_of_models_does_not_matter(order: list[int]) -> None:
    tasks = Quadratics(3, 3)
    base_hessian = torch.from_numpy(tasks.base_hessian)
    deltas, hessians = [tasks.deltas[i] for i in order], [tasks.curvatures[i] for i in order]
    weights = [tasks.weights[i] for i in order]
    pairs = [
        (
            gradient_matching(tasks.deltas, tasks.curvatures, tasks.weights, base_hessian),
            gradient_matching(deltas, hessians, weights, base_hessian),
        ),
        (fisher_average(tasks.deltas, tasks.curvatures, tasks.weights), fisher_average(deltas, hessians, weights)),
        (task_arithmetic(tasks.deltas, tasks.weights), task_arithmetic(deltas, weights)),
    ]
    for one, other in pairs:
        torch.testing.assert_close(one, other, **EXACT)


def test_weights_that_no_data_touch() -> None:
    deltas = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
    untouched = [torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0])]
    torch.testing.assert_close(fisher_average(deltas, untouched, [1.0, 1.0], 1e-12), torch.tensor([2.0, 2.0]))
    merged = gradient_matching(deltas, untouched, [1.0, 1.0], torch.full((2,), 1e-12))
    torch.testing.assert_close(merged, torch.tensor([4.0, 2.0]))  # summed; what only the first model knows is its own
    with pytest.raises(ValueError, match="above 0 everywhere"):
        gradient_matching(deltas, untouched, [1.0, 1.0], torch.zeros(2))


@given(seeds, st.floats(0.05, 0.9))
def test_the_guard_bounds_every_step(seed: int, floor: float) -> None:
    tasks = Quadratics(2, seed)
    base_hessian = torch.from_numpy(tasks.base_hessian)
    hessians, num_clamped = guarded(tasks.curvatures, [0.5, -1.0], base_hessian, floor)
    added = base_hessian + 0.5 * tasks.curvatures[0]
    assert num_clamped == int((added - tasks.curvatures[1] < floor * added).sum())
    assert torch.equal(hessians[0], tasks.curvatures[0])
    assert bool((added - hessians[1] >= floor * added * (1 - 1e-9)).all())
    kept = added - tasks.curvatures[1] >= floor * added
    assert torch.equal(hessians[1][kept], tasks.curvatures[1][kept])
    alone, _ = guarded(tasks.curvatures[:1], [-1.0], base_hessian, floor)
    step = gradient_matching(tasks.deltas[:1], alone, [-1.0], base_hessian)
    assert bool((step.abs() <= (2 - floor) / floor * tasks.deltas[0].abs() * (1 + 1e-9)).all())


def layers(num_models: int, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Linear layers [4, 6] and the inputs [30, 6] of each, float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"generator": generator, "dtype": torch.float64}
    return (
        [torch.randn(4, 6, **shapes) for _ in range(num_models)],
        [torch.randn(30, 6, **shapes) @ torch.randn(6, 6, **shapes) for _ in range(num_models)],
    )


def test_regmean_solves_the_regression() -> None:
    matrices, inputs = layers(3)
    grams = [x.T @ x for x in inputs]
    merged = regmean(matrices, grams, [1.0, 2.0, 0.5], off_diagonal=1.0)
    # Independently: least squares over all rows, those of model t repeated a_t times.
    left = torch.cat([a**0.5 * x for a, x in zip([1.0, 2.0, 0.5], inputs, strict=True)])
    right = torch.cat([a**0.5 * x @ w.T for a, x, w in zip([1.0, 2.0, 0.5], inputs, matrices, strict=True)])
    torch.testing.assert_close(merged, torch.linalg.lstsq(left, right).solution.T, rtol=1e-3, atol=1e-4)


def test_regmean_shrinks_what_is_off_the_diagonal() -> None:
    matrices, inputs = layers(2, 1)
    grams = [x.T @ x for x in inputs]
    shrunk = [0.9 * gram + 0.1 * torch.diag(gram.diagonal()) for gram in grams]
    expected = torch.linalg.solve(sum(shrunk), sum(g @ w.T for g, w in zip(shrunk, matrices, strict=True))).T
    torch.testing.assert_close(regmean(matrices, grams, [1.0, 1.0]), expected, rtol=1e-4, atol=1e-5)
    diagonal = regmean(matrices, grams, [1.0, 1.0], off_diagonal=0.0)
    fishers = [gram.diagonal().expand(4, 6) for gram in grams]
    torch.testing.assert_close(diagonal, fisher_average(matrices, fishers, [1.0, 1.0]), rtol=1e-4, atol=1e-5)


def test_regmean_of_inputs_that_never_came() -> None:
    matrices, _ = layers(2)
    nothing = torch.zeros(6, 6, dtype=torch.float64)
    torch.testing.assert_close(regmean(matrices, [nothing] * 2, [1.0, 3.0]), 0.25 * matrices[0] + 0.75 * matrices[1])


def test_regmean_of_one_model_and_one_input_is_that_model() -> None:
    matrix = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    merged = regmean([matrix], [torch.ones(96, 96)], [1.0], off_diagonal=1.0)
    torch.testing.assert_close(merged, matrix, rtol=1e-5, atol=1e-5)


def test_regmean_without_shrinking_may_be_singular() -> None:
    matrices, _ = layers(2)
    lopsided = torch.full((6, 6), -1.0, dtype=torch.float64).fill_diagonal_(1.0)
    with pytest.raises(ValueError, match="lower off_diagonal"):
        regmean(matrices, [lopsided] * 2, [1.0, 1.0], off_diagonal=1.0)
