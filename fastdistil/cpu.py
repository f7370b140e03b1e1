"""Faster CPU forms of the ops in `reference.py`. Each is held to its definition by the same tests as the kernels."""

import ctypes
import functools
import os
import platform
import re
import threading
from collections.abc import Callable, Iterable
from itertools import chain, pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastdistil import reference

# For so many rows a float32 GEMM is cut into column blocks, one batched call, where the library's own GEMM is poor. On
# AMD's processors that was 1.7 times as quick at 8 rows, 1.05 to 1.1 times at 256, slower from 1,024 on (widths 384 and
# 768). On Intel's with AVX-512 a whole model was 1.02 to 1.66 times as quick with 4 to 15 rows, else up to 8 % slower.
FEW_ROWS, FEW_ON_INTEL, BLOCKS = range(1, 257), range(4, 16), 8
# oneDNN's float32 product adds each element in one chain, MKL's in blocks of 192. Cut at so many terms a chain its mean
# error is at most MKL's and a half, its largest was up to 3.5 times MKL's in results of 1,000 elements and more. A cut
# copies part of the weights, so it pays from MANY_ROWS rows on; up to SOME_ROWS rows MKL is as quick. On Zen 4
# cut products took up to 1.4 times as long with fewer than MANY_ON_ZEN_4, and those of fewer multiplications than
# SOME_WORK up to 1.2 times (widths 384 and 768).
CHAIN, SOME_ROWS, MANY_ROWS = 1_024, 8, 24
MANY_ON_ZEN_4, SOME_WORK = 192, 5_000_000
LAID_OUT_FOR = 2_048  # rows, which makes no difference to others
ONEDNN_ACTIVATIONS = {
    "gelu": ("gelu", "none"),
    "gelu_new": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}
# Scores in work at a time, 4 MiB: the quickest of 2**17 to 2**20 at 128 to 512 tokens, 12 heads of 32 and of 64.
SCORE_ELEMENTS = 2**20
ALONE = 2**14  # elements: from 2**15 on torch shares a copy out among threads
# A row that fills no vector register of AVX-512 takes torch's softmax up to twelve times as long as one that does.
LANES, WORTH_WIDENING = 16, 2**10
# glibc's mallopt(3): the option that each environment variable sets, and bytes. Blocks of up to 32 MiB, the most there
# is, come from the heap. A thread's heaps have 64 MiB each: with as much room on top none is ever given back.
MALLOC_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": (-3, 2**25),
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**27),
    "MALLOC_TOP_PAD_": (-2, 2**26),
}


Prepared = dict[tuple[int, ...], tuple[Tensor, Tensor]]  # see `prepare`
Found = TypeVar("Found")


def live_only(form: Callable[..., Tensor], row_arguments: int) -> Callable[..., Tensor]:
    """`form` on the live rows of its first `row_arguments` arguments, with zeros in the dead rows of the result."""

    cu_seqlens_at = form.__code__.co_argcount - 1  # always the last parameter

    @functools.wraps(form)
    def on_live_rows(*args):  # the dispatcher passes positional arguments and leaves out trailing defaults
        if len(args) <= cu_seqlens_at or args[cu_seqlens_at] is None:
            return form(*args)
        rows, live = args[0].shape[0], int(args[cu_seqlens_at][-1])
        if not 0 <= live <= rows:
            raise ValueError(f"cu_seqlens ends at {live}, but there are {rows} rows")
        if live == rows:
            return form(*args[:cu_seqlens_at])
        out = form(*(a[:live] for a in args[:row_arguments]), *args[row_arguments:cu_seqlens_at])
        return F.pad(out, (0, 0, 0, rows - live))

    return on_live_rows


def copy_alone(target: Tensor, source: Tensor) -> None:
    """target.copy_(source) of contiguous tensors by this thread alone: OpenMP's team does not live through a fork, and
    a model that was only loaded is to be of use in forked processes."""
    if target.is_cpu and source.is_cpu and target.is_contiguous() and source.is_contiguous():
        pieces = (one.detach().view(-1).split(ALONE) for one in (target, source))
        for piece, part in zip(*pieces, strict=True):
            piece.copy_(part)
    else:
        target.copy_(source)


def embed_layer_norm(
    input_ids: Tensor,
    position_ids: Tensor,
    word_embeddings: Tensor,
    position_embeddings: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    try:
        words, positions = F.embedding(input_ids, word_embeddings), F.embedding(position_ids, position_embeddings)
    except (IndexError, RuntimeError):  # RuntimeError: an empty table
        check_inside("input_ids", input_ids, word_embeddings)
        check_inside("position_ids", position_ids, position_embeddings)
        raise
    return add_layer_norm(words, positions, weight, bias, eps)


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MiB, which else are given back and mapped anew each time.

    Measured: 3 to 8 % of `encode`. It holds for the whole process, in which blocks that are freed below one still in
    use then stay: so the engine asks for it, and a model that is called does not. What environment variables set stays.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in ("GLIBC_TUNABLES", *MALLOC_SETTINGS)):
        return
    mallopt = ctypes.CDLL(None).mallopt
    for option, size in MALLOC_SETTINGS.values():
        mallopt(option, size)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, cu_seqlens: Tensor | None = None
) -> Tensor:
    if not (x.dtype is residual.dtype is weight.dtype is torch.float32):
        return reference.add_layer_norm(x, residual, weight, bias, eps)
    rows = x.shape[0]
    if grid(rows) == rows:
        return torch.layer_norm(x + residual, weight.shape, weight, bias, eps)
    y = x.new_empty(grid(rows), x.shape[1])  # so that the product behind finds room, see `_widened`
    torch.add(x, residual, out=y[:rows])
    return torch.layer_norm(y, weight.shape, weight, bias, eps)[:rows]


def linear_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    return add_layer_norm(linear(x, weight, bias), residual, norm_weight, norm_bias, eps)


def check_inside(name: str, index: Tensor, table: Tensor) -> None:
    """Raise ValueError naming the first index that is no row of the table."""
    outside = ((index < 0) | (index >= table.shape[0])).nonzero()
    if len(outside):
        row = int(outside[0])
        raise ValueError(f"{name}[{row}] is {int(index[row])}, outside the table of {table.shape[0]} rows")


@functools.cache
def why_not_onednn() -> str:
    """Why float32 products are left to the library torch takes, or "" where oneDNN's are quicker.

    MKL uses AVX-512 on Intel's processors only. On AMD's with AVX-512 oneDNN was 1.9 to 2.3 times as quick from 256
    rows on, as quick or up to twice with fewer (Zen 5; width 768), and 1.0 to 1.2 times on Zen 4, where AVX-512
    multiplies no more at a time than AVX2; on those with AVX2 it was slower.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "no AVX-512"
    most = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    if not most.upper().startswith(("ALL", "DEFAULT", "AVX512", "AVX10")):
        return f"oneDNN is kept to {most}"
    if not torch.backends.mkl.is_available():
        return "torch is built without MKL"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "torch is built without oneDNN"
    return "" if "AuthenticAMD" in vendor() else "MKL is quicker on processors that are not AMD's"


@functools.cache
def vendor() -> str:
    """AuthenticAMD, GenuineIntel or another; on other systems than Linux a text with that in it."""
    return _described("vendor_id")


@functools.cache
def is_zen_4() -> bool:
    """Of AMD's processors with AVX-512; Zen 5 is family 26."""
    return bool(re.search(r"^25$|Family 25\b", _described("cpu family")))


def _described(what: str) -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.split(":")[1].strip() for line in file if line.startswith(what)), "")
    except OSError:
        return platform.processor()  # AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD


@functools.cache
def has(instructions: str) -> bool:
    """Whether this processor has the instructions, such as vnni, and torch a oneDNN that makes use of them."""
    supported = getattr(torch.cpu, f"_is_{instructions}_supported", lambda: False)
    return bool(supported()) and torch.backends.mkldnn.is_available()


@functools.cache
def sums_int8() -> bool:
    """Whether torch._int_mm has VNNI here. It is tried: where oneDNN is kept from it (ONEDNN_MAX_CPU_ISA), sums are cut
    off at 16 bits."""
    if not has("vnni"):
        return False
    with _disable_current_modes():  # whoever asks first may do so with tensors that are none
        most = torch.full((32, 64), 127, dtype=torch.int8, device="cpu")
        return bool((torch._int_mm(most, most.T) == 64 * 127**2).all())


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch has a quick product of this type here. Where float16 has none, it took 8 to 10 times as long from
    128 rows on as one in float32 with its conversions, and twice as long at 8 rows."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return name is None or (supported is not None and torch.backends.mkldnn.is_available() and supported())


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `_onednn` computes this product; torch.backends.mkldnn.flags(enabled=False) says no."""
    if x.dtype is not torch.float32 or why_not_onednn() or not torch.backends.mkldnn.enabled:
        return False
    rows, terms = x.shape[0], weight.shape[1]
    few, many, work = least_work()
    return (
        rows >= (few if terms <= CHAIN else many)
        and rows * weight.numel() >= work
        and terms > 0
        and weight.shape[0] > 0
        and weight.is_contiguous()  # a strided weight would take a thousand times as long
    )


@functools.cache
def least_work() -> tuple[int, int, int]:
    """From how many rows on oneDNN multiplies, from how many where it cuts the product, and of how many
    multiplications."""
    return (SOME_ROWS, MANY_ON_ZEN_4, SOME_WORK) if is_zen_4() else (SOME_ROWS, MANY_ROWS, 0)


def grid(rows: int) -> int:
    """The row count oneDNN is called with: `rows` rounded up to one of 16 an octave, and to a multiple of 4 or, from 32
    on, 8. It keeps 0.5 MiB of code for each count and width, up to 1,024 of them, and compiles for 0.3 to 0.6 ms."""
    return rows if why_not_onednn() else _rounded(rows)


@functools.lru_cache(maxsize=1_024)
def _rounded(rows: int) -> int:
    step = max(8 if rows > 32 else 4, 1 << max((rows - 1).bit_length() - 5, 0))
    return -(-rows // step) * step


def _widened(x: Tensor) -> Tensor:
    """x with rows of no meaning behind, up to the grid: what lies there in its storage, or zeros behind a copy."""
    rows, columns = x.shape
    if rows == grid(rows):
        return x.contiguous()
    room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    if x.is_contiguous() and room >= grid(rows) * columns:
        return x.as_strided((grid(rows), columns), (columns, 1))
    return F.pad(x, (0, 0, 0, grid(rows) - rows))


def _onednn(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none", algorithm: str = "") -> Tensor:
    """activation(x @ weight.T + bias); [rows, in], [out, in], [out] -> [rows, out]"""
    product, rows, terms = torch.ops.mkldnn._linear_pointwise, *x.shape
    x, bias = _widened(x), bias.contiguous()
    if terms <= CHAIN:
        return product(x, _laid_out(weight), bias, activation, [], algorithm)[:rows]
    part = _part(terms)
    y = product(x[:, :part], weight[:, :part].contiguous(), bias, "none", [], "")
    for k in range(part, terms, part):
        y = product.binary(x[:, k : k + part], y, weight[:, k : k + part].contiguous(), None, "add")
    return y[:rows]


def _part(terms: int) -> int:
    """How many terms a product that is cut adds at a time: equal parts of whole vectors."""
    return -(-terms // (16 * -(-terms // CHAIN))) * 16


def linear(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    if by_onednn(x, weight):
        return _onednn(x, weight, bias)
    rows, columns = x.shape[0], weight.shape[0]
    if rows >= SOME_ROWS and not multiplies(x.dtype):
        return linear(x.float(), weight.float(), bias.float()).to(x.dtype)
    few = rows in (FEW_ON_INTEL if "GenuineIntel" in vendor() else FEW_ROWS) and columns > 0 and columns % BLOCKS == 0
    if not (few and x.dtype is torch.float32 and weight.is_contiguous()):
        return F.linear(x, weight, bias)
    blocks = weight.view(BLOCKS, columns // BLOCKS, -1)
    y = torch.bmm(x.expand(BLOCKS, -1, -1), blocks.mT)  # [blocks, rows, columns / blocks]
    out = x.new_empty(rows, columns)
    torch.add(y.transpose(0, 1), bias.view(BLOCKS, -1), out=out.view(rows, BLOCKS, -1))
    return out


def bias_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str = "gelu", cu_seqlens: Tensor | None = None
) -> Tensor:
    if by_onednn(x, weight) and x.shape[1] <= CHAIN:
        return _onednn(x, weight, bias, *ONEDNN_ACTIVATIONS[activation])
    return activate_(linear(x, weight, bias), activation)


def feed_forward(x: Tensor, w_1: Tensor, b_1: Tensor, w_2: Tensor, b_2: Tensor, activation: str) -> Tensor:
    """linear(bias_gelu(x, w_1, b_1), w_2, b_2) with the same bits: [rows, dim] -> [rows, dim].

    Where the second product is cut, see `CHAIN`, so is the first: columns of its whole result would be copied.
    """
    hidden = w_1.shape[0]
    if hidden <= CHAIN or w_1.shape[1] > CHAIN or not (by_onednn(x, w_1) and by_onednn(x, w_2)):
        return linear(bias_gelu(x, w_1, b_1, activation), w_2, b_2)
    product, rows = torch.ops.mkldnn._linear_pointwise, x.shape[0]
    x, y, (name, algorithm) = _widened(x), None, ONEDNN_ACTIVATIONS[activation]
    # contiguous, for oneDNN goes by no stride of a bias
    for first, second, bias in zip(*_pieces(w_1, w_2), b_1.contiguous().split(_part(hidden)), strict=True):
        h = product(x, _laid_out(first), bias, name, [], algorithm)  # [rows, part]
        w = _laid_out(second)
        y = product(h, w, b_2.contiguous(), "none", [], "") if y is None else product.binary(h, y, w, None, "add")
    assert y is not None
    return y[:rows]


def _pieces(w_1: Tensor, w_2: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """[hidden, dim], [dim, hidden] -> the parts that `feed_forward` multiplies with, [part, dim] and [dim, part]"""
    part = _part(w_1.shape[0])
    return w_1.split(part), w_2.split(part, dim=1)


# Weights in oneDNN's own layout: 1.03 to 1.06 times as quick from 512 rows on, with the same bits, and as much memory
# again. They would miss what is written to the weights, so they are made anew for each run of many tokens, and only the
# threads of that run have them.
_run = threading.local()


def prepare(blocks: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Prepared:
    """For `using`. blocks: float32 (w_qkv, w_out, w_1, w_2) each. Nothing where oneDNN does not multiply."""
    found: Prepared = {}
    if why_not_onednn() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return found
    for w_qkv, w_out, w_1, w_2 in blocks:
        cut = w_1.shape[0] > CHAIN
        for weight in (w_qkv, w_out, *chain(*_pieces(w_1, w_2))) if cut else (w_qkv, w_out, w_1, w_2):
            if 0 < weight.shape[1] <= CHAIN and weight.shape[0] and weight.layout is torch.strided:
                laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), LAID_OUT_FOR)
                # with the weight's memory, or another could come to lie where it was
                found[_key(weight)] = laid_out, weight.detach()
    return found


def _key(weight: Tensor) -> tuple[int, ...]:
    return weight.data_ptr(), *weight.shape, *weight.stride()


def using(prepared: Prepared, run: Callable[[], Found]) -> Found:
    """run(), whose products in this thread take these weights where they are asked for the ones that they were made of.

    No context manager, in which an interrupt could come between a call and its clean-up.
    """
    before = getattr(_run, "prepared", None)
    try:
        _run.prepared = prepared
        return run()
    finally:
        _run.prepared = before


def _laid_out(weight: Tensor) -> Tensor:
    prepared = getattr(_run, "prepared", None)
    found = prepared.get(_key(weight)) if prepared else None
    return weight.contiguous() if found is None else found[0]


def activate_(h: Tensor, activation: str) -> Tensor:
    """reference.ACTIVATIONS[activation] in place."""
    if activation == "gelu":
        return torch.ops.aten.gelu_(h)
    if activation == "gelu_new":
        return torch.ops.aten.gelu_(h, approximate="tanh")
    return F.relu_(h) if activation == "relu" else F.silu(h, inplace=True)


def pool(x: Tensor, cu_seqlens: Tensor, mode: str = "mean", normalize: bool = False) -> Tensor:
    """The mean of one text alone, as a query is, in fewer steps; else the definition."""
    if mode != "mean" or len(cu_seqlens) != 2 or x.dtype not in (torch.float32, torch.float64):
        return reference.pool(x, cu_seqlens, mode, normalize)
    live = int(cu_seqlens[-1])
    if not 0 < live <= len(x):
        return reference.pool(x, cu_seqlens, mode, normalize)
    out = x[:live].mean(0, keepdim=True)
    return F.normalize(out, dim=-1) if normalize else out


def attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_heads: int, head_scale: Tensor | None = None
) -> Tensor:
    return attend(qkv, cu_seqlens.tolist(), num_heads, head_scale)


def attend(qkv: Tensor, starts: list[int], num_heads: int, head_scale: Tensor | None = None) -> Tensor:
    """Sequences of one length are a batch, so that nothing is padded; rows are copied unless they are neighbours, as
    those of sorted texts are. starts: cu_seqlens."""
    total, dim = qkv.shape[0], qkv.shape[1] // 3
    out = qkv.new_empty(grid(total), dim)[:total]
    if starts == [0, total] and total and num_heads * total * total <= SCORE_ELEMENTS and qkv.dtype is torch.float32:
        # a query alone, in fewer steps: they are what takes its time. q, k, v: [heads, L, head_size]
        q, k, v = qkv.view(total, 3, num_heads, -1).permute(1, 2, 0, 3).unbind()
        o = _attend_alone(q, k, v)
        o = o if head_scale is None else o * head_scale.to(o.dtype)[:, None, None]
        out.view(total, num_heads, -1).transpose(0, 1).copy_(o)
        return out
    attend_to: Callable[[Tensor, Tensor, Tensor], Tensor] = _attend
    amx = qkv.dtype is torch.bfloat16 and has("amx_tile") and torch.backends.cuda.flash_sdp_enabled()  # CPU's, too
    if amx and bool(qkv[: starts[-1]].sum().isfinite()):  # it would make numbers of infinities
        attend_to = F.scaled_dot_product_attention  # 1.2 to 3.2 times as quick at 2,048 rows
    else:  # half precision through float32: without AMX torch's kernel is slower up to 64 tokens
        qkv = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    of_length: dict[int, list[int]] = {}
    for start, end in pairwise(starts):
        of_length.setdefault(end - start, []).append(start)
    of_length.pop(0, None)
    for length, at in of_length.items():
        n = max(1, SCORE_ELEMENTS // (num_heads * length * max(length, LANES)))  # sequences at a time,
        m = length if n > 1 else max(16, SCORE_ELEMENTS // (num_heads * length))  # or queries of one
        for i in range(0, len(at), n):
            first, count = at[i], len(at[i : i + n])
            rows = None
            if at[i + count - 1] != first + (count - 1) * length:  # others lie between them
                rows = (torch.tensor(at[i : i + n])[:, None] + torch.arange(length)).flatten()
            here = qkv[first : first + count * length] if rows is None else qkv.index_select(0, rows)
            # [n, L, 3, heads, head_size] -> q, k, v, each [n, heads, L, head_size]
            q, k, v = here.view(count, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind()
            part = out[first : first + count * length] if rows is None else out.new_empty(count * length, dim)
            where = part.view(count, length, num_heads, -1).transpose(1, 2)
            for j in range(0, length, m):
                o = attend_to(q[:, :, j : j + m], k, v)  # [n, heads, m, head_size]
                where[:, :, j : j + m] = o if head_scale is None else o * head_scale.to(o.dtype)[:, None, None]
            if rows is not None:
                out.index_copy_(0, rows, part)
    if starts[-1] < total:
        out[starts[-1] :] = 0
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[n, heads, m, d], [n, heads, L, d] x 2 -> [n, heads, m, d], looping over the shorter of n and heads so that
    nothing is copied. Nearer to exact arithmetic than scaled_dot_product_attention, which is quicker."""
    n, heads, m, d = q.shape
    if n == 1:
        return _attend_alone(q[0], k[0], v[0])[None]
    axis = 0 if n < heads else 1
    scores = q.new_empty(*((n, heads) if axis == 0 else (heads, n)), m, k.shape[2])
    out = q.new_empty(*scores.shape[:3], d)
    for i, (qi, ki) in enumerate(zip(q.unbind(axis), k.unbind(axis), strict=True)):
        torch.baddbmm(scores[i], qi, ki.mT, beta=0, alpha=d**-0.5, out=scores[i])
    softmax_(scores)
    for i, vi in enumerate(v.unbind(axis)):
        torch.bmm(scores[i], vi, out=out[i])
    return out if axis == 0 else out.transpose(0, 1)


def _attend_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [heads, m, d], [heads, L, d] x 2 -> [heads, m, d]
    scores = q.new_empty(q.shape[0], q.shape[1], k.shape[1])
    torch.baddbmm(scores, q, k.mT, beta=0, alpha=q.shape[2] ** -0.5, out=scores)
    return torch.bmm(softmax_(scores), v)


def softmax_(scores: Tensor) -> Tensor:
    """softmax over the last dimension, in place."""
    columns = scores.shape[-1]
    if columns < 3 or columns >= LANES or scores.numel() < WORTH_WIDENING:
        return torch.softmax(scores, -1, out=scores)
    wide = scores.new_full((*scores.shape[:-1], LANES), -torch.inf)
    wide[..., :columns] = scores
    return scores.copy_(torch.softmax(wide, -1, out=wide)[..., :columns])
