"""How much memory deltas need, known from their configs before anything is loaded. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoConfig

from cmc_server.config import EngineSettings
from cmc_server.delta.store import DeltaArtifact
from cmc_server.errors import CapacityError, DeltaError, one_line

#: Token positions per block of the delta's key-value cache.
BLOCK_SIZE = 32
#: Context of a delta whose manifest and config give none.
DEFAULT_CONTEXT = 2048
#: Bytes per value of each setting of ``delta_dtype``; 0 depends on the device.
VALUE_BYTES: Mapping[str, int] = {"auto": 0, "float32": 4, "bfloat16": 2}
_GIB = 2**30


def cache_shape(config: Any) -> tuple[int, int, int]:
    """Layers, key-value heads and head size that a transformers config implies."""
    heads: int = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(config.num_hidden_layers), int(kv_heads), int(head_size)


def num_blocks(context_length: int, max_seqs: int) -> int:
    """Blocks that hold ``max_seqs`` sequences of the full context."""
    return max_seqs * -(-context_length // BLOCK_SIZE)


def memory_needed(artifact: DeltaArtifact, max_seqs: int, value_bytes: int, on_cpu: bool) -> int:
    """Bytes for the weights and the key-value cache of one delta.

    Args:
        artifact: the checked delta folder.
        max_seqs: sequences cached at once.
        value_bytes: 4 for float32, 2 for bfloat16.
        on_cpu: whether it runs on a CPU, where a tied float32 output head is held twice.

    Raises:
        DeltaError: transformers does not know the architecture.
    """
    try:
        config = AutoConfig.from_pretrained(artifact.path, trust_remote_code=False, local_files_only=True)
        layers, heads, head_size = cache_shape(config)
    except (ValueError, OSError, AttributeError, KeyError, TypeError) as error:
        raise DeltaError(f"The delta {artifact.name!r} is of an unknown architecture: {one_line(error)}.") from error
    # A head of its own is dropped for its packed copy; a tied one stays, since it is the embedding.
    copied = on_cpu and value_bytes == 4 and config.tie_word_embeddings
    packed = artifact.vocab_size * int(config.hidden_size) if copied else 0
    positions = num_blocks(artifact.context_length or DEFAULT_CONTEXT, max_seqs) * BLOCK_SIZE
    return (artifact.num_weights + packed + 2 * layers * positions * heads * head_size) * value_bytes


def plan_seqs(
    settings: EngineSettings,
    artifacts: Sequence[DeltaArtifact],
    engine_max_seqs: int,
    value_bytes: int,
    on_cpu: bool,
) -> int:
    """How many rows may be steered at once within ``delta_memory``.

    Args:
        settings: an explicit ``max_delta_seqs`` must fit; without one, as many as fit are planned.
        artifacts: the deltas to load; all of them reserve for that many rows.
        engine_max_seqs: rows that the engine runs at once.
        value_bytes: 4 for float32, 2 for bfloat16.
        on_cpu: whether the deltas run on a CPU.

    Raises:
        CapacityError: the deltas do not fit, with the numbers.
    """
    budget = settings.delta_memory * _GIB

    def needed(max_seqs: int) -> int:
        return sum(memory_needed(artifact, max_seqs, value_bytes, on_cpu) for artifact in artifacts)

    wanted = min(settings.max_delta_seqs or engine_max_seqs, engine_max_seqs)
    if needed(wanted) <= budget:
        return wanted
    weights = needed(0)
    per_seq = needed(1) - weights
    fitting = max(0, int((budget - weights) // per_seq))
    if settings.max_delta_seqs is None and fitting:
        return fitting
    raise CapacityError(
        f"The deltas need {needed(wanted) / _GIB:.2f} GiB for {wanted} rows ({weights / _GIB:.2f} GiB of weights and "
        f"{per_seq / _GIB:.4f} GiB per row), but --delta-memory is {settings.delta_memory:g} GiB; raise it or lower "
        f"--max-delta-seqs (at most {fitting} rows fit)."
    )
