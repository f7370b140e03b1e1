"""When a graph is captured, when it is replayed and when it must not be; the capture itself is CUDA's.

Without a GPU a stand-in captures: it keeps the function and runs it again into the first result.
"""

import collections
import copy
import pickle
import warnings

import pytest
import torch

import fastdistil
from fastdistil import DistilBertConfig, DistilBertModel, graphs, layers, ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


pytestmark = pytest.mark.filterwarnings("error:no CUDA graph")


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """With a count of captures and replays in `counts`."""
    counts = request.node.counts = {"captures": 0, "replays": 0}
    real = graphs.capture

    def stand_in(run, device, pool):
        out = run().clone()
        return (lambda: out.copy_(run())), out, pool

    def counted(run, device, pool):
        counts["captures"] += 1
        replay, out, pool = (stand_in if device.type == "cpu" else real)(run, device, pool)

        def count_replay():
            counts["replays"] += 1
            replay()

        return count_replay, out, pool

    monkeypatch.setattr(graphs, "capture", counted)
    if request.param == "cpu":
        monkeypatch.setattr(graphs, "can_capture", lambda device: True)
    return request.param


@pytest.fixture
def counts(request, device):
    return request.node.counts


@pytest.fixture
def model(device):
    config = DistilBertConfig(vocab_size=99, dim=48, n_heads=3, hidden_dim=80, n_layers=2, max_position_embeddings=50)
    return DistilBertModel(config).eval().to(device)


def batch(device, n=3, length=21, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 99, (n, length), generator=g)
    keep = torch.arange(length) < torch.randint(1, length + 1, (n, 1), generator=g)
    return ids.to(device), keep.to(device)


@torch.inference_mode()
def both(model, *args, **kwargs):
    """The result with graphs and without."""
    with_graphs = model(*args, **kwargs)
    captured, model.__dict__["_graphs"] = model._graphs, None
    without = model(*args, **kwargs)
    model.__dict__["_graphs"] = captured
    return with_graphs, without


def same(model, *args, **kwargs):
    ours, plain = both(model, *args, **kwargs)
    # a graph has more rows, for which a library may add up in another order: of weights shifted by 0.1 float32 itself
    # errs by 1e-5
    atol = 1e-4 if ours.last_hidden_state.is_cuda else 1e-5
    torch.testing.assert_close(ours.last_hidden_state, plain.last_hidden_state, rtol=0, atol=atol)


def test_buckets():
    assert graphs.bucket(1, 1, 512) == (1, 32)
    assert graphs.bucket(3, 33, 512) == (4, 64)
    assert graphs.bucket(8, 512, 512) == (8, 512)
    assert graphs.bucket(5, 45, 50) == (8, 50)


def test_one_graph_serves_a_bucket(model, device, counts):
    assert model.cuda_graphs() is model
    for seed, (n, length) in enumerate([(3, 21), (4, 32), (3, 1), (4, 30)]):
        ids, keep = batch(device, n, length, seed)
        same(model, ids, keep)
        same(model, ids)  # no padding, after a batch that had some
        same(model, ids.int(), keep.float())
    assert counts["captures"] == 1 and counts["replays"] == 12
    same(model, *batch(device, 5, 21))
    assert counts["captures"] == 2


def test_results_are_the_callers_own(model, device):
    model.cuda_graphs()
    ids, keep = batch(device)
    with torch.inference_mode():
        first = model(ids, keep)[0]
        before = first.clone()
        model(*batch(device, seed=5))
    assert torch.equal(first, before)


def test_changed_weights_are_noticed(model, device, counts):
    model.cuda_graphs()
    args = batch(device)
    same(model, *args)
    with torch.no_grad():
        model.transformer.layer[0].ffn.lin1.weight.add_(0.5)  # in place: the same memory
    same(model, *args)
    assert counts["captures"] == 1
    other = copy.deepcopy(model).requires_grad_(False)
    for p in other.parameters():
        p.add_(0.1)
    model.load_state_dict(other.state_dict(), assign=True)
    same(model, *args)
    assert counts["captures"] == 2
    model.transformer.layer[1].ffn.lin2.weight.data = torch.zeros_like(model.transformer.layer[1].ffn.lin2.weight)
    same(model, *args)
    model.transformer.layer[1].ffn.lin1 = torch.nn.Linear(48, 80).to(device)
    same(model, *args)
    model.transformer.layer[1].output_layer_norm.eps = 0.1
    same(model, *args)
    model.transformer.layer[1].ffn.activation = torch.nn.ReLU()
    same(model, *args)
    assert counts["captures"] == 6 and counts["replays"] == 7 + 5  # five were launched and not used
    weight = model.transformer.layer[0].attention.out_lin.weight
    weight.data = weight.data.t()
    same(model, *args)
    for block in model.transformer.layer:
        block.attention.n_heads, block.attention.attention_head_size, block.attention.scaling = 6, 8, 8**-0.5
    same(model, *args)
    assert counts["captures"] == 8 and counts["replays"] == 9 + 7
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    same(model, *args)
    hook.remove()
    assert counts["captures"] == 8 and counts["replays"] == 9 + 8
    table = model.embeddings.position_embeddings.weight
    table.data = table.data[:40]  # where it lies nothing has changed
    same(model, *args)
    assert (
        counts["captures"] == 9 and counts["replays"] == 10 + 8
    )  # after a call without a graph none is launched early
    model.embeddings.word_embeddings.max_norm = 0.5
    same(model, *args)
    model.embeddings.word_embeddings.max_norm = None
    same(model, *args)
    torch.nn.utils.parametrize.register_parametrization(
        model.transformer.layer[0].ffn.lin1, "weight", torch.nn.Identity()
    )
    same(model, *args)


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _reinterpret(layer):
    layer.ffn.lin2.requires_grad_(False).weight.data = layer.ffn.lin2.weight.data.view(torch.int32)


def _own_hooks(layer):
    layer.ffn.lin1._forward_hooks = collections.OrderedDict()  # as some clear them
    layer.ffn.lin1.register_forward_hook(lambda module, args, out: out * 2)


CHANGES = {
    "pointer": lambda layer: setattr(layer.ffn.lin1.weight, "data", layer.ffn.lin1.weight.data.clone()),
    "dtype": _reinterpret,
    "strides": lambda layer: setattr(layer.attention.q_lin.weight, "data", layer.attention.q_lin.weight.data.t()),
    "size": lambda layer: setattr(layer.ffn.lin1.weight, "data", layer.ffn.lin1.weight.data[:40]),
    "no bias": lambda layer: setattr(layer.ffn.lin1, "bias", None),
    "class": lambda layer: setattr(layer.ffn.lin1, "__class__", Doubled),
    "child": lambda layer: setattr(layer, "ffn", copy.deepcopy(layer.ffn)),
    "training": lambda layer: layer.attention.dropout.train(),
    "eps": lambda layer: setattr(layer.sa_layer_norm, "eps", 0.1),
    "heads": lambda layer: setattr(layer.attention, "n_heads", 6),
    "activation": lambda layer: setattr(layer.ffn, "activation", torch.nn.ReLU()),
    "another form": lambda layer: setattr(layer.ffn.activation, "approximate", "tanh"),
    "forward": lambda layer: setattr(layer.ffn, "forward", lambda x: x),
    "hook": lambda layer: layer.ffn.lin1.register_forward_hook(lambda module, args, out: out * 2),
    "pre-hook": lambda layer: layer.ffn.lin1.register_forward_pre_hook(lambda module, args: None),
    "hooks of its own": _own_hooks,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_seen(change, model, device):
    """Values tell nothing here: what stands in for a replay computes anew."""
    model.cuda_graphs()
    same(model, *batch(device))
    found = model._graphs
    assert found._weights.is_plain() and not found.is_stale()
    change(model.transformer.layer[0])
    assert found.is_stale() or not found._weights.is_plain()


class Another(DistilBertModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class OfTensors(torch.Tensor):
    """A tensor of tensors, as quantised ones are."""

    def __tensor_flatten__(self):
        return ["whole"], None


CHANGES_OF_THE_WHOLE = {
    "hook": lambda model, patch: model.register_forward_hook(lambda module, args, out: out),
    "pre-hook": lambda model, patch: model.register_forward_pre_hook(lambda module, args: None),
    "forward": lambda model, patch: setattr(model, "forward", lambda *args, **kwargs: None),
    "class": lambda model, patch: setattr(model, "__class__", Another),
    "training": lambda model, patch: setattr(model, "training", True),
    "a class's forward": lambda model, patch: patch.setattr(layers.FFN, "forward", lambda self, x: x),
    "torch's class's forward": lambda model, patch: patch.setattr(torch.nn.Linear, "forward", lambda self, x: x),
    "child": lambda model, patch: setattr(model, "transformer", copy.deepcopy(model.transformer)),
    "adapter": lambda model, patch: setattr(
        next(m for m in model.modules() if hasattr(m, "norm_first")), "norm_first", False
    ),
}


@pytest.mark.parametrize("change", CHANGES_OF_THE_WHOLE.values(), ids=CHANGES_OF_THE_WHOLE)
def test_every_change_of_the_whole_is_seen(change, model, device, monkeypatch):
    model.add_adapter("a", {"original_ln_before": True, "output_adapter": True, "mh_adapter": False})
    model.cuda_graphs()
    same(model, *batch(device))
    found = model._graphs
    assert found._weights.is_plain() and not found.is_stale()
    change(model, monkeypatch)
    assert found.is_stale() or not found._weights.is_plain()


def test_tensors_of_tensors_have_no_graph(model, device, counts):
    weight = model.transformer.layer[0].ffn.lin1.weight
    assert graphs.Snapshot(model).is_plain()
    model.transformer.layer[0].ffn.lin1._parameters["weight"] = weight.detach().as_subclass(OfTensors)
    assert not graphs.Snapshot(model).is_plain()


def test_what_is_not_the_models_own_runs_without_a_graph(model, device, counts):
    model.cuda_graphs()
    args = batch(device)
    same(model, *args)
    layer = model.transformer.layer[0]
    hook = layer.attention.q_lin.register_forward_hook(lambda m, i, o: o * 2)
    same(model, *args)
    hook.remove()

    class Adapted(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.bias, self.on = inner, inner.bias, True

        def forward(self, x):
            return self.inner(x) * (2 if self.on else 1)

    layer.attention.out_lin, plain = Adapted(layer.attention.out_lin), layer.attention.out_lin
    same(model, *args)
    layer.attention.out_lin.on = False
    same(model, *args)
    layer.attention.out_lin = plain
    layer.forward = lambda *a: type(layer).forward(layer, *a) + 1
    same(model, *args)
    assert counts["captures"] == 1 and counts["replays"] == 2  # the hook was noticed after a launch
    del layer.forward
    same(model, *args)
    assert counts["captures"] == 2 and counts["replays"] == 3


def test_a_replay_is_launched_before_the_call_is_checked(model, device, counts, monkeypatch):
    model.cuda_graphs()
    ids, keep = batch(device)
    order = []
    real = model._checked
    monkeypatch.setattr(model, "_checked", lambda *a: order.append(counts["replays"]) or real(*a))
    for _ in range(3):
        same(model, ids, keep)
    assert order[::2] == [0, 2, 3]  # from the second call on the replay comes first; those between run without graphs
    with torch.inference_mode():
        for wrong, error in (
            ((ids, keep[:2]), "attention_mask must be"),
            ((ids.float(), keep), "input_ids must be integers"),
            ((ids, keep, None, None, None, None, None, None, ids[:, 1:]), "token_type_ids must be"),
            ((torch.ones(1, 51, dtype=torch.int64, device=device),), "the input is 51 tokens long"),
        ):
            model(ids, keep)  # so that the next one may be launched early
            with pytest.raises(ValueError, match=error):
                model(*wrong)
    same(model, ids, keep)
    same(model, ids, keep[:1])  # for all texts
    same(model, ids, keep * 2.5)
    other = keep.double().requires_grad_()
    same(model, ids, other)
    assert other.grad is None and counts["captures"] == 1


def test_what_graphs_read_is_kept_until_it_is_known_that_it_changed(model, device, counts):
    model.cuda_graphs()
    args = batch(device)
    same(model, *args)
    weight = model.transformer.layer[0].ffn.lin1.weight
    old = weight.data_ptr()
    weight.data = weight.data.clone()
    held = [t.data_ptr() for t in model._graphs._weights.held]
    assert old in held
    same(model, *args)
    assert old not in [t.data_ptr() for t in model._graphs._weights.held]
    model.to(device)  # changes nothing
    same(model, *args)
    assert counts["captures"] == 2
    model.double()
    assert model._graphs._weights is None and not model._graphs._captured
    same(model, *args)
    assert counts["captures"] == 3
    for training in (False, True):  # calls that no graph serves
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        before = counts["replays"]
        model.train(training)(*args)
        assert counts["replays"] == before + (not training)
        assert model._graphs._weights is None and not model._graphs._captured
        same(model.eval(), *args)
    model.embeddings.word_embeddings.max_norm = 9.0
    same(model, *args)
    assert not model._graphs._weights.held  # of a model that is not captured nothing is kept
    model.transformer.layer[0].ffn.lin1 = torch.nn.Sequential(model.transformer.layer[0].ffn.lin1, torch.nn.Softplus())
    same(model, *args)
    assert not model._graphs._weights.held  # without a graph there is nothing to keep


def test_the_model_may_be_moved_where_a_warning_is_handled(model, device, monkeypatch):
    def fail(*args):
        raise RuntimeError("not now")

    monkeypatch.setattr(graphs, "capture", fail)
    model.cuda_graphs()
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda *args, **kwargs: model.double().float())
        assert model(*batch(device))[0].dtype is torch.float32


def test_compile_and_export_go_by_without_graphs(model, device, monkeypatch):
    ids, keep = batch(device)
    model.cuda_graphs()
    model.requires_grad_(False)
    expected = model(ids, keep)[0]
    if device == "cpu":
        monkeypatch.setattr(graphs, "can_capture", lambda device: not torch.compiler.is_compiling())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, keep)[0], expected, rtol=0, atol=1e-5)
    shapes = {"input_ids": {0: torch.export.Dim("B")}, "attention_mask": {0: torch.export.Dim("B")}}
    exported = torch.export.export(
        model, (), {"input_ids": ids, "attention_mask": keep}, dynamic_shapes=shapes, strict=False
    )
    torch.testing.assert_close(exported.module()(input_ids=ids, attention_mask=keep)[0], expected, rtol=0, atol=1e-5)


def test_what_a_graph_cannot_serve_runs_without(model, device, counts):
    model.cuda_graphs(most=1)
    ids, keep = batch(device)
    same(model, ids, keep)
    same(model, *batch(device, 9, 5))  # a second graph
    for extra in (
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"position_ids": torch.arange(21, device=device).flip(0)},
        {"head_mask": torch.tensor([1.0, 0.0, 0.5], device=device)},
        {"padding_too": True},
    ):
        same(model, ids, keep, **extra)
    assert counts["captures"] == 1
    before = dict(counts)
    model(ids, keep).last_hidden_state.sum().backward()
    assert counts == before
    model.cuda_graphs(False)
    same(model, ids, keep)
    assert counts == before


def test_all_tokens_and_the_first_of_each_text_have_graphs_of_their_own(model, device, counts):
    ids, keep = batch(device)
    keep[1] = keep[1].flip(0)  # padding on the left
    for graphs_on in (False, True):
        model.cuda_graphs(graphs_on)
        with torch.inference_mode():
            whole = model.encode(ids, keep)
            whole = whole.hidden if whole.at is None else whole.at.unpack(whole.hidden)
            first = model.encode(ids, keep, only="first").hidden
            chosen = torch.tensor([[0, 0], [2, 0], [1, 20]], device=device)
            some = model.encode(ids, keep, only=chosen).hidden
            with pytest.raises(ValueError, match="positions must be int64"):
                model.encode(ids, keep, only=chosen.int())
        column = keep.to(torch.int8).argmax(1)
        torch.testing.assert_close(first, whole[torch.arange(3, device=device), column], rtol=0, atol=1e-5)
        torch.testing.assert_close(some, whole[chosen[:, 0], chosen[:, 1]], rtol=0, atol=1e-5)
    assert counts["captures"] == 2


def test_a_transform_runs_without(model, device, counts):
    model.cuda_graphs()
    ids, keep = batch(device)
    with torch.inference_mode():
        for _ in range(2):
            model(ids[:1], keep[:1])
        before = dict(counts)
        mapped = torch.func.vmap(lambda ids, keep: model(ids[None], keep[None])[0])(ids, keep)[:, 0]
        assert counts == before
        torch.testing.assert_close(mapped, model(ids, keep)[0], rtol=0, atol=1e-5)


def test_large_batches_run_without(model, device, counts, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_TOKENS", 127)
    model.cuda_graphs()
    same(model, *batch(device, 4, 30))
    assert counts["captures"] == 0


def test_modes_have_graphs_of_their_own_and_autocast_none(model, device, counts):
    model.cuda_graphs()
    args = batch(device)
    same(model, *args)
    try:
        ops.set_batch_invariant(True)
        same(model, *args)
    finally:
        ops.set_batch_invariant(False)
    assert counts["captures"] == counts["replays"] == 2
    with torch.autocast(device, torch.bfloat16):
        ours, plain = both(model, *args)
        assert torch.equal(ours[0], plain[0])
    assert counts["captures"] == counts["replays"] == 2  # autocast frees its weights: no graph may hold them


def test_captured_in_inference_mode_and_replayed_outside(model, device, counts):
    model.cuda_graphs()
    args = batch(device)
    model.requires_grad_(False)
    with torch.inference_mode():
        first = model(*args)[0]
    with torch.no_grad():
        second = model(*args)[0]
    assert torch.equal(model(*args)[0], second) and torch.equal(first, second) and not second.is_inference()
    assert counts["captures"] == 1 and counts["replays"] == 3


def test_a_failed_capture_warns_once_and_falls_back(model, device, monkeypatch):
    def fail(*args):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "capture", fail)
    model.cuda_graphs()
    with pytest.warns(UserWarning, match="no CUDA graph of a batch of 4 x 32: operation not permitted"):
        same(model, *batch(device))
    same(model, *batch(device))


def test_copies_and_pickles_start_without_graphs(model, device, counts):
    model.cuda_graphs(most=7)
    args = batch(device)
    same(model, *args)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other._graphs.most == 7 and not other._graphs._captured
        same(other, *args)
    assert counts["captures"] == 3


def test_on_cpu_the_opt_in_changes_nothing():
    model = DistilBertModel(DistilBertConfig(vocab_size=99, dim=48, n_heads=3, hidden_dim=80, n_layers=1)).eval()
    ids, keep = batch("cpu")
    model.cuda_graphs()
    with torch.inference_mode():
        model(ids, keep)
    assert not model._graphs._captured


def test_heads_and_adapters_under_graphs(device, counts):
    config = DistilBertConfig(vocab_size=99, dim=48, n_heads=3, hidden_dim=80, n_layers=2, max_position_embeddings=50)
    for name in ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"):
        head = getattr(fastdistil, f"DistilBertFor{name}")(copy.deepcopy(config)).eval().to(device)
        head.add_adapter("a", {"mh_adapter": True})
        ids, keep = batch(device)
        with torch.inference_mode():
            plain, through = head(ids, keep).to_tuple(), head(ids, keep, adapter_names="a").to_tuple()
            counts["replays"] = 0
            assert head.cuda_graphs() is head
            for _ in range(2):
                replayed = head(ids, keep).to_tuple()
            assert counts["replays"] == 2
            for a, b in zip(replayed, plain, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
            for a, b in zip(head(ids, keep, adapter_names="a").to_tuple(), through, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
            assert counts["replays"] == 2, "an adapter is not in the graph"
