"""A product, its residual and LayerNorm, with the product's depth shared by one program or by several."""

import pytest
import torch

from fastdistil import ops
from fastdistil.kernels import _configs, layer_norm
from fastdistil.kernels._configs import Gemm
from fastdistil.testing import cu_seqlens, hold_to_definition

ROWS = [1, 3, 63, 65, 129]
WIDTHS = [(80, 48), (384, 384), (33, 200), (130, 1000)]  # in, out
CONFIGS = list(
    dict.fromkeys((kind, c) for (kind, _), c in _configs.SMALL.items() if isinstance(c, Gemm) and c.parts > 1)
)


def arguments(m, k, n, dtype, device):
    """x, residual, weight, bias, and LayerNorm's weight and bias"""
    g = torch.Generator().manual_seed(m * 7 + k * 3 + n)
    shapes = (m, k), (m, n), (n, k), (n,), (n,), (n,)
    x, r, w, *rest = (torch.randn(*s, generator=g).to(device, dtype) for s in shapes)
    return x, r, w / max(1, k) ** 0.5, *rest


@pytest.fixture
def shared(monkeypatch):
    """shared(config): products are launched with it on a chip that has room for many tiles. Its list gets how many
    programs shared a tile of each."""
    found, real = [], _configs.parts

    def parts(*args):
        found.append(real(*args))
        return found[-1]

    def use(config, kind="ieee"):
        launch = _configs.GemmLaunch(config, "tf32" if kind == "tf32" else "ieee", near_gelu=False, programs=10_000)
        monkeypatch.setattr(_configs, "gemm", lambda *a, **k: launch)
        monkeypatch.setattr(_configs, "parts", parts)
        return found

    return use


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("k", "n"), WIDTHS)
def test_shapes(rows, k, n, dtype, device):
    args = arguments(rows, k, n, dtype, device)
    cu = cu_seqlens([rows], device)
    hold_to_definition("linear_add_layer_norm", *args, 1e-12, cu, live=rows, dead=70, rows=(0, 1))
    hold_to_definition("linear_add_layer_norm", *args, 1e-5)


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize(
    ("most", "k", "n", "parts"),
    [
        *[(8, 512, 96, 8), (4, 512, 96, 4), (2, 512, 96, 2), (1, 512, 96, 1)],
        (8, 260, 200, 8),  # 17 steps, three a program, of which the sixth has two, one not whole, and two have none
        *[(8, 80, 48, 2), (8, 48, 48, 1), (8, 16, 48, 1)],
        (8, 131, 33, 4),  # nothing is aligned
    ],
)
def test_programs_that_share_a_tile(rows, most, k, n, parts, dtype, device, shared):
    found = shared(Gemm("pointer", 16, 32, 16, warps=4, stages=2, group=1, parts=most))
    args = arguments(rows, k, n, dtype, device)
    cu = cu_seqlens([rows], device)
    hold_to_definition("linear_add_layer_norm", *args, 1e-12, cu, live=rows, dead=20, rows=(0, 1))
    hold_to_definition("linear_add_layer_norm", *args, 1e-5)
    assert found == [parts, parts]


@pytest.mark.parametrize(("kind", "config"), CONFIGS, ids=lambda v: v if isinstance(v, str) else f"{v.block_m}")
@pytest.mark.parametrize("rows", [1, 70])
def test_every_configuration(kind, config, rows, dtype, device, shared, tf32):
    if device == "cuda" and (kind == "half") == (dtype is torch.float32):
        pytest.skip("the configuration is for another precision")
    if device == "cpu" and dtype is not torch.float32:
        pytest.skip("float32 shows a configuration's mistakes best, and the other tests have the rest")
    found = shared(config, kind if device == "cuda" else "ieee")
    args = arguments(rows, 650, 72, dtype, device)
    bounds = tf32(kind == "tf32" and device == "cuda")
    cu = cu_seqlens([rows], device)
    hold_to_definition("linear_add_layer_norm", *args, 1e-12, cu, live=rows, dead=70, rows=(0, 1), **bounds)
    assert found[0] > 1


def test_tensor_descriptors_share_no_depth(device, shared):
    """They would leave all parts but one as memory happened to be."""
    if device == "cuda" and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("tensor descriptors' tiles need the shared memory of sm_90 or sm_100")
    found = shared(Gemm("tma", 64, 64, 32, warps=4, stages=2, parts=8))
    args = arguments(65, 512, 64, torch.float16, device)
    hold_to_definition("linear_add_layer_norm", *args, 1e-12, cu_seqlens([65], device), live=65, dead=9, rows=(0, 1))
    assert not found


@pytest.mark.parametrize("most", [1, 8])
def test_dead_rows_are_left_alone_and_the_count_is_cut_to_the_capacity(most, device, shared, guarded, monkeypatch):
    shared(Gemm("pointer", 16, 32, 16, warps=4, stages=2, parts=most))
    args = arguments(99, 256, 72, torch.float16, device)
    between, norm = [], layer_norm.add_layer_norm
    monkeypatch.setattr(layer_norm, "add_layer_norm", lambda y, *more: (between.append(y), norm(y, *more))[1])
    y = ops.linear_add_layer_norm(*args, 1e-12, cu_seqlens([3, 4], device))
    assert (y[7:] == 7.25).all() and (y[:7] != 7.25).any(1).all() and guarded()
    assert (between[0][..., 7:, :] == 7.25).all() and (between[0][..., :7, :] != 7.25).all(-1).all()
    whole = ops.linear_add_layer_norm(*args, 1e-12, cu_seqlens([3, 4000], device))
    torch.testing.assert_close(whole, ops.linear_add_layer_norm(*args, 1e-12), rtol=0, atol=0)
    ops.linear_add_layer_norm(*args, 1e-12, cu_seqlens([-5], device))
    assert guarded()


def test_what_is_added_up_is_not_rounded_before(device, shared):
    """The sums lie there in float32: of a large residual and a product that takes most of it away little is left."""
    shared(Gemm("pointer", 16, 32, 16, warps=4, stages=2, parts=8))
    x, _, w, b, scale, shift = arguments(5, 512, 64, torch.float32, device)
    near = (x.half(), (-(x.half().double() @ w.half().double().T)).half(), w.half(), b.half() * 0, scale.half())
    out = ops.linear_add_layer_norm(*near, shift.half(), 1e-12)
    wide = [t.double() for t in (*near, shift.half())]
    truth = ops.reference.linear_add_layer_norm(*wide, 1e-12)
    assert (out.double() - truth).abs().max() < 0.1


@pytest.mark.parametrize("most", [1, 8])
def test_a_call_has_the_same_bits_again(most, dtype, device, shared):
    shared(Gemm("pointer", 16, 32, 16, warps=4, stages=2, parts=most))
    args = arguments(33, 768, 96, dtype, device)
    assert torch.equal(ops.linear_add_layer_norm(*args, 1e-12), ops.linear_add_layer_norm(*args, 1e-12))


def test_any_layout(as_layout, dtype, device):
    args = arguments(65, 128, 96, dtype, device)
    for i in range(len(args)):
        given = [as_layout(t) if i == at else t for at, t in enumerate(args)]
        hold_to_definition("linear_add_layer_norm", *given, 1e-12)
    cu = torch.tensor([0, 0, 40, 1, 65, 2], dtype=torch.int32, device=device)[::2]  # 0, 40, 65
    hold_to_definition("linear_add_layer_norm", *args, 1e-12, cu, live=65, dead=9, rows=(0, 1))


def test_sizes_of_zero(device):
    for m, k in ((0, 5), (3, 0), (0, 0)):
        args = arguments(m, k, 4, torch.float32, device)
        expected = ops.reference.linear_add_layer_norm(*args, 1e-5)
        torch.testing.assert_close(ops.linear_add_layer_norm(*args, 1e-5), expected)


def test_in_the_batch_invariant_mode_a_row_has_the_same_bits_in_any_batch(dtype, device, modes, rows_alike):
    modes.batch_invariant = True
    x, r, *weights = arguments(300, 512, 64, dtype, device)
    whole = ops.linear_add_layer_norm(x, r, *weights, 1e-12)
    for rows in (slice(0, 1), slice(3, 67), slice(100, 300)):
        alone = ops.linear_add_layer_norm(x[rows].contiguous(), r[rows].contiguous(), *weights, 1e-12)
        assert torch.equal(alone, whole[rows])
