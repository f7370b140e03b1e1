"""One vector a sequence."""

import pytest
import torch

from fastdistil import ops
from fastdistil.kernels import pooling
from fastdistil.testing import cu_seqlens, hold_to_definition

LENGTHS = {"one": [1], "longest": [513], "mixed": [130, 2, 0, 64, 1, 97], "empty ends": [0, 0, 7, 33, 0]}


def rows_of(lengths, dim, dtype, device):
    return torch.randn(sum(lengths), dim, generator=torch.Generator().manual_seed(dim)).to(device, dtype)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dim", [1, 48, 384, 768, 1000, 4097])
@pytest.mark.parametrize("mode", ops.POOLING)
@pytest.mark.parametrize("normalize", [False, True])
def test_pool(lengths, dim, mode, normalize, dtype, device):
    x = rows_of(lengths, dim, dtype, device)
    out = hold_to_definition("pool", x, cu_seqlens(lengths, device), mode, normalize, dead=9)
    assert out.dtype is torch.float32
    assert (out[[n == 0 for n in lengths]] == 0).all()


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e-3, 1e10])
def test_normalize_at_any_scale(scale, device):
    x = torch.randn(9, 48, generator=torch.Generator().manual_seed(0)).to(device) * scale
    hold_to_definition("pool", x, cu_seqlens([4, 5], device), "mean", True)


@pytest.mark.parametrize("mode", ops.POOLING)
def test_zeros_and_nonsense(mode, device, guarded):
    x = torch.zeros(5, 16, device=device)
    assert (pooling.pool(x, cu_seqlens([2, 3], device), mode, True) == 0).all()
    for nonsense in ([0, 500, 3], [-40, 2, 1], [60, 2**30, 0]):
        pooling.pool(x, torch.tensor(nonsense, dtype=torch.int32, device=device), mode, True)
        assert guarded()
    framed = torch.full((20, 16), 5.0, device=device)[8:13].copy_(torch.arange(5)[:, None])  # lies between other rows
    cu = torch.tensor([-3, 2, 5, 9], dtype=torch.int32, device=device)
    out = pooling.pool(framed, cu, mode)
    assert (out[0] == (0.5 if mode == "mean" else 0)).all() and (out[1] == (3 if mode == "mean" else 2)).all()
    assert out[2].isnan().all(), "a sequence that ends past the rows"
    assert ops.reference.pool(framed, cu[2:], mode)[0].isnan().all()


def test_any_layout(dtype, device):
    x, cu = rows_of([20, 45], 48, dtype, device), cu_seqlens([20, 45], device)
    for other in (x.T.contiguous().T, torch.cat([x, x], 1)[:, :48], x.repeat_interleave(2, 0)[::2]):
        hold_to_definition("pool", other, cu.repeat_interleave(2)[::2])


def test_a_text_has_the_same_bits_in_any_batch(dtype, device):
    lengths = [7, 130, 16]
    x = rows_of(lengths, 384, dtype, device)
    whole = ops.pool(x, cu_seqlens(lengths, device), "mean", True)
    for i, rows in enumerate(x.split(lengths)):
        assert torch.equal(ops.pool(rows.clone(), cu_seqlens([len(rows)], device), "mean", True)[0], whole[i])
