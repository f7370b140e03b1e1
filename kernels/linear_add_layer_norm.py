"""y = LayerNorm(x @ weight.T + bias + residual): what ends each half of a block.

x: [rows, in]; weight: [dim, in]; residual, y: [rows, dim]; bias, norm_weight, norm_bias: [dim]. Two launches, of
`_gemm.py` and `layer_norm.py`. The tiles of few rows leave most of a chip idle, while each reads all the depth of its
weights: then several programs share a tile, and the LayerNorm adds up what they found (split-K).
"""

from torch import Tensor

from fastdistil.kernels import _gemm, layer_norm


def linear_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    y = _gemm.gemm("linear_add_layer_norm", x, weight, bias, "none", cu_seqlens, in_parts=True)
    return layer_norm.add_layer_norm(y, residual, norm_weight, norm_bias, eps, cu_seqlens)
