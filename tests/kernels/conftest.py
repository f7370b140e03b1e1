"""Where kernels run in tests: on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1), or on a CUDA device."""

import numpy as np
import pytest
import torch

from fastdistil.kernels import _configs
from fastdistil.kernels._target import interpreted

# an interpreter cannot be switched on after the kernels were made
PLACES = ["cpu"] if interpreted() else [pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=PLACES)
def device(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request):
    if interpreted() and request.param is torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 wrongly")
    return request.param


@pytest.fixture(params=["transposed", "sliced columns", "every other row", "misaligned"])
def as_layout(request):
    """as_layout(t): the same numbers, lying otherwise."""

    def lay(t):
        if request.param == "transposed":
            return t.contiguous() if t.dim() == 1 else t.T.contiguous().T
        if request.param == "sliced columns":
            return torch.cat([t, t], dim=-1)[..., : t.shape[-1]]
        if request.param == "every other row":
            return t.repeat_interleave(2, dim=0)[::2]
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)  # 2 or 4 bytes past a multiple of 16

    return lay


@pytest.fixture
def allocate_by(monkeypatch):
    """allocate_by(empty): it is called in place of torch.empty and of tensors' new_empty."""

    def replace(empty):
        def new_empty(like, *size, dtype=None, device=None, **rest):
            return empty(*size, dtype=dtype or like.dtype, device=device or like.device, **rest)

        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)

    return replace


@pytest.fixture
def guarded(allocate_by):
    """What a launcher allocates lies between guards; the returned function tells whether they are whole."""
    made, real, width = [], torch.empty, 4096

    def empty(*size, dtype=None, device=None, **rest):
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        n = torch.Size(shape).numel()
        whole = real(n + 2 * width, dtype=dtype, device=device)
        guard = 7.25 if whole.is_floating_point() else 7
        made.append((whole.fill_(guard), n, guard))
        return whole[width : width + n].view(shape)

    allocate_by(empty)

    def whole():
        assert made
        return all(bool((w[:width] == guard).all() and (w[width + n :] == guard).all()) for w, n, guard in made)

    return whole


@pytest.fixture
def tf32(monkeypatch):
    """tf32(on): whether torch and the kernels may round float32 operands to TF32; the bounds to hold them to then."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision

    def switch(on):
        matmul.fp32_precision = "tf32" if on else "ieee"
        # the kernels cut operands off to TF32's ten bits, a library may round them
        return {"eps": 2.0**-10, "factor": 2.0} if on else {}

    yield switch
    matmul.fp32_precision = before


@pytest.fixture
def modes(monkeypatch):
    """_configs.modes, whole again after the test."""
    for name in vars(_configs.modes):
        monkeypatch.setattr(_configs.modes, name, getattr(_configs.modes, name))
    return _configs.modes


@pytest.fixture
def rows_alike(monkeypatch):
    """The interpreter's matrix product adds up every row in one order, as a tensor core does; a BLAS may not."""

    def matmul(a, b, dtype=None):
        out = np.zeros((*a.shape[:-1], b.shape[-1]), np.float32)
        for k in range(a.shape[-1]):
            out += a[..., k : k + 1].astype(np.float32) * b[k].astype(np.float32)
        return out.astype(dtype or a.dtype)

    if interpreted():
        monkeypatch.setattr(np, "matmul", matmul)
