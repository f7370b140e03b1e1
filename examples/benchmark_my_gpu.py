"""The table for your card in about four minutes: what it reaches, each kernel and the encoder beside their peers.

    python examples/benchmark_my_gpu.py [--minutes N] [--out DIRECTORY] [--dry]

From a clone of the repository, installed or not; needs torch, triton and transformers, and nothing from the network.
Raw samples are kept in the directory, by default benchmark-my-gpu. `make gpu` runs the tests, the engine and the tuning
as well.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import gpu, record


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out", type=Path, default=Path("benchmark-my-gpu"))
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    args, more = parser.parse_known_args(argv)
    # where git is not there to ask; the report takes no such result
    os.environ.setdefault("FASTDISTIL_COMMIT", "unknown")
    stages = ["environment", "ceilings", "encoder", "kernels"]
    code = gpu.main(["--out", str(args.out), "--minutes", "4", "--stages", ",".join(stages), *more])
    print(*table(args.out, stages), sep="\n")
    return code


def table(out: Path, stages: list[str]) -> list[str]:
    """Every line, of which the summary has the first."""
    lines = ["--- all of it"]
    for path in (out / f"{name}.json" for name in stages):
        if path.is_file():
            lines += record.read(path).get("lines") or [f"{path.stem} was stopped: {path} has what it had so far"]
    return [*lines, f"--- raw samples are in {out}"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
