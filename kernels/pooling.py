"""One vector a sequence: the mean of its rows or its first row, then an optional division by the L2 norm.

    mean  y[b] = sum(x[cu_seqlens[b] : cu_seqlens[b + 1]]) / length[b]
    cls   y[b] = x[cu_seqlens[b]]
    then  y[b] / max(|y[b]|_2, 1e-12) when asked for; an empty sequence gives zeros, one
          that ends past the last row NaN

x: [rows, dim]; cu_seqlens: int32 [batch + 1]; y: float32 [batch, dim]. One program takes one sequence.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistil.kernels import _configs
from fastdistil.kernels._launch import begin, launcher


@triton.jit(do_not_specialize=["rows"])
def _pool(
    x_ptr, cu_seqlens_ptr, y_ptr, rows,
    MEAN: tl.constexpr, NORMALIZE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    sequence = tl.program_id(0)
    start = tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0)
    told = tl.load(cu_seqlens_ptr + sequence + 1)
    end = tl.minimum(told, rows)
    columns = tl.arange(0, BLOCK)
    inside = columns < DIM
    if MEAN:
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in tl.range(start, end, ROWS, num_stages=STAGES):
            row = first + tl.arange(0, ROWS)
            at = row.to(tl.int64)[:, None] * DIM + columns[None, :]
            mask = (row < end)[:, None] & inside[None, :]
            total += tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        y = tl.sum(total, axis=0) / tl.maximum(end - start, 1).to(tl.float32)
    else:
        at = start.to(tl.int64) * DIM + columns
        y = tl.load(x_ptr + at, mask=columns < tl.where(start < end, DIM, 0), other=0.0).to(tl.float32)
    y = tl.where(told > rows, float("nan"), y)  # rows that nobody gave
    if NORMALIZE:
        norm = tl.maximum(tl.sqrt_rn(tl.sum(y * y, axis=0)), 1e-12)
        y = tl.div_rn(y, tl.broadcast_to(norm, y.shape))
    tl.store(y_ptr + sequence.to(tl.int64) * DIM + columns, y, mask=inside)


def pool(x: Tensor, cu_seqlens: Tensor, mode: str = "mean", normalize: bool = False) -> Tensor:  # -> [batch, dim]
    rows, dim = x.shape
    batch = cu_seqlens.shape[0] - 1
    y = torch.empty((batch, dim), dtype=torch.float32, device=x.device)
    if batch and dim:
        c = _configs.row_kernel("pool", dim, x.dtype, x.device)
        launch = launcher(
            _pool, _configs.overlaps(y.device),
            MEAN=mode == "mean", NORMALIZE=normalize, DIM=dim, BLOCK=c.block, ROWS=c.rows, STAGES=c.stages,
            num_warps=c.warps,
        )  # fmt: skip
        launch((batch,), (_configs.dense(x), cu_seqlens.contiguous(), y), (rows,))
    return y
