"""What the tools around transformers' models ask of a model, its results and its tokenizer."""

import copy
import gc
import sys
import types
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu

import fastdistil
from fastdistil import DistilBertConfig, DistilBertTokenizer
from fastdistil.graphs import Snapshot
from fastdistil.outputs import SequenceClassifierOutput

transformers = pytest.importorskip("transformers")

HEADS = ("ForSequenceClassification", "ForMultipleChoice", "ForTokenClassification", "ForQuestionAnswering")
CONFIG = dict(vocab_size=99, dim=48, n_heads=3, hidden_dim=80, n_layers=2, max_position_embeddings=50)


def model_of(name, **changes):
    torch.manual_seed(0)
    return getattr(fastdistil, f"DistilBert{name}")(DistilBertConfig(**(CONFIG | changes))).eval()


def batch(*shape):
    keep = torch.ones(shape, dtype=torch.int64)
    keep[0, ..., shape[-1] // 2 :] = 0
    return {"input_ids": torch.randint(1, 99, shape), "attention_mask": keep}


# --- results ----------------------------------------------------------------------------------------------------------


def test_results_are_made_from_names_and_values():
    """As accelerate casts them, and DataParallel gathers them."""
    loss, logits = torch.tensor(1.0), torch.ones(2, 3)
    out = SequenceClassifierOutput(loss=loss, logits=logits)
    for made in (
        type(out)(dict(out)),
        type(out)((name, value) for name, value in out.items()),
        type(out)([("loss", loss), ("logits", logits)]),
        type(out)(out),
        type(out)(out.items()),
    ):
        assert made.loss is loss and made.logits is logits and list(made) == ["loss", "logits"]
        assert made[1] is logits and made.hidden_states is None
    only = type(out)({"logits": logits})
    assert only.loss is None and list(only) == ["logits"]
    assert list(type(out)({})) == []
    for value in (
        [loss],
        (loss, loss),
        "text",
        3.0,
        object(),
        {"other": loss},
        [(logits, loss)],
        [(np.ones(2), 1)],
    ):  # none of its names
        assert type(out)(value).loss is value
    mapped = torch.utils._pytree.tree_map(lambda t: {"size": t.shape}, type(out)(loss=loss))
    assert mapped.loss == {"size": ()}


def test_results_are_changed_as_transformers_are():
    """By name or as an attribute, which is one; nothing is taken away."""
    transformers = pytest.importorskip("transformers", "5")  # before, an absent field could not become an item
    found = []
    for cls in (SequenceClassifierOutput, transformers.modeling_outputs.SequenceClassifierOutput):
        out = cls(logits=torch.ones(2, 3))
        out["logits"] = torch.zeros(2)
        seen = [out.logits.tolist()]
        out.logits = torch.ones(2)
        seen.append([out["logits"].tolist(), out[0].tolist()])
        out.loss = torch.tensor(1.0)  # absent until now, as Trainer looks for it by name
        seen.append([list(out), float(out.loss), len(out.to_tuple())])
        out.logits = None
        seen.append([list(out), out.logits])
        for change in (
            lambda out=out: out.pop("logits"),
            lambda out=out: out.popitem(),
            lambda out=out: out.setdefault("loss", 1),
            lambda out=out: out.update({"loss": 1}),
            lambda out=out: out.__delitem__("logits"),
        ):
            if cls is SequenceClassifierOutput:
                with pytest.raises(
                    TypeError, match="the fields of SequenceClassifierOutput cannot be added or removed"
                ):
                    change()
                assert list(out) == ["logits", "loss"]
        found.append(seen)
    assert found[0] == found[1]


def test_a_result_of_several_values_is_made_of_them():
    """Only one alone may be names and values."""
    pairs = [("loss", 1), ("logits", 2)]
    out = SequenceClassifierOutput(pairs, torch.ones(1))
    assert out.loss is pairs and list(out) == ["loss", "logits"]
    told = iter([torch.ones(1), torch.zeros(1)])  # read to see that it is of no names
    assert [float(x) for x in SequenceClassifierOutput(told).loss] == [1, 0]


def test_a_result_is_exported_by_its_names(tmp_path):
    class Model(torch.nn.Module):
        def forward(self, x):
            return SequenceClassifierOutput(logits=x * 2)

    program = torch.export.export(Model(), (torch.ones(2),))
    torch.export.save(program, tmp_path / "model.pt2")
    out = torch.export.load(tmp_path / "model.pt2").module()(torch.ones(2))
    assert type(out) is SequenceClassifierOutput and out.logits.tolist() == [2, 2] and out.loss is None


# --- models -----------------------------------------------------------------------------------------------------------


def test_every_second_block_is_computed_again(monkeypatch):
    """every_n_layers and offload of transformers' gradient_checkpointing_enable."""
    model, given = model_of("Model", n_layers=3, dropout=0.2).train(), batch(3, 9)
    seen, grads, offloaded = [], [], []
    real = save_on_cpu
    monkeypatch.setattr("fastdistil.layers.save_on_cpu", lambda **how: offloaded.append(how) or real(**how))
    for block in model.transformer.layer:
        block.forward = (lambda real, n: lambda *args: seen.append(n) or real(*args))(block.forward, len(grads))
        grads.append(None)
    grads = []
    for options in (None, {}, {"every_n_layers": 2}, {"every_n_layers": 2, "offload": True}):
        seen.clear()
        if options is None:
            model.gradient_checkpointing_disable()
        else:
            model.gradient_checkpointing_enable(**options)
        model.zero_grad()
        torch.manual_seed(1)
        model(**given)[0].sum().backward()
        again = sorted(seen)
        grads.append([p.grad.clone() for p in model.parameters()])
        assert (
            again
            == {None: [0, 1, 2], 1: [0, 0, 1, 1, 2, 2], 2: [0, 0, 1, 2, 2]}[
                None if options is None else options.get("every_n_layers", 1)
            ]
        )
    assert offloaded == [{"pin_memory": False}] * 2
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    for wrong in (0, True, 1.5):
        with pytest.raises(ValueError, match=f"every_n_layers is {wrong}; it must be an integer from 1 on"):
            model.gradient_checkpointing_enable(every_n_layers=wrong)


class Quantized(torch.Tensor):
    """A weight in int8 with one scale, which only F.linear and F.embedding know, as torchao's."""

    def __new__(cls, whole, scale):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=torch.float32)

    def __init__(self, whole, scale):
        self.whole, self.scale = whole, scale

    def __tensor_flatten__(self):
        return ["whole"], self.scale

    @classmethod
    def __tensor_unflatten__(cls, inner, scale, size, stride):
        return cls(inner["whole"], scale)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (F.linear, F.embedding):
            args = [a.whole * a.scale if isinstance(a, Quantized) else a for a in args]
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].whole, args[0].scale)
        raise NotImplementedError(f"{func} of a quantised weight")


def quantize(linear):
    scale = float(linear.weight.abs().max()) / 127
    whole = (linear.weight.detach() / scale).round()
    linear.weight = nn.Parameter(Quantized(whole, scale), requires_grad=False)
    return whole * scale


@pytest.mark.parametrize("accelerated", [False, True])
def test_weights_that_are_tensors_of_tensors_are_left_to_their_modules(accelerated):
    model = model_of("Model")
    if accelerated:
        theirs = transformers.DistilBertModel(transformers.DistilBertConfig(**CONFIG)).eval()
        theirs.load_state_dict(model.state_dict())
        model = theirs
    rounded = copy.deepcopy(model)
    for layer, plain in zip(model.transformer.layer, rounded.transformer.layer, strict=True):
        with torch.no_grad():
            plain.attention.q_lin.weight.copy_(quantize(layer.attention.q_lin))
            plain.ffn.lin1.weight.copy_(quantize(layer.ffn.lin1))
            plain.ffn.lin2.weight.copy_(quantize(layer.ffn.lin2))
    with torch.no_grad():
        rounded.embeddings.word_embeddings.weight.copy_(quantize(model.embeddings.word_embeddings))
    if accelerated:
        fastdistil.accelerate(model)
    given = batch(4, 12)
    real = given["attention_mask"].bool()
    with torch.inference_mode():
        ours, expected = model(**given)[0][real], rounded(**given)[0][real]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["graphs", "accelerated"])
def test_a_model_nobody_holds_frees_its_weights_at_once(how):
    """Not when the garbage collector comes round: `del model` is how memory of a GPU is made free."""
    model, given = model_of("Model"), batch(2, 9)
    if how == "accelerated":
        model = transformers.DistilBertModel(transformers.DistilBertConfig(**CONFIG)).eval()
        fastdistil.accelerate(model)
    else:
        model.cuda_graphs()
        model._graphs._weights = Snapshot(model)
    with torch.inference_mode():
        model(**given)
    assert how == "graphs" or "_fast" in model.__dict__
    weight = weakref.ref(model.transformer.layer[0].ffn.lin2)
    gc.collect()
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def replica_of(model):
    """As torch.nn.parallel.replicate makes them: weights are attributes, and no parameters."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, made in copies.items():
        for name, child in module._modules.items():
            made._modules[name] = copies.get(child)
        for name, parameter in module._parameters.items():
            made._parameters.pop(name, None)
            made.__dict__[name] = None if parameter is None else parameter.detach().clone()
    return copies[model]


def test_replicas_of_data_parallel():
    model, given = model_of("ForSequenceClassification"), batch(2, 9)
    model.cuda_graphs()
    expected = model(**given).logits
    replica = replica_of(model)
    assert not list(replica.parameters()) and replica.distilbert._graphs is None
    assert replica.dtype is torch.float32 and replica.device == torch.device("cpu")
    torch.testing.assert_close(replica(**given).logits, expected)
    with torch.no_grad():
        torch.testing.assert_close(replica(**given).logits, expected)


def test_weights_that_are_there_for_a_modules_own_call_alone():
    """As partitioned training has them, which gathers a module's weights before its forward."""
    model, given = model_of("Model"), batch(3, 9)
    with torch.no_grad():
        expected = model(**given)[0]
    whole = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            whole[parameter] = parameter.data
            parameter.data = torch.empty(0)

        def gather(module, args):
            for parameter in module._parameters.values():
                parameter.data = whole[parameter]

        def free(module, args, out):
            for parameter in module._parameters.values():
                parameter.data = torch.empty(0)

        module.register_forward_pre_hook(gather), module.register_forward_hook(free)
    model.eval(), model.to("cpu")
    with torch.no_grad():
        real = given["attention_mask"].bool()
        torch.testing.assert_close(model(**given)[0][real], expected[real], rtol=0, atol=1e-5)


def test_parts_of_a_users_own_class_get_initial_values(tmp_path):
    class Own(fastdistil.DistilBertForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            self.conv, self.norm = nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4)
            self.rows, self.bare = nn.LSTM(4, 4), nn.LayerNorm(4, elementwise_affine=False)
            self.own, self.table, self.last = nn.Linear(4, 4), nn.Embedding(3, 4), nn.LayerNorm(4)
            self.apply(self._init_weights)
            self.post_init()

        def _init_weights(self, module):
            if module is getattr(self, "own", None):
                nn.init.constant_(module.weight, 7.0)

    model_of("ForSequenceClassification").save_pretrained(tmp_path)
    model = Own.from_pretrained(tmp_path)
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(v.isfinite().all() and v.float().abs().max() <= 7 for v in values.values())
    assert model.last.weight.eq(1).all() and 0 < model.table.weight.abs().max() < 1
    assert model.conv.weight.std() > 0 and model.norm.running_var.eq(1).all() and model.own.weight.eq(7).all()


def test_input_gradients_can_be_asked_for_and_given_up():
    model, given = model_of("Model").requires_grad_(False), batch(2, 9)
    model.enable_input_require_grads(), model.enable_input_require_grads()
    assert model(**given)[0].requires_grad
    model.disable_input_require_grads(), model.disable_input_require_grads()
    assert not model(**given)[0].requires_grad and not model.get_input_embeddings()._forward_hooks


def test_no_graph_knows_weights_that_are_tensors_of_tensors():
    model = model_of("Model")
    assert Snapshot(model).is_plain()
    quantize(model.transformer.layer[0].ffn.lin2)
    assert not Snapshot(model).is_plain()


@pytest.mark.parametrize("half", ["torch.onnx", "what it asks"])
def test_calls_while_another_thread_imports_onnx(half, monkeypatch):
    model, given = model_of("Model"), batch(2, 9)
    onnx = types.ModuleType("torch.onnx")  # as far as it has come
    if half == "what it asks":
        onnx.is_in_onnx_export = lambda: types.ModuleType("_flags")._is_onnx_exporting
    monkeypatch.setitem(sys.modules, "torch.onnx", onnx)
    with torch.inference_mode():
        assert model(**given)[0].isfinite().all()


@pytest.mark.parametrize("name", ["Model", *HEADS])
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_sizes(name, strict):
    if name == "ForMultipleChoice" and not strict and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip("torch itself holds L to be min(L, 2 * L) of an input of three dimensions, and then takes offence")
    model, more = model_of(name), (2,) if name == "ForMultipleChoice" else ()
    given = batch(4, *more, 17)
    sizes = {0: torch.export.Dim("B", max=4_096), len(more) + 1: torch.export.Dim("L", max=50)}
    with torch.no_grad():
        program = torch.export.export(model, (), given, dynamic_shapes=dict.fromkeys(given, sizes), strict=strict)
        other = batch(7, *more, 9)
        for ours, expected in zip(program.module()(**other).values(), model(**other).values(), strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("name", ["Model", "ForSequenceClassification", "ForMaskedLM"])
@pytest.mark.filterwarnings("ignore")
def test_export_to_onnx_without_gradients(name, dynamo, tmp_path):
    """Whatever mode it is called in: ONNX has none of our ops."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path, given = model_of(name, return_dict=False), tmp_path / "model.onnx", batch(4, 17)
    sizes = {0: "batch", 1: "length"}
    how = {"dynamic_shapes": (sizes, sizes)} if dynamo else {"dynamic_axes": dict.fromkeys(given, sizes)}
    with torch.no_grad():
        torch.onnx.export(
            model, tuple(given.values()), path, input_names=list(given), dynamo=dynamo, verbose=False, **how
        )
        other = batch(7, 9)
        expected = model(**other)[0]
    feeds = {key: value.numpy() for key, value in other.items()}
    (ours,) = runtime.InferenceSession(path).run(None, feeds)
    torch.testing.assert_close(torch.from_numpy(ours), expected, rtol=0, atol=1e-5)


def test_what_is_saved_may_be_given(tmp_path):
    """As accelerate's recipe saves what it gathered."""
    model = model_of("ForMaskedLM")
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state, save_function=torch.save, push_to_hub=False, token=None)
    found = fastdistil.DistilBertForMaskedLM.from_pretrained(tmp_path)
    assert found.name_or_path == found.distilbert.name_or_path == str(tmp_path) and model.name_or_path == ""
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in state.items())
    model.save_pretrained(tmp_path / "none", False)  # not the main process
    assert not (tmp_path / "none").exists()
    for wrong in ({"push_to_hub": True}, {"variant": "fp16"}):
        with pytest.raises(ValueError, match="is not supported; save into a directory and upload it"):
            model.save_pretrained(tmp_path / "other", **wrong)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("task", ["text-classification", "token-classification", "fill-mask"])
def test_transformers_pipelines_take_our_models(task, minilm, tmp_path):
    kinds = {"text-classification": HEADS[0], "token-classification": HEADS[2], "fill-mask": "ForMaskedLM"}
    model = model_of(kinds[task], vocab_size=30_522)
    model.save_pretrained(tmp_path)
    theirs = getattr(transformers, f"DistilBert{kinds[task]}").from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    ours, expected = (
        transformers.pipeline(task, model=one, tokenizer=tokenizer)("a [MASK] sat") for one in (model, theirs)
    )
    assert len(ours) == len(expected) > 0
    for a, b in zip(ours, expected, strict=True):
        assert a.pop("score") == pytest.approx(b.pop("score"), abs=1e-5) and a == b


# --- the tokenizer in data collators ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers(minilm):
    return DistilBertTokenizer.from_pretrained(minilm), transformers.DistilBertTokenizer.from_pretrained(minilm)


def rows(tokenizer, **more):
    found = [tokenizer(text) for text in ("a b c", "hello world, this is it", "x")]
    names = ("input_ids", "attention_mask")
    return [{n: one[n] for n in names} | {n: of(one["input_ids"]) for n, of in more.items()} for one in found]


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert type(a[name]) is type(b[name])
        if isinstance(a[name], torch.Tensor):
            assert torch.equal(a[name], b[name]) and a[name].dtype is b[name].dtype
        else:
            assert a[name] == b[name] if isinstance(a[name], list) else np.array_equal(a[name], b[name])


@pytest.mark.parametrize(
    "options", [{}, {"pad_to_multiple_of": 8}, {"padding": "max_length", "max_length": 12}], ids=str
)
@pytest.mark.parametrize(
    "label",
    [
        len,
        lambda ids: [0.5, 1.0],
        lambda ids: np.float64(0.1),
        lambda ids: torch.tensor(0.1, dtype=torch.float64),
        lambda ids: torch.tensor(2, dtype=torch.int32),
        lambda ids: True,
    ],
    ids=["class", "several", "float64", "tensor", "int32", "bool"],
)
def test_collating_with_padding(options, label, tokenizers):
    ours, theirs = (transformers.DataCollatorWithPadding(one, **options)(rows(one, label=label)) for one in tokenizers)
    same(ours, theirs)
    assert "labels" in ours


def test_other_collators(tokenizers):
    ours, theirs = (
        transformers.DataCollatorForTokenClassification(one)(rows(one, labels=lambda ids: [1] * len(ids)))
        for one in tokenizers
    )
    same(ours, theirs)
    ours, theirs = (transformers.DataCollatorForLanguageModeling(one, seed=3)(rows(one)) for one in tokenizers)
    same(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"return_tensors": "np"},
        {"padding_side": "left", "return_tensors": "pt"},
        {"padding": "max_length", "max_length": 9},
        {"padding": "max_length"},
        {"padding": False},
    ],
    ids=str,
)
def test_pad(options, tokenizers):
    ours, theirs = (one.pad(rows(one, labels=len), **options) for one in tokenizers)
    same(ours, theirs)
    one, other = tokenizers
    for given in (
        {"input_ids": [101, 5, 102]},
        {"input_ids": [[101, 5, 102], [101, 102]], "token_type_ids": [[0, 0, 1], [0, 1]]},
        {"input_ids": [torch.tensor([101, 102]), torch.tensor([101])]},
        {"input_ids": [[], []]},
    ):
        expected = other.pad(copy.deepcopy(given), **({"return_tensors": "pt"} | options | {"padding": True}))
        same(one.pad(given, **({"return_tensors": "pt"} | options | {"padding": True})), expected)
    assert "attention_mask" not in one.pad({"input_ids": [[101], [102, 5]]}, return_attention_mask=False)
    ids = other("a pair", "of texts")["input_ids"]
    masks = [t.get_special_tokens_mask(ids, already_has_special_tokens=True) for t in tokenizers]
    assert masks[0] == masks[1] and sum(masks[0]) == 3
    assert one.get_special_tokens_mask(torch.tensor(ids), already_has_special_tokens=True) == masks[0]
    assert one.get_special_tokens_mask([5, 6], [7]) == [1, 0, 0, 1, 0, 1]
    for name in ("is_fast", "pad_token_type_id", "truncation_side", "padding_side"):
        assert getattr(one, name) == getattr(other, name)


def test_an_encoding_is_made_from_names_and_values(tokenizers):
    """As accelerate moves a batch to its device."""
    found = tokenizers[0](["a cat", "sat"], padding=True, return_tensors="pt")
    moved = type(found)({name: value + 0 for name, value in found.items()})
    same(moved, found)
    assert torch.equal(moved.input_ids, found["input_ids"]) and type(moved)() == {}
    with pytest.raises(ValueError, match="these ids come from no text"):
        moved.tokens()


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        ([{"input_ids": [1]}, {"ids": [1]}], {}, ValueError, "row 1 has no input_ids, which row 0 has"),
        ([{"ids": [1]}], {}, ValueError, "the texts to pad need input_ids; they have ids"),
        (["text"], {}, TypeError, "pad takes dictionaries with input_ids, or a list of them, got list"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, {}, ValueError, "row 0: 2 input_ids, but 1 of attention"),
        ({"input_ids": [[1], [2]], "attention_mask": [[1]]}, {}, ValueError, "2 rows of input_ids, but 1 of attention"),
        ({"input_ids": [[1]]}, {"padding_side": "up"}, ValueError, "padding_side must be right or left, got 'up'"),
        ({"input_ids": [[1]]}, {"return_tensors": "tf"}, ValueError, "return_tensors must be 'pt', 'np' or None"),
        (
            {"input_ids": [[1], [2]], "words": ["a", "b"]},
            {"return_tensors": "pt"},
            ValueError,
            "words cannot be a tensor",
        ),
        (
            {"input_ids": [[1], [2]], "labels": [None, None]},
            {"return_tensors": "pt"},
            ValueError,
            "labels cannot be a tensor",
        ),
        ({"input_ids": [[1], [2, 3]]}, {"padding": False, "return_tensors": "pt"}, ValueError, "use padding=True"),
    ],
)
def test_what_cannot_be_padded(given, options, error, message, tokenizers):
    with pytest.raises(error, match=message):
        tokenizers[0].pad(given, **options)


# --- an Embedder where a SentenceTransformer was ----------------------------------------------------------------------


def test_an_embedder_answers_as_a_sentence_transformer(minilm, capsys):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    theirs = sentence_transformers.SentenceTransformer(str(minilm), device="cpu")
    ours = fastdistil.Embedder.from_pretrained(minilm, device="cpu", normalize=False)
    texts = ["a cat sat", "temporary directory", "a dog sat", "the sky"]
    for options in (
        {"batch_size": 2, "show_progress_bar": False},
        {"normalize_embeddings": True},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"convert_to_tensor": True, "convert_to_numpy": False, "normalize_embeddings": True},
        {"truncate_dim": 9, "normalize_embeddings": True, "precision": "float32", "chunk_size": 3, "device": "cpu"},
    ):
        for given in (texts, texts[0]):
            a, b = ours.encode(given, **options), theirs.encode(given, **options)
            assert type(a) is type(b)
            if isinstance(a, list):
                a, b = torch.stack(a), torch.stack(b)
            a, b = (F.normalize(torch.as_tensor(x), dim=-1) for x in (a, b))  # MiniLM's own are
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    ours.encode(texts, show_progress_bar=True)
    assert "text" in capsys.readouterr().err
    norms = torch.as_tensor(ours.encode(texts, normalize_embeddings=True)).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(4), rtol=0, atol=1e-5)
    assert not torch.allclose(torch.as_tensor(ours.encode(texts)).norm(dim=1), torch.ones(4), atol=1e-2)
    assert ours.get_sentence_embedding_dimension() == theirs.get_sentence_embedding_dimension()
    assert ours.max_seq_length == theirs.max_seq_length and ours.device == theirs.device
    for wrong, error in (
        ({"batch_size": 0}, "batch_size is 0; it must be an integer of 1 or more"),
        ({"truncate_dim": 500}, "truncate_dim is 500; it must be from 1 to 384"),
        ({"precision": "int8"}, "precision='int8' is not supported"),
        ({"output_value": "token_embeddings"}, "output_value='token_embeddings' is not supported"),
        ({"normalise": True}, r"encode\(\) has no argument 'normalise'"),
    ):
        with pytest.raises((ValueError, TypeError), match=error):
            ours.encode(texts, **wrong)


@pytest.mark.filterwarnings("ignore:Importing from:DeprecationWarning")
def test_evaluators_of_sentence_transformers_take_an_embedder(minilm):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    evaluation = pytest.importorskip("sentence_transformers.evaluation")
    theirs = sentence_transformers.SentenceTransformer(str(minilm), device="cpu")
    ours = fastdistil.Embedder.from_pretrained(minilm, device="cpu")
    one, other = ["a cat sat", "the sky is blue", "dogs run"], ["a kitten sat", "the sea", "dogs walk"]
    corpus = dict(zip("012345", one + other, strict=True))
    for evaluator in (
        evaluation.EmbeddingSimilarityEvaluator(one, other, [0.9, 0.2, 0.8], show_progress_bar=False),
        evaluation.InformationRetrievalEvaluator({"q": "cats"}, corpus, {"q": {"0", "3"}}, show_progress_bar=False),
        evaluation.TripletEvaluator(one, other, one[::-1]),
    ):
        found, expected = evaluator(ours), evaluator(theirs)
        assert len(found) > 0 and found == pytest.approx(expected, abs=1e-4)


def test_prompts_for_queries_and_documents(minilm):
    model = fastdistil.Embedder.from_pretrained(minilm, device="cpu")
    model.prompts |= {"query": "search: ", "passage": "text: "}
    del model.prompts["document"]
    for encode, name in ((model.encode_query, "query"), (model.encode_document, "passage")):
        np.testing.assert_array_equal(encode(["a cat"]), model.encode(["a cat"], prompt_name=name))
        np.testing.assert_array_equal(encode("a cat", prompt="x "), model.encode("a cat", prompt="x "))
        np.testing.assert_array_equal(
            encode(["a cat"], prompt_name="query"), model.encode(["a cat"], prompt_name="query")
        )
    model.prompts |= {"corpus": model.prompts.pop("passage")}
    np.testing.assert_array_equal(model.encode_document(["a cat"]), model.encode(["a cat"], prompt_name="corpus"))
    model.prompts.clear()
    np.testing.assert_array_equal(model.encode_query(["a cat"]), model.encode(["a cat"]))


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity(name, minilm):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    theirs = sentence_transformers.SentenceTransformer(str(minilm), device="cpu", similarity_fn_name=name)
    ours = fastdistil.Embedder.from_pretrained(minilm, device="cpu")
    ours.similarity_fn_name = name
    a, b = torch.randn(3, 8), torch.randn(5, 8)
    for given in ((a, b), (a.numpy(), b.numpy()), (a[0], b), (list(a), list(b.numpy()))):
        torch.testing.assert_close(ours.similarity(*given), theirs.similarity(*given), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="similarity_fn_name 'near' is not one of cosine, dot"):
        fastdistil.Embedder(ours.model, ours.tokenizer, similarity_fn_name="near")


def test_the_similarity_of_the_files(minilm, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    sentence_transformers.SentenceTransformer(str(minilm), device="cpu", similarity_fn_name="dot").save(str(tmp_path))
    assert fastdistil.Embedder.from_pretrained(tmp_path, device="cpu").similarity_fn_name == "dot"
