"""Writes README's tables from benchmarks/results/: python -m benchmarks.report [--check]"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def cpu_table() -> str:
    """Ratios of pytest-benchmark's JSON in results/cpu/."""
    result = json.loads((RESULTS / "cpu" / "encode.json").read_text(encoding="utf-8"))
    lines = ["| against | ratio | fastdistil, tokens/s | peer, tokens/s | peer's fill |", "|---|--:|--:|--:|--:|"]
    for entry in result["benchmarks"]:
        info = entry["extra_info"]
        ours, theirs = (f"{info[k]:,.0f}" if k in info else "" for k in ("tokens_per_second", "peer_tokens_per_second"))
        fill = f"{info['peer_fill']:.2f}" if info.get("peer_fill") else ""
        lines.append(f"| {info['peer']} | {info['ratio']:.2f}x | {ours} | {theirs} | {fill} |")
    machine = result["machine_info"]
    cpu = machine["cpu"].get("brand_raw", machine["processor"])
    lines.append(
        f"\n{cpu}, {machine['threads']} threads, Python {machine['python_version']}, torch {machine['torch']}, "
        f"{result['datetime'][:10]}."
    )
    return "\n".join(lines)


def main() -> int:
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    table = cpu_table().replace("\\", r"\\")
    new = re.sub(r"(<!-- table: cpu -->\n).*?(<!-- end -->)", rf"\g<1>{table}\n\g<2>", text, flags=re.DOTALL)
    if "--check" in sys.argv:
        if new != text:
            print("README.md is not in step with benchmarks/results/; run `make report`", file=sys.stderr)
        return int(new != text)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
