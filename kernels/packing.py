"""Padded <-> packed: which row a real token of a padded batch has, and the rows back in their places.

    pack    row r is the r-th real token: source[r] = p and target[p] = r for its flat position p = b * length + l
            cu_seqlens[b] = the real tokens before sequence b; row_ids[r] = input_ids[p]; row_positions alike
    unpack  y[p] = rows[target[p]], or fill (0) where target[p] is -1, or NaN without such a row (CPU: an error)

keep: bool [batch, length]; input_ids: [batch, length]; position_ids: [1 or batch, length]; cu_seqlens: int32
[batch + 1]; source, target: int64 [batch * length]; rows: [capacity, dim]; y: [batch * length, dim]. The real tokens
fill the first rows; a padded position has one of the dead ones, from the last on, which gets zeros.
A program of pack takes one sequence, and counts the tokens before it unless it is told.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastdistil.kernels import _configs
from fastdistil.kernels._launch import begin, launcher

COUNTED = 2**27  # bytes of keep that all programs may read to count by themselves; above, torch counts beforehand
WIDEST = 1_024  # columns of a program of unpack


@triton.jit(do_not_specialize=["length", "total", "position_step"])
def _pack(
    keep_ptr, input_ids_ptr, position_ids_ptr, cu_seqlens_ptr, source_ptr, target_ptr, row_ids_ptr, row_positions_ptr,
    length, total, position_step,
    COUNT: tl.constexpr, BEFORE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    sequence = tl.program_id(0)
    first = sequence.to(tl.int64) * length
    row = 0  # of the next real token
    if COUNT:
        whole = first // BEFORE * BEFORE
        for start in range(0, whole, BEFORE):  # without a mask, so by 16 bytes
            row += tl.sum((tl.load(keep_ptr + start + tl.arange(0, BEFORE)) != 0).to(tl.int32), axis=0)
        tail = whole + tl.arange(0, BEFORE)
        row += tl.sum((tl.load(keep_ptr + tail, mask=tail < first, other=0) != 0).to(tl.int32), axis=0)
    else:
        row = tl.load(cu_seqlens_ptr + sequence)
    for start in range(0, length, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside, p = column < length, first + column
        real = tl.load(keep_ptr + p, mask=inside, other=0) != 0  # a byte of True need not be 1
        kept = real.to(tl.int32)
        after = row + tl.cumsum(kept, axis=0)  # real tokens up to and with this one
        at = tl.where(real, after - 1, total - 1 - (p - after))
        tl.store(source_ptr + at, tl.where(real, p, 0), mask=inside)
        tl.store(target_ptr + p, tl.where(real, after - 1, -1), mask=inside)
        if input_ids_ptr is not None:
            tl.store(row_ids_ptr + at, tl.load(input_ids_ptr + p, mask=inside & real, other=0), mask=inside)
        if position_ids_ptr is not None:
            place = position_ids_ptr + sequence.to(tl.int64) * position_step + column
            tl.store(row_positions_ptr + at, tl.load(place, mask=inside & real, other=0), mask=inside)
        row += tl.sum(kept, axis=0)
    if COUNT:
        tl.store(cu_seqlens_ptr + sequence + 1, row)
        if sequence == 0:
            tl.store(cu_seqlens_ptr, 0)


@triton.jit(do_not_specialize=["total", "capacity"])
def _unpack(
    rows_ptr, target_ptr, fill_ptr, y_ptr, total, capacity,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(target_ptr + p, mask=p < total, other=-1)  # [ROWS]
    inside = (column < DIM)[None, :]
    there = (row >= 0) & (row < capacity)
    x = tl.load(rows_ptr + row[:, None] * DIM + column[None, :], mask=there[:, None] & inside, other=0.0)
    x = tl.where((row < capacity)[:, None], x, float("nan"))
    if fill_ptr is not None:
        fill = tl.load(fill_ptr + column, mask=column < DIM, other=0.0)
        x = tl.where((row >= 0)[:, None], x, fill[None, :])
    tl.store(y_ptr + p.to(tl.int64)[:, None] * DIM + column[None, :], x, mask=(p < total)[:, None] & inside)


def pack(
    keep: Tensor, input_ids: Tensor | None = None, position_ids: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> cu_seqlens, source, target, row_ids, row_positions; of what is not given, none"""
    batch, length = keep.shape
    total, device = batch * length, keep.device
    source, target = (torch.empty(total, dtype=torch.int64, device=device) for _ in range(2))
    row_ids, row_positions = (
        torch.empty(0 if given is None else total, dtype=torch.int64 if given is None else given.dtype, device=device)
        for given in (input_ids, position_ids)
    )
    count = total > 0 and batch * total // 2 <= COUNTED
    if count:
        cu_seqlens = torch.empty(batch + 1, dtype=torch.int32, device=device)
    else:
        cu_seqlens = F.pad(keep.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    if total:
        ids, positions = (None if given is None else given.contiguous() for given in (input_ids, position_ids))
        block = 128 if length <= 128 else 256
        launch = launcher(_pack, _configs.overlaps(device), COUNT=count, BEFORE=2_048, BLOCK=block, num_warps=4)
        kept = keep.contiguous().view(torch.uint8)
        tensors = kept, ids, positions, cu_seqlens, source, target, row_ids, row_positions
        launch((batch,), tensors, (length, total, 0 if positions is None or len(positions) == 1 else length))
    return cu_seqlens, source, target, row_ids, row_positions


def unpack(rows: Tensor, target: Tensor, fill: Tensor | None = None) -> Tensor:  # -> [batch * length, dim]
    total, dim = target.shape[0], rows.shape[1]
    y = rows.new_empty(total, dim)
    if total and dim:
        c = _configs.row_kernel("unpack", min(dim, WIDEST), rows.dtype, rows.device)
        overlap = _configs.overlaps(y.device)
        launch = launcher(_unpack, overlap, DIM=dim, BLOCK=c.block, ROWS=c.rows, num_warps=c.warps)
        tensors = rows.contiguous(), target.contiguous(), None if fill is None else fill.contiguous(), y
        launch((_configs.cdiv(total, c.rows), _configs.cdiv(dim, c.block)), tensors, (total, rows.shape[0]))
    return y
