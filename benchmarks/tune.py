"""Searches launch configurations on the GPU at hand, and writes the quickest to kernels/_configs.py.

    python -m benchmarks.tune --out tune.json --minutes 10 [--ops bias_gelu,attention]  # on a GPU; goes on from --out
    python -m benchmarks.tune --out tune.json --apply                                  # anywhere: RECORDED from --out

A shape class is what kernels/_configs.py looks up. Its candidates are compiled first, on all cores, and those that
spill or break another rule of the compile gate are not timed. Each of the others is held to the error law at every
shape of the class, then timed; the best few are timed again for longer. The score is the geometric mean over the
shapes of the time, relative to what runs without tuning; a candidate is recorded where it wins by more than MARGIN.
The library's product is one, too. It computes dead rows as well, so it is recorded for where the host knows of none,
and only of few rows, which wait for the weights, for all.
"""

import argparse
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from benchmarks import compile_gate, kernels, record, shapes, timing
from benchmarks.kernels import Case
from fastdistil.kernels import _configs
from fastdistil.kernels._configs import Attention, Gemm, Library, Rows

MARGIN = 0.03  # what is less is a tie
FINALISTS, ROUNDS = 4, 3
CONFIGS = Path(_configs.__file__)
Config = Gemm | Library | Attention | Rows


@dataclass(frozen=True)
class Class:
    """A key of RECORDED beside the architecture, and the cases that are looked up by it."""

    op: str
    name: str
    cases: tuple[Case, ...]


# --- what is searched -------------------------------------------------------------------------------------------------


def classes(matrix: shapes.Matrix, device: torch.device, processors: int, names: tuple[str, ...]) -> Iterator[Class]:
    """The shape classes that the matrix's cases fall into, half precision by bfloat16."""
    for op in names:
        found: dict[str, list[Case]] = {}
        for dtype in matrix.dtypes:
            if dtype is torch.float16:
                continue  # shares its configurations with bfloat16
            for case in kernels.cases(op, matrix, dtype, device):
                name = class_of(case, processors)
                of_another = op in kernels.GEMMS and _configs.searched_as(op, name.rpartition("/")[2]) != op
                if not of_another and (op != "attention" or "fixed" not in case.name):
                    found.setdefault(name, []).append(case)
        for name, cases in found.items():
            yield Class(op, name, tuple(cases))


def class_of(case: Case, processors: int) -> str:
    """As the functions of kernels/_configs.py name it."""
    kind = _configs.matmul_precision() if case.dtype is torch.float32 else "half"
    if case.op in kernels.GEMMS:
        n, k = case.weight.shape
        return f"{kind}/{_configs.size_class(case.op, kind, len(case.rows), n, k, processors)}"
    if case.op == "attention":
        _, _, longest, heads = case.args
        size = case.rows.shape[1] // 3 // heads
        return f"{kind}/{size}/{next((n for n in (16, 32, 64, 128) if longest <= n), 'any')}"
    return f"{'float32' if case.dtype is torch.float32 else 'half'}/{_configs.power_of_two(case.rows.shape[1])}"


def _processors(device: torch.device) -> int:
    """Of an H200 where none is at hand."""
    return _configs.processors(device) if device.type == "cuda" else 132


def candidates(op: str, name: str, arch: int, tallest: int = _configs.FEW) -> Iterator[Config]:
    """Every configuration worth compiling for a class of cases of up to so many rows; most are thrown out by the
    compile gate."""
    kind, _, rest = name.partition("/")
    if op in kernels.GEMMS:
        for config in _gemms(kind, rest, arch, tallest):
            yield config
            fewer = rest.isdigit() or rest == "some"  # tiles than a chip has room for
            if op == "linear_add_layer_norm" and fewer and isinstance(config, Gemm) and config.family == "pointer":
                yield from (replace(config, parts=parts) for parts in (2, 4, 8))
    elif op == "attention":
        yield from _attentions(rest.partition("/")[2])
    else:
        block = int(rest)
        for rows, warps, stages in product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8), (1, 2, 4) if op == "pool" else (1,)):
            if rows * block <= 32_768:
                yield Rows(rows, block, warps, stages)


def _gemms(kind: str, size: str, arch: int, tallest: int) -> Iterator[Gemm | Library]:
    yield Library()
    few = size.isdigit()
    descriptors = kind == "half" and arch in (90, 100) and not few
    depths = {"half": (32, 64, 128), "tf32": (32, 64), "ieee": (16, 32)}[kind]
    tall: tuple[int, ...] = (128,) if descriptors and size != "some" else (64, 128)
    if few:
        tall = tuple(m for m in (16, 32, 64) if m <= _configs.power_of_two(tallest))
    for m, n, k, stages in product(tall, (16,) * few + (32, 64, 128, 256), depths, (2, 3, 5) if few else (3, 4)):
        for warps in {4 if m * n <= 64 * 128 else 8, 8 if m * n >= 64 * 64 else 4}:
            plain = Gemm("pointer", m, n, k, warps, stages, group=1 if few else 8)
            yield plain
            if kind == "ieee":
                yield from (replace(plain, across=True), replace(plain, split=True))
    if descriptors:
        shapes_of_tiles = ((128, 128), (128, 256), (256, 128), (64, 256), (64, 128))
        for (m, n), k, stages, halves, flat in product(shapes_of_tiles, (64, 128), (2, 3, 4), (1, 2), (True, False)):
            one = Gemm("tma", m, n, k, 8 if m > 64 else 4, stages, halves=halves, flatten=flat)
            yield one
            if m * n <= 128 * 128:  # two a multiprocessor
                most = min(255, 65_536 // (2 * one.warps * 32))
                yield replace(one, per_sm=2, registers=most if most < 255 else None)


def _attentions(longest: str) -> Iterator[Attention]:
    most = None if longest == "any" else int(longest)
    warps = (4, 8)
    if most is not None and most <= 64:
        yield from (Attention("short", tile, w, most) for tile, w in product((32, 64, 128), warps) if tile >= most)
    if most is not None:
        yield from (Attention("single", max(16, most), w, most) for w in (2, *warps))
    for tile, keys, stages, w in product((16, 32, 64, 128), (16, 32, 64, 128), (1, 2, 3), warps):
        yield Attention("looped", tile, w, most, keys=keys, stages=stages)


@contextmanager
def forced(arch: int, found: Class, config: Config | None) -> Iterator[None]:
    """Within, the class is looked up as if the configuration were recorded; None: as if nothing were."""

    def forget() -> None:
        for cache in (_configs._gemm, _configs._attention, _configs._row_kernel):
            cache.cache_clear()

    key = arch, found.op, found.name
    with patch.dict(_configs.RECORDED):
        _configs.RECORDED.pop(key, None)
        if config is not None:
            _configs.RECORDED[key] = config
        forget()
        try:
            yield
        finally:
            forget()


# --- pruning, without a GPU -------------------------------------------------------------------------------------------


def compiled(found: Class, configs: list[Config], arch: int, jobs: int) -> Iterator[tuple[Config, str | None]]:
    """Each configuration, and why it is not worth timing or None."""
    device, launch = found.cases[0].device, _launcher(found.op)
    processors = _processors(device)
    binaries: dict[Config, set[compile_gate.Entry]] = {}  # cases differ in how many programs share a tile
    for config in configs:
        if isinstance(config, Library):
            yield config, None
            continue
        for case in found.cases:
            alone = found.op in kernels.SELF_CONTAINED
            given = case.args if alone else (*case.args, case.cu_seqlens)  # as the encoder calls it
            with compile_gate.recorded(arch, processors) as launches, forced(arch, found, config):
                launch(*(a.to("meta") if isinstance(a, Tensor) else a for a in given))
            # what stands behind a product is of another class
            binaries.setdefault(config, set()).add(launches[0 if found.op in kernels.GEMMS else -1])
    left = {config: set(entries) for config, entries in binaries.items()}
    verdicts: dict[Config, list[str]] = {config: [] for config in binaries}
    every = dict.fromkeys(entry for entries in binaries.values() for entry in entries)
    for entry, row in compile_gate.compile_all(list(every), jobs, keep=device.type == "cuda"):
        for config in [config for config, entries in left.items() if entry in entries]:
            verdicts[config] += [row] if isinstance(row, str) else _unfit(row, config)
            left[config].discard(entry)
            if not left[config]:
                yield config, "; ".join(dict.fromkeys(verdicts[config])) or None


def _unfit(row: dict[str, Any], config: Config) -> Iterator[str]:
    yield from compile_gate.unusable(row)
    programs = config.per_sm if isinstance(config, Gemm) else 1
    if (held := compile_gate.resident(row)) < programs:
        yield f"a multiprocessor holds {held}, not {programs}"


def _launcher(op: str) -> Any:
    from fastdistil.kernels import (
        attention,
        bias_gelu,
        layer_norm,
        linear,
        linear_add_layer_norm,
        pooling,
        qkv_projection,
    )

    modules = (qkv_projection, linear, bias_gelu, linear_add_layer_norm, attention, layer_norm, pooling)
    return next(getattr(module, op) for module in modules if hasattr(module, op))


# --- timing -----------------------------------------------------------------------------------------------------------


class Trial:
    """A class's cases with what each has to give, computed once."""

    def __init__(self, found: Class):
        self.found = found
        self.expected = [kernels.expected(case) for case in found.cases]

    def seconds(self, arch: int, config: Config | None, each: float) -> list[float]:
        """Median time at every case; raises AssertionError where a result is wrong."""
        with forced(arch, self.found, config):
            times = []
            for case, (truth, plain) in zip(self.found.cases, self.expected, strict=True):
                run = kernels.PROVIDERS[case.op][0][1](case, None)  # type: ignore[arg-type]
                kernels.hold(run, case, truth, plain)
                times.append(timing.cold(run, case.device, each).median)
                kernels.hold(run, case, truth, plain)
            return times


def score(times: list[float], before: list[float]) -> float:
    """Geometric mean of the times relative to those before: less is better."""
    return math.exp(sum(math.log(t / b) for t, b in zip(times, before, strict=True)) / len(times))


def _has_idle_parts(found: Class, config: Config) -> bool:
    """Whether in no case as many programs share a tile's depth as may: then the candidate that lets fewer do so runs
    the same."""
    if not isinstance(config, Gemm) or config.parts == 1:
        return False
    processors = _processors(found.cases[0].device)
    return all(kernels.parts(case, config, processors) < config.parts for case in found.cases)


@torch.inference_mode()
def tune(
    found: Class,
    arch: int,
    deadline: float,
    jobs: int,
    before: dict[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """What became of every candidate, and the winner or None. before: what an earlier run found until its time ran
    out. keep: gets what was found so far, now and then. Raises DeviceBroke where one candidate broke the device."""
    device = found.cases[0].device
    row: dict[str, Any] = {"arch": arch, "op": found.op, "class": found.name, "cases": [c.name for c in found.cases]}
    row["gpu"] = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    tallest = max((len(case.rows) for case in found.cases), default=0) if found.op in kernels.GEMMS else 0
    possible = candidates(found.op, found.name, arch, tallest)
    every = {_written(config): config for config in possible if not _has_idle_parts(found, config)}
    unfit: dict[str, str] = dict((before or {}).get("unfit", {}))
    tried: dict[str, float] = dict((before or {}).get("tried", {}))
    wrong: dict[str, str] = dict((before or {}).get("wrong", {}))
    done = {*tried, *wrong, *(before or {}).get("fitting", ())}
    fit = [name for name in every if name in done]
    left = [config for name, config in every.items() if name not in done | unfit.keys()]
    compiled_now = 0
    for first in range(0, len(left), 2 * jobs):  # in portions, for the time may run out
        if time.monotonic() > deadline:
            break
        for config, why in compiled(found, left[first : first + 2 * jobs], arch, jobs):
            compiled_now += 1
            if why is None:
                fit.append(_written(config))
            else:
                unfit[_written(config)] = why
        keep(row | {"unfit": unfit, "stopped": "while compiling", "winner": None, "compiled": len(fit) + len(unfit),
                    "fit": len(fit), "fitting": [*fit], "tried": tried, "wrong": wrong})  # fmt: skip
    row |= {"compiled": len(fit) + len(unfit), "fit": len(fit), "fitting": fit, "unfit": unfit, "winner": None}
    if not fit and unfit:
        return row | {"stopped": f"none could be compiled, such as for: {next(iter(unfit.values()))[:200]}"}
    if compiled_now < len(left):
        row["stopped"] = f"{row['compiled']} of {len(every)} compiled: no time was left"
    if device.type != "cuda":
        return row | {"missing": "no CUDA device: compiled only"}
    trial = Trial(found)
    try:
        base = trial.seconds(arch, None, 0.1)
    except Exception as error:  # what runs today is wrong or breaks: nothing to be compared with
        why = f"{type(error).__name__}: {str(error)[:200]}"
        row |= {"stopped": "what runs today breaks", "wrong": {"what runs today": why}}
        if kernels.is_sticky(error):
            keep(row)
            raise kernels.DeviceBroke(f"{found.op} {found.name} as it runs today: {why}") from error
        return row
    row |= {"wrong": wrong, "tried": tried, "before_us": [t * 1e6 for t in base]}

    def broke(name: str, error: Exception) -> None:
        wrong[name] = f"{type(error).__name__}: {str(error)[:200]}"
        tried.pop(name, None)
        if kernels.is_sticky(error):
            keep(row | {"stopped": f"{name} broke the device"})
            raise kernels.DeviceBroke(f"{found.op} {found.name}, {name}: {error}") from error

    for i, name in enumerate(fit):
        if name in tried or name in wrong:
            continue
        if time.monotonic() > deadline:
            row["stopped"] = f"after {len(tried) + len(wrong)} of {len(fit)}: no time was left"
            break
        try:
            tried[name] = score(trial.seconds(arch, every[name], 0.02), base)
        except Exception as error:  # of one candidate, which is then none
            broke(name, error)
        if i % 16 == 15:
            keep(row | {"stopped": f"after {len(tried) + len(wrong)} of {len(fit)}"})
    finalists = sorted((name for name in tried if name in every), key=lambda name: tried[name])[:FINALISTS]
    rounds: dict[str, list[float]] = {name: [] for name in finalists}
    for _ in range(ROUNDS if finalists else 0):  # what runs today in each, for clocks wander
        base = trial.seconds(arch, None, 0.1)
        for name in finalists:
            if name in wrong:
                continue
            try:
                rounds[name].append(score(trial.seconds(arch, every[name], 0.1), base))
            except Exception as error:
                broke(name, error)
    again = sorted((median(scores), name) for name, scores in rounds.items() if name not in wrong)
    row["best"] = [{"score": s, "config": name} for s, name in again]
    return row | decided({name: s for s, name in again}, found.name)


def decided(scores: dict[str, float], name: str) -> dict[str, str | None]:
    """What of a class's finalists is recorded: the winner, and of GEMMs what serves where no row is dead."""
    library, everywhere = _written(Library()), name.rpartition("/")[2].isdigit()
    kernels_only = {config: s for config, s in scores.items() if everywhere or config != library}
    best = min(kernels_only, key=kernels_only.__getitem__, default=None)
    before = 1.0 if best is None else min(1.0, kernels_only[best])
    return {
        "winner": best if before < 1 - MARGIN else None,
        "whole": library if not everywhere and scores.get(library, 1.0) < before * (1 - MARGIN) else None,
    }


def _written(config: Config) -> str:
    """As source code, defaults left out."""
    plain = type(config).__dataclass_fields__
    given = {
        name: value
        for name, value in asdict(config).items()
        if plain[name].default is not value and plain[name].default != value
    }
    return f"{type(config).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"


# --- recording --------------------------------------------------------------------------------------------------------


def _recorded(source: str) -> tuple[int, int]:
    """Where RECORDED stands."""
    start = source.index("RECORDED: dict[")
    empty = "{}" in source[start : source.index("\n", start)]
    return start, source.index("\n\n", start) if empty else source.index("\n}", start) + 2


def apply(rows: list[dict[str, Any]], source: str) -> str:
    """The source of kernels/_configs.py with the winners in RECORDED, sorted, beside what was recorded of others."""
    start, end = _recorded(source)
    known = {key: _written(config) for key, config in _configs.RECORDED.items()}
    found = [(row, (row["arch"], row["op"], row["class"]), row["winner"]) for row in rows]
    found += [(row, (row["arch"], row["op"], f"{row['class']}/whole"), row.get("whole")) for row in rows]
    won = {key for _, key, winner in found if winner}  # on one of several cards
    for row, key, winner in found:
        if winner:
            known[key] = winner
        elif "stopped" not in row and "missing" not in row and key not in won:
            known.pop(key, None)  # nothing is quicker than the heuristic
    lines = [f'    ({arch}, "{op}", "{name}"): {config},' for (arch, op, name), config in sorted(known.items())]
    head = source[start : source.index("{", source.index("=", start))]
    return source[:start] + head + ("{\n" + "\n".join(lines) + "\n}" if lines else "{}") + source[end:]


def run(
    matrix: shapes.Matrix,
    device: torch.device,
    path: Path,
    *,
    names: tuple[str, ...] = kernels.TUNED,
    minutes: float,
    jobs: int | None = None,
    most: int | None = None,
) -> list[dict[str, Any]]:
    """Tune every class that `path` does not hold yet, or holds for another architecture, or holds unfinished. most:
    candidates a class, for a rehearsal."""
    deadline = time.monotonic() + 60 * minutes
    rows: list[dict[str, Any]] = record.read(path)["rows"] if path.is_file() else []
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    around = record.environment() | {"stage": "tune", "dry": card is None}
    arch = _configs.architecture(device) if device.type == "cuda" else 90
    about = {"of": made_of(), "sources": sources()} | {
        name: around[name] for name in ("commit", "date", "torch", "triton")
    }
    # what other kernels, candidates or compilers gave here holds no more
    rows = [row for row in rows if (row["arch"], row.get("gpu")) != (arch, card) or row.get("of") == about["of"]]
    processors = _processors(device)
    limited = patch.object(sys.modules[__name__], "candidates", _first(most)) if most else patch.dict({})
    with limited, timing.Watch() as watch:
        for found in classes(matrix, device, processors, names):
            key = arch, found.op, found.name, card
            known = next((row for row in rows if (row["arch"], row["op"], row["class"], row.get("gpu")) == key), None)
            others = [other for other in rows if other is not known]
            if known is not None and known.get("cases") != [case.name for case in found.cases]:
                known = None  # other shapes
            if known is not None and "stopped" not in known:
                continue
            if time.monotonic() > deadline:
                break

            def keep(row: dict[str, Any], others: list[dict[str, Any]] = others) -> None:
                record.write(path, around | {"rows": [*others, row | about], "clocks": watch.samples})

            rows = [*others, tune(found, arch, deadline, jobs or os.cpu_count() or 1, known, keep) | about]
            keep(rows[-1])
    return rows


def made_of() -> str:
    """A digest of what a search rests on: the kernels and all that chooses their configurations but what is recorded,
    the search itself, the compiler and torch."""
    return hashlib.sha256("\n".join([triton.__version__, torch.__version__, sources()]).encode()).hexdigest()


def sources() -> str:
    """Of that without the compiler and torch, which another machine may have."""
    told = [Path(__file__).read_text("utf-8")]
    for path in sorted(CONFIGS.parent.glob("*.py")):
        source = path.read_text("utf-8")
        start, end = _recorded(source) if path == CONFIGS else (0, 0)
        told.append(source[:start] + source[end:])
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def _first(most: int) -> Any:
    every = candidates

    def few(*given: Any) -> Iterator[Config]:
        found = list(every(*given))
        yield from found[:: max(1, len(found) // most)][:most]

    return few


def _called(row: dict[str, Any]) -> str:
    return f"sm_{row['arch']} {row['op']} {row['class']}"


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        name = f"{_called(row)}: {row['fit']} of {row['compiled']} fit"
        if row.get("best"):
            best = row["best"][0]
            recorded = [name for name in (row["winner"], row.get("whole")) if name]
            verdict = f"recorded {' and '.join(recorded)}" if recorded else "kept as it was"
            yield f"{name}; {best['score']:.3f} of the time before by {best['config']}: {verdict}"
        else:
            yield f"{name}; {row.get('missing') or row.get('stopped') or 'none is right'}"
        if row.get("wrong"):
            name, why = next(iter(row["wrong"].items()))
            yield f"  {len(row['wrong'])} gave wrong results or broke, such as {name}: {why}"


@record.command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="what was found, class by class; read and gone on with")
    parser.add_argument("--minutes", type=record.minutes, default=10.0)
    parser.add_argument("--ops", default=",".join(kernels.TUNED), help="comma-separated")
    parser.add_argument(
        "--apply", action="store_true", help="write the winners to kernels/_configs.py, and measure nothing"
    )
    args = parser.parse_args(argv)
    if args.apply:
        try:
            found = record.read(args.out)
        except (OSError, ValueError) as error:
            raise record.WrongUse(f"--out {args.out}: {error}") from error
        if found.get("dry"):
            raise record.WrongUse(f"--out {args.out} is of a rehearsal: nothing in it was timed")
        rows = found.get("rows", [])
        if not rows or any("class" not in row or "sources" not in row for row in rows):
            raise record.WrongUse(f"--out {args.out} is no result of the tuner")
        stale = [row for row in rows if row["sources"] != sources()]
        rows = [row for row in rows if row not in stale]
        for row in stale:
            print(f"left out, for it was found with other kernels or another search: {_called(row)}", file=sys.stderr)
        if not rows:
            raise record.WrongUse(f"--out {args.out} was found with other kernels or another search; tune again")
        CONFIGS.write_text(apply(rows, CONFIGS.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        if not torch.cuda.is_available():
            parser.error("torch finds no CUDA device")
        record.check_out(args.out)
        names = tuple(args.ops.split(","))
        if unknown := set(names) - set(kernels.TUNED):
            parser.error(f"{sorted(unknown)[0]!r} is none of {', '.join(kernels.TUNED)}")
        rows = run(shapes.FULL, torch.device("cuda"), args.out, names=names, minutes=args.minutes)
    print(*lines(rows), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
