"""The rule of cross-model control, shared by serving, training and evaluation.

For user logits l, delta logits d_k, maps m_k and strengths a_k (Cross-model Control, NeurIPS 2024)::

    z[u] = l[u] + sum_k a_k * s_k[u],    s_k[u] = d_k[m_k[u]] if m_k[u] >= 0 else 0

``unmapped="preserve"`` adds c = LSE_U(l) - LSE_U(l + sum_k a_k * s_k) to the tokens of U, the union of the mapped sets,
so that a token outside U keeps exactly the probability that the user LLM gave it.

Shapes: R rows, U user logits (columns), D_k delta logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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


def common_policy(policies: Iterable[Unmapped | None]) -> Unmapped:
    """The policy of deltas that act together where the request leaves it to their manifests."""
    return "preserve" if "preserve" in policies else "zero"


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
    preserve = unmapped == "preserve" and bool(shifts)
    if logits.device.type == "cpu":
        return _fuse_row_by_row(logits, rows, shifts, preserve)
    if logits.is_cuda and len(shifts) == 1:
        return _fuse_by_kernel(logits, rows, shifts[0], preserve)
    if preserve:
        return fuse_by_copy_(logits, rows, shifts, unmapped)
    for shift in shifts:
        scaled = _scaled(shift)
        width = min(scaled.shape[1], logits.shape[1])
        logits[:, :width].index_add_(0, rows, scaled[:, :width])
    return logits


def spread_rows(delta_logits: Tensor, delta_ids: Tensor) -> Tensor:
    """The map applied alone: s of the rule, on a CPU.

    Adding what it returns as a :class:`Shift` whose map is the identity is the rule with ``unmapped="zero"``.

    Args:
        delta_logits: [R, D] float32.
        delta_ids: [U'] int64; -1 is unmapped.

    Returns:
        [R, U'] float32, 0 for unmapped tokens.
    """
    rows, size = delta_logits.shape
    extended = delta_logits.new_zeros(size + 1)  # see _extended_ids
    index = _extended_ids(delta_ids, size)
    spread = delta_logits.new_empty(rows, index.numel())
    for row, target in zip(delta_logits, spread, strict=True):
        extended[:size].copy_(row)
        torch.index_select(extended, 0, index, out=target)
    return spread


def fuse_by_copy_(logits: Tensor, rows: Tensor, shifts: Sequence[Shift], unmapped: Unmapped = "zero") -> Tensor:
    """:func:`fuse_` as :func:`fuse` itself does it: a copy of the rows, and another of what is added."""
    return logits.index_copy_(0, rows, fuse(logits.index_select(0, rows), shifts, unmapped))


def end_rows_(logits: Tensor, rows: Tensor, faulty: Tensor, token_id: int) -> Tensor:
    """Leave some rows one token alone, in place, without the host knowing which.

    Args:
        logits: [B, U] float32.
        rows: [R] int64, without repetition.
        faulty: [R] bool, which of these.
        token_id: what is left of them.

    Returns:
        ``logits``.
    """
    if logits.is_cuda:
        from cmc_server.fusion.kernel import end_rows_ as end_rows_by_kernel_

        return end_rows_by_kernel_(logits, rows, faulty, token_id)
    logits[rows[faulty]] = -torch.inf
    logits[rows[faulty], token_id] = 0.0
    return logits


def _fuse_by_kernel(logits: Tensor, rows: Tensor, shift: Shift, preserve: bool) -> Tensor:
    from cmc_server.fusion.kernel import add_shift_

    strengths = torch.as_tensor(shift.strength, dtype=torch.float32, device=logits.device).expand(len(rows))
    return add_shift_(logits, rows, shift.delta_logits, shift.delta_ids, strengths.contiguous(), preserve=preserve)


def _fuse_row_by_row(logits: Tensor, rows: Tensor, shifts: Sequence[Shift], preserve: bool) -> Tensor:
    """The rule on a CPU, a row at a time: what is gathered on the way then never leaves the processor's cache.

    Over all rows at once the gathered copies are as large as the logits, and are written to memory and read again.
    """
    num_columns = logits.shape[1]
    adders = [_RowAdder(shift, num_columns) for shift in shifts]
    if not preserve:
        for position, row in enumerate(rows.tolist()):
            for adder in adders:
                adder.add(position, logits[row])
        return logits
    mapped = torch.zeros(num_columns)
    for adder in adders:
        adder.mark(mapped)
    blocked = torch.zeros(num_columns).masked_fill_(mapped == 0, -torch.inf)
    workspace = torch.empty(num_columns)
    for position, row in enumerate(rows.tolist()):
        target = logits[row]
        before = torch.add(target, blocked, out=workspace).logsumexp(0).item()
        for adder in adders:
            adder.add(position, target)
        if before != -math.inf:
            after = torch.add(target, blocked, out=workspace).logsumexp(0).item()
            target.add_(mapped, alpha=before - after)
    return logits


class _RowAdder:
    """Adds one shift to single rows.

    Args:
        shift: of all rows.
        num_columns: U.
    """

    def __init__(self, shift: Shift, num_columns: int) -> None:
        self._delta_logits = shift.delta_logits.float()
        num_rows, size = self._delta_logits.shape
        strength = shift.strength
        self._strengths = strength.tolist() if isinstance(strength, Tensor) else [strength] * num_rows
        self._index: Tensor | None = None
        self._width = min(size, num_columns)
        if shift.delta_ids is not None:
            self._scaled = self._delta_logits.new_zeros(size + 1)  # see _extended_ids
            self._width = min(shift.delta_ids.numel(), num_columns)
            self._index = _extended_ids(shift.delta_ids[: self._width], size)
            self._gathered = self._delta_logits.new_empty(self._width)

    def mark(self, mapped: Tensor) -> None:
        """Set the [U] entries of mapped tokens to 1."""
        known = 1.0 if self._index is None else (self._index < self._scaled.numel() - 1).float()
        mapped[: self._width] = torch.maximum(mapped[: self._width], torch.as_tensor(known))

    def add(self, position: int, target: Tensor) -> None:
        """Add the shift's row at ``position`` to a row [U] of the logits."""
        row, strength = self._delta_logits[position], self._strengths[position]
        if self._index is None:
            target[: self._width].add_(row[: self._width], alpha=strength)
        else:
            torch.mul(row, strength, out=self._scaled[: row.numel()])
            torch.index_select(self._scaled, 0, self._index, out=self._gathered)
            target[: self._width].add_(self._gathered)


def _scaled(shift: Shift) -> Tensor:
    """a * s for the mapped columns, [R, U'] float32, without a pass that is not needed."""
    delta_logits = shift.delta_logits.float()
    if shift.delta_ids is None:
        return delta_logits * _column(shift.strength)
    rows, size = delta_logits.shape
    extended = delta_logits.new_zeros(rows, size + 1)
    torch.mul(delta_logits, _column(shift.strength), out=extended[:, :size])
    return extended.index_select(1, _extended_ids(shift.delta_ids, size))


def _extended_ids(delta_ids: Tensor, size: int) -> Tensor:
    """The map into logits with one more column: of zeros, for what is unmapped, so that a gather needs no mask."""
    return torch.where(delta_ids < 0, size, delta_ids)


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
