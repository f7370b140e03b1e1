"""qkv_projection, linear and bias_gelu: one tile loop, every configuration, any shape."""

import dataclasses
import itertools

import pytest
import torch

from fastdistil import ops
from fastdistil.kernels import _configs, _gemm, _launch
from fastdistil.testing import cu_seqlens, hold_to_definition

ROWS = [1, 3, 63, 65, 127, 129, 300]
WIDTHS = [(48, 80), (384, 100), (768, 33), (1000, 130), (72, 56), (130, 40)]  # in, out
CONFIGS = list(
    dict.fromkeys(
        (kind, c)
        for table in _configs.GEMM.values()
        for (kind, size), c in sorted(table.items(), key=lambda item: item[0])
        if isinstance(c, _configs.Gemm)
    )
)


def arguments(m, k, n, dtype, device):
    g = torch.Generator().manual_seed(m * 7 + k * 3 + n)
    return [torch.randn(*s, generator=g).to(device, dtype) for s in ((m, k), (n, k), (n,))]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("k", "n"), WIDTHS)
def test_shapes(rows, k, n, dtype, device):
    x, w, b = arguments(rows, k, n, dtype, device)
    hold_to_definition("linear", x, w, b, cu_seqlens([rows], device), live=rows, dead=70)
    hold_to_definition("linear", x, w, b)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("exact", [False, True])
def test_activations(activation, exact, dtype, device, modes):
    modes.exact_gelu = exact
    x, w, b = arguments(65, 64, 96, dtype, device)
    hold_to_definition("bias_gelu", x * 2, w / 4, b, activation, cu_seqlens([65], device), live=65, dead=3)
    far = torch.tensor([[-80.0, -9.0, -6.0, -3.0], [3.0, 6.0, 9.0, 80.0]]).to(device, dtype)  # the tails
    hold_to_definition("bias_gelu", far, torch.eye(4).to(device, dtype), torch.zeros(4).to(device, dtype), activation)


def test_relu_keeps_a_nan(device):
    x = torch.tensor([[float("nan")] * 16]).to(device)
    w, b = torch.eye(16).to(device), torch.zeros(16).to(device)
    for activation in ops.ACTIVATIONS:
        assert ops.bias_gelu(x, w, b, activation).isnan().all()


def test_qkv_is_one_product(dtype, device):
    x, w, b = arguments(65, 96, 3 * 96, dtype, device)
    hold_to_definition("qkv_projection", x, w, b, cu_seqlens([65], device), live=65, dead=9)


def test_a_row_alone_may_have_any_stride(device, modes, monkeypatch):
    """To torch it is contiguous, to a tensor descriptor rows of 130 bytes would be an error."""
    modes.batch_invariant = True
    monkeypatch.setattr(_launch, "_device_of", lambda t: 0)  # interpreted kernels take tensors of a GPU, too
    x, w, b = arguments(1, 65, 64, torch.float16, device)
    x = x[:, :64]
    assert x.stride() == (65, 1) and x.is_contiguous()
    hold_to_definition("linear", x, w[:, :64].contiguous(), b)


def needs_tma(family, device):
    if family == "tma" and device == "cuda" and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("tensor descriptors' tiles need the shared memory of sm_90 or sm_100")


@pytest.fixture
def force(monkeypatch):
    """force(kind, config): every product is launched with the configuration."""

    def use(kind, config, dtype=torch.float16, near=False):
        launch = _configs.GemmLaunch(
            config,
            precision="tf32x3" if config.split else "tf32" if kind == "tf32" else "ieee",
            near_gelu=near or (kind == "half" and dtype is not torch.float32),
            programs=3,  # fewer than tiles: a persistent program takes several
        )
        monkeypatch.setattr(_configs, "gemm", lambda *a, **k: launch)

    return use


@pytest.mark.parametrize(
    ("kind", "config"),
    CONFIGS,
    ids=lambda v: v if isinstance(v, str) else f"{v.family}-{v.block_m}x{v.block_n}x{v.block_k}",
)
@pytest.mark.parametrize("rows", [1, 129])
def test_every_configuration(kind, config, rows, dtype, device, force, tf32):
    if device == "cuda" and (kind == "half") == (dtype is torch.float32):
        pytest.skip("the configuration is for another precision")
    if device == "cpu" and dtype is not torch.float32:
        pytest.skip("float32 shows a configuration's mistakes best, and the other tests have the rest")
    needs_tma(config.family, device)
    force(kind, config, dtype)
    x, w, b = arguments(rows, 200, 272, dtype, device)
    bounds = tf32(kind == "tf32" and device == "cuda")
    cu = cu_seqlens([rows], device)
    hold_to_definition("bias_gelu", x, w / 8, b, "gelu", cu, live=rows, dead=200, **bounds)
    hold_to_definition("linear", x, w, b, **bounds)


@pytest.mark.parametrize("shape", [(65, 64, 96), (130, 33, 17), (1, 200, 272)])
@pytest.mark.parametrize("changes", [dict(across=True), dict(split=True), dict(across=True, block_k=32, stages=2)])
def test_what_only_the_tuner_tries(changes, shape, device, force):
    """On a GPU it holds each to the error law itself before one is recorded."""
    if device == "cuda" and changes.get("split"):
        pytest.skip("whether the tensor cores' sums keep the law is for the tuner to find out")
    force("ieee", dataclasses.replace(_configs.Gemm("pointer", 64, 64, 16, warps=4, stages=3), **changes))
    (m, k, n) = shape
    x, w, b = arguments(m, k, n, torch.float32, device)
    hold_to_definition("linear", x, w, b, cu_seqlens([m], device), live=m, dead=70)
    hold_to_definition("bias_gelu", x, w / 8, b, "gelu")


@pytest.mark.parametrize("family", ["pointer", "tma"])
@pytest.mark.parametrize("op", ["linear", "qkv_projection", "bias_gelu"])
def test_dead_rows_are_left_alone_and_the_count_is_cut_to_the_capacity(op, family, device, force, guarded):
    needs_tma(family, device)
    kind, config = next((k, c) for k, c in CONFIGS if c.family == family and k == "half" and c.block_m == 128)
    force(kind, config)
    x, w, b = arguments(400, 64, 72, torch.float16, device)
    y = getattr(ops, op)(x, w, b, cu_seqlens=cu_seqlens([5, 120], device))  # 125 live rows: one tile
    untouched = 128 if family == "tma" else 125  # a descriptor stores whole tiles
    assert (y[untouched:] == 7.25).all() and (y[:125] != 7.25).any(1).all() and guarded()
    y = _gemm.gemm("linear", x, w, b, "none", cu_seqlens([5, 420], device))
    torch.testing.assert_close(y, torch.addmm(b.float(), x.float(), w.float().T).half(), rtol=1e-2, atol=1e-2)
    assert guarded()


def test_the_near_form_of_gelu_is_within_its_bound(device, force):
    kind, config = next((k, c) for k, c in CONFIGS if k == "ieee")
    force(kind, config, near=True)
    x = torch.linspace(-12, 12, 4001).view(-1, 1).to(device)
    y = ops.bias_gelu(x, torch.ones(1, 1).to(device), torch.zeros(1).to(device)).double()
    true = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    assert ((y - true).abs() <= 4e-5 * true.abs()).all()


@pytest.mark.parametrize("at", [-6.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 3.0])
def test_gelu_keeps_the_law_wherever_its_argument_lies(at, dtype, device):
    x = (torch.randn(300, 1, generator=torch.Generator().manual_seed(0)) * 0.3 + at).to(device, dtype)
    hold_to_definition("bias_gelu", x, torch.ones(1, 1).to(device, dtype), torch.zeros(1).to(device, dtype))


def test_any_layout(as_layout, dtype, device):
    x, w, b = arguments(65, 64, 96, dtype, device)
    for x_, w_, b_ in ((as_layout(x), w, b), (x, as_layout(w), b), (x, w, as_layout(b))):
        hold_to_definition("linear", x_, w_, b_)
        hold_to_definition("bias_gelu", x_, w_, b_)


def test_a_strided_count(dtype, device):
    x, w, b = arguments(65, 64, 96, dtype, device)
    cu = torch.tensor([0, 0, 40, 1, 65, 2], dtype=torch.int32, device=device)[::2]  # 0, 40, 65
    hold_to_definition("linear", x, w, b, cu, live=65, dead=9)


def test_results_past_two_billion_elements(device):
    if device == "cpu":
        pytest.skip("would take the interpreter hours; the compile gate counts 64-bit addresses")
    rows, columns = 2**21 + 300, 1040
    x, w, b = (torch.randn(*s, device=device, dtype=torch.float16) for s in ((rows, 16), (columns, 16), (columns,)))
    odd = w[:1039], b[:1039]  # no stride of 16 bytes: the pointer family
    for weight, bias in ((w, b), odd):
        torch.testing.assert_close(ops.linear(x, weight, bias)[-300:], ops.linear(x[-300:], weight, bias))


def test_sizes_of_zero(device):
    for m, k, n in itertools.product((0, 3), (0, 5), (0, 4)):
        x, w, b = arguments(m, k, n, torch.float32, device)
        torch.testing.assert_close(ops.linear(x, w, b), x @ w.T + b)
    x, w, b = arguments(700, 0, 640, torch.float16, device)  # many rows: not by tensor descriptors
    torch.testing.assert_close(ops.linear(x, w, b), b.expand(700, 640))


def test_in_the_batch_invariant_mode_a_row_has_the_same_bits_in_any_batch(dtype, device, modes, rows_alike):
    modes.batch_invariant = True
    x, w, b = arguments(700, 96, 64, dtype, device)
    whole = ops.bias_gelu(x, w, b)
    for rows in (slice(0, 1), slice(3, 67), slice(100, 700)):
        assert torch.equal(ops.bias_gelu(x[rows].contiguous(), w, b), whole[rows])
    misaligned = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    assert torch.equal(ops.bias_gelu(misaligned, w, b), whole)
