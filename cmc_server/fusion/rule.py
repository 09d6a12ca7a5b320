"""The rule of cross-model control, shared by serving, training and evaluation.

For user logits l, delta logits d_k, maps m_k and strengths a_k (Cross-model Control, NeurIPS 2024)::

    z[u] = l[u] + sum_k a_k * s_k[u],    s_k[u] = d_k[m_k[u]] if m_k[u] >= 0 else 0

``unmapped="preserve"`` adds c = LSE_U(l) - LSE_U(l + sum_k a_k * s_k) to the tokens of U, the union of the mapped sets,
so that a token outside U keeps exactly the probability that the user LLM gave it.

Shapes: R rows, U user logits (columns), D_k delta logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from cmc_server.config import Unmapped


@dataclass(frozen=True)
class Shift:
    """What one delta contributes to a batch of rows.

    Args:
        delta_logits: [R, D] floating point.
        delta_ids: [U'] int64, the vocabulary map; -1 is unmapped. Columns beyond U' count as unmapped. None is the
            identity: every delta token stands for the user token of its own id.
        strength: one factor for all rows, or [R].
    """

    delta_logits: Tensor
    delta_ids: Tensor | None
    strength: float | Tensor


def fuse(logits: Tensor, shifts: Sequence[Shift], unmapped: Unmapped = "zero") -> Tensor:
    """The rule, written as it is defined. Differentiable.

    Args:
        logits: [R, U] user logits.
        shifts: the deltas of these rows; none returns the logits as they are.
        unmapped: policy for tokens outside the maps.

    Returns:
        [R, U] float32.
    """
    base = logits.float()
    total = torch.zeros_like(base)
    mapped = torch.zeros(base.shape[-1], dtype=torch.bool, device=base.device)
    for shift in shifts:
        values, in_map = _spread(shift, base.shape[-1])
        total = total + _column(shift.strength) * values
        mapped = mapped | in_map
    fused = base + total
    if unmapped == "preserve" and shifts:
        fused = torch.where(mapped, fused + _correction(base, fused, mapped), fused)
    return fused


def fuse_(logits: Tensor, rows: Tensor, shifts: Sequence[Shift], unmapped: Unmapped = "zero") -> Tensor:
    """:func:`fuse` in place for some rows of a batch; the others are not touched.

    Args:
        logits: [B, U] float32, contiguous rows.
        rows: [R] int64, which rows the shifts belong to, without repetition.
        shifts: as in :func:`fuse`, each over these R rows in this order.
        unmapped: policy for tokens outside the maps.

    Returns:
        ``logits``, changed in the given rows.
    """
    if unmapped == "preserve" and shifts:
        return logits.index_copy_(0, rows, fuse(logits.index_select(0, rows), shifts, unmapped))
    for shift in shifts:
        if shift.delta_ids is not None and logits.device.type == "cpu":
            _add_row_by_row(logits, rows, shift, shift.delta_ids)
            continue
        scaled = _scaled(shift)
        width = min(scaled.shape[1], logits.shape[1])
        logits[:, :width].index_add_(0, rows, scaled[:, :width])
    return logits


def _add_row_by_row(logits: Tensor, rows: Tensor, shift: Shift, delta_ids: Tensor) -> None:
    """logits[rows] += a * s through the map, a row at a time: what is gathered then never leaves the processor's cache.

    Over all rows at once the gathered copy is as large as the logits and is written to memory and read again.
    """
    delta_logits = shift.delta_logits.float()
    num_rows, size = delta_logits.shape
    width = min(delta_ids.numel(), logits.shape[1])
    index = torch.where(delta_ids[:width] < 0, size, delta_ids[:width])
    extended = delta_logits.new_zeros(size + 1)  # the last one stands for "unmapped"
    gathered = delta_logits.new_empty(width)
    strengths = shift.strength.tolist() if isinstance(shift.strength, Tensor) else [shift.strength] * num_rows
    for source, (row, strength) in enumerate(zip(rows.tolist(), strengths, strict=True)):
        torch.mul(delta_logits[source], strength, out=extended[:size])
        torch.index_select(extended, 0, index, out=gathered)
        logits[row, :width].add_(gathered)


def _scaled(shift: Shift) -> Tensor:
    """a * s for the mapped columns, [R, U'] float32, without a pass that is not needed."""
    delta_logits = shift.delta_logits.float()
    if shift.delta_ids is None:
        return delta_logits * _column(shift.strength)
    rows, size = delta_logits.shape
    # One more column, of zeros, stands for "unmapped", so that the gather needs no mask.
    extended = delta_logits.new_zeros(rows, size + 1)
    torch.mul(delta_logits, _column(shift.strength), out=extended[:, :size])
    return extended.index_select(1, torch.where(shift.delta_ids < 0, size, shift.delta_ids))


def _correction(base: Tensor, fused: Tensor, mapped: Tensor) -> Tensor:
    """c of the rule, [R, 1]; 0 where no token of U has any probability."""
    before = base.masked_fill(~mapped, -torch.inf).logsumexp(-1, keepdim=True)
    after = fused.masked_fill(~mapped, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.where(before == -torch.inf, 0.0, before - after)


def _spread(shift: Shift, num_columns: int) -> tuple[Tensor, Tensor]:
    """s of the rule for every column, [R, U] float32, and which columns are mapped, [U] bool."""
    delta_logits = shift.delta_logits.float()
    if shift.delta_ids is None:
        width = min(delta_logits.shape[-1], num_columns)
        values = delta_logits[:, :width]
        in_map = torch.arange(num_columns, device=values.device) < width
        return values if width == num_columns else pad(values, (0, num_columns - width)), in_map
    missing = num_columns - shift.delta_ids.numel()
    delta_ids = pad(shift.delta_ids, (0, missing), value=-1) if missing > 0 else shift.delta_ids[:num_columns]
    in_map = delta_ids >= 0
    # gather: for these shapes its backward is several times faster than that of indexing by a tensor.
    gathered = delta_logits.gather(1, delta_ids.clamp(min=0).expand(delta_logits.shape[0], -1))
    return torch.where(in_map, gathered, 0.0), in_map


def _column(strength: float | Tensor) -> float | Tensor:
    return strength.float().unsqueeze(-1) if isinstance(strength, Tensor) else strength
