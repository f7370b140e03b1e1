"""`fastdistil verify`: right models pass, broken ones do not."""

import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastdistil
from fastdistil import DistilBertConfig, DistilBertTokenizer, cpu
from fastdistil.cli import main
from fastdistil.verify import Line, Report, _decisions, verify

NAMES = [
    "DistilBertModel",
    "DistilBertForMaskedLM",
    "DistilBertForSequenceClassification",
    "DistilBertForTokenClassification",
    "DistilBertForQuestionAnswering",
    "DistilBertForMultipleChoice",
]


@pytest.fixture
def saved(minilm, tmp_path):
    def save(name, change=lambda model: None):
        torch.manual_seed(0)
        config = dict(vocab_size=30522, dim=24, n_heads=2, hidden_dim=32, n_layers=2, max_position_embeddings=64)
        model = getattr(fastdistil, name)(DistilBertConfig(**config))
        change(model)
        model.save_pretrained(tmp_path)
        DistilBertTokenizer.from_pretrained(minilm).save_pretrained(tmp_path)
        return tmp_path

    return save


@pytest.mark.parametrize("name", NAMES)
def test_a_right_model_passes(name, saved, capsys):
    path = saved(name)
    report = verify(path, device="cpu")
    assert report.holds and report.model == name
    ours = [line.name for line in report.lines if not line.name.startswith("transformers")]
    assert ours[:3] == ["embeddings", "layer 1", "layer 2"] and len(ours) == len(set(ours))
    head = {"DistilBertModel": [], "DistilBertForQuestionAnswering": ["start_logits", "end_logits"]}.get(
        name, ["logits"]
    )
    assert ours[3:] == head and (report.flips is None) is (not head)
    assert main(["verify", str(path), "--device", "cpu"]) == 0
    assert "all within bounds" in capsys.readouterr().out


def test_real_weights_and_transformers(minilm, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    report = verify(minilm, ["a text of the user's", "and another"], device="cpu")
    assert report.holds and report.cosine > 1 - 1e-9 and f"transformers {transformers.__version__}" in report.peer
    assert [line.name for line in report.lines][-1] == "transformers layer 6"
    (tmp_path / "in.txt").write_text("one\ntwo\n")
    assert main(["verify", str(minilm), "--device", "cpu", "--input", str(tmp_path / "in.txt")]) == 0


def test_a_flexible_checkpoint_without_a_head(saved, tmp_path, minilm, capsys):
    fastdistil.DistilBertModelWithHeads.from_pretrained(saved("DistilBertModel")).save_pretrained(tmp_path)
    DistilBertTokenizer.from_pretrained(minilm).save_pretrained(tmp_path)
    assert main(["verify", str(tmp_path), "--device", "cpu"]) == 0
    assert "all within bounds" in capsys.readouterr().out


def test_half_precision(saved):
    report = verify(saved("DistilBertForTokenClassification"), device="cpu", dtype="bfloat16")
    assert report.holds and "bfloat16" in report.where


def test_a_wrong_op_is_found(saved, monkeypatch, capsys):
    path = saved("DistilBertForTokenClassification")
    right = cpu._attend
    monkeypatch.setattr(cpu, "_attend", lambda q, k, v: right(q, k, v * 1.001))
    report = verify(path, device="cpu")
    wrong = [line.name for line in report.lines if not line.holds]
    assert not report.holds and "layer 1" in wrong and "embeddings" not in wrong
    assert "TOO LARGE" in str(report) and "NOT WITHIN BOUNDS" in str(report)
    assert main(["verify", str(path), "--device", "cpu"]) == 1
    assert "is not computed within bounds" in capsys.readouterr().err


def test_nan_weights_are_named(saved):
    def spoil(model):
        with torch.no_grad():
            model.transformer.layer[1].ffn.lin2.bias[3] = float("nan")

    report = verify(saved("DistilBertModel", spoil), device="cpu")
    assert not report.holds and report.not_finite == ["transformer.layer.1.ffn.lin2.bias"]
    assert "NOT FINITE: transformer.layer.1.ffn.lin2.bias" in str(report)


def drop(path, part):
    tensors = load_file(path / "model.safetensors")
    left = {name: tensor for name, tensor in tensors.items() if part not in name}
    assert len(left) < len(tensors)
    save_file(left, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["classifier", "layer.1"])
def test_missing_weights_do_not_pass(part, saved, capsys):
    path = saved("DistilBertForSequenceClassification")
    drop(path, part)
    report = verify(path, device="cpu")
    assert not report.holds and report.missing and all(part in name for name in report.missing)
    ours = [line for line in report.lines if not line.name.startswith("transformers")]
    assert all(line.holds and line.allowed < 1e-4 for line in ours), "random as it is, both sides have the same"
    assert main(["verify", str(path), "--device", "cpu"]) == 1
    assert f"MISSING: {report.missing[0]}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification", "BertForMultipleChoice"])
def test_heads_of_bert(name, minilm, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=24, num_attention_heads=2, num_hidden_layers=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    model = getattr(transformers, name)(config)
    model.save_pretrained(tmp_path)
    DistilBertTokenizer.from_pretrained(minilm).save_pretrained(tmp_path)
    report = verify(tmp_path, device="cpu")
    covered = name == "BertForMaskedLM"
    assert report.holds and report.model == ("DistilBertForMaskedLM" if covered else "DistilBertModel")
    assert covered or ("classifier.weight" in report.unused and "and not checked" in str(report))
    head = model.cls.predictions.transform.dense if covered else model.classifier
    with torch.no_grad():
        head.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    assert not verify(tmp_path, device="cpu").holds


def test_decisions_are_counted_as_they_are_taken(saved, monkeypatch):
    """One for every text, for every real token, or for every label of every text."""
    counts = {}
    for name in NAMES[1:]:
        counts[name] = verify(saved(name), ["a b", "c"], device="cpu").flips
    assert counts == {
        "DistilBertForMaskedLM": (0, 7),
        "DistilBertForSequenceClassification": (0, 2),
        "DistilBertForTokenClassification": (0, 7),
        "DistilBertForQuestionAnswering": (0, 4),
        "DistilBertForMultipleChoice": (0, 1),
    }

    def many(model):
        model.config.problem_type = "multi_label_classification"

    assert verify(saved("DistilBertForSequenceClassification", many), ["a b", "c"], device="cpu").flips == (0, 4)
    with pytest.raises(TypeError, match="texts must be a list of one text or more, got 'abc'"):
        verify(saved("DistilBertModel"), "abc", device="cpu")


def test_a_missing_checkpoint(capsys):
    assert main(["verify", "./nowhere"]) == 1
    assert "there is no directory" in capsys.readouterr().err


def test_decisions_that_differ_are_counted(saved, monkeypatch):
    report = verify(saved("DistilBertForMaskedLM"), device="cpu")
    assert report.flips is not None and report.flips[0] == 0 < report.flips[1]
    monkeypatch.setattr(cpu, "bias_gelu", lambda x, weight, *rest: 1e3 * torch.randn(len(x), len(weight)))
    wrong = verify(saved("DistilBertForMaskedLM"), device="cpu")
    assert not wrong.holds and wrong.flips[0] > 0 and wrong.flips[1] == report.flips[1]


def test_a_regression_decides_nothing(saved):
    def regression(model):
        model.config.problem_type = "regression"

    assert verify(saved("DistilBertForSequenceClassification", regression), device="cpu").flips is None


def test_what_holds_and_what_does_not():
    good = Report("m", "cpu", [Line("x", 1.0, 0.5, 1.0)])
    assert good.holds
    wrong = [Line("x", float("nan"), 0.5, 1.0)]
    for change in ({"cosine": 0.5}, {"missing": ["a"]}, {"not_finite": ["a"]}, {"lines": wrong}):
        assert not replace(good, **change).holds


def test_the_least_cosine_is_told(saved, monkeypatch):
    """Of one text of five that came out upside down."""
    module = sys.modules["fastdistil.verify"]
    real, calls = module._outputs, []

    def one_upside_down(out):
        found = real(out)
        calls.append(found)
        if len(calls) == 1:  # the fast path's
            found["layer 2"][3] *= -1
        return found

    monkeypatch.setattr(module, "_outputs", one_upside_down)
    report = verify(saved("DistilBertModel"), device="cpu")
    assert report.cosine == pytest.approx(-1, abs=1e-3) and not report.holds


def test_decisions_are_of_real_tokens():
    config = DistilBertConfig(vocab_size=9, dim=8, n_heads=2, hidden_dim=8, n_layers=1)
    keep = torch.tensor([[True, True, False], [True, False, False]])
    logits = torch.tensor([[1.0, 2.0, 9.0], [-1.0, 9.0, 9.0]])
    assert _decisions(fastdistil.DistilBertForQuestionAnswering(config), logits, keep).tolist() == [1, 0]
    tagger = fastdistil.DistilBertForTokenClassification(config)
    assert _decisions(tagger, torch.stack([logits, -logits], -1), keep).tolist() == [0, 0, 1]


@pytest.mark.parametrize(("off", "holds"), [(0.9, True), (1.1, False)])
def test_what_transformers_is_allowed(off, holds, saved, monkeypatch):
    """Twice what the fast path is."""
    module = sys.modules["fastdistil.verify"]
    ours = verify(saved("DistilBertModel"), device="cpu")
    allowed = next(line.allowed for line in ours.lines if line.name == "layer 1")

    def peer(report, directory, ids, mask, model, truth):
        yield "layer 1", truth["layer 1"] + 2 * off * allowed

    monkeypatch.setattr(module, "_peer", peer)
    report = verify(saved("DistilBertModel"), device="cpu")
    line = report.lines[-1]
    assert line.name == "transformers layer 1" and line.holds is report.holds is holds
    assert line.largest == pytest.approx(2 * off * allowed, rel=1e-3) and line.allowed == pytest.approx(2 * allowed)


def test_a_flexible_choice_among_three(minilm, tmp_path):
    """Six texts for two questions."""
    config = dict(vocab_size=30522, dim=24, n_heads=2, hidden_dim=32, n_layers=2, max_position_embeddings=64)
    torch.manual_seed(0)
    model = fastdistil.DistilBertModelWithHeads(DistilBertConfig(**config))
    model.add_multiple_choice_head("choice", num_choices=3)
    model.save_pretrained(tmp_path)
    DistilBertTokenizer.from_pretrained(minilm).save_pretrained(tmp_path)
    report = verify(tmp_path, device="cpu")
    assert report.holds and report.flips == (0, 2)
    assert verify(tmp_path, ["a", "b", "c", "d", "e", "f", "g"], device="cpu").flips == (0, 3)
