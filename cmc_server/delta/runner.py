"""One delta model: tokens of many requests in, next-token logits out, with its own paged key-value cache.

The slow reference with the same meaning is a plain forward pass over each whole input, see ``fusion/reference.py``.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cmc_server.config import FAST_PATHS, FastPath
from cmc_server.delta.attention import IMPLEMENTATION, KeyValuePool
from cmc_server.delta.blocks import BlockPool, CachedSequence
from cmc_server.delta.capacity import BLOCK_SIZE, DEFAULT_CONTEXT, cache_shape, num_blocks
from cmc_server.delta.graphs import Recorder, StepGraphs, cuda_recorder
from cmc_server.delta.head import pack_head
from cmc_server.delta.llama import FastLlama
from cmc_server.delta.packed import is_packed, load_packed
from cmc_server.delta.pieces import Piece, group_rows, split
from cmc_server.delta.store import DeltaArtifact
from cmc_server.delta.transfer import on_device, put_newest
from cmc_server.errors import DeltaError, one_line

logger = logging.getLogger(__name__)

#: Tokens per forward pass; a longer prefill runs in pieces, which bounds the workspace.
MAX_TOKENS = 1024
#: On a CPU, bytes of keys and values that are gathered at once: more no longer fit its cache. Measured, see
#: docs/performance.md.
_GATHERED_BYTES = 4 << 20


@dataclass(frozen=True)
class Feed:
    """One row of a step.

    Args:
        sequence: the row's cached positions.
        ids: the whole (windowed) delta input, at least one id.
        keep: how many leading ids are unchanged since the last call for this sequence.
        settled: how many leading ids will not change in later calls; other rows may share what is cached of them.
    """

    sequence: CachedSequence
    ids: Sequence[int]
    keep: int
    settled: int = 0


class DeltaRunner:
    """Runs one delta model, batched over rows of unequal length.

    Args:
        artifact: the checked delta folder.
        max_seqs: how many sequences may be cached at once, each up to the full context.
        device: where the model lives.
        dtype: float32 or bfloat16.
        fast_paths: of these, ``graphs``, ``head``, ``layers`` and ``sharing`` are the runner's.

    Raises:
        DeltaError: the weights do not fit the config, or the architecture's attention is not standard.
    """

    def __init__(
        self,
        artifact: DeltaArtifact,
        *,
        max_seqs: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        fast_paths: Collection[FastPath] = FAST_PATHS,
    ) -> None:
        self.artifact = artifact
        self.device = device
        self.dtype = dtype
        self.context_length = artifact.context_length or DEFAULT_CONTEXT
        self.max_seqs = max_seqs
        self._model = load_model(artifact, dtype, "eager").to(device)
        expected = self._plain_logits()
        self._model.set_attn_implementation(IMPLEMENTATION)
        self.vocab_size = int(self._model.get_output_embeddings().weight.shape[0])
        #: Parameters of the model; tied ones count once.
        self.num_parameters = sum(int(parameter.numel()) for parameter in self._model.parameters())
        packed = pack_head(self._model) if "head" in fast_paths else 0
        weights = packed + sum(int(parameter.nbytes) for parameter in self._model.parameters())
        few_operations = "layers" in fast_paths and FastLlama.fits(self._model)
        self._fast = FastLlama(self._model, self.context_length) if few_operations else None
        self._shares = "sharing" in fast_paths
        self._can_select = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self.blocks = BlockPool(num_blocks(self.context_length, max_seqs), BLOCK_SIZE)
        layers, heads, head_size = cache_shape(self._model.config)
        record = recorder_for(device) if "graphs" in fast_paths and self._fast is not None else None
        spare = 0 if record is None else 1
        self._pool = KeyValuePool(layers, self.blocks.num_blocks + spare, BLOCK_SIZE, heads, head_size, dtype, device)
        self._pool.attach(self._model)
        block_bytes = self._pool.cached[0, 0].nbytes
        self._gathered_blocks = max(1, _GATHERED_BYTES // block_bytes) if device.type == "cpu" else None
        #: Bytes reserved for weights and key-value cache.
        self.memory_bytes = weights + int(self._pool.cached.nbytes)
        #: Tokens that went through the model since it was loaded.
        self.num_tokens = 0
        self._graphs = None if record is None else self._record(record)
        self._check_attention(expected)

    def new_sequence(self) -> CachedSequence:
        """An empty sequence; it holds blocks only once it is fed."""
        return CachedSequence(self.blocks)

    @torch.inference_mode()
    def forward(self, feeds: Sequence[Feed], newest: Tensor | None = None) -> Tensor:
        """Logits after the last id of every row.

        Args:
            feeds: rows with different sequences.
            newest: [len(feeds)] int64 on the device, the last id of each row; -1 where the feed has it.

        Returns:
            [len(feeds), D] float32.

        Raises:
            CapacityError: the key-value cache is too small; the sequences stay usable.
        """
        for feed in feeds:
            # The last id is always fed, since its logits are wanted and are not kept.
            feed.sequence.truncate(min(feed.keep, len(feed.ids) - 1))
            if self._shares:
                feed.sequence.adopt(feed.ids)
        first, twins = _twins(feeds) if self._shares else (list(range(len(feeds))), [])
        if not twins:
            return self._forward(feeds, newest)
        output = torch.zeros(len(feeds), self.vocab_size, device=self.device)
        for rows in (first, twins):
            index = on_device(rows, self.device)
            output[index] = self._forward([feeds[row] for row in rows], None if newest is None else newest[index])
            for row in twins:  # no effect once they ran
                feeds[row].sequence.adopt(feeds[row].ids)
        return output

    def _forward(self, feeds: Sequence[Feed], newest: Tensor | None) -> Tensor:
        output: Tensor | None = None
        pieces = [self._begin(row, feed) for row, feed in enumerate(feeds)]
        while pieces:
            batch, pieces = split(pieces, MAX_TOKENS)
            ended = [piece for piece in batch if piece.stop == len(feeds[piece.row].ids)]
            rows = [piece.row for piece in ended]
            some = None if len(ended) == len(feeds) else on_device(rows, self.device)
            logits = self._run(feeds, batch, rows, newest if newest is None or some is None else newest[some])
            for piece in batch:
                feed = feeds[piece.row]
                feed.sequence.length = piece.stop
                if self._shares:
                    feed.sequence.publish(feed.ids, feed.settled)
                self.num_tokens += piece.stop - piece.start
            if some is None:
                return logits
            if output is None:
                output = logits.new_zeros(len(feeds), self.vocab_size)
            output[some] = logits
        return torch.zeros(0, self.vocab_size, device=self.device) if output is None else output

    def _begin(self, row: int, feed: Feed) -> Piece:
        self._pool.clear(feed.sequence.reserve(len(feed.ids)))
        return Piece(row, feed.sequence.length, len(feed.ids))

    def _run(self, feeds: Sequence[Feed], pieces: list[Piece], ended: list[int], newest: Tensor | None) -> Tensor:
        """One forward pass over packed pieces; [len(ended), D] float32."""
        ids: list[int] = []
        positions: list[int] = []
        offsets: list[int] = []
        slots: list[int] = []
        for piece in pieces:
            feed = feeds[piece.row]
            offsets.append(len(ids))
            ids.extend(feed.ids[piece.start : piece.stop])
            positions.extend(range(piece.start, piece.stop))
            slots.extend(feed.sequence.slots(piece.start, piece.stop))
        blocks = [feeds[piece.row].sequence.blocks for piece in pieces]
        if self._graphs is not None and len(ids) == len(pieces) == len(ended):
            logits = self._graphs.run(ids, positions, slots, blocks, newest)
            if logits is not None:
                return logits
        groups = group_rows(pieces, offsets, blocks, self._gathered_blocks)
        self._pool.begin(on_device(slots, self.device), groups)
        last = [offset + piece.stop - piece.start - 1 for offset, piece in zip(offsets, pieces, strict=True)]
        rows = set(ended)
        wanted = [index for index, piece in zip(last, pieces, strict=True) if piece.row in rows]
        places = on_device(wanted, self.device)
        packed = on_device(torch.tensor([ids, positions]), self.device)
        if newest is not None:
            put_newest(packed[0], places, newest)
        return self._logits(packed[0], packed[1], places)

    def _logits(self, ids: Tensor, positions: Tensor, wanted: Tensor) -> Tensor:
        if self._fast is not None:
            return self._fast.forward(self._pool, ids, positions, wanted).float()
        extra: dict[str, Any] = {"logits_to_keep": wanted} if self._can_select else {}
        output = self._model(input_ids=ids[None], position_ids=positions[None], use_cache=False, **extra)
        logits: Tensor = output.logits[0]
        return (logits if self._can_select else logits[wanted]).float()

    def _record(self, record: Recorder) -> StepGraphs | None:
        assert self._fast is not None, "only its steps are recorded"
        max_blocks = -(-self.context_length // BLOCK_SIZE)
        try:
            return StepGraphs(self._fast, self._pool, self.vocab_size, self.max_seqs, max_blocks, record)
        except RuntimeError as error:
            logger.warning("The delta %s runs without CUDA graphs: %s", self.artifact.name, one_line(error))
            return None

    def _probe(self) -> list[int]:
        """A short input."""
        return [(7 * position + 1) % self.artifact.vocab_size for position in range(min(12, self.context_length))]

    def _plain_logits(self) -> Tensor:
        """[D] float32 after the probe, by the model as transformers made it."""
        ids = torch.tensor([self._probe()], device=self.device)
        try:
            with torch.inference_mode():
                logits: Tensor = self._model(input_ids=ids, use_cache=False).logits[0, -1].float()
        except (NotImplementedError, TypeError, AttributeError, RuntimeError, IndexError) as error:
            raise DeltaError(f"The delta {self.artifact.name!r} cannot be run: {one_line(error)}.") from error
        return logits

    def _check_attention(self, expected: Tensor) -> None:
        """Compare with the model's own attention on the probe, fed in four steps and rolled back once."""
        ids = self._probe()
        sequence = self.new_sequence()
        try:
            self.forward([Feed(sequence, ids[:5], 0)])
            self.forward([Feed(sequence, ids[:7], 3)])
            self.forward([Feed(sequence, ids[:-1], 7)])
            actual = self.forward([Feed(sequence, ids, len(ids) - 1)])[0]
        except (NotImplementedError, TypeError, AttributeError, RuntimeError, IndexError) as error:
            raise DeltaError(f"The delta {self.artifact.name!r} has no standard attention: {error}.") from error
        finally:
            sequence.free()
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.1
        scale = expected.abs().max().clamp(min=1)
        if not torch.allclose(actual / scale, expected / scale, atol=tolerance, rtol=0):
            raise DeltaError(
                f"The delta {self.artifact.name!r} has no standard attention: its logits through the cache differ "
                f"by {(actual - expected).abs().max():.2g} from the model's own."
            )


def recorder_for(device: torch.device) -> Recorder | None:
    """How decoding steps are recorded; None where that gains nothing."""
    return cuda_recorder() if device.type == "cuda" else None


#: Stored by old checkpoints though models compute it.
_COMPUTED = "rotary_emb.inv_freq"


def load_model(artifact: DeltaArtifact, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The delta as a transformers model in eval mode, from safetensors, without remote code.

    Raises:
        DeltaError: transformers cannot load it, or a weight is missing, of the wrong shape or one too many.
    """
    if is_packed(artifact.path):
        return _load_packed_model(artifact, dtype, attention)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            artifact.path,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises nearly anything here; every cause makes the delta unusable
        raise DeltaError(f"The delta {artifact.name!r} cannot be loaded: {one_line(error)}.") from error
    faults = sorted(report["missing_keys"]) + sorted(str(entry) for entry in report.get("mismatched_keys", ()))
    if faults:
        raise DeltaError(f"The delta {artifact.name!r} lacks the weight {faults[0]} or has it in a wrong shape.")
    unknown = sorted(name for name in report["unexpected_keys"] if not name.endswith(_COMPUTED))
    if unknown:
        raise DeltaError(
            f"The delta {artifact.name!r} has the weight {unknown[0]}, which the model of its config.json has not; "
            "correct config.json."
        )
    return _checked(artifact, model)


def _load_packed_model(artifact: DeltaArtifact, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The same of a folder with packed weights that are relative to nothing."""
    weights = load_packed(artifact.path)
    try:
        config = AutoConfig.from_pretrained(artifact.path, trust_remote_code=False, local_files_only=True)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        missing, unknown = model.load_state_dict(weights, strict=False)
    except Exception as error:  # see load_model
        raise DeltaError(f"The delta {artifact.name!r} cannot be loaded: {one_line(error)}.") from error
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    faults = [*sorted(set(missing) - tied), *unknown]
    if faults:
        raise DeltaError(f"The delta {artifact.name!r} lacks the weight {faults[0]} or has one of that name too many.")
    model.tie_weights()
    return _checked(artifact, model)


def _checked(artifact: DeltaArtifact, model: PreTrainedModel) -> PreTrainedModel:
    """The model ready for inference; a weight that is not finite would fail some requests and not others."""
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise DeltaError(f"The weight {name} of the delta {artifact.name!r} holds NaN or infinity.")
    return model.eval().requires_grad_(False)


def _twins(feeds: Sequence[Feed]) -> tuple[list[int], list[int]]:
    """Rows to run first, and rows that begin with a block which one of those is about to compute and to share."""
    first, twins = [], []
    begun = set()
    for row, feed in enumerate(feeds):
        beginning = feed.sequence.next_block(feed.ids)
        shared = beginning is not None and feed.settled >= feed.sequence.length + BLOCK_SIZE
        if shared and beginning in begun:
            twins.append(row)
        else:
            first.append(row)
        if shared:
            begun.add(beginning)
    return first, twins
