"""Live transformers models, accelerated in place."""

import copy
import io
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch

import fastdistil
from fastdistil import accelerate, cpu, restore
from fastdistil.integrations import attention, live

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
SIZES = {
    "distilbert": dict(vocab_size=60, dim=24, n_heads=2, hidden_dim=32, n_layers=2, max_position_embeddings=20),
    "bert": dict(
        vocab_size=60, hidden_size=24, num_attention_heads=2, intermediate_size=32, num_hidden_layers=2,
        max_position_embeddings=20,
    ),
}  # fmt: skip
NAMES = [
    "DistilBertModel",
    "DistilBertForMaskedLM",
    "DistilBertForSequenceClassification",
    "DistilBertForTokenClassification",
    "DistilBertForQuestionAnswering",
    "BertModel",
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "BertForNextSentencePrediction",
]


def make(name, **changes):
    kind = "distilbert" if name.startswith("Distil") else "bert"
    config = getattr(transformers, "DistilBertConfig" if kind == "distilbert" else "BertConfig")
    torch.manual_seed(0)
    model = getattr(transformers, name)(config(**(SIZES[kind] | changes))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def inputs(name, batch=3, length=9):
    keep = torch.arange(length) < torch.tensor([length, 4, 1])[:batch, None]
    given = {"input_ids": torch.randint(1, 60, (batch, length)), "attention_mask": keep.long()}
    if name.startswith("Bert"):
        given["token_type_ids"] = (torch.arange(length) >= 2).long().expand(batch, -1).contiguous()
    return given, keep


def same(ours, theirs, keep, tolerance=TOLERANCE):
    assert type(ours) is type(theirs) and list(ours.keys()) == list(theirs.keys())
    for a, b in zip(ours.to_tuple(), theirs.to_tuple(), strict=True):
        for x, y in zip(*((t if isinstance(t, tuple) else (t,)) for t in (a, b)), strict=True):
            x, y = (x[keep], y[keep]) if x.shape[:2] == keep.shape else (x, y)
            torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


@pytest.fixture
def packed(monkeypatch):
    """How often packed attention ran on CPU, by the op or without it."""
    calls, real = [], cpu.attend

    def count(*args):
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(cpu, "attend", count)
    return calls


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("states", [False, True])
def test_same_call_same_result(name, states, packed):
    model = make(name)
    given, keep = inputs(name)
    given["output_hidden_states"] = states
    names, types = list(model.state_dict()), type(model).__name__
    with torch.inference_mode():
        expected, without_mask = model(**given), model(given["input_ids"])
        assert accelerate(model) is model and accelerate(model) is model
        same(model(**given), expected, keep)
        assert len(packed) == 2
        same(model(given["input_ids"]), without_mask, torch.ones_like(keep))
        as_tuple = model(**given, return_dict=False)
        assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], model(**given)[0])
    assert list(model.state_dict()) == names and type(model).__name__ == types
    ran = len(packed)
    assert restore(model) is model and restore(model) is model
    with torch.inference_mode():
        same(model(**given), expected, keep, 0)
    assert len(packed) == ran


def test_positions_embeddings_and_two_segments():
    for name in ("DistilBertModel", "BertModel"):
        model = make(name)
        given, keep = inputs(name)
        ids = given.pop("input_ids")
        given["position_ids"] = torch.arange(9).flip(0)[None]
        with torch.inference_mode():
            embeds = model.get_input_embeddings()(ids)
            expected, by_ids = model(inputs_embeds=embeds, **given), model(ids, **given)
            accelerate(model)
            same(model(inputs_embeds=embeds, **given), expected, keep)
            same(model(ids, **given), by_ids, keep)


@pytest.mark.parametrize("name", ["DistilBertForTokenClassification", "BertForTokenClassification"])
def test_training_gradients_and_attentions_are_transformers_own(name, packed):
    model = make(name)
    model.set_attn_implementation("eager")
    other = copy.deepcopy(model)
    accelerate(model)
    given, keep = inputs(name)
    labels = torch.randint(0, 2, keep.shape)
    for m in (model, other):
        m.train()
        torch.manual_seed(1)
        m(**given, labels=labels).loss.backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.equal(a.grad, b.grad))
    model.eval(), other.eval()
    with torch.inference_mode():
        found, expected = (m(**given, output_attentions=True) for m in (model, other))
        same(found, expected, keep, 0)
        four = {**given, "attention_mask": torch.ones(3, 1, 9, 9, dtype=torch.bool)}
        assert torch.equal(model(**four).logits, other(**four).logits)
    assert not packed
    with torch.inference_mode():
        same(model(**given), other(**given), keep)
    assert len(packed) == 2, "one call with attentions must not end the fast path"


def test_changed_weights_are_seen():
    model, given_keep = accelerate(make("BertModel")), inputs("BertModel")
    given, keep = given_keep
    plain = make("BertModel")

    def check():
        plain.load_state_dict(model.state_dict())
        with torch.inference_mode():
            same(model(**given), plain.to(model.dtype)(**given), keep)

    check()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(**given)[0].square().sum().backward()
    optimizer.step()
    check()
    with torch.no_grad():
        model.encoder.layer[0].attention.self.query.weight.data.add_(0.1)
        model.encoder.layer[1].attention.self.value.weight.data = torch.randn(24, 24)
    check()
    model.load_state_dict(
        {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    )
    check()
    model.load_state_dict({k: v.clone() for k, v in make("BertModel").state_dict().items()}, assign=True)
    check()
    model.encoder.layer[0].attention.output.dense = torch.nn.Linear(24, 24)
    check()
    model.double(), plain.double()
    check()


def test_copies_and_pickles_are_independent(packed, tmp_path):
    model = accelerate(make("DistilBertForSequenceClassification"))
    given, _ = inputs("DistilBertForSequenceClassification")
    with torch.inference_mode():
        expected = model(**given).logits
        clones = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        clones.append(torch.load(file, weights_only=False))
        for clone in clones:
            packed.clear()
            assert torch.equal(clone(**given).logits, expected) and len(packed) == 2
            torch.nn.init.zeros_(clone.classifier.weight)
            torch.nn.init.normal_(clone.distilbert.transformer.layer[0].attention.q_lin.weight)
            assert torch.equal(model(**given).logits, expected), "the original must not change"
            assert not torch.equal(clone(**given).logits, expected), "the copy must"
        model.save_pretrained(tmp_path)
        back = type(model).from_pretrained(tmp_path)
        assert type(back.distilbert) is transformers.DistilBertModel and back.config.architectures == [
            type(model).__name__
        ]
        torch.testing.assert_close(back(**given).logits, expected, rtol=0, atol=TOLERANCE)
    base = accelerate(make("DistilBertModel"))
    base.save_pretrained(tmp_path / "base")
    assert transformers.AutoModel.from_pretrained(tmp_path / "base").config.architectures == ["DistilBertModel"]


def test_only_that_instance_changes():
    one, two = make("DistilBertModel"), make("DistilBertModel")
    accelerate(one)
    assert type(two) is transformers.DistilBertModel and isinstance(one, transformers.DistilBertModel)
    assert type(make("DistilBertModel")) is transformers.DistilBertModel


def test_a_hook_on_an_inner_module_is_run(packed):
    model = accelerate(make("DistilBertModel"))
    given, _ = inputs("DistilBertModel")
    seen = []
    handle = model.transformer.layer[0].register_forward_hook(lambda *a: seen.append(1))
    leaf = model.transformer.layer[1].ffn.lin1.register_forward_hook(lambda *a: seen.append(2))
    with torch.inference_mode():
        model(**given)
        assert seen == [1, 2] and not packed
        handle.remove()
        model(**given)
        assert seen == [1, 2, 2] and not packed
        leaf.remove()
        model(**given)
    assert seen == [1, 2, 2] and len(packed) == 2


def _tanh(model, inside):
    inside["ffn"].__dict__["_modules"][inside["activation"]] = torch.nn.Tanh()


def _patch(part):
    def patch(model, inside):
        plain = inside[part].forward
        inside[part].forward = lambda x, *args, **kwargs: plain(x * 2, *args, **kwargs)

    return patch


def _subclass(model, inside):
    kind = type(inside["ffn"])
    inside["ffn"].__class__ = type("Mine", (kind,), {"forward": lambda self, *args: kind.forward(self, *args) * 2})


class Doubled(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, *args, **kwargs):
        return self.block(x * 2, *args, **kwargs)


def _wrap(model, inside):
    inside["layers"][0] = Doubled(inside["layers"][0])


def _shorten(model, inside):
    inside["owner"].layer = inside["layers"][:1]


def _renorm(model, inside):
    model.get_input_embeddings().max_norm = 0.5


def _scale(model, inside):
    inside["ffn" if hasattr(inside["ffn"], "dropout") else "attention_out"].dropout = Doubled(torch.nn.Identity())


CHANGES = {
    "another module for dropout": _scale,
    "another activation": _tanh,
    "a patched network": _patch("ffn"),
    "a patched attention": _patch("attention"),
    "a subclass": _subclass,
    "a wrapped layer": _wrap,
    "fewer layers": _shorten,
    "embeddings of bounded norm": _renorm,
}


@pytest.mark.parametrize("name", ["DistilBertModel", "BertModel"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_inside_holds(change, name):
    given, keep = inputs(name)
    plain, fast = make(name), accelerate(make(name))
    with torch.inference_mode():
        before = fast(**given)[0]
        for model in (plain, fast):
            owner = model.encoder if name == "BertModel" else model.transformer
            block = owner.layer[1]
            ffn, activation = (
                (block.intermediate, "intermediate_act_fn") if name == "BertModel" else (block.ffn, "activation")
            )
            out = block.attention.output if name == "BertModel" else None
            inside = {
                "attention_out": out,
                "owner": owner,
                "layers": owner.layer,
                "ffn": ffn,
                "attention": block.attention,
            }
            change(model, inside | {"activation": activation})
        same(fast(**given), plain(**given), keep)
        assert not torch.allclose(fast(**given)[0][keep], before[keep], atol=1e-3)


@pytest.mark.parametrize("kind", ["DistilBert", "Bert"])
@pytest.mark.parametrize("head", ["QuestionAnswering", "MaskedLM", "TokenClassification"])
def test_a_loss_that_reads_padding(kind, head, packed):
    name = f"{kind}For{head}"
    plain, fast = make(name), accelerate(make(name))
    given, keep = inputs(name)
    labels = {"labels": torch.randint(0, 2, (3, 9))}
    if head == "QuestionAnswering":
        labels = {"start_positions": torch.tensor([1, 2, 0]), "end_positions": torch.tensor([5, 2, 0])}
    for model in (plain, fast):
        model.base_model.requires_grad_(False)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(
                fast(**given, **labels).loss, plain(**given, **labels).loss, rtol=0, atol=TOLERANCE
            )
    assert not packed
    copied = copy.deepcopy(fast)
    with torch.inference_mode():
        same(copied(**given), plain(**given), keep)
        assert packed
        torch.testing.assert_close(
            copied(**given, **labels).loss, plain(**given, **labels).loss, rtol=0, atol=TOLERANCE
        )
    assert not restore(fast)._forward_pre_hooks and pickle.loads(pickle.dumps(copied))._forward_pre_hooks


def test_dropout_that_is_left_on_drops():
    model = accelerate(make("BertModel"))
    given, _ = inputs("BertModel")
    with torch.inference_mode():
        assert torch.equal(model(**given)[0], model(**given)[0])
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.train()
        assert not torch.allclose(model(**given)[0], model(**given)[0], atol=1e-2)


@pytest.mark.parametrize("name", ["DistilBertForSequenceClassification", "BertForSequenceClassification"])
def test_a_head_finds_the_first_real_token_behind_padding(name):
    model = make(name)
    given, _ = inputs(name)
    ids = given["input_ids"]
    left = torch.ones(3, 9, dtype=torch.long)
    left[1:, :2] = 0
    with torch.inference_mode():
        places = (left.cumsum(1) - 1).clamp(min=0)
        expected = torch.cat([model(ids[:1]).logits, model(ids[1:, 2:]).logits])
        got = accelerate(model)(ids, attention_mask=left, position_ids=places).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("holder", ["state dict", "flat buffer"])
def test_weights_that_others_hold_stay_where_they_are(holder):
    model, given = make("BertModel"), inputs("BertModel")[0]
    held = model.state_dict() if holder == "state dict" else torch.nn.utils.parameters_to_vector(model.parameters())
    if holder == "flat buffer":
        torch.nn.utils.vector_to_parameters(held, model.parameters())
    accelerate(model)
    with torch.inference_mode():
        model(**given)
    with torch.no_grad():
        projections = [held[name] for name in held if "attention.self" in name] if holder == "state dict" else [held]
        for tensor in projections:
            tensor.mul_(1.5)
    with torch.inference_mode():
        got = model(**given)[0]
        torch.testing.assert_close(got, restore(model)(**given)[0] * (got != 0), rtol=0, atol=TOLERANCE)
        assert not torch.allclose(got, make("BertModel")(**given)[0] * (got != 0), atol=1e-2)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@torch.inference_mode()
def test_a_list_of_layers_is_transformers_own(packed):
    model, (given, _) = accelerate(make("DistilBertModel")), inputs("DistilBertModel")
    model(**given, output_hidden_states=[0, 1])
    assert not packed


@torch.inference_mode()
def test_copies_and_replicas_compute_with_their_own_weights():
    """Those of a compiled model, and DataParallel's, which are shallow copies."""
    model, (given, keep) = accelerate(make("DistilBertModel")), inputs("DistilBertModel")
    model(**given)
    model.compile()  # compiles at the first call, which there is none of here
    copied = copy.deepcopy(model)
    model._compiled_call_impl = None
    replica = model._replicate_for_data_parallel()
    for name, part in list(replica._modules.items()):
        replica._modules[name] = copy.deepcopy(part)
    for other in (copied, replica):
        for p in other.parameters():
            p.zero_()
        assert not other(**given).last_hidden_state.any() and model(**given).last_hidden_state[keep].any()
    ours = fastdistil.DistilBertModel(fastdistil.DistilBertConfig(vocab_size=60, dim=24, n_heads=2, hidden_dim=32))
    attention = ours.transformer.layer[0].attention
    attention.compile()
    assert copy.deepcopy(ours).transformer.layer[0].attention.__dict__.get("_compiled_call_impl") is None


@pytest.mark.parametrize("name", ["DistilBertModel", "BertModel"])
def test_a_text_without_positions_is_transformers_error(name):
    model = make(name)
    ids = torch.ones(1, model.config.max_position_embeddings + 1, dtype=torch.long)
    found = []
    for call in (model, accelerate(model)):
        with pytest.raises((RuntimeError, IndexError)) as caught, torch.inference_mode():
            call(ids)
        found.append((type(caught.value), str(caught.value)))
    assert found[0] == found[1]


def test_weights_are_moved_while_no_other_thread_computes(monkeypatch):
    """Its products would read memory that is freed."""
    model = accelerate(make("DistilBertModel"))
    (given, keep), busy, go_on = inputs("DistilBertModel"), threading.Event(), threading.Event()
    parts = [p for layer in model.transformer.layer for p in layer.attention.q_lin.parameters()]
    before, plain = [p.data_ptr() for p in parts], model.plain.forward

    def slow(self, *args, **kwargs):
        busy.set()
        assert go_on.wait(60)
        return plain(self, *args, **kwargs)

    def call(**options):
        with torch.inference_mode():
            return model(**given, **options).last_hidden_state

    monkeypatch.setattr(model.plain, "forward", slow)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(call, output_attentions=True)  # transformers' own code
        assert busy.wait(60)
        meanwhile = call()
        assert [p.data_ptr() for p in parts] == before
        go_on.set()
        theirs = other.result()
    alone = call()
    assert all(p.data_ptr() != address for p, address in zip(parts, before, strict=True))
    for found in (meanwhile, alone):
        torch.testing.assert_close(found[keep], theirs[keep])
    assert live._running[model] == 0


def test_a_model_that_is_restored_during_calls_counts_them():
    model, (given, _) = accelerate(make("DistilBertModel")), inputs("DistilBertModel")
    with model._entered(given), model._entered(given):
        restore(model)
    accelerate(model)
    assert live._running[model] == 0


class Calls(torch.nn.Module):
    """A parametrization that calls a model."""

    def __init__(self, call):
        super().__init__()
        self.call = [call]

    def forward(self, weight):
        self.call[0]()
        return weight * 1


def test_a_call_from_within_another():
    """From a parametrization, which reading a weight runs, and from a signal's handler, at any moment."""
    code = """
import signal, torch, transformers, fastdistil
from fastdistil.integrations import live
torch.set_num_threads(1)
config = transformers.DistilBertConfig(vocab_size=50, dim=16, n_heads=2, hidden_dim=8, n_layers=1)
model = fastdistil.accelerate(transformers.DistilBertModel(config).eval().requires_grad_(False))
ids, seen = torch.ones(1, 3, dtype=torch.long), []
def handler(*_):
    seen.append(model(ids)); signal.setitimer(signal.ITIMER_REAL, .003)
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, .003)
while len(seen) < 300: model(ids)
signal.setitimer(signal.ITIMER_REAL, 0)
print(live._running[model])
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "0\n", done.stderr
    inner, outer, (given, keep) = make("DistilBertModel"), make("DistilBertModel"), inputs("DistilBertModel")
    with torch.inference_mode():
        expected = inner(**given).last_hidden_state
        accelerate(inner)
        linear = outer.transformer.layer[0].attention.q_lin
        torch.nn.utils.parametrize.register_parametrization(linear, "weight", Calls(lambda: inner(**given)))
        torch.testing.assert_close(accelerate(outer)(**given).last_hidden_state[keep], expected[keep])


def test_a_forked_process_is_not_kept_waiting():
    """By a lock that a thread of its parent held."""
    code = """
import os, threading, torch, transformers, fastdistil
from fastdistil.integrations import live
torch.set_num_threads(1)
config = transformers.DistilBertConfig(vocab_size=50, dim=16, n_heads=2, hidden_dim=8, n_layers=1)
model = fastdistil.accelerate(transformers.DistilBertModel(config).eval())
held, done = threading.Event(), threading.Event()
def hold():
    with live._entry:
        live._running[model] = 1  # a call of the parent's
        held.set(); done.wait()
thread = threading.Thread(target=hold); thread.start(); held.wait()
child = os.fork()
if child == 0:
    with torch.no_grad(): model(torch.ones(1, 3, dtype=torch.long))
    os._exit(live._running[model])
done.set()
print(os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "0\n", done.stderr


def test_a_trace_takes_other_masks():
    for name in ("BertModel", "DistilBertModel"):
        model, (given, keep) = make(name), inputs(name)
        ids, mask = given["input_ids"], given["attention_mask"]
        ours = fastdistil.DistilBertModel(fastdistil.DistilBertConfig(**SIZES["distilbert"])).eval()
        with torch.no_grad():
            for traced in (accelerate(model), ours):

                class Tuple(torch.nn.Module):
                    def __init__(self, inner):
                        super().__init__()
                        self.inner = inner

                    def forward(self, ids, mask):
                        return self.inner(ids, attention_mask=mask)[0]

                trace = torch.jit.trace(Tuple(traced), (ids, torch.ones_like(mask)))
                torch.testing.assert_close(
                    trace(ids, mask)[keep], traced(ids, attention_mask=mask)[0][keep], rtol=0, atol=TOLERANCE
                )


def test_the_signature_is_transformers():
    import inspect

    for name in ("BertModel", "DistilBertModel"):
        plain, fast = make(name), accelerate(make(name))
        assert inspect.signature(fast.forward) == inspect.signature(plain.forward)


def test_norms_of_another_precision():
    model, (given, keep) = make("BertModel").to(torch.bfloat16), inputs("BertModel")
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.float()
    with torch.inference_mode():
        expected = model(**given)[0]
        got = accelerate(model)(**given)[0]
    assert got.dtype is expected.dtype
    torch.testing.assert_close(got[keep], expected[keep], rtol=0, atol=5e-2)


def test_a_wrapped_linear_is_called(packed):
    """As low-rank fine-tuning libraries wrap theirs; what somebody else puts there may look at other tokens."""

    class Wrapped(torch.nn.Module):
        __module__ = "peft.tuners.lora.layer"

        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) * 1.5

    for name in ("DistilBertModel", "BertModel"):
        model, given_keep = make(name), inputs(name)
        given, keep = given_keep
        if name == "BertModel":
            layer = model.encoder.layer[1]
            places = (layer.attention.self, "query"), (layer.attention.output, "dense"), (layer.output, "dense")
        else:
            layer = model.transformer.layer[1]
            places = (layer.attention, "v_lin"), (layer.attention, "out_lin"), (layer.ffn, "lin1")
        for owner, part in places:
            setattr(owner, part, Wrapped(getattr(owner, part)))
        packed.clear()
        with torch.inference_mode():
            expected = model(**given)
            same(accelerate(model)(**given), expected, keep)
        assert len(packed) == 2


def test_a_sentence_transformer(minilm, packed):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(minilm), device="cpu")
    texts = ["a cat", "a much longer text about something else entirely", ""]
    expected = model.encode(texts)
    assert accelerate(model) is model
    assert ((model.encode(texts) * expected).sum(1) > 0.999999).all() and packed


def test_what_cannot_be_accelerated():
    with pytest.raises(TypeError, match="Linear holds no transformers DistilBertModel or BertModel"):
        accelerate(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="activation 'tanh' is not supported"):
        accelerate(make("DistilBertModel", activation="tanh"))
    with pytest.raises(ValueError, match="a decoder is not supported"):
        accelerate(make("BertModel", is_decoder=True))
    model = accelerate(make("DistilBertModel"))
    ids = torch.ones(1, 3).long()
    with torch.inference_mode():  # transformers leaves what is too long out
        torch.testing.assert_close(model(ids, torch.ones(1, 4))[0], model(ids)[0], rtol=0, atol=TOLERANCE)
    with torch.inference_mode(), pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()


def test_fastdistil_imports_without_transformers():
    import subprocess
    import sys

    code = "import sys, fastdistil; assert 'transformers' not in sys.modules; fastdistil.accelerate"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert fastdistil.restore is restore


TINY = dict(vocab_size=60, hidden_size=24, num_attention_heads=2, intermediate_size=32, num_hidden_layers=2)
ANY = {
    "Bert": TINY | {"max_position_embeddings": 20},
    "Roberta": TINY | {"max_position_embeddings": 24, "pad_token_id": 1},
    "DistilBert": SIZES["distilbert"],
    "ModernBert": TINY
    | {"max_position_embeddings": 20, "global_attn_every_n_layers": 2, "local_attention": 4, "pad_token_id": 0},
    "Llama": TINY | {"max_position_embeddings": 20, "num_key_value_heads": 1},
    "GPT2": dict(vocab_size=60, n_embd=24, n_head=2, n_layer=2, n_positions=20),
    "Gemma2": TINY
    | {
        "max_position_embeddings": 20,
        "sliding_window": 4,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "attn_logit_softcapping": 0.5,
    },
    "GptOss": TINY
    | {
        "max_position_embeddings": 20,
        "sliding_window": 4,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
    "Mistral": TINY | {"max_position_embeddings": 20, "sliding_window": 4, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("kind", ANY)
def test_the_attention_of_any_model(kind, packed):
    name = fastdistil.integrations.register_attention()
    torch.manual_seed(0)
    extra = {"reference_compile": False} if kind == "ModernBert" else {}
    config = getattr(transformers, f"{kind}Config")(**ANY[kind], **extra, attention_dropout=0.0)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    ids = torch.randint(2, 60, (3, 9))
    keep = torch.arange(9) < torch.tensor([9, 4, 1])[:, None]
    found = {}
    for implementation in ("eager", name):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        with torch.inference_mode():
            masked, plain = model(ids, attention_mask=keep.long())[0][keep], model(ids)[0]
        trained = model(ids, attention_mask=keep.long())[0][keep]
        trained.square().mean().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found[implementation] = [masked, plain, trained.detach(), *gradients]
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    assert bool(packed) is (kind not in ("Llama", "GPT2", "Mistral", "Gemma2", "GptOss"))


def test_cross_attention_to_as_many_tokens():
    """Whose mask tells about the other sequence's tokens and not about the queries."""
    name = fastdistil.integrations.register_attention()
    torch.manual_seed(0)
    config = transformers.BertConfig(**ANY["Bert"], is_decoder=True, add_cross_attention=True)
    model = transformers.BertModel(config).eval()
    ids, other = torch.randint(2, 60, (3, 9)), torch.randn(3, 9, 24)
    keep = torch.arange(9) < torch.tensor([9, 4, 1])[:, None]
    found = []
    for implementation in ("eager", name):
        model.set_attn_implementation(implementation)
        with torch.inference_mode():
            found.append(model(ids, encoder_hidden_states=other, encoder_attention_mask=keep.long())[0])
    torch.testing.assert_close(*found, rtol=0, atol=TOLERANCE)


def test_a_row_without_a_real_token_attends_to_nothing_as_in_sdpa():
    name = fastdistil.integrations.register_attention()
    model = make("BertModel")
    ids, mask = torch.randint(2, 60, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1] = 0
    found = []
    for implementation, grad in (("sdpa", False), (name, False), (name, True)):
        model.set_attn_implementation(implementation)
        with torch.set_grad_enabled(grad):
            found.append(model(ids, attention_mask=mask)[0].detach())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=TOLERANCE)


def test_a_decoder_generates_alike_with_a_cache():
    name = fastdistil.integrations.register_attention()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**ANY["Llama"])).eval()
    ids, keep = torch.randint(2, 60, (2, 5)), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    out = []
    for implementation in ("eager", name):
        model.set_attn_implementation(implementation)
        out.append(model.generate(ids, attention_mask=keep, max_new_tokens=6, do_sample=False, pad_token_id=0))
    assert torch.equal(*out)


def test_labels_of_one_thread_are_not_those_of_another():
    """A head with labels reads padding; what its encoder is told of that holds for its own call."""
    model = fastdistil.accelerate(make("DistilBertForTokenClassification"))
    given = inputs("DistilBertForTokenClassification")[0]
    labels = torch.zeros_like(given["input_ids"])
    inside = threading.Event(), threading.Event()
    encoder_forward = type(model.base_model)._forward

    def waiting(self, *args, **kwargs):  # with labels: until a call without labels has come and gone
        if threading.current_thread() is not threading.main_thread():
            inside[0].set()
            inside[1].wait(10)
        return encoder_forward(self, *args, **kwargs)

    with torch.no_grad():
        expected = model(**given, labels=labels).loss
        with mock.patch.object(type(model.base_model), "_forward", waiting), ThreadPoolExecutor(1) as pool:

            def with_labels():
                with torch.no_grad():
                    return model(**given, labels=labels).loss

            found = pool.submit(with_labels)
            inside[0].wait(10)
            model(**given)
            inside[1].set()
            found = found.result()
    assert found == expected


# --- the attention alone ----------------------------------------------------------------------------------------------


def attended(mask=None, heads=2, training=False, **options):
    """Ours on [3, heads, 9, 4] -> [3, 9, heads, 4], and its arguments."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 3, heads, 9, 4).unbind()
    module = torch.nn.Module().train(training)
    return attention.attention(module, q, k, v, mask, **options)[0], (q, k, v)


def test_a_scaling_of_the_callers(packed):
    for mask in (None, (torch.arange(9) < torch.tensor([9, 4, 1])[:, None]).long()):
        found, (q, k, v) = attended(mask, scaling=0.3, is_causal=False)
        seen = None if mask is None else mask.bool()[:, None, None]
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=0.3).transpose(1, 2)
        real = slice(None) if mask is None else mask.bool()
        torch.testing.assert_close(found[real], expected[real], rtol=0, atol=TOLERANCE)
    assert len(packed) == 2


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"s_aux": torch.zeros(2)}], ids=str)
def test_dropout_of_the_attention_without_a_gradient(options):
    with torch.no_grad():
        whole = attended(is_causal=False, training=True, **options)[0]
        dropped = attended(is_causal=False, training=True, dropout=0.9, **options)[0]
        assert not torch.allclose(whole, dropped, atol=1e-2)
        if options:  # by ourselves: in eval mode nothing is dropped
            torch.testing.assert_close(attended(is_causal=False, dropout=0.9, **options)[0], whole)


def test_sinks_without_a_mask(packed):
    found, (q, k, v) = attended(is_causal=False, s_aux=torch.zeros(2))
    weights = torch.cat([q @ k.mT / 2, torch.zeros(3, 2, 9, 1)], -1).softmax(-1)[..., :9]
    torch.testing.assert_close(found, (weights @ v).transpose(1, 2), rtol=0, atol=TOLERANCE)
    assert not packed


def test_a_mask_of_more_keys_than_there_are():
    """As of a cache that is not full yet."""
    mask = (torch.arange(9) < torch.tensor([9, 4, 1])[:, None])[:, None, None].expand(3, 1, 9, 9)
    exact = attended(mask, softcap=5.0, is_causal=False)[0]
    longer = torch.cat([mask, torch.ones(3, 1, 9, 4, dtype=torch.bool)], -1)
    torch.testing.assert_close(attended(longer, softcap=5.0, is_causal=False)[0], exact)


def test_a_traced_attention_holds_for_other_masks():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 3, 2, 9, 4).unbind()

    class Attend(torch.nn.Module):
        def forward(self, mask):
            return attention.attention(self, q, k, v, mask, is_causal=False)[0]

    masks = [(torch.arange(9) < torch.tensor(lengths)[:, None]).long() for lengths in ([9, 4, 1], [2, 9, 7])]
    with torch.no_grad():
        traced = torch.jit.trace(Attend().eval(), masks[0])
        for mask in masks:
            torch.testing.assert_close(traced(mask)[mask.bool()], Attend()(mask)[mask.bool()], rtol=0, atol=TOLERANCE)


# --- what only transformers' code answers -----------------------------------------------------------------------------


def test_an_activation_of_another_function(packed):
    """Of the class that the configuration names, but it computes something else."""
    model = make("DistilBertModel", activation="gelu_new" if live.OLD else "gelu")
    given, keep = inputs("DistilBertModel")
    for block in model.transformer.layer:
        made = type(block.ffn.activation)
        if not hasattr(block.ffn.activation, "act"):
            pytest.skip(f"{made.__name__} has no function inside")
        block.ffn.activation.act = torch.tanh
    with torch.inference_mode():
        expected = model(**given)
        same(accelerate(model)(**given), expected, keep)
    assert not packed


@pytest.mark.parametrize("field", ["is_decoder", "add_cross_attention"])
def test_a_decoder_is_refused(field):
    model = make("BertModel")
    setattr(model.config, field, True)
    with pytest.raises(ValueError, match="a decoder is not supported"):
        accelerate(model)


def test_a_head_size_of_ones_own(packed):
    model = accelerate(make("DistilBertModel"))
    given, _ = inputs("DistilBertModel")
    with torch.inference_mode():
        model(**given)
        before = len(packed)
        attention_of = model.transformer.layer[0].attention
        attention_of.attention_head_size = 4  # of 12: six heads, which its own forward then makes of them
        model(**given)
    assert before == len(packed) == 2  # layers


def test_an_argument_that_is_unknown_goes_to_transformers():
    model = accelerate(make("BertModel"))
    given, _ = inputs("BertModel")
    with torch.inference_mode(), mock.patch.object(transformers.BertModel, "forward", mock.Mock()) as theirs:
        model(**given, encoder_hidden_states=torch.zeros(3, 9, 24))
    assert theirs.call_args.kwargs["encoder_hidden_states"].shape == (3, 9, 24)


def test_what_is_kept_of_a_call_is_the_models_own():
    model = accelerate(make("DistilBertModel"))
    given, _ = inputs("DistilBertModel")
    with torch.inference_mode():
        model(**given)
    assert "_fast" in model.__dict__
    assert "_fast" not in copy.deepcopy(model).__dict__ and "_fast" not in pickle.loads(pickle.dumps(model)).__dict__
    assert "_fast" not in model._replicate_for_data_parallel().__dict__
    assert "_fast" not in restore(model).__dict__


def test_one_query_sees_every_key():
    """As the last token does, while a decoder generates."""
    torch.manual_seed(0)
    q, (k, v) = torch.randn(2, 3, 1, 4), torch.randn(2, 2, 3, 5, 4).unbind()
    found = attention.step_by_step(q, k, v, None, 0.0, None, True, 5.0, None)
    expected = (5 * torch.tanh(q @ k.mT / 2 / 5)).softmax(-1) @ v
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=0, atol=TOLERANCE)


def test_a_text_without_a_real_token_is_zeros(packed):
    model = accelerate(make("DistilBertModel"))
    given, _ = inputs("DistilBertModel")
    given["attention_mask"][1] = 0
    with torch.inference_mode():
        assert (model(**given)[0][1] == 0).all() and packed


@pytest.mark.parametrize("part", ["ffn", "attention", "output_layer_norm"])
def test_a_hook_before_a_part_of_a_live_model(part):
    model = make("DistilBertModel")
    given, _ = inputs("DistilBertModel")
    accelerate(model)
    with torch.inference_mode():
        model(**given)
        seen = []
        getattr(model.transformer.layer[0], part).register_forward_pre_hook(lambda m, args: seen.append(len(args)))
        model(**given)
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["DistilBertModel", "BertModel"])
@pytest.mark.parametrize("setting", ["output_attentions", "output_hidden_states", "return_dict"])
def test_a_live_models_configuration_says_what_is_given(setting, name, packed):
    """As it is at the time of the call."""
    model, (given, keep) = make(name), inputs(name)
    model.set_attn_implementation("eager")
    fast = accelerate(copy.deepcopy(model))
    with torch.inference_mode():
        fast(**given)
        for one in (model, fast):
            setattr(one.config, setting, setting != "return_dict")
        packed.clear()
        found, expected = fast(**given), model(**given)
    assert bool(packed) is (setting == "output_hidden_states" or (setting == "return_dict" and not live.OLD))
    if setting == "return_dict":
        assert type(found) is type(expected) is tuple and len(found) == len(expected)
        torch.testing.assert_close(found[0][keep], expected[0][keep], rtol=0, atol=TOLERANCE)
    else:
        same(found, expected, keep)


@pytest.mark.parametrize("name", ["DistilBertModel", "BertModel"])
def test_heads_of_a_live_model_are_counted_at_every_call(name, packed):
    model, (given, _) = accelerate(make(name)), inputs(name)
    owner = model.encoder if name == "BertModel" else model.transformer
    part, heads = owner.layer[0].attention, "n_heads"
    if name == "BertModel":
        part, heads = part.self, "num_attention_heads"
    with torch.inference_mode():
        model(**given)
        assert len(packed) == 2
        setattr(part, heads, 4)
        model(**given)
        assert len(packed) == 2
        setattr(part, heads, 2)
        model(**given)
    assert len(packed) == 4


DROPOUTS = {
    "DistilBertModel": ["embeddings", "transformer.layer.1.ffn"],
    "BertModel": ["embeddings", "encoder.layer.1.attention.output", "encoder.layer.1.output"],
}


@pytest.mark.parametrize(("name", "owner"), [(name, owner) for name in DROPOUTS for owner in DROPOUTS[name]])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_stands_for_a_dropout_is_called(name, owner, when):
    given, keep = inputs(name)
    model, fast = make(name), make(name)
    if when == "after":
        accelerate(fast)
        with torch.inference_mode():
            fast(**given)
    for one in (model, fast):
        one.get_submodule(owner).dropout = Doubled(torch.nn.Identity())
    with torch.inference_mode():
        same(accelerate(fast)(**given), model(**given), keep)


def test_a_replica_is_asked_for_its_own_weights():
    """Its weights are tensors and no parameters, and parameters elsewhere get a gradient by them."""
    model, (given, _) = accelerate(make("DistilBertModel")), inputs("DistilBertModel")
    replica = copy.deepcopy(model)
    replica._is_replica = True
    for module in replica.modules():
        for name in list(module._parameters):
            weight = module._parameters.pop(name)
            setattr(module, name, None if weight is None else weight * 1)
    assert not list(replica.parameters()) and replica(**given)[0].requires_grad
    with mock.patch.object(transformers.DistilBertModel, "forward", mock.Mock()) as theirs:
        replica(**given)
    assert theirs.called


# --- masks ------------------------------------------------------------------------------------------------------------


def test_a_mask_of_ones_own_is_kept():
    """What another function masks is more than padding."""
    if attention.bidirectional_mask_function is None:
        pytest.skip("before transformers 5")
    padding, config = torch.tensor([[1, 1, 1, 0]]), transformers.BertConfig(**ANY["Bert"])
    options = {"batch_size": 1, "q_length": 4, "kv_length": 4, "config": config}
    usual = {"mask_function": attention.bidirectional_mask_function}
    assert attention.mask(**options, **usual, attention_mask=padding) is padding

    def itself(batch, head, q, kv):
        return q == kv

    own = attention.mask(**options, mask_function=itself, attention_mask=padding.bool(), device=padding.device)
    assert own.shape == (1, 1, 4, 4) and torch.equal(own[0, 0, :3, :3], torch.eye(3, dtype=torch.bool))
    # one of another length than the keys', of later queries, or of a decoder is transformers' own to make
    for change in ({"q_length": 3}, {"q_offset": 1}, {"config": transformers.LlamaConfig(**ANY["Llama"])}):
        with mock.patch.object(attention, "sdpa_mask", mock.Mock()) as theirs:
            attention.mask(**options | change, **usual, attention_mask=padding)
        assert theirs.called


@pytest.mark.parametrize("name", ["position_bias", "softcap", "sliding_window", "s_aux"])
def test_what_changes_scores_is_not_left_out(name, packed):
    """The packed op has none of it."""
    given = {"position_bias": torch.zeros(1), "softcap": 3.0, "sliding_window": 2, "s_aux": torch.zeros(2)}[name]
    with mock.patch.object(attention, "sdpa_attention_forward", mock.Mock(return_value=(None, None))) as theirs:
        attended(is_causal=False, **{name: given})
    assert not packed and theirs.called is (name in ("position_bias", "sliding_window"))
    if theirs.called:
        assert theirs.call_args.kwargs[name] is given
