"""LayerNorm fused with what comes before it: the residual sum, or the embedding lookups.

    y[r] = (s[r] - mean(s[r])) / sqrt(var(s[r]) + eps) * weight + bias
    add_layer_norm    s[r] = x[r] + residual[r], or sum(x[:, r]) + residual[r] of a product in parts
    embed_layer_norm  s[r] = word_embeddings[input_ids[r]] + position_embeddings[position_ids[r]]

x, residual, y: [rows, dim] (x in parts: float32 [PARTS, rows, dim]); weight, bias: [dim]; statistics in float32. Rows
from cu_seqlens[batch] on are left alone. A program takes ROWS rows of the whole width, so that weight and bias are read
once for all of them.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastdistil.kernels import _configs
from fastdistil.kernels._launch import begin, launcher


@triton.jit
def _normalize(s, weight_ptr, bias_ptr, columns, inside, eps, DIM: tl.constexpr):
    """s: [ROWS, BLOCK] float32, zero outside the width -> LayerNorm(s), float32"""
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(s, axis=1) / DIM
    centred = tl.where(inside[None, :], s - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / DIM
    rstd = 1.0 / tl.sqrt(variance + eps)
    return centred * rstd[:, None] * weight[None, :] + bias[None, :]


@triton.jit(do_not_specialize=["batch", "rows"])
def _add_layer_norm(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, cu_seqlens_ptr, batch, rows, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    live = rows if cu_seqlens_ptr is None else tl.minimum(tl.load(cu_seqlens_ptr + batch), rows)
    first = tl.program_id(0) * ROWS
    if first < live:
        row = first + tl.arange(0, ROWS)
        columns = tl.arange(0, BLOCK)
        inside = columns < DIM
        at = row.to(tl.int64)[:, None] * DIM + columns[None, :]
        mask = (row < live)[:, None] & inside[None, :]
        s = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            s += tl.load(x_ptr + part * tl.cast(rows, tl.int64) * DIM + at, mask=mask, other=0.0)
        s += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        y = _normalize(s, weight_ptr, bias_ptr, columns, inside, eps, DIM)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batch", "rows", "vocabulary", "positions"])
def _embed_layer_norm(
    input_ids_ptr, position_ids_ptr, words_ptr, positions_ptr, weight_ptr, bias_ptr, y_ptr, cu_seqlens_ptr,
    batch, rows, vocabulary, positions, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    live = rows if cu_seqlens_ptr is None else tl.minimum(tl.load(cu_seqlens_ptr + batch), rows)
    first = tl.program_id(0) * ROWS
    if first < live:
        row = first + tl.arange(0, ROWS)
        columns = tl.arange(0, BLOCK)
        inside = columns < DIM
        word = tl.load(input_ids_ptr + row, mask=row < live, other=0).to(tl.int64)
        position = tl.load(position_ids_ptr + row, mask=row < live, other=0).to(tl.int64)
        # an index outside its table makes the row NaN instead of reading what is not there
        valid = (word >= 0) & (word < vocabulary) & (position >= 0) & (position < positions)
        mask = valid[:, None] & inside[None, :]
        s = tl.load(words_ptr + word[:, None] * DIM + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        s += tl.load(positions_ptr + position[:, None] * DIM + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        y = _normalize(s, weight_ptr, bias_ptr, columns, inside, eps, DIM)
        y = tl.where(valid[:, None], y, float("nan"))
        at = row.to(tl.int64)[:, None] * DIM + columns[None, :]
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(row < live)[:, None] & inside[None, :])


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, cu_seqlens: Tensor | None = None
) -> Tensor:  # [rows, dim] x 2, or float32 [parts, rows, dim] and [rows, dim] -> [rows, dim]
    rows, dim = residual.shape
    parts = 1 if x.dim() == 2 else x.shape[0]
    y = residual.new_empty(rows, dim)
    if rows and dim:
        c = _configs.row_kernel("add_layer_norm", dim, y.dtype, y.device)
        at_once = c.rows if parts == 1 else 1  # a product is in parts where its rows are too few for the chip
        cu_seqlens, batch = _configs.live(cu_seqlens)
        launch = launcher(
            _add_layer_norm, _configs.overlaps(y.device),
            DIM=dim, BLOCK=c.block, ROWS=at_once, PARTS=parts, num_warps=c.warps,
        )  # fmt: skip
        tensors = x.contiguous(), residual.contiguous(), weight.contiguous(), bias.contiguous(), y, cu_seqlens
        launch((_configs.cdiv(rows, at_once),), tensors, (batch, rows, eps))
    return y


def embed_layer_norm(
    input_ids: Tensor,
    position_ids: Tensor,
    word_embeddings: Tensor,
    position_embeddings: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:  # [rows] x 2 -> [rows, dim]
    rows, dim = input_ids.shape[0], word_embeddings.shape[1]
    y = word_embeddings.new_empty(rows, dim)
    if rows and dim:
        c = _configs.row_kernel("embed_layer_norm", dim, y.dtype, y.device)
        cu_seqlens, batch = _configs.live(cu_seqlens)
        launch = launcher(
            _embed_layer_norm, _configs.overlaps(y.device), DIM=dim, BLOCK=c.block, ROWS=c.rows, num_warps=c.warps
        )  # fmt: skip
        given = input_ids, position_ids, word_embeddings, position_embeddings, weight, bias
        tensors = *[t.contiguous() for t in given], y, cu_seqlens
        numbers = batch, rows, word_embeddings.shape[0], position_embeddings.shape[0], eps
        launch((_configs.cdiv(rows, c.rows),), tensors, numbers)
    return y
