"""Two sets of results side by side, with the band of noise: python -m benchmarks.report --compare A B

A and B are result files, directories of them, or git revisions of benchmarks/results. What is slower by more than its
band is a regression. The band of a pair is the widest of: a least one (below), both sides' interquartile ranges added
up, and what either side drifted while it was measured.
"""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.timing import Timing

BAND = 0.03
# Of two runs of the kernels' suite within minutes on a shared machine of two cores, 95 % of the medians differed by
# less than 30 %, the others by up to 60 %: how a process's memory happens to lie stays so until it ends.
BAND_ON_CPU, BAND_OF_OPS_ON_CPU = 0.25, 0.5
RESULTS = "benchmarks/results"


@dataclass(frozen=True)
class Measured:
    """Seconds, and as parts of them, how far the middle half of the rounds spreads and the least band that counts.
    wrong: that nothing was timed, for what was computed is wrong. where: the machine."""

    median: float
    spread: float
    least: float = BAND
    wrong: bool = False
    where: str = ""


def load_both(before: str, after: str) -> list[dict[str, Measured]]:
    """All times of two files, whatever their names, or of two directories or revisions."""
    named = not (Path(before).is_file() and Path(after).is_file())
    return [load(where, named) for where in (before, after)]


def load(where: str, named: bool = True) -> dict[str, Measured]:
    """All times of a file, a directory or a revision, by what was measured and, if `named`, its file's name. Raises
    ValueError where there are none."""
    path = Path(where)
    found: dict[str, Measured] = {}
    if path.is_file():
        files = {path.name: record.measured(path)}
    elif path.is_dir():
        files = {str(p.relative_to(path)): record.measured(p) for p in sorted(path.rglob("*.json"))}
    else:
        files = dict(_of_revision(where))
    for name, result in files.items():
        prefix, place = f"{name}: " if named else "", machine(result)
        on_gpu = (result.get("machine_info") or result).get("gpu") is not None
        least = BAND if on_gpu else BAND_OF_OPS_ON_CPU if result.get("stage") == "kernels" else BAND_ON_CPU
        for what, t, drift in _times(result):
            found[prefix + what] = Measured(t.median, _spread(t), max(least, drift), where=place)
        for row in result.get("rows", []):
            if "wrong" in row:
                ways = (", cold", ", graph") if "op" in row else ("",)
                found |= {f"{prefix}{_name(row)}{way}": Measured(0.0, 0.0, wrong=True, where=place) for way in ways}
    if not found:
        raise ValueError(f"{where} is no file, directory or revision with results")
    return found


def _of_revision(revision: str) -> Iterator[tuple[str, dict[str, Any]]]:
    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", record.ROOT, *args], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"{revision} is no file, directory or revision: {done.stderr.strip()}")
        return done.stdout

    for name in git("ls-tree", "-r", "--name-only", revision, RESULTS).split():
        if name.endswith(".json"):
            text = git("show", f"{revision}:{name}")
            yield name.removeprefix(RESULTS + "/"), record.checked(text, f"{revision}:{name}")


def _times(result: dict[str, Any]) -> Iterator[tuple[str, Timing, float]]:
    """What was measured, its rounds, and its drift."""
    for entry in result.get("benchmarks", []):  # pytest-benchmark's
        yield entry["name"], Timing(entry["stats"]["data"]), 0.0
    for row in result.get("rows", []):
        name = _name(row)
        for way in ("cold", "graph"):
            if way in row:
                samples = [s / 1e6 for s in row[way]["samples_us"]]
                yield f"{name}, {way}", Timing(samples), row[way].get("drift", 0.0)
        if "samples_us" in row:
            yield name, Timing([s / 1e6 for s in row["samples_us"]]), 0.0
        if "samples_s" in row:
            yield name, Timing(row["samples_s"]), 0.0


def _name(row: dict[str, Any]) -> str:
    keys = ("op", "shape", "batch", "input", "dtype", "provider")
    return ", ".join(str(row[key]) for key in keys if key in row)


def machine(result: dict[str, Any]) -> str:
    around = result.get("machine_info") or result
    gpu = around.get("gpu")
    return gpu["name"] if gpu else f"{around.get('cpu')}, {around.get('threads')} threads"


def _spread(timing: Timing) -> float:
    low, middle, high = timing.quartiles
    return (high - low) / middle if middle else 0.0


def compare(before: dict[str, Measured], after: dict[str, Measured]) -> tuple[list[str], bool]:
    """A line for each thing that both measured, the changed ones first, and whether none is a regression. Raises
    ValueError where nothing is in both."""
    if not before.keys() & after.keys():
        raise ValueError("the two have nothing in common that was measured")
    changed: list[str] = []
    same: list[str] = []
    right = True
    machines = [{side[name].where for name in side} for side in (before, after)]
    if machines[0] != machines[1]:
        changed.append(f"not the same machine: {'; '.join(sorted(machines[0]))} and {'; '.join(sorted(machines[1]))}")
    for name in sorted(before.keys() & after.keys()):
        a, b = before[name], after[name]
        if a.wrong or b.wrong:
            if b.wrong and not a.wrong:
                changed.insert(0, f"WRONG  where it was right before  {name}")
                right = False
            continue
        ratio, band = b.median / a.median, max(a.least, b.least, a.spread + b.spread)
        line = f"{ratio:6.3f} of the time (noise {band:.0%})  {name}"
        if ratio > 1 + band:
            changed.insert(0, f"SLOWER {line}")
            right = False
        elif ratio < 1 / (1 + band):
            changed.append(f"faster {line}")
        else:
            same.append(f"       {line}")
    only = len(before.keys() ^ after.keys())
    return [
        *changed,
        *same,
        f"{len(changed)} changed, {len(same)} within the noise, {only} in one of the two only",
    ], right
