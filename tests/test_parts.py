"""What users put in place of the model's parts, patch or watch, as they do it with transformers' model."""

import copy

import pytest
import torch
from torch import nn

import fastdistil
from fastdistil import DistilBertConfig, DistilBertForSequenceClassification, DistilBertModel
from fastdistil import layers as ours_module
from fastdistil.outputs import BaseModelOutput

transformers = pytest.importorskip("transformers")

TINY = dict(
    vocab_size=99, dim=48, n_heads=3, hidden_dim=80, n_layers=2, max_position_embeddings=40, initializer_range=0.1
)  # fmt: skip
IDS = torch.randint(1, 99, (4, 21), generator=torch.Generator().manual_seed(1))
KEEP = torch.arange(21) < torch.tensor([21, 3, 1, 17])[:, None]


def pair(name="DistilBertModel", attn="sdpa"):
    """One seed, both libraries, in eval mode."""
    torch.manual_seed(0)
    theirs = getattr(transformers, name)._from_config(transformers.DistilBertConfig(**TINY), attn_implementation=attn)
    torch.manual_seed(0)
    return getattr(fastdistil, name)(DistilBertConfig(**TINY)).eval(), theirs.eval()


def agree(ours, theirs):
    """With a gradient and without, at real tokens."""
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found, expected = ours(IDS, KEEP)[0], theirs(IDS, attention_mask=KEEP.long())[0]
        assert found.requires_grad is grad
        if found.dim() == 3:
            found, expected = found[KEEP], expected[KEEP]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    return found


class Attention(nn.Module):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        assert attention_mask.dim() == 4
        return hidden_states.roll(1, -1), None


class Block(nn.Module):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return hidden_states * 2


class Encoder(nn.Module):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return BaseModelOutput(hidden_states * 3)


class Embeddings(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids=None, inputs_embeds=None, position_ids=None):
        return self.inner(input_ids, inputs_embeds, position_ids) * 0.5


PARTS = {
    "attention": lambda m: setattr(m.transformer.layer[0], "attention", Attention()),
    "block": lambda m: m.transformer.layer.__setitem__(1, Block()),
    "transformer": lambda m: setattr(m, "transformer", Encoder()),
    "embeddings": lambda m: setattr(m, "embeddings", Embeddings(m.embeddings)),
}


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_ones_own(part):
    ours, theirs = pair()
    for model in (ours, theirs):
        PARTS[part](model)
    agree(ours, theirs)
    states = ours(IDS, KEEP, output_hidden_states=True).hidden_states
    assert all((state[~KEEP] == 0).all() for state in states)


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_ones_own_in_a_live_model(part):
    theirs = pair()[1]
    live = fastdistil.accelerate(copy.deepcopy(theirs))
    for model in (live, theirs):
        model.requires_grad_(False)
        PARTS[part](model)
    found, expected = live(IDS, attention_mask=KEEP.long())[0], theirs(IDS, attention_mask=KEEP.long())[0]
    torch.testing.assert_close(found[KEEP], expected[KEEP], rtol=0, atol=1e-5)


CLASSES = [ours_module.TransformerBlock, ours_module.FFN, ours_module.MultiHeadSelfAttention, ours_module.Embeddings]
TORCHS = [nn.Linear, nn.LayerNorm, nn.GELU, nn.Dropout, nn.Embedding]


@pytest.mark.parametrize("kind", [*CLASSES, ours_module.Transformer, DistilBertModel, *TORCHS])
def test_patched_classes_are_called(kind, monkeypatch):
    """Also where the forward was patched after a call."""
    model = DistilBertForSequenceClassification(DistilBertConfig(**TINY)).eval()
    with torch.no_grad():
        before, real = model(IDS, KEEP).logits, kind.forward

    def patched(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        if isinstance(out, BaseModelOutput):
            return BaseModelOutput(out[0].abs(), out.hidden_states)
        return (out[0].abs(), *out[1:]) if isinstance(out, tuple) else out.abs()

    monkeypatch.setattr(kind, "forward", patched)
    expected = model(IDS, KEEP).logits
    assert (expected - before).abs().max() > 1e-4
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, KEEP).logits, expected.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["DistilBertSelfAttention", "TransformerBlock", "FFN", "Embeddings"])
def test_patched_classes_of_a_live_model(kind, monkeypatch):
    modeling = transformers.models.distilbert.modeling_distilbert
    live = fastdistil.accelerate(pair()[1])
    kind = getattr(modeling, kind)
    with torch.no_grad():
        before, real = live(IDS, attention_mask=KEEP.long())[0], kind.forward

    def patched(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        return (out[0].abs(), *out[1:]) if isinstance(out, tuple) else out.abs()

    monkeypatch.setattr(kind, "forward", patched)
    expected = live(IDS, attention_mask=KEEP.long())[0].detach()
    assert (expected - before)[KEEP].abs().max() > 1e-3
    with torch.no_grad():
        found = live(IDS, attention_mask=KEEP.long())[0]
    torch.testing.assert_close(found[KEEP], expected[KEEP], rtol=0, atol=1e-6)


def half(module, query, key, value, attention_mask=None, **kwargs):
    return transformers.integrations.sdpa_attention.sdpa_attention_forward(
        module, query, key, value / 2, attention_mask, **kwargs
    )


def chosen(model):
    transformers.AttentionInterface.register("half", half)
    model.config._attn_implementation = "half"


def eager_replaced(model, monkeypatch):
    modeling = transformers.models.distilbert.modeling_distilbert
    monkeypatch.setattr(modeling, "eager_attention_forward", half)
    model.config._attn_implementation = "eager"


SETTINGS = {
    "a function of one's own": chosen,
    "the default function": lambda m, patch: patch.setitem(
        transformers.AttentionInterface._global_mapping, "sdpa", half
    ),
    "eager": eager_replaced,
    "scaling": lambda m: setattr(m.transformer.layer[0].attention, "scaling", 0.05),
    "is_causal": lambda m: setattr(m.transformer.layer[0].attention, "is_causal", True),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_how_a_live_model_attends(setting, monkeypatch):
    theirs = pair()[1]
    live = fastdistil.accelerate(copy.deepcopy(theirs))
    for model in (theirs, live):
        model.requires_grad_(False)
    assert torch.allclose(live(IDS)[0], theirs(IDS)[0], atol=1e-5)
    before = theirs(IDS)[0]
    for model in (live, theirs):
        change = SETTINGS[setting]
        change(*(model, monkeypatch)[: change.__code__.co_argcount])
    expected = theirs(IDS)[0]
    assert (expected - before).abs().max() > 1e-4
    torch.testing.assert_close(live(IDS)[0], expected, rtol=0, atol=1e-5)


def test_a_scaling_of_ones_own():
    ours, theirs = pair()
    for model in (ours, theirs):
        model.transformer.layer[0].attention.scaling = 0.05
    before = pair()[0](IDS, KEEP)[0]
    assert not torch.allclose(agree(ours, theirs), before[KEEP], atol=1e-4)


def narrowed(model):
    attention = model.transformer.layer[0].attention
    for name in ("q_lin", "k_lin", "v_lin"):
        old, new = getattr(attention, name), nn.Linear(48, 32)
        new.weight.data, new.bias.data = old.weight.data[:32].clone(), old.bias.data[:32].clone()
        setattr(attention, name, new)
    old, attention.out_lin = attention.out_lin, nn.Linear(32, 48)
    attention.out_lin.weight.data, attention.out_lin.bias.data = old.weight.data[:, :32].clone(), old.bias.data


def test_a_head_that_was_cut_away():
    ours, theirs = pair()
    for model in (ours, theirs):
        narrowed(model)
    agree(ours, theirs)


def test_the_activation_is_a_module():
    ours, theirs = pair()
    for model in (ours, theirs):
        seen = []
        model.transformer.layer[1].ffn.activation.register_forward_hook(
            lambda module, args, out, seen=seen: seen.append(out.shape) or out * 0.5
        )
        with torch.no_grad():
            model(IDS, KEEP)
        assert seen == [(4, 21, 80)] and "transformer.layer.1.ffn.activation" in dict(model.named_modules())
    agree(ours, theirs)


def test_hooks_of_a_part_that_is_put_in_later():
    for part in ("embeddings", "transformer"):
        ours, theirs = pair()
        for model in (ours, theirs):
            with torch.no_grad():
                model(IDS, KEEP)
            hooked = copy.deepcopy(getattr(model, part))
            hooked.register_forward_pre_hook(lambda m, a, k: (a, k | {"hidden_states": None} and k), with_kwargs=True)
            hooked.register_forward_hook(
                lambda m, a, out: out * 2 if isinstance(out, torch.Tensor) else type(out)(out[0] * 2)
            )
            setattr(model, part, hooked)
        agree(ours, theirs)


def test_hooks_see_what_transformers_hooks_see():
    """A pre-hook that changes the states alone keeps the mask; backward hooks have one gradient to change."""
    ours, theirs = pair()
    gradients = []
    for model in (ours, theirs):
        attention = model.transformer.layer[0].attention
        attention.register_forward_pre_hook(lambda m, args, kw: ((args[0] * 2,), kw), with_kwargs=True)
        attention.register_full_backward_hook(lambda m, given, out: (given[0] * 0.5,))
        out = model(IDS, attention_mask=KEEP.long())[0]
        (out * KEEP[:, :, None]).pow(2).sum().backward()
        gradients.append(model.embeddings.word_embeddings.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)
    agree(ours, theirs)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_block_gives_a_tensor_with_attentions_too(checkpointing):
    results = []
    for model in pair(attn="eager"):
        seen = []
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.train()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        block = model.transformer.layer[0]
        block.register_forward_hook(lambda m, a, out, seen=seen: (seen.append(type(out)), out * 2)[1])
        out = model(IDS, attention_mask=KEEP.long(), output_attentions=True)
        (out[0] * KEEP[:, :, None]).pow(2).sum().backward()
        assert set(seen) == {torch.Tensor} and len(out.attentions) == 2
        results.append(
            (out[0][KEEP], out.attentions[1].transpose(1, 2)[KEEP], model.embeddings.word_embeddings.weight.grad)
        )
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_hidden_states_are_on_the_way_of_the_gradient():
    gradients = []
    for model in pair():
        out = model(IDS, attention_mask=KEEP.long(), output_hidden_states=True)
        for state in out.hidden_states:
            state.retain_grad()
        out[0][KEEP].pow(3).sum().backward()
        gradients.append([state.grad[KEEP] for state in out.hidden_states])
    for found, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["DistilBertModel", "DistilBertForSequenceClassification"])
def test_what_is_traced_needs_none_of_our_ops(name, grad):
    ours, theirs = pair(name)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(ours, (IDS, KEEP.long()), strict=False)
    assert "fastdistil::" not in str(traced.inlined_graph)
    found, expected = traced(IDS[:2], KEEP[:2].long()), theirs(IDS[:2], attention_mask=KEEP[:2].long())
    (found,), expected = found.values(), expected[0]
    found, expected = (found[KEEP[:2]], expected[KEEP[:2]]) if found.dim() == 3 else (found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_derivatives_of_second_order_and_forward_mode():
    ours, theirs = pair("DistilBertForSequenceClassification", attn="eager")
    ours.set_attn_implementation("eager")
    embeds = torch.randn(2, 5, 48)
    twice = []
    for model in (ours, theirs):
        x = embeds.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(inputs_embeds=x).logits.pow(2).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x)
        _, tangent = torch.func.jvp(lambda x, model=model: model(inputs_embeds=x).logits, (embeds,), (embeds,))
        twice.append((second, tangent))
    for found, expected in zip(*twice, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_shallow_copy_leaves_weights_where_they_are():
    attention = DistilBertModel(DistilBertConfig(**TINY)).transformer.layer[0].attention
    held = attention.state_dict()
    other = copy.copy(attention)
    assert all(held[f"{n}.weight"].data_ptr() == getattr(attention, n).weight.data_ptr() for n in ("q_lin", "v_lin"))
    assert other.q_lin is attention.q_lin and other._lie_side_by_side()


# --- the encoder of a head ------------------------------------------------------------------------------------------


def own_forward(kind):
    class Own(kind):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out["last_hidden_state"] = out.last_hidden_state * 0.5
            return out

    return Own


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        out = self.inner(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        out["last_hidden_state"] = out.last_hidden_state * 0.5
        return out


def subclassed(model):
    model.distilbert.__class__ = own_forward(type(model.distilbert))


def wrapped(model):
    model.distilbert = Wrapper(model.distilbert)


def strict(model):
    inner = model.distilbert.forward
    model.distilbert.forward = lambda input_ids=None, attention_mask=None, inputs_embeds=None, **kw: inner(
        input_ids=(input_ids + 1) % 99, attention_mask=attention_mask, **kw
    )


def hooked(model):
    def hook(module, args, kwargs):
        return args, kwargs | {"attention_mask": torch.ones_like(kwargs["attention_mask"])}

    model.distilbert.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("change", [subclassed, wrapped, strict, hooked])
@pytest.mark.parametrize("name", ["DistilBertForSequenceClassification", "DistilBertForTokenClassification"])
def test_an_encoder_of_ones_own_below_a_head(name, change):
    ours, theirs = pair(name)
    with torch.no_grad():
        before = ours(IDS, KEEP).logits
    for model in (ours, theirs):
        change(model)
    if change is hooked and "Token" in name:  # transformers' encoder knows of no padding then
        assert ours(IDS, KEEP).logits.shape == theirs(IDS, attention_mask=KEEP.long()).logits.shape
        return
    found = agree(ours, theirs)
    assert not torch.allclose(found, before if before.dim() == 2 else before[KEEP], atol=1e-4)


def test_an_encoder_that_is_compiled_below_a_head():
    ours = pair("DistilBertForSequenceClassification")[0]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        expected = ours(IDS, KEEP).logits
        ours.distilbert.compile(backend=backend)
        torch.testing.assert_close(ours(IDS, KEEP).logits, expected, rtol=0, atol=1e-5)
    assert graphs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_soft_labels_keep_their_precision(dtype):
    results = []
    for model in pair("DistilBertForSequenceClassification"):
        model.to(dtype).config.problem_type = "multi_label_classification"
        labels = torch.rand(4, 2, generator=torch.Generator().manual_seed(0))
        results.append(model(IDS, attention_mask=KEEP.long(), labels=labels).loss)
    assert results[0].dtype is results[1].dtype
    torch.testing.assert_close(*results, rtol=0, atol=1e-3 if dtype is torch.bfloat16 else 1e-7)


def test_live_models_within_transforms():
    live = fastdistil.accelerate(pair()[1])
    theirs = pair()[1]
    weights = {name: p.detach() for name, p in theirs.named_parameters()}

    def of(model):
        return lambda w: torch.func.functional_call(model, w, (IDS,))[0].pow(2).sum()

    stacked = {name: torch.stack([p, 2 * p]) for name, p in weights.items()}
    with torch.no_grad():
        live(IDS)
        torch.testing.assert_close(torch.func.vmap(of(live))(stacked), torch.func.vmap(of(theirs))(stacked))


def test_embeddings_come_third_as_in_transformers():
    ours, theirs = pair()
    embeds = torch.randn(4, 21, 48)
    found, expected = ours(None, KEEP.long(), embeds)[0], theirs(None, KEEP.long(), embeds)[0]
    torch.testing.assert_close(found[KEEP], expected[KEEP], rtol=0, atol=1e-5)


def test_attentions_are_the_same_beside_hidden_states():
    """Of padded queries, too."""
    ours, theirs = pair(attn="eager")
    ids = IDS.where(KEEP, 0)
    expected = theirs(ids, attention_mask=KEEP.long(), output_attentions=True).attentions
    for states in (False, True):
        found = ours(ids, KEEP, output_attentions=True, output_hidden_states=states).attentions
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_head_mask_that_is_learned_under_checkpointing(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = pair()[0].train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        gates = nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))
        model(IDS, KEEP, head_mask=gates.sigmoid())[0].pow(3).sum().backward()
        gradients.append(gates.grad)
    torch.testing.assert_close(*gradients)


def test_states_of_a_subclass_are_zero_at_padding():
    ours = pair()[0]
    ours.transformer.__class__ = type("Own", (ours_module.Transformer,), {})
    states = ours(IDS, KEEP, output_hidden_states=True).hidden_states
    assert len(states) == 3 and all((state[~KEEP] == 0).all() for state in states)


class Narrow(DistilBertModel):
    """With a forward of transformers' arguments alone."""

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, return_dict=None):
        return super().forward(input_ids, attention_mask, inputs_embeds=inputs_embeds, return_dict=return_dict)


@pytest.mark.parametrize("wrap", [False, True])
def test_a_loss_over_padding_below_a_forward_of_ones_own(wrap):
    ours, theirs = pair("DistilBertForMaskedLM")
    inner = Narrow(ours.config)
    inner.load_state_dict(ours.distilbert.state_dict())
    ours.distilbert = inner.eval()
    if wrap:
        wrapped(ours), wrapped(theirs)
    labels = torch.randint(0, 99, IDS.shape, generator=torch.Generator().manual_seed(2))
    losses = [model(IDS, attention_mask=KEEP.long(), labels=labels).loss for model in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-6)
    assert (ours.distilbert.inner if wrap else ours.distilbert)(IDS, KEEP)[0][~KEEP].abs().max() == 0  # as ever
