"""Writes README's tables from benchmarks/results/: python -m benchmarks.report [--check]"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def cpu_table() -> str:
    """Ratios of pytest-benchmark's JSON in results/cpu/."""
    result = _read("encode.json")
    lines = ["| against | ratio | fastdistil, tokens/s | peer, tokens/s | peer's fill |", "|---|--:|--:|--:|--:|"]
    for entry in result["benchmarks"]:
        info = entry["extra_info"]
        fill = f"{info['peer_fill']:.2f}" if info.get("peer_fill") else ""
        lines.append(f"| {info['peer']} | {info['ratio']:.2f}x | {' | '.join(_rates(info))} | {fill} |")
    return "\n".join([*lines, "", _machine(result)])


def jobs_table() -> str:
    """Jobs against `encode` and CTranslate2, and what they need of time and memory."""
    result = _read("jobs.json")
    lines = ["| against | ratio | fastdistil, tokens/s | peer, tokens/s | mean cosine |", "|---|--:|--:|--:|--:|"]
    facts = []
    for entry in result["benchmarks"]:
        info = entry["extra_info"]
        if "ratio" in info:
            cosine = f"{info['mean_cosine']:.4f}" if "mean_cosine" in info else ""
            lines.append(f"| {info['peer']} | {info['ratio']:.2f}x | {' | '.join(_rates(info))} | {cosine} |")
        else:
            facts.append(f"A process that embeds one text takes {entry['stats']['median']:.1f} s from start to end.")
    (words,) = (entry["extra_info"] for entry in _read("tokenizer.json")["benchmarks"])
    facts.append(
        f"Tokenising on one thread: {words['tokens_per_second']:,.0f} tokens/s, {words['of_bare']:.2f} of the bare "
        f"tokenizer's, {words['over_call']:.1f}x transformers' call."
    )
    for entry in _read("memory.json")["benchmarks"]:
        info = entry["extra_info"]
        if "late_bytes" in info:
            facts.append(
                f"A job of {info['rows']:,} short rows: {info['early_bytes'] / 2**20:,.0f} MiB at most in its first "
                f"fifth, {info['late_bytes'] / 2**20:,.0f} MiB in its second half (two layers of width 32)."
            )
    return "\n".join([*lines, "", *facts, "", _machine(result)])


def _read(name: str) -> Any:
    return json.loads((RESULTS / "cpu" / name).read_text(encoding="utf-8"))


def _rates(info: dict[str, Any]) -> list[str]:
    return [f"{info[k]:,.0f}" if k in info else "" for k in ("tokens_per_second", "peer_tokens_per_second")]


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine_info"]
    cpu = machine["cpu"].get("brand_raw", machine["processor"])
    return (
        f"{cpu}, {machine['threads']} threads, Python {machine['python_version']}, torch {machine['torch']}, "
        f"{result['datetime'][:10]}."
    )


TABLES = {"cpu": cpu_table, "jobs": jobs_table}


def main() -> int:
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    new = text
    for name, table in TABLES.items():
        content = table().replace("\\", r"\\")
        new = re.sub(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", rf"\g<1>{content}\n\g<2>", new, flags=re.DOTALL)
    if "--check" in sys.argv:
        if new != text:
            print("README.md is not in step with benchmarks/results/; run `make report`", file=sys.stderr)
        return int(new != text)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
