"""What a DistilBERT forward has to compute and to move, and how fast a chip can do that at best and by this model.

    python -m benchmarks.roofline            # tokens/s by chip and length, bf16, DistilBERT-base

Counts are per packed row. FLOPs are those of matrix products, a multiply and an add each; bytes are what an op reads
and writes once if nothing is kept between ops. A prediction adds up the ops of a forward one after another: each takes
as long as its products at the rate its tiles allow, or its bytes at the chip's bandwidth, and a gap to the next.
"""

import argparse
import csv
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

COMPILED = Path(__file__).resolve().parent / "results" / "compile"
BYTES = {"float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2}
GAP = 1e-6  # seconds between two kernels of a captured graph; an assumption, not measured
# bytes a second from L2 to each multiprocessor: what published fp8 GEMMs with tiles of 128 x 256 must have read on an
# H100 (7.9 TB/s over 132); assumed for every chip
L2_FEED = 60e9
LATENCY = 0.6e-6  # seconds of a read of memory with others under way; an assumption, not measured
EXPONENTIALS = 16  # a clock and multiprocessor
SCORE, GELU = 6, 20  # float32 instructions for each score of attention and each number that GELU is taken of, about
# of the multipliers' rate in IEEE precision, for q @ k.T waits for shared memory two to three times as long (counted)
IEEE_ATTENTION = 0.4
GEMMS = ("qkv_projection", "linear", "bias_gelu", "linear_add_layer_norm")
EFFICIENCY = 0.8  # of a chip's peak, what dense matrix products reach at best (H200: 785 of 989 TFLOP/s, published)


@dataclass(frozen=True)
class Shape:
    """A model: [rows, dim] through `layers` layers, with a feed-forward `hidden` wide."""

    dim: int = 768
    hidden: int = 3072
    layers: int = 6
    heads: int = 12


BASE, MINILM, LARGE = Shape(), Shape(384, 1536, 6, 12), Shape(1024, 4096, 24, 16)


@dataclass(frozen=True)
class Op:
    """One launch: FLOPs of matrix products, bytes read and written.

    shape: m, n, k of a GEMM, rows and width of the others (of pack: batch and length); lengths: of the sequences, where
    they matter. depth: of the product that a LayerNorm ends, whose parts it may have to add up. steps: the launches of
    an op that has several.
    """

    name: str
    flops: float
    bytes: float
    shape: tuple[int, ...]
    lengths: tuple[int, ...] = ()
    heads: int = 0
    depth: int = 0
    steps: tuple["Op", ...] = ()


@dataclass(frozen=True)
class Chip:
    """As its maker states it. peak: dense FLOP/s with float32 sums; bandwidth: bytes/s; l2: bytes."""

    name: str
    arch: int
    processors: int
    peak: float
    peak_tf32: float
    peak_float32: float
    bandwidth: float
    l2: float
    registers: int = 65_536  # a multiprocessor, as what follows
    shared: int = 233_472
    warps: int = 64
    lanes: int = 128  # of float32
    memory: float = 80  # GiB, about, as a driver tells it

    def rate(self, dtype: str) -> float:
        return {"float32": self.peak_float32, "tf32": self.peak_tf32}.get(dtype, self.peak)

    def resident(self, registers: int, warps: int, shared: int) -> int:
        """Programs that a multiprocessor holds at a time, of `registers` a thread and `shared` bytes each."""
        by_registers = self.registers // (8 * math.ceil(registers / 8) * 32 * warps)
        return max(1, min(by_registers, self.warps // warps, self.shared // (shared + 1_024)))


# NVIDIA's data sheets and architecture white papers, without sparsity
CHIPS = {
    "A100": Chip("A100 SXM 80 GB", 80, 108, 312e12, 156e12, 19.5e12, 2.039e12, 40e6, shared=167_936, lanes=64),
    "A10": Chip("A10", 86, 72, 125e12, 62.5e12, 31.2e12, 0.6e12, 6e6, shared=102_400, warps=48, memory=22.5),
    "L4": Chip("L4", 89, 58, 121e12, 60e12, 30.3e12, 0.3e12, 48e6, shared=102_400, warps=48, memory=22.5),
    "H100": Chip("H100 SXM", 90, 132, 989e12, 494e12, 67e12, 3.35e12, 50e6),
    "H200": Chip("H200 SXM", 90, 132, 989e12, 494e12, 67e12, 4.8e12, 50e6, memory=141),
    "B200": Chip("B200", 100, 148, 2_250e12, 1_100e12, 75e12, 8.0e12, 126e6, memory=180),
    "RTX 5090": Chip(
        "GeForce RTX 5090", 120, 170, 209.5e12, 104.8e12, 104.8e12, 1.792e12, 96e6, shared=102_400, warps=48, memory=32
    ),
}


def gemm(name: str, m: int, n: int, k: int, size: int) -> Op:
    """[m, k] @ [n, k].T + [n] -> [m, n]"""
    return Op(name, 2.0 * m * n * k, size * (m * k + n * k + n + m * n), (m, n, k))


def attention(lengths: list[int], dim: int, heads: int, size: int) -> Op:
    """Scores and their product with the values: [rows, 3 * dim] -> [rows, dim]"""
    if heads < 1 or dim % heads or not dim:
        raise ValueError(f"{heads} heads do not divide a width of {dim}")
    rows, flops = sum(lengths), 4.0 * dim * sum(n * n for n in lengths)
    return Op("attention", flops, size * 4 * dim * rows, (rows, dim), tuple(lengths), heads)


def add_layer_norm(rows: int, dim: int, size: int) -> Op:
    return Op("add_layer_norm", 0, size * (3 * rows * dim + 2 * dim), (rows, dim))


def product_and_norm(rows: int, dim: int, depth: int, size: int) -> tuple[Op, Op]:
    """The two launches of linear_add_layer_norm: [rows, depth] @ [dim, depth].T + [dim], and LayerNorm of it and a
    residual. What the second reads is counted as if it were not in parts."""
    return (
        gemm("linear_add_layer_norm", rows, dim, depth, size),
        replace(add_layer_norm(rows, dim, size), depth=depth),
    )


def linear_add_layer_norm(rows: int, dim: int, depth: int, size: int) -> Op:
    steps = product_and_norm(rows, dim, depth, size)
    moved = sum(step.bytes for step in steps) - 2 * size * rows * dim  # but for what lies between the two
    return Op("linear_add_layer_norm", steps[0].flops, moved, (rows, dim, depth), steps=steps)


def embed_layer_norm(rows: int, dim: int, size: int, vocabulary: int = 30_522, positions: int = 512) -> Op:
    """Two int32 ids a row, and of the tables what random ids ask for, each row once -> [rows, dim]"""
    words = vocabulary * (1 - (1 - 1 / vocabulary) ** rows)
    moved = size * dim * (rows + words + min(rows, positions) + 2) + 8 * rows
    return Op("embed_layer_norm", 0, moved, (rows, dim))


def pool(lengths: list[int], dim: int, size: int) -> Op:
    """[rows, dim] -> float32 [sequences, dim]"""
    rows = sum(lengths)
    return Op("pool", 0, size * rows * dim + 4 * len(lengths) * dim, (rows, dim), tuple(lengths))


def pack(batch: int, length: int) -> Op:
    """bool [batch, length] and int64 ids of as many -> source, target, and the rows' ids and positions, int64 each"""
    return Op("pack", 0, (1 + 8 + 4 * 8) * batch * length, (batch, length))


def unpack(rows: int, places: int, dim: int, size: int) -> Op:
    """[rows, dim] and an int64 for each place -> [places, dim]"""
    return Op("unpack", 0, size * dim * (rows + places) + 8 * places, (places, dim))


def forward(lengths: list[int], shape: Shape = BASE, dtype: str = "bfloat16") -> list[Op]:
    """The launches of a packed forward with mean pooling, in order."""
    rows, size, dim = sum(lengths), BYTES[dtype], shape.dim
    layer = [
        gemm("qkv_projection", rows, 3 * dim, dim, size),
        attention(lengths, dim, shape.heads, size),
        *product_and_norm(rows, dim, dim, size),
        gemm("bias_gelu", rows, shape.hidden, dim, size),
        *product_and_norm(rows, dim, shape.hidden, size),
    ]
    return [embed_layer_norm(rows, dim, size), *layer * shape.layers, pool(lengths, dim, size)]


def flops_per_token(length: int, shape: Shape = BASE) -> float:
    return sum(op.flops for op in forward([length], shape)) / length


def bound(chip: Chip, lengths: list[int], shape: Shape = BASE, dtype: str = "bfloat16") -> float:
    """Tokens/s if every op ran at the chip's peak or bandwidth and nothing of an op stayed in the cache for the next;
    a batch that fits into L2 can pass it."""
    ops = forward(lengths, shape, dtype)
    return sum(lengths) / sum(max(op.flops / chip.rate(dtype), op.bytes / chip.bandwidth) for op in ops)


# --- prediction, from the shipped launch configurations ---------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """A shipped launch, or the part of one whose programs do the same: how many there are, how many of them a
    multiprocessor holds, and what one does.

    products: FLOPs, also those of a tile that nothing needs. scores: exponentials. vector: float32 instructions.
    moved: bytes from and to L2. waits: reads of memory, one after another. pipelined: it multiplies meanwhile.
    """

    programs: int
    resident: int
    moved: float
    waits: float
    products: float = 0
    scores: float = 0
    vector: float = 0
    pipelined: bool = False


def launches(chip: Chip, op: Op, dtype: str) -> list[Launch]:
    """The parts of the launch that kernels/_configs.py chooses, with the compile gate's figures; none where torch's
    library computes it."""
    return (_gemm if op.name in GEMMS else _attention if op.name == "attention" else _rows)(chip, op, dtype)


def _config(chip: Chip, name: str, shape: tuple[int, ...], dtype: str) -> tuple[Any, int]:
    """The configuration that a product is launched with, and in how many parts its depth is."""
    from fastdistil.kernels import _configs as configs  # needs Triton

    m, n, k = shape
    kind = {"float32": "ieee", "tf32": "tf32"}.get(dtype, "half")
    size = configs.size_class(name, kind, m, n, k, chip.processors)
    odd = k == 0 or k * BYTES[dtype] % 16 > 0
    aligned = not odd and n * BYTES[dtype] % 16 == 0
    table = configs.GEMM[chip.arch] if aligned else configs.UNALIGNED if odd else configs.AMPERE
    config = table.get((kind, size)) or table[kind, "many"]
    key = chip.arch, configs.searched_as(name, size), f"{kind}/{size}"
    recorded = configs.RECORDED.get(key) if aligned else None
    config = recorded if isinstance(recorded, (configs.Gemm, configs.Library)) else config
    if isinstance(config, configs.Library) or name != "linear_add_layer_norm":
        return config, 1
    return config, configs.parts(config, m, n, k, chip.processors)


def _gemm(chip: Chip, op: Op, dtype: str) -> list[Launch]:
    m, n, k = op.shape
    config, parts = _config(chip, op.name, op.shape, dtype)
    if not hasattr(config, "family"):  # the library's
        return []
    wanted = f"BLOCK_M={config.block_m} BLOCK_N={config.block_n} BLOCK_K={config.block_k}"
    steps = math.ceil(math.ceil(k / config.block_k) / parts)  # of a program
    deep, written = min(k, steps * config.block_k), BYTES[dtype] if parts == 1 else 4
    one = Launch(
        math.ceil(m / config.block_m) * math.ceil(n / config.block_n) * parts,
        _resident(chip, f"gemm_{config.family}", dtype, config.warps, wanted, f"PARTS={parts}"),
        moved=BYTES[dtype] * (config.block_m + config.block_n) * deep + written * config.block_m * config.block_n,
        waits=max(1.0, steps / max(1, config.stages - 1)),
        products=2.0 * config.block_m * config.block_n * deep,
        vector=GELU * config.block_m * config.block_n * (op.name == "bias_gelu"),
        pipelined=True,
    )
    return [one]


def _attention(chip: Chip, op: Op, dtype: str) -> list[Launch]:
    import torch

    from fastdistil.kernels import _configs as configs

    _, dim = op.shape
    head, size = dim // op.heads, BYTES[dtype]
    longest, block, _ = configs.attention_class(max(op.lengths), head, torch.bfloat16)
    c = configs._attention(longest, block, {"float32": "ieee", "tf32": "tf32"}.get(dtype, "half"), chip.arch)
    wanted, width = f"T={c.tile}", configs.power_of_two(head)

    def programs(count: int, keys: int, waits: float) -> Launch:
        return Launch(
            count * op.heads,
            _resident(chip, c.form, dtype, c.warps, wanted, f"HEAD={head}"),
            moved=2.0 * size * width * (c.tile + keys),
            waits=waits,
            products=4.0 * width * c.tile * keys,
            scores=c.tile * keys,
            vector=SCORE * c.tile * keys,
        )

    # it waits for the live count, for where its sequence starts (but of a single tile) and for its rows
    if c.form == "short":
        assert c.longest is not None
        step = c.tile - c.longest + 1
        wanted += f" STEP={step}"
        return [programs(math.ceil(sum(op.lengths) / step), c.tile, 3)]
    if c.form == "single":
        return [programs(len(op.lengths), c.tile, 2)]
    wanted += f" KEYS={c.keys}"
    return [
        programs(count * math.ceil(n / c.tile), blocks * c.keys, 3 + blocks / max(1, c.stages - 1))
        for n, count in Counter(op.lengths).items()
        if (blocks := math.ceil(n / c.keys))
    ]


def _rows(chip: Chip, op: Op, dtype: str) -> list[Launch]:
    from fastdistil.kernels import _configs as configs
    from fastdistil.kernels import packing

    rows, dim = op.shape
    if op.name == "pack":  # a program reads the mask before its own row, and the last one all of it
        batch, length = op.shape
        before, block = batch * length, 128 if length <= 128 else 256
        if batch * before // 2 > packing.COUNTED:
            before = 0
        resident = _resident(chip, "pack", "", 4, f"COUNT={before > 0} BEFORE=2048 BLOCK={block}")
        waits = 2 + before / 2_048 + 2 * math.ceil(length / block)
        return [Launch(batch, resident, before / 2 + op.bytes / batch, waits)]
    width = min(dim, packing.WIDEST) if op.name == "unpack" else dim
    c = configs._row_kernel(op.name, width, "float32" if dtype in ("float32", "tf32") else "half", chip.arch)
    resident = _resident(chip, op.name, dtype, c.warps, "", f"BLOCK={c.block}", f"ROWS={c.rows}", f"DIM={dim}")
    if op.name == "pool":
        steps = max(1, c.stages - 1) * c.rows
        lengths = Counter(op.lengths).items()
        return [Launch(count, resident, BYTES[dtype] * n * dim + 4 * dim, 2 + n / steps) for n, count in lengths]
    moved, at_once, parts = op.bytes, c.rows, 1
    if op.depth:
        _, parts = _config(chip, "linear_add_layer_norm", (rows, dim, op.depth), dtype)
    if parts > 1:
        at_once = 1
        moved += (4 * parts - BYTES[dtype]) * rows * dim
        resident = _resident(chip, op.name, dtype, c.warps, f"PARTS={parts}", f"BLOCK={c.block}")
    programs = math.ceil(rows / at_once) * math.ceil(dim / c.block)
    return [Launch(programs, resident, moved / programs, 3 if op.name == "embed_layer_norm" else 2)] if programs else []


@cache
def _table() -> list[dict[str, Any]]:
    newest = max(COMPILED.glob("triton-*.csv"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.stem)])
    from fastdistil.kernels._target import triton_version

    ours = COMPILED / f"triton-{triton_version()}.csv"  # a GPU's machine may have another than the newest
    with (ours if ours.is_file() else newest).open(newline="") as file:
        return list(csv.DictReader(file))


@cache
def _resident(chip: Chip, kernel: str, dtype: str, warps: int, wanted: str, *closer: str) -> int:
    """Programs of a configuration's largest binary that a multiprocessor holds: of those that are all that is wanted,
    and of what is closer as much as the compile table has."""
    numbers = {"float32": "*fp32", "tf32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}.get(dtype, "")
    of_kernel = [row for row in _table() if (row["sm"], row["kernel"]) == (str(chip.arch), kernel)]
    if numbers == "*fp32":  # what else writes float32 reads half precision
        of_kernel = [row for row in of_kernel if {"*fp16", "*bf16"}.isdisjoint(row["launch"].split())]
    found = [row for row in of_kernel if {numbers, *wanted.split()} <= {"", *row["launch"].split()}]
    if not found:
        raise LookupError(f"the compile table has no {kernel} {wanted} for sm_{chip.arch} in {dtype}")
    for more in closer:
        found = [row for row in found if set(more.split()) <= set(row["launch"].split())] or found
    return chip.resident(max(int(row["registers"]) for row in found), warps, max(int(row["shared"]) for row in found))


def seconds(chip: Chip, op: Op, dtype: str = "bfloat16") -> float:
    """Predicted duration of one launch, without the gap after it.

    The programs of a multiprocessor share its multipliers, its exponentials and what L2 gives it, and each fills the
    waits of the others; none is quicker than its longest program; the chip's memory gives no op more than 90 % of its
    bandwidth.
    """
    if op.steps:
        return sum(seconds(chip, step, dtype) for step in op.steps) + GAP * (len(op.steps) - 1)
    parts, moving = launches(chip, op, dtype), op.bytes / (0.9 * chip.bandwidth)
    if not parts:
        return max(moving, op.flops / (EFFICIENCY * chip.rate(dtype)))
    clock = chip.peak_float32 / (2 * chip.processors * chip.lanes)
    at_ieee = IEEE_ATTENTION if op.name == "attention" and dtype == "float32" else 1
    times = []  # of each part: seconds of a program alone, and of what it keeps busy
    for part in parts:
        products = part.products / (at_ieee * EFFICIENCY * chip.rate(dtype) / chip.processors)
        scores, vector = part.scores / (EXPONENTIALS * clock), part.vector / (chip.lanes * clock)
        moved = 0.0 if dtype == "float32" and op.name in GEMMS else part.moved / L2_FEED  # L2 gives IEEE far more
        waits = part.waits * LATENCY
        alone = (max(products, waits, moved) if part.pipelined else products + scores + moved + waits) + vector
        times.append((alone, max(products, scores, vector, moved), part))
    times.sort(key=lambda one: one[0], reverse=True)
    found, programs, total = moving, 0, 0.0
    for alone, busy, part in times:
        total += part.programs * max(busy, alone / part.resident)
        programs += part.programs
        fullest = math.ceil(programs / chip.processors)  # of the programs so far, those that one multiprocessor has
        found = max(found, fullest * max(busy, alone / min(part.resident, fullest)))
    return max(found, total / chip.processors)


def at_hand(device: Any) -> Chip | None:
    """The chip that a torch device is, if it is one of these."""
    import torch

    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return named(found.name, found.multi_processor_count, found.total_memory)


def named(name: str, processors: int, memory: int) -> Chip | None:
    """By how its driver calls it; others of a name have fewer multiprocessors, another memory or less power."""
    if re.search(r"\b(?:NVL|PCIE)\b", name.upper()):
        return None
    chips = (chip for key, chip in CHIPS.items() if re.search(rf"\b{key}\b", name) and chip.processors == processors)
    return next((chip for chip in chips if abs(memory / 2**30 / chip.memory - 1) < 0.08), None)


def microseconds(chip: Chip | None, op: Op, dtype: str) -> float | None:
    """What is predicted for an op alone; None where the chip or its configuration's binary is not known."""
    try:
        return None if chip is None else 1e6 * seconds(chip, op, dtype)
    except LookupError:  # a configuration that was recorded and never compiled for the table
        return None


def predict(chip: Chip, lengths: list[int], shape: Shape = BASE, dtype: str = "bfloat16") -> float:
    """Tokens/s of the shipped configurations in a captured graph."""
    ops = forward(lengths, shape, dtype)
    return sum(lengths) / sum(seconds(chip, op, dtype) + GAP for op in ops)


def table() -> Iterator[str]:
    yield "tokens/s, millions: predicted (bound)"
    lengths = (16, 64, 128, 512)
    yield f"{'':18}" + "".join(f"{f'L={n}':>16}" for n in lengths)
    for chip in CHIPS.values():
        cells = []
        for n in lengths:
            batch = [n] * (16_896 // n)
            cells.append(f"{predict(chip, batch) / 1e6:.2f} ({bound(chip, batch) / 1e6:.1f})")
        yield f"{chip.name:18}" + "".join(f"{cell:>16}" for cell in cells)


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(prog="benchmarks roofline", description=(__doc__ or "").splitlines()[0]).parse_args(argv)
    print(*table(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
