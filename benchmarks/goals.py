"""The goals, and what the committed results say of each: python -m benchmarks.report --goals"""

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import kernels, record, roofline, shapes, timing

RESULTS = record.ROOT / "benchmarks" / "results"
GPUS = ("h200", "h100")  # the first that has results is judged
BASE = asdict(roofline.BASE)
LIBRARY = ("eager torch", "matrix product alone", "torch.compile", "torch.compile, max-autotune")
ATTENTION = ("torch varlen_attn", "flash-attn", "SDPA, flash", "SDPA, cuDNN", "SDPA, memory-efficient")
NEEDED = (("torch varlen_attn", "flash-attn", "SDPA, flash"), ("SDPA, cuDNN",))  # of each at least one
SATURATED = "256 x 128, fill 1.00"
FLAT = 1.1  # times a long job's memory early on, that it may have in its second half
WRONG = math.nan  # of what was measured and is wrong: it meets no goal

Find = Callable[["Results"], float | None]


@dataclass(frozen=True)
class Goal:
    """A number to reach: at least, or with `most`, at most."""

    id: str
    what: str
    goal: float
    find: Find
    most: bool = False

    def judge(self, results: "Results") -> tuple[float | None, str]:
        """What was measured, and met, missed or unmeasured."""
        found = self.find(results)
        if found is None:
            return None, "unmeasured"
        return found, "met" if (found <= self.goal if self.most else found >= self.goal) else "missed"


class Results:
    """The committed results: of the CPU suites, and of one GPU's run."""

    def __init__(self, root: Path = RESULTS):
        self.root = root
        places = sorted(p.name for p in root.iterdir() if any(p.glob("*.json"))) if root.is_dir() else []
        self.gpu = next((name for name in GPUS if name in places), None)
        others = (name for name in places if not name.startswith("cpu"))
        self.shown = self.gpu or next(others, "cpu")  # what tables are of
        self._read: dict[Path, Any] = {}

    def read(self, *parts: str) -> Any:
        """A result file, or None where there is none; raises ValueError for one that was edited."""
        path = self.root.joinpath(*parts)
        if path not in self._read:
            self._read[path] = record.measured(path) if path.is_file() else None
        return self._read[path]

    def table(self, stage: str) -> Any:
        """A stage's result of the machine that is shown, or None; raises ValueError for one of somebody's own model."""
        found = self.of_gpu(stage) if self.gpu else self.read(self.shown, f"{stage}.json")
        if found and found.get("model"):
            raise ValueError(f"{self.root / self.shown / stage}.json is of another model, {found['model']}")
        return found

    def of_gpu(self, stage: str) -> Any:
        """A stage's result, or None; raises ValueError for one of another GPU than its directory says."""
        found = self.read(self.gpu, f"{stage}.json") if self.gpu else None
        name = ((found or {}).get("gpu") or {}).get("name", "no GPU")
        if found and self.gpu and not re.search(rf"\b{self.gpu.upper()}\b", name):
            raise ValueError(f"{self.root / self.gpu / stage}.json is of another GPU, {name}")
        return found

    def rows(self, stage: str) -> list[dict[str, Any]]:
        found = self.of_gpu(stage)
        if found and (found.get("model") or found.get("shape", BASE) != BASE):
            raise ValueError(f"{self.root / str(self.gpu) / stage}.json is of another model than DistilBERT-base")
        return found["rows"] if found else []

    def suite(self, name: str, starts: str, figure: str) -> float | None:
        """A figure of the first benchmark of a CPU suite whose peer or name starts so; WRONG where one that failed may
        be meant."""
        found = self.read("cpu", f"{name}.json") or {"benchmarks": []}
        for entry in found["benchmarks"]:
            info = entry["extra_info"]
            if info.get("peer", entry["name"]).startswith(starts):
                return entry["stats"]["median"] if figure == "seconds" else info.get(figure)
        return WRONG if found.get("wrong") else None


def cpu(name: str, starts: str, figure: str = "ratio") -> Find:
    return lambda results: results.suite(name, starts, figure)


def beside(op: str, peers: tuple[str, ...], *, rows: int = 0, ends: str = "", dtype: str = "bfloat16") -> Find:
    """The least of peer's time by ours, best peer, over an op's shapes of at least so many rows that end so."""

    def ratio(case: dict[str, dict[str, Any]]) -> float | None:
        theirs = [case[p]["cold"]["median_us"] for p in peers if "cold" in case.get(p, {})]
        return min(theirs) / case["fastdistil"]["cold"]["median_us"] if theirs else None

    return lambda results: _least(results, op, dtype, _shapes(op, rows, ends), ratio)


def attention(lengths: tuple[int, ...], figure: str) -> Find:
    """The least part of the copy ceiling, or ratio to the best peer, over fixed lengths."""

    def of(case: dict[str, dict[str, Any]]) -> float | None:
        timed = {name: row for name, row in case.items() if "cold" in row}
        if figure == "of_copy":
            return timed["fastdistil"]["of_copy"]
        if not all(any(p in timed for p in those) for those in NEEDED):
            return None  # without them the best peer is not known
        theirs = min(timed[p]["cold"]["median_us"] for p in ATTENTION if p in timed)
        return theirs / timed["fastdistil"]["cold"]["median_us"]

    return lambda results: _least(results, "attention", "bfloat16", [f"L={n}, fixed" for n in lengths], of)


def at_least(op: str, figure: str, rows: int) -> Find:
    """The least over an op's shapes of at least so many rows, in bfloat16: FLOP/s or part of a ceiling."""

    def of(case: dict[str, dict[str, Any]]) -> float | None:
        mine = case["fastdistil"]
        return mine["flops"] / mine["cold"]["median_us"] * 1e6 if figure == "flops" else mine[figure]

    return lambda results: _least(results, op, "bfloat16", _shapes(op, rows), of)


def encoder(batch: str, figure: str, peer: str = "", dtype: str = "bfloat16") -> Find:
    """Of our quickest call at batches that start so: tokens/s, microseconds, or the least ratio to a peer."""

    def find(results: Results) -> float | None:
        by_batch: dict[str, dict[str, dict[str, Any]]] = {}
        for row in results.rows("encoder"):
            if row["dtype"] == dtype and row["batch"].startswith(batch):
                by_batch.setdefault(row["batch"], {})[row["provider"]] = row
        found = []
        for case in by_batch.values():
            ours = [row for name, row in case.items() if timing.is_ours(name)]
            if any("wrong" in row for row in ours):
                return WRONG
            best = min((row for row in ours if "median_us" in row), key=lambda row: row["median_us"], default=None)
            if best is None or (figure == "ratio" and "median_us" not in case.get(peer, {})):
                return None
            found.append(best[figure] if figure != "ratio" else case[peer]["median_us"] / best["median_us"])
        return min(found, default=None)

    return find


def engine(starts: str, of: str) -> Find:
    """The least of the engine's tokens/s by those of what bounds it."""

    def find(results: Results) -> float | None:
        rows = [r for r in results.rows("engine") if r["input"].startswith(starts)]
        if any("wrong" in row for row in rows):
            return WRONG
        measured = {row["input"] for row in rows if of in row and row["dtype"] == "bfloat16"}
        lengths = {f"ids, L={n}, {form}" for n in shapes.FULL.lengths for form in ("fixed", "long-tailed")}
        if not measured or (starts == "ids" and not lengths <= measured):
            return None
        return min(row["tokens_per_s"] / row[of] for row in rows if of in row)

    return find


def _shapes(op: str, rows: int, ends: str = "") -> list[str]:
    """The names of an op's shapes of at least so many rows that end so, all of which a goal is about."""
    meta = replace(shapes.FULL, rows=tuple(n for n in shapes.FULL.rows if n >= rows))
    names = [case.name for case in kernels.cases(op, meta, torch.bfloat16, torch.device("meta"))]
    return [name for name in names if name.endswith(ends)]


def _least(
    results: Results, op: str, dtype: str, wanted: list[str], figure: Callable[[Any], float | None]
) -> float | None:
    """The least figure(rows of a shape by provider) over the shapes: WRONG where ours is in one, None where ours, or
    what the figure needs, was not measured in one."""
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in results.rows("kernels"):
        if row["op"] == op and row["dtype"] == dtype:
            cases.setdefault(row["shape"], {})[row["provider"]] = row
    mine = [cases.get(shape, {}).get("fastdistil", {}) for shape in wanted]
    if any("wrong" in row for row in mine):
        return WRONG
    if not all("cold" in row for row in mine):
        return None
    found = [figure(cases[shape]) for shape in wanted]
    return None if None in found else min(found)  # type: ignore[type-var]


def _memory(results: Results) -> float | None:
    early, late = (results.suite("memory", "bench_a_job", name) for name in ("early_bytes", "late_bytes"))
    return None if early is None or late is None else late / early


def _right(results: Results) -> float | None:
    """Failures, files that did not come to their end among them; none measured where there are none and few of the
    tests ran."""
    found = results.of_gpu("correctness")
    if not found:
        return None
    counts = found.get("counts")
    if not counts or not found.get("whole"):  # stopped: what had failed by then
        failed = sum(row.get("failed", 0) for row in found.get("rows", ()) if not row["run"].endswith(" again"))
        return float(failed) if failed else None
    failed = counts["failed"] + sum(bool(run["ended"]) for run in found["runs"].values())
    return float(failed) if failed or counts["passed"] > counts["skipped"] else None


AUTOTUNE = "transformers sdpa, torch.compile max-autotune"
GOALS = (
    Goal(
        "cpu-unsorted", "transformers sdpa, unsorted batches", 5.0, cpu("encode", "transformers sdpa, batches of 32, u")
    ),
    Goal("cpu-sorted", "transformers sdpa, sorted batches", 1.2, cpu("encode", "transformers sdpa, batches of 32, s")),
    Goal("cpu-st", "sentence-transformers encode", 1.6, cpu("encode", "sentence-transformers")),
    Goal("cpu-base", "DistilBERT-base width, full batches", 1.0, cpu("encode", "transformers sdpa, DistilBERT-base")),
    Goal("cpu-query", "a single query, two threads", 1 / 0.85, cpu("encode", "transformers sdpa, one query, 2")),
    Goal("cpu-ct2", "CTranslate2 float32", 1.15, cpu("jobs", "CTranslate2 float32")),
    Goal("cpu-job", "a job of its own encode", 0.95, cpu("jobs", "its own encode, a job from jsonl to npy")),
    Goal("cpu-start", "seconds, a process of one text", 3.0, cpu("jobs", "bench_start", "seconds"), most=True),
    Goal("cpu-tokenizer", "tokens/s of the bare tokenizer", 0.9, cpu("tokenizer", "bench_one_thread", "of_bare")),
    Goal("cpu-call", "tokens/s of transformers' call", 3.0, cpu("tokenizer", "bench_one_thread", "over_call")),
    Goal("cpu-memory", "a long job's memory, late by early", FLAT, _memory, most=True),
    Goal("right", "failures of the tests on the GPU", 0, _right, most=True),
    Goal("qkv", "QKV GEMM of cuBLAS, 5,632 rows on", 0.95, beside("qkv_projection", LIBRARY[:2], rows=5_632)),
    Goal("out", "output GEMM of cuBLAS", 0.95, beside("linear", LIBRARY[:2], rows=5_632, ends=" 768 x 768")),
    Goal("ffn2", "FFN2 GEMM of cuBLAS", 0.95, beside("linear", LIBRARY[:2], rows=5_632, ends=" 768 x 3072")),
    Goal("ffn1-flops", "FFN1 and GELU, FLOP/s", 560e12, at_least("bias_gelu", "flops", 5_632)),
    Goal("ffn1", "FFN1 and GELU of addmm and GELU", 1.15, beside("bias_gelu", ("eager torch",), rows=5_632)),
    Goal("norm", "residual and LayerNorm of the copy ceiling", 0.9, at_least("add_layer_norm", "of_copy", 5_632)),
    Goal("attention-64", "attention to 64 tokens of the copy ceiling", 0.75, attention((16, 32, 64), "of_copy")),
    Goal("attention-128", "attention at 128 of the best peer", 1.3, attention((128,), "ratio")),
    Goal("attention-512", "attention at 512 of the best peer", 1.1, attention((512,), "ratio")),
    Goal(
        "embeddings", "embeddings and LayerNorm of eager", 3.0, beside("embed_layer_norm", ("eager torch",), rows=4_096)
    ),
    Goal("pooling", "pooling of eager", 3.0, beside("pool", ("eager torch",), ends="fixed")),
    Goal("tokens", "tokens/s at L=128, saturated", 6.3e6, encoder(SATURATED, "tokens_per_s")),
    Goal("autotune", "torch.compile max-autotune, saturated", 1.15, encoder(SATURATED, "ratio", AUTOTUNE)),
    Goal("sdpa", "transformers sdpa, saturated", 1.2, encoder(SATURATED, "ratio", "transformers sdpa")),
    Goal("half-autotune", "max-autotune at half fill", 2.2, encoder("256 x 128, fill 0.5", "ratio", AUTOTUNE)),
    Goal("half-sdpa", "sdpa at half fill", 2.2, encoder("256 x 128, fill 0.5", "ratio", "transformers sdpa")),
    Goal("latency-16", "microseconds, one text of 16", 120, encoder("1 x 16,", "median_us"), most=True),
    Goal("latency-32", "microseconds, one text of 32", 120, encoder("1 x 32,", "median_us"), most=True),
    Goal("latency-64", "microseconds, one text of 64", 120, encoder("1 x 64,", "median_us"), most=True),
    Goal("one-16", "transformers eager, one text of 16", 10, encoder("1 x 16,", "ratio", "transformers eager")),
    Goal("one-32", "transformers eager, one text of 32", 10, encoder("1 x 32,", "ratio", "transformers eager")),
    Goal("one-64", "transformers eager, one text of 64", 10, encoder("1 x 64,", "ratio", "transformers eager")),
    Goal("engine-ids", "the engine on ids of the encoder alone", 0.95, engine("ids", "encoder_tokens_per_s")),
    Goal("engine-texts", "the engine on texts of the tokenizer", 0.9, engine("texts", "tokenizer_tokens_per_s")),
)


def table(results: Results) -> tuple[list[str], bool]:
    """`id goal measured met|missed|unmeasured`, a line a goal, and whether all that was measured is met."""
    place = results.of_gpu("environment")
    gpu = place["gpu"]["name"] if place else results.gpu
    lines, right = [f"# the GPU's goals are of an H200; measured: {gpu or 'none'}"], True
    for goal in GOALS:
        found, verdict = goal.judge(results)
        right &= verdict != "missed"
        measured = "-" if found is None else "wrong" if math.isnan(found) else f"{found:.4g}"
        lines.append(
            f"{goal.id:16} {'<=' if goal.most else '>='} {goal.goal:<9.4g} {measured:>9} {verdict:11} {goal.what}"
        )
    return lines, right
