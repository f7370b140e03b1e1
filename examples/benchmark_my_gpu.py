"""The table for your card in about four minutes: what it reaches, each kernel and the encoder beside their peers.

    python examples/benchmark_my_gpu.py [--minutes N] [--dry]

From a clone of the repository, installed or not; needs torch, triton and transformers, and nothing from the network.
`make gpu` runs the tests, the engine and the tuning as well, and keeps the results.
"""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import gpu


def main(argv: list[str]) -> int:
    os.environ.setdefault("FASTDISTIL_COMMIT", "unknown")  # where git is not there to ask; nothing is kept
    stages = ["environment", "ceilings", "encoder", "kernels"]
    with tempfile.TemporaryDirectory() as directory:
        return gpu.main(["--out", directory, "--minutes", "4", "--stages", ",".join(stages), *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
