"""The public ops: check the arguments, then dispatch. The only door between the modules and the kernels.

Rows are packed: sequence `b` owns rows `cu_seqlens[b] : cu_seqlens[b + 1]` of `[rows, dim]`, and rows from
`cu_seqlens[-1]` on are dead. Row-wise ops take `cu_seqlens` only for that live count; leave it out when every row is
live. `cu_seqlens` is int32 `[batch + 1]` on the rows' device and its values are never read back to the host on CUDA.

When a gradient or a transform of torch.func is asked for, the differentiable definition in `reference.py` runs
instead of the registered op.
A model's inference that nothing looks into goes around both, see `is_unseen`.
Wrong arguments raise ValueError or TypeError naming the argument.
"""

import functools
import importlib
import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as _every_module

from fastdistil import cpu, reference
from fastdistil._register import FORMS, by_autocast, can_look, is_exported_to_onnx, is_one_of, is_transformed, register
from fastdistil.kernels import _configs, _target

ACTIVATIONS = tuple(reference.ACTIVATIONS)
POOLING = ("mean", "cls")
MAX_HEAD_SIZE = 128


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
    """LayerNorm(word_embeddings[input_ids] + position_embeddings[position_ids]) -> [rows, dim].

    input_ids, position_ids: int32 or int64 [rows]. word_embeddings: [vocab, dim]. position_embeddings:
    [positions, dim]. weight, bias: [dim]. An index outside its table raises ValueError on CPU and gives a NaN row on
    CUDA. Source: `Embeddings` in HF's modeling_distilbert.py, Layer Normalization (Ba et al., 2016).
    """
    for name, ids in (("input_ids", input_ids), ("position_ids", position_ids)):
        if not isinstance(ids, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(ids).__name__}")
        if ids.dim() != 1 or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{name} must be int32 or int64 of shape [rows], got {ids.dtype} {list(ids.shape)}")
    if input_ids.shape != position_ids.shape:
        raise ValueError(f"{len(input_ids)} input_ids but {len(position_ids)} position_ids")
    _check_eps(eps)
    _check_tensors(word_embeddings=word_embeddings, position_embeddings=position_embeddings, weight=weight, bias=bias)
    if (
        word_embeddings.shape[1:] != position_embeddings.shape[1:]
        or word_embeddings.shape[1:] != weight.shape
        or (weight.dim() != 1 or bias.shape != weight.shape)
    ):
        raise ValueError(
            f"word_embeddings {list(word_embeddings.shape)}, position_embeddings {list(position_embeddings.shape)}, "
            f"weight {list(weight.shape)} and bias {list(bias.shape)} do not share one dim"
        )
    if position_ids.device != input_ids.device or word_embeddings.device != input_ids.device:
        raise ValueError(
            f"input_ids are on {input_ids.device}, position_ids on {position_ids.device}, word_embeddings on "
            f"{word_embeddings.device}; move them to one device"
        )
    _check_dtypes(word_embeddings, position_embeddings, weight, bias)
    _check_live(cu_seqlens, word_embeddings)
    args = (input_ids, position_ids, word_embeddings, position_embeddings, weight, bias, eps, cu_seqlens)
    if _wants_grad(word_embeddings, position_embeddings, weight, bias):
        if can_look(input_ids.device):
            live = len(input_ids) if cu_seqlens is None else int(cu_seqlens[-1])
            cpu.check_inside("input_ids", input_ids[:live], word_embeddings)
            cpu.check_inside("position_ids", position_ids[:live], position_embeddings)
        words, positions, weight, bias = _cast("float32", word_embeddings, position_embeddings, weight, bias)
        return reference.embed_layer_norm(input_ids, position_ids, words, positions, weight, bias, eps, cu_seqlens)
    return _embed_layer_norm(*args)


def qkv_projection(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Query, key and value in one GEMM: [rows, dim] @ [3 * dim, dim].T + [3 * dim] -> [rows, 3 * dim].

    Source: the fused projection of FasterTransformer and FlashAttention's packed layout; equals HF's q_lin, k_lin
    and v_lin side by side.
    """
    _check_linear(x, weight, bias, cu_seqlens)
    if weight.shape[0] % 3:
        raise ValueError(f"weight has {weight.shape[0]} rows, which is not query, key and value of one width")
    if _wants_grad(x, weight, bias):
        return reference.qkv_projection(x, weight, bias, cu_seqlens)
    return _qkv_projection(x, weight, bias, cu_seqlens)


def linear(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """[rows, in] @ [out, in].T + [out] -> [rows, out]."""
    _check_linear(x, weight, bias, cu_seqlens)
    if _wants_grad(x, weight, bias):
        return reference.linear(x, weight, bias, cu_seqlens)
    return _linear(x, weight, bias, cu_seqlens)


def bias_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str = "gelu", cu_seqlens: Tensor | None = None
) -> Tensor:
    """activation([rows, in] @ [out, in].T + [out]) -> [rows, out].

    activation: gelu (exact, erf; Hendrycks and Gimpel, 2016), gelu_new (tanh form), relu or silu.
    """
    _check_linear(x, weight, bias, cu_seqlens)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if _wants_grad(x, weight, bias):
        return reference.bias_gelu(x, weight, bias, activation, cu_seqlens)
    return _bias_gelu(x, weight, bias, activation, cu_seqlens)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, cu_seqlens: Tensor | None = None
) -> Tensor:
    """LayerNorm(x + residual) over the last dimension -> [rows, dim]. x, residual: [rows, dim]; weight, bias: [dim]."""
    _check_tensors(x=x, residual=residual, weight=weight, bias=bias)
    _check_eps(eps)
    if x.dim() != 2 or x.shape != residual.shape or x.shape[1:] != weight.shape or weight.shape != bias.shape:
        raise ValueError(
            f"x {list(x.shape)} and residual {list(residual.shape)} must be [rows, dim], "
            f"weight {list(weight.shape)} and bias {list(bias.shape)} [dim]"
        )
    _check_dtypes(x, residual, weight, bias)
    _check_live(cu_seqlens, x)
    if _wants_grad(x, residual, weight, bias):
        x, residual, weight, bias = _cast("float32", x, residual, weight, bias)
        return reference.add_layer_norm(x, residual, weight, bias, eps, cu_seqlens)
    return _add_layer_norm(x, residual, weight, bias, eps, cu_seqlens)


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
    """LayerNorm(x @ weight.T + bias + residual) over the last dimension -> [rows, dim], what ends each half of a block.

    x: [rows, in]; residual: [rows, dim]; weight: [dim, in]; bias, norm_weight, norm_bias: [dim]. Of few rows on a GPU
    several programs share a product's depth (split-K), and the LayerNorm adds up their sums.
    """
    _check_linear(x, weight, bias, cu_seqlens)
    _check_tensors(residual=residual, norm_weight=norm_weight, norm_bias=norm_bias)
    _check_eps(eps)
    rows, dim = x.shape[0], weight.shape[0]
    if residual.shape != (rows, dim):
        raise ValueError(f"residual must be [{rows}, {dim}] as x @ weight.T is, got {list(residual.shape)}")
    if not norm_weight.shape == norm_bias.shape == bias.shape:
        raise ValueError(
            f"norm_weight {list(norm_weight.shape)} and norm_bias {list(norm_bias.shape)} must be [{dim}] as x @ "
            "weight.T is wide"
        )
    _check_dtypes(x, residual, norm_weight, norm_bias)
    if _wants_grad(x, residual, weight, bias, norm_weight, norm_bias):
        y = reference.linear(x, weight, bias, cu_seqlens)
        y, residual, norm_weight, norm_bias = _cast("float32", y, residual, norm_weight, norm_bias)
        return reference.add_layer_norm(y, residual, norm_weight, norm_bias, eps, cu_seqlens)
    return _linear_add_layer_norm(x, residual, weight, bias, norm_weight, norm_bias, eps, cu_seqlens)


def attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_heads: int, head_scale: Tensor | None = None
) -> Tensor:
    """Self-attention within each packed sequence: [rows, 3 * dim] -> [rows, dim].

    cu_seqlens: int32 [batch + 1], from 0, never falling. max_seqlen: a host integer that no sequence exceeds.
    num_heads divides dim; head size at most 128. head_scale: [num_heads], multiplies each head's output (HF v4's
    head_mask). A sequence may be empty. Source: Attention Is All You Need (Vaswani et al., 2017); the variable-length
    layout is FlashAttention's (Dao et al., 2022).
    """
    _check_tensors(qkv=qkv, cu_seqlens=cu_seqlens)
    if qkv.dim() != 2 or qkv.shape[1] % 3:
        raise ValueError(f"qkv must be [rows, 3 * dim], got {list(qkv.shape)}")
    dim = qkv.shape[1] // 3
    for name, number in (("num_heads", num_heads), ("max_seqlen", max_seqlen)):
        if not isinstance(number, (int, torch.SymInt, Tensor)):  # a trace makes tensors of sizes
            raise TypeError(f"{name} must be an integer, got {number!r}")
    if num_heads < 1 or dim < 1 or dim % num_heads:
        raise ValueError(f"num_heads {num_heads} does not divide dim {dim}")
    if dim // num_heads > MAX_HEAD_SIZE:
        raise ValueError(f"head size {dim // num_heads} is above {MAX_HEAD_SIZE}, the largest supported")
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen is {max_seqlen}")
    if head_scale is not None:
        _check_tensors(head_scale=head_scale)
    if head_scale is not None and head_scale.shape != (num_heads,):
        raise ValueError(f"head_scale must be [{num_heads}], got {list(head_scale.shape)}")
    check_cu_seqlens(cu_seqlens, qkv, max_seqlen)
    _check_dtypes(qkv)
    if head_scale is not None and head_scale.device != qkv.device:
        raise ValueError(f"the rows are on {qkv.device}, head_scale is on {head_scale.device}; move it")
    if _wants_grad(qkv, head_scale):
        qkv, head_scale = _cast("compute", qkv, head_scale)
        return reference.attention(qkv, cu_seqlens, max_seqlen, num_heads, head_scale)
    return _attention(qkv, cu_seqlens, max_seqlen, num_heads, head_scale)


def pool(x: Tensor, cu_seqlens: Tensor, mode: str = "mean", normalize: bool = False) -> Tensor:
    """One vector a sequence: [rows, dim] -> [batch, dim], float32 (float64 for float64 rows).

    mode: mean over the sequence's rows, or cls, its first row; normalize divides by the L2 norm. An empty sequence
    gives zeros. Source: Sentence-BERT (Reimers and Gurevych, 2019).
    """
    if mode not in POOLING:
        raise ValueError(f"mode {mode!r} is not one of {', '.join(POOLING)}")
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize must be true or false, got {normalize!r}")
    _check_tensors(x=x, cu_seqlens=cu_seqlens)
    if x.dim() != 2:
        raise ValueError(f"x must be [rows, dim], got {list(x.shape)}")
    check_cu_seqlens(cu_seqlens, x)
    _check_dtypes(x)
    if _wants_grad(x):
        return reference.pool(x, cu_seqlens, mode, normalize)
    return _pool(x, cu_seqlens, mode, normalize)


def pack(
    keep: Tensor, input_ids: Tensor | None = None, position_ids: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Where the real tokens of a padded batch are packed -> cu_seqlens, source, target, row_ids, row_positions.

    keep: bool [batch, length], True at real tokens, wherever they lie. input_ids: int32 or int64 [batch, length];
    position_ids: int32 or int64 [1 or batch, length].
    cu_seqlens: int32 [batch + 1]. source: int64 [batch * length], the flat padded position of each row, 0 for dead
    rows. target: int64 [batch * length], the row of each padded position, -1 where padded. row_ids, row_positions:
    [batch * length], the rows' ids and positions, 0 for dead rows; of what is not given, empty. Source: the unpadding
    of ByteTransformer (Zhai et al., 2023).
    """
    _check_tensors(keep=keep)
    if keep.dim() != 2 or keep.dtype is not torch.bool:
        raise ValueError(f"keep must be bool [batch, length], got {keep.dtype} {list(keep.shape)}")
    shapes = (tuple(keep.shape), (1, keep.shape[1]))
    for name, given, fits in (("input_ids", input_ids, shapes[:1]), ("position_ids", position_ids, shapes)):
        if given is None:
            continue
        _check_tensors(**{name: given})
        if not is_one_of(given.shape, *fits) or given.dtype not in (torch.int64, torch.int32):
            wanted = " or ".join(str(list(shape)) for shape in fits)
            raise ValueError(f"{name} must be int32 or int64 {wanted}, got {given.dtype} {list(given.shape)}")
        if given.device != keep.device:
            raise ValueError(f"keep is on {keep.device}, {name} on {given.device}; move one of them")
    return (reference.pack if _wants_grad() else _pack)(keep, input_ids, position_ids)


def unpack(rows: Tensor, target: Tensor, fill: Tensor | None = None) -> Tensor:
    """Packed rows in their padded places: [rows, dim] -> [batch * length, dim].

    target: int64 [batch * length], the row of each place, -1 for none: as `pack` gives it; it is not looked at. fill:
    [1, dim], what such a place gets, by default 0.
    """
    _check_tensors(rows=rows, target=target)
    if rows.dim() != 2:
        raise ValueError(f"rows must be [rows, dim], got {list(rows.shape)}")
    if target.dim() != 1 or target.dtype is not torch.int64:
        raise ValueError(f"target must be int64 [batch * length], got {target.dtype} {list(target.shape)}")
    if target.device != rows.device:
        raise ValueError(f"the rows are on {rows.device}, target is on {target.device}; move one of them")
    if fill is not None:
        _check_tensors(fill=fill)
        if fill.shape != (1, rows.shape[1]):
            raise ValueError(f"fill must be [1, {rows.shape[1]}], got {list(fill.shape)}")
        _check_dtypes(rows, fill)
        fill = fill.to(rows.dtype)
    return (reference.unpack if _wants_grad(rows, fill) else _unpack)(rows, target, fill)


def set_exact_gelu(on: bool) -> None:
    """Whether the kernels compute gelu by erf in half precision too, with about 1.5 times the instructions.

    Off by default: float16 and bfloat16 then use a form of it with a relative error of 3.4e-5, less than they resolve.
    float32 always uses erf. Holds for the whole process; CPU is not affected.
    """
    _configs.modes.exact_gelu = bool(on)


def set_batch_invariant(on: bool) -> None:
    """Whether a text's result on a GPU has the same bits alone and in any batch.

    Each kernel then has one configuration, whatever the batch's size, and attention gives every sequence tiles of its
    own; what that costs was not measured yet. Off by default. Holds for the whole process; on CPU bits may differ with
    the batch.
    """
    _configs.modes.batch_invariant = bool(on)


def why_eager(device: torch.device) -> str | None:
    """Why the ops run eager torch on a device, in words, or None where they run Triton kernels."""
    return _target.why_not(device)


def launch_modes() -> tuple:
    """What decides, beside the arguments, which kernels run: a captured graph has it fixed inside."""
    modes, library = _configs.modes, torch.backends.cuda.matmul
    return (
        *(modes.exact_gelu, modes.batch_invariant, modes.overlap, library.fp32_precision),
        *(library.allow_fp16_reduced_precision_reduction, library.allow_bf16_reduced_precision_reduction),
    )


def _check_eps(eps: float) -> None:
    if not isinstance(eps, (float, int)):
        raise TypeError(f"eps must be a number, got {eps!r}")


def _wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd, forward-mode differentiation, a transform of torch.func or torch.onnx has to see the steps
    inside."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    return forward_ad._current_level >= 0 or is_transformed() or is_exported_to_onnx()


def is_unseen(device: torch.device) -> bool:
    """Whether a call is inference that nothing looks into: no compiler, transform, gradient, autocast, mode, profiler
    or hook on every module. Then an op's form may be called as it is, without its checks and dispatch, and without what
    somebody has patched or registered in the op's place: on CPU that of `cpu`, and where `runs_kernels` a kernel's."""
    return (
        device.type in ("cpu", "cuda")
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and not is_transformed()
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled(device.type)
        and not torch.jit.is_tracing()
        and not torch._C._autograd._profiler_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not (_every_module._global_forward_hooks or _every_module._global_forward_pre_hooks)
    )


def runs_kernels(device: torch.device) -> bool:
    """Whether the ops launch kernels on a device."""
    return _target.why_not(device) is None


def _cast(kind: str, *tensors: Tensor | None) -> list[Any]:
    """As autocast, where it is on, casts them for the registered op; for the definition, which does not know it."""
    device = next(t for t in tensors if t is not None).device.type
    on = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    return by_autocast(kind, device, *tensors) if on else list(tensors)


def _check_tensors(**given: Tensor) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor | None) -> None:
    _check_tensors(x=x, weight=weight, bias=bias)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"x {list(x.shape)} must be [rows, in], weight {list(weight.shape)} [out, in], "
            f"bias {list(bias.shape)} [out]"
        )
    _check_dtypes(x, weight, bias)
    _check_live(cu_seqlens, x)


def _check_dtypes(x: Tensor, *others: Tensor) -> None:
    dtype, device = x.dtype, x.device
    if not dtype.is_floating_point:
        raise ValueError(f"the rows must be floating point, got {dtype}")
    for t in others:  # of what is checked at every launch, a generator would be the slowest part
        if t.dtype is not dtype or t.device != device:
            break
    else:
        return
    if any(t.device != device for t in others):
        where = ", ".join(sorted({str(t.device) for t in others}))
        raise ValueError(f"one argument is on {device}, others are on {where}; move them to one device")
    # autocast casts all but float64
    if torch.float64 in {dtype, *(t.dtype for t in others)} or not torch.is_autocast_enabled(device.type):
        raise ValueError(f"the rows are {dtype}, the weights {', '.join(str(t.dtype) for t in others)}; cast one side")


def _check_live(cu_seqlens: Tensor | None, x: Tensor) -> None:
    """cu_seqlens of a row-wise op, of which only the last value is read; a value is looked at on CPU only."""
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be an int32 tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype is not torch.int32 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must be int32 [batch + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, the rows are on {x.device}")


def check_cu_seqlens(cu_seqlens: Tensor, rows: Tensor, max_seqlen: int | None = None) -> None:
    """Raise ValueError unless cu_seqlens fits the rows; its values are looked at on CPU only."""
    _check_live(cu_seqlens, rows)
    if not can_look(rows.device) or type(cu_seqlens) is not Tensor:
        return  # reading values back would stall the device
    starts = cu_seqlens.tolist()
    lengths = [b - a for a, b in pairwise(starts)]
    if starts[0] != 0 or min(lengths, default=0) < 0 or starts[-1] > rows.shape[0]:
        raise ValueError(f"cu_seqlens must rise from 0 to at most the {rows.shape[0]} rows, got {str(starts)[:80]}")
    if max_seqlen is not None and max(lengths, default=0) > max_seqlen:
        raise ValueError(f"max_seqlen is {max_seqlen}, but a sequence is {max(lengths)} long")


def _rows_by(x: Tensor, columns: int | torch.SymInt) -> Tensor:
    return x.new_empty(x.shape[0], columns)


KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST_ROW = 16_384  # the row kernels hold a whole row in registers


def _op(
    definition: Callable[..., Any],
    module: str,
    *,
    fake: Callable[..., Any],
    cpu: Callable[..., Any],
    autocast: str | Callable[..., Any] | None,
    like: int = 0,
    widest: float = math.inf,
    dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES,
) -> Callable[..., Any]:
    """Register an op whose kernel is the function of the same name in kernels/<module>.py.

    like: the argument whose dtype (one of `dtypes`), width (at most `widest`) and device say whether the kernel can
    run; where it cannot, the definition does. Under Triton's interpreter the kernel is also the CPU form.
    """
    launch: Callable[..., Any] | None = None

    def kernel(*args):
        nonlocal launch
        x = args[like]
        if x.dtype not in dtypes or x.shape[-1] > widest or not _can_run(x.device):
            return definition(*args)
        if launch is None:  # Triton is imported only where it is used
            launch = getattr(importlib.import_module(f"fastdistil.kernels.{module}"), definition.__name__)
        if x.is_cuda and x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):  # Triton launches on the current device, whatever the tensors' is
                return launch(*args)
        return launch(*args)

    kernel.__module__ = f"fastdistil.kernels.{module}"
    cpu = kernel if _target.interpreted() else cpu
    return register(definition, fake=fake, cpu=cpu, cuda=kernel, autocast=autocast)


@functools.cache
def _can_run(device: torch.device) -> bool:
    reason = _target.why_not(device)
    if reason:
        warnings.warn(f"fastdistil runs eager torch on {device}: {reason}", stacklevel=2)
    return reason is None


_embed_layer_norm = _op(
    reference.embed_layer_norm,
    "layer_norm",
    fake=lambda i, p, words, *a, **k: words.new_empty(i.shape[0], words.shape[1]),
    cpu=cpu.live_only(cpu.embed_layer_norm, 2),
    like=2,
    widest=WIDEST_ROW,
    autocast="float32",
)
_qkv_projection = _op(
    reference.qkv_projection,
    "qkv_projection",
    fake=lambda x, w, *a, **k: _rows_by(x, w.shape[0]),
    cpu=cpu.live_only(cpu.linear, 1),
    autocast="compute",
)
_linear = _op(
    reference.linear,
    "linear",
    fake=lambda x, w, *a, **k: _rows_by(x, w.shape[0]),
    cpu=cpu.live_only(cpu.linear, 1),
    autocast="compute",
)
_bias_gelu = _op(
    reference.bias_gelu,
    "bias_gelu",
    fake=lambda x, w, *a, **k: _rows_by(x, w.shape[0]),
    cpu=cpu.live_only(cpu.bias_gelu, 1),
    autocast="compute",
)
_add_layer_norm = _op(
    reference.add_layer_norm,
    "layer_norm",
    fake=lambda x, *a, **k: _rows_by(x, x.shape[1]),
    cpu=cpu.live_only(cpu.add_layer_norm, 2),
    widest=WIDEST_ROW,
    autocast="float32",
)


def _one_after_the_other(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """linear_add_layer_norm by the two ops, which autocast casts differently."""
    return _add_layer_norm(_linear(x, weight, bias, cu_seqlens), residual, norm_weight, norm_bias, eps, cu_seqlens)


_linear_add_layer_norm = _op(
    reference.linear_add_layer_norm,
    "linear_add_layer_norm",
    fake=lambda x, residual, *a, **k: _rows_by(residual, residual.shape[1]),
    cpu=cpu.live_only(cpu.linear_add_layer_norm, 2),
    like=1,
    widest=WIDEST_ROW,
    autocast=_one_after_the_other,
)
_attention = _op(
    reference.attention,
    "attention",
    fake=lambda qkv, *a, **k: _rows_by(qkv, qkv.shape[1] // 3),
    cpu=cpu.attention,
    autocast="compute",
)
_pool = _op(
    reference.pool,
    "pooling",
    fake=lambda x, c, *a, **k: x.new_empty(
        c.shape[0] - 1, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32)
    ),
    cpu=cpu.pool,
    widest=WIDEST_ROW,
    autocast="float32",
)


def _packed_like(keep: Tensor, *given: Tensor | None) -> tuple[Tensor, ...]:
    n = keep.shape[0] * keep.shape[1]
    of_rows = [keep.new_empty(0 if t is None else n, dtype=torch.int64 if t is None else t.dtype) for t in given]
    of_rows += [keep.new_empty(0, dtype=torch.int64) for _ in range(2 - len(given))]  # defaults are left out
    source, target = (keep.new_empty(n, dtype=torch.int64) for _ in range(2))
    return (keep.new_empty(keep.shape[0] + 1, dtype=torch.int32), source, target, *of_rows)


_pack = _op(
    reference.pack,
    "packing",
    fake=_packed_like,
    cpu=reference.pack,
    dtypes=(torch.bool,),
    autocast=None,
)
_unpack = _op(
    reference.unpack,
    "packing",
    fake=lambda rows, target, *a, **k: rows.new_empty(target.shape[0], rows.shape[1]),
    cpu=reference.unpack,
    autocast=None,
)

kernel_forms: Any = SimpleNamespace(**{name: forms["cuda"] for name, forms in FORMS.items()})  # see `is_unseen`
