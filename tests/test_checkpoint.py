import json
import socket
import subprocess
import sys

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

import fastdistil
from fastdistil import DistilBertConfig, DistilBertForMaskedLM, DistilBertModel, DistilBertTokenizer, pipeline
from fastdistil.checkpoint import HUB_FILES, LoadReport, Weights, find, load_weights
from fastdistil.pretrained import PreTrainedModel, as_device

transformers = pytest.importorskip("transformers")
TINY = dict(vocab_size=99, dim=48, n_heads=3, hidden_dim=80, n_layers=2, max_position_embeddings=40)


@pytest.fixture
def saved(tmp_path):
    """A tiny checkpoint by transformers."""
    model = transformers.DistilBertModel(transformers.DistilBertConfig(**TINY)).eval()
    model.save_pretrained(tmp_path)
    return tmp_path, model


def same(ours, theirs, tolerance=1e-5):
    ids = torch.randint(1, 99, (3, 11))
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids)[0], theirs(ids)[0], rtol=0, atol=tolerance)


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_both_directions(saved, tmp_path):
    path, theirs = saved
    ours, info = DistilBertModel.from_pretrained(path, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]) and not ours.training
    same(ours, theirs)
    ours.save_pretrained(tmp_path / "again")
    back, info = transformers.DistilBertModel.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"])
    same(ours, back.eval())
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == ["DistilBertModel"]


def test_shards(saved, tmp_path):
    path, theirs = saved
    ours = DistilBertModel.from_pretrained(path)
    ours.save_pretrained(tmp_path / "shards", max_shard_size=30_000)
    assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 1
    same(DistilBertModel.from_pretrained(tmp_path / "shards"), theirs)
    same(transformers.DistilBertModel.from_pretrained(tmp_path / "shards").eval(), theirs)


def test_dtype_is_the_checkpoints_unless_given(saved, tmp_path):
    path, theirs = saved
    theirs.half().save_pretrained(tmp_path / "half")
    assert DistilBertModel.from_pretrained(tmp_path / "half").dtype is torch.float16
    assert DistilBertModel.from_pretrained(tmp_path / "half", dtype="float32").dtype is torch.float32
    assert DistilBertModel.from_pretrained(path, torch_dtype=torch.bfloat16).dtype is torch.bfloat16
    edit(tmp_path / "half" / "config.json", lambda c: c.pop("dtype"))
    assert DistilBertModel.from_pretrained(tmp_path / "half").dtype is torch.float16
    with pytest.raises(ValueError, match="dtype 'int4'"):
        DistilBertModel.from_pretrained(path, dtype="int4")


@pytest.mark.parametrize("tied", [True, False])
def test_head_checkpoints_give_their_encoder(tmp_path, tied):
    theirs = transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(**TINY, tie_word_embeddings=tied)).eval()
    theirs.save_pretrained(tmp_path)
    ours, info = DistilBertModel.from_pretrained(tmp_path, output_loading_info=True)
    same(ours, theirs.distilbert)
    assert not info["missing_keys"] and "vocab_projector.bias" in info["unexpected_keys"]
    assert ("vocab_projector.weight" in info["unexpected_keys"]) is not tied


class TinyHead(PreTrainedModel):
    """A head with a tied projector, to load into: what masked language modelling needs of the loader."""

    def __init__(self, config):
        super().__init__(config)
        self.distilbert = DistilBertModel(config)
        self.vocab_projector = torch.nn.Linear(config.dim, config.vocab_size)
        if config.tie_word_embeddings:
            self._tied_weights_keys = {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"}
        self.post_init()


@pytest.mark.parametrize("kept", ["word_embeddings", "vocab_projector", "both"])
def test_either_name_of_a_tied_pair_is_enough(kept, saved):
    _, theirs = saved
    tensors = {f"distilbert.{k}": v for k, v in theirs.state_dict().items()}
    words = tensors["distilbert.embeddings.word_embeddings.weight"]
    tensors |= {"vocab_projector.weight": words, "vocab_projector.bias": torch.ones(99)}
    if kept == "word_embeddings":
        del tensors["vocab_projector.weight"]
    elif kept == "vocab_projector":
        del tensors["distilbert.embeddings.word_embeddings.weight"]
    model, info = TinyHead.from_pretrained(
        None, config=DistilBertConfig(**TINY), state_dict=tensors, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(model.vocab_projector.weight.detach(), words)
    torch.testing.assert_close(model.distilbert.embeddings.word_embeddings.weight.detach(), words)


def test_base_checkpoint_into_a_head_names_what_is_new(saved, caplog):
    path, theirs = saved
    model, info = TinyHead.from_pretrained(path, output_loading_info=True, tie_word_embeddings=False)
    assert info["missing_keys"] == {"vocab_projector.weight", "vocab_projector.bias"}
    assert "initialised anew: vocab_projector.bias, vocab_projector.weight" in caplog.text
    assert 0.01 < model.vocab_projector.weight.std() < 0.03 and (model.vocab_projector.bias == 0).all()
    same(model.distilbert, theirs)


def test_legacy_names(saved):
    path, theirs = saved
    tensors = load_file(path / "model.safetensors")
    tensors["embeddings.LayerNorm.gamma"] = tensors.pop("embeddings.LayerNorm.weight")
    tensors["embeddings.LayerNorm.beta"] = tensors.pop("embeddings.LayerNorm.bias")
    tensors["embeddings.position_ids"] = torch.arange(40)[None]
    save_file(tensors, path / "model.safetensors")
    ours, info = DistilBertModel.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    same(ours, theirs)


@pytest.mark.parametrize("with_head", [False, True])
def test_bert_converts_exactly(with_head, tmp_path):
    config = transformers.BertConfig(
        vocab_size=99,
        hidden_size=48,
        num_attention_heads=3,
        intermediate_size=70,
        num_hidden_layers=2,
        max_position_embeddings=40,
        hidden_act="relu",
        layer_norm_eps=1e-5,
        type_vocab_size=2,
    )
    model = (transformers.BertForMaskedLM if with_head else transformers.BertModel)(config).eval()
    for p in model.parameters():  # norms and biases must not be ones and zeros
        p.data.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(tmp_path)
    ours, info = DistilBertModel.from_pretrained(tmp_path, output_loading_info=True)
    same(ours, model.bert if with_head else model)
    assert not info["missing_keys"]
    if not with_head:
        assert info["unexpected_keys"] == {"pooler.dense.weight", "pooler.dense.bias"}
    ids = torch.randint(1, 99, (2, 6))
    ours(ids, token_type_ids=torch.zeros_like(ids))
    with pytest.raises(ValueError, match="converted for a single segment"):
        ours(ids, token_type_ids=torch.ones_like(ids))
    ours.save_pretrained(tmp_path / "converted")  # a DistilBERT from now on
    same(DistilBertModel.from_pretrained(tmp_path / "converted"), ours)


def test_minilm_against_bert(minilm):
    theirs = transformers.BertModel.from_pretrained(minilm).eval()
    ours = DistilBertModel.from_pretrained(minilm)
    ids = torch.randint(1000, 30000, (6, 200))
    keep = torch.arange(200) < torch.tensor([200, 3, 77, 128, 1, 199])[:, None]
    with torch.inference_mode():
        a, b = ours(ids, keep)[0], theirs(ids, attention_mask=keep.long())[0]
    torch.testing.assert_close(a[keep], b[keep], rtol=0, atol=2e-5)


def test_local_paths_open_no_socket(minilm, monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    from fastdistil import Embedder

    assert Embedder.from_pretrained(str(minilm), device="cpu").encode("text").shape == (384,)
    for missing in (tmp_path / "none", "./none", "/none/at/all", "~/none"):
        with pytest.raises(FileNotFoundError, match="there is no directory"):
            DistilBertModel.from_pretrained(missing)


def test_hub_id_from_the_local_cache(saved, tmp_path, monkeypatch):
    path, theirs = saved
    repo = tmp_path / "cache" / "models--someone--tiny"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_bytes((path / name).read_bytes())
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one"]
    (snapshot / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    (snapshot / "added_tokens.json").write_text('{"<new>": 6}')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    same(DistilBertModel.from_pretrained("someone/tiny", local_files_only=True), theirs)
    with pytest.raises(FileNotFoundError, match="'someone/other' is neither a local directory nor a hub id"):
        DistilBertModel.from_pretrained("someone/other", local_files_only=True)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    where = dict(local_files_only=True, revision="main", cache_dir=str(tmp_path / "cache"), token=False)
    tokenizer = DistilBertTokenizer.from_pretrained("someone/tiny", **where)
    assert tokenizer("one <new>")["input_ids"] == [2, 5, 6, 3]
    found = pipeline("feature-extraction", str(path), "someone/tiny", device="cpu", **where)
    assert len(found("one <new>")[0]) == 4


def test_pickles_only_on_request(saved, tmp_path):
    path, theirs = saved
    torch.save(theirs.state_dict(), path / "pytorch_model.bin")
    (path / "model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="use_safetensors=False"):
        DistilBertModel.from_pretrained(path)
    same(DistilBertModel.from_pretrained(path, use_safetensors=False), theirs)

    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('executed')",))

    torch.save({"x": Evil()}, path / "pytorch_model.bin")
    with pytest.raises(OSError, match="could not be read with weights_only=True"):
        DistilBertModel.from_pretrained(path, use_safetensors=False)
    torch.save([1], path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds a list"):
        DistilBertModel.from_pretrained(path, use_safetensors=False)


def test_a_config_that_lies_is_refused_before_memory_is_taken(saved):
    path, _ = saved
    edit(path / "config.json", lambda c: c.update(dim=48 * 1024, n_heads=1024))
    with pytest.raises(
        ValueError, match=r"word_embeddings.weight: \[99, 48\] in the file, \[99, 49152\] by the config"
    ):
        DistilBertModel.from_pretrained(path)
    edit(path / "config.json", lambda c: c.update(dim=48, n_heads=3, vocab_size=100))
    model, info = DistilBertModel.from_pretrained(path, ignore_mismatched_sizes=True, output_loading_info=True)
    assert info["mismatched_keys"] == {("embeddings.word_embeddings.weight", (99, 48), (100, 48))}
    assert not info["missing_keys"]
    assert len(model.get_input_embeddings().weight) == 100
    assert 0.01 < model.get_input_embeddings().weight.std() < 0.03


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda p: (p / "config.json").unlink(), OSError, "holds no config.json"),
        (lambda p: (p / "model.safetensors").unlink(), OSError, "holds neither model.safetensors nor"),
        (lambda p: (p / "model.safetensors").write_bytes(b""), OSError, "not a readable safetensors file"),
        (
            lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-9]),
            OSError,
            "readable",
        ),
        (lambda p: (p / "config.json").write_text("[1]"), ValueError, "JSON object"),
        (
            lambda p: save_file({"x": torch.ones(2)}, p / "model.safetensors"),
            ValueError,
            "none of its 1 tensors belongs",
        ),
    ],
)
def test_damaged_directories(saved, damage, error, message):
    path, _ = saved
    damage(path)
    with pytest.raises(error, match=message):
        DistilBertModel.from_pretrained(path)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ({"weight_map": {"a": "../outside.safetensors"}}, ValueError, "must lie in the index's own directory"),
        ({"weight_map": {"a": "/etc/passwd"}}, ValueError, "must lie in the index's own directory"),
        ({"weight_map": {"a": ".."}}, ValueError, "must lie in the index's own directory"),
        ({"weight_map": {"a": "absent.safetensors"}}, FileNotFoundError, "absent.safetensors, which is not there"),
        ({"weight_map": {"a": 3}}, ValueError, "3"),
        ({"weight_map": [1]}, ValueError, "is not a weight index"),
        ({}, ValueError, "is not a weight index"),
    ],
)
def test_bad_indexes(saved, index, error, message):
    path, _ = saved
    (path.parent / "outside.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(error, match=message):
        DistilBertModel.from_pretrained(path)


def test_a_shard_that_lacks_what_the_index_puts_in_it(saved):
    path, _ = saved
    tensors = load_file(path / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors") | {"of.no.use": "a.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "model.safetensors").rename(path / "a.safetensors")
    DistilBertModel.from_pretrained(path)
    del tensors["transformer.layer.1.ffn.lin2.weight"]
    save_file(tensors, path / "a.safetensors")
    with pytest.raises(ValueError, match=r"the index puts transformer.layer.1.ffn.lin2.weight in a.safetensors, which"):
        DistilBertModel.from_pretrained(path)


def test_a_state_dict_with_the_old_buffer_of_positions(saved):
    path, _ = saved
    for prefix, kind in (("", DistilBertModel), ("distilbert.", DistilBertForMaskedLM)):
        target = kind.from_pretrained(path)
        state = target.state_dict() | {f"{prefix}embeddings.position_ids": torch.arange(512)[None]}
        target.load_state_dict(state)
        assert f"{prefix}embeddings.position_ids" in state  # the caller's own is left alone


def test_a_missing_encoder_weight_is_reported(saved, caplog):
    path, _ = saved
    tensors = load_file(path / "model.safetensors")
    del tensors["transformer.layer.1.ffn.lin2.weight"]
    save_file(tensors, path / "model.safetensors")
    _, info = DistilBertModel.from_pretrained(path, output_loading_info=True)
    assert info["missing_keys"] == {"transformer.layer.1.ffn.lin2.weight"}
    assert "initialised anew: transformer.layer.1.ffn.lin2.weight" in caplog.text


def test_transformers_keywords(saved, tmp_path):
    path, _ = saved
    model = DistilBertModel.from_pretrained(
        path, trust_remote_code=False, force_download=False, subfolder="", variant=None, attn_implementation="sdpa",
        device_map="cpu", low_cpu_mem_usage=True,
    )  # fmt: skip
    model.save_pretrained(save_directory=tmp_path / "a", safe_serialization=True, is_main_process=True)
    model.save_pretrained(tmp_path / "b", is_main_process=False)
    assert (tmp_path / "a" / "model.safetensors").is_file() and not (tmp_path / "b").exists()
    for keywords in ({"variant": "fp16"}, {"nonsense": 3}):
        with pytest.raises(TypeError, match=f"'{next(iter(keywords))}' is neither an argument nor a field"):
            DistilBertModel.from_pretrained(path, **keywords)
    with pytest.raises(ValueError, match="device_map .* spreads a model over devices"):
        DistilBertModel.from_pretrained(path, device_map={"a": 0, "b": 1})


def test_arguments(tmp_path):
    with pytest.raises(TypeError, match="by a directory or a hub id"):
        find(3)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="give the directory"):
        find(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="give a directory to save into"):
        DistilBertModel(DistilBertConfig(**TINY)).save_pretrained(tmp_path / "file")
    report = load_weights(
        DistilBertModel(DistilBertConfig(**TINY)),
        Weights.from_tensors(DistilBertModel(DistilBertConfig(**TINY)).state_dict()),
    )
    assert report == LoadReport()


def test_token_types_fold_only_into_bert_and_round_once(tmp_path, saved):
    path, theirs = saved
    tensors = {name: t.clone() for name, t in load_file(path / "model.safetensors").items()}  # the file may be mapped
    tensors |= {"embeddings.token_type_embeddings.weight": torch.randn(2, 48)}
    save_file(tensors, path / "model.safetensors")
    ours, info = DistilBertModel.from_pretrained(path, output_loading_info=True)
    same(ours, theirs)
    assert info["unexpected_keys"] == {"embeddings.token_type_embeddings.weight"}

    config = transformers.BertConfig(hidden_size=48, num_attention_heads=3, intermediate_size=70, num_hidden_layers=1)
    transformers.BertModel(config).half().save_pretrained(tmp_path / "half")
    half = transformers.BertModel.from_pretrained(tmp_path / "half", dtype=torch.float32).eval()
    same(DistilBertModel.from_pretrained(tmp_path / "half", dtype="float32"), half)
    tensors = {name: t.clone() for name, t in load_file(tmp_path / "half" / "model.safetensors").items()}
    del tensors["embeddings.position_embeddings.weight"]
    save_file(tensors, tmp_path / "half" / "model.safetensors")
    _, info = DistilBertModel.from_pretrained(tmp_path / "half", output_loading_info=True)
    assert "embeddings.token_type_embeddings.weight" in info["unexpected_keys"]
    tensors["embeddings.token_type_embeddings.weight"] = torch.empty(0, 48)
    tensors["embeddings.position_embeddings.weight"] = torch.zeros(512, 48)
    save_file(tensors, tmp_path / "half" / "model.safetensors")
    with pytest.raises(ValueError, match=r"shape \[0, 48\]"):
        DistilBertModel.from_pretrained(tmp_path / "half")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_deeply_nested_json(saved, name):
    path, _ = saved
    (path / "model.safetensors").unlink()
    (path / name).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=name):
        DistilBertModel.from_pretrained(path)


def test_bad_devices_and_state_dicts(saved):
    path, _ = saved
    for device in ("foo", "cuda:99"):
        with pytest.raises(ValueError, match=f"device '{device}'"):
            DistilBertModel.from_pretrained(path, device=device)
    with pytest.raises(ValueError, match="holds a int under 'a'"):
        DistilBertModel.from_pretrained(path, state_dict={"a": 3})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_floating_point_are_refused(dtype, tmp_path):
    model = DistilBertModel(DistilBertConfig(vocab_size=20, dim=8, n_heads=2, n_layers=1, hidden_dim=8))
    state = model.state_dict() | {"transformer.layer.0.ffn.lin1.bias": torch.zeros(8, dtype=dtype)}
    with pytest.raises(ValueError, match=r"transformer.layer.0.ffn.lin1.bias is .*; weights are float64"):
        DistilBertModel.from_pretrained(None, config=model.config, state_dict=state)


def test_a_configuration_beyond_the_memory_is_named(monkeypatch):
    model = DistilBertModel(DistilBertConfig(vocab_size=20, dim=8, n_heads=2, n_layers=1, hidden_dim=8))

    def fail(self, *args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(DistilBertModel, "materialize", fail)
    with pytest.raises(ValueError, match=r"asks for 4,\d+ parameters, for which there is no memory \(19 of its 20"):
        state = {"embeddings.LayerNorm.weight": torch.ones(8)}
        DistilBertModel.from_pretrained(None, config=model.config, state_dict=state)


def test_loading_leaves_out_what_is_slow_to_import(saved):
    code = (
        "import sys; from fastdistil import DistilBertModel as M; M.from_pretrained(sys.argv[1]); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(saved[0])], capture_output=True, text=True, check=True)
    assert "torch" in done.stdout.split() and "sympy" not in done.stdout.split()


def test_the_hub_is_asked_for_every_file_of_a_sentence_transformer():
    names = [
        "modules.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "model.safetensors",
        "sentence_bert_config.json",
        "sentence_distilbert_config.json",
        "added_tokens.json",
    ]
    others = ["2_Dense/pytorch_model.bin", "pytorch_model.bin", "onnx/model.onnx", "README.md"]
    assert list(filter_repo_objects([*names, *others], allow_patterns=HUB_FILES)) == names


@pytest.mark.parametrize("prefix", ["bert.", "distilbert.", ""])
def test_token_types_below_a_prefix(prefix, tmp_path):
    """They are part of every position, wherever the file has them."""
    torch.manual_seed(0)
    config = DistilBertConfig(**TINY)
    types = torch.randn(2, config.dim)
    theirs = transformers.BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        intermediate_size=config.hidden_dim,
        max_position_embeddings=config.max_position_embeddings,
    )
    bert = transformers.BertModel(theirs)
    with torch.no_grad():
        bert.embeddings.token_type_embeddings.weight.copy_(types)
    state = {prefix + name: value.contiguous() for name, value in bert.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    theirs.save_pretrained(tmp_path)
    for cls in (fastdistil.DistilBertModel, fastdistil.DistilBertForTokenClassification):
        found = cls.from_pretrained(tmp_path).base_model.embeddings.position_embeddings.weight
        torch.testing.assert_close(found, bert.embeddings.position_embeddings.weight + types[0])


def test_the_dtype_of_a_file_of_several():
    """The first floating-point tensor's, where the configuration states none."""
    config = DistilBertConfig(**TINY)
    state = fastdistil.DistilBertModel(config).state_dict()
    names = list(state)
    for first, rest in ((torch.float16, torch.float32), (torch.float32, torch.float16)):
        given = {"seen": torch.zeros(1, dtype=torch.int64)}
        given |= {name: state[name].to(first if name == names[0] else rest) for name in names}
        found = fastdistil.DistilBertModel.from_pretrained(None, config=config, state_dict=given)
        assert found.dtype is first


def test_tensors_gathered_elsewhere_are_saved(tmp_path):
    model = DistilBertModel(DistilBertConfig(**TINY))
    state = {name: value + 1 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_an_own_configuration_is_not_changed(tmp_path):
    config = DistilBertConfig(**TINY)
    DistilBertModel(config).save_pretrained(tmp_path)
    found = DistilBertModel.from_pretrained(tmp_path, config=config, dropout=0.3, num_labels=5)
    assert found.config.dropout == 0.3 and config.dropout == 0.1 and config.num_labels == 2


def test_the_hub_is_asked_as_the_caller_says(monkeypatch, saved):
    path, _ = saved
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **how: (asked.append((name, how)), path)[1])
    how = dict(revision="v2", local_files_only=True, cache_dir="somewhere", token="secret")
    assert find("someone/tiny", **how, extra_files=["own.bin"]) == path
    ((name, given),) = asked
    assert name == "someone/tiny" and given == how | {"allow_patterns": [*HUB_FILES, "own.bin"]}
    DistilBertModel.from_pretrained("someone/tiny", revision="v3", cache_dir="there", token=False)
    assert asked[-1][1].items() >= {"revision": "v3", "cache_dir": "there", "token": False}.items()


@pytest.mark.parametrize("shape", [(2, 24), (0, 48), (48,)])
def test_token_types_of_another_shape_are_refused(shape, tmp_path):
    theirs = transformers.BertConfig(
        vocab_size=99, hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=80
    )
    state = {name: value.contiguous() for name, value in transformers.BertModel(theirs).state_dict().items()}
    state["embeddings.token_type_embeddings.weight"] = torch.ones(shape)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"token_type_embeddings.weight has shape \[.*, not \[types, dim\]"):
        DistilBertModel.from_pretrained(tmp_path)


def test_adapters_that_are_gone_are_not_in_the_configuration(tmp_path):
    model = DistilBertModel(DistilBertConfig(**TINY))
    model.add_adapter("a")
    model.save_pretrained(tmp_path / "with")
    assert "adapters" in json.loads((tmp_path / "with" / "config.json").read_text())
    again = DistilBertModel.from_pretrained(tmp_path / "with")
    again.delete_adapter("a")
    again.save_pretrained(tmp_path / "without")
    assert "adapters" not in json.loads((tmp_path / "without" / "config.json").read_text())
    _, report = DistilBertModel.from_pretrained(tmp_path / "without", output_loading_info=True)
    assert not any(report.values())


def test_a_number_is_a_cuda_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(as_device(name)) for name in (1, "1", "cuda:1", -1)] == ["cuda:1"] * 3 + ["cpu"]
    with pytest.raises(ValueError, match="device 'cuda:2' was asked for"):
        as_device("2")
