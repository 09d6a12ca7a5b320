"""Decoding steps of a delta as CUDA graphs, one for each number of rows and blocks, recorded when it is loaded.

A tiny model's step on a GPU is mostly the host's launching of operations; a graph launches all of them at once. Rows
and blocks are padded up to the next size that was recorded: rows by ones that read and write a block which nobody
holds, a row's blocks by its first one again, which lies behind its last position and so is not seen. The slow equal is
:meth:`FastLlama.forward` on the rows as they are.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from cmc_server.delta.attention import KeyValuePool, RowGroup
from cmc_server.delta.llama import FastLlama
from cmc_server.delta.pieces import block_tables
from cmc_server.delta.transfer import on_device, put_newest

#: Takes a function that reads and writes the same tensors in every call, and returns a faster one that does the same.
Recorder = Callable[[Callable[[], None]], Callable[[], None]]
#: Rows, and bytes of keys and values gathered for one layer, that steps are recorded for at most: larger ones keep a
#: GPU busy enough, and a graph's memory stays taken.
_MOST_ROWS = 256
_MOST_BYTES = 256 << 20


class StepGraphs:
    """Steps in which every row has one new token.

    Args:
        model: the delta.
        pool: its cache, the last block of which is handed to nobody.
        vocab_size: columns of its logits.
        max_rows: rows of the largest step.
        max_blocks: blocks of the longest row.
        record: how a step is recorded.
    """

    @torch.inference_mode()
    def __init__(
        self, model: FastLlama, pool: KeyValuePool, vocab_size: int, max_rows: int, max_blocks: int, record: Recorder
    ) -> None:
        device = pool.cached.device
        self._model, self._pool = model, pool
        self._spare = pool.cached.shape[1] - 1
        self._block_size = pool.cached.shape[2]
        self._rows, self._blocks = _sizes(min(max_rows, _MOST_ROWS)), _sizes(max_blocks)
        most = self._rows[-1]
        #: Ids, positions and slots.
        self._inputs = torch.zeros(3, most, dtype=torch.int64, device=device)
        self._inputs[2] = self._spare * self._block_size
        self._tables = torch.full((most, self._blocks[-1]), self._spare, device=device)
        self._logits = torch.zeros(most, vocab_size, device=device)
        self._all = torch.arange(most, device=device)
        room = _MOST_BYTES // pool.cached[0, 0].nbytes
        sizes = [(rows, blocks) for rows in self._rows for blocks in self._blocks if rows * blocks <= room]
        # The largest first: the others find room in the memory that it took.
        sizes.sort(key=lambda size: size[0] * size[1], reverse=True)
        self._replay = {size: record(partial(self._step, *size)) for size in sizes}

    def run(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        blocks: Sequence[array[int]],
        newest: Tensor | None = None,
    ) -> Tensor | None:
        """One step.

        Args:
            ids: of each row.
            positions: theirs.
            slots: where their keys and values go.
            blocks: of each row, those up to its position at least.
            newest: ids that only the device knows, see :func:`put_newest`.

        Returns:
            [R, D] float32; None if no step of this size was recorded.
        """
        held = [position // self._block_size + 1 for position in positions]
        rows, width = _size_for(self._rows, len(ids)), _size_for(self._blocks, max(held))
        if (rows, width) not in self._replay:
            return None
        padding = rows - len(ids)
        inputs = [[*ids, *[0] * padding], [*positions, *[0] * padding]]
        inputs.append([*slots, *[self._spare * self._block_size] * padding])
        tables = torch.full((rows, width), self._spare)
        tables[: len(ids)] = torch.from_numpy(block_tables(blocks, held, width))
        device = self._inputs.device
        self._inputs[:, :rows].copy_(on_device(torch.tensor(inputs), device))
        self._tables[:rows, :width].copy_(on_device(tables, device))
        if newest is not None:
            put_newest(self._inputs[0], self._all[: len(ids)], newest)
        self._replay[rows, width]()
        return self._logits[: len(ids)].clone()  # the next step writes there again

    def _step(self, rows: int, blocks: int) -> None:
        ids, positions, slots = self._inputs[:, :rows]
        self._pool.begin(slots, [RowGroup(None, self._tables[:rows, :blocks], positions.unsqueeze(1), None)])
        self._logits[:rows].copy_(self._model.forward(self._pool, ids, positions, self._all[:rows]))


def cuda_recorder() -> Recorder:
    """Records CUDA graphs that share their memory, on a stream of their own, and lets other threads go on."""
    memory = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def record(step: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # libraries choose their kernels and take their workspace in the first call
            stream.synchronize()
            graph.capture_begin(pool=memory, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        replay: Callable[[], None] = graph.replay
        return replay

    return record


def _sizes(most: int) -> list[int]:
    """1, 2, 4 and so on, and ``most``."""
    return [*(1 << power for power in range((most - 1).bit_length())), most]


def _size_for(sizes: Sequence[int], needed: int) -> int:
    """The smallest size that is large enough; 0 if none is."""
    place = bisect_left(sizes, needed)
    return sizes[place] if place < len(sizes) else 0
