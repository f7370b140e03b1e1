"""One pass of every kernel under NVIDIA's memory checker."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PASS = """
import torch
from fastdistil import ops
from fastdistil.kernels import _configs
from fastdistil.testing import cu_seqlens

for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for lengths in ([1], [3, 0, 16, 9], [40, 64, 5], [130, 513], [128] * 6):
        rows, cu, d = sum(lengths), cu_seqlens(lengths, "cuda"), 96
        r = lambda *s: torch.randn(*s, device="cuda", dtype=dtype)
        ids = torch.arange(rows + 5, device="cuda") % 50
        x = ops.embed_layer_norm(ids, ids, r(50, d), r(50, d), r(d), r(d), 1e-12, cu)
        qkv = ops.qkv_projection(x, r(3 * d, d), r(3 * d), cu)
        y = ops.linear(ops.attention(qkv, cu, max(lengths), 3, r(3)), r(d, d), r(d), cu)
        x = ops.add_layer_norm(y, x, r(d), r(d), 1e-12, cu)
        h = ops.bias_gelu(x, r(16 * d, d), r(16 * d), "gelu", cu)
        x = ops.linear_add_layer_norm(h, x, r(d, 16 * d), r(d), r(d), r(d), 1e-12, cu)  # in parts
        ops.pool(x, cu, "mean", True)
        ops.linear(r(rows, 33), r(17, 33), r(17))  # no stride of 16 bytes
        keep = torch.arange(max(lengths), device="cuda") < torch.tensor(lengths, device="cuda")[:, None]
        target = ops.pack(keep, keep.long(), keep[:1].int())[2]
        ops.unpack(r(keep.numel(), 7), target, r(1, 7)), ops.unpack(r(keep.numel(), d), target)
    # the tiles of many rows, by tensor descriptors where there are, each program taking several
    _configs.processors = lambda device: 3
    _configs._gemm.cache_clear()
    for k, n in ((96, 136), (1056, 256)):
        ops.bias_gelu(r(600, k), r(n, k), r(n), "gelu", cu_seqlens([300, 230], "cuda"))
    torch.cuda.synchronize()
"""


@pytest.mark.gpu
def test_no_illegal_access():
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        pytest.skip("compute-sanitizer is not installed")
    done = subprocess.run(
        # an API call that fails is no wrong access: torch's first one, before there is a context, may
        [tool, "--tool=memcheck", "--report-api-errors=no", "--error-exitcode=7", sys.executable, "-c", PASS],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": "."},
        cwd=Path(__file__).resolve().parent.parent.parent,
        capture_output=True,
        text=True,
        timeout=180,
    )
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0 and "ERROR SUMMARY: 0 errors" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
