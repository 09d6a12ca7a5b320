"""Masks of sparse weights: which weights stay, chosen by a score, to the exact number."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cmc_server.errors import ConfigError


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity: of each M consecutive inputs of an output, N weights stay (Zhou et al. 2021, arXiv:2102.04010).

    Args:
        kept: N, at least 1.
        of: M, above N.

    Raises:
        ConfigError: the numbers are no pattern.
    """

    kept: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.kept < self.of:
            raise ConfigError(f"The pattern {self} must be N:M with 1 <= N < M, such as 2:4: N of each M weights stay.")

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read ``N:M``.

        Raises:
            ConfigError: it is not written so.
        """
        if not re.fullmatch(r"\d{1,6}:\d{1,6}", text):
            raise ConfigError(f"The pattern {text!r} must be written N:M, such as 2:4: N of each M weights stay.")
        return cls(*map(int, text.split(":")))

    @property
    def sparsity(self) -> float:
        """Share of weights that go."""
        return 1 - self.kept / self.of


#: How many weights of a matrix go, or in which pattern.
Target = int | Pattern


def shared_out(sizes: Sequence[int], shares: Sequence[float], gone: Sequence[int] | None = None) -> list[int]:
    """How many weights of each part go, so that the number in all is right and not only nearly.

    Rounding each part by itself lets errors add up; here each part gets what is missing from the rounded running total.

    Args:
        sizes: weights of each part.
        shares: in [0, 1], of each part.
        gone: how many went before, and stay away; what goes now is shared out by what each part lacks.

    Returns:
        One number for each part, at least what went before; the sum is that of sizes times shares, rounded, unless more
        went before.
    """
    numbers = list(gone or [0] * len(sizes))
    products = [size * share for size, share in zip(sizes, shares, strict=True)]
    missing = round(math.fsum(products)) - sum(numbers)
    if missing <= 0:
        return numbers
    lacking = [max(0.0, product - number) for product, number in zip(products, numbers, strict=True)]
    scale, wanted, given = missing / math.fsum(lacking), 0.0, 0
    for index, lack in enumerate(lacking):
        wanted += lack * scale
        more = min(sizes[index] - numbers[index], round(wanted) - given)
        numbers[index] += more
        given += more
    for index, size in enumerate(sizes):  # what a full part could not take at the end
        more = min(size - numbers[index], missing - given)
        numbers[index] += more
        given += more
    return numbers


def lowest_dropped(scores: Tensor, num_dropped: int) -> Tensor:
    """A mask without the lowest scores of a tensor; of equal ones the first go.

    Args:
        scores: any shape, float32 without NaN.
        num_dropped: how many go.

    Returns:
        bool in that shape, True where a weight stays.
    """
    mask = torch.ones(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().argsort(stable=True)[:num_dropped]] = False
    return mask.view(scores.shape)


def lowest_dropped_by_row(scores: Tensor, num_dropped: int) -> Tensor:
    """A mask without the lowest scores of each row.

    Each row loses the same number. What does not divide evenly is not left out, but taken one by one from those rows
    whose next weight scores lowest.

    Args:
        scores: [out, in] float32 without NaN.
        num_dropped: how many go in all.

    Returns:
        [out, in] bool, True where a weight stays.
    """
    each, left = divmod(num_dropped, len(scores))
    order = scores.argsort(dim=1, stable=True)
    mask = torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, :each], False)
    if left:
        following = order[:, each]
        rows = scores.gather(1, following[:, None])[:, 0].argsort(stable=True)[:left]
        mask[rows, following[rows]] = False
    return mask


def pattern_kept(scores: Tensor, pattern: Pattern) -> Tensor:
    """A mask with the N highest scores of each M consecutive ones of a row; of equal ones the last stay.

    Args:
        scores: [out, in] float32 without NaN.
        pattern: N:M.

    Returns:
        [out, in] bool, True where a weight stays.

    Raises:
        ValueError: M does not divide the width.
    """
    num_rows, width = scores.shape
    if width % pattern.of:
        raise ValueError(f"the pattern {pattern} does not divide the width {width}")
    groups = scores.reshape(-1, pattern.of)
    dropped = groups.argsort(dim=1, stable=True)[:, : pattern.of - pattern.kept]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(1, dropped, False).view(num_rows, width)


def below_all(scores: Tensor, kept: Tensor | None) -> Tensor:
    """Scores with those of weights that went before below all others, so that these go first again.

    A score of 0 does not tell a weight that was pruned from one whose input is always 0; the mask does.

    Args:
        scores: at least 0.
        kept: the mask before, of the same shape; None if there was none.
    """
    return scores if kept is None else scores.masked_fill(~kept, -1.0)
