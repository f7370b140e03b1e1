"""Breaks each kernel in a copy of the tree and asks that its tests notice."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastdistil.kernels._target import interpreted

ROOT = Path(__file__).resolve().parent.parent.parent
LIVE_GEMM = "tl.minimum(tl.load(cu_seqlens_ptr + batch), M)"

# errors that say nothing about what a kernel computes
NO_JUDGEMENT = re.compile(r"^E\s+\S*(?:Import|ModuleNotFound|Name|Attribute|Syntax|Type)Error\b", re.MULTILINE)

# kernel file, tests::those likely to notice (run first), what is there, what is put in its place
MUTANTS = {
    "gemm: tail of K read": ("_gemm", "gemm", "< left", "<= left"),
    "gemm: cut to what it reads at once": ("_gemm", "gemm::shapes", "16 // size if aligned else 1", "16 // size"),
    "gemm: tail of N stored": (
        "_gemm",
        "gemm::dead_rows",
        "mask=(row < live)[:, None] & (column < N)[None, :]",
        "mask=(row < live)[:, None] & (column < N + 8)[None, :]",
    ),
    "gemm: dead rows stored": ("_gemm", "gemm::dead_rows", "mask=(row < live)[:, None] &", "mask=(row < M)[:, None] &"),
    "gemm: tiles of dead rows computed": (
        "_gemm",
        "gemm::dead_rows",
        "m_tiles = tl.cdiv(live, BLOCK_M)",
        "m_tiles = tl.cdiv(M, BLOCK_M)",
    ),
    "gemm: live count not cut": ("_gemm", "gemm::dead_rows", LIVE_GEMM, "tl.load(cu_seqlens_ptr + batch)"),
    "gemm: no bias": ("_gemm", "gemm", "activate(acc + bias[None, :],", "activate(acc,"),
    "gemm: second half in the first's place": (
        "_gemm",
        "gemm::configuration",
        "_store(right, y_desc, bias_ptr, row, column + BLOCK_N // 2,",
        "_store(right, y_desc, bias_ptr, row, column,",
    ),
    "gemm: last group of tiles": (
        "_gemm",
        "gemm",
        "first + inner % height, inner // height",
        "first + inner % GROUP, inner // GROUP",
    ),
    "gemm: persistent program stops early": (
        "_gemm",
        "gemm::configuration",
        "range(tl.program_id(0), m_tiles * n_tiles, programs,",
        "range(tl.program_id(0), m_tiles * n_tiles - 1, programs,",
    ),
    "gemm: turned weight walked like the other": (
        "_gemm",
        "gemm::tries",
        "weight_at += BLOCK_K * N",
        "weight_at += BLOCK_K",
    ),
    "gelu: tanh for erf": (
        "_gemm",
        "gemm::activations",
        "x * (0.5 * tl.erf(x * 0.7071067811865476) + 0.5)",
        "x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))",
    ),
    "gelu: near form's polynomial": ("_gemm", "gemm::near_form", "0.0829649", "0.0839649"),
    "relu: loses a NaN": ("_gemm", "gemm::relu", "tl.where(x < 0.0, 0.0, x)", "tl.where(x > 0.0, x, 0.0)"),
    "linear: live count dropped": ("linear", "gemm::dead_rows", '"none", cu_seqlens)', '"none", None)'),
    "linear_add_layer_norm: product's live count dropped": (
        "linear_add_layer_norm",
        "linear_add_layer_norm::dead_rows",
        '"none", cu_seqlens, in_parts',
        '"none", None, in_parts',
    ),
    "linear_add_layer_norm: live count dropped": (
        "linear_add_layer_norm",
        "linear_add_layer_norm::dead_rows",
        "eps, cu_seqlens)",
        "eps, None)",
    ),
    "parts: each with the bias": (
        "_gemm",
        "linear_add_layer_norm::share_a_tile",
        "told = told & (first == 0)",
        "told = told",
    ),
    "parts: one upon the other": (
        "_gemm",
        "linear_add_layer_norm::share_a_tile",
        "y_ptr += tl.program_id(1)",
        "y_ptr += 0 * tl.program_id(1)",
    ),
    "parts: tail of K read": (
        "_gemm",
        "linear_add_layer_norm::share_a_tile",
        "K - (step - first) * BLOCK_K",
        "K - step * BLOCK_K + first * BLOCK_K + 1",
    ),
    "parts: past the last step": (
        "_gemm",
        "linear_add_layer_norm::share_a_tile",
        "tl.minimum(first + each, steps)",
        "first + each",
    ),
    "parts: the last one left out": (
        "layer_norm",
        "linear_add_layer_norm::share_a_tile",
        "tl.static_range(1, PARTS)",
        "tl.static_range(1, PARTS - 1)",
    ),
    "parts: rounded before they are added": (
        "_gemm",
        "linear_add_layer_norm::not_rounded",
        "(parts, M, N, dtype=torch.float32)",
        "(parts, M, N, dtype=x.dtype)",
    ),
    "qkv_projection: live count dropped": ("qkv_projection", "gemm::dead_rows", '"none", cu_seqlens)', '"none", None)'),
    "bias_gelu: live count dropped": ("bias_gelu", "gemm::dead_rows", "activation, cu_seqlens)", "activation, None)"),
    "attention: a neighbour's NaN": (
        "attention",
        "attention::where_a_result",
        'float("inf"), 0, 1)) == 0',
        'float("inf"), 0, 1)) >= 0',
    ),
    "attention: its own infinity": (
        "attention",
        "attention::where_a_result",
        "tl.where(its, v, 0.0)",
        'tl.where(its & (tl.abs(v) < float("inf")), v, 0.0)',
    ),
    "attention: the last sequence of those with an infinity": (
        "attention",
        "attention::where_a_result",
        "tl.max(sequence) + 1",
        "tl.max(sequence)",
    ),
    "attention: past the rows, short": (
        "attention",
        "attention::past_the_rows",
        "| (end > rows)",
        "| (end > 2 * rows)",
    ),
    "attention: past the rows, single": ("attention", "attention::past_the_rows", "| (told > rows)", "| (rows < 0)"),
    "attention: past the rows, looped": (
        "attention",
        "attention::past_the_rows",
        "tl.where(told > rows, float(",
        "tl.where(rows < 0, float(",
    ),
    "attention: rows below the first sequence": (
        "attention",
        "attention::dead_rows",
        "inside = inside & (row >= start)",
        "inside = inside",
    ),
    "attention: scale": ("attention", "attention::head_sizes", "head_size**-0.5", "(head_size + 0.1) ** -0.5"),
    "attention: log2(e)": ("attention", "attention::head_sizes", "1.4426950408889634", "1.4427"),
    "attention: looped mask off by one": (
        "attention",
        "attention::head_sizes",
        "(at < end)[None, :]",
        "(at <= end)[None, :]",
    ),
    "attention: single without its mask": (
        "attention",
        "attention::every_form and single and short",
        'tl.where(inside[None, :], scores, float("-inf"))',
        "scores",
    ),
    "attention: short forgets the dead": (
        "attention",
        "attention::lengths and short",
        "(start[:, None] == start[None, :]) & inside[None, :]",
        "start[:, None] == start[None, :]",
    ),
    "attention: short forgets its neighbours": (
        "attention",
        "attention::lengths and short",
        "(start[:, None] == start[None, :]) & inside[None, :]",
        "inside[None, :] & inside[:, None]",
    ),
    "attention: dead values read": (
        "attention",
        "attention::head_sizes",
        "_load(qkv_ptr, at, at < end, (2",
        "_load(qkv_ptr, at, at < rows, (2",
    ),
    "attention: sum not rescaled": ("attention", "attention::head_sizes", "total * shrink + ", "total + "),
    "attention: output not rescaled": ("attention", "attention::head_sizes", "o * shrink[:, None]", "o"),
    "attention: first sequence of a step": (
        "attention",
        "attention::lengths and short",
        "(start >= first) &",
        "(start > first) &",
    ),
    "attention: overlong unnoticed": ("attention", "attention::longer_than", "> T - STEP + 1", "> T"),
    "attention: overlong unnoticed in single": (
        "attention",
        "attention::longer_than",
        "(end - start > T)",
        "(end - start > 2 * T)",
    ),
    "attention: one head's scale for all": (
        "attention",
        "attention::head_sizes",
        "head_scale_ptr + head",
        "head_scale_ptr",
    ),
    "attention: tile of the next sequence": (
        "attention",
        "attention::head_sizes",
        "// T + later <= tile",
        "// T + later < tile",
    ),
    "attention: dead rows stored": (
        "attention",
        "attention::dead_rows",
        "live = tl.minimum(tl.load(cu_seqlens_ptr + batch), rows)",
        "live = rows",
    ),
    "layer_norm: eps": ("layer_norm", "layer_norm", "variance + eps", "variance + 1e-5"),
    "layer_norm: unbiased variance": (
        "layer_norm",
        "layer_norm",
        "tl.sum(centred * centred, axis=1) / DIM",
        "tl.sum(centred * centred, axis=1) / (DIM - 1)",
    ),
    "layer_norm: columns outside counted": (
        "layer_norm",
        "layer_norm",
        "tl.where(inside[None, :], s - mean[:, None], 0.0)",
        "s - mean[:, None]",
    ),
    "layer_norm: dead rows stored": (
        "layer_norm",
        "layer_norm::dead_rows",
        "mask = (row < live)[:, None]",
        "mask = (row < rows)[:, None]",
    ),
    "layer_norm: no residual": (
        "layer_norm",
        "layer_norm",
        "s += tl.load(residual_ptr + at",
        "tl.load(residual_ptr + at",
    ),
    "layer_norm: live count not cut": (
        "layer_norm",
        "layer_norm::dead_rows",
        "tl.minimum(tl.load(cu_seqlens_ptr + batch), rows)",
        "tl.load(cu_seqlens_ptr + batch)",
    ),
    "embeddings: dead rows stored": (
        "layer_norm",
        "layer_norm::dead_rows",
        "mask=(row < live)[:, None] & inside[None, :])",
        "mask=(row < rows)[:, None] & inside[None, :])",
    ),
    "embeddings: last word's neighbour": (
        "layer_norm",
        "layer_norm::outside_its_table",
        "(word < vocabulary)",
        "(word <= vocabulary)",
    ),
    "embeddings: negative position": (
        "layer_norm",
        "layer_norm::outside_its_table",
        "(position >= 0)",
        "(position >= -1)",
    ),
    "layer_norm: ids cut to 32 bits": (
        "layer_norm",
        "layer_norm::outside",
        "mask=row < live, other=0).to(tl.int64)",
        "mask=row < live, other=0).to(tl.int32).to(tl.int64)",
    ),
    "strided cu_seqlens": (
        "_configs",
        "gemm::strided_count",
        "(cu_seqlens.contiguous(), cu_seqlens.shape[0] - 1)",
        "(cu_seqlens, cu_seqlens.shape[0] - 1)",
    ),
    "pooling: one more": ("pooling", "pooling", "tl.maximum(end - start, 1)", "(end - start + 1)"),
    "pooling: mask off by one": ("pooling", "pooling", "(row < end)", "(row <= end)"),
    "pooling: norm without its root": ("pooling", "pooling", "tl.sqrt_rn(tl.sum(y * y, axis=0))", "tl.sum(y * y)"),
    "pooling: norm's floor": ("pooling", "pooling::any_scale", "1e-12", "1e-3"),
    "pooling: rows before the first": (
        "pooling",
        "pooling::nonsense",
        "tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0)",
        "tl.load(cu_seqlens_ptr + sequence)",
    ),
    "pooling: past the rows": ("pooling", "pooling::nonsense", "tl.where(told > rows,", "tl.where(rows < 0,"),
    "pooling: an empty sequence's first row": ("pooling", "pooling", "tl.where(start < end, DIM, 0)", "DIM"),
    "pack: a neighbour counted": ("packing", "pack::itself", "mask=tail < first", "mask=tail <= first"),
    "pack: only a first block counted": (
        "packing",
        "pack::itself",
        "range(0, whole, BEFORE)",
        "range(0, 1, BEFORE)",
    ),
    "pack: dead rows in the wrong order": ("packing", "pack", "total - 1 - (p - after)", "total - (p - after)"),
    "pack: dead rows' source": ("packing", "pack", "tl.where(real, p, 0)", "p"),
    "pack: dead rows' ids": (
        "packing",
        "pack",
        "input_ids_ptr + p, mask=inside & real",
        "input_ids_ptr + p, mask=inside",
    ),
    "pack: a block starts anew": ("packing", "pack", "row += tl.sum(kept, axis=0)", "row += 0"),
    "pack: one sequence's positions": ("packing", "pack", "* position_step + column", "* 0 + column"),
    "pack: told the count of the next": (
        "packing",
        "pack::told",
        "cu_seqlens_ptr + sequence)",
        "cu_seqlens_ptr + sequence + 1)",
    ),
    "unpack: dead rows": (
        "packing",
        "pack::unpack",
        "there = (row >= 0) &",
        "there = (row >= -1) &",
    ),
    "unpack: rows that are not there": ("packing", "pack::unpack", "(row < capacity)", "(row <= capacity)"),
    "unpack: fill everywhere": (
        "packing",
        "pack::unpack",
        "tl.where((row >= 0)[:, None], x,",
        "tl.where((row < 0)[:, None], x,",
    ),
    "unpack: columns of the next row": (
        "packing",
        "pack::unpack",
        "inside = (column < DIM)",
        "inside = (column <= DIM)",
    ),
}


@pytest.mark.skipif(not interpreted(), reason="runs under Triton's interpreter")
@pytest.mark.parametrize(("kernel", "tests", "old", "new"), MUTANTS.values(), ids=MUTANTS)
def test_a_broken_kernel_is_noticed(kernel, tests, old, new, tmp_path, run_tests):
    copy_tree(tmp_path)
    path = tmp_path / "kernels" / f"{kernel}.py"
    source = path.read_text()
    assert old in source, f"the mutation does not apply to {kernel}.py any more"
    path.write_text(source.replace(old, new))
    file, _, likely = tests.partition("::")
    for only in dict.fromkeys((likely, "")):
        output = run_tests(tmp_path, f"tests/kernels/test_{file}.py", "-k", only)
        if " failed" in output:
            assert not NO_JUDGEMENT.search(output), f"the broken kernel did not run:\n{output}"
            return
    raise AssertionError(f"the tests did not notice:\n{output}")


@pytest.mark.skipif(not interpreted(), reason="runs under Triton's interpreter")
@pytest.mark.parametrize("line", [None, "import no_such_module", "no_such_name", "tl.no_such_function"])
def test_only_a_wrong_result_counts(line, tmp_path, run_tests):
    """The control: an unbroken copy passes, and one that cannot be imported is not taken for a noticed mutant."""
    copy_tree(tmp_path)
    if line:
        path = tmp_path / "kernels" / "linear.py"
        path.write_text(path.read_text() + f"\n{line}\n")
    output = run_tests(tmp_path, "tests/kernels/test_gemm.py", "-k", "dead_rows and linear")
    assert (" failed" in output) == bool(line) and bool(NO_JUDGEMENT.search(output)) == bool(line)


def copy_tree(tree):
    for part in ("fastdistil", "kernels", "tests", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tree / part, **({"symlinks": True} if copy is shutil.copytree else {}))


# imports what takes long once, and forks for every copy of the tree
SERVER = """
import json, os, sys
import numpy, pytest, torch, triton.language
for line in sys.stdin:
    tree, report, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(tree)
        sys.path.insert(0, tree)
        output = os.open(report, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        pytest.main(arguments)
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
    print("done", flush=True)
"""


@pytest.fixture(scope="module")
def run_tests(tmp_path_factory):
    """run_tests(tree, arguments...): pytest's output on a copy of the tree."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=tmp_path_factory.mktemp("server"),  # where there is no fastdistil to import
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        | {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(tree, *selection):
        report = tree / "report.txt"
        report.unlink(missing_ok=True)
        arguments = ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *selection]  # which are for plugins
        print(json.dumps([str(tree), str(report), arguments]), file=server.stdin, flush=True)
        assert server.stdout.readline() == "done\n"
        output = report.read_text()
        # a broken kernel may also break the process as it ends, so the report counts and not the exit status
        assert " passed" in output or " failed" in output, f"the copy did not run:\n{output}"
        return output

    yield run
    server.stdin.close()
    server.wait()
