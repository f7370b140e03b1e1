"""Two sets of results side by side, with the band of noise: python -m benchmarks.report --compare A B

A and B are result files, directories of them, or git revisions of benchmarks/results. What is ours and slower by more
than its band is a regression, and so is what is gone from a case that both have; peers are shown. On a GPU times are
compared. On CPU, where other people's programs come and go, our time by that of the peers that both have in the same
turn is. The band is the wider of a least one (below) and the spreads of both sides' middle halves, added up; on CPU
twice that, for how a process's memory happens to lie differs between processes, and a run has three.
"""

import math
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from benchmarks import record
from benchmarks.timing import Timing

BAND, BAND_ON_CPU = 0.03, 0.30
ON_CPU = 2  # times the spread
RESULTS = "benchmarks/results"


@dataclass(frozen=True)
class Measured:
    """samples: seconds. turns: on CPU the median of each turn, and peers: of each peer its own. least: the band at
    least. ours: whether it is judged. wrong: that nothing was timed, for what was computed is wrong. where: the
    machine. case: what several providers were timed at."""

    samples: list[float]
    least: float
    where: str
    ours: bool = True
    wrong: bool = False
    case: str = ""
    turns: list[float] = field(default_factory=list)
    peers: dict[str, list[float]] = field(default_factory=dict)

    def by(self, names: set[str]) -> tuple[float, float]:
        """(median, how far the middle half spreads, as a part of it): of the samples, or with names of each turn by the
        geometric mean of these peers' times, for one alone may be as lucky as we are."""
        found = self.samples
        if names:
            theirs = zip(*(self.peers[name] for name in names), strict=True)
            found = [turn / geometric_mean(of) for turn, of in zip(self.turns, theirs, strict=True)]
        low, middle, high = Timing(found).quartiles
        times = ON_CPU if self.least == BAND_ON_CPU else 1
        return middle, times * (high - low) / middle if middle else 0.0


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
        prefix = f"{name}: " if named else ""
        found |= {prefix + what: measured for what, measured in _measured(result)}
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


def _measured(result: dict[str, Any]) -> Iterator[tuple[str, Measured]]:
    on_gpu = (result.get("machine_info") or result).get("gpu") is not None
    about: dict[str, Any] = {"least": BAND if on_gpu else BAND_ON_CPU, "where": machine(result)}
    for entry in result.get("benchmarks", []):  # pytest-benchmark's
        info, of_suite = entry["extra_info"], about | {"case": entry.get("fullname", "").partition("::")[0]}
        if ratios := info.get("ratios"):
            yield f"{entry['name']}, by the peer's time", Measured([1 / ratio for ratio in ratios], **of_suite)
        for name, samples in info.get("compared", {}).items():  # the less the better
            yield f"{entry['name']}, {name}", Measured(samples, **of_suite)
        if not ratios:  # the whole benchmark's, as older files have it alone
            yield entry["name"], Measured(entry["stats"]["data"], **of_suite)
    peers: dict[str, dict[str, list[float]]] = {}  # of each case the peers' turns
    for row in result.get("rows", []):
        turns = row.get("cold", row).get("turns_us", ())
        if not row.get("provider", "fastdistil").startswith("fastdistil") and len(turns) > 1:
            peers.setdefault(_name(row, "provider"), {})[row["provider"]] = turns
    for row in result.get("rows", []):
        about |= {"case": _name(row, "provider"), "ours": row.get("provider", "fastdistil").startswith("fastdistil")}
        ways = [way for way in ("cold", "graph") if way in row] or [""]
        for way in ways if on_gpu else ways[:1]:
            name = ", ".join(part for part in (_name(row), way) if part)
            took = row.get(way, {}) if way else row
            samples = [s / 1e6 for s in took.get("samples_us", ())] or took.get("samples_s")
            if "wrong" in row:
                for wrong in [f"{name}, {way}" for way in ("cold", "graph")] if "op" in row else [name]:
                    yield wrong, Measured([0.0], wrong=True, **about)
            elif samples:
                turns = [] if on_gpu else took.get("turns_us", [])
                beside = {n: of for n, of in peers.get(about["case"], {}).items() if len(of) == len(turns)}
                yield name, Measured(samples, turns=turns, peers=beside, **about)


def _name(row: dict[str, Any], *but: str) -> str:
    keys = ("op", "shape", "batch", "input", "dtype", "provider")
    return ", ".join(str(row[key]) for key in keys if key in row and key not in but)


def machine(result: dict[str, Any]) -> str:
    around = result.get("machine_info") or result
    gpu = around.get("gpu")
    return gpu["name"] if gpu else f"{around.get('cpu')}, {around.get('threads')} threads"


def compare(before: dict[str, Measured], after: dict[str, Measured]) -> tuple[list[str], bool]:
    """A line for each thing that both measured, the changed ones first, and for what of ours is gone; and whether none
    is a regression, which only one machine can show. Raises ValueError where nothing is in both."""
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
            if b.wrong and not a.wrong and a.ours:
                changed.insert(0, f"WRONG  where it was right before  {name}")
                right = False
            continue
        common = a.peers.keys() & b.peers.keys()
        (old, spread), (new, more) = a.by(common), b.by(common)
        ratio, band = new / old if old else math.inf, max(a.least, b.least, spread + more)
        line = f"{ratio:6.3f} of the time (noise {band:.0%})  {name}"
        if ratio > 1 + band and a.ours and a.where == b.where:
            changed.insert(0, f"SLOWER {line}")
            right = False
        elif ratio > 1 + band:
            changed.append(f"slower {line}")
        elif ratio < 1 / (1 + band):
            changed.append(f"faster {line}")
        else:
            same.append(f"       {line}")
    cases = {(one.case, one.where) for one in after.values() if one.case}
    gone = []
    for name in (name for name in sorted(before.keys() - after.keys()) if before[name].ours):
        missed = (before[name].case, before[name].where) in cases
        gone.append(f"{'GONE' if missed else 'gone':6} {name}")
        right &= not missed
    only = len(before.keys() ^ after.keys())
    return [
        *changed,
        *gone,
        *same,
        f"{len(changed)} changed, {len(same)} within the noise, {only} in one of the two only",
    ], right
