"""Inference calls the ops' forms as they are, where nobody looks into the call: same bits, fewer steps. Those of CPU;
kernels' are in tests/kernels."""

import contextlib
import dataclasses

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdistil import DistilBertConfig, DistilBertForSequenceClassification, DistilBertModel, cpu, ops
from fastdistil.layers import TransformerBlock
from fastdistil.packing import find_rows, past_the_ops
from fastdistil.plain import to_eval
from fastdistil.testing import cu_seqlens

TINY = dict(vocab_size=99, dim=48, n_heads=3, hidden_dim=80, n_layers=3, max_position_embeddings=40)
IDS = torch.randint(1, 99, (4, 21), generator=torch.Generator().manual_seed(0))
KEEP = torch.arange(21) < torch.tensor([21, 3, 0, 17])[:, None]


@pytest.fixture
def unseen(monkeypatch):
    """How many rows the blocks were given that ran without the ops' checks."""
    rows, block = [], TransformerBlock._unseen
    monkeypatch.setattr(
        TransformerBlock, "_unseen", lambda self, x, *more: rows.append(len(x)) or block(self, x, *more)
    )
    return rows


def seen(call):
    """What a call gives by the ops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "is_unseen", lambda device: False)
        patch.setattr(TransformerBlock, "_unseen", None)
        return call()


def test_which_forms_may_be_called_on_a_gpu(monkeypatch):
    gpu, meta, cpu_too = torch.device("cuda", 0), torch.device("meta"), torch.device("cpu")
    with torch.inference_mode():
        for why_not, found in ((None, "kernels"), ("no compiler", None)):
            said = {"cuda": why_not, "cpu": "no GPU", "meta": "no GPU"}
            monkeypatch.setattr(ops._target, "why_not", lambda device, said=said: said[device.type])
            assert [past_the_ops(device) for device in (gpu, meta, cpu_too)] == [found, None, "cpu"]
        monkeypatch.setattr(ops._target, "why_not", lambda device: None)
        assert past_the_ops(cpu_too) == "kernels"  # as in the interpreter
        torch.set_autocast_enabled("cuda", True)
        try:
            assert [past_the_ops(device) for device in (gpu, cpu_too)] == [None, "kernels"]
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert past_the_ops(gpu) is None  # a gradient could be asked for


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
def test_same_bits_as_by_the_ops(dtype, activation, unseen):
    torch.manual_seed(0)
    model = DistilBertModel(DistilBertConfig(**TINY, activation=activation)).to(dtype).eval()
    classifier = DistilBertForSequenceClassification(DistilBertConfig(**TINY)).to(dtype).eval()
    packed, cu = torch.arange(41) % 99, cu_seqlens([21, 3, 0, 17])
    calls = [
        (lambda: model(IDS, KEEP, output_hidden_states=True).hidden_states[2], 41),
        (lambda: model(IDS[:1])[0], 21),  # a query alone
        (lambda: model(IDS[:, :1])[0], 4),
        (lambda: model(IDS, torch.zeros_like(IDS))[0], 0),
        (lambda: model.forward_packed(packed, cu, 21), 41),
        (lambda: model.forward_packed(packed, cu, 21, only=torch.tensor([40, 0, 40])), 41),
        (lambda: classifier(IDS, KEEP).logits, 41),  # of the first tokens alone
    ]
    for context in (torch.inference_mode, torch.no_grad):
        for call, rows in calls:
            with context():
                unseen.clear()
                mine = call()
                assert unseen == [rows] * 3
                assert torch.equal(mine, seen(call))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def of_its_own(block):
    block.ffn.lin1 = Doubled(48, 80).eval()


def patched(block):
    linear = block.attention.out_lin
    linear.forward = lambda x: 3 * nn.Linear.forward(linear, x)


def other_memory(block):
    block.attention.k_lin.weight.data = block.attention.k_lin.weight.data * 2


def turned(block):
    block.attention.v_lin.weight.data = block.attention.v_lin.weight.data.T


def hooked(block):
    block.attention.q_lin.register_forward_hook(lambda module, args, out: 2 * out)


def norm_hooked(block):
    block.sa_layer_norm.register_forward_pre_hook(lambda module, args: (args[0].flip(-1),))


def no_bias(block):
    block.attention.out_lin.bias = None


def another_activation(block):
    block.ffn.activation = nn.Tanh()


def another_name(block):
    block.ffn.activation = nn.ReLU()


def written_through_data(block):
    block.ffn.lin2.weight.data.mul_(2)
    block.attention.q_lin.weight.data.mul_(2)


def other_bias(block):
    block.attention.k_lin.bias.data = torch.randn(48)
    block.attention.q_lin.bias.data = torch.randn(48)  # of which k's alone would not be seen


def attribute(block):
    block.ffn.lin2.__dict__["weight"] = torch.zeros(48, 80)


def attribute_bias(block):
    block.ffn.lin1.__dict__["bias"] = torch.zeros(80)


class Halved(nn.Parameter):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        plain = [a.as_subclass(torch.Tensor) / 2 if type(a) is Halved else a for a in args]
        return func(*plain, **(kwargs or {}))


def subclass(block):
    block.ffn.lin2.weight = torch.Tensor._make_subclass(Halved, block.ffn.lin2.weight.data)


def epsilons(block):
    block.sa_layer_norm.eps, block.output_layer_norm.eps = 1.0, 2.0


def another_parameter(block):
    block.output_layer_norm.weight = nn.Parameter(torch.full((48,), 3.0))
    block.attention.out_lin.weight = nn.Parameter(torch.randn(48, 48))


@pytest.mark.parametrize(
    ("change", "still"),
    [
        (of_its_own, False),
        (patched, False),
        (other_memory, False),
        (turned, False),
        (hooked, False),
        (norm_hooked, False),
        (no_bias, False),
        (another_activation, False),
        (other_bias, False),
        (attribute, False),
        (attribute_bias, False),
        (epsilons, True),
        (another_name, True),
        (written_through_data, True),
        (another_parameter, True),
    ],
)
def test_what_was_changed_is_run(change, still, unseen):
    """In a model that was called before: nothing of a call is remembered."""
    torch.manual_seed(0)
    model = DistilBertModel(DistilBertConfig(**TINY)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, mean=0.0 if parameter.dim() == 2 else 1.0)
    with torch.inference_mode():
        before = model(IDS, KEEP)[0]
    assert len(unseen) == 3
    change(model.transformer.layer[1])
    unseen.clear()
    with torch.no_grad():
        after = model(IDS, KEEP)[0]
        dense = model._dense(model._checked(IDS, KEEP, None, None, None, None, ()))[0][-1] * KEEP[..., None]
    assert (len(unseen) == 3) is still
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after, dense, rtol=0, atol=2e-5)


def wider(block):
    block.ffn.lin2 = nn.Linear(80, 1)


def norm_of_all(block):
    block.sa_layer_norm = nn.LayerNorm((41, 48))


def short_bias(block):
    block.ffn.lin1.bias = nn.Parameter(torch.zeros(1))


def narrow(block):
    block.attention.out_lin.weight = nn.Parameter(torch.zeros(48, 47))


def mixed(block):
    block.ffn.lin2.half()


def elsewhere(block):
    block.ffn.lin1.weight = nn.Parameter(block.ffn.lin1.weight.data.to("meta"))


def mixed_bias(block):
    block.ffn.lin1.bias.data = block.ffn.lin1.bias.data.half()


def sparse(block):
    block.ffn.lin1.weight = nn.Parameter(block.ffn.lin1.weight.data.to_sparse())


def sparse_bias(block):
    block.ffn.lin1.bias = nn.Parameter(block.ffn.lin1.bias.data.to_sparse())


def float_heads(block):
    block.attention.n_heads = 3.0


@pytest.mark.parametrize(
    "change", [wider, norm_of_all, short_bias, narrow, mixed, mixed_bias, elsewhere, sparse, sparse_bias, float_heads]
)
def test_what_the_ops_refuse_is_refused(change, unseen):
    """By name; torch would compute some of it."""
    model = DistilBertModel(DistilBertConfig(**TINY)).eval()
    change(model.transformer.layer[1])
    with torch.inference_mode(), pytest.raises((ValueError, TypeError, KeyError, NotImplementedError)) as mine:
        model(IDS, KEEP)
    assert len(unseen) == 1
    with torch.inference_mode(), pytest.raises((ValueError, TypeError, KeyError, NotImplementedError)) as theirs:
        seen(lambda: model(IDS, KEEP))
    assert str(mine.value) == str(theirs.value)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_weights_that_their_memory_does_not_say_are_not_read_from_it(name, unseen):
    """A kernel reads memory, where a negative view has the numbers of the opposite sign."""
    model = DistilBertModel(DistilBertConfig(**TINY)).eval()
    norm = model.transformer.layer[1].sa_layer_norm
    setattr(norm, name, nn.Parameter(torch._neg_view(getattr(norm, name).data - 0.5)))
    with torch.inference_mode():
        assert torch.equal(model(IDS, KEEP)[0], seen(lambda: model(IDS, KEEP)[0])) and len(unseen) == 2


def test_rows_on_another_device_than_their_places_are_refused(unseen):
    """As where somebody's own embeddings move them."""
    model = DistilBertModel(DistilBertConfig(**TINY)).eval()
    with torch.inference_mode():
        at = find_rows(None, 1, 4, torch.device("cpu"))
        at = dataclasses.replace(at, cu_seqlens=at.cu_seqlens.to("meta"))
        with pytest.raises(ValueError, match="cu_seqlens is on meta, the rows are on cpu"):
            model.transformer.layer[0].packed(torch.randn(4, 48), at)
    assert not unseen


def test_a_part_that_is_no_module_is_called():
    model = DistilBertModel(DistilBertConfig(**TINY)).eval()
    block = model.transformer.layer[1]
    norm = block.sa_layer_norm
    with torch.inference_mode():
        before = model(IDS, KEEP)[0]
        del block.sa_layer_norm
        block.sa_layer_norm = lambda x: norm(x)
        torch.testing.assert_close(model(IDS, KEEP)[0], before, rtol=0, atol=1e-5)


def test_a_subclass_of_a_parameter_is_not_looked_through(unseen):
    model = DistilBertModel(DistilBertConfig(**TINY)).eval().requires_grad_(False)
    subclass(model.transformer.layer[1])
    with torch.no_grad():
        assert torch.equal(model(IDS, KEEP)[0], seen(lambda: model(IDS, KEEP)[0])) and len(unseen) == 2


def test_gradients_past_a_call_without_one(unseen, monkeypatch):
    """Within torch.func tensors are wrapped, and have no memory to look at."""
    model = DistilBertModel(DistilBertConfig(**TINY)).eval()
    embeds = torch.randn(2, 7, 48)

    def loss(embeds):
        with torch.no_grad():
            hidden = model(inputs_embeds=embeds)[0]
        return (hidden * embeds).sum()

    with torch.no_grad():
        expected = model(inputs_embeds=embeds)[0]
    unseen.clear()
    for onednn in (False, True):
        if onednn:
            monkeypatch.setattr(cpu, "why_not_onednn", lambda: "")
        torch.testing.assert_close(torch.func.grad(loss)(embeds), expected, rtol=0, atol=1e-5)
    assert not unseen


def test_a_profile_shows_the_ops(unseen):
    model = DistilBertModel(DistilBertConfig(**TINY)).eval()
    with torch.inference_mode(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(IDS, KEEP)
    assert "fastdistil::attention" in {event.key for event in profile.key_averages()} and not unseen


def test_active_adapters_are_run(unseen):
    model = DistilBertModel(DistilBertConfig(**TINY)).eval()
    model.add_adapter("mine", "lora")
    with torch.inference_mode():
        before = model(IDS, KEEP)[0]
        unseen.clear()
        model.set_active_adapters("mine")
        for name, parameter in model.named_parameters():
            if "lora" in name.lower() or "mine" in name:
                nn.init.normal_(parameter)
        assert not torch.allclose(model(IDS, KEEP)[0], before, atol=1e-3) and not unseen


def test_training_deep_inside_is_ended():
    model = DistilBertModel(DistilBertConfig(**TINY)).eval()
    model.transformer.layer[2].ffn.dropout.train()
    model.register_module("nothing", None)
    to_eval(model)
    assert not any(part.training for part in model.modules())


def test_a_hooked_linear_of_a_block_is_called(unseen):
    """Whoever calls the block: a model looks for hooks before."""
    block = TransformerBlock(DistilBertConfig(**TINY)).eval()
    with torch.inference_mode():
        at = find_rows(None, 2, 7, torch.device("cpu"))
        x = torch.randn(14, 48)
        before = block.packed(x, at)
        assert unseen == [14]
        block.ffn.lin1.register_forward_pre_hook(lambda module, args: (args[0].flip(-1),))
        assert not torch.allclose(block.packed(x, at), before, atol=1e-3) and unseen == [14]
        block.ffn.lin1._forward_pre_hooks.clear()
        block.ffn.lin1.register_forward_hook(lambda module, args, out: out + 1)
        assert not torch.allclose(block.packed(x, at), before, atol=1e-3) and unseen == [14]


@contextlib.contextmanager
def registered(register):
    """A hook on every module."""
    handle = register(lambda module, *more: None)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "around",
    [
        torch.enable_grad,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        Watching,
        lambda: torch.device("cpu"),  # a mode that sees functions
        torch.autograd.forward_ad.dual_level,
        lambda: registered(nn.modules.module.register_module_forward_hook),
        lambda: registered(nn.modules.module.register_module_forward_pre_hook),
    ],
)
def test_who_looks_into_a_call_sees_the_ops(around, unseen):
    model = DistilBertModel(DistilBertConfig(**TINY)).eval().requires_grad_(False)
    with torch.no_grad():
        model(IDS, KEEP)
        assert len(unseen) == 3
        with around():
            model(IDS, KEEP)
            model.forward_packed(torch.arange(30), cu_seqlens([30]), 30)
        assert len(unseen) == (6 if around is torch.enable_grad else 3)  # a packed call is inference always


@pytest.mark.parametrize("name", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_a_block_alone_asks_for_hooks_on_every_module(name):
    """As those of live models, which look for hooks of their own modules only."""
    with torch.inference_mode(), registered(getattr(nn.modules.module, name)):
        assert find_rows(None, 2, 7, torch.device("cpu")).starts is None
    with torch.inference_mode():
        assert find_rows(None, 2, 7, torch.device("cpu")).starts == [0, 7, 14]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traces_and_transforms_see_the_ops(unseen):
    model = DistilBertModel(DistilBertConfig(**TINY)).eval().requires_grad_(False)
    with torch.no_grad():
        flat, longest = IDS.flatten(), IDS.shape[1]
        starts = cu_seqlens([longest] * len(IDS))
        traced = torch.jit.trace(lambda ids: model.forward_packed(ids, starts, longest), flat, check_trace=False)
        assert "fastdistil::attention" in str(traced.inlined_graph) and not unseen
        weights = {name: 2 * p for name, p in model.named_parameters()}
        doubled = torch.func.functional_call(model, weights, (IDS,))[0]
        assert not unseen and not torch.allclose(doubled, model(IDS)[0], atol=1e-3)
        unseen.clear()
        torch.func.vmap(lambda w: torch.func.functional_call(model, {"embeddings.LayerNorm.weight": w}, (IDS,))[0])(
            torch.ones(2, 48)
        )
    assert not unseen


def test_dead_rows_are_the_ops_own(unseen):
    model = DistilBertModel(DistilBertConfig(**TINY)).eval()
    with torch.inference_mode():
        model.forward_packed(torch.arange(41), cu_seqlens([30]), 30)
    assert not unseen


@pytest.mark.parametrize("starts", [[0, 40], [0, 0, 40]])
def test_a_long_text_alone_is_cut(monkeypatch, starts):
    """Its scores would not fit a core's cache."""
    monkeypatch.setattr(cpu, "SCORE_ELEMENTS", 3 * 40 * 16)
    queries, attend = [], cpu._attend_alone
    monkeypatch.setattr(cpu, "_attend_alone", lambda q, k, v: queries.append(q.shape[1]) or attend(q, k, v))
    cpu.attend(torch.randn(40, 3 * 48), starts, 3)
    assert queries == [16, 16, 8]


@pytest.mark.parametrize("length", [1, 2, 5, 16, 40])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_text_alone_is_as_in_a_batch(length, scaled):
    """Attention of one text takes a shorter way."""
    qkv = torch.randn(length, 3 * 48)
    scale = torch.tensor([1.0, 0.0, 0.5]) if scaled else None
    alone = cpu.attend(qkv, [0, length], 3, scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_attend_alone", lambda q, k, v: pytest.fail("the short way"))
        longer = cpu.attend(torch.cat([qkv, qkv]), [0, length, 2 * length], 3, scale)[length:]
    torch.testing.assert_close(alone, longer, rtol=0, atol=2e-6)
