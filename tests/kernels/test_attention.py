"""Every form of attention, any head size, lengths from nothing to 513."""

import pytest
import torch

from fastdistil import ops
from fastdistil.kernels import _configs, attention
from fastdistil.kernels._target import interpreted
from fastdistil.testing import cu_seqlens, hold_to_definition

LENGTHS = {
    "one": [1],
    "longest": [513],
    "equal": [16] * 9,
    "short": [5, 16, 0, 1, 1, 12, 16, 3, 0, 0, 9, 2],
    "mixed": [130, 2, 0, 64, 63, 65, 97, 1, 127, 129],
    "empty ends": [0, 0, 7, 33, 0],
}
CONFIGS = list(dict.fromkeys((kind, c) for kind, configs in _configs.ATTENTION.items() for c in configs))


def rows_of(lengths, heads, head_size, dtype, device):
    g = torch.Generator().manual_seed(sum(lengths) + head_size)
    return torch.randn(sum(lengths), 3 * heads * head_size, generator=g).to(device, dtype)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("head_size", [16, 64])
def test_lengths(lengths, head_size, dtype, device):
    qkv, cu = rows_of(lengths, 2, head_size, dtype, device), cu_seqlens(lengths, device)
    hold_to_definition("attention", qkv, cu, max(lengths), 2, live=sum(lengths), dead=37)


@pytest.mark.parametrize("head_size", [1, 2, 3, 17, 24, 32, 48, 80, 100, 128])
def test_head_sizes(head_size, dtype, device):
    for lengths in ([5, 16, 0, 3], [20, 40, 1], [70, 7]):
        qkv, cu = rows_of(lengths, 3, head_size, dtype, device), cu_seqlens(lengths, device)
        scale = torch.tensor([1.0, 0.0, -0.5]).to(device, dtype)
        hold_to_definition("attention", qkv, cu, max(lengths), 3, scale, live=sum(lengths), dead=3)


@pytest.fixture
def force(monkeypatch):
    """force(config): attention is launched with the configuration."""
    return lambda config: monkeypatch.setattr(_configs, "attention", lambda *a: config)


def fits(kind, config, dtype, device):
    if interpreted() and dtype is not torch.float32:
        pytest.skip("float32 shows a form's mistakes best, and the other tests have the rest")
    if device == "cuda" and (kind == "half") == (dtype is torch.float32):
        pytest.skip("the configuration is for another precision")


@pytest.mark.parametrize(
    ("kind", "config"), CONFIGS, ids=lambda v: v if isinstance(v, str) else f"{v.form}-{v.tile}-{v.longest}"
)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_every_form(kind, config, lengths, dtype, device, force, tf32):
    fits(kind, config, dtype, device)
    force(config)
    bounds = tf32(kind == "tf32" and device == "cuda")
    bounds |= {"largest": 4} if bounds else {}  # p and v are cut off as well, one upon the other
    most = config.longest or 4 * config.tile + 1  # several tiles are enough, and slow in the interpreter
    lengths = [min(n, most) for n in lengths]
    qkv, cu = rows_of(lengths, 2, 32, dtype, device), cu_seqlens(lengths, device)
    hold_to_definition("attention", qkv, cu, max(lengths), 2, live=sum(lengths), dead=140, **bounds)


@pytest.mark.parametrize(
    ("kind", "config"), CONFIGS, ids=lambda v: v if isinstance(v, str) else f"{v.form}-{v.tile}-{v.longest}"
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("where", [0, 1, 2], ids=["query", "key", "value"])
def test_what_is_not_finite_stays_in_its_sequence(kind, config, value, where, dtype, device, force):
    fits(kind, config, dtype, device)
    force(config)
    lengths = [5, 7, 8, 16, 3]
    qkv, cu = rows_of(lengths, 2, 16, dtype, device), cu_seqlens(lengths, device)
    expected = ops.attention(qkv, cu, 16, 2)
    qkv[5:12, 32 * where : 32 * where + 32] = value
    out = ops.attention(qkv, cu, 16, 2)
    others = [*range(5), *range(12, 39)]
    assert torch.equal(out[others], expected[others]) and not out[5:12].isfinite().any()


@pytest.mark.parametrize(
    ("kind", "config"), CONFIGS, ids=lambda v: v if isinstance(v, str) else f"{v.form}-{v.tile}-{v.longest}"
)
def test_a_sequence_longer_than_announced_is_nan_and_the_others_are_right(kind, config, dtype, device, force, guarded):
    if config.longest is None:
        pytest.skip("takes any length")
    fits(kind, config, dtype, device)
    force(config)
    n = config.longest
    lengths = [n - 1, 3 * config.tile + 5, n, 2 * n + 1, 0, 5, config.tile + 1]
    qkv, cu = rows_of(lengths, 2, 32, dtype, device), cu_seqlens(lengths, device)
    allowed = config.tile if config.form == "single" else n  # single has room for a whole tile
    wrong = torch.tensor([m > allowed for m in lengths]).repeat_interleave(torch.tensor(lengths)).to(device)

    def form(qkv, cu, max_seqlen, heads):
        out = attention.attention(qkv, cu, n, heads)
        assert out[wrong].isnan().all()
        return out.where(~wrong[:, None], true)

    true = ops.reference.attention(qkv, cu, max(lengths), 2)
    hold_to_definition("attention", qkv, cu, max(lengths), 2, form=form)
    assert guarded()


@pytest.mark.parametrize("longest", [16, 32, 64, 200])
def test_a_sequence_that_ends_past_the_rows_is_nan(longest, device, guarded):
    qkv = rows_of([30], 2, 16, torch.float16, device)
    cu = torch.tensor([0, 10, 20, 34], dtype=torch.int32, device=device)
    for form in (attention.attention, ops.reference.attention):
        out = form(qkv, cu, longest, 2)
        assert out[20:].isnan().all() and out[:20].isfinite().all()
    assert guarded()


@pytest.mark.parametrize("config", [c for _, c in CONFIGS], ids=lambda v: f"{v.form}-{v.tile}-{v.longest}")
def test_dead_rows_are_left_alone_and_nonsense_stays_inside(config, device, force, guarded):
    if device == "cuda" and config.tile * config.warps > 512:
        pytest.skip("for half precision")
    force(config)
    lengths = [3, 16, 9]
    qkv = rows_of([90], 2, 16, torch.float32, device)
    out = attention.attention(qkv, cu_seqlens(lengths, device), 16, 2)
    assert (out[28:] == 7.25).all() and guarded()
    # rows below the first sequence belong to none
    shifted = attention.attention(qkv, torch.tensor([5, 12, 20], dtype=torch.int32, device=device), 16, 2)
    alone = attention.attention(qkv[5:], cu_seqlens([7, 8], device), 16, 2)
    torch.testing.assert_close(shifted[5:20], alone[:15], rtol=0, atol=1e-5)
    for nonsense in ([0, 500, 30, 90], [-40, 20, 5, 70], [60, 10, 80, 2**30], [90, 0, -7, -90]):
        attention.attention(qkv, torch.tensor(nonsense, dtype=torch.int32, device=device), 16, 2)
        assert guarded()


@pytest.mark.parametrize("layout", ["transposed", "sliced columns", "every other row", "misaligned"])
def test_any_layout(layout, dtype, device):
    qkv, cu = rows_of([5, 20], 2, 16, dtype, device), cu_seqlens([5, 20], device)
    other = {
        "transposed": lambda t: t.T.contiguous().T,
        "sliced columns": lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]],
        "every other row": lambda t: t.repeat_interleave(2, dim=0)[::2],
        "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    }[layout](qkv)
    hold_to_definition("attention", other, cu, 20, 2)
    hold_to_definition("attention", qkv, cu.repeat_interleave(2)[::2], 20, 2)
    framed = torch.tensor([0, 5, 25, 0, 1, 2], dtype=torch.int32, device=device)  # what lies behind is not its
    for longest in (20, 40, 200):
        hold_to_definition("attention", qkv, framed[:3], longest, 2)


def test_equal_scores_and_great_ones(dtype, device):
    cu = cu_seqlens([7, 40, 130], device)
    qkv = rows_of([177], 2, 16, dtype, device)
    qkv[:, :32] = 0  # no query prefers any key
    hold_to_definition("attention", qkv, cu, 130, 2)
    qkv = rows_of([177], 2, 16, dtype, device)
    qkv[:, :32] *= 40  # one key takes all
    hold_to_definition("attention", qkv, cu, 130, 2)


@pytest.mark.parametrize("lengths", [[16] * 40, [60] * 10, [130] * 4], ids=lambda v: str(v[0]))
def test_great_scores_err_no_more_than_in_eager(lengths, dtype, device):
    # two scores nearly alike decide a row, so one sequence tells nothing; many do
    qkv, cu = rows_of(lengths, 2, 32, dtype, device) * 20, cu_seqlens(lengths, device)
    if dtype is torch.float16:
        qkv /= 8
    hold_to_definition("attention", qkv, cu, max(lengths), 2, largest=4)  # near ties: another order of sums errs so


@pytest.mark.parametrize("lengths", [[5, 9, 16], [20, 32, 7], [50, 3], [140, 9]], ids=lambda v: str(max(v)))
def test_where_a_result_is_not_finite(lengths, dtype, device):
    """An infinity or NaN goes where the definition lets it go, element by element, in every form."""
    g = torch.Generator().manual_seed(len(lengths))
    cu, n = cu_seqlens(lengths, device), sum(lengths)
    for value in (float("inf"), -float("inf"), float("nan")):
        qkv = rows_of(lengths, 2, 16, dtype, device)
        qkv[torch.randint(n, (3,), generator=g), torch.randint(96, (3,), generator=g)] = value
        ours, theirs = ops.attention(qkv, cu, max(lengths), 2), ops.reference.attention(qkv, cu, max(lengths), 2)
        for of in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(of(ours), of(theirs))


def test_in_the_batch_invariant_mode_a_text_has_the_same_bits_in_any_batch(dtype, device, modes, rows_alike):
    modes.batch_invariant = True
    lengths = [7, 130, 16, 1, 70]
    qkv, cu = rows_of(lengths, 2, 16, dtype, device), cu_seqlens(lengths, device)
    whole = ops.attention(qkv, cu, 512, 2).split(lengths)
    for rows, expected in zip(qkv.split(lengths), whole, strict=True):
        n = len(rows)
        assert torch.equal(ops.attention(rows.clone(), cu_seqlens([n], device), n, 2), expected)
        assert torch.equal(
            ops.attention(torch.cat([qkv[:9], rows]), cu_seqlens([9, n], device), max(9, n), 2)[9:], expected
        )


def test_without_the_mode_the_form_goes_by_the_longest(modes):
    if not interpreted():
        pytest.skip("the choice is the same everywhere")
    cpu = torch.device("cpu")
    forms = [_configs.attention(n, 64, torch.float16, cpu).form for n in (9, 32, 64, 128, 129)]
    assert forms == ["short", "short", "single", "single", "looped"]
    modes.batch_invariant = True
    assert {_configs.attention(n, 64, torch.float16, cpu) for n in (9, 32, 64, 128, 129)} == {
        _configs.ATTENTION["half"][-3]
    }


def test_a_strided_scale_and_scores_far_below_zero(device):
    lengths = [70, 3]
    qkv, cu = rows_of(lengths, 2, 16, torch.float32, device), cu_seqlens(lengths, device)
    scale = torch.tensor([1.0, 9.0, -0.5, 9.0], device=device)[::2]
    hold_to_definition("attention", qkv, cu, 70, 2, scale)
    qkv[:, :32], qkv[:, 32:64] = 30.0, -30.0  # every score is -3600
    hold_to_definition("attention", qkv, cu, 70, 2)
