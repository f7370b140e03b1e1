"""Compiles every launch configuration, for every architecture, on a machine without a GPU, and judges the result.

    python -m benchmarks.compile_gate            # compile what the table lacks or what has changed, and write it
    python -m benchmarks.compile_gate --check    # CI: the same plus a rotating sample of 60, nothing written

The launchers in kernels/ are called as the ops call them, with tensors on the meta device, at common widths; what
they launch is recorded, compiled and disassembled. One row of the table is one kernel binary: its
registers, spills (local loads and stores), shared memory, matrix instructions (HGMMA: Hopper's, HMMA: the others'), TMA
transfers, asynchronous copies (LDGSTS), 16-byte accesses, and pointers with 64-bit offsets. It is in
benchmarks/results/compile/triton-<version>.csv, by a hash of kernel source, launch and Triton version.
"""

import argparse
import ast
import csv
import datetime
import hashlib
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks.roofline import CHIPS
from fastdistil.kernels import (
    _configs,
    attention,
    bias_gelu,
    layer_norm,
    linear,
    linear_add_layer_norm,
    packing,
    pooling,
    qkv_projection,
)

ROOT = Path(__file__).resolve().parent
TABLE = ROOT / "results" / "compile" / f"triton-{triton.__version__}.csv"
SAMPLE = 60
WIDTHS = {384: 12, 768: 12, 1024: 16}  # MiniLM, DistilBERT-base, BERT-large: dim -> heads
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}  # bytes a program
# pointers into [rows, width] of each kernel: past 2^31 elements only a 64-bit offset is right. Descriptors need none.
OFFSETS64 = {
    "add_layer_norm": 3,
    "embed_layer_norm": 3,
    "gemm_pointer": 3,
    "gemm_tma": 0,
    "looped": 3,
    "pack": 3,
    "pool": 2,
    "short": 2,
    "single": 3,
    "unpack": 2,
}
FIGURES = ("registers", "spills", "shared", "hgmma", "hmma", "tma", "ldgsts", "wide", "offsets64")
FIELDS = ("key", "sm", "kernel", "launch", *FIGURES)
INSTRUCTIONS = {
    "spills": re.compile(r"\b(?:LDL|STL)\b"),
    "hgmma": re.compile(r"\bHGMMA\b"),
    "hmma": re.compile(r"\b(?:HMMA|UTC\w*MMA)\b"),  # UTCHMMA: Blackwell's
    "tma": re.compile(r"\bUTMA(?:LDG|STG)\b"),
    "ldgsts": re.compile(r"\bLDGSTS\b"),
    "wide": re.compile(r"\b(?:LDG|STG|LDGSTS)(?:\.\w+)*\.128\b"),
}


@dataclass(frozen=True)
class Entry:
    """One kernel to compile: its arguments' types, the values fixed at compile time, and the options."""

    module: str
    name: str
    arch: int
    signature: tuple
    constants: tuple
    attributes: tuple
    options: tuple

    @property
    def kernel(self) -> JITFunction:
        return getattr(sys.modules[self.module], self.name)

    @property
    def key(self) -> str:
        what = repr((self.arch, self.signature, self.constants, self.attributes, self.options, triton.__version__))
        return hashlib.sha256((source_of(self.kernel) + what).encode()).hexdigest()[:16]

    def describe(self) -> str:
        names = [p.name for p in self.kernel.params]
        types = sorted({str(t) for _, t in self.signature if str(t).startswith(("*fp", "*bf", "tensordesc"))})
        fixed = [f"{names[path[0]]}={value}" for path, value in self.constants if value is not None]
        absent = [f"no {names[path[0]].removesuffix('_ptr')}" for path, value in self.constants if value is None]
        options = dict(self.options)
        launch = [f"warps={options['num_warps']}", f"stages={options['num_stages']}"]
        if options.get("launch_pdl"):
            launch.append("pdl")
        if options["maxnreg"]:
            launch.append(f"registers={options['maxnreg']}")
        return " ".join([*types, *fixed, *absent, *launch])


def dumped(tree: ast.AST) -> str:
    """As Python 3.11 writes it: 3.12 has one field more, 3.13 leaves empty ones out."""
    everything = {"show_empty": True} if sys.version_info >= (3, 13) else {}
    return ast.dump(tree, **everything).replace(", type_params=[]", "")


def source_of(kernel: JITFunction) -> str:
    """The kernel's source and that of all it calls, but for comments, docstrings and places."""
    seen: dict[str, str] = {}

    def visit(function: JITFunction) -> None:
        if function.__name__ in seen:
            return
        tree = ast.parse(function.src)
        body = tree.body[0].body
        if ast.get_docstring(tree.body[0]) is not None:
            del body[0]
        seen[function.__name__] = dumped(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(callee := function.fn.__globals__.get(node.id), JITFunction):
                visit(callee)

    visit(kernel)
    return repr(sorted(seen.items()))


# --- what can be launched -----------------------------------------------------------------------------------------


@contextmanager
def recorded(arch: int, processors: int = 132) -> Iterator[list[Entry]]:
    """Within, launches on meta tensors are recorded as if the device were an `arch` with so many multiprocessors, and
    none runs."""
    entries: list[Entry] = []
    backend = make_backend(GPUTarget("cuda", arch, 32))

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        binder = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = binder(*args, **(kwargs | {"debug": False}))
        parsed, signature, constants, attributes = self._pack_args(backend, options, bound, specialization, options)
        assert parsed.enable_fp_fusion, f"{self.__name__} goes by Triton's default"
        assert parsed.launch_pdl == kwargs["OVERLAP"], f"{self.__name__} overlaps in its body or in its launch alone"
        entries.append(
            Entry(
                self.fn.__module__,
                self.__name__,
                arch,
                tuple(signature.items()),
                tuple(constants.items()),
                tuple((path, tuple(map(tuple, value))) for path, value in attributes.items()),
                tuple((name, getattr(parsed, name)) for name in ("num_warps", "num_stages", "maxnreg"))
                + ((("launch_pdl", True),) if parsed.launch_pdl else ()),
            )
        )

    with (
        patch.object(JITFunction, "run", run),
        patch.object(_configs, "architecture", lambda device: arch),
        patch.object(_configs, "processors", lambda device: processors),
        patch.object(_configs, "interpreted", lambda: False),
    ):
        _configs._gemm.cache_clear()
        yield entries
    _configs._gemm.cache_clear()


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_all(full_precision: str) -> None:
    """Call every launcher with every shape class, at every width, in every precision."""
    dtypes = [torch.float32] if full_precision == "tf32" else [torch.float32, torch.float16, torch.bfloat16]
    cu = empty(9)
    for (dim, heads), dtype in product(WIDTHS.items(), dtypes):

        def rand(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return empty(*shape, dtype=dtype)

        for rows, live in product((16, 32, 64, 65, 16_896), (cu, None)):
            x, wide = rand(rows, dim), rand(rows, 4 * dim)
            ends = (rand(dim), rand(dim), rand(dim), 1e-12, live)
            linear_add_layer_norm.linear_add_layer_norm(x, x, rand(dim, dim), *ends)
            linear_add_layer_norm.linear_add_layer_norm(wide, x, rand(dim, 4 * dim), *ends)
            qkv_projection.qkv_projection(x, rand(3 * dim, dim), rand(3 * dim), live)
            linear.linear(x, rand(dim, dim), rand(dim), live)
            linear.linear(wide, rand(dim, 4 * dim), rand(dim), live)
            for activation, exact in product(("gelu", "gelu_new", "relu", "silu"), (False, True)):
                with patch.object(_configs.modes, "exact_gelu", exact):
                    bias_gelu.bias_gelu(x, rand(4 * dim, dim), rand(4 * dim), activation, live)
        for rows, depth, live in product((192, 256), (dim, 4 * dim), (cu, None)):  # two programs a tile
            ends = (rand(dim), rand(dim), rand(dim), 1e-12, live)
            linear_add_layer_norm.linear_add_layer_norm(rand(rows, depth), rand(rows, dim), rand(dim, depth), *ends)
        odd = dim + 1  # no stride of 16 bytes: the pointer family on every architecture
        linear.linear(rand(16_896, odd), rand(odd, odd), rand(odd), cu)
        if dim == 768:  # more or fewer programs that share a tile than the widths' own, and steps that are not whole
            for rows, width, depth in product((16, 32, 64, 65, 192), (512, dim), (2_048, 3 * odd)):
                residual, ends = rand(rows, width), (rand(width), rand(width), rand(width), 1e-12, cu)
                linear_add_layer_norm.linear_add_layer_norm(rand(rows, depth), residual, rand(width, depth), *ends)
            # 8 is a divisor of these; many rows of TF32 spill twice on sm_100
            some = (16, 65) if full_precision == "tf32" else (16, 65, 16_896)
            for rows, width, depth in product(some, (312, 600), (312, 600)):
                linear.linear(rand(rows, depth), rand(width, depth), rand(width), cu)
        # beside the widths' own: powers of two, multiples of 8 and of 4, and those whose loads and masks cost most
        sizes = {dim // heads} | ({1, 8, 16, 24, 33, 65, 80, 96, 100, 127, 128} if dim == 768 else set())
        for longest, size, scaled in product((16, 32, 64, 128, 512), sorted(sizes), (False, True)):
            if scaled and size != dim // heads:
                continue
            attention.attention(rand(16_896, 3 * 8 * size), cu, longest, 8, rand(8) if scaled else None)
    if full_precision == "tf32":
        return
    for dim, dtype in [*product(WIDTHS, dtypes), *product((128, 4_096, 16_384), [torch.float16])]:

        def rand(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return empty(*shape, dtype=dtype)

        for live in (cu, None):
            layer_norm.add_layer_norm(rand(4_096, dim), rand(4_096, dim), rand(dim), rand(dim), 1e-12, live)
            for kind in (torch.int64, torch.int32):
                ids = empty(4_096, dtype=kind)
                tables = rand(30_522, dim), rand(512, dim), rand(dim), rand(dim)
                layer_norm.embed_layer_norm(ids, ids, *tables, 1e-12, live)
        for mode, normalize in product(("mean", "cls"), (False, True)):
            pooling.pool(rand(4_096, dim), cu, mode, normalize)
        target = empty(4_096, dtype=torch.int64)
        for fill in (None, rand(1, dim)):
            packing.unpack(rand(4_096, dim), target, fill)
    for kind, batch, length in product((torch.int64, torch.int32), (64, 2**20), (128, 512)):
        keep, ids = empty(batch, length, dtype=torch.bool), empty(batch, length, dtype=kind)
        for given in ((), (ids, ids), (None, ids)):
            packing.pack(keep, *given)


def launch_overlapped() -> None:
    """Every kernel once as it begins where launches overlap."""
    cu, half = empty(9), torch.float16
    x, square, vector = empty(16_896, 768, dtype=half), empty(768, 768, dtype=half), empty(768, dtype=half)
    ids = empty(16_896, dtype=torch.int64)
    with patch.object(_configs.modes, "overlap", True):
        for rows in (x[:64], x[:1_024], x):
            linear.linear(rows, square, vector, cu)
            linear_add_layer_norm.linear_add_layer_norm(rows, rows, square, vector, vector, vector, 1e-12, cu)
            bias_gelu.bias_gelu(rows, square, vector, "gelu", cu)
        for longest in (16, 128, 512):
            attention.attention(empty(16_896, 3 * 768, dtype=half), cu, longest, 12)
        layer_norm.add_layer_norm(x, x, vector, vector, 1e-12, cu)
        layer_norm.embed_layer_norm(ids, ids, square, square, vector, vector, 1e-12, cu)
        pooling.pool(x, cu, "mean", True)
        packing.unpack(x, packing.pack(empty(132, 128, dtype=torch.bool))[2])


def entries() -> list[Entry]:
    """Every distinct kernel that is launched, on every architecture."""
    found: dict[Entry, None] = {}
    for arch, precision in product(_configs.GEMM, ("ieee", "tf32")):
        with recorded(arch) as launches, patch.object(_configs, "matmul_precision", lambda p=precision: p):
            launch_all(precision)
            if precision == "ieee":
                launch_overlapped()
        found |= dict.fromkeys(launches)
    return list(found)


# --- compiling and judging ----------------------------------------------------------------------------------------


def binary(entry: Entry) -> Any:
    """What Triton makes of an entry, stage by stage."""
    target = GPUTarget("cuda", entry.arch, 32)
    src = ASTSource(
        entry.kernel,
        dict(entry.signature),
        dict(entry.constants),
        {path: [list(pair) for pair in value] for path, value in entry.attributes},
    )
    backend = make_backend(target)
    options = dict(entry.options) | {"enable_fp_fusion": True}  # as every launch
    return triton.compile(src, target=target, options=backend.parse_options(options).__dict__)


def compiled(entry: Entry) -> dict[str, Any]:
    """The entry's row of the table."""
    made = binary(entry)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers, f"cuobjdump printed {usage!r}"
    figures = {name: len(pattern.findall(sass)) for name, pattern in INSTRUCTIONS.items()}
    figures |= {"registers": int(registers[1]), "shared": made.metadata.shared}
    figures["offsets64"] = len(re.findall(r"tt\.addptr .*, (?:tensor<[\dx]*)?i64>?", made.asm["ttir"]))
    return {
        "key": entry.key,
        "sm": entry.arch,
        "kernel": entry.name.lstrip("_"),
        "launch": entry.describe(),
        **{name: str(figures[name]) for name in FIGURES},
    }


def _tool(name: str, *args: str) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([program, *args], capture_output=True, text=True, check=True).stdout


def unusable(row: dict[str, Any]) -> Iterator[str]:
    """Why a configuration is not worth timing."""
    sm = int(row["sm"])
    if int(row["spills"]):
        yield f"{row['spills']} spills"
    if int(row["shared"]) > SHARED_LIMIT[sm]:
        yield f"{row['shared']} bytes of shared memory, sm_{sm} has {SHARED_LIMIT[sm]}"


def resident(row: dict[str, Any]) -> int:
    """Programs that a multiprocessor holds at a time."""
    warps = int(re.findall(r"\bwarps=(\d+)", row["launch"])[0])
    chip = next(chip for chip in CHIPS.values() if chip.arch == int(row["sm"]))
    return chip.resident(int(row["registers"]), warps, int(row["shared"]))


def halved(row: dict[str, Any]) -> bool:
    """Whether it reads half precision: a product in parts, and pooling, write float32."""
    return not {"*fp16", "*bf16"}.isdisjoint(row["launch"].split())


def complaints(row: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a row of the table, whose configurations are shipped untimed."""
    yield from unusable(row)
    sm, launch, half = int(row["sm"]), row["launch"], halved(row)
    tile = re.search(r"\b(?:BLOCK_M|T)=(\d+)", launch)
    matrix = row["kernel"].startswith("gemm") or tile
    wanted, parts = OFFSETS64[row["kernel"]], int(re.findall(r"\bPARTS=(\d+)|$", launch)[0] or 1)
    if parts > 1:  # where each begins
        wanted += 1 if matrix else 2 * (parts - 1)
    if int(row["offsets64"]) < wanted:
        yield f"{row['offsets64']} pointers have 64-bit offsets, not {wanted}"
    if "BLOCK_M=128 BLOCK_N=128" in launch and row["kernel"] == "gemm_tma" and int(row["registers"]) > 128:
        yield "two programs of 256 threads do not fit a multiprocessor's registers"
    if half and sm == 90 and re.search(r"\bHEAD=(?:32|64)\b", launch) and resident(row) < 2:
        yield "a program alone on a multiprocessor, with nothing to do while it loads"
    if row["kernel"] == "gemm_pointer" and "VECTOR=1 " not in launch and not int(row["ldgsts"]):
        yield "no asynchronous copy"
    if matrix and half and not int(row["hgmma"]) + int(row["hmma"]):
        yield "no matrix instruction"
    if matrix and half and sm == 90 and tile and int(tile[1]) >= 64 and not int(row["hgmma"]):
        yield "no HGMMA, though the tile has 64 rows"
    if row["kernel"] == "gemm_tma" and not int(row["tma"]):
        yield "no TMA transfer"
    if half and sm in (90, 100) and "BLOCK_M=128" in launch and "EVEN_K=True" in launch:
        yield "large tiles without tensor descriptors"
    few = "MEAN=False" in launch or "COUNT=False" in launch  # cls reads a single row, pack one sequence of any place
    if not matrix and not int(row["wide"]) and not few:
        yield "no 16-byte access"
    if "PRECISION=ieee" in launch and not half and int(row["hgmma"]) + int(row["hmma"]):
        yield "IEEE float32, but a matrix instruction rounds its operands"
    if not half and int(row["tma"]):
        yield "float32 by tensor descriptors, which no test covers"


def load() -> dict[str, dict[str, Any]]:
    if not TABLE.exists():
        return {}
    with TABLE.open(newline="") as file:
        return {row["key"]: row for row in csv.DictReader(file)}


def write(rows: dict[str, dict[str, Any]]) -> None:
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows.values(), key=lambda row: (int(row["sm"]), row["kernel"], row["launch"])))


def _compiled_alone(entry: Entry) -> dict[str, Any] | str:
    try:
        return compiled(entry)
    except Exception as error:  # one kernel's failure is a line of the report, not the end of it
        return f"{type(error).__name__}: {str(error)[:300]}"


def _context() -> Any:
    """How processes are made: where CUDA has begun, from one in which it has not, for its locks are not for sharing."""
    if not torch.cuda.is_initialized():
        return multiprocessing.get_context("fork")
    clean = multiprocessing.get_context("forkserver")
    clean.set_forkserver_preload(["benchmarks.compile_gate"])
    return clean


def compile_all(wanted: list[Entry], jobs: int, keep: bool = False) -> Iterator[tuple[Entry, dict[str, Any] | str]]:
    """keep: leave the binaries in Triton's own cache, where a launch finds them."""
    with ExitStack() as stack:
        if not keep:
            cache = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(patch.dict(os.environ, TRITON_CACHE_DIR=cache))
        died: list[Entry] = []
        context = _context()
        with ProcessPoolExecutor(jobs, context) as pool:
            futures = {pool.submit(_compiled_alone, entry): entry for entry in wanted}
            for done in as_completed(futures):
                try:
                    yield futures[done], done.result()
                except BrokenProcessPool:
                    died.append(futures[done])
        for entry in died:  # one of them ended its process, and with it the others
            with ProcessPoolExecutor(1, context) as pool:
                try:
                    yield entry, pool.submit(_compiled_alone, entry).result()
                except BrokenProcessPool:
                    yield entry, "the compiler's process died"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the table is not right")
    parser.add_argument("--only", default="", help="a regular expression on 'sm kernel launch', for work on one kernel")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()

    started = time.monotonic()
    known, every = load(), entries()
    by_key = {entry.key: entry for entry in every}
    if args.only:
        pattern = re.compile(args.only)
        by_key = {k: e for k, e in by_key.items() if pattern.search(f"{e.arch} {e.name.lstrip('_')} {e.describe()}")}
    missing = [entry for key, entry in by_key.items() if key not in known]
    wanted = list(missing)
    if args.check:
        rotating = random.Random(datetime.date.today().toordinal())
        unchanged = sorted(key for key in by_key if key in known)
        wanted += [by_key[key] for key in rotating.sample(unchanged, min(SAMPLE, len(unchanged)))]
    rows = {key: row for key, row in known.items() if key in by_key}
    wrong: list[str] = []
    for entry, row in compile_all(wanted, args.jobs):
        name = f"sm_{entry.arch} {entry.name.lstrip('_')} {entry.describe()}"
        if isinstance(row, str):
            wrong.append(f"{name}: {row}")
        elif args.check and entry.key not in known:
            wrong.append(f"{name}: not in {TABLE.name}; run `make compile-table` and commit it")
        elif args.check and any(row[f] != known[entry.key][f] for f in FIGURES):
            wrong.append(
                f"{name}: compiles to {[row[f] for f in FIGURES]}, not {[known[entry.key][f] for f in FIGURES]}"
            )
        else:
            rows[entry.key] = row
        if not args.check and not args.only and len(rows) % 50 == 0:
            write(rows)  # nothing done is lost
    if not args.check and not args.only:
        write(rows)
    for row in rows.values():
        wrong += [f"sm_{row['sm']} {row['kernel']} {row['launch']}: {what}" for what in complaints(row)]
    if args.only:
        for row in sorted(rows.values(), key=lambda row: (row["kernel"], row["launch"])):
            print(*(f"{name}={row[name]}" for name in FIGURES), f"sm_{row['sm']}", row["kernel"], row["launch"])
    for line in sorted(wrong):
        print("WRONG", line)
    for sm in sorted({int(row["sm"]) for row in rows.values()}):
        registers = [int(row["registers"]) for row in rows.values() if int(row["sm"]) == sm]
        print(f"sm_{sm}: {len(registers)} kernels, at most {max(registers)} registers")
    spills = sum(int(row["spills"]) > 0 for row in rows.values())
    architectures = len({int(row["sm"]) for row in rows.values()})
    print(
        f"{len(rows)} configurations, {architectures} architectures, {spills} with spills, {len(wrong)} complaints; "
        f"{len(wanted)} compiled in {time.monotonic() - started:.0f} s with Triton {triton.__version__}"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
