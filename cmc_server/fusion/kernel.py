"""The rule for one delta as Triton kernels: gather, scale and add in one pass, for CUDA devices.

The reference with the same meaning is :func:`cmc_server.fusion.rule.fuse`. With ``preserve``, a first pass reads the
mapped columns once and keeps both of the rule's log-sum-exps on the way (Milakov and Gimelshein 2018).
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

#: Columns that one program works on.
_BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _shift_block(delta, row, stride, ids, columns, inside, has_map: tl.constexpr):  # type: ignore[no-untyped-def]
    """s and the mask of mapped columns for one block."""
    targets = columns
    mapped = inside
    if has_map:
        targets = tl.load(ids + columns, mask=inside, other=-1)
        mapped = inside & (targets >= 0)
    return tl.load(delta + row * stride + targets, mask=mapped, other=0.0).to(tl.float32), mapped


@triton.jit  # type: ignore[untyped-decorator]
def _add(  # type: ignore[no-untyped-def]
    logits,
    logits_stride,
    rows,
    delta,
    delta_stride,
    ids,
    strengths,
    corrections,
    width,
    has_map: tl.constexpr,
    preserve: tl.constexpr,
    block: tl.constexpr,
):
    """logits[rows[r], j] += strengths[r] * delta[r, ids[j]] + corrections[r] for every mapped j."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    shift, mapped = _shift_block(delta, row, delta_stride, ids, columns, inside, has_map)
    target = logits + tl.load(rows + row) * logits_stride + columns
    value = tl.load(target, mask=mapped, other=0.0) + tl.load(strengths + row) * shift
    if preserve:
        value += tl.load(corrections + row)
    tl.store(target, value, mask=mapped)


@triton.jit  # type: ignore[untyped-decorator]
def _correct(  # type: ignore[no-untyped-def]
    logits,
    logits_stride,
    rows,
    delta,
    delta_stride,
    ids,
    strengths,
    corrections,
    width,
    has_map: tl.constexpr,
    block: tl.constexpr,
):
    """corrections[r] = LSE_U(l) - LSE_U(l + a s), or 0 where no token of U has any probability."""
    row = tl.program_id(0).to(tl.int64)
    source = logits + tl.load(rows + row) * logits_stride
    strength = tl.load(strengths + row)
    top_before = tl.full([], -float("inf"), tl.float32)
    top_after = tl.full([], -float("inf"), tl.float32)
    sum_before = tl.full([], 0.0, tl.float32)
    sum_after = tl.full([], 0.0, tl.float32)
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        inside = columns < width
        shift, mapped = _shift_block(delta, row, delta_stride, ids, columns, inside, has_map)
        before = tl.load(source + columns, mask=mapped, other=-float("inf"))
        after = tl.where(mapped, before + strength * shift, -float("inf"))
        new_before = tl.maximum(top_before, tl.max(before))
        new_after = tl.maximum(top_after, tl.max(after))
        # A block without any probability leaves everything as it is; -inf minus -inf would not.
        safe_before = tl.where(new_before == -float("inf"), 0.0, new_before)
        safe_after = tl.where(new_after == -float("inf"), 0.0, new_after)
        sum_before = sum_before * tl.exp(top_before - safe_before) + tl.sum(tl.exp(before - safe_before))
        sum_after = sum_after * tl.exp(top_after - safe_after) + tl.sum(tl.exp(after - safe_after))
        top_before = new_before
        top_after = new_after
    empty = top_before == -float("inf")
    before_all = tl.where(empty, 0.0, top_before) + tl.log(tl.where(empty, 1.0, sum_before))
    after_all = tl.where(empty, 0.0, top_after) + tl.log(tl.where(empty, 1.0, sum_after))
    tl.store(corrections + row, before_all - after_all)


@triton.jit  # type: ignore[untyped-decorator]
def _end(logits, logits_stride, rows, faulty, token_id, width, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """logits[rows[r]] = 0 at one token and -inf elsewhere, for faulty rows; nothing is read or written of others."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    end = tl.load(faulty + row) * width
    value = tl.where(columns == token_id, 0.0, -float("inf"))
    tl.store(logits + tl.load(rows + row) * logits_stride + columns, value, mask=columns < end)


def end_rows_(logits: Tensor, rows: Tensor, faulty: Tensor, token_id: int) -> Tensor:
    """:func:`cmc_server.fusion.rule.end_rows_`, which costs rows that are sound next to nothing."""
    grid = len(rows), triton.cdiv(logits.shape[1], _BLOCK)
    _end[grid](logits, logits.stride(0), rows, faulty.int(), token_id, logits.shape[1], block=_BLOCK)
    return logits


def add_shift_(
    logits: Tensor,
    rows: Tensor,
    delta_logits: Tensor,
    delta_ids: Tensor | None,
    strengths: Tensor,
    *,
    preserve: bool = False,
) -> Tensor:
    """The rule in place for some rows and one delta.

    Args:
        logits: [B, U] float32; the columns of a row are contiguous.
        rows: [R] int64, without repetition.
        delta_logits: [R, D] floating point; the columns of a row are contiguous.
        delta_ids: [U'] int64, -1 for unmapped; None is the identity.
        strengths: [R] float32.
        preserve: unmapped tokens keep their probability.

    Returns:
        ``logits``, changed in the given rows.
    """
    num_rows, size = delta_logits.shape
    width = min(size if delta_ids is None else delta_ids.numel(), logits.shape[1])
    if not num_rows or not width:
        return logits
    corrections = torch.empty(num_rows, device=logits.device, dtype=torch.float32)
    where: tuple[Any, ...] = (logits, logits.stride(0), rows, delta_logits, delta_logits.stride(0))
    # Without a map any pointer does; it is not read.
    what = (rows if delta_ids is None else delta_ids, strengths, corrections, width)
    if preserve:
        _correct[(num_rows,)](*where, *what, has_map=delta_ids is not None, block=_BLOCK)
    grid = num_rows, triton.cdiv(width, _BLOCK)
    _add[grid](*where, *what, has_map=delta_ids is not None, preserve=preserve, block=_BLOCK)
    return logits
