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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

COMPILED = Path(__file__).resolve().parent / "results" / "compile"
BYTES = {"float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2}
GAP = 1e-6  # seconds between two kernels of a captured graph; an assumption, not measured
# bytes a second from L2 to each multiprocessor: what published fp8 GEMMs with tiles of 128 x 256 must have read on an
# H100 (7.9 TB/s over 132); assumed for every chip
L2_FEED = 60e9
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
    """One launch: FLOPs of matrix products, bytes read and written; of a GEMM also m, n, k."""

    name: str
    flops: float
    bytes: float
    gemm: tuple[int, int, int] | None = None


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
    registers: int = 65_536  # a multiprocessor
    shared: int = 233_472

    def rate(self, dtype: str) -> float:
        return {"float32": self.peak_float32, "tf32": self.peak_tf32}.get(dtype, self.peak)


# NVIDIA's data sheets and architecture white papers, without sparsity
CHIPS = {
    "A100": Chip("A100 SXM 80 GB", 80, 108, 312e12, 156e12, 19.5e12, 2.039e12, 40e6, shared=167_936),
    "A10": Chip("A10", 86, 72, 125e12, 62.5e12, 31.2e12, 0.6e12, 6e6, shared=102_400),
    "L4": Chip("L4", 89, 58, 121e12, 60e12, 30.3e12, 0.3e12, 48e6, shared=102_400),
    "H100": Chip("H100 SXM", 90, 132, 989e12, 494e12, 67e12, 3.35e12, 50e6),
    "H200": Chip("H200 SXM", 90, 132, 989e12, 494e12, 67e12, 4.8e12, 50e6),
    "B200": Chip("B200", 100, 148, 2_250e12, 1_100e12, 75e12, 8.0e12, 126e6),
    "RTX 5090": Chip("GeForce RTX 5090", 120, 170, 209.5e12, 104.8e12, 104.8e12, 1.792e12, 96e6, shared=102_400),
}


def gemm(name: str, m: int, n: int, k: int, size: int) -> Op:
    """[m, k] @ [n, k].T + [n] -> [m, n]"""
    return Op(name, 2.0 * m * n * k, size * (m * k + n * k + n + m * n), (m, n, k))


def attention(lengths: list[int], dim: int, size: int) -> Op:
    """Scores and their product with the values: [rows, 3 * dim] -> [rows, dim]"""
    return Op("attention", 4.0 * dim * sum(n * n for n in lengths), size * 4 * dim * sum(lengths))


def add_layer_norm(rows: int, dim: int, size: int) -> Op:
    return Op("add_layer_norm", 0, size * (3 * rows * dim + 2 * dim))


def embed_layer_norm(rows: int, dim: int, size: int, vocabulary: int = 30_522, positions: int = 512) -> Op:
    """Two int32 ids a row, and of the tables what random ids ask for, each row once -> [rows, dim]"""
    words = vocabulary * (1 - (1 - 1 / vocabulary) ** rows)
    return Op("embed_layer_norm", 0, size * dim * (rows + words + min(rows, positions) + 2) + 8 * rows)


def pool(rows: int, sequences: int, dim: int, size: int) -> Op:
    """[rows, dim] -> float32 [sequences, dim]"""
    return Op("pool", 0, size * rows * dim + 4 * sequences * dim)


def pack(places: int) -> Op:
    """bool [places] and int64 ids of as many -> source, target, and the rows' ids and positions, int64 each"""
    return Op("pack", 0, (1 + 8 + 4 * 8) * places)


def unpack(rows: int, places: int, dim: int, size: int) -> Op:
    """[rows, dim] and an int64 for each place -> [places, dim]"""
    return Op("unpack", 0, size * dim * (rows + places) + 8 * places)


def forward(lengths: list[int], shape: Shape = BASE, dtype: str = "bfloat16") -> list[Op]:
    """The launches of a packed forward with mean pooling, in order."""
    rows, size, dim = sum(lengths), BYTES[dtype], shape.dim
    layer = [
        gemm("qkv_projection", rows, 3 * dim, dim, size),
        attention(lengths, dim, size),
        gemm("linear", rows, dim, dim, size),
        add_layer_norm(rows, dim, size),
        gemm("bias_gelu", rows, shape.hidden, dim, size),
        gemm("linear", rows, dim, shape.hidden, size),
        add_layer_norm(rows, dim, size),
    ]
    return [embed_layer_norm(rows, dim, size), *layer * shape.layers, pool(rows, len(lengths), dim, size)]


def flops_per_token(length: int, shape: Shape = BASE) -> float:
    return sum(op.flops for op in forward([length], shape)) / length


def bound(chip: Chip, lengths: list[int], shape: Shape = BASE, dtype: str = "bfloat16") -> float:
    """Tokens/s if every op ran at the chip's peak or bandwidth and nothing of an op stayed in the cache for the next;
    a batch that fits into L2 can pass it."""
    ops = forward(lengths, shape, dtype)
    return sum(lengths) / sum(max(op.flops / chip.rate(dtype), op.bytes / chip.bandwidth) for op in ops)


# --- prediction, from the shipped launch configurations ---------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """A shipped GEMM configuration and what its binary needs of a multiprocessor."""

    m: int
    n: int
    warps: int
    registers: int
    shared: int

    def resident(self, chip: Chip) -> int:
        """Programs that a multiprocessor holds at a time."""
        by_registers = chip.registers // (self.registers * self.warps * 32)
        return max(1, min(by_registers, chip.shared // (self.shared + 1_024)))


def tile(chip: Chip, op: Op, dtype: str) -> Tile | None:
    """The tile that the heuristic of kernels/_configs.py takes for a GEMM, with the compile gate's figures; None where
    torch's library computes it."""
    from fastdistil.kernels import _configs as configs  # needs Triton

    assert op.gemm is not None
    m, n, k = op.gemm
    kind = {"float32": "ieee", "tf32": "tf32"}.get(dtype, "half")
    table, size = configs.GEMM[chip.arch], configs.size_class(m, n, k, chip.processors)
    config = table.get((kind, size)) or table[kind, "many"]
    recorded = configs.RECORDED.get((chip.arch, op.name, f"{kind}/{size}"))
    config = recorded if isinstance(recorded, (configs.Gemm, configs.Library)) else config
    if isinstance(config, configs.Library):
        return None
    row = _binary(chip.arch, f"gemm_{config.family}", config.block_m, config.block_n, config.block_k, dtype)
    return Tile(config.block_m, config.block_n, config.warps, row["registers"], row["shared"])


@cache
def _table() -> list[dict[str, Any]]:
    newest = max(COMPILED.glob("triton-*.csv"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.stem)])
    from fastdistil.kernels._target import triton_version

    ours = COMPILED / f"triton-{triton_version()}.csv"  # a GPU's machine may have another than the newest
    with (ours if ours.is_file() else newest).open(newline="") as file:
        return list(csv.DictReader(file))


@cache
def _binary(arch: int, kernel: str, m: int, n: int, k: int, dtype: str) -> dict[str, int]:
    """Registers and shared memory of the largest binary of a configuration."""
    numbers = {"float32": "*fp32", "tf32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}[dtype]
    wanted = f"BLOCK_M={m} BLOCK_N={n} BLOCK_K={k} "
    found = [
        row
        for row in _table()
        if row["sm"] == str(arch) and row["kernel"] == kernel and wanted in row["launch"] and numbers in row["launch"]
    ]
    if not found:
        raise LookupError(f"the compile table has no {kernel} {wanted}for sm_{arch} in {dtype}")
    return {name: max(int(row[name]) for row in found) for name in ("registers", "shared")}


def seconds(chip: Chip, op: Op, dtype: str = "bfloat16") -> float:
    """Predicted duration of one launch, without the gap after it."""
    moving = op.bytes / (0.9 * chip.bandwidth)
    if op.gemm is None:
        # exponentials share the work with the products of attention: half of the peak at best
        return max(moving, op.flops / (0.5 * EFFICIENCY * chip.rate(dtype)))
    (m, n, _), used = op.gemm, tile(chip, op, dtype)
    if used is None:
        return max(moving, op.flops / (EFFICIENCY * chip.rate(dtype)))
    tiles, room = math.ceil(m / used.m) * math.ceil(n / used.n), chip.processors * used.resident(chip)
    # the last wave occupies the chip for as long as a full one; tiles that hang over an edge compute nothing
    waves = tiles / (math.ceil(tiles / room) * room) * (m * n) / (tiles * used.m * used.n)
    fed = chip.processors * L2_FEED * 2 * used.m * used.n / (BYTES[dtype] * (used.m + used.n))
    if dtype == "float32":
        fed = math.inf  # far below what L2 gives
    return max(moving, op.flops / (waves * min(EFFICIENCY * chip.rate(dtype), fed)))


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
