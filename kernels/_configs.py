"""Launch configurations: looked up by architecture, op and shape class; never searched for while running.

RECORDED holds what was measured on a GPU. It is empty: none has run this code yet. What was not measured gets the
heuristic below it, chosen by compiling for every architecture without a GPU: registers, spills and shared memory of
each are in `benchmarks/results/compile/`.
"""

import functools
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from fastdistil.kernels._target import interpreted

FEW, COLUMNS = 64, 32  # rows up to which a GEMM waits for its weights, and the columns of its tiles then
DEPTH = {"half": 128, "tf32": 64, "ieee": 64}  # and how deep these are


@dataclass
class Modes:
    exact_gelu: bool = False  # erf in half precision too
    batch_invariant: bool = False  # one configuration an op, whatever the batch
    overlap: bool = False  # from sm_90 on a kernel is launched while the one before still runs, and waits inside


modes = Modes()


@dataclass(frozen=True)
class Gemm:
    """block_m x block_n tiles of the result, block_k deep; halves: parts in which the epilogue stores a tile.

    across, split: of float32 in IEEE precision. The multipliers read their numbers from shared memory one by one, where
    the rows of two operands that both lie along K would meet in the same banks: across turns the weight over first.
    split computes by three products of TF32 on the tensor cores instead.
    """

    family: str  # "pointer" or "tma"
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int = 8
    halves: int = 1
    per_sm: int = 1  # programs that share a multiprocessor, for the persistent family
    registers: int | None = None  # at most so many a thread, so that they can
    flatten: bool = True  # one loop over tiles and their depth, so that loads go on while a tile is stored
    across: bool = False
    split: bool = False
    parts: int = 1  # programs that share a tile's depth at most, where a LayerNorm behind it adds up what they found


@dataclass(frozen=True)
class Library:
    """The product of torch's library, cuBLAS, in place of a kernel. It does not stop at the live count."""


@dataclass(frozen=True, eq=False)
class GemmLaunch:
    """A configuration and what the numbers' precision adds to it. One object a kind, which stands for it in caches."""

    config: Gemm | Library
    precision: str
    near_gelu: bool
    programs: int


@dataclass(frozen=True)
class Rows:
    rows: int
    block: int
    warps: int
    stages: int = 1  # of pooling: rows on their way to shared memory at a time


@dataclass(frozen=True)
class Attention:
    """A form, and for which sequences (up to `longest` rows, None: any) and head sizes (up to `widest`) it serves.

    tile: rows of queries; keys: rows of keys that a looped tile reads at a time; only: the architectures it is for, if
    not for all.
    """

    form: str  # "short", "single" or "looped"
    tile: int
    warps: int
    longest: int | None = None
    widest: int = 128
    keys: int = 0
    stages: int = 1
    only: tuple[int, ...] = ()


# (architecture, op as `searched_as` has it, shape class) -> configuration. Shape classes: of GEMMs "half/many"
# (precision, size), before it "half/many/whole" where the host knows that no row is dead, of attention "half/64/128"
# (head size, or 256 or 512, see below; longest sequence or any), of row kernels "half/1024" (width as a power of two)
RECORDED: dict[tuple[int, str, str], Gemm | Library | Attention | Rows] = {}

SMALL: dict[tuple[str, str], Gemm | Library] = {  # every architecture
    ("half", "16"): Gemm("pointer", 16, COLUMNS, DEPTH["half"], warps=4, stages=5, group=1, parts=8),
    ("half", "32"): Gemm("pointer", 32, COLUMNS, DEPTH["half"], warps=4, stages=4, group=1, parts=8),
    ("half", "64"): Gemm("pointer", 64, COLUMNS, DEPTH["half"], warps=4, stages=3, group=1, parts=8),
    ("half", "some"): Gemm("pointer", 64, 64, 64, warps=4, stages=4, parts=8),
    ("tf32", "16"): Gemm("pointer", 16, COLUMNS, DEPTH["tf32"], warps=4, stages=3, group=1, parts=8),
    ("tf32", "32"): Gemm("pointer", 32, COLUMNS, DEPTH["tf32"], warps=4, stages=3, group=1, parts=8),
    ("tf32", "64"): Gemm("pointer", 64, COLUMNS, DEPTH["tf32"], warps=4, stages=3, group=1, parts=8),
    ("tf32", "some"): Gemm("pointer", 64, 64, 32, warps=4, stages=4, parts=8),
    ("tf32", "many"): Gemm("pointer", 128, 64, 32, warps=8, stages=3),
    # to turn the weight over would cost too much for few rows, and the library's dead rows cost little
    **{("ieee", size): Library() for size in ("16", "32", "64", "some")},
    ("ieee", "many/whole"): Library(),
    ("ieee", "many"): Gemm("pointer", 128, 64, 16, warps=8, stages=3, across=True),
}
AMPERE = SMALL | {("half", "many"): Gemm("pointer", 128, 128, 32, warps=8, stages=3)}
# where rows are read number by number, each of which takes a register
UNALIGNED = AMPERE | {
    **{("half", str(m)): Gemm("pointer", m, COLUMNS, 32, warps=4, stages=2, group=1, parts=8) for m in (16, 32, 64)},
    ("half", "some"): Gemm("pointer", 64, 64, 32, warps=4, stages=2, parts=8),
}
# two programs of 128 x 128 share a multiprocessor, so that one's activation overlaps the other's loop; tiles of 128 x
# 256 read a quarter less of L2 for the same products, which is what the roofline model has the smaller ones wait for
TWO = Gemm("tma", 128, 128, 64, warps=8, stages=3, halves=2, per_sm=2, registers=128)
TMA = SMALL | {
    ("half", "many"): TWO,
    ("half", "wide"): Gemm("tma", 128, 256, 64, warps=8, stages=3, halves=2),
}
GEMM: dict[int, dict[tuple[str, str], Gemm | Library]] = {
    80: AMPERE,
    86: AMPERE,
    89: AMPERE,
    90: TMA,
    100: TMA | {("half", "many"): replace(TWO, flatten=False)},  # the registers of exact gelu spill otherwise
    120: AMPERE,
}
WIDE = 0.77  # of the smaller tiles' time, that the model predicts for the same products in wide ones

# The first that serves. Up to 32 rows a tile of 64 is shared block-diagonally; one of 128 for up to 64 rows would
# compute more scores than a tile a sequence does. What is missing from a list spills: wide heads, TF32, IEEE float32.
# `widest` of a form that also serves head sizes that are no power of two from 16 on, whose masks take registers
ANY_HEAD, ODD_HEAD = 256, 512  # multiples of 4; the others, which have no access wider than one number
ATTENTION = {
    "half": (
        Attention("short", 64, warps=4, longest=16, widest=64),
        Attention("short", 64, warps=4, longest=32, widest=64),
        Attention("single", 64, warps=4, longest=64),
        Attention("single", 128, warps=4, longest=128, widest=64, only=(90, 100)),  # two share a multiprocessor
        Attention("single", 128, warps=8, longest=128, widest=64),
        Attention("looped", 128, warps=8, keys=64, stages=3),
        Attention("looped", 32, warps=4, keys=32, widest=ANY_HEAD),
        Attention("looped", 16, warps=4, keys=32, widest=ODD_HEAD),
    ),
    "tf32": (
        Attention("short", 64, warps=4, longest=16, widest=32),
        Attention("short", 64, warps=4, longest=32, widest=32),
        Attention("looped", 64, warps=8, keys=32),
        Attention("looped", 32, warps=8, keys=16, widest=ODD_HEAD),
    ),
    "ieee": (
        Attention("short", 32, warps=4, longest=16, widest=64),
        Attention("looped", 64, warps=4, keys=32, widest=32),
        Attention("looped", 32, warps=4, keys=32, widest=64),
        Attention("looped", 16, warps=8, keys=16, stages=2, widest=ODD_HEAD),
    ),
}


def live(cu_seqlens: Tensor | None) -> tuple[Tensor | None, int]:
    """Where a kernel reads the live count: (cu_seqlens, its last index)."""
    return (None, 0) if cu_seqlens is None else (cu_seqlens.contiguous(), cu_seqlens.shape[0] - 1)


def overlaps(device: torch.device) -> bool:
    """Whether a launch may begin before the one before it has ended."""
    return modes.overlap and architecture(device) >= 90 and not interpreted()


def dense(x: Tensor) -> Tensor:
    """x contiguous, from an address of a multiple of 16 bytes on: what 16-byte accesses and their registers go by."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


IN_FLIGHT = 49_152  # bytes of shared memory: four programs a multiprocessor, two on the smallest


def row_kernel(op: str, dim: int, dtype: torch.dtype, device: torch.device) -> Rows:
    return _row_kernel(op, dim, "float32" if dtype is torch.float32 else "half", architecture(device))


@functools.cache
def _row_kernel(op: str, dim: int, kind: str, arch: int) -> Rows:
    block = power_of_two(dim)
    if found := RECORDED.get((arch, op, f"{kind}/{block}")):
        return cast(Rows, found)
    rows, size = 16 if block <= 128 else 8 if block == 256 else 4 if block <= 1_024 else max(1, 4_096 // block), 2
    if kind == "float32":
        rows, size = max(1, rows // 2), 4
    if op == "pool":  # one program reads all of a sequence, so that many loads have to be on their way
        return Rows(2 * rows, block, warps=8, stages=min(4, 1 + IN_FLIGHT // (2 * rows * block * size)))
    return Rows(rows, block, warps=min(8, max(4, block // 1_024)))


def gemm(
    op: str,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
    whole: bool = False,
    odd: bool = False,
) -> GemmLaunch:
    """[m, k] @ [n, k].T. aligned: pointers and row strides are multiples of 16 bytes, which tensor descriptors need.
    whole: no row is dead. odd: it is the rows to be read that are not aligned."""
    precision = matmul_precision() if dtype is torch.float32 else "half"
    size = size_class(op, precision, m, n, k, processors(device))
    # the library's kernels go by the number of rows, and under the interpreter it is ours that are run
    library = not modes.batch_invariant and not interpreted()
    return _gemm(op, architecture(device), size, precision, aligned, odd, whole, library, modes.exact_gelu, device)


def parts(config: Gemm, m: int, n: int, k: int, processors: int) -> int:
    """How many programs share the depth of a tile of [m, k] @ [n, k].T: a power of two, as long as multiprocessors
    would be idle and each has two steps."""
    tiles, steps, found = cdiv(m, config.block_m) * cdiv(n, config.block_n), cdiv(k, config.block_k), 1
    while 2 * found <= config.parts and 2 * found * tiles <= processors and 4 * found <= steps:
        found *= 2
    return found


def searched_as(op: str, size: str) -> str:
    """The op whose configuration serves: where nobody shares a tile's depth, that of the product alone."""
    return "linear" if op == "linear_add_layer_norm" and size in ("many", "wide") else op


def _height(op: str, precision: str, m: int, n: int, k: int, processors: int) -> int:
    """Rows of a tile, of few: all of them, so that the weights are read but once, where programs share its depth; else
    as few as leave no multiprocessor more than one tile."""
    shared = op == "linear_add_layer_norm" and k > 3 * DEPTH[precision]
    return next(
        rows for rows in (16, 32, 64) if rows >= m or (not shared and cdiv(m, rows) * cdiv(n, COLUMNS) <= processors)
    )


def size_class(op: str, precision: str, m: int, n: int, k: int, processors: int) -> str:
    """16, 32 or 64: few rows, in tiles of so many; some: more rows; many: tiles of 128 x 128 occupy at least half of
    the chip; wide: half precision without an activation, where the last tiles of 128 x 256 do not leave too much of the
    chip idle. The batch-invariant mode goes by the layer alone."""
    fixed, tiles = modes.batch_invariant, cdiv(m, 128) * cdiv(n, 128)
    if not fixed and (m <= FEW or 2 * tiles < processors):
        return "some" if m > FEW else str(_height(op, precision, m, n, k, processors))
    if op == "bias_gelu" or precision != "half" or n % 256:
        return "many"
    return "wide" if fixed or WIDE * cdiv(tiles // 2, processors) * 2 <= cdiv(tiles, processors) else "many"


@functools.cache
def _gemm(
    op: str,
    arch: int,
    size: str,
    precision: str,
    aligned: bool,
    odd: bool,
    whole: bool,
    library: bool,
    exact: bool,
    device: torch.device,
) -> GemmLaunch:
    table = GEMM[arch] if aligned else UNALIGNED if odd else AMPERE
    sizes = [f"{size}/whole", size, "many/whole", "many"] if whole else [size, "many"]
    name = searched_as(op, size)
    found = [RECORDED.get((arch, name, f"{precision}/{s}")) for s in sizes[: len(sizes) // 2]] if aligned else []
    found += [table.get((precision, s)) for s in sizes]
    config = next(c for c in found if isinstance(c, Gemm) or (library and isinstance(c, Library)))
    split = isinstance(config, Gemm) and config.split
    return GemmLaunch(
        config,
        precision="tf32x3" if split else "tf32" if precision == "tf32" else "ieee",
        near_gelu=precision == "half" and not exact,
        programs=processors(device) * config.per_sm if isinstance(config, Gemm) else 0,
    )


def attention(max_seqlen: int, head_size: int, dtype: torch.dtype, device: torch.device) -> Attention:
    return _attention(*attention_class(max_seqlen, head_size, dtype), architecture(device))


def attention_class(max_seqlen: int, head_size: int, dtype: torch.dtype) -> tuple[int | None, int, str]:
    """-> (length up to which a configuration has to serve, None: any; head size, or ANY_HEAD or ODD_HEAD; precision)"""
    longest = None if modes.batch_invariant else next((n for n in (16, 32, 64, 128) if max_seqlen <= n), None)
    kind = matmul_precision() if dtype is torch.float32 else "half"
    block = power_of_two(head_size)
    if block != head_size:
        block = ODD_HEAD if head_size % 4 else ANY_HEAD
    return longest, block, kind


@functools.cache
def _attention(longest: int | None, block: int, kind: str, arch: int) -> Attention:
    if found := RECORDED.get((arch, "attention", f"{kind}/{block}/{longest or 'any'}")):
        return cast(Attention, found)
    return serving(longest, block, kind, arch)[0]


def serving(longest: int | None, block: int, kind: str, arch: int) -> list[Attention]:
    """The configurations that can compute a class, the preferred first."""
    return [
        config
        for config in ATTENTION[kind]
        if block <= config.widest
        and (config.longest is None or (longest is not None and longest <= config.longest))
        and (not config.only or arch in config.only)
    ]


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; triton.cdiv takes microseconds on the host."""
    return -(-a // b)


def power_of_two(size: int) -> int:
    """The least power of two that is not below size, and at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def matmul_precision() -> str:
    """What torch's own switches ask of float32 matrix products on CUDA."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@functools.cache
def architecture(device: torch.device) -> int:
    """The newest architecture in the tables that the device is not older than."""
    if interpreted():
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return max(arch for arch in GEMM if arch <= 10 * major + minor)


@functools.cache
def processors(device: torch.device) -> int:
    return 4 if interpreted() else torch.cuda.get_device_properties(device).multi_processor_count
