"""Masks to the exact number, whatever divides and whatever ties, and the file that keeps them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cmc_server.editing.mask_file import MASKS, read_masks, write_masks
from cmc_server.editing.masks import (
    Pattern,
    below_all,
    lowest_dropped,
    lowest_dropped_by_row,
    pattern_kept,
    shared_out,
)
from cmc_server.errors import ConfigError, EditingError


def scores(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.999])
def test_parts_share_the_exact_number(share: float) -> None:
    sizes = [7, 7, 7, 1, 12, 5, 5, 3]
    numbers = shared_out(sizes, [share] * len(sizes))
    assert sum(numbers) == round(sum(size * share for size in sizes))
    assert all(
        0 <= number <= size and abs(number - size * share) < 1 for number, size in zip(numbers, sizes, strict=True)
    )


def test_errors_of_rounding_do_not_add_up() -> None:
    assert sum(shared_out([3] * 40, [0.5] * 40)) == 60  # each rounded by itself: 80


def test_what_went_before_stays_away() -> None:
    assert shared_out([10, 10, 10], [0.5] * 3, [7, 0, 0]) == [7, 4, 4]
    assert shared_out([10, 10], [0.5] * 2, [9, 9]) == [9, 9]
    assert shared_out([10, 10], [1.0, 1.0], [3, 10]) == [10, 10]
    gone = [0] * 5
    for number in range(1, 56):  # one more each time
        gone, before = shared_out([15, 15, 15, 7, 3], [number / 55] * 5, gone), gone
        assert sum(gone) == number and all(now >= then for now, then in zip(gone, before, strict=True))


def test_the_lowest_of_a_tensor_go() -> None:
    values = scores(5, 7)
    mask = lowest_dropped(values, 12)
    assert int((~mask).sum()) == 12 and float(values[~mask].max()) < float(values[mask].min())
    equal = lowest_dropped(torch.ones(3, 4), 5).flatten().tolist()
    assert equal == [False] * 5 + [True] * 7


@pytest.mark.parametrize("num_dropped", [0, 1, 10, 17, 20, 34])
def test_every_row_loses_the_same_and_the_rest_is_distributed(num_dropped: int) -> None:
    values = scores(5, 7, seed=1)
    mask = lowest_dropped_by_row(values, num_dropped)
    counts = (~mask).sum(1)
    each, left = divmod(num_dropped, 5)
    assert int(counts.sum()) == num_dropped and sorted(counts.tolist()) == [each] * (5 - left) + [each + 1] * left
    for row, kept in zip(values, mask, strict=True):
        assert len(set(kept.tolist())) == 1 or float(row[~kept].max()) < float(row[kept].min())
    # Rows that lost one more are those whose next weight scored lowest.
    following = values.sort(dim=1).values[:, each]
    assert set((counts > each).nonzero()[:, 0].tolist()) == set(following.argsort()[:left].tolist())


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 4), (4, 8), (3, 4), (1, 2)])
def test_patterns_are_exact(kept: int, of: int) -> None:
    values = scores(6, 16, seed=2)
    mask = pattern_kept(values, Pattern(kept, of))
    for row in range(6):
        for first in range(0, 16, of):
            group = values[row, first : first + of].tolist()
            expected = sorted(range(of), key=lambda index: group[index])[of - kept :]
            assert mask[row, first : first + of].nonzero()[:, 0].tolist() == sorted(expected)
    assert Pattern(kept, of).sparsity == pytest.approx(float((~mask).float().mean()))
    assert pattern_kept(torch.zeros(2, 8), Pattern(2, 4)).sum() == 8


def test_a_pattern_divides_the_width() -> None:
    with pytest.raises(ValueError, match="2:4 does not divide the width 6"):
        pattern_kept(scores(2, 6), Pattern(2, 4))


@pytest.mark.parametrize("text", ["2", "2:", "4:2", "0:4", "4:4", "-1:4", "2:4:8", "a:b", "2.0:4", ""])
def test_what_is_no_pattern(text: str) -> None:
    with pytest.raises(ConfigError, match="pattern"):
        Pattern.parse(text)
    assert str(Pattern.parse("2:4")) == "2:4"


def test_what_went_before_goes_first() -> None:
    kept = torch.tensor([[True, False, True, True]])
    values = torch.tensor([[0.0, 0.0, 0.0, 5.0]])
    assert below_all(values, None) is values
    assert lowest_dropped_by_row(below_all(values, kept), 2).tolist() == [[False, False, True, True]]
    assert lowest_dropped(below_all(values, kept), 1).tolist() == [[True, False, True, True]]


def test_masks_survive_their_file(tmp_path: Path) -> None:
    masks = {f"w{width}": scores(3, width, seed=width) > 0.5 for width in (1, 7, 8, 9, 64)}
    masks["turned"] = masks["w9"].T
    write_masks(tmp_path, masks)
    with pytest.raises(EditingError, match="cannot be written"):
        write_masks(tmp_path, masks)
    read = read_masks(tmp_path)
    assert list(read) == list(masks) and all(torch.equal(read[name], mask) for name, mask in masks.items())
    with pytest.raises(EditingError, match="cannot be read"):
        read_masks(tmp_path / "missing")
    save_file({"w": torch.ones(2)}, tmp_path / MASKS)
    with pytest.raises(EditingError, match="is no mask file"):
        read_masks(tmp_path)
    (tmp_path / MASKS).write_bytes(b"broken")
    with pytest.raises(EditingError, match="cannot be read"):
        read_masks(tmp_path)
