"""Memory that is free between blocks in use goes back to the system."""

from __future__ import annotations

import ctypes
import sys

import psutil
import pytest

from cmc_server.delta.trim import trim_memory


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_holes_in_the_heap_are_handed_back() -> None:
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    library.malloc.argtypes, library.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    size = 100_000  # small enough for the heap
    blocks = [library.malloc(size) for _ in range(600)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    last = library.malloc(64)  # the heap cannot shrink below it
    process = psutil.Process()
    full = process.memory_info().rss
    for block in blocks:
        library.free(block)
    trim_memory()
    assert full - process.memory_info().rss > 40e6
    library.free(last)


def test_on_other_systems_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", None)
    trim_memory()
