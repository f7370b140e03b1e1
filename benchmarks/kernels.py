"""Each op at each shape: ours beside its peers, equality first, then time.

    python -m benchmarks kernels [--toy] [--ops attention,pool] [--dtypes bfloat16] [--out FILE] [--minutes N]

A peer is one function under `@provider`: it gets a Case and gives back a call without arguments that computes the op
on what case.args hold then, for the rows are changed in place between calls.
What it computes is held to the error law against float64; where it does not hold there is no speed, and the run fails.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import record, roofline, shapes, timing
from benchmarks.roofline import Op
from benchmarks.shapes import FORMS, Matrix
from fastdistil import cpu, ops, reference
from fastdistil.kernels import _configs
from fastdistil.testing import cu_seqlens, error_law

TELLING_ROWS = 4_096  # from which on goals are about an op
COMPILED = (16_896, 5_632, 1_024, 64)  # rows at which torch.compile takes part
NOISY = 0.5  # an interquartile range of so much of the median casts doubt on a ratio
Item = TypeVar("Item")
KEPT = 64  # samples of a timing that a result file keeps
GEMMS = ("qkv_projection", "bias_gelu", "linear_add_layer_norm", "linear")
ROWS = ("add_layer_norm", "embed_layer_norm")
PLACING = ("pack", "unpack")
TUNED = (*GEMMS, "attention", *ROWS, "pool")
OPS = (*TUNED, *PLACING)
SELF_CONTAINED = ("attention", "pool", *PLACING)  # they are not told of a live count beside their arguments


@dataclass(frozen=True)
class Case:
    """An op, its arguments, and what it costs. lengths: of the sequences, where the op knows them. among: the dtype
    whose results it is shown with, where it has none of its own."""

    op: str
    name: str
    args: tuple[Any, ...]
    cost: Op
    cu_seqlens: Tensor
    lengths: tuple[int, ...] = ()
    among: torch.dtype | None = None

    @property
    def rows(self) -> Tensor:
        return next((a for a in self.args if isinstance(a, Tensor) and a.is_floating_point()), self.args[0])

    @property
    def weight(self) -> Tensor:
        """Of a matrix product: [out, in]"""
        return self.args[2 if self.op == "linear_add_layer_norm" else 1]

    @property
    def dtype(self) -> torch.dtype:
        return self.among or self.rows.dtype

    @property
    def device(self) -> torch.device:
        return self.rows.device


NO_TIME = "no time was left"


class Missing(Exception):
    """Why a provider cannot run here: it is listed with the reason."""


Make = Callable[[Case, ExitStack], timing.Run]
PROVIDERS: dict[str, list[tuple[str, Make]]] = {}


def provider(name: str, *names: str) -> Callable[[Any], Any]:
    """Registers (case, stack) -> a call for the ops named. What it enters on the stack holds while it is timed."""

    def register(function: Any) -> Any:
        for op in names:
            PROVIDERS.setdefault(op, []).append((name, function))
        return function

    return register


# --- providers --------------------------------------------------------------------------------------------------------


@provider("fastdistil", *OPS)
def ours(case: Case, stack: ExitStack) -> timing.Run:
    op = getattr(ops, case.op)
    args = case.args if case.op in SELF_CONTAINED else (*case.args, case.cu_seqlens)  # as the encoder calls it
    return lambda: op(*args)


@provider("fastdistil, exact gelu", "bias_gelu")
def ours_exact(case: Case, stack: ExitStack) -> timing.Run:
    if case.dtype is torch.float32:
        raise Missing("float32 is always exact")
    stack.enter_context(patch.object(_configs.modes, "exact_gelu", True))
    return ours(case, stack)


@provider("fastdistil, pointer tiles", *GEMMS)
def ours_pointer(case: Case, stack: ExitStack) -> timing.Run:
    """The family without tensor descriptors, where the other one is what runs."""
    if case.device.type != "cuda":
        raise Missing("no kernel runs on CPU")
    real, config = _configs.gemm, _config_of(case)
    if not isinstance(config, _configs.Gemm) or config.family == "pointer":
        raise Missing("it runs anyway, or the library's product does")

    def pointer(op: str, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device, *_: Any, **__: Any) -> Any:
        return real(op, m, n, k, dtype, device, False)

    stack.enter_context(patch.object(_configs, "gemm", pointer))
    return ours(case, stack)


def _config_of(case: Case, whole: bool = False) -> _configs.Gemm | _configs.Library:
    n, k = case.weight.shape
    return _configs.gemm(case.op, len(case.rows), n, k, case.dtype, case.device, True, whole=whole).config


@provider("fastdistil, no row dead", *GEMMS)
def ours_whole(case: Case, stack: ExitStack) -> timing.Run:
    """As the encoder calls it where the host knows that every row is live: then the library's product can serve."""
    if case.device.type != "cuda":
        raise Missing("no kernel runs on CPU")
    if _config_of(case) == _config_of(case, whole=True):
        raise Missing("it is what runs anyway")
    op = getattr(ops, case.op)
    return lambda: op(*case.args)


def parts(case: Case, config: _configs.Gemm, processors: int) -> int:
    """How many programs share a tile's depth."""
    n, k = case.weight.shape
    return _configs.parts(config, len(case.rows), n, k, processors)


@provider("fastdistil, depth not shared", "linear_add_layer_norm")
def ours_whole_tiles(case: Case, stack: ExitStack) -> timing.Run:
    """A program a tile, where several share its depth."""
    if case.device.type != "cuda":
        raise Missing("no kernel runs on CPU")
    config = _config_of(case)
    if isinstance(config, _configs.Library) or parts(case, config, _configs.processors(case.device)) == 1:
        raise Missing("it is what runs anyway")
    stack.enter_context(patch.object(_configs, "parts", lambda *_: 1))
    return ours(case, stack)


def of_form(form: str) -> Make:
    """Our attention in another of its forms than the one that runs, where it can."""

    def run(case: Case, stack: ExitStack) -> timing.Run:
        if case.device.type != "cuda":
            raise Missing("no kernel runs on CPU")
        qkv, _, longest, heads = case.args
        head_size = qkv.shape[1] // 3 // heads
        if _configs.attention(longest, head_size, case.dtype, case.device).form == form:
            raise Missing("it is what runs anyway")
        class_ = _configs.attention_class(longest, head_size, case.dtype)
        serving = _configs.serving(*class_, _configs.architecture(case.device))
        config = next((c for c in serving if c.form == form), None)
        if config is None:
            raise Missing(f"there is no {form} form for {longest} tokens of head size {head_size}")
        stack.enter_context(patch.object(_configs, "attention", lambda *_: config))
        return ours(case, stack)

    return run


for _form in ("short", "single", "looped"):
    provider(f"fastdistil, {_form}", "attention")(of_form(_form))


@provider("eager torch", *OPS)
def eager(case: Case, stack: ExitStack) -> timing.Run:
    """cuBLAS, and torch's own kernel for each other step, as somebody would write it who checks nothing."""
    if case.op == "embed_layer_norm":
        ids, positions, words, places, weight, bias, eps = case.args
        return lambda: F.layer_norm(
            F.embedding(ids, words) + F.embedding(positions, places), weight.shape, weight, bias, eps
        )
    if case.op == "pool":
        x, cu, _, _ = case.args
        return lambda: _plain_pool(x, cu)
    definition = getattr(reference, case.op)
    return lambda: definition(*case.args)


def _plain_pool(x: Tensor, cu: Tensor) -> Tensor:
    lengths = cu.diff()
    sequence = torch.repeat_interleave(lengths, output_size=len(x))
    sums = x.new_zeros(len(lengths), x.shape[1], dtype=torch.float32).index_add_(0, sequence, x.float())
    return F.normalize(sums / lengths[:, None], dim=-1)


@provider("matrix product alone", "qkv_projection", "linear")
def product_alone(case: Case, stack: ExitStack) -> timing.Run:
    """cuBLAS through addmm into memory that is there: the least a library call takes."""
    x, weight, bias = case.args
    out = x.new_empty((x.shape[0], weight.shape[0]))
    return lambda: torch.addmm(bias, x, weight.T, out=out)


@provider("cuBLASLt, GELU epilogue", "bias_gelu")
def epilogue(case: Case, stack: ExitStack) -> timing.Run:
    """Bias and the tanh form of GELU within the product, as torch takes it from cuBLASLt."""
    if case.device.type != "cuda" or case.dtype is not torch.bfloat16:
        raise Missing("its GELU is the tanh form, which only bfloat16 cannot tell from erf, and for CUDA")
    x, weight, bias, _ = case.args
    return lambda: torch._addmm_activation(bias, x, weight.T, use_gelu=True)


@provider("torch.compile", *OPS)
def compiled(case: Case, stack: ExitStack) -> timing.Run:
    return _compile(case, stack, None)


@provider("torch.compile, max-autotune", *OPS)
def autotuned(case: Case, stack: ExitStack) -> timing.Run:
    return _compile(case, stack, "max-autotune-no-cudagraphs")


LATE = (compiled, autotuned)  # they compile for up to minutes, after all else


def _compile(case: Case, stack: ExitStack, mode: str | None) -> timing.Run:
    if case.op == "attention":
        raise Missing("of attention it calls SDPA, which is timed itself")
    if mode and case.op in ("pool", *PLACING):
        raise Missing("there is no matrix product to tune")
    if case.device.type != "cuda":
        raise Missing("compiled for CUDA only")
    rows = len(case.args[0])
    telling = case.name == "L=128, fixed" if case.op in SELF_CONTAINED else rows in COMPILED
    if case.dtype is not torch.bfloat16 or not telling:
        raise Missing(f"compiled in bfloat16 at {', '.join(map(str, COMPILED))} rows only: it takes long")
    if mode and rows != COMPILED[0]:
        raise Missing(f"tuned at {COMPILED[0]} rows only: it takes a minute a shape")
    stack.callback(torch._dynamo.reset)
    function = torch.compile(getattr(reference, case.op), mode=mode, dynamic=False)
    return lambda: function(*case.args)


def sdpa(backend: SDPBackend) -> Make:
    """On a padded batch that is there already; with a mask unless all sequences are of one length."""

    def run(case: Case, stack: ExitStack) -> timing.Run:
        if case.device.type != "cuda" and backend not in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
            raise Missing("for CUDA only")
        qkv, _, longest, heads = case.args
        live = torch.arange(longest, device=qkv.device) < torch.tensor(case.lengths, device=qkv.device)[:, None]
        even = bool(live.all())
        padded = qkv.new_zeros(*live.shape, qkv.shape[1])
        padded[live] = qkv
        q, k, v = (t.contiguous() for t in padded.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0))
        mask = None if even else live[:, None, None]
        if backend is SDPBackend.EFFICIENT_ATTENTION and case.dtype is torch.float32 and case.device.type == "cuda":
            raise Missing("float32 by three products of TF32, which err by more than its law")
        stack.enter_context(sdpa_kernel(backend))

        def attend() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, mask)

        try:
            attend()
        except RuntimeError as error:
            raise Missing(f"refused: {str(error).splitlines()[0]}"[:200]) from error
        return _Unpacked(attend, lambda out: out.transpose(1, 2).flatten(2)[live])

    return run


class _Unpacked:
    """A call whose result has another layout; `packed` of it is what is compared."""

    def __init__(self, run: timing.Run, packed: Callable[[Tensor], Tensor]):
        self.run, self.packed = run, packed

    def __call__(self) -> Any:
        return self.run()


for _name, _backend in [
    ("SDPA, flash", SDPBackend.FLASH_ATTENTION),
    ("SDPA, cuDNN", SDPBackend.CUDNN_ATTENTION),
    ("SDPA, memory-efficient", SDPBackend.EFFICIENT_ATTENTION),
    ("SDPA, math", SDPBackend.MATH),
]:
    provider(_name, "attention")(sdpa(_backend))


@provider("torch varlen_attn", "attention")
def varlen(case: Case, stack: ExitStack) -> timing.Run:
    """FlashAttention 2 as torch carries it, on packed rows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Missing(str(error)) from error
    qkv, cu, longest, heads = case.args
    if case.device.type != "cuda" or case.dtype is torch.float32:
        raise Missing("float16 and bfloat16 on CUDA only")
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(1)  # each [rows, heads, head_size]
    return lambda: varlen_attn(q, k, v, cu, cu, longest, longest).flatten(1)  # type: ignore[union-attr]


@provider("flash-attn", "attention")
def flash_attn(case: Case, stack: ExitStack) -> timing.Run:
    if importlib.util.find_spec("flash_attn") is None:
        raise Missing("flash-attn is not installed")
    from flash_attn import flash_attn_varlen_qkvpacked_func  # type: ignore[import-not-found]

    if case.device.type != "cuda" or case.dtype is torch.float32:
        raise Missing("float16 and bfloat16 on CUDA only")
    qkv, cu, longest, heads = case.args
    packed = qkv.unflatten(-1, (3, heads, -1))
    return lambda: flash_attn_varlen_qkvpacked_func(packed, cu, longest).flatten(1)


@provider("Liger", "add_layer_norm")
def liger(case: Case, stack: ExitStack) -> timing.Run:
    if importlib.util.find_spec("liger_kernel") is None:
        raise Missing("liger-kernel is not installed")
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction  # type: ignore[import-not-found]

    x, residual, weight, bias, eps = case.args
    return lambda: LigerLayerNormFunction.apply(x + residual, weight, bias, eps)


# --- cases ------------------------------------------------------------------------------------------------------------


def cases(
    op: str, matrix: Matrix, dtype: torch.dtype, device: torch.device, telling: bool | None = None
) -> Iterator[Case]:
    """The op at every shape of the matrix, random arguments of a size as in an encoder. telling: only those that goals
    are about, or only the others."""
    many = [rows for rows in matrix.rows if telling in (None, rows >= TELLING_ROWS)]
    forms = [form for form in FORMS if telling in (None, form == "fixed")]
    dim, hidden, heads = matrix.shape.dim, matrix.shape.hidden, matrix.shape.heads
    size = dtype.itemsize

    def rand(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    def whole(rows: int) -> Tensor:
        return torch.tensor([0, rows], dtype=torch.int32, device=device)

    def gemm(rows: int, n: int, k: int, *more: Any) -> Case:
        args = rand(rows, k), rand(n, k, scale=k**-0.5), rand(n, scale=0.1), *more
        return Case(op, f"{rows} x {n} x {k}", args, roofline.gemm(op, rows, n, k, size), whole(rows))

    args: tuple[Any, ...]

    def norm() -> tuple[Tensor, Tensor, float]:
        return 1 + rand(dim, scale=0.1), rand(dim, scale=0.1), 1e-12

    if op == "linear_add_layer_norm":
        for rows, depth in product(many, (dim, hidden)):
            weights = rand(dim, depth, scale=depth**-0.5), rand(dim, scale=0.1)
            args = rand(rows, depth), rand(rows, dim), *weights, *norm()
            cost = roofline.linear_add_layer_norm(rows, dim, depth, size)
            yield Case(op, f"{rows} x {dim} x {depth}", args, cost, whole(rows))
    elif op in GEMMS:
        for rows in many:
            if op == "qkv_projection":
                yield gemm(rows, 3 * dim, dim)
            elif op == "bias_gelu":
                yield gemm(rows, hidden, dim, "gelu")
            else:
                yield gemm(rows, dim, dim)
                yield gemm(rows, dim, hidden)
    elif op == "add_layer_norm":
        for rows in many:
            args = rand(rows, dim), rand(rows, dim), *norm()
            yield Case(op, f"{rows} x {dim}", args, roofline.add_layer_norm(rows, dim, size), whole(rows))
    elif op == "embed_layer_norm":
        for rows in many:
            ids, positions = (torch.randint(n, (rows,), dtype=torch.int32, device=device) for n in (30_522, 512))
            tables = ids, positions, rand(30_522, dim), rand(512, dim), *norm()
            yield Case(op, f"{rows} x {dim}", tables, roofline.embed_layer_norm(rows, dim, size), whole(rows))
    elif op in PLACING:
        for longest, form in product(matrix.lengths, forms):
            lengths = shapes.lengths(form, longest, matrix.attended)
            column = torch.arange(longest, device=device)
            keep = column < torch.tensor(lengths, device=device)[:, None]
            cu, places, name = cu_seqlens(lengths, str(device)), keep.numel(), f"L={longest}, {form}"
            if op == "unpack":
                cost, target = roofline.unpack(sum(lengths), places, dim, size), reference.pack(keep)[2]
                yield Case(op, name, (rand(places, dim), target), cost, cu, tuple(lengths))
            elif dtype is matrix.dtypes[0]:
                ids = torch.randint(30_522, keep.shape, device=device)
                cost = roofline.pack(len(lengths), longest)
                yield Case(op, name, (keep, ids, column[None]), cost, cu, tuple(lengths), dtype)
    elif op in ("attention", "pool"):
        for longest, form in product(matrix.lengths, forms):
            lengths = shapes.lengths(form, longest, matrix.attended)
            cu, rows, name = cu_seqlens(lengths, str(device)), sum(lengths), f"L={longest}, {form}"
            if op == "attention":
                cost = roofline.attention(lengths, dim, heads, size)
                yield Case(op, name, (rand(rows, 3 * dim), cu, longest, heads), cost, cu, tuple(lengths))
            else:
                cost = roofline.pool(lengths, dim, size)
                yield Case(op, name, (rand(rows, dim), cu, "mean", True), cost, cu, tuple(lengths))
    else:
        raise ValueError(f"{op!r} is none of {', '.join(OPS)}")


# --- measuring --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure(
    case: Case,
    ceilings: dict[str, Any],
    deadline: float,
    seconds: float = 0.1,
    *,
    late: bool | None = None,
    keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """A row a provider: what is missing or wrong, or its times, from turns that all of them take. late: only
    those that compile for long, or only the others. keep: gets the rows so far after each provider."""
    about: dict[str, Any] = {"op": case.op, "shape": case.name, "dtype": str(case.dtype).removeprefix("torch.")}
    kind = "tf32" if about["dtype"] == "float32" and _configs.matmul_precision() == "tf32" else about["dtype"]
    about["predicted_us"] = roofline.microseconds(roofline.at_hand(case.device), case.cost, kind)  # for fastdistil
    known: list[tuple[Tensor, Tensor]] = []  # of the case, and of the case turned
    turns = once_if_late(case.device, late)

    def attempt(turn: int, make: Make, stack: ExitStack, row: dict[str, Any]) -> tuple[timing.Timing, timing.Timing]:
        run = make(case, stack)
        if not known:  # only where a provider runs at all
            known.append(expected(case))
            with turned(case):
                known.append(expected(case))
        if turn == 0:
            row["error"] = hold(run, case, *known[0])
        took = _time(run, case.device, seconds if case.device.type == "cpu" or turns else seconds / 2)
        hold(run, case, *known[0])
        with turned(case):  # a result that was remembered is of the rows as they were
            hold(make(case, stack) if isinstance(run, _Unpacked) else run, case, *known[1])
        if case.device.type == "cuda":
            hold(run, case, *known[0], call=lambda: timing.replayed(run, case.device))
        return took

    providers = [one for one in PROVIDERS[case.op] if late is None or (one[1] in LATE) == late]
    return take_turns(
        providers, about, case.device, deadline, attempt, lambda took: _figures(took, case, ceilings), keep, turns
    )


def once_if_late(device: torch.device, late: bool | None) -> int | None:
    """One turn on a GPU for what compiles for long, anew each time; else as many as usual."""
    return 1 if late and device.type == "cuda" else None


STICKY = (
    *("illegal memory access", "illegal instruction", "misaligned address", "invalid program counter"),
    *("device-side assert", "unspecified launch failure", "uncorrectable ECC"),
)


class DeviceBroke(RuntimeError):
    """After such an error every call of this process fails, whatever it is: it has to end."""


def is_sticky(error: BaseException) -> bool:
    return any(what in str(error) for what in STICKY)


def take_turns(
    providers: list[tuple[str, Any]],
    about: dict[str, Any],
    device: torch.device,
    deadline: float,
    attempt: Callable[[int, Any, ExitStack, dict[str, Any]], Any],
    figures: Callable[[list[Any]], dict[str, Any]],
    keep: Callable[[list[dict[str, Any]]], None],
    turns: int | None = None,
) -> list[dict[str, Any]]:
    """A row a provider, beginning with `about`: what is missing or wrong, or the figures of what attempt(turn, make,
    stack, row) gave in its turns. keep: gets the rows so far after each. Raises DeviceBroke where nothing more can be
    measured."""
    rows: dict[str, dict[str, Any]] = {name: about | {"provider": name} for name, _ in providers}
    taken: dict[str, list[Any]] = {}

    def finished() -> list[dict[str, Any]]:
        found = []
        for name, row in rows.items():
            if name in taken and "wrong" not in row:
                try:
                    row = row | figures(taken[name])
                except AssertionError as error:
                    row = row | {"wrong": str(error)}
            if len(row) > len(about) + 1:  # its turn has come
                found.append(row)
        return found

    for turn, (name, make) in timing.in_turns(device, providers, turns):
        row = rows[name]
        if "missing" in row or "wrong" in row:
            continue
        if time.monotonic() > deadline:
            if name not in taken:
                row["missing"] = NO_TIME
            continue
        with ExitStack() as stack:
            try:
                found = attempt(turn, make, stack, row)
                taken.setdefault(name, []).append(found)
            except Missing as why:
                row["missing"] = str(why)
            except Exception as error:  # of one provider; the others go on, and the run fails in the end
                row["wrong"] = f"{type(error).__name__}: {str(error)[:300]}"
                if is_sticky(error):
                    keep(finished())
                    raise DeviceBroke(f"{name}: {error}") from error
        keep(finished())
    return finished()


def expected(case: Case) -> tuple[Tensor, Tensor]:
    """What the definition gives in float64, and in the case's own precision."""
    definition = getattr(reference, case.op)
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in case.args]
    return _one(definition(*wide)).double(), _one(definition(*case.args))


def _one(result: Any) -> Tensor:
    """A result of several tensors as one, which holds their numbers exactly."""
    return result if isinstance(result, Tensor) else torch.cat([part.flatten().double() for part in result])


@contextmanager
def turned(case: Case) -> Iterator[None]:
    """The case with other rows in the same place: the last one first, for q and k negated have the same scores."""

    def turn() -> None:
        rows = case.rows.flip(0)
        case.rows.copy_(rows.logical_not_() if rows.dtype is torch.bool else rows.neg_())

    turn()
    try:
        yield
    finally:
        turn()


def checked(
    case: Case, make: Make, stack: ExitStack, truth: Tensor, plain: Tensor
) -> tuple[timing.Run, dict[str, float]]:
    """A provider's call and its errors; raises AssertionError where it breaks the error law, Missing where it cannot
    run."""
    run = make(case, stack)
    return run, hold(run, case, truth, plain)


def hold(run: timing.Run, case: Case, truth: Tensor, plain: Tensor, call: timing.Run | None = None) -> dict[str, float]:
    """The errors of what a run computes now, or gives by another call; raises AssertionError where it breaks the error
    law."""
    timing.poison(plain)
    result = (call or run)()
    result = run.packed(result) if isinstance(run, _Unpacked) else _one(result)
    error_law(result, plain, truth, largest=4 if _by_onednn(case) else 2)
    return errors(result, truth)


def errors(result: Tensor, truth: Tensor) -> dict[str, float]:
    """The largest and the mean error, by the largest and the mean value."""
    off, scale = (result.double() - truth).abs(), truth.abs()
    return {"max": float(off.max() / scale.max()), "mean": float(off.mean() / scale.mean())}


def _by_onednn(case: Case) -> bool:
    """Then only the order of the sums differs from eager's, and the largest error may be further from its."""
    return case.op in GEMMS and case.device.type == "cpu" and cpu.by_onednn(case.rows, case.weight)


def _time(run: timing.Run, device: torch.device, seconds: float) -> tuple[timing.Timing, timing.Timing]:
    """With cold caches, and in a graph; on CPU there is neither, and both are the same."""
    cold = timing.cold(run, device, seconds)
    return cold, cold if device.type == "cpu" else timing.in_graph(run, device, seconds / 2)


def _figures(turns: list[tuple[timing.Timing, timing.Timing]], case: Case, ceilings: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"flops": case.cost.flops, "bytes": case.cost.bytes}
    for name, of_turns in zip(("cold", "graph"), zip(*turns, strict=True), strict=True):
        found[name] = timing.joined(list(of_turns), KEPT)
    matmul = _matmul(str(case.dtype).removeprefix("torch."), ceilings)
    found |= _of_ceilings(found, matmul, ceilings)
    for part in over_ceiling(case, found, ceilings, matmul):
        raise AssertionError(f"{part:.0%} of a ceiling: a clock, a count or the ceiling is wrong")
    return found


def _matmul(dtype: str, ceilings: dict[str, Any]) -> float:
    """FLOP/s of large products in the precision that an op of the dtype has."""
    tf32 = dtype == "float32" and _configs.matmul_precision() == "tf32"
    return ceilings["tf32" if tf32 else dtype]["flops_per_s"]


def _of_ceilings(found: dict[str, Any], matmul: float, ceilings: dict[str, Any]) -> dict[str, float]:
    seconds = found["cold"]["median_us"] / 1e6
    copied = found["bytes"] / seconds / ceilings["copy"]["bytes_per_s"]
    return {"of_copy": copied, "of_matmul": found["flops"] / seconds / matmul}


def over_ceiling(case: Case, found: dict[str, Any], ceilings: dict[str, Any], matmul: float) -> Iterator[float]:
    """Parts of a ceiling that cannot be."""
    seconds, on_gpu = found["cold"]["median_us"] / 1e6, case.device.type == "cuda"
    # a ceiling is a measurement, too: of a GPU that power holds back, as it does not in a short call; a shared CPU was
    # seen a third quicker from one minute to the next
    for took in ("cold", "graph") if on_gpu else ("cold",):
        part = case.cost.flops / found[took]["median_us"] * 1e6 / matmul
        if part > (1.2 if on_gpu else 1.5):
            yield part
    # what is read comes from memory, each element once; what is written may stay in the cache
    if on_gpu and case.op in ("add_layer_norm", "attention", "pool"):
        rows, width = case.rows.shape
        written = {"attention": rows * width // 3, "pool": 2 * (len(case.cu_seqlens) - 1) * width}
        read = case.cost.bytes - written.get(case.op, rows * width) * case.dtype.itemsize
        part = read / seconds / ceilings["copy"]["bytes_per_s"]
        if part > 1.1:
            yield part
    if on_gpu and case.op == "embed_layer_norm":  # a word's row again may come from the cache: about every fourth
        part = case.cost.bytes / 4 / seconds / ceilings["copy"]["bytes_per_s"]
        if part > 1.1:
            yield part
    # in a graph all of it may lie in the cache, which is a few times as quick
    part = case.cost.bytes / found["graph"]["median_us"] * 1e6 / ceilings["copy"]["bytes_per_s"]
    if on_gpu and part > 6:
        yield part


def run(
    matrix: Matrix,
    device: torch.device,
    ceilings: dict[str, Any],
    *,
    names: tuple[str, ...] = OPS,
    minutes: float = 10,
    keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Every case by every provider. keep: gets all rows so far after each provider."""
    deadline = time.monotonic() + 60 * minutes
    rows: list[dict[str, Any]] = []

    def so_far(found: list[dict[str, Any]]) -> None:
        keep(rows + found)

    for dtype, telling, late in passes(matrix.dtypes):
        # each op's first case, then each one's second: where time runs out no op is left out
        for case in in_rounds([cases(op, matrix, dtype, device, telling) for op in names]):
            rows.extend(measure(case, ceilings, deadline, matrix.seconds, late=late, keep=so_far))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    keep(rows)
    dtypes = [str(dtype).removeprefix("torch.") for dtype in matrix.dtypes]
    return sorted(rows, key=lambda row: (dtypes.index(row["dtype"]), names.index(row["op"])))


def passes(dtypes: Sequence[torch.dtype]) -> Iterator[tuple[torch.dtype, bool, bool]]:
    """(precision, what the goals are about or the rest, by those that compile for long or by the others), in an order
    for few minutes: all of the first precision, which the goals are about, but what compiles for long; of that what
    the goals are about; the other precisions; what compiles for long."""
    first, *others = dtypes
    yield from ((first, True, False), (first, False, False), (first, True, True))
    yield from ((dtype, telling, False) for dtype in others for telling in (True, False))
    yield first, False, True
    yield from ((dtype, telling, True) for dtype in others for telling in (True, False))


def in_rounds(many: list[Iterator[Item]]) -> Iterator[Item]:
    """The first of each, the second of each, and so on."""
    while many:
        left = []
        for one in many:
            for item in islice(one, 1):
                yield item
                left.append(one)
        many = left


def in_processes(argv: list[str], processes: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(rows, ceilings) of so many runs of this command in processes of their own, for how a process's memory happens to
    lie stays so until it ends, and makes an op up to twice as slow."""
    runs = []
    with tempfile.TemporaryDirectory() as directory:
        for i in range(processes):
            path = Path(directory, f"{i}.json")
            command = [sys.executable, "-m", "benchmarks.kernels", *argv, "--processes", "1", "--out", str(path)]
            done = subprocess.run(command, cwd=record.ROOT, stdout=subprocess.DEVNULL, check=False)
            if not path.is_file():
                raise RuntimeError(f"a process of the kernels' benchmark ended with status {done.returncode}")
            runs.append(record.read(path))
    measured = [run["ceilings"] for run in runs]
    ceilings = {
        name: max((one[name] for one in measured), key=lambda found: found.get("flops_per_s") or found["bytes_per_s"])
        for name in measured[0]
    }
    return [joined(list(rows), ceilings) for rows in zip(*(run["rows"] for run in runs), strict=True)], ceilings


def joined(rows: list[dict[str, Any]], ceilings: dict[str, Any]) -> dict[str, Any]:
    """One row of several for the same case and provider: all rounds and turns; what is wrong in one is wrong."""
    for lacks in (lambda row: "wrong" in row, lambda row: "cold" not in row):
        if (row := next(filter(lacks, rows), None)) is not None:
            return row
    found = dict(rows[0])
    for way in ("cold", "graph"):
        samples = [s / 1e6 for row in rows for s in row[way]["samples_us"]]
        turns = [turn for row in rows for turn in row[way]["turns_us"]]
        found[way] = timing.Timing(samples).figures() | {"turns_us": turns, "drift": max(turns) / min(turns) - 1}
    return found | _of_ceilings(found, _matmul(found["dtype"], ceilings), ceilings)


def own() -> list[str]:
    """Providers of somebody's own, registered by another module."""
    return [name for of_op in PROVIDERS.values() for name, make in of_op if make.__module__ != __name__]


def absent(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Who has no time at all, and why: the last reason, for the first are of shapes that others are for."""
    timed = {row["provider"] for row in rows if "median_us" in row or "cold" in row}
    return {row["provider"]: row["missing"] for row in rows if "missing" in row and row["provider"] not in timed}


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Who is missing, and a line a case: ours, its part of the ceilings, and the best peer."""
    yield from (f"missing {name}: {why}" for name, why in absent(rows).items())
    by_case: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        by_case.setdefault((row["op"], row["shape"], row["dtype"]), []).append(row)
    for (op, shape, dtype), found in by_case.items():
        timed = {row["provider"]: row for row in found if "cold" in row}
        for row in found:
            if "wrong" in row:
                yield f"WRONG {op} {shape} {dtype} {row['provider']}: {row['wrong']}"
        if (mine := timed.pop("fastdistil", None)) is None:
            continue
        peers = {name: row for name, row in timed.items() if not name.startswith("fastdistil")}
        cold, graph = mine["cold"], mine["graph"]
        line = f"{op:16} {shape:20} {dtype:8} {cold['median_us']:9.1f} us (IQR {cold['iqr_us']:.1f})"
        if cold != graph:  # which are the same on CPU
            line += f", graph {graph['median_us']:.1f} (IQR {graph['iqr_us']:.1f})"
        if mine.get("predicted_us"):
            line += f", predicted {mine['predicted_us']:.1f}"
        line += f", {mine['bytes'] / cold['median_us'] / 1e3:.0f} GB/s {mine['of_copy']:.0%} of copy"
        if mine["flops"]:
            line += f", {mine['flops'] / cold['median_us'] / 1e6:.2f} TFLOP/s {mine['of_matmul']:.0%} of matmul"
        if peers:
            for way in ("cold", "graph") if cold != graph else ("cold",):
                best = min(peers, key=lambda name: peers[name][way]["median_us"])
                line += (
                    f"{'; ' if way == 'cold' else ', graph '}{timing.ratio(peers[best][way], mine[way]):.2f}x {best}"
                )
            noisy = max(row["cold"]["iqr_us"] / row["cold"]["median_us"] for row in (mine, peers[best]))
            if noisy > NOISY:
                line += ", but the rounds differ much"
        yield line


def failed(rows: list[dict[str, Any]]) -> bool:
    return any("wrong" in row for row in rows)


@record.command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="tiny sizes, for CPU")
    parser.add_argument("--ops", default=",".join(OPS), help="comma-separated")
    parser.add_argument("--dtypes", help="comma-separated, such as bfloat16,float32")
    parser.add_argument("--minutes", type=record.minutes, default=10.0)
    parser.add_argument("--processes", type=int, help="that measure one after another: by default 3 on CPU, else 1")
    parser.add_argument("--out", type=Path, help="a result file")
    args = parser.parse_args(argv)
    record.check_out(args.out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    matrix = shapes.TOY if args.toy else shapes.FULL if device.type == "cuda" else shapes.ON_CPU
    if args.dtypes:
        matrix = shapes.with_dtypes(matrix, args.dtypes.split(","))
    names = tuple(args.ops.split(","))
    if unknown := set(names) - set(OPS):
        parser.error(f"{sorted(unknown)[0]!r} is none of {', '.join(OPS)}")
    processes = (1 if args.toy or device.type == "cuda" or own() else 3) if args.processes is None else args.processes
    if processes > 1 and (names_of := own()):
        parser.error(f"--processes {processes}: other processes know nothing of {', '.join(names_of)}; give 1")
    around = record.environment()  # before it is measured, for the commit may be another afterwards
    with timing.Watch() as watch:
        if processes > 1:
            same = [f"--ops={args.ops}", f"--minutes={args.minutes / processes}"]
            same += ["--toy"] * args.toy + [f"--dtypes={args.dtypes}"] * bool(args.dtypes)
            rows, ceilings = in_processes(same, processes)
        else:
            ceilings = timing.ceilings(device, args.toy, matrix.dtypes)
            rows = run(matrix, device, ceilings, names=names, minutes=args.minutes)
    print(*lines(rows), sep="\n")
    if args.out:
        shape = asdict(matrix.shape)
        result = {"stage": "kernels", "ceilings": ceilings, "shape": shape, "rows": rows, "clocks": watch.samples}
        record.write(args.out, around | result | {"dry": args.toy})
    return int(failed(rows))


if __name__ == "__main__":
    sys.exit(main())
