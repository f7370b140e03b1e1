"""The heads against transformers, on random models, inputs and labels, and what is our own about them."""

import copy
import json
import pickle
import random

import pytest
import torch

import fastdistil
from fastdistil import DistilBertConfig, cpu
from fastdistil.flexible_heads import complete
from fastdistil.layers import FFN

transformers = pytest.importorskip("transformers")

NAMES = [
    "DistilBertForMaskedLM",
    "DistilBertForSequenceClassification",
    "DistilBertForTokenClassification",
    "DistilBertForQuestionAnswering",
    "DistilBertForMultipleChoice",
]
TOLERANCE = 1e-5
TINY = dict(vocab_size=60, dim=24, n_heads=2, hidden_dim=32, n_layers=2, max_position_embeddings=20)


def pair(name, seed=0, attn="eager", **settings):
    """One seed, both libraries, in eval mode."""
    torch.manual_seed(seed)
    theirs = getattr(transformers, name)._from_config(
        transformers.DistilBertConfig(**settings), attn_implementation=attn
    )
    torch.manual_seed(seed)
    ours = getattr(fastdistil, name)(DistilBertConfig(**settings))
    return ours.eval(), theirs.eval()


class Case:
    """A random head, configuration, batch and labels."""

    def __init__(self, seed):
        r = random.Random(seed)
        g = torch.Generator().manual_seed(seed)
        self.seed, self.name = seed, NAMES[seed % len(NAMES)]
        heads = r.choice([1, 2, 3, 4])
        self.settings = dict(
            vocab_size=r.choice([40, 61]),
            dim=heads * r.choice([4, 7, 8, 16]),
            n_heads=heads,
            hidden_dim=r.choice([16, 33]),
            n_layers=r.choice([1, 2, 3]),
            max_position_embeddings=r.choice([16, 21]),
            activation=r.choice(["gelu", "relu", "gelu_new", "silu"]),
            sinusoidal_pos_embds=r.random() < 0.2,
            initializer_range=r.choice([0.02, 0.2]),
        )
        self.attn = r.choice(["eager", "sdpa"])
        self.problem = None
        labels = 2
        if self.name.endswith(("SequenceClassification", "TokenClassification")):
            labels = r.choice([1, 2, 5]) if "Sequence" in self.name else r.choice([2, 7])
            self.settings["num_labels"] = labels
        if self.name.endswith("SequenceClassification"):
            given = [None, "regression"] if labels == 1 else [None, "regression", "single_label_classification"]
            self.problem = r.choice([*given, "multi_label_classification"])
            self.settings["problem_type"] = self.problem
        elif self.name.endswith("MaskedLM"):
            self.settings["tie_word_embeddings"] = r.random() < 0.7
        batch, length, choices = r.choice([1, 3, 4]), r.choice([1, 5, 16]), r.choice([1, 3])
        self.multiple = self.name.endswith("MultipleChoice")
        shape = (batch, choices, length) if self.multiple else (batch, length)
        ids = torch.randint(0, self.settings["vocab_size"], shape, generator=g)
        kind = r.choice(["none", "full", "right", "holes"])
        keep = torch.ones(shape, dtype=torch.bool)
        if kind == "right":
            lengths = torch.randint(1, length + 1, shape[:-1], generator=g)
            keep = torch.arange(length) < lengths[..., None]
        elif kind == "holes":
            keep = torch.rand(shape, generator=g) < 0.7
            keep[..., 0] = True
        self.keep = keep
        self.inputs = {"input_ids": ids}
        if kind != "none":
            self.inputs["attention_mask"] = keep.to(r.choice([torch.int64, torch.float32]))
        if r.random() < 0.3:
            self.inputs["position_ids"] = torch.randint(0, 16, (1, length), generator=g)
        self.at_padding = r.random() < 0.3  # where transformers' loss reads labels, too
        self.labels = {} if r.random() < 0.2 else self._labels(batch, choices, labels, g)
        self.return_dict = r.random() < 0.6
        self.inputs["output_hidden_states"] = r.random() < 0.3
        if self.attn == "eager":
            self.inputs["output_attentions"] = r.random() < 0.3

    def _labels(self, batch, choices, n, g):
        length = self.keep.shape[-1]
        if self.multiple:
            return {"labels": torch.randint(0, choices, (batch,), generator=g)}
        if self.name.endswith("QuestionAnswering"):
            return {
                name: torch.randint(-1, length + 2, (batch,), generator=g)
                for name in ("start_positions", "end_positions")
            }
        if self.name.endswith("SequenceClassification"):
            if self.problem == "multi_label_classification" or (self.problem is None and n > 1 and batch > 1):
                return {"labels": torch.randint(0, 2, (batch, n), generator=g).float()}
            if self.problem == "regression" or n == 1:
                return {"labels": torch.randn(batch, n, generator=g) if n > 1 else torch.randn(batch, generator=g)}
            return {"labels": torch.randint(0, n, (batch,), generator=g)}
        n = self.settings["vocab_size"] if self.name.endswith("MaskedLM") else n
        labels = torch.randint(0, n, self.keep.shape, generator=g)
        labels[torch.rand(self.keep.shape, generator=g) < 0.3] = -100
        labels[:, 0] = 0  # a mean over nothing is NaN
        return {"labels": labels if self.at_padding else labels.where(self.keep, -100)}

    def compare(self, ours, theirs, keys):
        assert len(ours) == len(theirs) == len(keys)
        for key, a, b in zip(keys, ours, theirs, strict=True):
            if isinstance(b, tuple):  # of hidden states, or attentions
                assert len(a) == len(b)
                keep = self.keep.flatten(0, -2)
                for x, y in zip(a, b, strict=True):
                    x, y = (x, y) if key == "hidden_states" else (x.transpose(1, 2), y.transpose(1, 2))
                    torch.testing.assert_close(x[keep], y[keep], rtol=0, atol=TOLERANCE)
                continue
            assert a.shape == b.shape, key
            if a.dim() > 1 and a.shape[:2] == self.keep.shape and not self.multiple and "logits" in key:
                first = self.name.endswith("SequenceClassification")
                a, b = (a, b) if first else (a[self.keep], b[self.keep])
            torch.testing.assert_close(
                a, b, rtol=1e-5, atol=TOLERANCE, equal_nan=True, msg=lambda m, k=key: f"{k}: {m}"
            )


@pytest.mark.parametrize("seed", range(400))
def test_equal_to_transformers(seed):
    case = Case(seed)
    ours, theirs = pair(case.name, seed, case.attn, **case.settings)
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())

    expected = theirs(**case.inputs, **case.labels)
    keys, values = list(expected.keys()), expected.to_tuple()
    for grad in (True, False):  # dense and packed
        with torch.inference_mode(not grad):
            got = ours(**case.inputs, **case.labels, return_dict=case.return_dict)
        assert isinstance(got, tuple) is not case.return_dict
        if case.return_dict:
            assert list(got.keys()) == keys
        case.compare(got if isinstance(got, tuple) else got.to_tuple(), values, keys)
        if grad and case.labels:
            got[0].backward()
    assert ours.config.problem_type == theirs.config.problem_type
    if case.labels:
        expected.loss.backward()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def inputs(batch=4, length=9):
    ids = torch.randint(1, 60, (batch, length))
    return ids, torch.arange(length) < torch.tensor([length, 3, 1, 0])[:batch, None]


@pytest.mark.parametrize("name", NAMES)
def test_padding_says_nothing_and_an_empty_text_is_finite(name):
    ours, _ = pair(name, **TINY)
    ids, keep = inputs()
    if name.endswith("Choice"):
        ids, keep = ids.view(2, 2, 9), keep.view(2, 2, 9)
    with torch.inference_mode():
        packed = ours(ids, keep)
        other = ours(ids.where(keep, 7), keep)
    dense = ours(ids, keep)
    for a, b, c in zip(packed.to_tuple(), other.to_tuple(), dense.to_tuple(), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
        torch.testing.assert_close(a, c, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_left_padding_reads_the_first_real_token(name):
    ours, _ = pair(name, **TINY)
    ids = torch.randint(1, 60, (2, 3, 9))
    shift = torch.zeros(2, 3, 9, dtype=torch.bool)
    shift[..., 4:] = True
    where = torch.arange(9).sub(4).clamp(min=0)[None]
    if not name.endswith("Choice"):
        ids, shift = ids.flatten(0, 1), shift.flatten(0, 1)
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            alone = ours(ids[..., 4:])
            padded = ours(ids, shift, position_ids=where)
        for a, b in zip(alone.to_tuple(), padded.to_tuple(), strict=True):
            b = b if a.shape == b.shape else b[:, 4:]
            torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("packed", [True, False])
def test_logits_at_no_token_are_not_a_neighbours(packed, monkeypatch):
    """Where values are not looked at, as on CUDA."""
    for module in ("inputs", "packing"):
        monkeypatch.setattr(f"fastdistil.{module}.can_look", lambda device: False)
    ours, _ = pair("DistilBertForMaskedLM", **TINY)
    ids, keep = torch.randint(1, 60, (2, 5)), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    at = torch.tensor([[0, 1], [0, 5], [1, -1], [2, 0], [-1, 3], [1, 4]])
    with torch.inference_mode():
        for mask in (keep, None):
            found = ours(ids, mask, logits_at=at, output_attentions=not packed).logits
            full = ours(ids, mask).logits
            torch.testing.assert_close(found[[0, 5]], full[[0, 1], [1, 4]])
            assert found[1:5].isnan().all()


def test_logits_at_chosen_tokens(monkeypatch):
    ours, _ = pair("DistilBertForMaskedLM", **TINY)
    ids, keep = inputs()
    at = torch.tensor([[0, 8], [1, 2], [0, 0], [2, 0]])
    padding = torch.tensor([[1, 5], [3, 0]])
    whole = ours(ids, keep).logits
    seen = watch(monkeypatch)
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            out = ours(ids, keep, logits_at=at, labels=torch.tensor([3, -100, 1, 59]))
            torch.testing.assert_close(out.logits, whole[at[:, 0], at[:, 1]], rtol=0, atol=TOLERANCE)
            assert out.loss.isfinite()
            zeros = ours(ids, keep, logits_at=padding).logits
            torch.testing.assert_close(zeros, whole[padding[:, 0], padding[:, 1]], rtol=0, atol=TOLERANCE)
            full = ours(ids[:2], logits_at=at[:2]).logits
            torch.testing.assert_close(full, ours(ids[:2]).logits[at[:2, 0], at[:2, 1]], rtol=0, atol=TOLERANCE)
            assert ours(ids, keep, logits_at=at[:0]).logits.shape == (0, 60)
    assert seen[:4] == [13, 4, 13, 2], "the last block answers for the chosen tokens alone"


def watch(monkeypatch):
    """How many rows each block's feed-forward network is given, as it comes."""
    seen, hidden, unseen = [], FFN.hidden, cpu.bias_gelu
    monkeypatch.setattr(FFN, "hidden", lambda self, x, live: (seen.append(len(x)), hidden(self, x, live))[1])
    monkeypatch.setattr(cpu, "bias_gelu", lambda x, *more: (seen.append(len(x)), unseen(x, *more))[1])
    return seen


def test_a_classifier_reads_the_first_token_alone_in_the_last_block(monkeypatch):
    ours, _ = pair("DistilBertForSequenceClassification", **TINY)
    seen = watch(monkeypatch)
    with torch.inference_mode():
        ours(*inputs())
    assert seen == [13, 4]


@pytest.mark.parametrize("name", ["DistilBertForMaskedLM", "DistilBertForTokenClassification"])
def test_labels_without_padding_leave_the_packed_path_alone(name, monkeypatch):
    """Only a label at padding, or a question's answer, makes the loss read what is there."""
    ours, theirs = pair(name, **TINY)
    ids, keep = inputs(3)
    labels = torch.randint(0, 2, (3, 9)).where(keep, -100)
    seen = watch(monkeypatch)
    for wanted in (labels, labels.where(keep, 1)):
        seen.clear()
        with torch.inference_mode():
            got = ours(ids, keep, labels=wanted).loss
            torch.testing.assert_close(got, theirs(ids, keep, labels=wanted).loss, rtol=0, atol=TOLERANCE)
        assert bool(seen) is (wanted is labels)
    nonsense = ids.where(keep, 10**6)  # in the padding there need not be a token
    with torch.inference_mode():
        assert ours(nonsense, keep, labels=labels.where(keep, 1)).loss.isfinite()


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int16])
def test_labels_that_are_no_class_numbers_are_many_labels(kind):
    ours, _ = pair("DistilBertForSequenceClassification", **TINY, num_labels=3)
    labels = torch.tensor([[1, 0, 1], [0, 0, 1]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        ours(torch.ones(2, 4).long()).logits, labels.float()
    )
    torch.testing.assert_close(ours(torch.ones(2, 4).long(), labels=labels.to(kind)).loss, expected)
    assert ours.config.problem_type == "multi_label_classification"


def test_a_query_that_may_attend_to_nothing_attends_to_everything():
    ours, _ = pair("DistilBertForTokenClassification", **TINY)
    ids, _ = inputs()
    keep = torch.ones(4, 1, 9, 9, dtype=torch.bool)
    keep[1, 0, 2] = False
    expected = ours(ids).logits
    for mask in (keep, keep.long(), torch.zeros(4, 1, 9, 9).masked_fill(~keep, -torch.inf)):
        for attentions in (False, True):
            got = ours(ids, mask, output_attentions=attentions).logits
            torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_save_by_either_loads_in_the_other(name, tied, tmp_path):
    _, theirs = pair(name, **TINY, tie_word_embeddings=tied)
    ids = torch.randint(1, 60, (2, 2, 9) if name.endswith("Choice") else (2, 9))
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        expected = theirs(ids).to_tuple()
    theirs.save_pretrained(tmp_path / "theirs")
    loaded, report = getattr(fastdistil, name).from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(report.values())
    loaded.save_pretrained(tmp_path / "ours")
    back, report = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    base = fastdistil.DistilBertModel.from_pretrained(tmp_path / "ours")
    with torch.inference_mode():
        for a, b, c in zip(expected, loaded(ids).to_tuple(), back(ids).to_tuple(), strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=TOLERANCE)
            torch.testing.assert_close(c, a, rtol=0, atol=TOLERANCE)
        flat = ids.flatten(0, -2)
        assert torch.equal(base(flat)[0], loaded.distilbert(flat)[0])
    if name.endswith("LM"):
        words = loaded.get_input_embeddings().weight
        assert (loaded.get_output_embeddings().weight is words) is tied


def test_tied_weights(tmp_path):
    ours, _ = pair("DistilBertForMaskedLM", **TINY)
    key, words = "vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"
    assert ours.vocab_projector.weight is ours.get_input_embeddings().weight
    assert {key, words} < set(ours.state_dict())
    ours.save_pretrained(tmp_path)
    with fastdistil.checkpoint.Weights(tmp_path, None) as weights:
        assert key not in weights.shapes and words in weights.shapes
    state = ours.state_dict()
    for missing in (key, words):
        part = {k: v for k, v in state.items() if k != missing}
        loaded, report = type(ours).from_pretrained(None, config=ours.config, state_dict=part, output_loading_info=True)
        assert not any(report.values()) and loaded.vocab_projector.weight is loaded.get_input_embeddings().weight
        assert torch.equal(loaded.vocab_projector.weight, ours.vocab_projector.weight)
    other = type(ours).from_pretrained(None, config=ours.config, state_dict=state | {key: state[key] + 1})
    assert other.vocab_projector.weight is not other.get_input_embeddings().weight
    assert torch.equal(other.vocab_projector.weight, state[key] + 1)
    other.save_pretrained(tmp_path / "untied")
    again = type(ours).from_pretrained(tmp_path / "untied")
    assert torch.equal(again.vocab_projector.weight, state[key] + 1)
    assert torch.equal(again.get_input_embeddings().weight, state[key])
    for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), ours.to(torch.float64)):
        assert clone.vocab_projector.weight is clone.get_input_embeddings().weight


@pytest.mark.parametrize("tied", [True, False])
def test_resized_vocabulary(tied):
    ours, theirs = pair("DistilBertForMaskedLM", **TINY, tie_word_embeddings=tied)
    for n in (50, 71):
        words = ours.resize_token_embeddings(n, mean_resizing=False)
        theirs.resize_token_embeddings(n, mean_resizing=False)
        out = ours.get_output_embeddings()
        assert words is ours.get_input_embeddings() and ours.config.vocab_size == n == out.out_features
        assert out.weight.shape == (n, 24) and out.bias.shape == (n,) and (out.weight is words.weight) is tied
        assert ours(torch.ones(1, 3, dtype=torch.int64)).logits.shape == (1, 3, n)
        kept = min(n, 50)
        assert torch.equal(out.weight[:kept], theirs.get_output_embeddings().weight[:kept])
    assert ours.resize_token_embeddings(71).weight is words.weight
    ours.get_output_embeddings().bias.data.uniform_()
    mean = ours.get_output_embeddings().bias.mean()
    ours.resize_token_embeddings(73)
    torch.testing.assert_close(ours.get_output_embeddings().bias[71:].mean(), mean * 0 if tied else mean)


@pytest.mark.parametrize("how", ["hook", "patched forward"])
def test_a_watched_encoder_gives_the_same_loss(how):
    ours, theirs = pair("DistilBertForQuestionAnswering", **TINY)
    ids, keep = inputs(3)
    spans = dict(start_positions=torch.tensor([1, 0, 0]), end_positions=torch.tensor([3, 2, 0]))
    if how == "hook":
        ours.distilbert.register_forward_hook(lambda *a: None)
    else:
        ours.distilbert.forward = ours.distilbert.forward
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got, expected = ours(ids, keep, **spans).loss, theirs(ids, keep, **spans).loss
        torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["DistilBertForMaskedLM", "DistilBertForTokenClassification"])
@pytest.mark.parametrize("shape", [(-1,), (3, 9, 1)], ids=["flat", "with a dimension more"])
def test_flat_labels_at_padding(name, shape):
    ours, theirs = pair(name, **TINY)
    ids, keep = inputs(3)
    labels = torch.randint(0, 2, (3, 9))
    with torch.inference_mode():
        expected = theirs(ids, keep, labels=labels).loss
        torch.testing.assert_close(ours(ids, keep, labels=labels.reshape(shape)).loss, expected, rtol=0, atol=TOLERANCE)


def test_a_head_of_somebodys_own_gets_padded_states():
    """An LSTM looks along the text, and a hook expects [batch, length, labels]."""
    ours, theirs = pair("DistilBertForTokenClassification", **TINY)
    ids, keep = inputs(3)

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = torch.nn.LSTM(24, 8, bidirectional=True, batch_first=True)
            self.out = torch.nn.Linear(16, 2)

        def forward(self, x):
            return self.out(self.rnn(x)[0])

    seen = []
    ours.classifier.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    with torch.inference_mode():
        ours(ids, keep)
        assert seen == [(3, 9, 2)]
        ours.classifier = theirs.classifier = Head().eval()
        for mask in (keep, None):
            got, expected = ours(ids, mask).logits, theirs(ids, mask).logits
            torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


def test_word_embeddings_of_somebodys_own():
    ours, theirs = pair("DistilBertForTokenClassification", **TINY)
    ids, keep = inputs(3)

    class Scaled(torch.nn.Module):
        def __init__(self, table):
            super().__init__()
            self.table = table

        def forward(self, ids):
            return self.table(ids) * 2

    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs) * 2

    for model in (ours, theirs):
        words = model.distilbert.embeddings.word_embeddings
        model.distilbert.embeddings.word_embeddings = Scaled(words)
    for _ in range(2):
        with torch.inference_mode():
            got, expected = ours(ids, keep).logits, theirs(ids, keep).logits
        torch.testing.assert_close(got[keep], expected[keep], rtol=0, atol=TOLERANCE)
        for model in (ours, theirs):
            model.distilbert.embeddings = Wrapped(model.distilbert.embeddings)


@pytest.mark.parametrize("name", NAMES)
def test_a_hook_on_the_encoder_is_run(name):
    ours, theirs = pair(name, **TINY)
    ids, keep = inputs(3)
    if name.endswith("Choice"):
        ids, keep = ids[:2, None].expand(2, 2, 9), keep[:2, None].expand(2, 2, 9)
    with torch.inference_mode():
        expected = ours(ids, keep).to_tuple()
    seen = []
    ours.distilbert.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for a, b in zip(ours(ids, keep).to_tuple(), expected, strict=True):
                torch.testing.assert_close(a.detach(), b, rtol=0, atol=TOLERANCE)
    hidden = theirs.distilbert(ids.flatten(0, -2), keep.flatten(0, -2))[0]
    assert len(seen) == 2
    for state in seen:
        torch.testing.assert_close(state[keep.flatten(0, -2)], hidden[keep.flatten(0, -2)], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("DistilBertForSequenceClassification", dict(labels=[1, 0]), "labels must be a tensor, got list"),
        ("DistilBertForTokenClassification", dict(labels=3), "labels must be a tensor, got int"),
        ("DistilBertForMaskedLM", dict(labels=[[1]]), "labels must be a tensor, got list"),
        (
            "DistilBertForQuestionAnswering",
            dict(start_positions=[1], end_positions=[1]),
            "start_positions must be a ten",
        ),
    ],
)
def test_labels_of_a_wrong_type(name, labels, message):
    ours, _ = pair(name, **TINY)
    with pytest.raises(TypeError, match=message):
        ours(torch.ones(2, 3, dtype=torch.int64), **labels)


def test_a_bert_masked_lm_converts_exactly(tmp_path):
    torch.manual_seed(0)
    bert = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=60, hidden_size=24, num_attention_heads=2, num_hidden_layers=2, intermediate_size=32,
            max_position_embeddings=20,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for p in bert.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    bert.save_pretrained(tmp_path)
    ours, report = fastdistil.DistilBertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    ids, keep = inputs(3)
    with torch.inference_mode():
        a, b = ours(ids, keep).logits, bert(ids, keep.long()).logits
    torch.testing.assert_close(a[keep], b[keep], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_exports_and_trains_with_a_frozen_encoder(name):
    ours, _ = pair(name, **TINY)
    ids, keep = inputs(3)
    if name.endswith("Choice"):
        ids, keep = ids[:2, None].expand(2, 2, 9), keep[:2, None].expand(2, 2, 9)
    key = "start_logits" if name.endswith("Answering") else "logits"
    with torch.inference_mode():
        expected = ours(ids, keep)[key]
    with torch.no_grad():
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids, keep)[key], expected, rtol=0, atol=TOLERANCE)
        program = torch.export.export(ours, (ids, keep), strict=False).module()
        torch.testing.assert_close(program(ids, keep)[key], expected, rtol=0, atol=TOLERANCE)
    ours.distilbert.requires_grad_(False)
    out = ours(ids, keep)[key]
    torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE)
    out.square().sum().backward()
    for parameter, p in ours.named_parameters():
        assert (p.grad is not None) is p.requires_grad, parameter


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name, dtype):
    ours, _ = pair(name, **TINY)
    ids, keep = inputs(3)
    if name.endswith("Choice"):
        ids, keep = ids[:, None], keep[:, None]
    with torch.inference_mode():
        expected = ours(ids, keep).to_tuple()
        with torch.autocast("cpu", dtype):
            cast = ours(ids, keep).to_tuple()
        half = ours.to(dtype)(ids, keep).to_tuple()
    for a, b, c in zip(expected, cast, half, strict=True):
        assert c.dtype is dtype
        torch.testing.assert_close(b.float(), a, rtol=0, atol=0.02)
        torch.testing.assert_close(c.float(), a, rtol=0, atol=0.02)


def test_labels_that_give_no_loss_fix_nothing():
    model = fastdistil.DistilBertForSequenceClassification(DistilBertConfig(**TINY, num_labels=3)).eval()
    ids = torch.randint(1, 60, (2, 5))
    with pytest.raises(ValueError, match="6 values for multi_label_classification"):
        model(ids, labels=torch.tensor([0.0, 1.0]))
    assert model.config.problem_type is None and model(ids, labels=torch.tensor([0, 1])).loss.isfinite()


def test_a_multiple_choice_of_nothing():
    model = fastdistil.DistilBertForMultipleChoice(DistilBertConfig(**TINY)).eval()
    with pytest.raises(TypeError, match="the input must be a tensor, got list"):
        model([[1, 2]])
    with pytest.raises(ValueError, match=r"takes input_ids \[batch, choices, length\].*got \[2, 0, 4\]"):
        model(torch.ones(2, 0, 4, dtype=torch.long))


def test_flat_labels_of_a_tagging_head():
    model = fastdistil.DistilBertModelWithHeads(DistilBertConfig(**TINY)).eval()
    model.add_tagging_head("names", num_labels=3)
    ids, mask = torch.randint(1, 60, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    labels = torch.randint(0, 3, (2, 5))
    expected = model(ids, mask, labels=labels).loss
    torch.testing.assert_close(model(ids, mask, labels=labels.flatten()).loss, expected)
    with pytest.raises(ValueError, match="labels must be 10 integers"):
        model(ids, mask, labels=labels[:, :4])
    for labels in ({"a": [0]}, {"a": 0, "b": "1"}):
        with pytest.raises(ValueError, match="a head of 2 labels needs names for 0 to 1"):
            complete({"head_type": "tagging", "num_labels": 2, "label2id": labels}, model.config)


def test_the_first_labels_fix_the_problem_type():
    config = DistilBertConfig(**TINY, num_labels=3)
    ours = fastdistil.DistilBertForSequenceClassification(config).eval()
    ids, _ = inputs(2)
    assert ours(ids).loss is None and config.problem_type is None
    ours(ids, labels=torch.tensor([0, 2], dtype=torch.int32))  # transformers refuses int32
    assert config.problem_type == "single_label_classification"
    with pytest.raises(ValueError, match="labels must be 2 integers"):
        ours(ids, labels=torch.zeros(2, 3))


def test_a_callers_labels_are_left_as_they_are():
    ours, _ = pair("DistilBertForQuestionAnswering", **TINY)
    ids, _ = inputs(2)
    start, end = torch.tensor([-3, 100]), torch.tensor([[5], [2]])
    ours(ids, start_positions=start, end_positions=end)
    assert start.tolist() == [-3, 100] and end.tolist() == [[5], [2]]
    assert ours(ids, start_positions=start).loss is None


@pytest.mark.parametrize(
    ("name", "kwargs", "error"),
    [
        (
            "DistilBertForSequenceClassification",
            {"labels": torch.tensor([0, 2])},
            r"labels\[1\] is 2, but there are 2 classes",
        ),
        ("DistilBertForSequenceClassification", {"labels": torch.tensor([0])}, "labels must be 2 integers"),
        ("DistilBertForSequenceClassification", {"labels": torch.zeros(2, 3)}, "labels must hold 4 values"),
        ("DistilBertForTokenClassification", {"labels": torch.full((2, 9), -1)}, r"labels\[0, 0\] is -1"),
        ("DistilBertForTokenClassification", {"labels": torch.zeros(2, 9)}, "labels must be 18 integers"),
        ("DistilBertForMaskedLM", {"labels": torch.full((2, 9), 60)}, r"labels\[0, 0\] is 60"),
        ("DistilBertForMaskedLM", {"logits_at": torch.tensor([[0, 9]])}, r"\(0, 9\), outside the batch of \[2, 9\]"),
        ("DistilBertForMaskedLM", {"logits_at": torch.tensor([0, 1])}, r"must be int64 \[n, 2\]"),
        (
            "DistilBertForQuestionAnswering",
            {"start_positions": torch.zeros(3).long(), "end_positions": torch.zeros(2).long()},
            "start_positions must be 2 integers",
        ),
        (
            "DistilBertForQuestionAnswering",
            {"start_positions": torch.zeros(2).long(), "end_positions": torch.zeros(2)},
            "end_positions must be 2 integers",
        ),
        ("DistilBertForMultipleChoice", {}, r"\[batch, choices, length\], or inputs_embeds, got \[2, 9\]"),
    ],
)
def test_bad_input(name, kwargs, error):
    ours, _ = pair(name, **TINY)
    with pytest.raises(ValueError, match=error):
        ours(inputs(2)[0], **kwargs)
    with pytest.raises(ValueError, match="num_labels is 3"):
        fastdistil.DistilBertForQuestionAnswering(DistilBertConfig(**TINY, num_labels=3))


@pytest.mark.parametrize("name", NAMES)
def test_no_text_at_all(name):
    ours, _ = pair(name, **TINY)
    shape = (0, 2, 5) if name.endswith("Choice") else (0, 5)
    with torch.inference_mode():
        out = ours(torch.zeros(shape, dtype=torch.int64))
    assert len(out[0]) == 0


def test_positions_of_each_choice():
    """transformers flattens everything but position_ids."""
    ours, _ = pair("DistilBertForMultipleChoice", **TINY)
    ids, positions = torch.randint(1, 60, (2, 3, 9)), torch.randint(0, 20, (2, 3, 9))
    with torch.inference_mode():
        found = ours(ids, position_ids=positions).logits
        one = [
            ours(i[None, None], position_ids=p[None, None]).logits for i, p in zip(ids[0], positions[0], strict=True)
        ]
    torch.testing.assert_close(found[0], torch.cat(one).flatten(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("eps", [1e-12, 1e-3])
@pytest.mark.parametrize("name", ["MaskedLM", "TokenClassification", "QuestionAnswering"])
def test_heads_of_bert(name, eps, tmp_path):
    """Their checkpoints load into our class of the name, and as a flexible model's head."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=20, layer_norm_eps=eps, initializer_range=0.3,
    )  # fmt: skip
    theirs = getattr(transformers, f"BertFor{name}")(config).eval()
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(0, 60, (3, 9))
    with torch.inference_mode():
        expected = theirs(ids)[0]
        for cls in (getattr(fastdistil, f"DistilBertFor{name}"), fastdistil.DistilBertModelWithHeads):
            ours, report = cls.from_pretrained(tmp_path, output_loading_info=True)
            assert not report["missing_keys"]
            torch.testing.assert_close(ours(ids)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_head_that_is_watched_before_its_call():
    """Its hook sees padded states, and what it changes counts."""
    ours, theirs = pair("DistilBertForTokenClassification", **TINY, initializer_range=0.3)
    seen = []
    for model in (ours, theirs):
        model.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape) or (args[0] * 2,))
    ids, keep = torch.randint(1, 60, (3, 9)), torch.arange(9) < torch.tensor([9, 4, 1])[:, None]
    with torch.inference_mode():
        found, expected = ours(ids, keep).logits, theirs(ids, attention_mask=keep.long()).logits
    assert seen == [(3, 9, 24)] * 2
    torch.testing.assert_close(found[keep], expected[keep], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["DistilBertForTokenClassification", "DistilBertForQuestionAnswering"])
def test_logits_at_padding_are_those_of_zeros(name):
    ours, _ = pair(name, **TINY)
    layer = ours.classifier if name.endswith("TokenClassification") else ours.qa_outputs
    with torch.no_grad():
        layer.bias.normal_()
    ids, keep = torch.randint(1, 60, (3, 9)), torch.arange(9) < torch.tensor([9, 4, 1])[:, None]
    with torch.inference_mode():
        out = ours(ids, keep).to_tuple()
    logits = torch.stack(out, -1) if len(out) == 2 else out[0]
    assert (logits[~keep] == layer.bias).all()


def test_a_mask_for_every_pair_of_tokens_of_choices():
    ours, _ = pair("DistilBertForMultipleChoice", **TINY, initializer_range=0.3)
    ids, keep = torch.randint(1, 60, (2, 3, 9)), torch.arange(9) < torch.tensor([[9, 4, 2], [1, 5, 8]])[..., None]
    pairs = keep.flatten(0, 1)[:, None, None].expand(6, 1, 9, 9)
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids, pairs).logits, ours(ids, keep).logits, rtol=0, atol=TOLERANCE)


def test_a_mask_of_another_batch_beside_labels():
    ours, _ = pair("DistilBertForTokenClassification", **TINY)
    labels = torch.zeros(3, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"attention_mask must be \[3, 5\], got \[2, 5\]"):
        ours(torch.ones(3, 5, dtype=torch.long), torch.ones(2, 5), labels=labels)


def test_a_saved_head_with_other_labels(tmp_path):
    """One more than the model has: its weights load, the names do not."""
    ours, _ = pair("DistilBertForSequenceClassification", **TINY)
    ours.add_adapter("a", "lora")
    ours.save_adapter(tmp_path, "a")
    told = json.loads((tmp_path / "head_config.json").read_text())
    for label2id, expected in (({"x": 0, "y": 1}, {0: "x", 1: "y"}), ({"x": 0, "y": 1, "z": 2}, {0: "x", 1: "y"})):
        (tmp_path / "head_config.json").write_text(json.dumps(told | {"label2id": label2id}))
        ours.load_adapter(tmp_path)
        assert ours.config.id2label == expected


def test_a_loaded_head_leaves_the_word_embeddings_alone(tmp_path):
    """Whose projector was tied to other ones, or to the same."""
    ours, other = (pair("DistilBertForMaskedLM", seed, **TINY)[0] for seed in (0, 1))
    ours.add_adapter("a", "lora")
    ours.save_adapter(tmp_path, "a")
    words = other.get_input_embeddings().weight
    before = words.detach().clone()
    other.load_adapter(tmp_path)
    assert torch.equal(words, before) and other.vocab_projector.weight is not words
    assert torch.equal(other.vocab_projector.weight, ours.vocab_projector.weight)
    ours.load_adapter(tmp_path)
    assert ours.vocab_projector.weight is ours.get_input_embeddings().weight


def test_frozen_words_stay_frozen_in_another_size():
    ours, _ = pair("DistilBertForMaskedLM", **TINY, tie_word_embeddings=False)
    ours.requires_grad_(False)
    ours.resize_token_embeddings(70)
    ours.resize_position_embeddings(30)
    assert not any(p.requires_grad for p in ours.parameters())
    assert ours.vocab_projector.bias.shape == (70,)


def test_a_copy_of_an_output_without_a_loss():
    out = fastdistil.outputs.SequenceClassifierOutput(logits=torch.ones(1, 2))
    for found in (copy.copy(out), copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
        assert found.loss is None and torch.equal(found.logits, out.logits) and list(found) == ["logits"]


@pytest.mark.parametrize("name", ["DistilBertForSequenceClassification", "DistilBertForMultipleChoice"])
def test_a_watched_encoder_is_read_at_the_first_real_token(name):
    """Behind padding, as without the hook."""
    torch.manual_seed(0)
    model = getattr(fastdistil, name)(DistilBertConfig(**TINY)).eval()
    ids = torch.randint(1, 60, (4, 9))
    keep = torch.arange(9) >= torch.tensor([0, 3, 8, 5])[:, None]
    if name.endswith("Choice"):
        ids, keep = ids[None], keep[None]
    with torch.inference_mode():
        expected = model(ids, keep).logits
        seen = []
        model.distilbert.register_forward_hook(lambda module, args, out: seen.append(out[0].shape))
        found = model(ids, keep).logits
        other = model(ids).logits
    assert seen == [(4, 9, 24)] * 2 and not torch.allclose(other, expected, atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_a_projector_of_a_size_of_its_own_stays():
    """A vocabulary that was never the words' is not changed with them."""
    model = fastdistil.DistilBertForMaskedLM(DistilBertConfig(**TINY, tie_word_embeddings=False))
    model.set_output_embeddings(torch.nn.Linear(24, 7))
    kept = model.vocab_projector.weight
    for n in (70, 50):
        model.resize_token_embeddings(n)
        assert model.vocab_projector.weight is kept and model.vocab_projector.out_features == 7
        assert len(model.vocab_projector.bias) == 7 and model.config.vocab_size == n
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 7)


@pytest.mark.parametrize(("n", "left"), [(49, None), (50, None), (51, 50), (70, 50)])
def test_a_padding_token_that_is_cut_off(n, left):
    model = fastdistil.DistilBertModel(DistilBertConfig(**TINY, pad_token_id=50))
    words = model.resize_token_embeddings(n)
    assert words.padding_idx == left and len(words.weight) == n
    assert model(torch.tensor([[1, n - 1]])).last_hidden_state.shape == (1, 2, 24)
