"""int8 linear layers: the fast form against the definition, what rounding costs, and what such a model refuses."""

import copy
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import nn

import fastdistil
from fastdistil import DistilBertConfig, DistilBertForSequenceClassification, DistilBertModel, Embedder, cli, cpu, int8
from fastdistil.int8 import BLOCK, Int8Linear, apply

TEXTS = ["a cat sat", "temporary directory", "", "word " * 400, "it's 3.14, isn't it?", "the weather is lovely today"]
TINY = dict(vocab_size=60, dim=24, n_heads=2, hidden_dim=33, n_layers=2, max_position_embeddings=20)
needs_vnni = pytest.mark.skipif(not cpu.sums_int8(), reason="this processor has no VNNI")


@pytest.fixture(params=["definition", pytest.param("in blocks", marks=needs_vnni)])
def form(request, monkeypatch):
    monkeypatch.setattr(cpu, "sums_int8", lambda: request.param == "in blocks")


@pytest.fixture
def saved(tmp_path):
    DistilBertForSequenceClassification(DistilBertConfig(**TINY)).save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def layers(*widths, terms=100):
    return [Int8Linear(nn.Linear(terms, width)) for width in widths]


def bound(x, linear):
    """|y - exact y| where each factor is off by at most half a step."""
    steps = [(t.abs().amax(1, keepdim=True) / 254).double() for t in (x, linear.weight)]
    sizes = [t.abs().double() for t in (x, linear.weight)]
    return (sizes[0] + steps[0]) @ (sizes[1] + steps[1]).T - sizes[0] @ sizes[1].T


@pytest.mark.parametrize("rows", [1, 5, 511, 512, 1_300])
@torch.inference_mode()
def test_is_no_further_off_than_half_a_step_a_factor(form, rows):
    linear = nn.Linear(100, 37)
    linear.weight[3] = 0
    x = torch.randn(rows, 100) * torch.logspace(-4, 4, rows)[:, None]
    x[rows // 2] = 0
    y = Int8Linear(linear)(x)
    exact = x.double() @ linear.weight.double().T + linear.bias.double()
    off = (y - exact).abs()
    assert bool((off <= bound(x, linear) + 1e-6 * exact.abs().amax(1, keepdim=True)).all())
    assert torch.equal(y[:, 3], linear.bias[3].expand(rows)) and torch.equal(y[rows // 2], linear.bias)
    if rows > 1:
        assert off.mean() > 0.01 * bound(x, linear).mean()  # it is int8


@needs_vnni
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_new", "relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_blocks_are_the_definition(monkeypatch, activation, dtype):
    made, x = layers(24, 7, 64), torch.randn(1_300, 100).to(dtype)
    fast = apply(made, x, activation)
    monkeypatch.setattr(cpu, "sums_int8", lambda: False)
    expected = apply(made, x, activation)
    assert fast.shape == (1_300, 95) and fast.dtype is expected.dtype is dtype
    torch.testing.assert_close(fast, expected, rtol=2**-8 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)


@needs_vnni
def test_sums_are_exact():
    q, w = (torch.randint(-127, 128, size, dtype=torch.int8) for size in ((40, 3_072), (50, 3_072)))
    q[0], w[0] = 127, 127  # instructions before VNNI would saturate
    q[1], w[1] = -127, 127
    assert torch.equal(torch._int_mm(q, w.T).long(), q.long() @ w.long().T)


@pytest.mark.parametrize("isa", ["AVX2", "ALL"])
def test_where_onednn_is_kept_from_vnni(isa):
    """The first to ask does so with tensors that are none."""
    script = (
        "import torch\nfrom torch._subclasses import FakeTensorMode\nfrom fastdistil import cpu\n"
        "with FakeTensorMode(), torch.device('meta'): print(cpu.sums_int8())"
    )
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    found = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True).stdout
    assert found.split() == [str(isa == "ALL" and cpu.has("vnni"))]


def test_few_terms_and_so_many_that_int32_would_overflow(form):
    for terms in (1, 2, 3, 2**31 // 127**2 + 1):
        linear = nn.Linear(terms, 3)
        torch.nn.init.ones_(linear.weight)
        x = torch.ones(4, terms)
        x[1] = 1e-20
        torch.testing.assert_close(Int8Linear(linear)(x), linear(x), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(Int8Linear(linear)(x[1:2]) - linear.bias, x[1:2].sum(1, keepdim=True).expand(1, 3))


def test_values_that_are_not_finite_stay_in_their_row(form):
    (layer,) = layers(10)
    x = torch.randn(5, 100)
    expected = layer(x)
    x[1, 3], x[3, 0] = torch.nan, torch.inf
    y = layer(x)
    assert not y[[1, 3]].isfinite().any() and torch.equal(y[[0, 2, 4]], expected[[0, 2, 4]])


def test_a_model_in_int8(saved, form):
    """Packed, dense, in a batch or alone: one result, near that of float32."""
    whole = DistilBertModel.from_pretrained(saved)
    model = DistilBertModel.from_pretrained(saved, dtype="int8")
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(Int8Linear) == 12 and nn.Linear not in kinds and model.precision == "int8"
    assert all(block.attention._qkv is None for block in model.transformer.layer)  # of float32 weights
    assert model.dtype is torch.float32 and not any(p.requires_grad for p in model.parameters())
    ids, mask = torch.randint(1, 60, (4, 15)), torch.arange(15) < torch.tensor([15, 9, 1, 0])[:, None]
    expected, packed = whole(ids, mask)[0], model(ids, mask)[0]  # no gradient to be asked for
    dense = model(ids, mask, output_attentions=True)
    assert len(dense.attentions) == 2
    torch.testing.assert_close(dense[0], packed, rtol=0, atol=0.05)  # a rounding may fall to the other side
    off = (packed - expected).abs()
    assert off.mean() > 1e-5 and off.max() < 0.1
    assert bool((packed[~mask] == 0).all())
    torch.testing.assert_close(model(ids[1:2], mask[1:2])[0][0, :9], packed[1, :9], rtol=0, atol=0.05)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu", "another"])
@torch.inference_mode()
def test_activations_and_modules_of_somebodys_own(activation, saved, form):
    name = "relu" if activation == "another" else activation
    whole, model = (DistilBertModel.from_pretrained(saved, dtype=d, activation=name) for d in ("float32", "int8"))
    if activation == "another":
        for one in (whole, model):
            for block in one.transformer.layer:
                block.ffn.activation = nn.Tanh()
    for one in (whole, model):  # far from linear
        for block in one.transformer.layer:
            block.ffn.lin1.bias.copy_(torch.linspace(-2, 2, 33))
            block.ffn.lin2.bias.zero_()
    ids = torch.randint(1, 60, (3, 9))
    expected = whole(ids)[0]
    assert (model(ids)[0] - expected).abs().mean() < 0.02
    value = model.transformer.layer[1].attention.v_lin
    value.forward = lambda x: torch.full((*x.shape[:-1], 24), 7.0)
    assert (model(ids)[0] - expected).abs().mean() > 0.04


def test_heads_stay_in_float32(saved):
    model = DistilBertForSequenceClassification.from_pretrained(saved, dtype="torch.int8")
    assert type(model.pre_classifier) is type(model.classifier) is nn.Linear and model.precision == "int8"


def test_scales_stay_in_float32(saved):
    model = DistilBertModel.from_pretrained(saved, dtype="int8")
    layer = model.transformer.layer[0].ffn.lin1
    scale = layer.scale.clone()
    model.to(torch.bfloat16)
    assert layer.scale.dtype is layer.bias.dtype is torch.float32 and torch.equal(layer.scale, scale)
    assert model(torch.tensor([[1, 2]]))[0].dtype is torch.bfloat16


def test_weights_that_are_not_int8_are_refused(saved):
    model = DistilBertModel.from_pretrained(saved, dtype="int8")
    before = {name: value.clone() for name, value in model.state_dict().items() if value.dtype is torch.int8}
    other = DistilBertModel(DistilBertConfig(**TINY)).state_dict()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"q_lin.weight is torch.float32, the model's is int8; load the file by"):
            model.load_state_dict(other, strict=strict)
    assert before and all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("strict", [True, False])
def test_int8_weights_are_refused_by_a_float32_model(strict, saved):
    """Cast without their scales they would be nonsense."""
    state = DistilBertModel.from_pretrained(saved, dtype="int8").state_dict()
    whole = torch.nn.Sequential(DistilBertModel.from_pretrained(saved))
    before = copy.deepcopy(whole)
    with pytest.raises(RuntimeError, match=r"0\.transformer\.layer\.1\.ffn\.lin2\.weight is of an int8 model"):
        whole.load_state_dict({f"0.{name}": tensor for name, tensor in state.items()}, strict=strict)
    for (name, mine), kept in zip(whole.named_parameters(), before.parameters(), strict=True):
        assert "lin" not in name or torch.equal(mine, kept)


def test_parameters_are_counted_whatever_they_are(saved):
    whole, model = (DistilBertModel.from_pretrained(saved, dtype=dtype) for dtype in ("float32", "int8"))
    assert model.num_parameters() == whole.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == whole.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(only_trainable=True) == 0


def test_the_default_device_does_not_matter(saved):
    model = DistilBertModel.from_pretrained(saved, dtype="int8")
    ids = torch.randint(1, 60, (2, 9))
    expected = model(ids)[0]
    with torch.device("meta"):
        assert torch.equal(model(ids)[0], expected)


def test_copies_compute_the_same(saved):
    model = DistilBertModel.from_pretrained(saved, dtype=torch.int8)
    ids = torch.randint(1, 60, (3, 9))
    expected = model(ids)[0]
    other = DistilBertModel.from_pretrained(saved, dtype="int8")
    for layer in (m for m in other.modules() if isinstance(m, Int8Linear)):
        layer.weight.zero_()
    other.load_state_dict(model.state_dict())
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        assert torch.equal(again(ids)[0], expected)
    seen = []
    handle = model.transformer.layer[0].attention.q_lin.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(ids)[0], expected, rtol=0, atol=0.05)
    handle.remove()
    assert seen
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids)[0], expected, rtol=0, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(ids)[0].float(), expected, rtol=0, atol=0.1)


def test_what_an_int8_model_refuses(saved, tmp_path, monkeypatch):
    model = DistilBertForSequenceClassification.from_pretrained(saved, dtype="int8")
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 2)
    with pytest.raises(ValueError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="takes no adapters; load it in float32"):
        model.add_adapter("a")
    embeds = torch.randn(1, 3, 24, requires_grad=True)
    with pytest.raises(RuntimeError, match="int8 weights pass no gradient on; load the model in float32"):
        model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match=r"x is \[..., 3\], the layer takes \[..., 24\]"):
        model.distilbert.transformer.layer[0].ffn.lin1(torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="no tangent on and nothing that vmap"):
        torch.func.vmap(lambda ids: model(ids[None]).logits)(torch.ones(2, 3, dtype=torch.int64))
    features = model.distilbert(torch.tensor([[1, 2, 3]]))[0].clone()
    torch.func.grad(lambda x: (x * model.distilbert(torch.tensor([[1, 2, 3]]))[0]).sum())(features)  # a constant in it
    with fwAD.dual_level():
        model(torch.tensor([[1, 2, 3]]))
        embeds = fwAD.make_dual(torch.randn(1, 3, 24), torch.randn(1, 3, 24))
        with pytest.raises(RuntimeError, match="no tangent on"):
            model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match="verify the checkpoint in float32"):
        fastdistil.verify.verify(saved, dtype="int8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="int8 is for CPU, not for cuda:0"):
        DistilBertModel.from_pretrained(saved, dtype="int8", device="cuda:0")
    adapted = DistilBertModel(DistilBertConfig(**TINY))
    adapted.add_adapter("a")
    adapted.save_pretrained(tmp_path / "adapted")
    with pytest.raises(ValueError, match="dtype int8 takes no adapters"):
        DistilBertModel.from_pretrained(tmp_path / "adapted", dtype="int8")


def test_embeddings_and_what_they_lose(minilm, form):
    """MiniLM's own: CTranslate2's int8 loses as much."""
    plain, rounded = (Embedder.from_pretrained(minilm, "cpu", dtype) for dtype in ("float32", "int8"))
    cosine = (plain.encode(TEXTS) * rounded.encode(TEXTS)).sum(1)
    assert cosine.min() > 0.98 and 0.99 < cosine.mean() < 0.9999
    assert "int8" in rounded.describe()


def test_a_job_in_int8(minilm, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("a cat sat\ntemporary directory\n")
    job = ["embed", "--model", str(minilm), "--device", "cpu", "--input", str(tmp_path / "in.txt")]
    job += ["--output", str(tmp_path / "out"), "--quiet"]
    assert cli.main([*job, "--dtype", "int8"]) == 0
    found = np.load(tmp_path / "out" / "part-00000.npy")
    np.testing.assert_allclose(
        found, Embedder.from_pretrained(minilm, "cpu", "int8").encode(["a cat sat", "temporary directory"]), atol=1e-3
    )
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["dtype"] == "int8"
    capsys.readouterr()
    assert cli.main([*job, "--resume"]) == 1
    assert "dtype" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_layer_takes_any_number_of_rows():
    """Blocks of rows would be those of the example."""
    layer = Int8Linear(nn.Linear(24, 16))
    traced, x = torch.jit.trace(layer, torch.randn(3, 24)), torch.randn(BLOCK + 40, 24)
    torch.testing.assert_close(traced(x), layer(x))


def test_a_linear_of_somebodys_own_stays():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    block = nn.ModuleDict({"own": Own(8, 8), "plain": nn.Linear(8, 8)})
    int8.convert(block, [block])
    assert type(block["own"]) is Own and type(block["plain"]) is Int8Linear


def test_an_int8_layer_has_numbers_of_its_own():
    linear = nn.Linear(8, 8)
    layer, x = Int8Linear(linear), torch.randn(3, 8)
    expected = layer(x)
    with torch.no_grad():
        linear.bias += 1
        linear.weight += 1
    assert torch.equal(layer(x), expected)


def test_numbers_are_rounded_to_the_nearest_step():
    x = torch.randn(7, 50)
    rounded, step = int8.quantize(x.clone())
    assert ((rounded * step - x).abs() <= 0.5001 * step).all() and rounded.abs().amax(1).eq(127).all()
