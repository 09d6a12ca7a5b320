"""What a delta reads of an input that may be longer than its context.

A leading bos stays; the tokens behind it are dropped from the front, in steps of half a window, until the rest fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload


def window_drop(length: int, context_length: int) -> int:
    """How many tokens after the bos are dropped so that ``length`` fits the window, in steps of half a window."""
    if length <= context_length:
        return 0
    step = max(1, context_length // 2)
    return -(-(length - context_length) // step) * step


class Window(Sequence[int]):
    """The first ids of an input without the dropped ones. It shows the list that it was given and copies nothing.

    A step reads one id of each row: to copy all that came before would make it dearer the longer the response is.

    Args:
        ids: the whole input.
        num_bos: leading ids that stay.
        dropped: how many behind those are left out.
        stop: how many ids of what is left are shown at most; None is all.
    """

    __slots__ = ("_dropped", "_ids", "_length", "_num_bos")

    def __init__(self, ids: list[int], num_bos: int = 0, dropped: int = 0, stop: int | None = None) -> None:
        left = len(ids) - dropped
        self._ids, self._num_bos, self._dropped = ids, num_bos, dropped
        self._length = left if stop is None else min(stop, left)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, int):
            place = range(self._length)[index]
            return self._ids[place if place < self._num_bos else place + self._dropped]
        start, stop, step = index.indices(self._length)
        assert step == 1, "a window is read in order"
        behind = self._ids[max(start, self._num_bos) + self._dropped : max(stop, self._num_bos) + self._dropped]
        return behind if start >= self._num_bos else self._ids[start : min(stop, self._num_bos)] + behind
