"""Bottleneck adapters and LoRA: against frozen outputs of the adapters library, and their life."""

import copy
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastdistil
from fastdistil import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    DistilBertModelWithHeads,
)

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-5
TINY = dict(vocab_size=60, dim=24, n_heads=2, hidden_dim=32, n_layers=2, max_position_embeddings=20)
KINDS = ["seq_bn", "double_seq_bn", "lora", "narrow", "wide"]
BOTTLENECKS = {"mh_adapter": True, "reduction_factor": 3, "non_linearity": "tanh"}


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "bottlenecks.safetensors")


@pytest.fixture
def theirs(golden):
    """The model that the adapters library made."""
    with safe_open(GOLDEN / "bottlenecks.safetensors", "pt") as file:
        metadata = file.metadata()
    config = DistilBertConfig.from_dict(json.loads(metadata["config"]))
    config.adapters = json.loads(metadata["adapters"])
    state = {k.removeprefix("model."): v for k, v in golden.items() if k.startswith("model.")}
    model, report = DistilBertModelWithHeads.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True
    )
    assert report.pop("unexpected_keys") == {"distilbert.prompt_tuning.base_model_embeddings.weight"}
    assert not any(report.values())
    return model


def make(seed=0, cls=DistilBertModel):
    """A model with three adapters that all change something."""
    torch.manual_seed(seed)
    model = cls(DistilBertConfig(**TINY)).eval()
    model.add_adapter("pfeiffer", "seq_bn")
    model.add_adapter("lora", "lora")
    model.add_adapter("both", BOTTLENECKS)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def inputs(batch=3, length=9):
    return torch.randint(1, 60, (batch, length)), torch.arange(length) < torch.tensor([length, 3, 1])[:batch, None]


@pytest.mark.parametrize("name", [*KINDS, "seq_bn,narrow", "double_seq_bn,lora"])
def test_equal_to_the_adapters_library(name, theirs, golden):
    ids = golden["ids"]
    with torch.inference_mode():
        plain = theirs(ids, torch.ones_like(ids)).logits
        packed = theirs(ids, torch.ones_like(ids), labels=golden["labels"], adapter_names=name.split(","))
    torch.testing.assert_close(plain, golden["none.logits"], rtol=0, atol=TOLERANCE)
    dense = theirs(ids, torch.ones_like(ids), labels=golden["labels"], adapter_names=name.split(","))
    for out in (packed, dense):
        torch.testing.assert_close(out.logits, golden[f"{name}.logits"], rtol=1e-5, atol=TOLERANCE)
        torch.testing.assert_close(out.loss, golden[f"{name}.loss"], rtol=1e-5, atol=TOLERANCE)
    assert not torch.allclose(plain, packed.logits, atol=1e-3), "the adapter changes nothing"
    dense.loss.backward()
    own, prefix = dict(theirs.named_parameters()), f"{name}.gradient."
    gradients = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
    assert len(gradients) >= 4
    for key, expected in gradients.items():
        torch.testing.assert_close(own[key].grad, expected, rtol=1e-4, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["seq_bn", "double_seq_bn", "lora"])
def test_an_adapter_saved_by_the_library_loads(name, theirs, golden):
    model = DistilBertModelWithHeads(DistilBertConfig(**TINY)).eval()
    model.add_classification_head("labels", num_labels=3)
    state = {k: v for k, v in theirs.state_dict().items() if ".adapters." not in k and ".loras." not in k}
    model.load_state_dict(state)
    assert model.load_adapter(GOLDEN / f"adapter_{name}", load_as="mine", set_active=True) == "mine"
    torch.testing.assert_close(model(golden["ids"]).logits, golden[f"{name}.logits"], rtol=1e-5, atol=TOLERANCE)


@pytest.mark.parametrize("names", ["pfeiffer", "lora", ["both"], ["pfeiffer", "both"], ["lora", "both"]])
def test_active_by_call_or_until_changed(names):
    model = make()
    ids, keep = inputs()
    plain = model(ids, keep)[0]
    with torch.inference_mode():
        packed = model(ids, keep, adapter_names=names, output_hidden_states=True)
        assert torch.equal(model(ids, keep)[0], model(ids, keep, adapter_names=[])[0])
    dense = model(ids, keep, adapter_names=names, output_attentions=True)[0]
    torch.testing.assert_close(packed[0], dense, rtol=0, atol=TOLERANCE)
    assert not torch.allclose(dense, plain, atol=1e-3)
    model.set_active_adapters(names)
    assert model.active_adapters == ([names] if isinstance(names, str) else names)
    torch.testing.assert_close(model(ids, keep)[0], dense, rtol=0, atol=TOLERANCE)
    with torch.inference_mode():
        rows = model.forward_packed(ids[keep], torch.tensor([0, 9, 12, 13]).int(), 9)
        torch.testing.assert_close(rows, dense[keep], rtol=0, atol=TOLERANCE)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(ids, keep)[0], model(ids, keep)[0])
    model.set_active_adapters(None)
    torch.testing.assert_close(model(ids, keep)[0], plain, rtol=0, atol=0)


def test_every_model_takes_them():
    ids, keep = inputs()
    for name in ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"):
        model = make(cls=getattr(fastdistil, f"DistilBertFor{name}"))
        arguments = (ids[:2, None], keep[:2, None]) if name == "MultipleChoice" else (ids, keep)
        with torch.inference_mode():
            through, plain = model(*arguments, adapter_names="both")[0], model(*arguments)[0]
        assert not torch.allclose(through, plain, atol=1e-3)
        torch.testing.assert_close(model(*arguments, adapter_names="both")[0], through, rtol=0, atol=TOLERANCE)


def test_new_adapters():
    model = DistilBertModel(DistilBertConfig(**TINY)).eval()
    ids, keep = inputs()
    plain = model(ids, keep)[0]
    model.add_adapter("l", "lora", set_active=True)
    assert torch.equal(model(ids, keep)[0], plain), "a new LoRA changes nothing"
    model.add_adapter("p", {"leave_out": [0]}, set_active=True)
    assert model.transformer.layer[0].output_adapters is None and model.active_adapters == ["p"]
    assert model.adapters_config.keys() == {"l", "p"}
    model.delete_adapter("p")
    assert model.active_adapters == [] and model.adapters_config.keys() == {"l"}
    assert not any(".p." in key for key in model.state_dict())


def test_training_touches_the_adapter_and_the_heads_alone():
    model = make(cls=DistilBertModelWithHeads)
    model.add_classification_head("labels", num_labels=3)
    for name in ("pfeiffer", "lora"):
        model.train_adapter(name)
        assert model.training and model.active_adapters == [name]
        ids, keep = inputs()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        model(ids, keep, labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
        changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        assert changed and all(f".{name}." in k or k.startswith("heads.labels.") for k in changed)
        assert any(f".{name}." in k for k in changed) and any(k.startswith("heads.") for k in changed)
        model.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merged_and_restored_to_the_bit(dtype):
    model = make().to(dtype)
    model.add_adapter("other", "lora[r=2]")
    ids, keep = inputs()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.inference_mode():
        expected, plain = model(ids, keep, adapter_names="lora")[0], model(ids, keep)[0]
        model.set_active_adapters("lora")
        model.merge_adapter("lora")
        merged = model(ids, keep)[0]
        assert torch.equal(model(ids, keep, adapter_names="lora")[0], merged), "it must not count twice"
        assert torch.equal(model(ids, keep, adapter_names=[])[0], merged)
        model.merge_adapter("lora")  # nothing more to do
        with pytest.raises(ValueError, match=r"lora is merged; reset_adapter undoes it"):
            model(ids, keep, adapter_names="other")
        torch.testing.assert_close(merged, expected, rtol=0, atol=TOLERANCE if dtype is torch.float32 else 2e-2)
        assert not torch.allclose(merged, plain, atol=5e-2)
        for call, name in (
            (model.merge_adapter, "other"),
            (model.delete_adapter, "lora"),
            (model.train_adapter, "lora"),
        ):
            with pytest.raises(ValueError, match="adapter 'lora' is merged; call reset_adapter"):
                call(name)
        model.reset_adapter()
        assert model.active_adapters == ["lora"]
        torch.testing.assert_close(model(ids, keep)[0], expected, rtol=0, atol=0)
        assert torch.equal(model(ids, keep, adapter_names=[])[0], plain)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.reset_adapter()  # nothing to undo


@pytest.mark.parametrize("cls", [DistilBertModel, fastdistil.DistilBertForMaskedLM])
@pytest.mark.parametrize("name", ["pfeiffer", "lora", "both"])
def test_saved_and_loaded(cls, name, tmp_path):
    model = make(cls=cls)
    ids, keep = inputs()
    model.save_adapter(tmp_path, name)
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        assert all(key.startswith("distilbert.transformer.layer.") for key in file.keys())  # noqa: SIM118
    other = cls(DistilBertConfig(**TINY)).eval()
    state = {k: v for k, v in model.state_dict().items() if ".adapters." not in k and ".loras." not in k}
    other.load_state_dict(state)
    other.load_adapter(tmp_path)
    assert torch.equal(other(ids, keep, adapter_names=name)[0], model(ids, keep, adapter_names=name)[0])
    other.load_adapter(tmp_path, load_as="again")
    assert torch.equal(other(ids, keep, adapter_names="again")[0], model(ids, keep, adapter_names=name)[0])
    with pytest.raises(ValueError, match="there is an adapter 'again'"):
        other.load_adapter(tmp_path, load_as="again", overwrite_ok=False)


def test_saved_with_the_model(tmp_path, caplog):
    model = make(cls=fastdistil.DistilBertForMaskedLM)
    ids, keep = inputs()
    model.save_pretrained(tmp_path)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for name in ("pfeiffer", "lora", "both"):
        assert torch.equal(again(ids, keep, adapter_names=name).logits, model(ids, keep, adapter_names=name).logits)
    config = json.loads((tmp_path / "config.json").read_text())
    key = config["adapters"]["adapters"]["both"]
    config["adapters"]["config_map"][key]["use_gating"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    partly = type(model).from_pretrained(tmp_path)
    assert "adapter 'both' of the checkpoint is left out: an adapter with use_gating=True" in caplog.text
    assert torch.equal(partly(ids, keep, adapter_names="lora").logits, model(ids, keep, adapter_names="lora").logits)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m: m.add_adapter("x", "prefix_tuning"), "config is one of seq_bn, double_seq_bn, lora"),
        (lambda m: m.add_adapter("a.b"), "cannot be named 'a.b'"),
        (lambda m: m.add_adapter("lora"), "there is an adapter 'lora'"),
        (lambda m: m.add_adapter("x", {"is_parallel": True}), "is_parallel=True is not supported, only False"),
        (lambda m: m.add_adapter("x", SimpleNamespace(peft_type="LORA")), "use peft.get_peft_model"),
        (lambda m: m.add_adapter("x", {"reduction_factor": 0}), "reduction_factor must be above 0"),
        (lambda m: m.add_adapter("x", {"scaling": "learned"}), "scaling must be a number, got 'learned'"),
        (lambda m: m.add_adapter("x", {"non_linearity": "maybe"}), "'maybe' is not one of relu"),
        (lambda m: m.add_adapter("x", {"architecture": "lora", "r": 0}), "r must be an integer of 1 or more, got 0"),
        (
            lambda m: m.add_adapter("x", {"architecture": "lora", "attn_matrices": ["o"]}),
            "attn_matrices are q, k and v",
        ),
        (
            lambda m: m.add_adapter("x", {"architecture": "lora", "attn_matrices": [["q"]]}),
            "attn_matrices are q, k and v",
        ),
        (lambda m: m.add_adapter("x", {"architecture": "reft"}), "architecture 'reft' are not supported"),
        (lambda m: m.set_active_adapters("x"), "there is no adapter 'x'; there are pfeiffer, lora, both"),
        (lambda m: m(torch.ones(1, 3).long(), adapter_names="x"), "there is no adapter 'x'"),
        (lambda m: m.delete_adapter("x"), "there is no adapter 'x'"),
        (lambda m: m.merge_adapter("both"), "is a bottleneck; only a LoRA can be merged"),
        (lambda m: m.save_adapter("nowhere", "x"), "there is no adapter 'x'"),
        (lambda m: m.train_adapter("x"), "there is no adapter 'x'"),
        (lambda m: m.add_adapter("training"), "cannot be named 'training'"),
        (lambda m: m.add_adapter("x", {"foo": 1}), "an adapter with foo=1 is not supported"),
        (lambda m: m.add_adapter("x", {"leave_out": ["0"]}), "leave_out is a list of layers"),
        (lambda m: m.add_adapter("x", {"init_weights": "ia3"}), "init_weights 'ia3' is not supported, only bert and"),
        (lambda m: m.add_adapter("x", "lora[r]"), "'r' in the adapter's config"),
        (lambda m: m.add_adapter("x", 3), "is a name or a dictionary of settings, got 3"),
        (
            lambda m: m(torch.ones(1, 3).long(), adapter_names=5),
            "adapter_names must be a name or a list of names, got 5",
        ),
        (lambda m: m.train_adapter(["x"]), "there is no adapter 'x'"),
    ],
)
def test_bad_input(call, error):
    model = make()
    before = list(model.state_dict())
    with pytest.raises((ValueError, TypeError), match=error):
        call(model)
    assert list(model.state_dict()) == before and list(model.adapters_config) == ["pfeiffer", "lora", "both"]
    model.add_adapter("second", "lora")
    with pytest.raises(ValueError, match="one LoRA can be active at a time, not lora, second"):
        model.set_active_adapters(["lora", "second"])


def test_a_merged_model_is_saved_without_the_adapter(tmp_path, caplog):
    model = make(cls=DistilBertModelWithHeads)
    ids, keep = inputs()
    model.merge_adapter("lora")
    merged = model(ids, keep)[0]
    model.save_pretrained(tmp_path)
    assert "adapter 'lora' is merged" in caplog.text
    again, report = DistilBertModelWithHeads.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and set(again.adapters_config) == {"pfeiffer", "both"}
    torch.testing.assert_close(again(ids, keep)[0], merged, rtol=0, atol=TOLERANCE)
    model.set_active_adapters("both")
    torch.testing.assert_close(again(ids, keep, adapter_names="both")[0], model(ids, keep)[0], rtol=0, atol=TOLERANCE)


def test_a_merged_models_own_weights_loaded_again_stay_merged():
    model = make()
    ids, keep = inputs()
    plain, through = model(ids, keep)[0], model(ids, keep, adapter_names="lora")[0]
    model.merge_adapter("lora")
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    copied = copy.deepcopy(model)
    copied.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    for one in (model, copied):
        torch.testing.assert_close(one(ids, keep, adapter_names="lora")[0], through, rtol=0, atol=TOLERANCE)
        one.reset_adapter()
        assert torch.equal(one(ids, keep)[0], plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_merged_model_that_was_cast_and_loaded_again_stays_merged(dtype):
    model = make()
    ids, keep = inputs()
    model.merge_adapter("lora")
    model.to(dtype).float()
    expected = model(ids, keep, adapter_names="lora")[0]
    model.load_state_dict(model.state_dict())
    assert model._merged_adapter() == "lora"
    assert torch.equal(model(ids, keep, adapter_names="lora")[0], expected)


def test_what_changed_merged_weights_stays_when_they_are_reset():
    model, plain = make(), make()
    model.merge_adapter("lora")
    with torch.no_grad():
        for one in (model, plain):
            for name, parameter in one.named_parameters():
                if "lora" not in name and "adapters" not in name:
                    parameter.add_(0.5)
    model.reset_adapter()
    for (name, one), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6, msg=name)


def test_a_merge_with_nan_is_undone():
    model = make()
    plain = {k: v.clone() for k, v in model.state_dict().items() if "_lin.weight" in k}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".loras.lora." in name:
                parameter.fill_(torch.nan)
    model.merge_adapter("lora")
    assert any(model.state_dict()[k].isnan().any() for k in plain)
    model.reset_adapter()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in plain.items())


def test_what_two_loras_refuse_changes_nothing(tmp_path):
    model = make()
    model.add_adapter("other", "lora")
    model.save_adapter(tmp_path, "other")
    model.delete_adapter("other")
    model.merge_adapter("lora")
    names, state = list(model.adapters_config), {k: v.clone() for k, v in model.state_dict().items()}
    for call in (
        lambda: model.load_adapter(tmp_path, set_active=True),
        lambda: model.add_adapter("new", "lora", set_active=True),
    ):
        with pytest.raises(ValueError, match="one LoRA can be active at a time"):
            call()
        assert list(model.adapters_config) == names and model.state_dict().keys() == state.keys()
    model.reset_adapter()
    model.active_adapters = ["lora", "both"]
    with pytest.raises(ValueError, match="one LoRA can be active at a time"):
        model.add_adapter("both", "lora", overwrite_ok=True)
    assert list(model.adapters_config) == names and model.active_adapters == ["lora", "both"]
    model.active_adapters = ["lora"]
    model.add_adapter("other", "lora")
    with pytest.raises(ValueError, match=r"one LoRA can be active at a time, not lora \(other is merged"):
        model.merge_adapter("other")
    assert model._merged_adapter() is None


def test_weights_loaded_over_merged_ones_stay():
    model, other = make(), make(seed=1)
    model.merge_adapter("lora")
    model.load_state_dict(other.state_dict())
    model.reset_adapter()
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


def test_an_adapter_saved_from_a_bare_encoder_loads(tmp_path):
    """The adapters library then writes keys without the encoder's prefix."""
    model = make()
    model.save_adapter(tmp_path, "both")
    state = load_file(tmp_path / "adapter.safetensors")
    save_file({k.removeprefix("distilbert."): v for k, v in state.items()}, tmp_path / "adapter.safetensors")
    for cls in (DistilBertModel, DistilBertModelWithHeads):
        fresh = cls(DistilBertConfig(**TINY))
        assert fresh.load_adapter(tmp_path) == "both"
        found = {k.removeprefix("distilbert."): v for k, v in fresh.state_dict().items() if ".both." in k}
        assert found and all(torch.equal(v, model.state_dict()[k]) for k, v in found.items())


def test_a_configuration_told_by_its_name(tmp_path, caplog):
    """As the adapters library writes its own defaults; and one that is not supported cannot be named."""
    model = make()
    model.delete_adapter("lora"), model.delete_adapter("both")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["adapters"] |= {"adapters": {"pfeiffer": "seq_bn", "odd": "prefix_tuning"}, "config_map": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = DistilBertModel.from_pretrained(tmp_path)
    ids, keep = inputs()
    expected = model(ids, keep, adapter_names="pfeiffer")[0]
    torch.testing.assert_close(again(ids, keep, adapter_names="pfeiffer")[0], expected)
    assert "adapter 'odd' of the checkpoint is left out" in caplog.text
    for call in (lambda: again(ids, adapter_names="odd"), lambda: again.save_adapter(tmp_path / "o", "odd")):
        with pytest.raises(ValueError, match="no adapter 'odd'"):
            call()
    again.save_pretrained(tmp_path / "again")
    assert list(DistilBertModel.from_pretrained(tmp_path / "again").adapters_config) == ["pfeiffer"]


def test_models_of_one_configuration_keep_their_own():
    config = DistilBertConfig(**TINY)
    one, two = DistilBertModel(config), DistilBertModel(config)
    two.add_adapter("theirs")
    with pytest.raises(ValueError, match="no adapter 'theirs'"):
        one(inputs()[0], adapter_names="theirs")
    heads = [DistilBertModelWithHeads(config) for _ in range(2)]
    heads[0].add_tagging_head("a"), heads[1].add_qa_head("b")
    assert [list(model.heads_config) for model in heads] == [["a"], ["b"]]
    assert [list(DistilBertModelWithHeads(model.config).heads) for model in heads] == [["a"], ["b"]]
    assert not hasattr(config, "prediction_heads")


def test_an_active_adapter_stays_active_when_it_is_loaded_again(tmp_path):
    model = make()
    model.active_adapters = ["pfeiffer", "both"]
    model.save_adapter(tmp_path, "pfeiffer")
    model.load_adapter(tmp_path)
    assert model.active_adapters == ["pfeiffer", "both"]
    model.load_adapter(tmp_path, set_active=True)
    assert model.active_adapters == ["pfeiffer"]


def test_a_head_that_does_not_fit_leaves_its_adapter_out(tmp_path):
    model = DistilBertForSequenceClassification(DistilBertConfig(**TINY, num_labels=3))
    model.add_adapter("a", "lora")
    model.save_adapter(tmp_path, "a")
    other = DistilBertForSequenceClassification(DistilBertConfig(**TINY, num_labels=2))
    with pytest.raises(ValueError, match=r"classifier.bias should be \(2,\), but is \(3,\)"):
        other.load_adapter(tmp_path, set_active=True)
    assert not other.adapters_config and not other.active_adapters


def test_a_head_beside_its_adapter(tmp_path):
    model = DistilBertModelWithHeads(DistilBertConfig(**TINY)).eval()
    model.add_classification_head("sst", num_labels=3)
    model.add_tagging_head("other")
    model.add_adapter("sst", "lora")
    model.set_active_adapters("sst")
    assert model.active_head == "sst", "the head of the adapter's name"
    model.save_adapter(tmp_path / "both", "sst", use_safetensors=True)
    model.save_adapter(tmp_path / "alone", "sst", with_head=False)
    for directory, options, heads in (("both", {}, ["sst"]), ("both", {"with_head": False}, []), ("alone", {}, [])):
        fresh = DistilBertModelWithHeads(DistilBertConfig(**TINY))
        fresh.load_adapter(tmp_path / directory, use_safetensors=True, **options)
        assert list(fresh.heads) == heads
    fresh = DistilBertModelWithHeads(DistilBertConfig(**TINY))
    fresh.add_tagging_head("own")
    fresh.load_adapter(tmp_path / "both")
    assert fresh.active_head == "own" and set(fresh.heads) == {"own", "sst"}
    fresh.load_adapter(tmp_path / "both", set_active=True)
    assert fresh.active_head == "sst"
    with pytest.raises(ValueError, match="only safetensors are written"):
        model.save_adapter(tmp_path / "c", "sst", use_safetensors=False)
    with pytest.raises(OSError, match=r"pytorch_adapter.bin could not be read"):
        fresh.load_adapter(tmp_path / "both", use_safetensors=False)


@pytest.mark.parametrize(
    ("kind", "initial", "spread"),
    [("lora", "lora", [True, False]), ("lora", "bert", [True, True]), ("seq_bn", "bert", [True, True]),
     ("seq_bn", "mam_adapter", [True, False])],
)  # fmt: skip
def test_initial_weights(kind, initial, spread):
    model = DistilBertModel(DistilBertConfig(**TINY))
    model.add_adapter("a", f"{kind}[init_weights={initial}]")
    pair = ("lora_A", "lora_B") if kind == "lora" else ("down.0.weight", "up.weight")
    for name, expected in zip(pair, spread, strict=True):
        found = [p for k, p in model.named_parameters() if ".a." in k and k.endswith(name)]
        assert found and all((p.std() > 0.01).item() is expected for p in found)


def test_bad_files(tmp_path):
    model = make()
    with pytest.raises(FileNotFoundError, match="holds no adapter_config.json"):
        model.load_adapter(tmp_path)
    model.save_adapter(tmp_path, "both")
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter.safetensors"
    good, state = json.loads(config.read_text()), load_file(weights)
    for error, description in {
        "hidden_size is 25, the model's is 24": good | {"hidden_size": 25},
        "describes no adapter": good | {"config": []},
        "use_gating=True is not supported": good | {"config": good["config"] | {"use_gating": True}},
        r"adapter_down.0.bias should be \(12,\) by": good | {"config": good["config"] | {"reduction_factor": 2}},
    }.items():
        config.write_text(json.dumps(description))
        with pytest.raises(ValueError, match=error):
            model.load_adapter(tmp_path)
    config.write_text(json.dumps(good))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    key = next(iter(state))
    save_file({k: v for k, v in state.items() if k != key}, weights)
    with pytest.raises(ValueError, match="but is absent"):
        model.load_adapter(tmp_path)
    weights.write_bytes(b"nonsense")
    with pytest.raises(OSError, match="not a readable safetensors file"):
        model.load_adapter(tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- transformers' classes, whose head is trained with the adapter --------------------------------------------------

STATIC = ["MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"]


def static(name, seed, **settings):
    torch.manual_seed(seed)
    model = getattr(fastdistil, f"DistilBertFor{name}")(DistilBertConfig(**TINY, **settings)).eval()
    if seed:  # another head on the same encoder
        torch.manual_seed(0)
        model.distilbert.load_state_dict(DistilBertModel(DistilBertConfig(**TINY)).state_dict())
    return model


def shake(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("pickled", [False, True])
def test_the_head_of_a_static_class_goes_with_its_adapter(name, pickled, tmp_path):
    labels = {} if name in ("MaskedLM", "QuestionAnswering") else {"id2label": {0: "x", 1: "y", 2: "z"}}
    model, ids = static(name, 1, **labels), inputs()[0]
    model.add_adapter("task", "seq_bn")
    model.train_adapter("task")
    shake(model).save_adapter(tmp_path, "task")
    if pickled:  # as the adapters library writes it by default
        head = load_file(tmp_path / "model_head.safetensors")
        torch.save(head, tmp_path / "pytorch_model_head.bin")
        (tmp_path / "model_head.safetensors").unlink()
    description = json.loads((tmp_path / "head_config.json").read_text())
    assert (description["config"], description["model_class"]) == (None, f"DistilBertFor{name}")
    fresh = static(name, 2, **({"num_labels": 3} if labels else {}))
    fresh.load_adapter(tmp_path, set_active=True)
    expected = model(ids, adapter_names="task")[0]
    torch.testing.assert_close(fresh(ids)[0], expected, rtol=0, atol=0)
    if labels:
        assert fresh.config.id2label == labels["id2label"] and fresh.config.label2id == {"x": 0, "y": 1, "z": 2}
    other = static(name, 2, **({"num_labels": 3} if labels else {}))
    other.load_adapter(tmp_path, set_active=True, with_head=False)
    assert not torch.allclose(other(ids)[0], expected, atol=1e-3)
    flexible = DistilBertModelWithHeads(DistilBertConfig(**TINY))
    flexible.distilbert.load_state_dict(static(name, 1).distilbert.state_dict())
    flexible.load_adapter(tmp_path, set_active=True)
    torch.testing.assert_close(flexible.eval()(ids)[0], expected, rtol=0, atol=1e-6)


def test_a_head_of_another_class_or_shape(tmp_path, caplog):
    model = static("SequenceClassification", 1, num_labels=3)
    model.add_adapter("task", "seq_bn")
    model.save_adapter(tmp_path, "task")
    static("TokenClassification", 1).load_adapter(tmp_path)
    assert "the head is left out, for it is one of DistilBertForSequenceClassification" in caplog.text
    with pytest.raises(ValueError, match=r"classifier.bias should be \(2,\), but is \(3,\)"):
        static("SequenceClassification", 1).load_adapter(tmp_path)
    model.save_adapter(tmp_path / "bare", "task", with_head=False)
    assert not (tmp_path / "bare" / "head_config.json").exists()


def test_a_new_adapter_is_like_its_model():
    model = DistilBertModel(DistilBertConfig(**TINY)).double().eval()
    model.add_adapter("a", "lora[dropout=0.5]")
    model.add_adapter("b", "seq_bn")
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model.train().add_adapter("c", "lora")
    assert all(module.training for module in model.modules())


def test_switches_as_shells_write_them():
    model = DistilBertModel(DistilBertConfig(**TINY))
    model.add_adapter("a", "seq_bn[mh_adapter=true,output_adapter=FALSE]")
    assert model.adapters_config["a"]["mh_adapter"] is True and model.adapters_config["a"]["output_adapter"] is False


def test_nothing_is_left_of_an_adapter_that_is_replaced():
    model = DistilBertModel(DistilBertConfig(**TINY))
    model.add_adapter("a", "double_seq_bn")
    before = {name for name in model.state_dict() if "adapters.a." in name}
    model.add_adapter("a", "lora", overwrite_ok=True)
    after = {name for name in model.state_dict() if ".a." in name}
    assert before and after and all(".loras.a." in name for name in after)


@pytest.mark.parametrize("kind", ["seq_bn[dropout=0.5]", "lora[dropout=0.5]"])
def test_dropout_of_adapters(kind):
    model = DistilBertModel(DistilBertConfig(**TINY, dropout=0.0, attention_dropout=0.0))
    model.add_adapter("a", kind, set_active=True)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    ids = torch.randint(1, 60, (2, 7))
    for training in (False, True):
        model.train(training)
        assert torch.equal(model(ids)[0], model(ids)[0]) is not training


def test_a_lora_that_is_reset_changes_nothing():
    model = DistilBertModel(DistilBertConfig(**TINY))
    model.add_adapter("a", "lora")
    lora = model.transformer.layer[0].attention.q_lin.loras["a"]
    with torch.no_grad():
        lora.lora_B.fill_(1)
    lora.reset()
    assert not lora.lora_B.any() and lora.lora_A.any()
