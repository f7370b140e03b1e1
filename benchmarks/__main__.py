"""python -m benchmarks SUBJECT ...: one command for all that is measured; SUBJECT --help tells its options."""

import importlib
import sys

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


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in SUBJECTS:
        print("python -m benchmarks SUBJECT ...", *(f"  {n:10} {what}" for n, what in SUBJECTS.items()), sep="\n")
        return 0 if argv[:1] in (["--help"], ["-h"]) else 2
    name, *rest = argv
    if name in SUITES:
        import pytest

        suite = str(ROOT / "benchmarks" / f"bench_{SUITES[name]}.py")
        return int(pytest.main(["--benchmark-only", "--benchmark-disable-gc", "-s", f"--rootdir={ROOT}", suite, *rest]))
    return int(importlib.import_module(f"benchmarks.{name}").main(rest) or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
