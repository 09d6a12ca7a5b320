"""Paged attention for packed rows, registered through transformers' attention interface.

Any Hugging Face causal LM whose attention goes through that interface runs unmodified: it is given all new tokens of
all rows as one packed sequence [1, T], and its attention layers call :func:`paged_attention`, which writes the new keys
and values into the pool and lets every token attend to its own row's earlier positions.

Shape letters: T packed tokens, R rows, Q queries per row, N blocks per row of P positions each, L = N * P positions,
H heads, K key-value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from cmc_server.delta.transfer import on_device

IMPLEMENTATION = "cmc_paged"


@dataclass(frozen=True)
class RowGroup:
    """Rows attended to in one call: their queries padded to Q, their blocks to N.

    Args:
        token_index: [R, Q] int64 into the packed tokens; padding repeats a valid index. None: the rows are all packed
            tokens in their order, one each.
        blocks: [R, N] int64 into the pool's blocks; padding repeats a block of the same row, so that no row ever reads
            what another wrote: a value that is not finite would spoil a sum even with the weight zero.
        query_positions: [R, Q] int64, positions of the queries; -1 for padding.
        query_mask: [R, Q] bool or None when nothing is padded.
    """

    token_index: Tensor | None
    blocks: Tensor
    query_positions: Tensor
    query_mask: Tensor | None

    def to(self, device: torch.device) -> RowGroup:
        """The same group on a device."""
        index = None if self.token_index is None else on_device(self.token_index, device)
        mask = None if self.query_mask is None else on_device(self.query_mask, device)
        return RowGroup(index, on_device(self.blocks, device), on_device(self.query_positions, device), mask)


class KeyValuePool:
    """Keys and values of one delta model, reserved at start, and the layout of the forward pass under way.

    Args:
        num_layers: attention layers.
        num_blocks: blocks per layer.
        block_size: positions per block, P.
        num_kv_heads: key-value heads.
        head_size: size of a head.
        dtype: floating-point type of the cache.
        device: where it lives.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_kv_heads = num_kv_heads
        # zero_() touches every page, so that an engine which sizes its own cache by free memory sees this one.
        shape = (num_layers, num_blocks, block_size, 2 * num_kv_heads, head_size)
        #: Keys, then values, along the heads: both are written in one go, and read in one.
        self.cached = torch.empty(shape, dtype=dtype, device=device).zero_()
        self.slots = torch.empty(0, dtype=torch.int64, device=device)
        self.groups: list[RowGroup] = []
        self._visible: dict[int | None, list[Tensor]] = {}

    def begin(self, slots: Tensor, groups: list[RowGroup]) -> None:
        """Set the layout of the next forward pass.

        Args:
            slots: [T] int64, where each packed token's keys and values go: block * P + offset.
            groups: the rows, each in one group, on the host.
        """
        device = self.cached.device
        self.slots = slots
        self.groups = groups if device.type == "cpu" else [group.to(device) for group in groups]
        self._visible = {}

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero blocks before they are written to: what they held may not have been finite."""
        if blocks:
            self.cached.index_fill_(1, on_device(blocks, self.cached.device), 0.0)

    def visible(self, sliding_window: int | None) -> list[Tensor]:
        """What each group's queries see, see :func:`_visible`; made once for all layers of one kind."""
        if sliding_window not in self._visible:
            size = self.cached.shape[2]
            self._visible[sliding_window] = [_visible(group, size, sliding_window) for group in self.groups]
        return self._visible[sliding_window]

    def attach(self, model: nn.Module) -> None:
        """Make every attention layer of ``model`` use this pool."""
        for module in model.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.cmc_pool = self  # type: ignore[assignment]


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of packed queries over the pool.

    Args:
        module: the attention layer; carries ``layer_idx`` and the pool.
        query: [1, H, T, E].
        key: [1, K, T, E], positions already encoded.
        value: [1, K, T, E].
        attention_mask: not used; the rows' own lengths decide.
        scaling: factor on the scores; None is 1/sqrt(E).
        sliding_window: a token sees this many positions including its own; None is all.
        softcap: not supported.

    Returns:
        [1, T, H, E] and None for the weights.

    Raises:
        NotImplementedError: the model soft-caps its scores.
    """
    if softcap is not None:
        raise NotImplementedError("attention with soft-capped scores")
    pool: KeyValuePool = module.cmc_pool  # type: ignore[assignment]
    new = torch.cat([key[0], value[0]]).transpose(0, 1)
    attended = attend(pool, module.layer_idx, query[0].transpose(0, 1), new, scaling, sliding_window)  # type: ignore[arg-type]
    return attended.unsqueeze(0), None


def attend(
    pool: KeyValuePool,
    layer: int,
    queries: Tensor,
    new: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Write the new keys and values of one layer, and attend.

    Args:
        pool: with the layout of this forward pass.
        layer: its number.
        queries: [T, H, E], positions already encoded.
        new: [T, 2K, E], keys (positions encoded) and values of the same tokens.
        scaling: factor on the scores; None is 1/sqrt(E).
        sliding_window: a token sees this many positions including its own; None is all.

    Returns:
        [T, H, E].
    """
    num_tokens = queries.shape[0]
    cache = pool.cached[layer]
    cache.flatten(0, 1).index_copy_(0, pool.slots, new.to(cache.dtype))
    output: Tensor | None = None
    for group, visible in zip(pool.groups, pool.visible(sliding_window), strict=True):
        index = group.token_index
        chosen = queries.unsqueeze(1) if index is None else queries[index]
        keys, values = _gather(cache, group.blocks, queries.shape[1], pool.num_kv_heads)
        attended = scaled_dot_product_attention(
            chosen.transpose(1, 2), keys, values, attn_mask=visible, scale=scaling
        ).transpose(1, 2)  # [R, Q, H, E]
        if index is None:
            return attended.squeeze(1)
        if output is None:
            output = queries.new_empty(num_tokens + 1, *queries.shape[1:])
        if group.query_mask is not None:  # what pads goes to the last row: to pick by a mask, a GPU's host would wait
            index = torch.where(group.query_mask, index, num_tokens)
        output.index_copy_(0, index.flatten(), attended.flatten(0, 1))
    assert output is not None, "a forward pass has rows"
    return output[:num_tokens]


def _gather(cache: Tensor, blocks: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values, [R, H, L, E] each, of a layer's [blocks, P, 2K, E].

    Whole blocks are copied: position by position it takes many times longer.
    """
    rows, count = blocks.shape
    _, size, heads, width = cache.shape
    gathered = cache.index_select(0, blocks.flatten()).view(rows, count * size, heads, width).transpose(1, 2)
    keys, values = gathered[:, :num_kv_heads], gathered[:, num_kv_heads:]
    repeats = num_heads // num_kv_heads
    if repeats == 1:
        return keys, values
    return keys.repeat_interleave(repeats, dim=1), values.repeat_interleave(repeats, dim=1)


def _visible(group: RowGroup, block_size: int, sliding_window: int | None) -> Tensor:
    """[R, 1, Q, L]: position p sees positions up to p, and no further back than the sliding window."""
    positions = torch.arange(group.blocks.shape[1] * block_size, device=group.blocks.device)
    queries = group.query_positions.unsqueeze(-1)
    visible = positions <= queries
    if sliding_window is not None:
        visible &= positions > queries - sliding_window
    if group.query_mask is not None:
        visible[..., 0] |= ~group.query_mask  # a padded query needs one key, or its softmax is undefined
    return visible.unsqueeze(1)


def _no_mask(*_: Any, **__: Any) -> None:
    """Transformers asks for a mask; the pool knows the rows' lengths, so none is made."""


AttentionInterface.register(IMPLEMENTATION, paged_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
