"""Where real tokens are packed, and the rows back in their places: exactly as the definitions say."""

import pytest
import torch

from fastdistil import ops, reference
from fastdistil.kernels import packing

SHAPES = {"one": (1, 1), "texts": (7, 33), "long": (3, 2_500), "many": (300, 20), "wide": (2, 5_000)}
FILLS = {"none": 0.0, "few": 0.1, "half": 0.5, "most": 0.9, "all": 1.1}


def mask(shape, fill, device):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < fill).to(device)


@pytest.fixture(params=[True, False], ids=["counts itself", "is told"])
def counting(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(packing, "COUNTED", 0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS)
def test_pack(shape, fill, device, guarded, counting):
    keep, length = mask(shape, fill, device), shape[1]
    ids = torch.randint(1, 2**40, shape, device=device)
    own = torch.randint(1, 99, shape, dtype=torch.int32, device=device)
    column = torch.arange(length, device=device)[None]
    for given in ((), (ids,), (ids, own), (ids.int(), column), (None, column)):
        results = ops.pack(keep, *given)
        for result, expected in zip(results, reference.pack(keep, *given), strict=True):
            assert result.dtype is expected.dtype and torch.equal(result, expected)
    assert guarded()
    cu_seqlens, source, target, row_ids, _ = ops.pack(keep, ids)
    live = int(cu_seqlens[-1])
    assert live == int(keep.sum()) and torch.equal(row_ids[:live], ids[keep])
    assert torch.equal(target[source[:live]], torch.arange(live, device=device))


def test_a_part_of_a_batch(device, counting):
    keep, ids = mask((6, 40), 0.5, device), torch.arange(240, device=device).view(6, 40)
    for view in ((slice(1, 4), slice(None)), (slice(None), slice(3, 20)), (slice(None, None, 2), slice(None, None, 3))):
        for result, expected in zip(
            ops.pack(keep[view], ids[view], ids[view]), reference.pack(keep[view], ids[view], ids[view]), strict=True
        ):
            assert torch.equal(result, expected)


def test_a_byte_of_true_need_not_be_1(device, counting):
    keep = mask((70, 50), 0.5, device)
    for result, expected in zip(
        ops.pack((keep.to(torch.uint8) * 255).view(torch.bool)), reference.pack(keep), strict=True
    ):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_nothing_to_pack(shape, device):
    keep, ids = torch.ones(shape, dtype=torch.bool, device=device), torch.ones(shape, dtype=torch.int64, device=device)
    for result, expected in zip(ops.pack(keep, ids, ids), reference.pack(keep, ids, ids), strict=True):
        assert torch.equal(result, expected)
    target = ops.pack(keep)[2]
    assert ops.unpack(torch.ones(4, 3, device=device), target).shape == (0, 3)
    assert ops.unpack(torch.ones(4, 0, device=device), torch.zeros(5, dtype=torch.int64, device=device)).shape == (5, 0)
    none, fill = torch.ones(0, 3, device=device), torch.full((1, 3), 7.0, device=device)
    for form in (ops, reference):  # without a row
        target = torch.full((5,), -1, dtype=torch.int64, device=device)
        assert (form.unpack(none, target) == 0).all() and (form.unpack(none, target, fill) == 7).all()
    with torch.autocast(device):
        assert ops.unpack(fill.half(), target, fill).dtype is torch.float16


@pytest.mark.parametrize("dim", [1, 2, 48, 384, 768, 1_000, 2_049])
@pytest.mark.parametrize("filled", [False, True])
def test_unpack(dim, filled, dtype, device, guarded):
    keep = mask((7, 33), 0.6, device)
    cu_seqlens, _, target, *_ = ops.pack(keep)
    live = int(cu_seqlens[-1])
    rows = torch.randn(7 * 33, dim, device=device).to(dtype)
    rows[live:] = float("nan")  # dead
    fill = torch.randn(1, dim, device=device).to(dtype) if filled else None
    out = ops.unpack(rows, target, fill)
    assert guarded()
    assert out.dtype is dtype and torch.equal(out, reference.unpack(rows, target, fill))
    assert torch.equal(out.view(7, 33, dim)[keep], rows[:live])
    assert (out.view(7, 33, dim)[~keep] == (0 if fill is None else fill)).all()
    target[[3, 5]] = torch.tensor([7 * 33, 2**40], device=device)  # nobody's rows
    wrong = packing.unpack(rows, target, fill)
    assert wrong[[3, 5]].isnan().all() and guarded()
    target[[3, 5]] = -1
    out = ops.unpack(rows, target, fill)
    strided = torch.cat([rows, rows], 1)[:, :dim]
    assert torch.equal(ops.unpack(strided, target, fill), out)


def test_more_numbers_than_32_bits_count(device):
    if device == "cpu":
        pytest.skip("would take the interpreter hours; the compile table shows 64-bit addresses")
    rows = torch.zeros(2**21 + 8, 1_024, dtype=torch.float16, device=device)
    rows[-1] = 3
    target = torch.full((2**21 + 4,), -1, dtype=torch.int64, device=device)
    target[-1] = len(rows) - 1
    out = ops.unpack(rows, target)
    assert (out[-1] == 3).all() and not out[:-1].any()


def test_what_does_not_fit_is_named(device):
    keep, ids = mask((3, 5), 0.5, device), torch.ones(3, 5, dtype=torch.int64, device=device)
    for args, message in (
        ((keep.int(),), r"keep must be bool \[batch, length\], got torch.int32 \[3, 5\]"),
        ((keep, ids[:, 1:]), r"input_ids must be int32 or int64 \[3, 5\], got torch.int64 \[3, 4\]"),
        ((keep, ids, ids[:2]), r"position_ids must be int32 or int64 \[3, 5\] or \[1, 5\]"),
        ((keep, ids.float()), "input_ids must be int32 or int64"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.pack(*args)
    rows, target = torch.ones(15, 4, device=device), ops.pack(keep)[2]
    for args, message in (
        ((rows[0], target), r"rows must be \[rows, dim\]"),
        ((rows, target.int()), r"target must be int64 \[batch \* length\], got torch.int32"),
        ((rows, target, rows), r"fill must be \[1, 4\], got \[15, 4\]"),
        ((rows, target, rows[:1].double()), "the rows are torch.float32, the weights torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.unpack(*args)
    with pytest.raises(TypeError, match="keep must be a tensor, got list"):
        ops.pack([[True]])


def test_opcheck(device):
    keep, ids = mask((3, 5), 0.5, device), torch.ones(3, 5, dtype=torch.int64, device=device)
    for args in ((keep,), (keep, ids), (keep, ids, ids[:1].int())):
        torch.library.opcheck(torch.ops.fastdistil.pack.default, args)
    rows, target = torch.randn(15, 4, device=device), reference.pack(keep)[2]
    for args in ((rows, target), (rows, target, rows[:1])):
        torch.library.opcheck(torch.ops.fastdistil.unpack.default, args)
