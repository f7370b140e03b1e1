"""The whole encoder on the kernels, padded as on CUDA: capacity batch x length, live count on the device."""

import contextlib

import pytest
import torch

from fastdistil import DistilBertConfig, DistilBertForSequenceClassification, DistilBertModel, ops
from fastdistil._register import FORMS
from fastdistil.kernels._target import interpreted
from fastdistil.layers import TransformerBlock
from fastdistil.testing import cu_seqlens

TINY = dict(vocab_size=99, dim=48, n_heads=3, hidden_dim=80, n_layers=2, max_position_embeddings=140)
LENGTHS = [21, 3, 1, 17, 0, 140, 65]


@pytest.fixture(autouse=True)
def padded_form(monkeypatch, allocate_by):
    """Memory that nobody wrote holds NaN, and on CPU too rows are packed without looking at values, as CUDA does."""
    real = torch.empty

    def empty(*size, **rest):
        out = real(*size, **rest)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    allocate_by(empty)
    if interpreted():
        for module in ("ops", "packing", "inputs", "model"):
            monkeypatch.setattr(f"fastdistil.{module}.can_look", lambda device: False)


def batch(device, lengths=LENGTHS, length=140, seed=0):
    g = torch.Generator().manual_seed(seed)
    keep = torch.arange(length) < torch.tensor(lengths)[:, None]
    ids = torch.randint(1, 99, keep.shape, generator=g).where(keep, 10**6)  # nonsense in the padding
    return ids.to(device), keep.to(device)


def model_on(device, **changes):
    torch.manual_seed(0)
    model = DistilBertModel(DistilBertConfig(**(TINY | changes))).eval().to(device)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


@pytest.mark.parametrize(
    "changes", [{}, {"activation": "relu"}, {"dim": 40, "n_heads": 5}, {"dim": 96, "n_heads": 1}], ids=str
)
def test_padded_equals_the_dense_definition(changes, device):
    model, (ids, keep) = model_on(device, **changes), batch(device)
    dense = model(ids, keep).last_hidden_state.detach()  # a gradient could be asked for: differentiable torch
    with torch.inference_mode():
        ours = model(ids, keep, output_hidden_states=True)
    assert (ours[0][~keep] == 0).all()
    torch.testing.assert_close(ours[0], dense, rtol=0, atol=2e-5)
    assert all(h.isfinite().all() for h in ours.hidden_states)


@pytest.mark.parametrize("kind", ["left", "holes", "full"])
def test_masks(kind, device):
    model, (ids, keep) = model_on(device), batch(device, [5, 9, 30], 30)
    ids = ids.clamp(max=98)
    keep = {
        "left": keep.flip(1),
        "holes": torch.rand(3, 30, generator=torch.Generator().manual_seed(0)).to(device) < 0.5,
        "full": None,
    }[kind]
    dense = model(ids, keep).last_hidden_state.detach()
    with torch.inference_mode():
        torch.testing.assert_close(model(ids, keep)[0], dense, rtol=0, atol=2e-5)


def test_packed_equals_padded(device):
    model, (ids, keep) = model_on(device), batch(device)
    with torch.inference_mode():
        padded = model(ids, keep)[0][keep]
        flat = torch.cat([ids[keep], ids.new_full((11,), 7)])
        packed = model.forward_packed(flat, cu_seqlens(LENGTHS, device), 140)
    torch.testing.assert_close(packed[: sum(LENGTHS)], padded, rtol=0, atol=2e-5)


def test_an_id_outside_the_vocabulary_makes_its_own_sequence_nan(device):
    model, (ids, keep) = model_on(device), batch(device)
    with torch.inference_mode():
        good = model(ids, keep)[0]
        ids = ids.clone()
        ids[3, 5] = 99
        bad = model(ids, keep)[0]
    assert bad[3][keep[3]].isnan().all() and (bad[3][~keep[3]] == 0).all()
    others = [i for i in range(len(ids)) if i != 3]
    torch.testing.assert_close(bad[others], good[others], rtol=0, atol=1e-6)


def test_in_the_batch_invariant_mode_a_text_has_the_same_bits_in_any_batch(device, modes, rows_alike):
    ops.set_batch_invariant(True)
    model, (ids, keep) = model_on(device), batch(device)
    with torch.inference_mode():
        whole = model(ids, keep)[0]
        for i, n in enumerate(LENGTHS):
            if n:
                assert torch.equal(model(ids[i : i + 1, :n], keep[i : i + 1, :n])[0][0], whole[i, :n])
        pair = model(ids[[5, 0]], keep[[5, 0]])[0]
    assert torch.equal(pair, whole[[5, 0]])


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_blocks_launch_past_the_ops_with_the_same_bits(dtype, activation, device, monkeypatch):
    lengths = [21, 3, 1, 17, 0]
    model, (ids, keep) = model_on(device, activation=activation).to(dtype), batch(device, lengths, 21)
    classifier = DistilBertForSequenceClassification(model.config).to(device, dtype).eval()
    for block in model.transformer.layer:
        block.sa_layer_norm.eps = 0.5
    flat, cu = ids[keep], cu_seqlens(lengths, device)
    only = torch.arange(70, device=device) % 42  # more than are live
    calls = [
        lambda: model(ids, keep)[0],
        lambda: model(ids.clamp(max=98))[0],
        lambda: model(ids, keep, output_hidden_states=True).hidden_states[1],
        lambda: classifier(ids, keep).logits,
        lambda: model.forward_packed(flat, cu, 21),
        lambda: model.forward_packed(flat, cu, 21, only=only),
    ]
    launched, unseen = [], TransformerBlock._unseen
    monkeypatch.setattr(TransformerBlock, "_unseen", lambda *args: launched.append(args) or unseen(*args))
    for call in calls:
        with torch.inference_mode():
            launched.clear()
            ours = call()
            assert len(launched) == 2
            with monkeypatch.context() as patch:
                patch.setattr(ops, "is_unseen", lambda device: False)
                assert torch.equal(call(), ours) and ours.isfinite().all() and len(launched) == 2


def test_who_looks_into_a_call_sees_the_ops(device):
    model, (ids, keep) = model_on(device), batch(device)
    with torch.inference_mode(), torch.profiler.profile() as profile:
        model(ids, keep)
    assert "fastdistil::attention" in {event.key for event in profile.key_averages()}


def test_every_op_runs_on_its_kernel(device):
    kind = "cpu" if device == "cpu" else "cuda"
    assert {forms[kind].__module__.rsplit(".", 1)[0] for forms in FORMS.values()} == {"fastdistil.kernels"}


# --- with a GPU ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_sync():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
@pytest.mark.skipif(interpreted(), reason="needs a GPU")
@pytest.mark.parametrize("graphs", [False, True])
def test_the_host_never_waits(graphs):
    model, (ids, keep) = model_on("cuda"), batch("cuda")
    if graphs:
        model.cuda_graphs()
    with torch.inference_mode():
        model(ids, keep)
        flat, cu = ids[keep], cu_seqlens(LENGTHS, "cuda")
        model.forward_packed(flat, cu, 140)
        with no_sync():
            model(ids, keep)
            model(ids.clamp(max=98))
            rows = model.forward_packed(flat, cu, 140)
            ops.pool(rows, cu, "mean", True)


@pytest.mark.gpu
@pytest.mark.skipif(interpreted(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [[128] * 9, [33, 1, 128, 64, 0, 7, 90], [16, 3, 9]], ids=str)
def test_base_size_against_float64(dtype, lengths):
    """DistilBERT-base: as near to float64 as the eager definitions in the same precision."""
    from fastdistil.testing import error_law

    torch.manual_seed(0)
    model = DistilBertModel(DistilBertConfig(dropout=0.0)).eval().cuda()
    ids, keep = batch("cuda", lengths, max(lengths))
    eager = model.to(dtype)(ids, keep)[0].detach()[keep]
    truth = model.double()(ids, keep)[0].detach()[keep]
    with torch.inference_mode():
        model = model.to(dtype)
        ours = model(ids, keep)[0][keep]
        replayed = model.cuda_graphs()(ids, keep)[0][keep]
    factor = 2.0 if eager.dtype is torch.float32 else None  # as the benchmark has it: errors of six layers add up
    error_law(ours, eager, truth, factor=factor)
    error_law(
        replayed, eager, truth, factor=factor
    )  # not bit for bit: a bucket has more rows, and so perhaps other tiles


@pytest.mark.gpu
@pytest.mark.skipif(interpreted(), reason="needs a GPU")
@pytest.mark.parametrize("graphs", [False, True])
def test_overlapping_launches_give_the_same_bits(graphs, modes):
    """Every kernel, with torch's own in between, and again and again over the same memory."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("launches overlap from sm_90 on")
    model, (ids, keep) = model_on("cuda").half(), batch("cuda")
    model.cuda_graphs(graphs)
    with torch.inference_mode():
        expected = model(ids, keep)[0].clone()
        modes.overlap = True
        for _ in range(20):
            hidden = model(ids, keep)[0]
            rows = (hidden * 2 - hidden).contiguous()
            assert torch.equal(rows, expected * 2 - expected)


@pytest.mark.gpu
@pytest.mark.skipif(interpreted(), reason="needs a GPU")
def test_compiled_with_inductor():
    model, (ids, keep) = model_on("cuda"), batch("cuda")
    with torch.inference_mode():
        expected = model(ids, keep)[0]
        ours = torch.compile(model, fullgraph=True)(ids, keep)[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)
