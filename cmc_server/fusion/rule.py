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

from cmc_server.config import Unmapped


@dataclass(frozen=True)
class Shift:
    """What one delta contributes to a batch of rows.

    Args:
        delta_logits: [R, D] floating point.
        delta_ids: [U'] int64, the vocabulary map; -1 is unmapped. Columns beyond U' count as unmapped.
        strength: one factor for all rows, or [R].
    """

    delta_logits: Tensor
    delta_ids: Tensor
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
        delta_ids = _padded(shift.delta_ids, base.shape[-1])
        in_map = delta_ids >= 0
        delta_logits = shift.delta_logits.float()
        # gather: for these shapes its backward is several times faster than that of indexing by a tensor.
        gathered = delta_logits.gather(1, delta_ids.clamp(min=0).expand(delta_logits.shape[0], -1))
        total = total + _column(shift.strength) * torch.where(in_map, gathered, 0.0)
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
    if not shifts:
        return logits
    base = logits.index_select(0, rows)
    fused = base.clone() if unmapped == "preserve" else base
    mapped = None
    for shift in shifts:
        width = min(shift.delta_ids.numel(), fused.shape[1])
        delta_ids = shift.delta_ids[:width]
        # One appended column of zeros stands for "unmapped", so that the gather needs no mask: -1 selects it.
        extended = torch.nn.functional.pad(shift.delta_logits.float() * _column(shift.strength), (0, 1))
        sources = torch.where(delta_ids < 0, extended.shape[1] - 1, delta_ids)
        fused[:, :width] += extended.index_select(1, sources)
        if unmapped == "preserve":
            in_map = _padded(delta_ids, fused.shape[1]) >= 0
            mapped = in_map if mapped is None else mapped | in_map
    if mapped is not None:
        fused = torch.where(mapped, fused + _correction(base, fused, mapped), fused)
    return logits.index_copy_(0, rows, fused)


def _correction(base: Tensor, fused: Tensor, mapped: Tensor) -> Tensor:
    """c of the rule, [R, 1]; 0 where no token of U has any probability."""
    before = base.masked_fill(~mapped, -torch.inf).logsumexp(-1, keepdim=True)
    after = fused.masked_fill(~mapped, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.where(before == -torch.inf, 0.0, before - after)


def _padded(delta_ids: Tensor, num_columns: int) -> Tensor:
    missing = num_columns - delta_ids.numel()
    return torch.nn.functional.pad(delta_ids, (0, missing), value=-1) if missing > 0 else delta_ids[:num_columns]


def _column(strength: float | Tensor) -> float | Tensor:
    return strength.float().unsqueeze(-1) if isinstance(strength, Tensor) else strength
