"""Self-attention within packed sequences.

    o[r, h] = head_scale[h] * softmax(q[r, h] @ k[s, h].T * head_size**-0.5 over the rows s of r's sequence) @ v[s, h]

qkv: [rows, 3 * dim], a row's query, key and value side by side; cu_seqlens: int32 [batch + 1]; o: [rows, dim]. Scores
and sums in float32; the exponential is exp2 with the scale folded into one multiply-add. Rows past the end of a
sequence are read as zeros, because 0 * NaN would be NaN. A sequence longer than its form can serve, or that ends past
the last row, gets NaN, never memory that nobody wrote.

Three forms, by the longest sequence. Short: a tile of T rows starts every T - longest + 1 rows and attends
block-diagonally; it answers for the sequences that start within its step, so it needs no table of tiles. Single: a
sequence is one tile. Looped: tiles of queries walk the keys with a running maximum (FlashAttention); sequence b owns
the tiles from cu_seqlens[b] // T + b on, of which there are always enough, and a tile finds its b by bisection.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistil.kernels import _configs
from fastdistil.kernels._gemm import accumulate
from fastdistil.kernels._launch import begin, launcher


@triton.jit
def _load(qkv_ptr, row, keep, column, stride, HEAD: tl.constexpr, BLOCK_D: tl.constexpr):
    """-> [T, BLOCK_D] from the column on, zeros where not kept"""
    d = tl.arange(0, BLOCK_D)
    mask = keep[:, None] if HEAD == BLOCK_D else keep[:, None] & (d < HEAD)[None, :]
    return tl.load(qkv_ptr + row.to(tl.int64)[:, None] * stride + column + d[None, :], mask=mask, other=0.0)


@triton.jit
def _save(
    o_ptr, head_scale_ptr, o, row, keep, head, heads, HEAD: tl.constexpr, BLOCK_D: tl.constexpr
):  # o: [T, BLOCK_D] float32
    if head_scale_ptr is not None:
        o *= tl.load(head_scale_ptr + head).to(tl.float32)
    d = tl.arange(0, BLOCK_D)
    mask = keep[:, None] if HEAD == BLOCK_D else keep[:, None] & (d < HEAD)[None, :]
    at = row.to(tl.int64)[:, None] * (heads * HEAD) + head * HEAD + d[None, :]
    tl.store(o_ptr + at, o.to(o_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weights(scores, scale):
    """softmax(scores * scale) of a row's whole sequence at once, before the division; scores: [T, T], -inf if masked"""
    top = tl.max(scores, axis=1) * scale
    return tl.exp2(scores * scale - top[:, None])


@triton.jit(do_not_specialize=["batch", "rows", "heads", "steps"])
def _short(
    qkv_ptr, cu_seqlens_ptr, head_scale_ptr, o_ptr, batch, rows, heads, steps, scale,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, T: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // heads * STEP
    live = tl.minimum(tl.load(cu_seqlens_ptr + batch), rows)
    if first < live:
        row = first + tl.arange(0, T)
        inside = row < live
        # the last sequence that starts at or before each row, by bisection
        sequence = tl.zeros((T,), tl.int32)
        for i in range(steps):
            later = sequence + (1 << (steps - 1 - i))
            begun = tl.load(cu_seqlens_ptr + later, mask=later < batch, other=2147483647) <= row
            sequence = tl.where(begun, later, sequence)
        start = tl.load(cu_seqlens_ptr + sequence)
        inside = inside & (row >= start)  # no sequence may start below the first
        q = _load(qkv_ptr, row, inside, head * HEAD, 3 * heads * HEAD, HEAD, BLOCK_D)
        k = _load(qkv_ptr, row, inside, (heads + head) * HEAD, 3 * heads * HEAD, HEAD, BLOCK_D)
        v = _load(qkv_ptr, row, inside, (2 * heads + head) * HEAD, 3 * heads * HEAD, HEAD, BLOCK_D)
        scores = tl.dot(q, k.T, input_precision=PRECISION)  # [T, T]
        together = (start[:, None] == start[None, :]) & inside[None, :]
        p = _weights(tl.where(together, scores, float("-inf")), scale).to(v.dtype)
        if tl.max(tl.where(tl.abs(v) < float("inf"), 0, 1)) == 0:
            o = tl.dot(p, v, input_precision=PRECISION)
        else:  # one sequence's NaN or infinity would reach the others by 0 * NaN
            o = tl.zeros((T, BLOCK_D), tl.float32)
            for one in range(tl.min(sequence), tl.max(sequence) + 1):
                its = (sequence == one)[:, None]
                o = tl.where(its, tl.dot(p, tl.where(its, v, 0.0), input_precision=PRECISION), o)
        # a sequence longer than announced, or past the capacity
        end = tl.load(cu_seqlens_ptr + sequence + 1)
        wrong = (end - start > T - STEP + 1) | (end > rows)
        o = tl.where(wrong[:, None], float("nan"), o / tl.sum(p.to(tl.float32), axis=1)[:, None])
        seen = row - start <= T - STEP  # rows of its sequence that a tile is sure to hold; the others go by their place
        own = inside & tl.where(seen, (start >= first) & (start < first + STEP), row < first + STEP)
        _save(o_ptr, head_scale_ptr, o, row, own, head, heads, HEAD, BLOCK_D)


@triton.jit(do_not_specialize=["rows", "heads"])
def _single(
    qkv_ptr, cu_seqlens_ptr, head_scale_ptr, o_ptr, rows, heads, scale,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    head = tl.program_id(0) % heads
    sequence = tl.program_id(0) // heads
    start = tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0)
    told = tl.load(cu_seqlens_ptr + sequence + 1)
    end = tl.minimum(told, rows)
    if start < end:
        row = start + tl.arange(0, T)
        inside = row < end
        q = _load(qkv_ptr, row, inside, head * HEAD, 3 * heads * HEAD, HEAD, BLOCK_D)
        k = _load(qkv_ptr, row, inside, (heads + head) * HEAD, 3 * heads * HEAD, HEAD, BLOCK_D)
        v = _load(qkv_ptr, row, inside, (2 * heads + head) * HEAD, 3 * heads * HEAD, HEAD, BLOCK_D)
        scores = tl.dot(q, k.T, input_precision=PRECISION)  # [T, T]
        p = _weights(tl.where(inside[None, :], scores, float("-inf")), scale)
        o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) / tl.sum(p, axis=1)[:, None]
        if (end - start > T) | (told > rows):
            o = tl.full((T, BLOCK_D), float("nan"), tl.float32)
            for rest in range(start + T, end, T):
                row = rest + tl.arange(0, T)
                _save(o_ptr, head_scale_ptr, o, row, row < end, head, heads, HEAD, BLOCK_D)
            row = start + tl.arange(0, T)
        _save(o_ptr, head_scale_ptr, o, row, inside, head, heads, HEAD, BLOCK_D)


@triton.jit(do_not_specialize=["batch", "rows", "heads", "steps"])
def _looped(
    qkv_ptr, cu_seqlens_ptr, head_scale_ptr, o_ptr, batch, rows, heads, steps, scale,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, T: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    sequence = 0
    if tile < tl.load(cu_seqlens_ptr + batch) // T + batch:  # else there is no such tile
        for i in range(steps):
            later = sequence + (1 << (steps - 1 - i))
            begun = tl.load(cu_seqlens_ptr + later, mask=later < batch, other=2147483647) // T + later <= tile
            sequence = tl.where(begun, later, sequence)
    start = tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0)
    told = tl.load(cu_seqlens_ptr + sequence + 1)
    end = tl.minimum(told, rows)
    first = start + (tile - start // T - sequence) * T
    if (first >= start) & (first < end):
        row = first + tl.arange(0, T)
        q = _load(qkv_ptr, row, row < end, head * HEAD, 3 * heads * HEAD, HEAD, BLOCK_D)
        top = tl.full((T,), float("-inf"), tl.float32)
        total = tl.zeros((T,), tl.float32)
        o = tl.zeros((T, BLOCK_D), tl.float32)
        for key in range(start, end, KEYS):
            at = key + tl.arange(0, KEYS)
            k = _load(qkv_ptr, at, at < end, (heads + head) * HEAD, 3 * heads * HEAD, HEAD, BLOCK_D)
            scores = tl.dot(q, k.T, input_precision=PRECISION)  # [T, KEYS]
            scores = tl.where((at < end)[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
            p = tl.exp2(scores * scale - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(p, axis=1)
            v = _load(qkv_ptr, at, at < end, (2 * heads + head) * HEAD, 3 * heads * HEAD, HEAD, BLOCK_D)
            o = accumulate(p.to(v.dtype), v, o * shrink[:, None], PRECISION)
            top = new_top
        total = tl.where(told > rows, float("nan"), total)
        _save(o_ptr, head_scale_ptr, o / total[:, None], row, row < end, head, heads, HEAD, BLOCK_D)


def attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_heads: int, head_scale: Tensor | None = None
) -> Tensor:  # [rows, 3 * dim] -> [rows, dim]
    rows, dim, batch = qkv.shape[0], qkv.shape[1] // 3, cu_seqlens.shape[0] - 1
    o = qkv.new_empty(rows, dim)
    if rows == 0 or batch == 0:
        return o
    qkv, cu_seqlens = _configs.dense(qkv), cu_seqlens.contiguous()
    head_scale = None if head_scale is None else head_scale.contiguous()
    head_size = dim // num_heads
    c = _configs.attention(max_seqlen, head_size, qkv.dtype, qkv.device)
    scale = head_size**-0.5 * 1.4426950408889634  # log2(e), for exp2
    precision = _configs.matmul_precision() if qkv.dtype is torch.float32 else "ieee"
    common = dict(
        HEAD=head_size, BLOCK_D=_configs.power_of_two(head_size), T=c.tile, PRECISION=precision,
        num_warps=c.warps, num_stages=c.stages, overlap=_configs.overlaps(qkv.device),
    )  # fmt: skip
    tensors = qkv, cu_seqlens, head_scale, o
    numbers = batch, rows, num_heads, batch.bit_length(), scale
    if c.form == "short":
        assert c.longest is not None
        step = c.tile - c.longest + 1
        launcher(_short, STEP=step, **common)((_configs.cdiv(rows, step) * num_heads,), tensors, numbers)
    elif c.form == "single":
        launcher(_single, **common)((batch * num_heads,), tensors, (rows, num_heads, scale))
    else:
        launcher(_looped, KEYS=c.keys, **common)(((rows // c.tile + batch) * num_heads,), tensors, numbers)
    return o
