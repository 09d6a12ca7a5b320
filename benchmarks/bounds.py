"""What the machine allows: the bound that a figure is compared with, and the interval of a median."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def machine_limits(threads: int) -> tuple[float, float]:
    """GEMM peak in FLOP/s and copy bandwidth in bytes/s, float32, best of several."""
    import torch

    torch.set_num_threads(threads)
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    source = torch.zeros(64 * 2**20)
    target = torch.empty_like(source)

    def best(action: Any) -> float:
        times = []
        for _ in range(8):
            began = time.perf_counter()
            action()
            times.append(time.perf_counter() - began)
        return min(times)

    peak = 2 * 1024**3 / best(lambda: torch.mm(left, right))
    bandwidth = 2 * source.nbytes / best(lambda: target.copy_(source))
    return peak, bandwidth


def delta_cost(delta: Path, rows: int, context: int) -> tuple[float, float]:
    """FLOPs and bytes of one step of a delta: every weight once (embeddings only as the output head), and the cache."""
    from transformers import AutoConfig

    from cmc_server.delta.capacity import cache_shape

    config = AutoConfig.from_pretrained(delta)
    layers, heads, head_size = cache_shape(config)
    queries = config.num_attention_heads * head_size
    per_layer = config.hidden_size * (2 * queries + 2 * heads * head_size + 3 * config.intermediate_size)
    weights = layers * per_layer + config.hidden_size * config.vocab_size
    flops = 2 * weights * rows + layers * 4 * queries * context * rows
    cached = 2 * layers * heads * head_size * context * rows
    return float(flops), 4.0 * (weights + cached)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Bootstrap 95 % interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return round(medians[50], 4), round(medians[1949], 4)
