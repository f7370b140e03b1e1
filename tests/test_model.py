"""DistilBertModel against transformers, over the option grid, and the life of its weights."""

import copy
import itertools
import pickle
import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad

import fastdistil
from fastdistil import DistilBertConfig, DistilBertModel, side_by_side
from fastdistil.pretrained import mean_rows, one_device, sinusoidal_positions

transformers = pytest.importorskip("transformers")

TINY = dict(vocab_size=99, dim=48, n_heads=3, hidden_dim=80, n_layers=2, max_position_embeddings=40)
TOLERANCE = 1e-5


def pair(seed=0, attn="eager", **changes):
    """One seed, both libraries."""
    torch.manual_seed(seed)
    theirs = transformers.DistilBertModel._from_config(
        transformers.DistilBertConfig(**(TINY | changes)), attn_implementation=attn
    )
    torch.manual_seed(seed)
    ours = DistilBertModel(DistilBertConfig(**(TINY | changes)))
    for p in itertools.chain(ours.parameters(), theirs.parameters()):
        assert p.requires_grad
    return ours.eval(), theirs.eval()


def inputs(batch=4, length=21, seed=1):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 99, (batch, length), generator=g)
    lengths = torch.tensor([length, 3, 1, length - 4])[:batch]
    return ids, torch.arange(length) < lengths[:, None]


def close(ours, theirs, keep=None, tolerance=TOLERANCE):
    if keep is not None:
        assert (ours[~keep] == 0).all(), "padded positions must be exactly 0"
        ours, theirs = ours[keep], theirs[keep]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


GRID = [
    *({"activation": a} for a in ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu", "swish")),
    {"sinusoidal_pos_embds": True},
    {"pad_token_id": None},
    {"n_layers": 1, "n_heads": 1},
    *({"dim": heads * size, "n_heads": heads} for heads, size in ((4, 1), (3, 5), (2, 24), (1, 128), (2, 96), (6, 8))),
]


@pytest.mark.parametrize("changes", GRID, ids=str)
def test_seed_parity_states_attentions_and_gradients(changes):
    ours, theirs = pair(**changes)
    ids, keep = inputs()
    state = theirs.state_dict()
    assert set(ours.state_dict()) == set(state)
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())

    expected = theirs(ids, attention_mask=keep.long(), output_hidden_states=True, output_attentions=True)
    with torch.inference_mode():  # packed
        got = ours(ids, keep, output_hidden_states=True)
    assert len(got.hidden_states) == ours.config.n_layers + 1
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        close(a, b, keep)
    dense = ours(ids, keep, output_hidden_states=True, output_attentions=True)
    for a, b in zip(dense.hidden_states, expected.hidden_states, strict=True):
        close(a, b, keep)
    for a, b in zip(dense.attentions, expected.attentions, strict=True):
        close(a.transpose(1, 2)[keep], b.transpose(1, 2)[keep])
    weight = torch.randn(int(keep.sum()), ours.config.dim)
    (dense.last_hidden_state[keep] * weight).sum().backward()
    (expected.last_hidden_state[keep] * weight).sum().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.int32, torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", ["right", "left", "holes"])
def test_masks_of_every_dtype_and_shape(kind, shape):
    ours, theirs = pair()
    ids, keep = inputs()
    keep = {"right": keep, "left": keep.flip(1), "holes": torch.rand(keep.shape) > 0.4}[shape]
    keep[:, 5] = True
    with torch.inference_mode():
        close(ours(ids, keep.to(kind)).last_hidden_state, theirs(ids, attention_mask=keep.long())[0], keep)


def test_one_row_mask_and_no_mask():
    ours, theirs = pair()
    ids, _ = inputs()
    one = torch.ones(1, 21).long()
    one[0, 15:] = 0
    with torch.inference_mode():
        close(ours(ids, one)[0], theirs(ids, attention_mask=one.expand(4, -1))[0], one.bool().expand(4, -1))
        close(ours(ids)[0], theirs(ids)[0])
        close(ours(ids.int())[0], theirs(ids)[0])


def test_rows_without_a_token_are_zero_and_harm_nobody():
    ours, theirs = pair()
    ids, keep = inputs()
    keep[2] = False
    with torch.inference_mode():
        out = ours(ids, keep)[0]
    assert (out[2] == 0).all()
    close(out, theirs(ids, attention_mask=keep.long())[0], keep)
    dense = ours(ids, keep)[0]
    assert dense.requires_grad and (dense[2] == 0).all()
    dense.sum().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())
    with torch.inference_mode():
        assert (ours(ids, torch.zeros_like(ids))[0] == 0).all()


@pytest.mark.parametrize("grad", [False, True])
def test_ids_in_the_padding_are_never_looked_up(grad):
    ours, _ = pair()
    ids, keep = inputs()
    with torch.set_grad_enabled(grad):
        expected = ours(ids, keep)[0]
        torch.testing.assert_close(ours(ids.masked_fill(~keep, -100), keep)[0], expected)


@pytest.mark.parametrize("additive", [False, True])
def test_four_dimensional_masks(additive):
    ours, theirs = pair(attn="sdpa")
    ids, _ = inputs()
    mask = torch.rand(4, 1, 21, 21) > 0.3
    mask[..., 0] = True
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        expected = theirs(ids, attention_mask=mask)[0]
        close(ours(ids, mask)[0], expected)
        close(ours(ids, mask, output_attentions=True)[0], expected)


def test_embeds_positions_head_mask_and_tuples():
    ours, theirs = pair()
    ids, keep = inputs()
    embeds = ours.embeddings.word_embeddings(ids).detach()
    positions = torch.randint(0, 40, (4, 21))
    heads = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 1.0]])
    with torch.inference_mode():
        expected = theirs(inputs_embeds=embeds, attention_mask=keep.long(), position_ids=positions)[0]
        close(ours(inputs_embeds=embeds, attention_mask=keep, position_ids=positions)[0], expected, keep)
        close(ours(ids, keep, position_ids=positions)[0], expected, keep)
        close(ours(ids, position_ids=positions[0])[0], theirs(ids, position_ids=positions[:1])[0])
        masked = ours(ids, keep, heads)[0]
        close(ours(ids, keep, heads[:, None, :, None, None])[0], masked)
        close(ours(ids, keep, torch.ones(3))[0], ours(ids, keep)[0])
        everything = ours(ids, keep, heads, output_attentions=True, output_hidden_states=True, return_dict=False)
    assert isinstance(everything, tuple) and len(everything) == 3
    close(everything[0], masked, keep)
    assert (everything[2][0][:, 1] == 0).all() and differ(masked, ours(ids, keep)[0])


def test_output_object():
    ours, _ = pair()
    out = ours(*inputs(), output_hidden_states=True)
    assert list(out) == ["last_hidden_state", "hidden_states"] and out.attentions is None
    assert out[0] is out["last_hidden_state"] is out.last_hidden_state and len(out[:2]) == 2
    assert isinstance(out, dict) and len(out.to_tuple()) == 2
    with pytest.raises(KeyError):
        out["attentions"]
    with pytest.raises(TypeError, match="cannot be added or removed"):
        out.pop("hidden_states")
    again = pickle.loads(pickle.dumps(ours(*inputs())))
    torch.testing.assert_close(again.last_hidden_state, out.last_hidden_state)


def test_head_mask_matches_pruning_a_head():
    """Zeroing a head equals zeroing its columns of out_lin, which needs no head_mask."""
    ours, _ = pair(n_layers=1)
    ids, keep = inputs()
    with torch.inference_mode():
        masked = ours(ids, keep, torch.tensor([1.0, 0.0, 1.0]))[0]
        ours.transformer.layer[0].attention.out_lin.weight[:, 16:32] = 0
        close(ours(ids, keep)[0], masked)


def test_dropout_and_checkpointing_match_transformers():
    ours, theirs = pair(dropout=0.3, attention_dropout=0.2)
    ids, keep = inputs()
    ours.train(), theirs.train()
    torch.manual_seed(3)
    a = ours(ids, keep, output_attentions=True)[0]
    torch.manual_seed(3)
    b = theirs(ids, attention_mask=keep.long())[0]
    close(a, b, keep)
    grads = []
    for on in (False, True):
        (ours.gradient_checkpointing_enable if on else ours.gradient_checkpointing_disable)()
        assert ours.is_gradient_checkpointing is on
        ours.zero_grad()
        torch.manual_seed(4)
        ours(ids, keep)[0].sum().backward()
        grads.append([p.grad.clone() for p in ours.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_compile_and_export():
    ours, _ = pair()
    ids, keep = inputs()
    with torch.inference_mode():
        expected = ours(ids, keep)[0]
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids, keep).last_hidden_state, expected)
    with torch.no_grad():
        exported = torch.export.export(ours, (ids, keep)).module()
        torch.testing.assert_close(exported(ids, keep).last_hidden_state, expected)
        flipped = exported(ids, keep.flip(1)).last_hidden_state
    with torch.inference_mode():  # other lengths in the same graph
        torch.testing.assert_close(flipped, ours(ids, keep.flip(1))[0])


def test_packed_equals_padded():
    ours, _ = pair()
    ids, keep = inputs()
    lengths = keep.sum(1)
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    with torch.inference_mode():
        expected = ours(ids, keep)[0][keep]
        torch.testing.assert_close(ours.forward_packed(ids[keep], cu, 21), expected)
        spare = torch.cat([ids[keep], torch.full((7,), 5)])  # dead rows
        torch.testing.assert_close(ours.forward_packed(spare, cu, 21)[: len(expected)], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    ours, theirs = pair()
    ids, keep = inputs()
    with torch.inference_mode():
        expected = theirs(ids, attention_mask=keep.long())[0][keep]
        theirs.to(dtype), ours.to(dtype)
        budget = (theirs(ids, attention_mask=keep.long())[0][keep] - expected).abs().max()
        assert (ours(ids, keep)[0][keep] - expected).abs().max() <= 2 * budget


# --- the fused query, key and value buffer ------------------------------------------------------------------------


def attention_of(model):
    return model.transformer.layer[0].attention


def check_fresh(model, expect_fused=True):
    """The packed result uses the weights as they are now: compared with the dense path, which reads the parameters."""
    ids, keep = inputs()
    with torch.inference_mode():
        packed = model(ids, keep)[0]
        dense = model(ids, keep, output_attentions=True)[0]
        assert (attention_of(model)._qkv is not None and attention_of(model)._still_fits()) is expect_fused
    torch.testing.assert_close(packed, dense, rtol=0, atol=1e-5)
    return packed


def differ(one, other):
    """Far more than rounding: another order of the same sums must not count as a change."""
    return (one - other).abs().max() > 1e-3


def test_weights_never_go_stale():
    ours, _ = pair()
    before = check_fresh(ours)
    with torch.no_grad():
        attention_of(ours).v_lin.weight.data.mul_(2)  # does not bump _version
    changed = check_fresh(ours)
    assert differ(before, changed)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.1)
    for _ in range(2):
        ours(*inputs())[0].pow(2).sum().backward()
        optimizer.step()
    assert differ(changed, check_fresh(ours))
    attention_of(ours).k_lin.weight.data = torch.randn(48, 48)
    replaced = check_fresh(ours, expect_fused=False)
    given = pair(seed=5)[0].state_dict()
    ours.load_state_dict(given, assign=True)
    assert attention_of(ours).q_lin.weight.data_ptr() == given["transformer.layer.0.attention.q_lin.weight"].data_ptr()
    assert differ(replaced, check_fresh(ours, expect_fused=False))  # whose memory the caller holds, too
    del given
    check_fresh(ours.to("cpu"))
    ours.load_state_dict(pair(seed=6)[0].state_dict())
    check_fresh(ours)
    check_fresh(ours.double().float())


def test_other_modules_for_q_k_and_v_may_be_moved_and_cast():
    ours, _ = pair()
    pointer = attention_of(ours).q_lin.weight.data_ptr()
    ours.to("cpu"), ours.float()  # which change nothing
    assert attention_of(ours).q_lin.weight.data_ptr() == pointer
    attention_of(ours).k_lin.bias = None
    ours.to("cpu"), ours.float()
    for put_in in (torch.nn.Identity(), torch.nn.Sequential(torch.nn.Linear(48, 48), torch.nn.Tanh())):
        ours, _ = pair()
        attention_of(ours).v_lin = put_in
        ours.to("cpu"), ours.double(), ours.float()
        check_fresh(ours, expect_fused=False)


def test_copies_are_independent_and_saved_without_the_buffer(tmp_path):
    ours, _ = pair()
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        expected = check_fresh(ours)
        torch.testing.assert_close(check_fresh(twin), expected)
        with torch.no_grad():
            attention_of(twin).v_lin.weight.zero_()
        assert differ(check_fresh(twin), expected)
        torch.testing.assert_close(check_fresh(ours), expected)
    size = len(pickle.dumps(ours)) - sum(p.nbytes for p in ours.parameters())
    assert size < 30_000
    from safetensors.torch import save_model

    save_model(ours, str(tmp_path / "m.safetensors"))  # refuses tensors that share a storage
    ours.share_memory()
    assert attention_of(ours).q_lin.weight.is_shared()
    check_fresh(ours, expect_fused=False)


def test_replaced_or_hooked_projections_are_called():
    ours, _ = pair()
    plain = check_fresh(ours)

    class Lora(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    lora = Lora(48, 48)
    lora.load_state_dict(attention_of(ours).v_lin.state_dict())
    attention_of(ours).v_lin = lora
    assert differ(plain, check_fresh(ours, expect_fused=False))
    ours, _ = pair()
    calls = []
    for module in (attention_of(ours).v_lin, attention_of(ours).out_lin, ours.transformer.layer[0].ffn.lin1):
        module.register_forward_hook(lambda *a: calls.append(1))
    with torch.inference_mode():
        torch.testing.assert_close(ours(*inputs())[0], plain)
    assert len(calls) == 3


def test_hooks_see_padded_states_with_a_gradient_and_without():
    ours, theirs = pair()
    ids, keep = inputs()
    plain = ours(ids, keep)[0].detach()
    names = ["embeddings", "transformer.layer.0", "transformer.layer.1.ffn", "transformer.layer.1.attention.q_lin"]
    seen, expected = [], []

    for model, into in ((ours, seen), (theirs, expected)):
        for name in names:
            model.get_submodule(name).register_forward_hook(lambda module, args, out, into=into: into.append(out))
    theirs(ids, keep)
    for grad in (True, False):
        seen.clear()
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(ours(ids, keep)[0], plain, rtol=0, atol=TOLERANCE)
        for got, wanted in zip(seen, expected, strict=True):
            torch.testing.assert_close(got[keep], wanted[keep], rtol=0, atol=TOLERANCE)
    seen.clear()
    cu_seqlens = torch.tensor([0, *keep.sum(1).cumsum(0)], dtype=torch.int32)
    rows = ours.forward_packed(ids[keep], cu_seqlens, 21)
    torch.testing.assert_close(rows, plain[keep], rtol=0, atol=TOLERANCE)
    assert len(seen) == len(names) and all(x.dim() == 3 for x in seen)
    some = ours.forward_packed(ids[keep], cu_seqlens, 21, only=torch.tensor([3, 1]))
    torch.testing.assert_close(some, rows[[3, 1]])


def test_hooks_are_run_where_the_model_is_compiled():
    ours, _ = pair()
    ids, keep = inputs()
    for part in ("transformer.layer.0", "transformer.layer.1.ffn.dropout"):
        ours.get_submodule(part).register_forward_hook(lambda module, args, out: out * 2)
    with torch.no_grad():
        expected = ours(ids, keep)[0]
        compiled = torch.compile(ours, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(ids, keep)[0], expected, rtol=0, atol=TOLERANCE)


def test_the_rest_of_the_surface():
    ours, _ = pair()
    assert ours.get_memory_footprint() == 4 * ours.num_parameters()
    assert ours(**ours.dummy_inputs)[0].shape == (3, 5, 48)
    torch.manual_seed(0)
    other = DistilBertModel.from_config(ours.config)
    assert torch.equal(
        other.state_dict()["transformer.layer.1.ffn.lin1.weight"], ours.transformer.layer[1].ffn.lin1.weight
    )
    other.transformer.layer[1].ffn.lin1 = torch.nn.Linear(48, 80)  # which has no initial values of the model's yet
    own, before = other.transformer.layer[1].ffn.lin1.weight, other.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    other.init_weights()
    assert own.std().item() == pytest.approx(0.02, rel=0.1) and not torch.equal(
        before.pop("transformer.layer.1.ffn.lin1.weight"), own
    )
    assert all(
        torch.equal(tensor, other.state_dict()[name]) for name, tensor in before.items() if "1.ffn.lin1" not in name
    )
    ours.requires_grad_(False)
    ours.enable_input_require_grads()
    ours.set_attn_implementation("sdpa")
    assert ours(inputs()[0])[0].requires_grad


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, i, c: m.forward_packed(None, c, 9), TypeError, "input_ids must be a tensor, got NoneType"),
        (lambda m, i, c: m.forward_packed(i, None, 9), TypeError, "cu_seqlens must be a tensor, got NoneType"),
        (lambda m, i, c: m.forward_packed(i, c, "9"), TypeError, "max_seqlen must be an integer, got '9'"),
        (lambda m, i, c: m.forward_packed(i, c, -1), ValueError, "max_seqlen is -1"),
        (lambda m, i, c: m.forward_packed(i, c, 9, only="first"), TypeError, "only must be a tensor, got str"),
        (
            lambda m, i, c: m.forward_packed(i, c, 9, only=torch.tensor([99])),
            ValueError,
            "only holds 99, but there are",
        ),
        (lambda m, i, c: m.forward_packed(i, c, 9, only=torch.tensor([-1])), ValueError, "only holds -1"),
        (lambda m, i, c: m.forward_packed(i, c, 9, only=torch.tensor([0.0])), ValueError, "only must be int64"),
        (lambda m, i, c: m.resize_token_embeddings(1.5), TypeError, "new_num_tokens must be an integer, got 1.5"),
        (lambda m, i, c: m.resize_position_embeddings("8"), TypeError, "must be an integer, got '8'"),
        (
            lambda m, i, c: type(m).from_pretrained(None, config=m.config, state_dict=m.state_dict(), foo=1),
            TypeError,
            "'foo' is neither",
        ),
        (
            lambda m, i, c: type(m).from_pretrained(".", config={}),
            TypeError,
            "config must be a fastdistil.DistilBertConfig, got dict",
        ),
        (
            lambda m, i, c: type(m).from_pretrained(
                None, config=m.config, state_dict={"a": torch.ones(1, device="meta")}
            ),
            ValueError,
            "state_dict holds a Tensor under 'a', not a plain tensor with values",
        ),
    ],
)
def test_more_wrong_arguments(call, error, message):
    ours, _ = pair()
    with torch.inference_mode(), pytest.raises(error, match=message):
        call(ours, torch.ones(9, dtype=torch.int64), torch.tensor([0, 9], dtype=torch.int32))


def test_overrides_beside_a_configuration():
    ours, _ = pair()
    state = ours.state_dict()
    again = DistilBertModel.from_pretrained(None, config=ours.config, state_dict=state, output_hidden_states=True)
    assert again.config.output_hidden_states and not ours.config.output_hidden_states


def test_modules_that_are_not_ours_are_called():
    ours, _ = pair()
    ids, keep = inputs()

    class Double(torch.nn.Module):
        def forward(self, x):
            return x * 2

    class Quiet(type(ours.transformer.layer[1].attention)):
        def forward(self, x, **kwargs):
            return torch.zeros_like(x), None

    ours.transformer.layer[0].ffn = Double()
    ours.transformer.layer[1].attention.__class__ = Quiet
    expected = ours(ids, keep)[0]
    assert expected.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids, keep)[0], expected.detach(), rtol=0, atol=0)


def test_a_hooked_block_that_is_put_in_later_is_watched():
    ours, other = pair()[0], pair(1)[0]
    ids, keep = inputs()
    seen = []
    other.transformer.layer[0].register_forward_hook(lambda module, args, out: (seen.append(out.shape), out * 2)[1])
    with torch.inference_mode():
        before = ours(ids, keep)[0]
        ours.transformer.layer[1] = other.transformer.layer[0]
        after = ours(ids, keep)[0]
    assert seen == [(4, 21, 48)] and not torch.allclose(before, after, atol=1e-2)


@pytest.mark.parametrize("part", ["embeddings", "transformer.layer.0.attention", "transformer.layer.1.ffn"])
def test_a_dropout_that_is_left_on_drops(part):
    ours, _ = pair()
    ids, keep = inputs()
    with torch.inference_mode():
        assert torch.equal(ours(ids, keep)[0], ours(ids, keep)[0])
        dropout = ours.get_submodule(part).dropout
        dropout.train()
        dropout.p = 0.5
        assert not torch.equal(ours(ids, keep)[0], ours(ids, keep)[0])
        dropout.eval()
        dropout.forward = lambda x: x.flip(-1)
        changed = ours(ids, keep)[0]
        del dropout.forward
        assert part.endswith("attention") or not torch.allclose(ours(ids, keep)[0], changed, atol=1e-4)


def test_another_activation_in_place():
    ours, theirs = pair()
    ids, keep = inputs()
    for model in (ours, theirs):
        model.transformer.layer[0].ffn.activation = torch.nn.Tanh()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            close(ours(ids, keep)[0], theirs(ids, keep)[0], keep)


def test_an_input_on_another_device_is_named():
    ours, _ = pair()
    with torch.inference_mode(), pytest.raises(ValueError, match="the input is on meta, the model on cpu; move one"):
        ours(torch.ones(1, 3, dtype=torch.int64, device="meta"))


# --- embeddings of other sizes ------------------------------------------------------------------------------------


def test_resize_tokens():
    ours, _ = pair()
    words = ours.get_input_embeddings()
    old = words.weight.detach().clone()
    assert ours.resize_token_embeddings(110) is words and ours.config.vocab_size == 110
    torch.testing.assert_close(words.weight[:99].detach(), old)
    assert (words.weight[99:].detach() - old.mean(0)).abs().max() < 1e-3
    assert len(ours.resize_token_embeddings(90, pad_to_multiple_of=64).weight) == 128
    ours.resize_token_embeddings(50, mean_resizing=False)
    assert ours.resize_token_embeddings() is words and len(words.weight) == 50
    with pytest.raises(ValueError, match="outside the vocabulary of 50"), torch.inference_mode():
        ours(torch.tensor([[1, 60]]))
    with pytest.raises(ValueError, match="a vocabulary has from 1 to"):
        ours.resize_token_embeddings(0)


def test_a_part_with_a_hook_that_is_put_in_is_watched():
    model = DistilBertModel(DistilBertConfig(**TINY)).eval()
    ids, seen = torch.ones(1, 4, dtype=torch.long), []
    watched = copy.deepcopy(model.transformer.layer[0].attention)
    watched.register_forward_hook(lambda *_: seen.append(1))
    with torch.inference_mode():
        model(ids)
        model.transformer.layer[0].attention = watched
        model(ids)
    assert seen == [1]


def test_new_positions_of_a_converted_bert_hold_its_token_type():
    model = DistilBertModel(DistilBertConfig(**TINY))
    model.config.token_types_folded = True
    with torch.no_grad():
        model.embeddings.position_embeddings.weight += 3
    before = len(model.embeddings.position_embeddings.weight)
    model.resize_position_embeddings(before + 20)
    assert (model.embeddings.position_embeddings.weight[before:] - 3).abs().mean() < 0.1


@pytest.mark.parametrize("sinusoidal", [False, True])
def test_resize_positions(sinusoidal):
    ours, _ = pair(sinusoidal_pos_embds=sinusoidal)
    old = ours.get_position_embeddings().weight.detach().clone()
    ours.resize_position_embeddings(60)
    new = ours.get_position_embeddings().weight.detach()
    torch.testing.assert_close(new[:40], old)
    assert ours.config.max_position_embeddings == 60 and new[40:].abs().max() < 1.01
    if sinusoidal:
        torch.testing.assert_close(new, sinusoidal_positions(60, 48))
    else:
        assert new[40:].std() < 0.05
    ids = torch.randint(0, 99, (2, 55))
    with torch.inference_mode():
        assert ours(ids)[0].isfinite().all()
    ours.resize_position_embeddings(10)
    with pytest.raises(ValueError, match="55 tokens long, but the model has 10 positions"):
        ours(ids)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, ids: m(), "exactly one of input_ids or inputs_embeds"),
        (lambda m, ids: m(ids, inputs_embeds=torch.ones(2, 4, 48)), "exactly one"),
        (lambda m, ids: m(ids[0]), r"integers \[batch, length\]"),
        (lambda m, ids: m(ids.float()), "integers"),
        (lambda m, ids: m(inputs_embeds=torch.ones(2, 4, 47)), r"\[batch, length, 48\]"),
        (lambda m, ids: m(ids, torch.ones(2, 5)), r"attention_mask must be \[2, 4\]"),
        (lambda m, ids: m(ids, torch.ones(2, 4, 4)), "attention_mask must be"),
        (lambda m, ids: m(ids, torch.ones(2, 1, 4, 5)), "4-D attention_mask"),
        (lambda m, ids: m(ids, None, torch.ones(4)), "head_mask must be"),
        (lambda m, ids: m(ids, position_ids=torch.ones(3, 4).long()), "position_ids must be"),
        (lambda m, ids: m(ids, position_ids=torch.full((4,), 40)), "position_ids holds 40"),
        (lambda m, ids: m(torch.tensor([[1, 2], [3, 99]])), r"input_ids\[1, 1\] is 99, outside the vocabulary of 99"),
        (lambda m, ids: m(torch.tensor([[1, -2]])), r"input_ids\[0, 1\] is -2"),
        (lambda m, ids: m(torch.ones(1, 41).long()), "41 tokens long, but the model has 40 positions"),
        (lambda m, ids: m.forward_packed(ids, torch.tensor([0, 4]).int(), 4), r"must be integers \[rows\]"),
        (lambda m, ids: m.forward_packed(ids[0], torch.tensor([0, 4]).int(), 41), "41 tokens long"),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_calls_are_named(call, message, grad):
    ours, _ = pair()
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=message):
        call(ours, torch.ones(2, 4).long())


def test_empty_batches_and_lengths():
    ours, _ = pair()
    with torch.inference_mode():
        assert ours(torch.empty(0, 5).long())[0].shape == (0, 5, 48)
        assert ours(torch.empty(2, 0).long(), torch.empty(2, 0))[0].shape == (2, 0, 48)
        assert ours.forward_packed(torch.empty(0).long(), torch.zeros(1).int(), 0).shape == (0, 48)


def test_wrong_config_type():
    with pytest.raises(TypeError, match=r"fastdistil\.DistilBertConfig"):
        DistilBertModel(transformers.DistilBertConfig(**TINY))
    assert fastdistil.__version__


def test_the_padded_forward_reads_nothing_back():
    """No host sync, shown without a GPU: on the meta device, which has no values, any read of one raises."""
    ours, _ = pair()
    ids, keep = inputs()
    with torch.inference_mode():
        out = ours.to("meta")(ids.to("meta"), keep.to("meta"), output_hidden_states=True)
    assert out.last_hidden_state.shape == (4, 21, 48) and len(out.hidden_states) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
def test_autocast_gives_transformers_dtypes_and_numbers(grad, dtype):
    ours, theirs = pair(attn="sdpa")
    ids, keep = inputs()
    with torch.set_grad_enabled(grad):
        truth = theirs(ids, attention_mask=keep.long())[0][keep]
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected, got = theirs(ids, attention_mask=keep.long())[0], ours(ids, keep)[0]
    assert got.dtype is expected.dtype is dtype
    budget = (expected[keep] - truth).abs()
    assert (got[keep] - truth).abs().max() <= 2 * budget.max() and budget.max() > 1e-4


def test_gradients_a_sample_by_torch_func():
    """vmap(grad(...)), for which no value may be looked at; with a mask, too."""
    ours, _ = pair()
    ids, keep = inputs()
    weights = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(weights, ids, keep):
        return torch.func.functional_call(ours, weights, (ids[None], keep[None]))[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, ids, keep)
    for row in range(len(ids)):
        ours.zero_grad()
        ours(ids[row : row + 1], keep[row : row + 1])[0].square().sum().backward()
        for name, p in ours.named_parameters():
            torch.testing.assert_close(each[name][row], p.grad, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        alone = torch.func.vmap(lambda i, k: ours(i[None], k[None])[0][0])(ids, keep)
        torch.testing.assert_close(alone, ours(ids, keep)[0], rtol=0, atol=1e-5)


def test_tangents_of_weights_and_values_within_a_gradient():
    """Query, key and value lie side by side in a buffer that knows no tangents; and a gradient hides no value."""
    ours, _ = pair()
    ids, keep = inputs()
    weights = {name: p.detach() for name, p in ours.named_parameters()}
    tangents = {name: 1e-2 * torch.randn_like(p) for name, p in weights.items()}

    def run(weights, ids=ids):
        return torch.func.functional_call(ours, weights, (ids, keep))[0]

    with torch.no_grad():
        _, found = torch.func.jvp(run, (weights,), (tangents,))
        wide = {name: p.double() for name, p in weights.items()}
        ours.double()
        there, back = (run({name: wide[name] + s * tangents[name] for name in wide}) for s in (1e-4, -1e-4))
    torch.testing.assert_close(found.double(), (there - back) / 2e-4, rtol=0, atol=1e-4)
    with torch.no_grad(), forward_ad.dual_level():  # a dual number lies where its primal does
        own = {name: p.detach() for name, p in ours.named_parameters()}
        duals = {name: forward_ad.make_dual(own[name], tangents[name].double()) for name in own}
        dual = forward_ad.unpack_dual(run(duals)).tangent
    torch.testing.assert_close(dual, (there - back) / 2e-4, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        torch.func.grad(lambda weights: run(weights, ids + 10**6).sum())(wide)


@pytest.mark.parametrize("watched", [False, True])
def test_ids_of_a_packed_call_are_looked_at(watched):
    model = DistilBertModel(DistilBertConfig(**TINY)).eval()
    if watched:
        model.transformer.layer[0].ffn.register_forward_hook(lambda *_: None)
    cu_seqlens, ids = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([1, 2, 3, 4, 5, 999_999])
    expected = model.forward_packed(ids[:5], cu_seqlens, 3)
    torch.testing.assert_close(model.forward_packed(ids, cu_seqlens, 3)[:5], expected)  # a dead row may be anything
    torch.testing.assert_close(model.forward_packed(ids[:5].to(torch.int16), cu_seqlens, 3), expected)
    with pytest.raises(ValueError, match=r"input_ids\[1\] is 999, outside the table"):
        model.forward_packed(torch.tensor([1, 999, 3, 4, 5]), cu_seqlens, 3)
    with pytest.raises(ValueError, match=r"position_ids\[4\] is -1, outside the table"):
        model.forward_packed(ids[:5], cu_seqlens, 3, torch.tensor([0, 1, 0, 1, -1]))
    with pytest.raises(ValueError, match=r"input_ids must be integers \[rows\], got torch.float32"):
        model.forward_packed(ids[:5].float(), cu_seqlens, 3)


def test_weights_that_others_hold_too_stay_where_they_are():
    ours, _ = pair()
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    flat = torch.cat([p.detach().flatten() for p in ours.parameters()])
    torch.nn.utils.vector_to_parameters(flat, ours.parameters())
    ours.load_state_dict(state), ours.to("cpu"), ours.eval()
    flat.zero_()
    assert all(not p.any() for p in ours.parameters())

    ours, other = pair()[0], pair()[0]
    for one, two in zip(ours.parameters(), other.parameters(), strict=True):
        two.data = one.data
    other.load_state_dict(state), other.float()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(0.5)
    assert all(torch.equal(*both) for both in zip(ours.parameters(), other.parameters(), strict=True))


def test_what_is_loaded_in_inference_mode_can_be_trained():
    ours, _ = pair()
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    attention_of(ours).k_lin.weight.data = torch.randn(48, 48)  # no longer side by side
    with torch.inference_mode():
        ours.load_state_dict(state)
    check_fresh(ours.to("cpu"))
    ours.train()(*inputs())[0].sum().backward()
    assert attention_of(ours).k_lin.weight.grad.isfinite().all()


def test_a_vocabulary_of_the_same_size_keeps_its_parameter():
    ours, _ = pair()
    words, state = ours.get_input_embeddings().weight, torch.get_rng_state()
    assert ours.resize_token_embeddings(99).weight is words and torch.equal(torch.get_rng_state(), state)


def test_hidden_states_in_the_padding_are_transformers_where_that_is_asked_for():
    ours, theirs = pair()
    ids, mask = inputs()
    with torch.no_grad():
        got = ours(ids, mask, output_hidden_states=True, padding_too=True)
        expected = theirs(ids, attention_mask=mask, output_hidden_states=True)
    for one, other in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)
    assert torch.equal(got.hidden_states[-1], got.last_hidden_state)


class Centred(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.gelu(x - x.mean(-2, keepdim=True))


def test_an_activation_of_somebodys_own_sees_a_batch():
    ours, _ = pair()
    ids, mask = inputs()
    seen = []
    hooked = torch.nn.GELU()
    hooked.register_forward_hook(lambda module, args, out: seen.append(args[0].dim()))
    ours(ids, mask)
    packs = [torch.nn.functional.gelu, torch.nn.GELU("tanh"), transformers.activations.GELUActivation()]
    for activation in packs:
        del ours.transformer.layer[0].ffn.activation  # a function is no child
        ours.transformer.layer[0].ffn.activation = activation
        assert ours._can_pack()
    for activation in (Centred(), hooked):
        ours.transformer.layer[0].ffn.activation = activation
        expected = ours(ids, mask)[0].detach()
        with torch.no_grad():
            torch.testing.assert_close(ours(ids, mask)[0], expected, rtol=0, atol=TOLERANCE)
    assert seen and set(seen) == {3}


@pytest.mark.parametrize("part", ["LayerNorm", "sa_layer_norm"])
def test_a_part_in_another_precision(part):
    """As who keeps LayerNorms in float32 has it: what torch computes so is computed without a gradient, too."""
    model = DistilBertModel(DistilBertConfig(**TINY)).eval().bfloat16()
    for name, module in model.named_modules():
        if name.endswith(part):
            module.float()
    ids, mask = torch.randint(1, 99, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    expected = model(ids, mask)[0].detach()
    with torch.no_grad():
        found = model(ids, mask)[0]
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_query_that_may_attend_to_nothing_by_another_precisions_lowest_number(dtype):
    model = DistilBertModel(DistilBertConfig(**TINY)).eval().to(dtype)
    mask = torch.zeros(2, 1, 5, 5)
    mask[1, 0, 3] = torch.finfo(torch.float32).min
    mask[0, 0, 2, 1:] = torch.finfo(torch.float32).min
    for more in ({}, {"output_attentions": True}):
        assert model(torch.randint(1, 99, (2, 5)), mask, **more)[0].isfinite().all()


def test_packed_call_compiles():
    ours, _ = pair()
    ids, _ = inputs()
    args = ids.flatten(), torch.tensor([0, 3, 20], dtype=torch.int32), ids.shape[1]
    compiled = torch.compile(ours.forward_packed, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args)[:20], ours.forward_packed(*args)[:20])


def test_export_with_a_dynamic_batch():
    ours, _ = pair()
    ids, keep = inputs()
    dims = ({0: torch.export.Dim("batch", min=2, max=64)},) * 2
    for strict in (True, False):
        with torch.no_grad():
            exported = torch.export.export(ours, (ids[:3], keep[:3]), dynamic_shapes=dims, strict=strict).module()
            torch.testing.assert_close(exported(ids, keep).last_hidden_state, ours(ids, keep)[0])


def test_hooked_embeddings_and_reshaped_weights_are_not_fused():
    ours, _ = pair()
    hook = ours.embeddings.word_embeddings.register_forward_hook(lambda module, i, o: o * 0)
    check_fresh(ours)
    hook.remove()
    attention_of(ours).q_lin.weight.data = attention_of(ours).q_lin.weight.data.t() * 20
    check_fresh(ours, expect_fused=False)
    ours, _ = pair()
    attention_of(ours).q_lin.weight.data = attention_of(ours).q_lin.weight.data.t()  # the same address
    check_fresh(ours, expect_fused=False)


def test_vmap_over_weights():
    ours, _ = pair()
    ids, _ = inputs()
    stacked = {k: torch.stack([v, v]) for k, v in ours.state_dict().items()}
    with torch.no_grad():
        call = torch.func.vmap(lambda w: torch.func.functional_call(ours, w, (ids, None))[0])
        torch.testing.assert_close(call(stacked)[1], ours(ids)[0], rtol=0, atol=1e-5)


def test_nan_embeds_in_the_padding_stay_there():
    ours, _ = pair()
    _, keep = inputs()
    embeds = torch.randn(4, 21, 48)
    expected = ours(inputs_embeds=embeds, attention_mask=keep)[0]
    embeds[~keep] = float("nan")
    torch.testing.assert_close(ours(inputs_embeds=embeds, attention_mask=keep)[0], expected)
    with torch.no_grad():
        torch.testing.assert_close(ours(inputs_embeds=embeds.double(), attention_mask=keep)[0], expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, ids: m(ids, torch.ones(2, 2, 4, 4)), ValueError, "4-D attention_mask"),
        (lambda m, ids: m(ids.to(torch.complex64)), ValueError, "integers"),
        (lambda m, ids: m([[1, 2]]), TypeError, "must be a tensor, got list"),
        (lambda m, ids: m(ids, [[1]]), TypeError, "attention_mask must be a tensor"),
        (lambda m, ids: m(inputs_embeds=torch.ones(2, 4, 48).long()), ValueError, "floating point"),
        (lambda m, ids: m.forward_packed(ids[0], torch.tensor([0, 9]).int(), 9), ValueError, "at most the 4 rows"),
        (lambda m, ids: m.forward_packed(ids[0], torch.tensor([0, 3, 2]).int(), 4), ValueError, "must rise from 0"),
        (lambda m, ids: m.forward_packed(ids[0], torch.tensor([0, 4]).int(), 2), ValueError, "a sequence is 4 long"),
        (lambda m, ids: DistilBertModel.from_pretrained("~nobodyhere/x"), OSError, "nobodyhere"),
    ],
)
def test_more_bad_calls(call, error, message):
    ours, _ = pair()
    with pytest.raises(error, match=message):
        call(ours, torch.ones(2, 4).long())
    assert ours(torch.ones(2, 4, dtype=torch.uint8), output_attentions=True)[0].isfinite().all()


@pytest.mark.parametrize("grad", [False, True])
def test_small_integer_positions(grad):
    ours, _ = pair()
    ids, keep = inputs()
    with torch.set_grad_enabled(grad):
        expected = ours(ids, keep, position_ids=torch.arange(21)[None])[0]
        for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
            assert torch.equal(ours(ids, keep, position_ids=torch.arange(21, dtype=dtype)[None])[0], expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, i: m(i, i.to("meta")), ValueError, "attention_mask is on meta, the input on cpu"),
        (lambda m, i: m(i, position_ids=i.to("meta")), ValueError, "position_ids is on meta"),
        (lambda m, i: m(i, head_mask=torch.ones(3, device="meta")), ValueError, "head_mask is on meta"),
        (lambda m, i: m(i, token_type_ids=[0, 1]), TypeError, "token_type_ids must be a tensor, got list"),
        (lambda m, i: m.resize_token_embeddings(10**12), ValueError, "new_num_tokens is 1000000000000"),
        (lambda m, i: m.resize_position_embeddings(10**12), ValueError, "new_num_position_embeddings is 1000000000000"),
        (
            lambda m, i: DistilBertModel.from_pretrained(None, config=m.config, state_dict=5),
            TypeError,
            "state_dict must be a dictionary of tensors, got int",
        ),
        (
            lambda m, i: DistilBertModel.from_pretrained(
                None, config=m.config, state_dict=m.state_dict(), device="mps"
            ),
            ValueError,
            "device 'mps' is not supported; use cpu, cuda",
        ),
    ],
)
def test_more_bad_input_is_named(call, error, message):
    ours, _ = pair()
    with pytest.raises(error, match=message):
        call(ours, torch.ones(2, 4, dtype=torch.int64))


def test_a_patched_forward_and_a_global_hook_are_run():
    """As device-placement libraries attach theirs."""
    ours, _ = pair()
    ids, keep = inputs()
    seen = []
    lin1, q_lin = ours.transformer.layer[0].ffn.lin1, ours.transformer.layer[1].attention.q_lin
    for name, module in (("lin1", lin1), ("q_lin", q_lin)):
        plain = module.forward
        module.forward = lambda x, name=name, plain=plain: (seen.append(name), plain(x))[1]
    with torch.inference_mode():
        expected = ours(ids, keep)[0]
    assert seen == ["lin1", "q_lin"]
    del lin1.forward, q_lin.forward
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out * 2 if module is lin1 else None
    )
    try:
        with torch.inference_mode():
            packed = ours(ids, keep)[0]
        torch.testing.assert_close(packed, ours(ids, keep)[0].detach(), rtol=0, atol=TOLERANCE)
        assert not torch.allclose(packed, expected, atol=1e-3)
    finally:
        handle.remove()


def test_a_hook_before_every_module():
    """It sees what it sees in transformers' model, and what it gives is computed with."""
    ours, theirs = pair()
    ids, keep = inputs()

    def halve(module, args):
        if isinstance(module, torch.nn.Linear):
            seen.append(args[0].shape)
            return (args[0] * 0.5,)

    results = []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(halve)
    try:
        for call in (lambda: ours(ids, keep)[0], lambda: theirs(ids, attention_mask=keep.long())[0]):
            seen = []
            with torch.inference_mode():
                results.append((call()[keep], seen))
    finally:
        handle.remove()
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=TOLERANCE)
    assert len(results[0][1]) == len(results[1][1]) == 6 * len(ours.transformer.layer)


@pytest.mark.parametrize("part", ["attention.q_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2", "sa_layer_norm"])
def test_a_patched_forward_that_looks_along_the_text(part):
    ours, theirs = pair()
    ids, keep = inputs()
    for model in (ours, theirs):
        module = model.transformer.layer[0].get_submodule(part)
        module.forward = lambda x, plain=module.forward: plain(x) + 0.5 * plain(x)[:, :1]
    with torch.inference_mode():
        found, expected = ours(ids, keep)[0], theirs(ids, attention_mask=keep.long())[0]
    torch.testing.assert_close(found[keep], expected[keep], rtol=0, atol=TOLERANCE)


def test_weights_of_several_dtypes_are_not_laid_side_by_side():
    linears = [torch.nn.Linear(8, 8, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.float32)]
    before = [(one.weight.data_ptr(), one.weight.clone()) for one in linears]
    assert side_by_side.lay(linears) is None
    for one, (place, weight) in zip(linears, before, strict=True):
        assert one.weight.data_ptr() == place and torch.equal(one.weight, weight)
    assert side_by_side.lay([torch.nn.Linear(8, 8) for _ in range(3)]) is not None


# --- programs that others have ----------------------------------------------------------------------------------------


class AddsTheFirst(torch.nn.Module):
    """Looks at another token, in what stands for a Linear or a LayerNorm."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        y = self.inner(x)
        return y + 0.5 * y[:, :1]


LEAVES = [
    *(f"attention.{name}" for name in ("q_lin", "k_lin", "v_lin", "out_lin")),
    *("ffn.lin1", "ffn.lin2", "sa_layer_norm", "output_layer_norm"),
]


@pytest.mark.parametrize("live", [False, True], ids=["ours", "live"])
@pytest.mark.parametrize("place", LEAVES)
def test_a_part_of_somebodys_own_sees_whole_texts(place, live):
    ours, theirs = pair()
    ids, keep = inputs()
    owner, _, name = f"transformer.layer.1.{place}".rpartition(".")
    for model in (ours, theirs):
        part = model.get_submodule(owner)
        setattr(part, name, AddsTheFirst(getattr(part, name)))
    with torch.inference_mode():
        expected = theirs(ids, attention_mask=keep.long())[0]
        if live:
            ours = fastdistil.accelerate(theirs)
        got = ours(ids, attention_mask=keep.long())[0]
    torch.testing.assert_close(got[keep], expected[keep], rtol=0, atol=TOLERANCE)


def test_a_part_with_a_hook_that_is_put_in_between_two_calls_sees_whole_texts():
    ours, _ = pair()
    ids, keep = inputs()
    linear, seen = torch.nn.Linear(48, 80), []
    linear.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    with torch.inference_mode():
        ours(ids, keep)
        ours.transformer.layer[1].ffn.lin1 = linear
        ours(ids, keep)
    assert seen == [(4, 21, 48)]


def test_weights_that_were_loaded_stay(tmp_path):
    """Whatever a class of somebody's own ends its constructor with."""
    pair(seed=5)[0].save_pretrained(tmp_path)

    class Own(fastdistil.DistilBertForSequenceClassification):
        def __init__(self, config, last):
            super().__init__(config)
            self.distilbert = DistilBertModel.from_pretrained(tmp_path)
            self.teacher = DistilBertModel.from_pretrained(tmp_path)
            self.extra = torch.nn.Linear(config.dim, 500)
            getattr(self, last)()

    expected = DistilBertModel.from_pretrained(tmp_path).state_dict()
    for last in ("init_weights", "post_init"):
        model = Own(DistilBertConfig(**TINY), last)
        for part in (model.distilbert, model.teacher):
            assert all(torch.equal(tensor, expected[name]) for name, tensor in part.state_dict().items())
        assert (model.extra.bias == 0).all() and model.extra.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    "name", ["SequenceClassification", "MultipleChoice", "TokenClassification", "QuestionAnswering", "MaskedLM"]
)
def test_a_new_head_on_a_checkpoint_has_the_values_of_the_seed(name, tmp_path):
    pair(seed=5)[0].save_pretrained(tmp_path)
    states, after = [], []
    for library in (fastdistil, transformers):
        torch.manual_seed(7)
        states.append(getattr(library, f"DistilBertFor{name}").from_pretrained(tmp_path).state_dict())
        after.append(torch.rand(3))
    ours, theirs = states
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(*after)


def test_a_mask_that_is_alike_for_all_queries():
    ours, theirs = pair(attn="sdpa")
    ids, keep = inputs()
    for mask in (keep[:, None, None], torch.zeros(4, 1, 1, 21).masked_fill(~keep[:, None, None], torch.finfo().min)):
        with torch.inference_mode():
            got, expected = ours(ids, attention_mask=mask)[0], theirs(ids, attention_mask=mask)[0]
        torch.testing.assert_close(got[keep], expected[keep], rtol=0, atol=TOLERANCE)


def test_parts_are_called_by_transformers_names():
    ours, theirs = pair()
    x = torch.randn(2, 7, 48)
    with torch.no_grad():
        for given in ({"hidden_states": x}, {"hidden_states": x, "attention_mask": None}):
            got, expected = ours.transformer(**given), theirs.transformer(**given)
            torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state, rtol=0, atol=TOLERANCE)
            one, other = ours.transformer.layer[0](**given), theirs.transformer.layer[0](**given)
            torch.testing.assert_close(one, other[0] if isinstance(other, tuple) else other, rtol=0, atol=TOLERANCE)
        assert torch.equal(got[0], got.last_hidden_state) and len(got.hidden_states) == 3


@pytest.mark.parametrize("how", ["config", "float32", "bfloat16", "int8", "head"])
def test_a_model_that_was_loaded_serves_forked_processes(how, tmp_path):
    """As servers do that load before they fork: nothing may have started OpenMP's threads, which the child lacks."""
    sizes = dict(TINY, vocab_size=3_000, dim=256, n_heads=4, hidden_dim=1_024)
    fastdistil.DistilBertForTokenClassification(DistilBertConfig(**sizes)).save_pretrained(tmp_path)
    made = {
        "config": f"fastdistil.DistilBertModel(fastdistil.DistilBertConfig(**{sizes!r})).eval()",
        "head": f"fastdistil.DistilBertForTokenClassification.from_pretrained({str(tmp_path)!r})",
    }.get(how, f"fastdistil.DistilBertModel.from_pretrained({str(tmp_path)!r}, dtype={how!r})")
    code = f"""
import os, signal, torch, fastdistil
torch.set_num_threads(2)
model = {made}
if (child := os.fork()) == 0:
    signal.alarm(30)
    with torch.inference_mode():
        model(torch.randint(1, 3000, (8, 39)))
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_compiled_model_takes_what_comes_with_a_later_call():
    """Sizes that changed are symbols by then, those of what is new are numbers."""
    torch._dynamo.reset()
    ours, _ = pair()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    ids, keep = inputs()
    whole = keep[:, None, None].expand(4, 1, 21, 21)
    calls = [
        dict(input_ids=ids[:2, :5]),
        dict(input_ids=ids, attention_mask=keep),
        dict(input_ids=ids, attention_mask=keep[:1]),
        dict(input_ids=ids, position_ids=torch.arange(21).flip(0)[None]),
        dict(input_ids=ids, token_type_ids=torch.zeros_like(ids)),
        dict(inputs_embeds=torch.randn(4, 21, 48), attention_mask=keep),
        dict(input_ids=ids, attention_mask=whole),
        dict(input_ids=ids, head_mask=torch.ones(2, 3)),
    ]
    with torch.no_grad():
        for call in calls:
            torch.testing.assert_close(compiled(**call)[0], ours(**call)[0])
    torch._dynamo.reset()


# --- what hardly anybody asks for -------------------------------------------------------------------------------------


def test_a_watched_model_keeps_its_adapter():
    model, _ = pair(initializer_range=0.2)
    model.add_adapter("a", "lora")
    model.set_active_adapters("a")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "loras" in name:
                p.normal_()
    ids, cu_seqlens = torch.randint(1, 99, (9,)), torch.tensor([0, 5, 9], dtype=torch.int32)
    with torch.inference_mode():
        plain = model.forward_packed(ids, cu_seqlens, 5)
        seen = []
        model.transformer.layer[0].register_forward_hook(lambda *a: seen.append(1))
        close(model.forward_packed(ids, cu_seqlens, 5), plain)
        model.set_active_adapters(None)
        assert seen and not torch.allclose(model.forward_packed(ids, cu_seqlens, 5), plain, atol=1e-2)


def test_hidden_states_that_the_configuration_asks_for():
    model, _ = pair(output_hidden_states=True)
    with torch.inference_mode():
        assert len(model(inputs()[0]).hidden_states) == 3
        assert model(inputs()[0], output_hidden_states=False).hidden_states is None


def test_a_scaling_of_ones_own_step_by_step():
    ids, keep = inputs()
    model, _ = pair(initializer_range=0.2)
    with torch.no_grad():
        usual = model(ids, keep)[0]
        for block in model.transformer.layer:
            block.attention.scaling *= 3
        fused, stepped = model(ids, keep)[0], model(ids, keep, output_attentions=True)[0]
        close(fused, stepped)
        assert not torch.allclose(fused, usual, atol=1e-3)


def test_the_projection_passes_a_gradient_on():
    attention = pair()[0].transformer.layer[0].attention
    attention.project(torch.randn(5, 48), None).sum().backward()
    for part in (attention.q_lin, attention.k_lin, attention.v_lin):
        assert part.weight.grad is not None and part.bias.grad is not None


def test_a_watched_activation_is_called():
    ffn, seen = pair()[0].transformer.layer[0].ffn, []
    ffn.activation.register_forward_hook(lambda module, args, out: seen.append(out.shape) or out * 2)
    x = torch.randn(5, 48)
    with torch.inference_mode():
        close(ffn.lin2(ffn.hidden(x, None)), ffn(x))
    assert seen == [(5, 80)] * 2


@pytest.mark.parametrize("table", ["word_embeddings", "position_embeddings"])
def test_a_table_that_is_watched_before_its_call(table):
    model, theirs = pair()
    for one in (model, theirs):
        getattr(one.embeddings, table).register_forward_pre_hook(lambda module, args: (args[0] * 0 + 3,))
    ids, keep = inputs()
    with torch.inference_mode():
        close(model(ids, keep)[0], theirs(ids, attention_mask=keep.long())[0], keep)


def test_new_rows_are_drawn_with_the_old_rows_covariance():
    torch.manual_seed(0)
    rows = torch.randn(400, 6) @ torch.randn(6, 6)
    drawn = mean_rows(rows, 200_000) - rows.mean(0)
    found, wanted = drawn.T.cov() * 1e9, (rows - rows.mean(0)).T.cov(correction=0)
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05 * float(wanted.abs().max()))


def test_missing_sinusoidal_positions_are_computed(tmp_path):
    model = DistilBertModel(DistilBertConfig(**TINY, sinusoidal_pos_embds=True))
    state = {k: v for k, v in model.state_dict().items() if "position_embeddings" not in k}
    found = DistilBertModel.from_pretrained(None, config=model.config, state_dict=state)
    assert torch.equal(found.embeddings.position_embeddings.weight, sinusoidal_positions(40, 48))


def test_a_padding_token_counted_from_the_end():
    assert DistilBertModel(DistilBertConfig(**TINY, pad_token_id=-1)).embeddings.word_embeddings.padding_idx == 98


def test_a_column_before_the_first_is_none():
    model = fastdistil.DistilBertForMaskedLM(DistilBertConfig(**TINY)).eval()
    for at in ([1, -1], [-1, 1], [1, 5], [3, 0]):
        with pytest.raises(ValueError, match=r"positions hold \(-?\d, -?\d\), outside the batch of \[3, 5\]"):
            model(torch.ones(3, 5, dtype=torch.long), logits_at=torch.tensor([at]))


def test_dead_rows_behind_the_longest_text():
    model, _ = pair()
    ids, cu_seqlens = torch.randint(1, 99, (60,)), torch.tensor([0, 4, 44], dtype=torch.int32)
    with torch.inference_mode():
        found = model.forward_packed(ids, cu_seqlens, 40)
        close(found[:44], model.forward_packed(ids[:44], cu_seqlens, 40))


def test_ids_of_no_token_in_padding_that_is_asked_for():
    model, _ = pair()
    ids, keep = inputs()
    with torch.inference_mode():
        whole = model(ids.where(keep, 0), keep, padding_too=True)[0]
        for wrong in (-1, 99, 10**6):
            close(model(ids.where(keep, wrong), keep, padding_too=True)[0], whole)


def test_no_layers_at_all():
    model = DistilBertModel(DistilBertConfig(**(TINY | {"n_layers": 0}))).eval()
    ids, cu_seqlens = torch.randint(1, 99, (9,)), torch.tensor([0, 5, 9], dtype=torch.int32)
    with torch.inference_mode():
        whole = model.forward_packed(ids, cu_seqlens, 5)
        close(model.forward_packed(ids, cu_seqlens, 5, only=torch.tensor([8, 0])), whole[[8, 0]])


def test_checkpointing_that_is_switched_off():
    model, _ = pair()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing and model.transformer.gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing and not model.transformer.gradient_checkpointing


def test_which_device_a_map_names():
    here = "cuda" if torch.cuda.is_available() else "cpu"
    for name in ("auto", "balanced", "sequential"):
        assert one_device(name) == here
    assert one_device({"": "cpu"}) == "cpu" and one_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="spreads a model over devices"):
        one_device({"a": 0, "b": 1})


def test_a_device_is_more_than_a_map(tmp_path):
    model, _ = pair()
    model.save_pretrained(tmp_path)
    found = DistilBertModel.from_pretrained(tmp_path, device="cpu", device_map={"a": 0, "b": 1})
    assert found.device.type == "cpu"
