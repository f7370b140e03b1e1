"""The tile loop that qkv_projection, linear, bias_gelu and linear_add_layer_norm share.

    y = activation(x @ weight.T + bias)

x: [M, K]; weight: [N, K]; bias: [N]; y: [M, N]; accumulated in float32. Both operands are read along K. Tiles whose
first row is not below the live count exit at once, so padding costs a comparison.

Two families. Pointer: one tile a program, loads through pointers (cp.async pipelined from sm_80 on), any shape; or,
where tiles are fewer than the chip has room for, a part of a tile's depth a program, y: float32 [PARTS, M, N], whose
sum over the parts is the product (split-K). TMA (sm_90 on): a grid as large as the chip walks the tiles; operands and
result move through tensor descriptors, which need strides of 16 bytes. Where `_configs` says so, torch's library
computes the product instead, dead rows and all.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastdistil.kernels import _configs
from fastdistil.kernels._launch import Launcher, begin, launcher


@triton.jit
def accumulate(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b. IEEE float32 products are a chain of additions over K: a chain a block, summed, errs far less than
    one over all of K, and of tf32x3 the tensor cores' sums, which are cut off, not rounded. The fma keeps the compiler
    from joining them again."""
    if PRECISION != "tf32" and a.dtype == tl.float32:
        return tl.fma(tl.full(acc.shape, 1.0, tl.float32), tl.dot(a, b, input_precision=PRECISION), acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def _near_normal_cdf(x):
    """Phi(x) within 3.4e-5 of itself for |x| <= 12, in the tail too, at about two thirds of erf's instructions.

    Phi(-|x|) = erfc(z) / 2 = exp(-z^2) erfcx(z) / 2 with z = |x| / sqrt(2); erfcx(z) / 2 is a polynomial of
    t = 1 / (1 + 0.375 |x|), fitted for the least relative error.
    """
    t = 1.0 / (1.0 + 0.375 * tl.abs(x))
    tail = t * (0.1490408 + t * (0.157923 + t * (0.0829649 + t * (0.2010551 - t * 0.0909905))))
    tail *= tl.exp2(x * x * -0.7213475204444817)
    return tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """gelu: x Phi(x); near_gelu: the same, Phi cheaper and closer than half precision resolves; gelu_new: by tanh."""
    if ACTIVATION == "gelu":
        return x * (0.5 * tl.erf(x * 0.7071067811865476) + 0.5)
    elif ACTIVATION == "near_gelu":
        return x * _near_normal_cdf(x)
    elif ACTIVATION == "gelu_new":
        return x * _sigmoid(2.0 * 0.7978845608028654 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)  # a NaN stays one
    elif ACTIVATION == "silu":
        return x * _sigmoid(x)
    else:
        return x


@triton.jit
def _tile_of(index, m_tiles, n_tiles, GROUP: tl.constexpr):
    """Tile number -> (m, n): GROUP rows of tiles share their weight tiles while these are still in L2."""
    in_group = GROUP * n_tiles
    group = index // in_group
    first = group * GROUP
    height = tl.minimum(m_tiles - first, GROUP)
    inner = index % in_group
    return first + inner % height, inner // height


@triton.jit(do_not_specialize=["batch", "M"])
def gemm_pointer(
    x_ptr, weight_ptr, bias_ptr, y_ptr, cu_seqlens_ptr, batch, M, N, K,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr,
    VECTOR: tl.constexpr, PARTS: tl.constexpr, ACROSS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    # of an argument the compiler knows no more than whether 16 divides it: rows of 312 would be read one by one
    K = K // VECTOR * VECTOR
    N = N // VECTOR * VECTOR
    live = M if cu_seqlens_ptr is None else tl.minimum(tl.load(cu_seqlens_ptr + batch), M)
    m, n = _tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    if m * BLOCK_M < live:
        row = m * BLOCK_M + tl.arange(0, BLOCK_M)
        column = n * BLOCK_N + tl.arange(0, BLOCK_N)
        steps = tl.cdiv(K, BLOCK_K)
        first, last = 0, steps
        if PARTS > 1:
            each = tl.cdiv(steps, PARTS)
            first = tl.program_id(1) * each
            last = tl.minimum(first + each, steps)
        k = first * BLOCK_K + tl.arange(0, BLOCK_K)
        # rows and columns outside are never stored, and read from row 0 and column 0, or as zeros
        x_at = x_ptr + tl.where(row < live, row, 0).to(tl.int64)[:, None] * K + k[None, :]
        if ACROSS:  # weight: [K, N]
            weight_at = weight_ptr + k.to(tl.int64)[:, None] * N + column[None, :]
        else:
            weight_at = weight_ptr + tl.where(column < N, column, 0).to(tl.int64)[None, :] * K + k[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(first, last):
            left = K - (step - first) * BLOCK_K
            x = tl.load(x_at) if EVEN_K else tl.load(x_at, mask=k[None, :] < left, other=0.0)
            if ACROSS:
                weight = tl.load(weight_at, mask=(k[:, None] < left) & (column < N)[None, :], other=0.0)
                weight_at += BLOCK_K * N
            else:
                weight = tl.load(weight_at) if EVEN_K else tl.load(weight_at, mask=k[:, None] < left, other=0.0)
                weight_at += BLOCK_K
            acc = accumulate(x, weight, acc, PRECISION)
            x_at += BLOCK_K
        told = column < N
        if PARTS > 1:
            told = told & (first == 0)  # one part has the bias
            y_ptr += tl.program_id(1).to(tl.int64) * M * N
        bias = tl.load(bias_ptr + column, mask=told, other=0.0).to(tl.float32)
        y = activate(acc + bias[None, :], ACTIVATION)
        at = row.to(tl.int64)[:, None] * N + column[None, :]
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(row < live)[:, None] & (column < N)[None, :])


@triton.jit(do_not_specialize=["batch", "M", "programs"])
def gemm_tma(
    x_desc, weight_desc, y_desc, bias_ptr, cu_seqlens_ptr, batch, M, N, K, programs,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    VECTOR: tl.constexpr, HALVES: tl.constexpr, FLATTEN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    live = M if cu_seqlens_ptr is None else tl.minimum(tl.load(cu_seqlens_ptr + batch), M)
    N = N // VECTOR * VECTOR
    m_tiles = tl.cdiv(live, BLOCK_M)
    n_tiles = tl.cdiv(N, BLOCK_N)
    for index in tl.range(tl.program_id(0), m_tiles * n_tiles, programs, flatten=FLATTEN):
        m, n = _tile_of(index, m_tiles, n_tiles, GROUP)
        row = m * BLOCK_M
        column = n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(0, tl.cdiv(K, BLOCK_K)):
            # past the edge the hardware fills in zeros
            x = x_desc.load([row, step * BLOCK_K])
            weight = weight_desc.load([column, step * BLOCK_K])
            acc = accumulate(x, weight.T, acc, PRECISION)
        # half a tile at a time: half the registers and half the staging memory of the store
        if HALVES == 2:
            left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
            _store(left, y_desc, bias_ptr, row, column, N, BLOCK_N // 2, ACTIVATION)
            _store(right, y_desc, bias_ptr, row, column + BLOCK_N // 2, N, BLOCK_N // 2, ACTIVATION)
        else:
            _store(acc, y_desc, bias_ptr, row, column, N, BLOCK_N, ACTIVATION)


@triton.jit
def _store(acc, y_desc, bias_ptr, row, first, N, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr):
    column = first + tl.arange(0, WIDTH)
    bias = tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    y_desc.store([row, first], activate(acc + bias[None, :], ACTIVATION).to(y_desc.dtype))


LIBRARY: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def gemm(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    cu_seqlens: Tensor | None,
    in_parts: bool = False,
) -> Tensor:
    """activation(x @ weight.T + bias): [M, K], [N, K], [N] -> [M, N]; op: whose recorded configuration is used.

    in_parts: the caller adds up, so that the result may be float32 [parts, M, N] without an activation.
    """
    (M, K), N = x.shape, weight.shape[0]
    if M == 0 or N == 0:
        return x.new_empty(M, N)
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    size = x.element_size()
    if _configs.modes.batch_invariant:  # one family, wherever the memory lies
        x, weight = (t.clone() if t.data_ptr() % 16 else t for t in (x, weight))
    # what torch allocates, as it will the result, is aligned
    odd = K == 0 or K * size % 16 > 0 or (x.data_ptr() | weight.data_ptr()) % 16 > 0
    aligned = not odd and N * size % 16 == 0
    how = _configs.gemm(op, M, N, K, x.dtype, x.device, aligned, whole=cu_seqlens is None, odd=odd)
    c = how.config
    if isinstance(c, _configs.Library):
        return LIBRARY[activation](F.linear(x, weight, bias))
    parts = _configs.parts(c, M, N, K, how.programs) if in_parts and c.family == "pointer" else 1
    y = x.new_empty(M, N) if parts == 1 else x.new_empty(parts, M, N, dtype=torch.float32)
    vector, overlap = 16 // size if aligned else 1, _configs.overlaps(x.device)
    tiles = _configs.cdiv(M, c.block_m) * _configs.cdiv(N, c.block_n)
    cu_seqlens, batch = _configs.live(cu_seqlens)
    if c.family == "tma":
        programs = min(tiles, how.programs)
        launch = _tma(how, activation, vector, overlap)
        launch((programs,), (x, weight, y, bias, cu_seqlens), (batch, M, N, K, programs))
    else:
        launch = _pointer(how, activation, vector, overlap, parts, K % c.block_k == 0)
        weight = weight.T.contiguous() if c.across else weight
        launch((tiles, parts), (x, weight, bias, y, cu_seqlens), (batch, M, N, K))
    return y


@functools.cache
def _tma(how: _configs.GemmLaunch, activation: str, vector: int, overlap: bool) -> Launcher:
    c = how.config
    assert isinstance(c, _configs.Gemm)
    blocks = (c.block_m, c.block_k), (c.block_n, c.block_k), (c.block_m, c.block_n // c.halves)
    common = _common(c, how, activation, vector)
    return launcher(gemm_tma, overlap, blocks, HALVES=c.halves, FLATTEN=c.flatten, **common)


@functools.cache
def _pointer(how: _configs.GemmLaunch, activation: str, vector: int, overlap: bool, parts: int, even: bool) -> Launcher:
    c = how.config
    assert isinstance(c, _configs.Gemm)
    common = _common(c, how, activation, vector)
    return launcher(gemm_pointer, overlap, PARTS=parts, EVEN_K=even, ACROSS=c.across, **common)


def _common(c: _configs.Gemm, how: _configs.GemmLaunch, activation: str, vector: int) -> dict[str, Any]:
    return dict(
        ACTIVATION="near_gelu" if activation == "gelu" and how.near_gelu else activation,
        PRECISION=how.precision, VECTOR=vector,
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, GROUP=c.group,
        num_warps=c.warps, num_stages=c.stages, maxnreg=c.registers,
    )  # fmt: skip
