"""Named heads: against frozen outputs of the adapters library, and their life: added, chosen, saved, converted."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import fastdistil
from fastdistil import DistilBertConfig, DistilBertModelWithHeads

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-5
TINY = dict(vocab_size=60, dim=24, n_heads=2, hidden_dim=32, n_layers=2, max_position_embeddings=20)
HEADS = ["sentiment", "topics", "score", "tags", "answer", "choice", "words"]


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "adapters.safetensors")


@pytest.fixture
def adapters_model(golden):
    """The model that adapters saved."""
    with safe_open(GOLDEN / "adapters.safetensors", "pt") as file:
        config = DistilBertConfig.from_dict(json.loads(file.metadata()["config"]))
    state = {k.removeprefix("model."): v for k, v in golden.items() if k.startswith("model.")}
    model, report = DistilBertModelWithHeads.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True
    )
    # a second name that adapters has for the word embeddings
    assert report.pop("unexpected_keys") == {"distilbert.prompt_tuning.base_model_embeddings.weight"}
    assert not any(report.values())
    return model


def model_with_heads(**settings):
    torch.manual_seed(0)
    model = DistilBertModelWithHeads(DistilBertConfig(**TINY, **settings)).eval()
    model.add_classification_head("sentiment", num_labels=3)
    model.add_tagging_head("tags", num_labels=5, id2label=dict(enumerate("abcde")))
    model.add_qa_head("answer")
    model.add_multiple_choice_head("choice")
    model.add_masked_lm_head("words")
    return model


def inputs(batch=4, length=9):
    ids = torch.randint(1, 60, (batch, length))
    return ids, torch.arange(length) < torch.tensor([length, 3, 1, 0])[:batch, None]


@pytest.mark.parametrize("name", HEADS)
def test_equal_to_adapters(name, adapters_model, golden):
    """Logits, loss and a gradient."""
    given = {
        k: golden[f"{name}.{k}"] for k in ("labels", "start_positions", "end_positions") if f"{name}.{k}" in golden
    }
    before = {k: v.clone() for k, v in given.items()}
    expected = {k.removeprefix(f"{name}.out."): v for k, v in golden.items() if k.startswith(f"{name}.out.")}
    ids = golden["ids"]
    with torch.inference_mode():
        packed = adapters_model(ids, torch.ones_like(ids), head=name, **given)
    dense = adapters_model(ids, torch.ones_like(ids), head=name, **given)
    for out in (packed, dense):
        assert set(out.keys()) == set(expected)
        for key, value in expected.items():
            torch.testing.assert_close(out[key], value, rtol=1e-5, atol=TOLERANCE, msg=lambda m, k=key: f"{k}: {m}")
    dense.loss.backward()
    gradient = adapters_model.distilbert.transformer.layer[0].ffn.lin1.weight.grad
    torch.testing.assert_close(gradient, golden[f"{name}.gradient"], rtol=1e-4, atol=TOLERANCE)
    assert all(torch.equal(given[k], v) for k, v in before.items()), "a caller's labels are not written to"


def test_a_tagging_loss_leaves_out_the_padding(adapters_model, golden):
    keep = golden["padded"].bool()
    for real in (2, 1):  # any number but 0
        out = adapters_model(golden["ids"], golden["padded"] * real, head="tags", labels=golden["tags.labels"])
        torch.testing.assert_close(out.loss, golden["padded.loss"], rtol=1e-5, atol=TOLERANCE)
    torch.testing.assert_close(out.logits[keep], golden["padded.logits"][keep], rtol=1e-5, atol=TOLERANCE)


def test_a_head_saved_by_adapters_loads(adapters_model, golden, tmp_path):
    model = DistilBertModelWithHeads(DistilBertConfig(**TINY)).eval()
    model.distilbert.load_state_dict(adapters_model.distilbert.state_dict())
    assert model.load_head(GOLDEN / "adapters_head") == (str(GOLDEN / "adapters_head"), "sentiment")
    assert model.active_head == "sentiment"
    torch.testing.assert_close(model(golden["ids"]).logits, golden["sentiment.out.logits"], rtol=1e-5, atol=TOLERANCE)
    model.load_head(GOLDEN / "adapters_head", load_as="mood", id2label={0: "bad", 1: "so so", 2: "good"})
    assert model.active_head == "mood" and model.get_labels() == ["bad", "so so", "good"]
    assert torch.equal(model(golden["ids"]).logits, model(golden["ids"], head="sentiment").logits)
    model.save_all_heads(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mood", "sentiment"]
    other = DistilBertModelWithHeads(model.config).eval()
    other.load_state_dict(model.state_dict())
    torch.nn.init.zeros_(other.heads["mood"][4].weight)
    other.load_head(tmp_path / "mood")
    assert torch.equal(other(golden["ids"]).logits, model(golden["ids"]).logits)
    with safe_open(tmp_path / "mood" / "model_head.safetensors", "pt") as file:
        assert sorted(file.keys()) == [f"heads.mood.{k}" for k in ("1.bias", "1.weight", "4.bias", "4.weight")]


def test_heads_are_added_chosen_and_deleted():
    model = model_with_heads()
    ids, keep = inputs()
    assert model.active_head == "words" and model(ids, keep).logits.shape == (4, 9, 60)
    assert model.get_labels("tags") == list("abcde") and model.get_labels("words") is None
    model.active_head = "sentiment"
    assert model.config.num_labels == 3 and model.get_labels() == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert model(ids, keep).logits.shape == (4, 3)
    assert model(ids, keep, head="choice").logits.shape == (2, 2)
    assert model(ids.view(2, 2, 9), keep.view(2, 2, 9), head="choice").logits.shape == (2, 2)
    assert isinstance(model(ids, keep, return_dict=False), tuple)
    model.delete_head("sentiment")
    assert model.active_head is None and "sentiment" not in model.config.prediction_heads
    assert torch.equal(model(ids, keep)[0], model.distilbert(ids, keep)[0])
    model.add_classification_head("sentiment", num_labels=2)
    with pytest.raises(ValueError, match="there is a head 'sentiment'"):
        model.add_classification_head("sentiment")
    model.add_classification_head("sentiment", num_labels=6, overwrite_ok=True)
    assert model(ids, keep).logits.shape == (4, 6)


@pytest.mark.parametrize("names", [["sentiment", "choice"], ["sentiment", "tags", "answer"], ["words", "sentiment"]])
def test_several_heads_answer_from_one_pass(names):
    model = model_with_heads()
    ids, keep = inputs()
    calls, encode = [], model.distilbert.encode
    model.distilbert.encode = lambda *args, **kwargs: (calls.append(1), encode(*args, **kwargs))[1]
    labels = {
        "sentiment": torch.tensor([0, 1, 2, 0]),
        "tags": torch.randint(0, 5, (4, 9)),
        "answer": (torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 2, 3])),
    }
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            model.active_head = names
            assert model.active_head == names
            out = model(ids, keep)
            assert len(calls) == 1
            assert len(out) == len(names) and out.loss is None and out["head_outputs"] is out.head_outputs
            for name, part in zip(names, out, strict=True):
                alone = model(ids, keep, head=name)
                for a, b in zip(part.to_tuple(), alone.to_tuple(), strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)
            both = model(ids, keep, labels={name: labels[name] for name in names if name in labels})
            torch.testing.assert_close(both.loss, sum(p.loss for p in both if p.loss is not None))
            calls.clear()


def test_saved_with_the_model(tmp_path):
    model = model_with_heads(sinusoidal_pos_embds=True)
    ids, keep = inputs()
    model.save_pretrained(tmp_path)
    again, report = DistilBertModelWithHeads.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert again.heads["words"][3].weight is again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert again.config.prediction_heads == model.config.prediction_heads
    for name in model.heads:
        for a, b in zip(model(ids, keep, head=name).to_tuple(), again(ids, keep, head=name).to_tuple(), strict=True):
            assert torch.equal(a, b)
    base = fastdistil.DistilBertModel.from_pretrained(tmp_path)
    assert torch.equal(base(ids, keep)[0], model.distilbert(ids, keep)[0])


STATIC = {
    "DistilBertForSequenceClassification": {"num_labels": 3},
    "DistilBertForTokenClassification": {"num_labels": 4, "id2label": dict(enumerate("wxyz"))},
    "DistilBertForQuestionAnswering": {"qa_dropout": 0.3},
    "DistilBertForMultipleChoice": {},
    "DistilBertForMaskedLM": {"activation": "relu"},
}


@pytest.mark.parametrize("name", STATIC)
def test_a_static_checkpoint_becomes_head_default_and_goes_back(name, tmp_path):
    torch.manual_seed(0)
    static = getattr(fastdistil, name)(DistilBertConfig(**TINY, **STATIC[name])).eval()
    with torch.no_grad():
        for p in static.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    static.save_pretrained(tmp_path)
    model, report = DistilBertModelWithHeads.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and list(model.heads) == ["default"] and model.active_head == "default"
    ids, keep = inputs()
    if name.endswith("Choice"):
        ids, keep = ids.view(2, 2, 9), keep.view(2, 2, 9)
    back = model.to_static()
    assert type(back) is type(static) and not back.training
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            expected = static(ids, keep).to_tuple()
            for other in (model, back):
                for a, b in zip(expected, other(ids, keep).to_tuple(), strict=True):
                    assert torch.equal(a, b)
    assert [m.p for m in back.layers() if isinstance(m, torch.nn.Dropout)] == [
        m.p for m in static.layers() if isinstance(m, torch.nn.Dropout)
    ]
    assert back.config.id2label == static.config.id2label
    model.save_pretrained(tmp_path / "flexible")
    again = DistilBertModelWithHeads.from_pretrained(tmp_path / "flexible")
    assert torch.equal(again(ids, keep)[0], model(ids, keep)[0])


def test_what_no_static_class_computes_is_not_exported():
    model = model_with_heads()
    model.add_classification_head("relu", num_labels=3, activation_function="relu")
    assert type(model.to_static("relu")).__name__ == "DistilBertForSequenceClassification"
    model.add_classification_head("many", multilabel=True, activation_function="relu")
    assert model.to_static("many").config.problem_type == "multi_label_classification"
    with pytest.raises(ValueError, match="has activation_function 'tanh', but DistilBertForSequenceClassification"):
        model.to_static("sentiment")
    model.add_tagging_head("deep", layers=2)
    with pytest.raises(ValueError, match="has layers 2, but DistilBertForTokenClassification has 1"):
        model.to_static("deep")


@pytest.mark.parametrize("count", [1, 3])
def test_a_regression_stays_one(count, tmp_path):
    torch.manual_seed(0)
    config = DistilBertConfig(**TINY, num_labels=count, problem_type="regression")
    static = fastdistil.DistilBertForSequenceClassification(config).eval()
    static.save_pretrained(tmp_path)
    model = DistilBertModelWithHeads.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "again")
    ids, keep = inputs()
    labels = torch.randn(4, count)
    expected = static(ids, keep, labels=labels).loss
    for other in (model, DistilBertModelWithHeads.from_pretrained(tmp_path / "again"), model.to_static().eval()):
        torch.testing.assert_close(other(ids, keep, labels=labels).loss, expected)
    assert model.to_static().config.problem_type == "regression"


def test_active_adapters_are_not_lost_on_the_way_to_a_static_class():
    model = DistilBertModelWithHeads(DistilBertConfig(**TINY)).eval()
    model.add_classification_head("a", activation_function="relu")
    model.add_adapter("low", "lora", set_active=True)
    torch.nn.init.normal_(model.distilbert.transformer.layer[0].attention.q_lin.loras["low"].lora_B)
    ids, keep = inputs()
    through = model(ids, keep).logits
    with pytest.raises(ValueError, match="adapters low are active, and would be lost; merge_adapter makes a LoRA"):
        model.to_static()
    model.merge_adapter("low")
    static = model.to_static()
    torch.testing.assert_close(static(ids, keep).logits, through, rtol=0, atol=TOLERANCE)
    assert static.adapters_config == {}


def test_a_questions_loss_is_the_static_classs(tmp_path):
    torch.manual_seed(0)
    static = fastdistil.DistilBertForQuestionAnswering(DistilBertConfig(**TINY)).eval()
    static.save_pretrained(tmp_path)
    model = DistilBertModelWithHeads.from_pretrained(tmp_path)
    ids, keep = inputs()
    spans = dict(start_positions=torch.tensor([1, 0, 0, 0]), end_positions=torch.tensor([3, 2, 0, 1]))
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            expected = static(ids, keep, **spans).loss
            assert torch.equal(model(ids, keep, **spans).loss, expected)
            named = model(ids, keep, labels={"default": tuple(spans.values())}).loss
            assert torch.equal(named, expected)


def test_a_head_that_is_not_supported_is_left_out(tmp_path, caplog):
    model = model_with_heads()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["prediction_heads"]["tree"] = {"head_type": "dependency_parsing", "num_labels": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = DistilBertModelWithHeads.from_pretrained(tmp_path)
    assert set(again.heads) == set(model.heads) == set(again.config.prediction_heads)
    assert "head 'tree' of the checkpoint is left out: heads of type 'dependency_parsing'" in caplog.text
    for heads, message in (
        ([1], "config.prediction_heads must map names to heads"),
        ({"a": 5}, r"config.prediction_heads\['a'\]: a head is described by a dictionary, got 5"),
        ({"a": {"head_type": "tagging", "num_labels": "3"}}, r"\['a'\]: a head's num_labels must be an integer"),
        ({"a": {"head_type": "question_answering", "num_labels": 3}}, r"\['a'\]: a head's num_labels is 3; question"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {"prediction_heads": heads}))
        with pytest.raises(ValueError, match=message):
            DistilBertModelWithHeads.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", STATIC)
def test_a_head_saved_by_adapters_from_a_static_class_loads(name, tmp_path):
    """Such a head has no name and no settings, and transformers' names for its layers."""
    torch.manual_seed(0)
    static = getattr(fastdistil, name)(DistilBertConfig(**TINY, **STATIC[name])).eval()
    static.save_pretrained(tmp_path)
    state = {k: v for k, v in static.state_dict().items() if not k.startswith("distilbert.")}
    torch.save(state, tmp_path / "pytorch_model_head.bin")
    labels = static.config.label2id
    description = {"config": None, "hidden_size": 24, "label2id": labels, "model_class": name, "name": None}
    (tmp_path / "head_config.json").write_text(json.dumps(description))
    model = DistilBertModelWithHeads(DistilBertConfig(**TINY, activation=static.config.activation)).eval()
    model.distilbert.load_state_dict(static.distilbert.state_dict())
    assert model.load_head(tmp_path, load_as="z")[1] == "z" and model.load_head(tmp_path)[1] == "default"
    ids, keep = inputs()
    if name.endswith("Choice"):
        ids, keep = ids.view(2, 2, 9), keep.view(2, 2, 9)
    with torch.inference_mode():
        for got, expected in zip(model(ids, keep, head="z").to_tuple(), static(ids, keep).to_tuple(), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


def test_tied_heads_follow_the_vocabulary(tmp_path):
    model = model_with_heads()
    model.save_head(tmp_path, "words")
    words = model.resize_token_embeddings(70)
    assert model.heads["words"][-1].weight is words.weight and model.heads["words"][-1].bias.shape == (70,)
    assert model.config.prediction_heads["words"]["vocab_size"] == 70
    other = model_with_heads()
    torch.nn.init.normal_(other.get_input_embeddings().weight)
    before = other.get_input_embeddings().weight.clone()
    other.load_head(tmp_path, load_as="theirs")  # made for other embeddings, which stay as they are
    assert torch.equal(other.get_input_embeddings().weight, before)
    assert other.heads["theirs"][-1].weight is not other.get_input_embeddings().weight
    other.add_tagging_head("more")
    assert other.heads["theirs"][-1].weight is not other.get_input_embeddings().weight
    other.save_pretrained(tmp_path / "model")
    again = DistilBertModelWithHeads.from_pretrained(tmp_path / "model")
    ids, keep = inputs()
    for name in ("theirs", "words"):
        assert torch.equal(again(ids, keep, head=name).logits, other(ids, keep, head=name).logits)


def test_logits_at_chosen_tokens():
    model = model_with_heads()
    ids, keep = inputs()
    at = torch.tensor([[1, 2], [0, 0]])
    with torch.inference_mode():
        out = model(ids, keep, logits_at=at).logits
        torch.testing.assert_close(out, model(ids, keep).logits[at[:, 0], at[:, 1]], rtol=0, atol=TOLERANCE)
        with pytest.raises(ValueError, match="logits_at is for masked-LM heads, not for tagging"):
            model(ids, keep, head="tags", logits_at=at)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m: m.add_classification_head("a.b"), "cannot be named 'a.b'"),
        (lambda m: m.add_classification_head("keys"), "cannot be named 'keys'"),
        (lambda m: m.add_classification_head("x", num_labels=0), "num_labels must be an integer of 1 or more, got 0"),
        (lambda m: m.add_classification_head("x", activation_function="maybe"), "'maybe' is not one of gelu"),
        (lambda m: m.add_classification_head("x", use_pooler=True), "use_pooler"),
        (lambda m: m.add_classification_head("x", id2label={0: "a"}), "a head of 2 labels needs names for 0 to 1"),
        (lambda m: m.add_prediction_head_from_config("x", {"head_type": "causal_lm"}), "'causal_lm' is not one of"),
        (lambda m: m.add_prediction_head_from_config("x", {"head_type": "tagging", "b": 1}), "no setting 'b'"),
        (lambda m: setattr(m, "active_head", "x"), "there is no head 'x'; there are sentiment, tags"),
        (lambda m: m(torch.ones(1, 3).long(), head="x"), "there is no head 'x'"),
        (lambda m: m(torch.ones(3, 3).long(), head="choice"), "2 choices, which 3 texts do not divide into"),
        (lambda m: m.delete_head("x"), "there is no head 'x'"),
        (lambda m: m.get_labels("x"), "there is no head 'x'"),
        (lambda m: m.save_head("nowhere", "x"), "there is no head 'x'"),
        (lambda m: m.save_head("nowhere", "tags", use_safetensors=False), "only safetensors are written"),
        (lambda m: m.add_tagging_head("training"), "cannot be named 'training'"),
        (lambda m: m.add_qa_head("x", num_labels=3), "question answering has 2"),
        (lambda m: m(torch.ones(1, 3).long(), head=5), "head must be a name or a list of names, got 5"),
        (
            lambda m: m(torch.ones(1, 3).long(), head="tags", labels={"tgas": torch.ones(1, 3).long()}),
            "there are labels for head 'tgas', which does not answer",
        ),
        (
            lambda m: m(torch.ones(1, 3).long(), head="answer", labels=torch.ones(1, 3).long()),
            "takes start_positions and end_positions, not labels",
        ),
        (lambda m: m(torch.ones(1, 3).long(), head="tags", labels=[1]), "labels must be a tensor, got list"),
    ],
)
def test_bad_input(call, error):
    model = model_with_heads()
    names = list(model.heads)
    with pytest.raises((ValueError, TypeError), match=error):
        call(model)
    assert list(model.heads) == names == list(model.config.prediction_heads) and model.active_head == "words"


def test_bad_files(tmp_path):
    model = model_with_heads()
    with pytest.raises(FileNotFoundError, match=r"holds no head_config.json"):
        model.load_head(tmp_path)
    model.save_head(tmp_path, "sentiment")
    config = tmp_path / "head_config.json"
    good = json.loads(config.read_text())
    bad = {
        "hidden_size is 25": good | {"hidden_size": 25},
        "'dependency_parsing' is not one of": good | {"config": {"head_type": "dependency_parsing"}},
        "describes no flexible head": good | {"config": None},
        r"heads.sentiment.4.bias should be \(9,\) by head_config.json, but is \(3,\)": good
        | {"config": good["config"] | {"num_labels": 9, "label2id": None}},
        "heads.other.1.bias should be": good | {"name": "other"},
    }
    for error, description in bad.items():
        config.write_text(json.dumps(description))
        with pytest.raises(ValueError, match=error):
            model.load_head(tmp_path)
    config.write_text("[")
    with pytest.raises(ValueError, match="not a JSON file"):
        model.load_head(tmp_path)
    config.write_text(json.dumps(good))
    (tmp_path / "model_head.safetensors").write_bytes(b"nonsense")
    with pytest.raises(OSError, match="not a readable safetensors file"):
        model.load_head(tmp_path)
    (tmp_path / "model_head.safetensors").unlink()
    with pytest.raises(OSError, match=r"model_head.safetensors"):
        model.load_head(tmp_path)
    with pytest.raises(NotADirectoryError, match="is a file"):
        model.save_head(config, "sentiment")


def left_padded():
    """Texts with padding before them, and what of it is real."""
    ids = torch.randint(1, 60, (3, 9))
    return ids, torch.arange(9) >= torch.tensor([0, 4, 8])[:, None]


@pytest.mark.parametrize("how", ["packed", "states", "attentions", "watched", "gradient"])
def test_a_text_is_classified_by_its_first_token_beside_other_heads(how):
    model = model_with_heads(initializer_range=0.3)
    model.active_head = ["sentiment", "tags"]
    ids, keep = left_padded()
    if how == "watched":
        model.distilbert.transformer.register_forward_hook(lambda *a: None)
    options = {"states": {"output_hidden_states": True}, "attentions": {"output_attentions": True}}.get(how, {})
    with torch.set_grad_enabled(how == "gradient"):
        both = model(ids, keep, position_ids=(keep.cumsum(1) - 1).clamp(min=0), **options)
        for row, real in enumerate(keep):
            alone = model(ids[row, real][None], head="sentiment").logits
            torch.testing.assert_close(both[0].logits[row], alone[0], rtol=0, atol=TOLERANCE)


def test_one_tensor_of_labels_is_no_loss_of_several_heads():
    model = model_with_heads()
    model.add_classification_head("other", num_labels=3)
    ids, keep = inputs(3)
    labels = torch.tensor([0, 1, 2])
    out = model(ids, keep, head=["sentiment", "other"], labels=labels)
    assert out.loss is None and out[0].loss is not None and out[1].loss is not None
    out = model(ids, keep, head=["sentiment", "other"], labels={"sentiment": labels, "other": labels})
    assert torch.equal(out.loss, out[0].loss + out[1].loss)


def test_what_a_static_class_gets_of_a_head():
    model = DistilBertModelWithHeads(DistilBertConfig(**TINY))
    kinds = {"answer": model.add_qa_head, "mood": model.add_classification_head}
    for name, dropout in (("answer", 0.37), ("mood", 0.21)):
        kinds[name](name, layers=1 if name == "answer" else 2, activation_function="relu")
        settings = model.heads_config[name] | {"dropout_prob": dropout}
        if name == "mood":
            settings |= {"id2label": {0: "bad", 1: "good"}}
            settings.pop("label2id")
        model.add_prediction_head_from_config(name, settings, overwrite_ok=True)
    model.add_tagging_head("tags", num_labels=4, id2label=dict(enumerate("abcd")))
    static = model.to_static("mood")
    assert static.config.id2label == {0: "bad", 1: "good"} and static.config.label2id == {"bad": 0, "good": 1}
    assert static.dropout.p == 0.21 and model.to_static("answer").dropout.p == 0.37


def test_labels_by_their_number():
    model = DistilBertModelWithHeads(DistilBertConfig(**TINY))
    model.add_classification_head("a", num_labels=3, id2label={"2": "c", "0": "a", "1": "b"})  # as JSON has them
    assert model.get_labels("a") == ["a", "b", "c"] and model.get_labels_dict("a") == {0: "a", 1: "b", 2: "c"}
    model.add_tagging_head("t", num_labels=2, id2label={1: "y", 0: "x"})
    assert model.get_labels() == ["x", "y"] and model.config.id2label == {0: "x", 1: "y"}


def test_which_layers_of_a_head_have_a_bias():
    model = DistilBertModelWithHeads(DistilBertConfig(**TINY))
    settings = {"head_type": "classification", "layers": 2, "activation_function": "tanh", "bias": False}
    model.add_prediction_head_from_config("a", settings)
    first, last = (m for m in model.heads["a"] if isinstance(m, torch.nn.Linear))
    assert first.bias is not None and last.bias is None


def test_a_frozen_projector_stays_frozen():
    model = DistilBertModelWithHeads(DistilBertConfig(**TINY, tie_word_embeddings=False))
    model.add_masked_lm_head("words")
    model.heads["words"][-1].weight.requires_grad_(False)
    model.resize_token_embeddings(70)
    assert model.heads["words"][-1].weight.shape == (70, 24)
    assert not model.heads["words"][-1].weight.requires_grad


def test_a_tagging_head_that_looks_along_the_text():
    """It gets transformers' states at padded positions, and beside a loss, too."""
    model = model_with_heads(initializer_range=0.3)
    seen = []
    model.heads["tags"].insert(0, Along(seen))
    ids, keep = inputs(3)
    labels = torch.randint(0, 5, (3, 9))
    with torch.inference_mode():
        whole = model.distilbert(ids, keep, padding_too=True)[0]
        for given in ({}, {"labels": labels}):
            model(ids, keep, head="tags", **given)
            torch.testing.assert_close(seen.pop(), whole, rtol=0, atol=TOLERANCE)


class Along(torch.nn.Module):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, x):
        self.seen.append(x)
        return x.cumsum(-2)


def test_a_static_multilabel_head_stays_one(tmp_path):
    static = fastdistil.DistilBertForSequenceClassification(
        DistilBertConfig(**TINY, num_labels=3, problem_type="multi_label_classification")
    )
    static.save_pretrained(tmp_path)
    model = DistilBertModelWithHeads.from_pretrained(tmp_path)
    assert model.heads_config["default"]["head_type"] == "multilabel_classification"
    ids, labels = torch.randint(1, 60, (2, 5)), torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    static.eval()
    torch.testing.assert_close(model(ids, labels=labels).loss, static(ids, labels=labels).loss)


def test_the_last_adapter_names_the_head():
    model = DistilBertModelWithHeads(DistilBertConfig(**TINY))
    for name in "ab":
        model.add_adapter(name, "seq_bn")
        model.add_classification_head(name)
    model.active_head = "a"
    model.set_active_adapters(["a", "b"])
    assert model.active_head == "b"


@pytest.mark.parametrize("numbers", [(0, 0), (0, 2), (1, 2)])
def test_labels_of_other_numbers_are_refused(numbers):
    model = DistilBertModelWithHeads(DistilBertConfig(**TINY))
    settings = {"head_type": "tagging", "num_labels": 2, "label2id": dict(zip("xy", numbers, strict=True))}
    with pytest.raises(ValueError, match="a head of 2 labels needs names for 0 to 1"):
        model.add_prediction_head_from_config("t", settings)


def test_a_head_has_its_own_dropout_and_the_models_dtype():
    model = DistilBertModelWithHeads(DistilBertConfig(**TINY)).double()
    model.add_prediction_head_from_config("t", {"head_type": "tagging", "dropout_prob": 0.37})
    assert [m.p for m in model.heads["t"] if isinstance(m, torch.nn.Dropout)] == [0.37]
    assert {p.dtype for p in model.parameters()} == {torch.float64}
