"""A thread of its own, on processor cores of its own, for the deltas' forward passes beside the user LLM's.

Torch holds no lock of Python's while it computes, so that on a CPU with a core to spare both models run at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

_Result = TypeVar("_Result")


class Beside:
    """Runs one function at a time.

    Args:
        cores: processor cores that the thread may use, as many computing threads as there are.
    """

    def __init__(self, cores: frozenset[int]) -> None:
        self._cores = cores
        self._thread = ThreadPoolExecutor(1, "cmc-beside", initializer=self._settle)

    def start(self, function: Callable[[], _Result]) -> Future[_Result]:
        """Begin; what the function returns or raises is in the future."""
        return self._thread.submit(function)

    def _settle(self) -> None:
        """Leave the cores of the thread that made this one, whose affinity is inherited."""
        os.sched_setaffinity(0, self._cores)
        # vLLM's CPU worker replaces torch.set_num_threads by a function that only warns.
        torch._C.set_num_threads(len(self._cores))


def spare_cores(placed: str | None, allowed: frozenset[int]) -> frozenset[int]:
    """Cores that an engine's computing threads leave free.

    Args:
        placed: value of the variable that binds these threads, such as ``OMP_PLACES={0,1}``; None if they are not
            bound, and then none is known to be free.
        allowed: cores that the engine's processes may use.
    """
    if placed is None:
        return frozenset()
    digits = "".join(character if character.isdigit() else " " for character in placed)
    return allowed - {int(number) for number in digits.split()}
