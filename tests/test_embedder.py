import json
import shutil

import numpy as np
import pytest
import torch

from fastdistil import DistilBertConfig, DistilBertModel, DistilBertTokenizer, Embedder
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
    monkeypatch.setattr(scheduler, "HEAD", 3)
    monkeypatch.setattr(scheduler, "WINDOW", 7)
    np.testing.assert_allclose(embedder.encode(iter(TEXTS)), expected, atol=2e-6)


def test_each_distinct_text_is_tokenised_once(embedder, monkeypatch):
    seen = []
    encode = DistilBertTokenizer.encode_ids
    monkeypatch.setattr(
        DistilBertTokenizer,
        "encode_ids",
        lambda self, texts, *a, **k: seen.extend(texts) or encode(self, texts, *a, **k),
    )
    embedder.encode(TEXTS)
    assert seen == [*dict.fromkeys(TEXTS)]


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
    (checkpoint / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"query": "Query: "}, "default_prompt_name": "query"})
    )
    prompted = Embedder.from_pretrained(checkpoint, device="cpu")
    assert prompted.max_length == 512
    np.testing.assert_allclose(prompted.encode("A CAT"), own.encode("query: a cat"), atol=1e-6)
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (checkpoint / name).unlink()
    plain = Embedder.from_pretrained(checkpoint, device="cpu")
    assert (plain.pooling, plain.normalize, plain.max_length) == ("mean", False, 512)


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
        (3, TypeError, "texts must be a string or an iterable"),
        (b"bytes", TypeError, "got bytes"),
    ],
)
def test_bad_texts_are_named(embedder, texts, error, message):
    with pytest.raises(error, match=message):
        embedder.encode(texts)


@pytest.mark.parametrize("budget", [0, -5, 1.5, True])
def test_bad_budgets(embedder, budget):
    with pytest.raises(ValueError, match="max_batch_tokens"):
        embedder.encode(["a"], max_batch_tokens=budget)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules.json": '[{"type": "x.Dense", "path": "2_Dense"}]'}, "module 'Dense', which is not supported"),
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
        ({"config_sentence_transformers.json": '{"truncate_dim": 8}'}, "truncate_dim is 8, which is not supported"),
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
        ({"config_sentence_transformers.json": '{"default_prompt_name": "q", "prompts": ["q"]}'}, "no prompt 'q'"),
        ({"config_sentence_transformers.json": '{"default_prompt_name": "q", "prompts": {"q": 1}}'}, "not a string"),
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
