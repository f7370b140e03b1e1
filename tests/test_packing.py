import pytest
import torch

from fastdistil import ops
from fastdistil.packing import find_rows

MASKS = {
    "right": [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
    "left": [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0, 1], [0, 1, 0, 0, 1], [1, 1, 0, 1, 1]],
    "a row without tokens": [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]],
    "no tokens": [[0, 0], [0, 0]],
    "full": [[1, 1], [1, 1]],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("traced", [False, True])
def test_round_trip(mask, traced, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: traced)  # the form CUDA and tracing use
    keep = torch.tensor(mask).bool()
    batch, length = keep.shape
    x = torch.randn(batch, length, 4)
    at = find_rows(keep, batch, length, x.device)
    rows = at.pack(x)
    live = int(at.cu_seqlens[-1])
    assert live == int(keep.sum()) and len(rows) == (batch * length if traced else live)
    torch.testing.assert_close(rows[:live], x[keep])
    assert at.cu_seqlens.dtype is torch.int32 and at.cu_seqlens.diff().tolist() == keep.sum(1).tolist()
    assert at.max_seqlen >= int(at.cu_seqlens.diff().max())
    rows[live:] = float("nan")
    out = at.unpack(rows)
    torch.testing.assert_close(out, x.masked_fill(~keep[..., None], 0))


def test_gradients_and_transforms_go_through_the_definition(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    keep = torch.tensor(MASKS["holes"]).bool()
    at = find_rows(keep, 3, 5, keep.device)
    rows, fill = torch.randn(15, 4, requires_grad=True), torch.randn(1, 4, requires_grad=True)
    at.unpack(rows, fill).sum().backward()
    assert (rows.grad == (torch.arange(15) < keep.sum())[:, None]).all() and (fill.grad == (~keep).sum()).all()
    fill.grad = None
    at.unpack(rows.detach(), fill).sum().backward()
    assert (fill.grad == (~keep).sum()).all()
    many = torch.func.vmap(at.unpack)(rows.detach().expand(2, 15, 4))
    assert torch.equal(many[1], at.unpack(rows.detach()))
    packed = torch.func.vmap(ops.pack)(keep.expand(2, 3, 5))
    assert all(torch.equal(a[1], b) for a, b in zip(packed, ops.pack(keep), strict=True))


def test_static_form_reads_nothing_back():
    """No host sync: on the meta device any read of a value raises."""
    keep = torch.ones(3, 5, dtype=torch.bool, device="meta")
    at = find_rows(keep, 3, 5, keep.device)
    assert at.pack(torch.empty(3, 5, 8, device="meta")).shape == (15, 8)
    assert at.unpack(torch.empty(15, 8, device="meta")).shape == (3, 5, 8)
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(keep.all())
