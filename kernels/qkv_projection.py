"""Query, key and value of every row in one GEMM of width 3 * dim: y = x @ weight.T + bias.

x: [rows, dim]; weight: [3 * dim, dim], query, key and value one above the other; y: [rows, 3 * dim], so that x is read
once and attention finds a row's three vectors in one place. The tile loop is in `_gemm.py`.
"""

from torch import Tensor

from fastdistil.kernels import _gemm


def qkv_projection(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    return _gemm.gemm("qkv_projection", x, weight, bias, "none", cu_seqlens)
