"""What a launch does on the host: nothing read back, nothing allocated but the result, one configuration a shape class.

Launches on the meta device are recorded instead of run, by the compile gate's machinery, so no GPU is needed.
"""

import collections
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdistil import ops
from fastdistil.kernels import _configs
from fastdistil.kernels._target import interpreted
from fastdistil.testing import cu_seqlens, hold_to_definition

if interpreted():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

compile_gate = pytest.importorskip("benchmarks.compile_gate")


@pytest.fixture(scope="module")
def entries():
    return compile_gate.entries()


def test_the_table_holds_every_launch_and_nothing_else(entries):
    if not compile_gate.TABLE.exists():
        pytest.skip(f"no table for Triton {compile_gate.triton.__version__}")
    known = compile_gate.load()
    assert {entry.key for entry in entries} == set(known), "run `make compile-table` and commit the table"
    assert [line for row in known.values() for line in compile_gate.complaints(row)] == []


def test_every_form_is_launched(entries):
    launched = {(e.arch, e.name) for e in entries}
    for arch in _configs.GEMM:
        names = {name for a, name in launched if a == arch}
        assert names >= {
            "_add_layer_norm",
            "_embed_layer_norm",
            "_pool",
            "_short",
            "_single",
            "_looped",
            "gemm_pointer",
        }
        assert ("gemm_tma" in names) == (arch in (90, 100))
        odd = [e for e in entries if e.arch == arch and "HEAD=96" in e.describe()]
        assert {e.name for e in odd} == {"_looped"}
    text = " ".join(e.describe() for e in entries if e.arch == 90)
    tiles = [c for c in _configs.GEMM[90].values() if isinstance(c, _configs.Gemm)]
    assert all(f"BLOCK_M={c.block_m} BLOCK_N={c.block_n} BLOCK_K={c.block_k}" in text for c in tiles)


class Allocations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_launch_allocates_its_result_and_does_nothing_else():
    e = compile_gate.empty
    half = torch.float16
    x, cu = e(300, 768, dtype=half), e(9)
    wide, weight, bias = e(300, 3 * 768, dtype=half), e(768, 768, dtype=half), e(768, dtype=half)
    ids, ends = e(300, dtype=torch.int64), compile_gate.linear_add_layer_norm.linear_add_layer_norm
    calls = [
        lambda: compile_gate.linear.linear(x, weight, bias, cu),
        lambda: compile_gate.qkv_projection.qkv_projection(x, e(2304, 768, dtype=half), e(2304, dtype=half), cu),
        lambda: compile_gate.bias_gelu.bias_gelu(x, weight, bias, "gelu", cu),
        *(lambda n=n: compile_gate.attention.attention(wide, cu, n, 12, e(12, dtype=half)) for n in (16, 64, 512)),
        lambda: compile_gate.layer_norm.add_layer_norm(x, x, bias, bias, 1e-12, cu),
        lambda: ends(x, x, weight, bias, bias, bias, 1e-12, cu),
        lambda: compile_gate.layer_norm.embed_layer_norm(ids, ids, weight, weight, bias, bias, 1e-12, cu),
        lambda: compile_gate.pooling.pool(x, cu, "mean", True),
    ]
    with compile_gate.recorded(90) as launches:
        for call in calls:
            with Allocations() as seen:
                call()
            # arguments made by the lambdas above are allocations too: none reads or computes
            assert seen.calls and set(seen.calls) <= {"aten.empty.memory_format", "aten.new_empty.default"}
    assert len(launches) == len(calls) + 1  # linear_add_layer_norm has two


def test_one_kernel_whatever_the_batch():
    """No size of a batch is fixed at compile time, so a new one compiles nothing; only the shape class counts."""
    e, half = compile_gate.empty, torch.float16

    def launched(rows, batch):
        with compile_gate.recorded(90) as launches:
            x, cu = e(rows, 768, dtype=half), e(batch + 1)
            compile_gate.linear.linear(x, e(768, 768, dtype=half), e(768, dtype=half), cu)
            compile_gate.attention.attention(e(rows, 2304, dtype=half), cu, 512, 12)
            compile_gate.layer_norm.add_layer_norm(x, x, e(768, dtype=half), e(768, dtype=half), 1e-12, cu)
            compile_gate.pooling.pool(x, cu)
        return {entry.key for entry in launches}

    assert launched(1500, 1) == launched(2048, 16) == launched(5760, 33)
    assert launched(4096, 1) == launched(5632, 16) == launched(16_897, 33)
    assert launched(65, 1) == launched(1280, 16)
    assert launched(1, 1) == launched(16, 16) == launched(64, 3)


def test_batch_invariant_launches_are_the_same_for_every_size(modes):
    modes.batch_invariant = True
    e, half = compile_gate.empty, torch.float16

    def launched(rows, longest):
        with compile_gate.recorded(90) as launches:
            x = e(rows, 768, dtype=half)
            compile_gate.linear.linear(x, e(768, 768, dtype=half), e(768, dtype=half), e(9))
            compile_gate.linear.linear(e(rows, 3072, dtype=half), e(768, 3072, dtype=half), e(768, dtype=half), e(9))
            ends, vector = e(rows, 3072, dtype=half), e(768, dtype=half)
            norm = vector, vector, vector, 1e-12, e(9)
            compile_gate.linear_add_layer_norm.linear_add_layer_norm(ends, x, e(768, 3072, dtype=half), *norm)
            compile_gate.attention.attention(e(rows, 2304, dtype=half), e(9), longest, 12)
        return [entry.key for entry in launches]

    assert launched(1, 1) == launched(64, 64) == launched(500, 128) == launched(16_896, 512)


def test_no_launch_goes_by_tritons_default_of_fused_multiplications(monkeypatch):
    """Which Triton 3.10 is to change."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    with compile_gate.recorded(90) as launches:
        compile_gate.launch_all("ieee")
        compile_gate.launch_overlapped()
    assert len(launches) > 100


def test_the_memory_checked_pass_launches_every_kernel():
    """What test_memcheck runs, recorded: on sm_90 it must meet every kernel, that of tensor descriptors too."""
    from fastdistil import ops
    from tests.kernels.test_memcheck import PASS

    def dispatch(name, module):
        return lambda *args, **kwargs: getattr(module, name)(*args, **kwargs)

    g = compile_gate
    modules = {
        "embed_layer_norm": g.layer_norm,
        "qkv_projection": g.qkv_projection,
        "linear": g.linear,
        "attention": g.attention,
        "add_layer_norm": g.layer_norm,
        "linear_add_layer_norm": g.linear_add_layer_norm,
        "bias_gelu": g.bias_gelu,
        "pool": g.pooling,
        "pack": g.packing,
        "unpack": g.packing,
    }
    script = re.sub(
        r"^torch.cuda.synchronize.*$|^    torch.cuda.synchronize.*$", "", PASS.replace('"cuda"', '"meta"'), flags=re.M
    )
    forms = {name: dispatch(name, module) for name, module in modules.items()}
    with (
        g.recorded(90) as launches,
        patch.multiple(ops, **forms),
        patch.object(_configs, "processors", lambda device: 132),
    ):
        exec(script, {})
    assert {e.name for e in launches} == {e.name for e in g.entries() if e.arch == 90}


def test_precision_and_gelu_are_those_asked_for(modes):
    e = compile_gate.empty

    def launched(dtype):
        with compile_gate.recorded(90) as launches:
            x, w, b = e(16_896, 768, dtype=dtype), e(768, 768, dtype=dtype), e(768, dtype=dtype)
            compile_gate.bias_gelu.bias_gelu(x, w, b, "gelu", e(9))
            compile_gate.attention.attention(e(300, 2304, dtype=dtype), e(9), 512, 12)
        return [entry.describe() for entry in launches]

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            matmul.fp32_precision = precision
            assert all(f"PRECISION={precision}" in text for text in launched(torch.float32))
            assert "ACTIVATION=gelu " in launched(torch.float32)[0]
    finally:
        matmul.fp32_precision = before
    for exact in (False, True):
        modes.exact_gelu = exact
        assert ("ACTIVATION=near_gelu" in launched(torch.float16)[0]) is not exact


def test_wide_tiles():
    """DistilBERT-base on 132 multiprocessors: where no activation follows and their last wave is not too empty."""

    def size(op, rows, n, precision="half"):
        return _configs.size_class(op, precision, rows, n, 768, 132)

    for rows in (5_632, 8_192, 11_264, 16_896):
        assert size("qkv_projection", rows, 2_304) == "wide"
        assert size("linear", rows, 768) == ("many" if rows == 8_192 else "wide")  # 192 tiles take two waves of 132
        assert size("bias_gelu", rows, 3_072) == size("linear", rows, 768, "ieee") == "many"
        assert size("linear", rows, 768 + 128) == "many"
    assert size("linear", 5_760, 768) == "many"  # 135 tiles
    assert [size("linear", rows, 768) for rows in (64, 65, 1_280, 1_408)] == ["16", "some", "some", "many"]


def test_tiles_of_few_rows():
    """As low as leaves no multiprocessor two of them; where programs share a tile's depth, of all rows."""

    def sizes(op, n, processors=132, k=768, precision="half"):
        return [_configs.size_class(op, precision, rows, n, k, processors) for rows in (1, 16, 17, 32, 33, 64)]

    assert sizes("linear_add_layer_norm", 768) == ["16", "16", "32", "32", "64", "64"]
    shallow = dict(op="linear_add_layer_norm", n=384, k=384)  # three steps, which nobody shares
    assert sizes(**shallow) == sizes("linear", 384) == ["16"] * 6
    assert sizes(**shallow, precision="tf32")[-1] == "64" and sizes(**shallow | {"k": 385})[-1] == "64"
    assert sizes("linear", 768) == ["16"] * 6 and sizes("linear", 768, 58) == ["16", "16", "16", "16", "32", "32"]
    assert sizes("linear", 768, 96)[-1] == "16" and sizes("linear", 768, 95)[-1] == "32"
    assert sizes("qkv_projection", 2_304) == ["16", "16", "32", "32", "64", "64"]
    assert sizes("qkv_projection", 2_304, 148) == ["16", "16", "16", "16", "32", "32"]
    assert sizes("bias_gelu", 1_536) == ["16", "16", "16", "16", "32", "32"]


@pytest.mark.parametrize("size", ["16", "some", "many", "wide"])
def test_whose_configuration_serves_where_a_norm_follows(size):
    """The product's own, but where programs may share its depth."""
    assert _configs.searched_as("bias_gelu", size) == "bias_gelu"
    mine, rows = (
        _configs.Gemm("pointer", 32, 32, 32, warps=2, stages=2),
        {"16": 9, "some": 99, "many": 8_192}.get(size, 16_896),
    )
    device = torch.device("meta")
    for op, others in (("linear", ("many", "wide")), ("linear_add_layer_norm", ("16", "some"))):
        with patch.dict(_configs.RECORDED, {(90, op, f"half/{size}"): mine}), compile_gate.recorded(90):
            found = _configs.gemm("linear_add_layer_norm", rows, 768, 768, torch.float16, device, True).config
            assert (found is mine) == (size in others)


def test_how_many_programs_share_a_tile():
    """While multiprocessors are idle, and none has a single step of its depth."""
    config = dataclasses.replace(_configs.SMALL["half", "16"], parts=8)
    base, told = (768, 3_072), [(16, 768, 768), (16, 384, 1_536), (1, 32, 8_192), (1, 32, 256), (1, 32, 512)]
    assert [_configs.parts(config, rows, *base, 132) for rows in (1, 16, 17, 33, 49)] == [4, 4, 2, 1, 1]
    assert [_configs.parts(config, *one, 132) for one in told] == [2, 4, 8, 1, 2]
    assert _configs.parts(config, 16, *base, 58) == 2 and _configs.parts(config, 16, *base, 10_000) == 8
    assert _configs.parts(dataclasses.replace(config, parts=1), 16, *base, 132) == 1

    def launched(rows, depth):
        e, half = compile_gate.empty, torch.float16
        vector = e(768, dtype=half)
        with compile_gate.recorded(90) as launches:
            compile_gate.linear_add_layer_norm.linear_add_layer_norm(
                *(e(rows, depth, dtype=half), e(rows, 768, dtype=half), e(768, depth, dtype=half)),
                *(vector, vector, vector, 1e-12, e(9)),
            )
        return [re.findall(r"PARTS=(\d)", one.describe()) for one in launches], launches

    for rows, depth, parts in [
        (16, 3_072, "4"),
        (64, 768, "2"),
        (128, 3_072, "4"),
        (256, 3_072, "2"),
        (384, 3_072, "1"),
    ]:
        assert launched(rows, depth)[0] == [[parts], [parts]]
    assert launched(16_896, 768)[0] == [[], ["1"]]  # by tensor descriptors
    assert "ROWS=1 " in launched(64, 3_072)[1][1].describe() and "ROWS=4 " in launched(384, 3_072)[1][1].describe()


def test_a_width_that_8_divides_is_read_16_bytes_at_a_time():
    """The compiler is told of multiples of 16 alone."""
    e, half = compile_gate.empty, torch.float16
    for width, wide in ((312, True), (600, True), (301, False)):
        with compile_gate.recorded(80) as launches:
            compile_gate.linear.linear(e(300, width, dtype=half), e(312, width, dtype=half), e(312, dtype=half))
        row = compile_gate.compiled(launches[0])
        assert (int(row["wide"]) > 8 and int(row["ldgsts"]) > 8) is wide, row
        assert row["spills"] == "0" and ("BLOCK_K=64" in row["launch"]) is wide  # number by number in shallow tiles
        assert bool(list(compile_gate.complaints(row | {"ldgsts": "0"}))) is wide
    with compile_gate.recorded(80) as launches:  # a classifier's two columns do not matter to what is read
        compile_gate.linear.linear(e(16, 768, dtype=half), e(2, 768, dtype=half), e(2, dtype=half))
    assert int(compile_gate.compiled(launches[0])["wide"]) > 8
    with compile_gate.recorded(100) as launches:
        compile_gate.linear.linear(e(16_896, 312, dtype=half), e(600, 312, dtype=half), e(600, dtype=half))
    assert launches[0].name == "gemm_tma" and compile_gate.compiled(launches[0])["spills"] == "0"


def test_offsets_that_the_gate_asks_for():
    """One more where a program's part of a product begins, two for each part that is added up."""
    row = {"kernel": "gemm_pointer", "sm": "80", "spills": "0", "shared": "0", "hgmma": "0", "hmma": "9", "ldgsts": "9"}
    told = [("gemm_pointer", "PARTS=2", 4), ("gemm_pointer", "PARTS=1", 3), ("add_layer_norm", "PARTS=4", 9)]
    for kernel, parts, least in told:
        one = row | {"kernel": kernel, "launch": f"*fp16 *fp32 {parts} VECTOR=8 warps=4", "registers": "9", "wide": "9"}
        assert not list(compile_gate.complaints(one | {"offsets64": str(least)}))
        (why,) = compile_gate.complaints(one | {"offsets64": str(least - 1)})
        assert why == f"{least - 1} pointers have 64-bit offsets, not {least}"


def test_recorded_configurations_come_first():
    device, mine = torch.device("meta"), _configs.Gemm("pointer", 32, 32, 32, warps=2, stages=2)
    with patch.dict(_configs.RECORDED, {(90, "linear", "half/many"): mine}), compile_gate.recorded(90):
        assert _configs.gemm("linear", 5760, 768, 768, torch.float16, device, True).config is mine
        assert _configs.gemm("bias_gelu", 5760, 768, 768, torch.float16, device, True).config is not mine
    with compile_gate.recorded(80):
        assert _configs.gemm("linear", 5760, 768, 768, torch.float16, device, True).config.family == "pointer"


def test_launches_that_overlap_wait_for_the_one_before(modes):
    """In this order: whoever let the next one begin first would let it write where the last but one still reads."""
    with compile_gate.recorded(90) as launches:
        compile_gate.launch_overlapped()
    assert {e.name for e in launches} == {e.name for e in compile_gate.entries() if e.arch == 90}
    for entry in launches:
        text = compile_gate.binary(entry).asm["ptx"]
        first = re.search(r"griddepcontrol|(?<!param)\b(?:ld|st|cp)\.(?:global|async)", text)
        assert first and first[0] == "griddepcontrol", entry.describe()
        assert re.findall(r"griddepcontrol\.\w+", text) == ["griddepcontrol.wait", "griddepcontrol.launch_dependents"]
    modes.overlap = True
    with compile_gate.recorded(80) as launches:
        x, w, b = (compile_gate.empty(*s, dtype=torch.float16) for s in ((64, 768), (768, 768), (768,)))
        compile_gate.linear.linear(x, w, b)
    assert dict(launches[0].constants)[(len(launches[0].kernel.params) - 1,)] is False  # sm_80 cannot


def test_where_the_library_serves(modes):
    """In IEEE float32, wherever dead rows cost little; else where a measurement says so and none is dead."""
    device, library, mine = torch.device("meta"), _configs.Library(), _configs.Gemm("pointer", 32, 32, 32, 2, 2)

    def config(rows, dtype, whole, aligned=True):
        return _configs.gemm("linear", rows, 768, 768, dtype, device, aligned, whole=whole).config

    with compile_gate.recorded(90):
        for rows, whole, found in ((8, False, True), (300, False, True), (16_896, False, False), (16_896, True, True)):
            assert isinstance(config(rows, torch.float32, whole), _configs.Library) is found
        assert not any(isinstance(config(rows, torch.float16, True), _configs.Library) for rows in (8, 300, 16_896))
        with patch.dict(
            _configs.RECORDED, {(90, "linear", "half/wide/whole"): library, (90, "linear", "half/wide"): mine}
        ):
            _configs._gemm.cache_clear()
            assert config(16_896, torch.float16, True) == library and config(16_896, torch.float16, False) is mine
            modes.batch_invariant = True
            assert config(16_896, torch.float16, True) is mine
            assert not any(isinstance(config(r, torch.float32, True), _configs.Library) for r in (8, 300, 16_896))
        modes.batch_invariant = False
        with patch.dict(
            _configs.RECORDED, {(90, "linear", "ieee/many"): mine}
        ):  # the library was not quicker than this
            _configs._gemm.cache_clear()
            assert config(16_896, torch.float32, True) is mine
    _configs._gemm.cache_clear()


@pytest.mark.parametrize("op", ["qkv_projection", "linear", "bias_gelu"])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_the_librarys_product(op, activation, monkeypatch):
    launch = _configs.GemmLaunch(_configs.Library(), precision="ieee", near_gelu=False, programs=0)
    monkeypatch.setattr(_configs, "gemm", lambda *a, **k: launch)
    x, w, b = torch.randn(9, 12), torch.randn(24, 12), torch.randn(24)
    more = (activation,) if op == "bias_gelu" else ()
    form = getattr(getattr(compile_gate, op), op)
    hold_to_definition(op, x, w, b, *more, cu_seqlens([4, 5]), live=9, dead=3, form=form)
    hold_to_definition(op, x, w, b, *more, form=form)


def wavefronts(ttgir, warps):
    """(cycles that a multiprocessor's shared memory is busy for an IEEE product's operands, those of its multipliers),
    each a step of the loop. Of 32 lanes 16 bytes each, those that lie in the same banks wait for one another."""
    layout = r"(#\w+) = #ttg.blocked<{sizePerThread = \[(.*?)\], threadsPerWarp = \[(.*?)\], warpsPerCTA = \[(.*?)\]"
    blocked = {m[0]: [[int(n) for n in part.split(",")] for part in m[1:]] for m in re.findall(layout, ttgir)}
    shared = dict(re.findall(r"(#\w+) = #ttg.swizzled_shared<{.*?maxPhase = 1, order = \[(.*?)\]", ttgir))
    loads = r"local_load .*memdesc<(\d+)x(\d+)xf32, (#\w+),.*opIdx = (\d), parent = (#\w+)}"
    busy = 0
    for *sizes, memory, operand, parent in re.findall(loads, ttgir):
        free = int(operand)  # the dimension that is not summed over
        length, depth = int(sizes[free]), int(sizes[1 - free])
        each, lanes, across = (part[free] for part in blocked[parent])
        along_free = shared[memory].startswith(str(free))
        starts = {lane * each * 4 * (1 if along_free else depth) // 16 for lane in range(lanes)}
        conflicts = max(collections.Counter(start % 8 for start in starts).values())
        busy += warps * each * max(1, length // (each * lanes * across)) * depth // 4 * conflicts
    m, k, n = map(int, re.search(r"tt.dot .*: tensor<(\d+)x(\d+)xf32.* -> tensor<\d+x(\d+)xf32", ttgir).groups())
    return busy, m * k * n // 128


def test_ieee_products_do_not_wait_for_shared_memory():
    """With both operands along K they would: 16 lanes in the same banks, four times the multipliers' cycles."""
    e, found = compile_gate.empty, {}
    for across in (True, False):
        config = dataclasses.replace(_configs.GEMM[90]["ieee", "many"], across=across)
        with (
            patch.dict(_configs.RECORDED, {(90, "linear", "ieee/many"): config}),
            compile_gate.recorded(90) as launches,
        ):
            x, w, b = (e(*shape, dtype=torch.float32) for shape in ((16_896, 768), (768, 768), (768,)))
            compile_gate.linear.linear(x, w, b, e(9))
        found[across] = wavefronts(compile_gate.binary(launches[-1]).asm["ttgir"], config.warps)
    assert found[True][0] < found[True][1] and found[False][0] > 2 * found[False][1]


COMPILE = """
from benchmarks import compile_gate
entries = [e for e in compile_gate.entries() if e.arch == 90 and e.name in ("_pool", "_add_layer_norm")][:6]
for entry in entries:
    print(compile_gate.compiled(entry))
"""


def test_two_processes_share_a_cold_cache(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": "."}
    root = Path(__file__).resolve().parent.parent.parent
    both = [
        subprocess.Popen(
            [sys.executable, "-c", COMPILE], cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    (first, errors), (second, more) = (process.communicate() for process in both)
    assert [process.returncode for process in both] == [0, 0], errors + more
    assert first == second and len(re.findall(b"registers", first)) == 6
    assert any(tmp_path.iterdir())
