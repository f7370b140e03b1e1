"""y = activation(x @ weight.T + bias), activation in the GEMM's epilogue while the tile is still in registers.

x: [rows, in]; weight: [out, in]; y: [rows, out]; activation: gelu (erf), gelu_new (tanh), relu or silu. In half
precision gelu is computed by a form within 3.4e-5 of itself unless erf is asked for (`_configs.modes`).
The tile loop and the activations are in `_gemm.py`.
"""

from torch import Tensor

from fastdistil.kernels import _gemm


def bias_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str = "gelu", cu_seqlens: Tensor | None = None
) -> Tensor:
    return _gemm.gemm("bias_gelu", x, weight, bias, activation, cu_seqlens)
