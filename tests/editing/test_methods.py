"""Each algorithm against its formula, written out slowly in numpy, and against what the papers say of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cmc_server.editing import bitdelta, ties
from cmc_server.editing.dare import dare, edit_intensity, first_order_variance
from cmc_server.editing.expo import expo
from cmc_server.editing.magnitude import prune_below, pruning_threshold
from cmc_server.editing.methods import METHODS, build_method
from cmc_server.editing.seeds import generator
from cmc_server.editing.twin import rank_of_rate, truncate
from cmc_server.errors import ConfigError

shapes = st.tuples(st.integers(1, 9), st.integers(1, 17))
seeds = st.integers(0, 1000)


def matrix(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(shapes, seeds, st.floats(0, 0.99), st.sampled_from([-1.0, -0.5, 0.0, 0.5, 0.8, 1.0]))
def test_dare_is_its_formula(shape: tuple[int, int], seed: int, drop: float, k: float) -> None:
    delta = matrix(shape, seed)
    mask = (torch.rand(shape, generator=generator(seed, "w")) < drop).numpy().astype(np.float64)
    d = delta.double().numpy()
    edited = dare(delta, drop, generator(seed, "w"), k).numpy()
    np.testing.assert_allclose(edited, k * mask * d + (1 - k * drop) / (1 - drop) * (1 - mask) * d, rtol=1e-5)
    np.testing.assert_allclose(edited - d, (k - 1) * (mask - drop) / (1 - drop) * d, rtol=1e-4, atol=1e-5)


def test_dare_drops_its_share_and_keeps_the_mean() -> None:
    delta = torch.ones(400, 500)
    edited = dare(delta, 0.9, generator(0, "w"))
    assert float((edited == 0).float().mean()) == pytest.approx(0.9, abs=0.003)
    assert float(edited.mean()) == pytest.approx(1, abs=0.03)
    assert sorted(set(edited.flatten().tolist())) == pytest.approx([0, 10])


def test_the_variance_over_masks_is_what_the_formula_says() -> None:
    delta, gradient = matrix((6, 5)), matrix((6, 5), 1)
    for drop, k in ((0.3, 0.0), (0.9, 0.0), (0.5, -1.0)):
        terms = [float(((dare(delta, drop, generator(seed, "w"), k) - delta) * gradient).sum()) for seed in range(4000)]
        expected = first_order_variance(delta, gradient, drop, k)
        assert np.var(terms) == pytest.approx(expected, rel=0.1)
        assert abs(np.mean(terms)) < 4 * math.sqrt(expected / len(terms))
    assert edit_intensity(0.999) == pytest.approx(999)


@pytest.mark.parametrize("drop", [-0.1, 1 - 1e-8, 1.0, 1.5, math.nan])
def test_a_drop_rate_outside_its_range(drop: float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 0.99999"):  # above that nothing would be kept
        dare(torch.ones(2), drop, generator(0, "w"))


def test_masks_do_not_depend_on_pieces() -> None:
    delta, whole, pieces = matrix((70, 31)), generator(3, "w"), generator(3, "w")
    flat = delta.flatten()
    parts = [dare(flat[start : start + 97], 0.5, pieces) for start in range(0, flat.numel(), 97)]
    assert torch.equal(dare(delta, 0.5, whole).flatten(), torch.cat(parts))


def test_generators_differ_by_seed_and_by_name() -> None:
    draws = {(seed, name): float(torch.rand(1, generator=generator(seed, name))) for seed in (0, 1) for name in "ab"}
    assert len(set(draws.values())) == 4
    assert float(torch.rand(1, generator=generator(1, "a"))) == draws[1, "a"]


@given(st.integers(1, 200), seeds, st.floats(0, 0.99), st.booleans())
def test_pruning_is_a_sort(count: int, seed: int, drop: float, with_ties: bool) -> None:
    delta = matrix((count,), seed)
    delta = delta.round() if with_ties else delta
    threshold = pruning_threshold(lambda: delta.split(7), drop)
    magnitudes = np.sort(np.abs(delta.numpy()))
    rank = round(drop * count)
    assert threshold == (magnitudes[rank] if rank < count else math.inf)
    pruned = prune_below(delta, threshold)
    assert torch.equal(pruned, delta * (delta.abs() >= threshold))
    if not with_ties:
        assert int((pruned != 0).sum()) == count - rank


def test_pruning_a_share_too_small_for_one_element_prunes_none() -> None:
    delta = matrix((2, 3))
    assert torch.equal(prune_below(delta, pruning_threshold(lambda: [delta], 0.05)), delta)
    assert pruning_threshold(list, 0.5) == math.inf
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        pruning_threshold(lambda: [delta], 1.0)


def test_bitdelta_by_hand() -> None:
    delta = torch.tensor([[1.0, -3.0, 0.0, 4.0], [2.0, -2.0, 2.0, -2.0]])
    for_all = bitdelta.bitdelta(delta, bitdelta.tensor_mean([delta]))
    assert for_all.tolist() == [[2, -2, 2, 2], [2, -2, 2, -2]]  # the sign of 0 is +
    for_rows = bitdelta.bitdelta(delta, 0.5 * bitdelta.row_means(delta))
    assert for_rows.tolist() == [[1, -1, 1, 1], [1, -1, 1, -1]]


@given(shapes, seeds, st.integers(1, 40), st.sampled_from(["tensor", "row"]))
def test_levels_are_means_of_blocks_by_magnitude(
    shape: tuple[int, int], seed: int, levels: int, granularity: bitdelta.Granularity
) -> None:
    delta = matrix(shape, seed)
    rows = [delta.flatten().numpy()] if granularity == "tensor" else list(delta.numpy())
    expected = []
    for row in rows:
        values = np.empty_like(row)
        for block in np.array_split(np.argsort(np.abs(row)), min(levels, len(row))):
            values[block] = np.abs(row[block]).mean()
        expected.append(np.sign(row) * values)
    edited = bitdelta.multilevel(delta, levels, granularity)
    np.testing.assert_allclose(edited.numpy().ravel(), np.concatenate(expected), rtol=1e-5)


def test_one_level_is_bitdelta_and_as_many_as_elements_is_lossless() -> None:
    delta = matrix((6, 8))
    one = bitdelta.bitdelta(delta, bitdelta.tensor_mean([delta]))
    torch.testing.assert_close(bitdelta.multilevel(delta, 1), one)
    torch.testing.assert_close(bitdelta.multilevel(delta, 48), delta)
    errors = [float((bitdelta.multilevel(delta, 2**bits) - delta).norm()) for bits in range(6)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_random_magnitudes_have_the_mean_and_the_signs(kind: bitdelta.Magnitudes) -> None:
    assert kind != "mean"
    delta = matrix((300, 200))
    edited = bitdelta.random_magnitudes(delta, kind, generator(0, "w"), factor=1.5)
    assert float(edited.abs().mean()) == pytest.approx(1.5 * float(delta.abs().mean()), rel=0.01)
    assert bool((edited * delta >= 0).all()) and float(edited.abs().std()) > 0.1


def test_scales_of_rows_are_float16_only_where_that_holds_them() -> None:
    for fine in (torch.tensor([[0.1], [3.0]]), torch.tensor([[0.1], [1e-7]]), torch.tensor([[-0.1], [0.0]])):
        assert torch.equal(bitdelta.rounded_scales(fine), fine.half().float())
    for wide in (torch.tensor([[1e-6], [1.3e-7]]), torch.tensor([[1e5], [1.0]])):
        assert torch.equal(bitdelta.rounded_scales(wide), wide)


@given(shapes, seeds, st.integers(1, 12))
def test_twin_is_the_best_approximation_of_its_rank(shape: tuple[int, int], seed: int, rank: int) -> None:
    delta = matrix(shape, seed)
    edited = truncate(delta, rank).numpy()
    singular = np.linalg.svd(delta.numpy(), compute_uv=False)
    assert np.linalg.matrix_rank(edited, tol=1e-4) <= rank
    # Eckart and Young: the error is what the dropped singular values hold.
    assert np.linalg.norm(edited - delta.numpy()) == pytest.approx(np.sqrt((singular[rank:] ** 2).sum()), abs=1e-4)


def test_rank_of_a_rate() -> None:
    assert [rank_of_rate((40, 100), drop) for drop in (0, 0.5, 0.9, 0.99)] == [40, 20, 4, 1]
    with pytest.raises(ValueError, match="rank"):
        truncate(torch.ones(2, 2), 0)


def test_elect_and_merge_against_a_loop() -> None:
    deltas = [prune_below(matrix((5, 7), seed), 0.5) for seed in range(3)]
    expected = np.zeros((5, 7))
    for place in np.ndindex(5, 7):
        values = [float(delta[place]) for delta in deltas]
        party = [value for value in values if value * sum(values) > 0]
        expected[place] = sum(party) / len(party) if party else 0
    np.testing.assert_allclose(ties.elect_and_merge(deltas, 0.5).numpy(), 0.5 * expected, rtol=1e-5)


def test_a_tie_of_signs_goes_with_the_majority_of_the_whole_model() -> None:
    deltas = [torch.tensor([1.0, -1, -1, 0]), torch.tensor([-1.0, -1, -1, 0])]
    assert ties.majority_sign([deltas]) == -1
    assert ties.majority_sign([deltas, [torch.ones(2)], [torch.ones(1)]]) == 1
    assert ties.elect_and_merge(deltas, majority=-1.0).tolist() == [-1, -1, -1, 0]
    assert ties.elect_and_merge(deltas, majority=1.0).tolist() == [1, -1, -1, 0]


def test_expo_scales() -> None:
    assert expo(torch.tensor([2.0]), 0.5).tolist() == [3.0] and expo(torch.tensor([2.0]), -1.0).tolist() == [0.0]


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("mystery", {}, "choose among dare"),
        ("dare", {"alpha": 1}, "--alpha is no option of --method dare, which has --drop, --k"),
        ("dare", {"drop": 1.0}, "drop: .*less than or equal to 0.99999"),
        ("dare", {"drop": 1 - 1e-8}, "drop: .*less than or equal to 0.99999"),
        ("magnitude", {"drop": 1.0}, "drop: .*less than 1"),
        ("magnitude", {"drop": -0.1}, "drop: .*greater than or equal to 0"),
        ("ties", {"drop": math.nan}, "drop"),
        ("expo", {"alpha": math.inf}, "alpha: .*finite"),
        ("bitdelta", {"levels": 0}, "levels"),
        ("bitdelta", {"levels": 2, "magnitudes": "normal"}, "[Mm]agnitudes must be mean"),
        ("bitdelta", {"granularity": "block"}, "granularity"),
        ("twin", {"rank": 0}, "rank"),
        ("twin", {"rank": 4, "drop": 0.5}, "either drop or rank"),
    ],
)
def test_options_that_are_refused(method: str, values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_method(method, values)


def test_every_method_leaves_zeros_and_its_inputs_alone() -> None:
    for name in METHODS:
        method = build_method(name, {})
        delta = matrix((4, 6))
        before = delta.clone()
        for values in (delta, torch.zeros(4, 6)):
            measured = method.measure(lambda _, values=values: [values], 1)  # type: ignore[misc]
            edited = method.apply([values], measured, generator(0, "w"))
            assert edited.shape == values.shape and bool(edited.any()) == bool(values.any())
        assert torch.equal(delta, before)
