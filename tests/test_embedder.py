import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastdistil import DistilBertConfig, DistilBertModel, DistilBertTokenizer, Embedder, cpu
from fastdistil.engine import runner, scheduler

TEXTS = ["a cat sat", "temporary directory", "", "word " * 400, "a cat sat", "it's 3.14, isn't it?"] * 9


@pytest.fixture(scope="module")
def embedder(minilm):
    return Embedder.from_pretrained(minilm, device="cpu")


@pytest.fixture
def checkpoint(minilm, tmp_path):
    """A tiny random model with MiniLM's tokenizer and sentence-transformers' files."""
    model = DistilBertModel(DistilBertConfig(vocab_size=30522, dim=16, n_heads=2, hidden_dim=24, n_layers=1))
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "modules.json", "sentence_bert_config.json"):
        shutil.copy(minilm / name, tmp_path / name)
    shutil.copytree(minilm / "1_Pooling", tmp_path / "1_Pooling")
    return tmp_path


def test_equals_sentence_transformers(minilm, embedder):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    theirs = sentence_transformers.SentenceTransformer(str(minilm), device="cpu")
    expected = theirs.encode(TEXTS)
    got = embedder.encode(TEXTS)
    assert got.dtype == np.float32 and got.shape == (len(TEXTS), 384)
    assert (got * expected).sum(1).min() >= 0.999999
    assert np.abs(got - expected).max() < 1e-5
    assert embedder.encode(TEXTS[0]).shape == (384,)
    assert (embedder.pooling, embedder.normalize, embedder.max_length) == ("mean", True, 256)


@pytest.mark.parametrize("wrong", [-1, True, 1.5])
def test_tokenizer_processes_are_checked(embedder, wrong):
    with pytest.raises(ValueError, match=f"tokenizer_processes is {wrong}; it must be an integer of 0 or more"):
        embedder.encode(["a"], tokenizer_processes=wrong)


def test_order_batches_and_threads_do_not_matter(embedder, monkeypatch):
    expected = embedder.encode(TEXTS)
    for budget in (1, 64, 100_000):
        np.testing.assert_allclose(embedder.encode(TEXTS, max_batch_tokens=budget), expected, atol=2e-6)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    np.testing.assert_allclose(embedder.encode([TEXTS[i] for i in order]), expected[order], atol=2e-6)
    threads = torch.get_num_threads()
    monkeypatch.setattr(runner, "WORTH_A_WORKER", 1)
    np.testing.assert_allclose(embedder.encode(TEXTS, max_batch_tokens=300), expected, atol=2e-6)
    assert torch.get_num_threads() == threads
    with runner.cpu_workers(max(threads, 2)) as (pool, workers):
        assert set(pool.map(lambda _: torch.get_num_threads(), range(20))) == {max(threads, 2) // workers}
    torch.set_num_threads(threads)
    embedder.encode(TEXTS, max_batch_tokens=300)
    with ThreadPoolExecutor(1) as pool:  # a thread that starts later has as many as before
        assert pool.submit(torch.get_num_threads).result() == threads
    monkeypatch.setattr(scheduler, "HEAD", 3)
    monkeypatch.setattr(scheduler, "WINDOW", 7)
    np.testing.assert_allclose(embedder.encode(iter(TEXTS)), expected, atol=2e-6)


@pytest.mark.parametrize("error", ["KeyboardInterrupt()", 'RuntimeError("can\'t start new thread")'])
def test_a_worker_that_does_not_start(error, minilm):
    """An interrupt, or a limit on threads, while the second one starts: the first does not wait for it."""
    code = f"""
import sys, threading, torch
from fastdistil.engine import runner

start, before = threading.Thread.start, threading.active_count()

def first_only(thread):
    if threading.active_count() > before:
        raise {error}
    start(thread)

torch.set_num_threads(4)
threading.Thread.start = first_only
try:
    with runner.cpu_workers(4):
        pass
except BaseException as error:
    assert repr(error) == repr({error}), error
else:
    raise SystemExit("nothing was raised")
threading.Thread.start = start
assert threading.active_count() == before and torch.get_num_threads() == 4
found = []
thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
thread.start()
thread.join()
assert found == [4], found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_each_distinct_text_is_tokenised_once(embedder, monkeypatch):
    seen = []
    encode = DistilBertTokenizer.encode_ids
    monkeypatch.setattr(
        DistilBertTokenizer,
        "encode_ids",
        lambda self, texts, *a, **k: seen.extend(texts) or encode(self, texts, *a, **k),
    )
    for texts in (TEXTS, np.array(TEXTS), np.array(TEXTS, dtype=object)):
        embedder.encode(texts)
        assert seen == [*dict.fromkeys(TEXTS)]
        seen.clear()


def test_options(checkpoint):
    own = Embedder.from_pretrained(checkpoint, device="cpu")
    assert own.normalize and own.max_length == 256 and own.model.dtype is torch.float32
    other = Embedder.from_pretrained(checkpoint, "cpu", "bfloat16", "cls", False, 9)
    assert (other.pooling, other.normalize, other.max_length, other.model.dtype) == ("cls", False, 9, torch.bfloat16)
    cls = Embedder.from_pretrained(checkpoint, "cpu", pooling="cls", normalize=False)
    ids = torch.tensor([cls.tokenizer.encode("a cat sat")])
    with torch.inference_mode():
        np.testing.assert_allclose(cls.encode("a cat sat"), cls.model(ids)[0][0, 0], atol=1e-6)
    (checkpoint / "sentence_bert_config.json").write_text('{"max_seq_length": null, "do_lower_case": true}')
    (checkpoint / "sentence_distilbert_config.json").write_text('{"max_seq_length": 5}')  # the first one counts
    (checkpoint / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"query": "Query: "}, "default_prompt_name": "query"})
    )
    prompted = Embedder.from_pretrained(checkpoint, device="cpu")
    assert prompted.max_length == 512
    np.testing.assert_allclose(prompted.encode("A CAT"), own.encode("query: a cat"), atol=1e-6)
    for name in ("modules.json", "config_sentence_transformers.json"):
        (checkpoint / name).unlink()
    for path in checkpoint.glob("sentence_*_config.json"):
        path.unlink()
    plain = Embedder.from_pretrained(checkpoint, device="cpu")
    assert (plain.pooling, plain.normalize, plain.max_length) == ("mean", False, 512)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("watched", [False, True])
def test_the_last_block_answers_for_what_is_pooled(pooling, watched, checkpoint, monkeypatch):
    own = Embedder.from_pretrained(checkpoint, "cpu", pooling=pooling, normalize=False)
    texts, rows, form = ["a cat sat", "it's 3.14, isn't it?", "a", "temporary"], [], cpu.feed_forward
    tokens, blocks = sum(map(len, own.tokenizer(texts)["input_ids"])), own.model.config.n_layers
    monkeypatch.setattr(cpu, "feed_forward", lambda x, *rest: rows.append(len(x)) or form(x, *rest))
    if watched:  # then by way of the whole
        own.model.transformer.layer[0].register_forward_hook(lambda *given: None)
    found = own.encode(texts)
    assert rows == ([] if watched else [tokens] * (blocks - 1) + [len(texts) if pooling == "cls" else tokens])
    for text, vector in zip(texts, found, strict=True):
        with torch.inference_mode():
            hidden = own.model(torch.tensor([own.tokenizer.encode(text)]))[0][0]
        np.testing.assert_allclose(vector, hidden[0] if pooling == "cls" else hidden.mean(0), atol=1e-6)


def test_a_text_of_no_tokens_has_no_first_one(checkpoint):
    """Where the tokenizer puts nothing around a text; zeros, as the pooling has it."""
    values = json.loads((checkpoint / "tokenizer.json").read_text())
    (checkpoint / "tokenizer.json").write_text(json.dumps(values | {"post_processor": None}))
    for pooling in ("cls", "mean"):
        own = Embedder.from_pretrained(checkpoint, "cpu", pooling=pooling)
        found = own.encode(["", "a cat", "", "it sat", ""])
        assert not found[::2].any() and np.allclose(np.linalg.norm(found[1::2], axis=1), 1, atol=1e-5)
        assert not own.encode("").any() and not own.encode(["", ""]).any()
        np.testing.assert_allclose(found[3], own.encode("it sat"), atol=1e-6)
        own.model.transformer.layer[0].register_forward_hook(lambda *given: None)
        np.testing.assert_allclose(own.encode(["", "a cat", "", "it sat", ""]), found, atol=1e-6)
        assert not own.encode(["", ""]).any()
        given = torch.tensor([1, 2, 3]), torch.tensor([0, 0], dtype=torch.int32), 0
        assert own.model.forward_packed(*given, only=torch.tensor([1])).shape == (1, own.model.config.dim)


@pytest.mark.parametrize(
    "layers",
    [
        [(12, "Tanh", True)],
        [(12, "Identity", False), "normalize"],
        [(20, "ReLU", True), (8, "GELU", True), "normalize"],
        ["normalize", (12, "SiLU", True)],
        ["normalize"],
    ],
    ids=str,
)
@pytest.mark.parametrize("truncate_dim", [None, 5])
def test_layers_behind_the_pooling(layers, truncate_dim, checkpoint, tmp_path):
    """As sentence-transformers computes them, in the order of the file; also what it cuts and normalises."""
    st = pytest.importorskip("sentence_transformers")
    modules, width = list(st.SentenceTransformer(str(checkpoint), device="cpu"))[:2], 16
    for layer in layers:
        if layer == "normalize":
            modules.append(st.models.Normalize())
        else:
            out, activation, bias = layer
            modules.append(st.models.Dense(width, out, bias, getattr(torch.nn, activation)()))
            width = out
    theirs = st.SentenceTransformer(modules=modules, device="cpu", truncate_dim=truncate_dim)
    theirs.save_pretrained(str(tmp_path / "saved"))
    ours = Embedder.from_pretrained(tmp_path / "saved", device="cpu", truncate_dim=truncate_dim)
    assert ours.dim == (truncate_dim or width)
    found = ours.encode(TEXTS, max_batch_tokens=100)
    assert found.shape == (len(TEXTS), ours.dim) and found.dtype == np.float32
    np.testing.assert_allclose(found, theirs.encode(TEXTS), atol=1e-6)
    unit = Embedder.from_pretrained(tmp_path / "saved", "cpu", normalize=True, truncate_dim=truncate_dim)
    np.testing.assert_allclose(unit.encode(TEXTS), theirs.encode(TEXTS, normalize_embeddings=True), atol=1e-6)
    rough = Embedder.from_pretrained(tmp_path / "saved", "cpu", "bfloat16", truncate_dim=truncate_dim)
    assert (np.abs(rough.encode(TEXTS) - found) < 0.05 * np.abs(found).max()).all()
    copied = pickle.loads(pickle.dumps(ours))
    np.testing.assert_array_equal(copied.encode(TEXTS[:2]), ours.encode(TEXTS[:2]))


def test_layers_of_ones_own(embedder):
    """They are in no training mode, where the model is, and as trainable as before."""
    linear = torch.nn.Linear(384, 6)
    made = Embedder(embedder.model, embedder.tokenizer, layers=[linear, torch.nn.Dropout(0.5)])
    assert (made.encode(TEXTS[:2]) == made.encode(TEXTS[:2])).all() and linear.weight.requires_grad
    moved = Embedder(DistilBertModel(embedder.model.config).to("meta"), embedder.tokenizer, layers=[linear])
    moved.engine(100)
    assert linear.weight.is_meta


def test_truncate_dim_of_the_files(checkpoint):
    (checkpoint / "config_sentence_transformers.json").write_text('{"truncate_dim": 5}')
    st = pytest.importorskip("sentence_transformers")
    ours = Embedder.from_pretrained(checkpoint, device="cpu")
    np.testing.assert_allclose(
        ours.encode(TEXTS),
        st.SentenceTransformer(str(checkpoint), device="cpu", truncate_dim=5).encode(TEXTS),
        atol=1e-6,
    )
    plain = Embedder.from_pretrained(checkpoint, device="cpu", normalize=False, truncate_dim=7)
    whole = Embedder.from_pretrained(checkpoint, device="cpu", normalize=False, truncate_dim=16)
    np.testing.assert_allclose(plain.encode(TEXTS), whole.encode(TEXTS)[:, :7], atol=1e-6)
    for wrong, error in ((0, ValueError), (17, ValueError), (True, TypeError), (2.0, TypeError)):
        with pytest.raises(error, match="truncate_dim"):
            Embedder.from_pretrained(checkpoint, device="cpu", truncate_dim=wrong)


def test_prompts_that_every_checkpoint_has(checkpoint):
    told = checkpoint / "config_sentence_transformers.json"
    told.write_text('{"prompts": {"query": null}, "default_prompt_name": "document"}')
    made = Embedder.from_pretrained(checkpoint, device="cpu")
    assert made.prompt == "" and made.prompts == {"query": "", "document": ""}


def test_prompts(checkpoint):
    (checkpoint / "config_sentence_transformers.json").write_text('{"prompts": {"query": "Q: ", "passage": "P: "}}')
    own = Embedder.from_pretrained(checkpoint, device="cpu")
    assert own.prompt == "" and own.prompts == {"query": "Q: ", "document": "", "passage": "P: "}
    expected = own.encode(["Q: a cat", "Q: "])
    for options in (dict(prompt_name="query"), dict(prompt="Q: ")):
        np.testing.assert_array_equal(own.encode(["a cat", ""], **options), expected)
        made = Embedder.from_pretrained(checkpoint, device="cpu", **options)
        np.testing.assert_array_equal(made.encode(["a cat", ""]), expected)
        np.testing.assert_array_equal(made.encode("a cat", prompt=""), own.encode("a cat"))
    np.testing.assert_allclose(own.encode("a cat", prompt_name="query"), expected[0], atol=1e-6)
    for options, error, message in (
        (
            dict(prompt_name="q"),
            ValueError,
            "there is no prompt 'q'; the checkpoint has 'query', 'document', 'passage'",
        ),
        (dict(prompt_name="query", prompt="x"), ValueError, "not both"),
        (dict(prompt=3), TypeError, "a prompt must be a string, got 3"),
    ):
        for call in (own.encode, lambda _, **options: Embedder.from_pretrained(checkpoint, device="cpu", **options)):
            with pytest.raises(error, match=message):
                call(["a"], **options)


DENSE = {"in_features": 16, "out_features": 4, "activation_function": "torch.nn.modules.activation.Tanh"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_features": "16"}, "2_Dense/config.json: in_features is '16'; it must be an integer"),
        ({"out_features": None}, "out_features is None"),
        ({"activation_function": "os.system"}, "activation_function is 'os.system'; one of Tanh, Identity"),
        ({"activation_function": "somebody.Tanh"}, "activation_function is 'somebody.Tanh'"),
        ({"use_residual": True}, "asks for a residual"),
        ({"module_input_name": "token_embeddings"}, "names what it reads or writes"),
        ({"module_output_name": ["x"]}, "names what it reads or writes"),
        ({"in_features": 10**30}, "linear.weight is"),
        ("normalize tokens", "3_Normalize/config.json .* names what it reads or writes"),
        ("before", "modules.json has Dense before Pooling, or Pooling twice"),
        ("twice", "modules.json has Pooling before Pooling, or Pooling twice"),
        ({"out_features": 5}, r"2_Dense/model.safetensors: linear.weight is \(4, 16\), and has to be \(5, 16\)"),
        ({"bias": True}, r"linear.bias is absent, and has to be \(4,\)"),
        ({"in_features": 8}, "linear.weight is"),
        ("width", "a dense layer takes 8 numbers, and is given 16"),
        ("bin", "holds pytorch_model.bin but no model.safetensors"),
        ("no weights", "2_Dense/model.safetensors"),
        ("no config", "2_Dense/config.json is missing"),
        ("integers", "linear.weight has to hold floating point numbers"),
    ],
)
def test_a_dense_layer_that_cannot_be_used(changes, message, checkpoint):
    place = checkpoint / "2_Dense"
    place.mkdir()
    width = 8 if changes == "width" else 16
    config = DENSE | {"bias": False, "in_features": width} | (changes if isinstance(changes, dict) else {})
    if changes != "no config":
        (place / "config.json").write_text(json.dumps(config))
    if changes not in ("bin", "no weights"):
        kind = torch.int64 if changes == "integers" else torch.float16
        save_file({"linear.weight": torch.ones(4, width, dtype=kind)}, place / "model.safetensors")
    (place / "pytorch_model.bin").write_bytes(b"") if changes == "bin" else None
    modules = [{"type": f"x.{path[2:] or 'Transformer'}", "path": path} for path in ("", "1_Pooling", "2_Dense")]
    if changes == "before":
        modules.append(modules.pop(1))
    elif changes == "twice":
        modules.insert(1, modules[1])
    elif changes == "normalize tokens":
        modules.append({"type": "x.Normalize", "path": "3_Normalize"})
        (checkpoint / "3_Normalize").mkdir()
        (checkpoint / "3_Normalize" / "config.json").write_text('{"module_input_name": "token_embeddings"}')
    (checkpoint / "modules.json").write_text(json.dumps(modules))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Embedder.from_pretrained(checkpoint, device="cpu")


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "asks for mean, cls pooling"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": 1}, "asks for mean, pooling_mode_max_tokens"),
        ({"pooling_mode": ["mean", "cls"]}, "asks for mean, cls pooling"),
        ({"pooling_mode_mean_tokens": False}, "asks for no pooling"),
        ({"pooling_mode": []}, "asks for no pooling"),
    ],
)
def test_poolings_that_are_not_one(told, message, checkpoint):
    (checkpoint / "1_Pooling" / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=f"1_Pooling/config.json {message}"):
        Embedder.from_pretrained(checkpoint, device="cpu")


def test_a_dense_layer_has_a_bias_unless_it_says_otherwise(checkpoint):
    place = checkpoint / "2_Dense"
    place.mkdir()
    config = {k: v for k, v in DENSE.items() if k != "bias"} | {
        "activation_function": "torch.nn.modules.linear.Identity"
    }
    (place / "config.json").write_text(json.dumps(config))
    tensors = {"linear.weight": torch.zeros(4, 16), "linear.bias": torch.arange(4.0)}
    save_file(tensors, place / "model.safetensors")
    modules = [{"type": f"x.{path[2:] or 'Transformer'}", "path": path} for path in ("", "1_Pooling", "2_Dense")]
    (checkpoint / "modules.json").write_text(json.dumps(modules))
    assert Embedder.from_pretrained(checkpoint, device="cpu").encode("a").tolist() == [0, 1, 2, 3]
    del tensors["linear.bias"]
    save_file(tensors, place / "model.safetensors")
    with pytest.raises(ValueError, match="linear.bias is absent"):
        Embedder.from_pretrained(checkpoint, device="cpu")


def test_newer_pooling_file(checkpoint):
    (checkpoint / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 16, "pooling_mode": "cls"}')
    assert Embedder.from_pretrained(checkpoint, device="cpu").pooling == "cls"


def test_nothing_to_embed(embedder):
    assert embedder.encode([]).shape == (0, 384)
    assert embedder.encode([""]).shape == (1, 384)


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        (["ok", None], TypeError, r"texts\[1\] must be a string"),
        (["ok"] * 2000 + [b"bytes"], TypeError, r"texts\[2000\] must be a string, got bytes"),
        (["ok"] * 1500 + ["\ud800"], ValueError, r"texts\[1500\] holds a lone surrogate"),
        ([f"t {i}" for i in range(6000)] + [5], TypeError, r"texts\[6000\] must be a string, got int"),
        ([f"t {i}" for i in range(6000)] + ["\ud800"], ValueError, r"texts\[6000\] holds a lone surrogate"),
        (3, TypeError, "texts must be a string or an iterable"),
        (b"bytes", TypeError, "got bytes"),
    ],
)
def test_bad_texts_are_named(embedder, texts, error, message):
    with pytest.raises(error, match=message):
        embedder.encode(texts)


def test_a_bad_text_behind_a_prompt_is_named(embedder):
    with pytest.raises(TypeError, match=r"texts\[1\] must be a string, got NoneType"):
        embedder.encode(["a", None], prompt="query: ")


def test_a_tokenizer_process_that_ended(embedder):
    there = embedder.text_windows(processes=1)
    try:
        assert len(there.window(["a"])) == 1
        for process in there._pool._processes.values():
            process.kill()
        with pytest.raises(ChildProcessError, match="a tokenizer process ended: perhaps there was no memory for it"):
            for _ in range(100):  # until its end is known
                there.window(["a"])
    finally:
        there.close()


def test_the_budget_is_the_encoders_and_not_the_vectors(minilm, monkeypatch):
    asked = []
    monkeypatch.setattr("fastdistil.engine.embedder.budget_for", lambda device, dim: asked.append(dim) or 64)
    embedder = Embedder.from_pretrained(minilm, device="cpu", truncate_dim=64)
    assert embedder.encode(["a", "b"], batch_size=np.int64(8)).shape == (2, 64) and set(asked) == {384}


@pytest.mark.parametrize("budget", [0, -5, 1.5, True])
def test_bad_budgets(embedder, budget):
    with pytest.raises(ValueError, match="max_batch_tokens"):
        embedder.encode(["a"], max_batch_tokens=budget)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules.json": '[{"type": "x.WordWeights", "path": ""}]'}, "module 'WordWeights', which is not supported"),
        (
            {"modules.json": '[{"type": "Pooling", "path": "1_Pooling"}, {"type": "Dense", "path": "../o"}]'},
            "outside its directory",
        ),
        ({"modules.json": '[{"type": "x.Pooling", "path": "../other"}]'}, "outside its directory"),
        ({"modules.json": '[{"type": "x.Transformer", "path": "0_T"}]'}, "load that directory"),
        ({"modules.json": "[3]"}, "not supported"),
        ({"modules.json": "{"}, "not a JSON file"),
        ({"modules.json": "null"}, "modules.json holds a JSON NoneType, not a list of modules"),
        ({"modules.json": "{}"}, "modules.json holds a JSON dict, not a list of modules"),
        ({"modules.json": '[{"type": "x.Pooling", "path": "\\u0000"}]'}, "modules.json names '.x00', which is no path"),
        (
            {"modules.json": '[{"type": "x.Pooling", "path": "\\ud800"}]'},
            "modules.json names '.ud800', which is no path",
        ),
        ({"sentence_bert_config.json": '{"tokenizer_args": {"model_max_length": 8}}'}, "tokenizer_args is .* not supp"),
        ({"config_sentence_transformers.json": '{"truncate_dim": "8"}'}, "transformers.json: truncate_dim is '8'"),
        ({"config_sentence_transformers.json": '{"truncate_dim": 17}'}, "truncate_dim is 17; it must be from 1 to 16"),
        ({"tokenizer_config.json": '{"unk_token": "\\ud800"}'}, "unk_token is '.ud800', which is not text"),
        ({"1_Pooling/config.json": '{"pooling_mode_max_tokens": true}'}, "pooling_mode_max_tokens pooling"),
        ({"1_Pooling/config.json": '{"pooling_mode": "mean", "include_prompt": false}'}, "include_prompt"),
        ({"1_Pooling/config.json": '{"pooling_mode": null}'}, "Pooling/config.json asks for None pooling"),
        ({"1_Pooling/config.json": '{"pooling_mode": [["mean"]]}'}, "Pooling/config.json asks for"),
        ({"sentence_bert_config.json": '{"max_seq_length": 100000}'}, "max_length is 100000"),
        ({"sentence_bert_config.json": '{"max_seq_length": "128"}'}, "bert_config.json: max_seq_length is '128'"),
        ({"sentence_bert_config.json": '{"max_seq_length": true}'}, "bert_config.json: max_seq_length is True"),
        ({"sentence_bert_config.json": '{"do_lower_case": "x"}'}, "bert_config.json: do_lower_case is 'x'"),
        ({"config_sentence_transformers.json": '{"default_prompt_name": "q"}'}, "no prompt 'q'"),
        (
            {"config_sentence_transformers.json": '{"default_prompt_name": "q", "prompts": ["q"]}'},
            "prompts is a JSON list",
        ),
        ({"config_sentence_transformers.json": '{"default_prompt_name": "q", "prompts": {"q": 1}}'}, "not a string"),
        (
            {"config_sentence_transformers.json": '{"similarity_fn_name": ["dot"]}'},
            r"json: similarity_fn_name is \['dot'\]",
        ),
    ],
)
def test_bad_settings_files(checkpoint, files, message):
    for name, text in files.items():
        (checkpoint / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        Embedder.from_pretrained(checkpoint, device="cpu")


def test_bad_options(checkpoint):
    for options, message in (
        ({"pooling": "max"}, "pooling 'max'"),
        ({"max_length": 513}, "max_length is 513"),
        ({"max_length": 2}, "max_length is 2"),
        ({"device": "mps"}, "device 'mps' is not supported"),
        ({"dtype": "int4"}, "dtype 'int4'"),
    ):
        with pytest.raises(ValueError, match=message):
            Embedder.from_pretrained(checkpoint, **({"device": "cpu"} | options))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            Embedder.from_pretrained(checkpoint, device="cuda")
    (checkpoint / "1_Pooling" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="modules.json asks for pooling"):
        Embedder.from_pretrained(checkpoint, device="cpu")
    small = DistilBertModel(DistilBertConfig(vocab_size=100, dim=16, n_heads=2, hidden_dim=24, n_layers=1))
    with pytest.raises(ValueError, match="ids up to 30521, the model 100 embeddings"):
        Embedder(small, DistilBertTokenizer.from_pretrained(checkpoint))


def test_lowering_spares_special_tokens(minilm, checkpoint):
    """do_lower_case over a cased tokenizer, as sentence-transformers has it."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    DistilBertTokenizer.from_pretrained(minilm, do_lower_case=False).save_pretrained(checkpoint)
    (checkpoint / "sentence_bert_config.json").write_text('{"max_seq_length": 40, "do_lower_case": true}')
    texts = ["Hello World", "fill the [MASK] Now", "ÉCOLE İstanbul", "[SEP] X", "LONG " * 400]
    theirs = sentence_transformers.SentenceTransformer(str(checkpoint), device="cpu")
    ours = Embedder.from_pretrained(checkpoint, device="cpu")
    np.testing.assert_allclose(ours.encode(texts), theirs.encode(texts), atol=1e-5)
    assert ours.tokenizer.mask_token_id in ours.tokenize(texts).ids
    with pytest.raises(TypeError, match="normalize must be true or false, got 'yes'"):
        Embedder(ours.model, ours.tokenizer, normalize="yes")


@pytest.mark.parametrize("kind", ["distilbert", "xlm-roberta"])
def test_settings_under_their_older_names(checkpoint, kind):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    (checkpoint / "sentence_bert_config.json").unlink()
    (checkpoint / f"sentence_{kind}_config.json").write_text('{"max_seq_length": 5}')
    texts = ["a b c d e f g h i j k l", "a b"]
    theirs = sentence_transformers.SentenceTransformer(str(checkpoint), device="cpu")
    ours = Embedder.from_pretrained(checkpoint, device="cpu")
    assert ours.max_length == theirs.max_seq_length == 5
    np.testing.assert_allclose(ours.encode(texts), theirs.encode(texts), atol=1e-5)
    (checkpoint / f"sentence_{kind}_config.json").write_text('{"max_seq_length": "5"}')
    with pytest.raises(ValueError, match=f"sentence_{kind}_config.json: max_seq_length is '5'"):
        Embedder.from_pretrained(checkpoint, device="cpu")


def test_the_longest_text_can_be_set(checkpoint):
    embedder = Embedder.from_pretrained(checkpoint, device="cpu")
    text = "a b c d e f g h i j k l"
    embedder.max_seq_length = 5
    assert embedder.get_max_seq_length() == embedder.max_length == 5
    np.testing.assert_allclose(embedder.encode(text), embedder.encode("a b c"), atol=1e-6)
    with pytest.raises(ValueError, match="max_length is 100000; it must be from 3 to"):
        embedder.max_seq_length = 100_000
    with pytest.raises(ValueError, match="output_value=None is not supported"):
        embedder.encode(text, output_value=None)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_token_ids_of_several_windows(embedder, monkeypatch):
    monkeypatch.setattr(scheduler, "HEAD", 3)
    monkeypatch.setattr(scheduler, "WINDOW", 4)
    texts = [f"{i} {'word ' * (i % 5)}" for i in range(12)]
    ids = embedder.tokenizer(texts)["input_ids"]
    expected = np.stack([embedder.encode(text) for text in texts])
    np.testing.assert_allclose(embedder.encode_tokens(ids), expected, atol=2e-6)
    ends = np.cumsum([0, *map(len, ids)])
    np.testing.assert_allclose(embedder.encode_tokens(np.concatenate(ids), ends), expected, atol=2e-6)


@pytest.mark.parametrize("ends", [[1, 3], [0, 2], [0, 2, 1, 3], [0, 4], []])
def test_where_texts_begin_is_checked(ends, embedder):
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the 3 input_ids"):
        embedder.encode_tokens(np.array([1, 2, 3]), np.array(ends, dtype=np.int64))


def test_fewer_numbers_of_length_1(embedder):
    found = embedder.encode(TEXTS, truncate_dim=8, normalize_embeddings=True)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(
        found, (cut := embedder.encode(TEXTS)[:, :8]) / np.linalg.norm(cut, axis=1, keepdims=True), atol=1e-6
    )


def test_a_vector_of_zeros_has_no_direction(checkpoint):
    own = Embedder.from_pretrained(checkpoint, device="cpu", normalize=False)
    norm = own.model.transformer.layer[-1].output_layer_norm
    with torch.no_grad():
        norm.weight.zero_(), norm.bias.zero_()
    assert (own.encode(["a"], normalize_embeddings=True) == 0).all()


def test_similarity_of_half_precision(embedder):
    one, other = (embedder.encode(TEXTS[:n]).astype(np.float16) for n in (3, 2))
    found = embedder.similarity(one, other)
    wide = embedder.similarity(one.astype(np.float32), other.astype(np.float32))
    assert found.dtype is torch.float32 and found.shape == (3, 2) and torch.equal(found, wide)


def test_one_id_too_many(embedder):
    tokenizer = embedder.tokenizer
    largest = max(tokenizer.get_vocab().values())
    sizes = dict(dim=16, n_heads=2, hidden_dim=24, n_layers=1)
    for most in (largest, largest - 5):
        with pytest.raises(ValueError, match=f"the tokenizer has ids up to {largest}, the model {most} embeddings"):
            Embedder(DistilBertModel(DistilBertConfig(vocab_size=most, **sizes)), tokenizer)
    Embedder(DistilBertModel(DistilBertConfig(vocab_size=largest + 1, **sizes)), tokenizer)


def test_no_more_tokens_than_the_tokenizer_or_the_model_has_room_for(minilm):
    tokenizer = DistilBertTokenizer.from_pretrained(minilm, model_max_length=40)
    sizes = dict(dim=16, n_heads=2, hidden_dim=24, n_layers=1)
    for positions, most in ((32, 32), (64, 40)):
        config = DistilBertConfig(max_position_embeddings=positions, **sizes)
        assert Embedder(DistilBertModel(config), tokenizer).max_length == most


@pytest.mark.parametrize("name", ["tokenizer_args", "processor_kwargs", "processing_kwargs"])
def test_settings_of_sentence_transformers_that_are_not_known(name, checkpoint):
    path = checkpoint / "sentence_bert_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: {"x": 1}}))
    with pytest.raises(ValueError, match=f"{name} is .* which is not supported"):
        Embedder.from_pretrained(checkpoint, device="cpu")


def test_a_dense_layer_has_a_bias_unless_told(checkpoint):
    (checkpoint / "2_Dense").mkdir()
    modules = json.loads((checkpoint / "modules.json").read_text())
    modules = [m for m in modules if not m["type"].endswith("Normalize")]
    modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (checkpoint / "modules.json").write_text(json.dumps(modules))
    told = {"in_features": 16, "out_features": 4, "activation_function": "torch.nn.modules.linear.Identity"}
    (checkpoint / "2_Dense" / "config.json").write_text(json.dumps(told))
    weights = {"linear.weight": torch.zeros(4, 16), "linear.bias": torch.arange(4.0)}
    save_file(weights, checkpoint / "2_Dense" / "model.safetensors")
    own = Embedder.from_pretrained(checkpoint, device="cpu", normalize=False)
    assert own.encode("a").tolist() == [0, 1, 2, 3]


def test_which_text_is_wrong_with_processes(embedder):
    texts = ["a"] * 1_500 + ["\ud800"] + ["b"]
    for processes in (0, 1):
        with pytest.raises(ValueError, match=r"texts\[1500\] holds a lone surrogate"):
            embedder.encode(texts, tokenizer_processes=processes)


# --- weights laid out for a run ---------------------------------------------------------------------------------------


@pytest.fixture
def laid_out(monkeypatch):
    """How many weights each run laid out, where oneDNN multiplies; else as if it did."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch is built without oneDNN")
    seen, prepare = [], cpu.prepare
    monkeypatch.setattr(cpu, "why_not_onednn", lambda: "")
    monkeypatch.setattr(cpu, "prepare", lambda blocks: seen.append(prepare(blocks)) or seen[-1])
    monkeypatch.setattr(runner, "WORTH_PREPARING", 100)
    return seen


@pytest.mark.parametrize("worker", [1, 10**6])
def test_weights_are_laid_out_for_each_run(worker, checkpoint, laid_out, monkeypatch):
    """So that what is written to them between runs counts, by whatever way; a few texts are not worth it."""
    monkeypatch.setattr(runner, "WORTH_A_WORKER", worker)
    own = Embedder.from_pretrained(checkpoint, device="cpu", normalize=False)
    own.encode(TEXTS[:1])
    assert laid_out == []
    for change in range(3):
        found = own.encode(TEXTS)
        assert len(laid_out) == change + 1 and len(laid_out[-1]) == 4  # of one block
        monkeypatch.setattr(runner, "WORTH_PREPARING", 10**9)
        np.testing.assert_allclose(found, own.encode(TEXTS), atol=2e-6)
        monkeypatch.setattr(runner, "WORTH_PREPARING", 100)
        for p in own.model.transformer.parameters():
            p.data.mul_(1.5)
        assert not np.allclose(found, own.encode(TEXTS), atol=1e-3)
        laid_out.pop()
    assert getattr(cpu._run, "prepared", None) is None


def test_weights_of_other_models_are_not_laid_out(checkpoint, laid_out):
    def encode(change=lambda model: None, **options):
        own = Embedder.from_pretrained(checkpoint, device="cpu", **options)
        change(own.model)
        assert np.isfinite(own.encode(TEXTS)).all()
        found = sum(map(len, laid_out))
        laid_out.clear()
        return found

    assert encode() == 4
    assert encode(dtype="bfloat16") == encode(dtype="int8") == encode(dtype="float64") == 0
    assert encode(lambda model: model.transformer.layer[0].register_forward_hook(lambda *a: None)) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert encode() == 0


@pytest.mark.parametrize("worker", [1, 10**6])
def test_laid_out_weights_are_the_first_to_go_without_memory(worker, checkpoint, laid_out, monkeypatch):
    """What was computed of them is computed again, and no text fails that fits without them."""
    monkeypatch.setattr(runner, "WORTH_A_WORKER", worker)
    own = Embedder.from_pretrained(checkpoint, device="cpu")
    expected = own.encode(TEXTS)
    compute, budgets, given_up = Embedder._compute, [], []

    def without_room(self, *args):
        if cpu._run.prepared:
            given_up.append(len(args[0]))
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return compute(self, *args)

    monkeypatch.setattr(Embedder, "_compute", without_room)
    monkeypatch.setattr(runner.Engine, "_make_room", lambda self, *args: budgets.append(self.budget))
    np.testing.assert_allclose(own.encode(TEXTS), expected, atol=2e-6)
    most = min(torch.get_num_threads(), runner.MOST_WORKERS) if worker == 1 else 1
    assert 1 <= len(given_up) <= most and not budgets  # each worker may have begun


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="the system tells no threads")
def test_workers_have_ended_when_a_run_has(monkeypatch):
    """To the system, too: a process that is forked while one ends would lack what it holds."""
    for _ in range(30):
        with runner.cpu_workers(2) as (pool, workers):
            ids = list(pool.map(lambda _: threading.get_native_id(), range(8)))
            assert workers == 2 and {str(i) for i in ids} <= set(os.listdir("/proc/self/task"))
        assert not {str(i) for i in ids} & set(os.listdir("/proc/self/task"))
    monkeypatch.setattr(runner, "LONGEST_END", 0.1)
    runner._await_the_end_of([threading.get_native_id()])  # of one that goes on nobody waits for long


def test_processes_are_forked_after_a_run_of_many_tokens(minilm):
    """Laying out starts no OpenMP team that the child would lack."""
    code = f"""
import os, signal, torch, fastdistil
from fastdistil import cpu
from fastdistil.engine import runner
cpu.why_not_onednn, prepare = lambda: "", cpu.prepare
seen = []
cpu.prepare = lambda blocks: seen.append(prepare(blocks)) or seen[-1]
runner.WORTH_PREPARING = 1_000
torch.set_num_threads(2)
own = fastdistil.Embedder.from_pretrained({str(minilm)!r}, device="cpu")
texts = ["a cat sat on the mat " * 8 + str(i) for i in range(60)]
own.encode(texts)
assert len(seen) == 1 and seen[0]
if (child := os.fork()) == 0:
    signal.alarm(60)
    own.encode(texts[:1]), own.encode(texts)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    # where it is said that it may, the tokenizers library would use threads that the child lacks, too
    env = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200, env=env)


def test_without_memory_for_them_nothing_is_laid_out(checkpoint, laid_out, monkeypatch):
    own = Embedder.from_pretrained(checkpoint, device="cpu")
    expected = own.encode(TEXTS)

    def failing(blocks):
        raise RuntimeError(message)

    monkeypatch.setattr(cpu, "prepare", lambda blocks: (_ for _ in ()).throw(MemoryError))
    np.testing.assert_allclose(own.encode(TEXTS), expected, atol=2e-6)
    monkeypatch.setattr(cpu, "prepare", failing)
    message = "DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes"
    np.testing.assert_allclose(own.encode(TEXTS), expected, atol=2e-6)
    message = "something else"
    with pytest.raises(RuntimeError, match="something else"):
        own.encode(TEXTS)
