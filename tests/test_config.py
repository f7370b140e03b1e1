import json
from unittest.mock import Mock

import pytest

from fastdistil import DistilBertConfig

transformers = pytest.importorskip("transformers")


def test_defaults_and_aliases():
    ours, theirs = DistilBertConfig(), transformers.DistilBertConfig()
    for name in [
        "vocab_size",
        "max_position_embeddings",
        "sinusoidal_pos_embds",
        "n_layers",
        "n_heads",
        "dim",
        "hidden_dim",
        "dropout",
        "id2label",
        "attention_dropout",
        "activation",
        "initializer_range",
        "qa_dropout",
        "seq_classif_dropout",
        "pad_token_id",
        "label2id",
        "num_labels",
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "tie_word_embeddings",
        "problem_type",
        "chunk_size_feed_forward",
        "model_type",
    ]:
        assert getattr(ours, name) == getattr(theirs, name), name
    config = DistilBertConfig(hidden_size=48, num_attention_heads=3, num_hidden_layers=1, mine=7)
    assert (config.dim, config.n_heads, config.n_layers, config.mine) == (48, 3, 1, 7)
    config.hidden_size = 96
    assert config.dim == 96 and config == DistilBertConfig(dim=96, n_heads=3, n_layers=1, mine=7)
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = config.absent


def test_from_a_configurations_dictionary():
    config = DistilBertConfig(dim=24, n_heads=2, num_labels=3, extra="kept")
    assert DistilBertConfig(**config.to_dict()) == config


def test_labels():
    config = DistilBertConfig(num_labels=3)
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"} and config.label2id["LABEL_2"] == 2
    assert DistilBertConfig(id2label={"0": "no", "1": "yes"}).id2label == {0: "no", 1: "yes"}
    numbered = DistilBertConfig(id2label={"0": 3, "1": None}, label2id={3: 0, None: 1})  # names are text
    assert numbered.id2label == {0: "3", 1: "None"} and numbered.label2id == {"3": 0, "None": 1}
    config.num_labels = 3
    assert config.num_labels == 3


def test_round_trip_with_transformers(tmp_path):
    config = DistilBertConfig(dim=48, n_heads=3, activation="relu", num_labels=4, output_attentions=True, mine=[1])
    config.save_pretrained(tmp_path)
    theirs = transformers.DistilBertConfig.from_pretrained(tmp_path)
    assert (theirs.dim, theirs.activation, theirs.num_labels, theirs.output_attentions) == (48, "relu", 4, True)
    theirs.save_pretrained(tmp_path)
    again = DistilBertConfig.from_json_file(tmp_path / "config.json")
    del again.transformers_version
    assert again == config


def test_old_hub_file_and_bert_file():
    old = {"model_type": "distilbert", "tie_weights_": True, "torch_dtype": "float16", "dim": 768}
    assert DistilBertConfig.from_dict(old).dtype == "float16"
    bert = {
        "model_type": "bert",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "hidden_act": "relu",
        "num_attention_heads": 16,
        "layer_norm_eps": 1e-5,
        "hidden_dropout_prob": 0.2,
    }
    config = DistilBertConfig.from_dict(bert)
    assert (config.dim, config.hidden_dim, config.activation, config.layer_norm_eps) == (1024, 4096, "relu", 1e-5)
    assert (config.n_layers, config.dropout) == (12, 0.2)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"dim": "x"}, TypeError, "config.dim must be an integer, got 'x'"),
        ({"dim": True}, TypeError, "config.dim"),
        ({"n_layers": -1}, ValueError, "config.n_layers is -1"),
        ({"vocab_size": 10**12}, ValueError, "config.vocab_size is 1000000000000"),
        ({"max_position_embeddings": 0}, ValueError, "config.max_position_embeddings is 0"),
        ({"n_heads": 5}, ValueError, "config.n_heads 5 must divide config.dim 768"),
        ({"n_heads": 4}, ValueError, "head size of 192"),
        ({"activation": "os.system"}, ValueError, "config.activation 'os.system' is not supported"),
        ({"activation": ["gelu"]}, ValueError, "config.activation"),
        ({"dropout": 1.5}, ValueError, "config.dropout is 1.5"),
        ({"dropout": None}, TypeError, "config.dropout must be a number"),
        ({"initializer_range": float("nan")}, ValueError, "initializer_range"),
        ({"sinusoidal_pos_embds": 1}, TypeError, "sinusoidal_pos_embds"),
        ({"return_dict": "no"}, TypeError, "config.return_dict must be true or false, got 'no'"),
        ({"tie_word_embeddings": "x"}, TypeError, "config.tie_word_embeddings"),
        ({"label2id": 5}, TypeError, "config.label2id must map names to numbers"),
        ({"problem_type": "guess"}, ValueError, "config.problem_type 'guess'"),
        ({"problem_type": "single_label_classification", "num_labels": 1}, ValueError, "more than one label"),
        ({"id2label": ["a"]}, TypeError, "config.id2label"),
        ({"id2label": {"x": "a"}}, ValueError, "config.id2label"),
        ({"num_labels": -1}, ValueError, "num_labels is -1"),
        ({"pad_token_id": "0"}, TypeError, "pad_token_id"),
        ({"pad_token_id": False}, TypeError, "pad_token_id"),
        ({"model_type": "roberta"}, ValueError, "model_type is 'roberta'"),
        ({"model_type": "bert", "position_embedding_type": "relative_key"}, ValueError, "relative_key"),
        ({"model_type": "bert", "is_decoder": True}, ValueError, "is_decoder"),
        ({"_validate": 1}, ValueError, "config._validate cannot be set"),
        ({"dropout": 10**400}, ValueError, "config.dropout is a number of 401 digits"),
        ([1], ValueError, "JSON object"),
    ],
)
def test_bad_values_name_the_field(values, error, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(error, match=message) as caught:
        DistilBertConfig.from_json_file(path)
    assert str(path) in str(caught.value)


def test_from_pretrained(tmp_path, monkeypatch):
    DistilBertConfig(dim=48, n_heads=3).save_pretrained(tmp_path)
    for place in (tmp_path, str(tmp_path), tmp_path / "config.json"):
        assert DistilBertConfig.from_pretrained(place, n_layers=2).n_layers == 2
    config, unused = DistilBertConfig.from_pretrained(
        tmp_path, num_hidden_layers=2, num_labels=3, foo=1, return_unused_kwargs=True
    )
    assert (config.dim, config.n_layers, config.num_labels, unused) == (48, 2, 3, {"foo": 1})
    with pytest.raises(TypeError, match="'foo' is neither an argument nor a field of the configuration"):
        DistilBertConfig.from_pretrained(tmp_path, foo=1)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", asked := Mock(side_effect=OSError("nobody is there")))
    for place in ("./nowhere", "~/nowhere", "/no/where", "no where", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="there is no configuration"):
            DistilBertConfig.from_pretrained(place)
    assert not asked.called
    for place, error in (("./nowhere", FileNotFoundError), ("no/such-model", FileNotFoundError), (3, TypeError)):
        with pytest.raises(error, match="nowhere|such-model|got 3"):
            DistilBertConfig.from_pretrained(place, local_files_only=True)
    with pytest.raises(TypeError, match="update takes a dictionary"):
        config.update(5)
    with pytest.raises(ValueError, match="config.n_layers is -1"):
        config.update({"dim": 96, "n_layers": -1})
    assert (config.dim, config.n_layers) == (48, 2)
    config.update({"dim": 96})
    assert config.dim == 96


def test_not_json(tmp_path):
    for text in ("{", '{"dim": 1' + "0" * 5000 + "}"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json is not a JSON file"):
            DistilBertConfig.from_json_file(tmp_path / "config.json")


def test_a_home_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    DistilBertConfig(dim=24, n_heads=2).save_pretrained(tmp_path / "m")
    assert DistilBertConfig.from_pretrained("~/m").dim == 24


def test_what_transformers_callers_ask_of_a_configuration(tmp_path):
    config = DistilBertConfig(_name_or_path="old/name", attn_implementation="eager", is_encoder_decoder=False)
    assert config.get_text_config() is config and config._attn_implementation == "eager"
    assert (config.name_or_path, config._name_or_path, config.is_encoder_decoder) == ("old/name", "old/name", False)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not {name for name in written if "name_or_path" in name or "implementation" in name or "decoder" in name}
    again = DistilBertConfig.from_pretrained(tmp_path)
    assert again == config and again.name_or_path == str(tmp_path) and again._attn_implementation is None


def test_what_little_is_said_of():
    config = DistilBertConfig(dropout=1.0, attention_dropout=1)
    config._validate()
    told = config.to_dict()
    told["id2label"][0] = "x"
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert DistilBertConfig() == DistilBertConfig() != DistilBertConfig(dim=24)
    assert DistilBertConfig() != 5
    with pytest.raises(ValueError, match="add_cross_attention is true: only BERT encoders can be converted"):
        DistilBertConfig.from_dict({"model_type": "bert", "add_cross_attention": True})


def test_labels_and_numbers_of_other_configurations():
    stored = {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    assert DistilBertConfig.from_dict(stored, num_labels=3).id2label == {i: f"LABEL_{i}" for i in range(3)}
    bert = {"model_type": "bert", "attention_probs_dropout_prob": 0.3, "hidden_size": 24, "num_attention_heads": 2}
    assert DistilBertConfig.from_dict(bert).attention_dropout == 0.3
    with pytest.raises(ValueError, match="embedding_size differs from hidden_size"):
        DistilBertConfig.from_dict(bert | {"embedding_size": 16})
