"""Residual or embeddings plus LayerNorm, at any width."""

import pytest
import torch

from fastdistil import ops
from fastdistil.kernels import layer_norm
from fastdistil.testing import cu_seqlens, hold_to_definition

ROWS = [1, 3, 63, 65, 127, 129, 300]
WIDTHS = [1, 48, 384, 768, 1000, 4097]


def rand(*shape, dtype, device, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + shape[0])).to(device, dtype)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dim", WIDTHS)
def test_add_layer_norm(rows, dim, dtype, device):
    x, r, w, b = (rand(*s, dtype=dtype, device=device, seed=i) for i, s in enumerate([(rows, dim)] * 2 + [(dim,)] * 2))
    cu = cu_seqlens([rows], device)
    hold_to_definition("add_layer_norm", x, r, w, b, 1e-12, cu, live=rows, dead=20, rows=(0, 1))
    if rows >= 63:  # rows enough to average over the rounding of one row's mean
        hold_to_definition("add_layer_norm", x + 30, r, w, b, 1e-5)


@pytest.mark.parametrize(
    ("rows", "ids"), [*((n, torch.int64) for n in ROWS), (3, torch.int32), (65, torch.int32)], ids=str
)
@pytest.mark.parametrize("dim", WIDTHS)
def test_embed_layer_norm(rows, dim, ids, dtype, device):
    word, position = (torch.randint(0, n, (rows,), generator=torch.Generator().manual_seed(n)) for n in (211, 37))
    tables = [rand(n, dim, dtype=dtype, device=device, seed=n) for n in (211, 37)]
    w, b = rand(dim, dtype=dtype, device=device), rand(dim, dtype=dtype, device=device, seed=1)
    args = (word.to(device, ids), position.to(device, ids), *tables, w, b, 1e-12)
    cu = cu_seqlens([rows], device)
    # dead ids are nonsense and must not be looked up: the public op would refuse them on CPU
    form = layer_norm.embed_layer_norm
    hold_to_definition("embed_layer_norm", *args, cu, live=rows, dead=20, rows=(0, 1), form=form)
    if rows <= 65:
        hold_to_definition("embed_layer_norm", *args, form=form)


@pytest.mark.parametrize(("word", "position"), [(211, 0), (-1, 0), (2**31 - 1, 0), (2**32 + 3, 0), (5, 37), (5, -1)])
def test_an_index_outside_its_table_is_nan_in_its_own_row(word, position, dtype, device):
    ids = torch.tensor([3, word, 7], device=device)
    positions = torch.tensor([0, position, 2], device=device)
    tables = [rand(n + 8, 48, dtype=dtype, device=device, seed=n)[4:-4] for n in (211, 37)]  # neighbours are numbers
    w, b = rand(48, dtype=dtype, device=device), rand(48, dtype=dtype, device=device)
    out = layer_norm.embed_layer_norm(ids, positions, *tables, w, b, 1e-12)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def test_dead_rows_are_left_alone_and_the_count_is_cut_to_the_capacity(device, guarded):
    x, w = rand(99, 48, dtype=torch.float32, device=device), rand(48, dtype=torch.float32, device=device)
    out = layer_norm.add_layer_norm(x, x, w, w, 1e-12, cu_seqlens([3, 4], device))
    assert (out[7:] == 7.25).all() and (out[:7] != 7.25).all() and guarded()
    ids = torch.arange(99, device=device) % 9
    out = layer_norm.embed_layer_norm(ids, ids, x, x, w, w, 1e-12, cu_seqlens([3, 4], device))
    assert (out[7:] == 7.25).all() and (out[:7] != 7.25).all() and guarded()
    for cu in (cu_seqlens([3, 4000], device), cu_seqlens([-5], device)):
        layer_norm.add_layer_norm(x, x, w, w, 1e-12, cu)
        layer_norm.embed_layer_norm(ids, ids, x, x, w, w, 1e-12, cu)
        assert guarded()


def test_any_layout(dtype, device):
    x, r = (rand(65, 48, dtype=dtype, device=device, seed=i) for i in range(2))
    w, b = (rand(48, dtype=dtype, device=device, seed=i) for i in range(2))
    for other in (x.T.contiguous().T, torch.cat([x, x], 1)[:, :48], x.repeat_interleave(2, 0)[::2]):
        hold_to_definition("add_layer_norm", other, r, w, b, 1e-12)
        hold_to_definition("add_layer_norm", r, other, w, b, 1e-12)
    cu = torch.tensor([0, 0, 40, 1, 65, 2], dtype=torch.int32, device=device)[::2]  # 0, 40, 65
    hold_to_definition("add_layer_norm", x, r, w, b, 1e-12, cu, live=65, dead=9, rows=(0, 1))
    hold_to_definition("add_layer_norm", x, r, w.repeat_interleave(2)[::2], b.repeat_interleave(2)[::2], 1e-12)
    misaligned = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    hold_to_definition("add_layer_norm", misaligned, r, w, b, 1e-12)
    ids = torch.arange(65, device=device) % 9
    hold_to_definition("embed_layer_norm", ids, ids, misaligned, x.T.contiguous().T, w, b, 1e-12)


def test_a_row_has_the_same_bits_in_any_batch(dtype, device):
    x, w = rand(300, 384, dtype=dtype, device=device), rand(384, dtype=dtype, device=device)
    whole = ops.add_layer_norm(x, x, w, w, 1e-12)
    for rows in (slice(0, 1), slice(3, 67)):
        assert torch.equal(ops.add_layer_norm(x[rows].clone(), x[rows].clone(), w, w, 1e-12), whole[rows])


def test_rows_past_two_billion_elements(device):
    if device == "cpu":
        pytest.skip("would take the interpreter hours; the compile table shows 64-bit addresses")
    dim, rows = 4096, 2**31 // 4096 + 10
    x = torch.zeros(rows, dim, dtype=torch.float16, device=device)
    x[-3:] = rand(3, dim, dtype=torch.float16, device=device)
    w = torch.ones(dim, dtype=torch.float16, device=device)
    last = torch.arange(rows - 3, rows, device=device)
    positions = torch.zeros(1, dim, dtype=torch.float16, device=device)
    out = layer_norm.embed_layer_norm(last, last * 0, x, positions, w, w, 1e-12)
    assert torch.equal(out, layer_norm.embed_layer_norm(last - last[0], last * 0, x[-3:], positions, w, w, 1e-12))
    out = layer_norm.add_layer_norm(x, x, w, w, 1e-12)
    assert torch.equal(out[-3:], layer_norm.add_layer_norm(x[-3:], x[-3:], w, w, 1e-12))


def test_strided_ids_and_parameters(device):
    ids = (torch.arange(20, device=device) % 9)[::2]
    table = rand(9, 48, dtype=torch.float32, device=device)
    w, b = (rand(96, dtype=torch.float32, device=device, seed=i)[::2] for i in range(2))
    hold_to_definition("embed_layer_norm", ids, ids.flip(0), table, table, w, b, 1e-12)
