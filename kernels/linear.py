"""y = x @ weight.T + bias. x: [rows, in]; weight: [out, in]; y: [rows, out]. The tile loop is in `_gemm.py`."""

from torch import Tensor

from fastdistil.kernels import _gemm


def linear(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    return _gemm.gemm("linear", x, weight, bias, "none", cu_seqlens)
