"""All that a machine with a GPU can show, in one command, within given minutes.

    python -m benchmarks.gpu --out DIR --minutes 25 [--stages correctness,engine] [--dry]

The stages run in this order, each in a process of its own, so that what breaks one loses nothing of the others; each
writes DIR/<stage>.json as it goes. --dry walks through every one at toy size, on CPU. Runs uninstalled and offline.
Exit status 1 where a stage failed or something measured was wrong.
"""

import argparse
import faulthandler
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import encoder, engine, kernels, record, roofline, shapes, timing, tune
from fastdistil import ops

# share of the minutes; what a stage leaves is the others'
STAGES = {"environment": 1, "correctness": 12, "ceilings": 1, "kernels": 8, "encoder": 5, "engine": 3, "tune": 8}
WITH_GPU = (  # what the most hangs on first
    *("kernels/test_encoder.py", "test_graphs.py", "test_engine.py", "test_ops.py"),
    *(f"kernels/test_{name}.py" for name in ("gemm", "layer_norm", "pooling", "pack", "attention")),
)
NO_TIME = "stopped: no time was left"
CHECKING = 120  # seconds, by estimate: each of its kernels is compiled by one process under the sanitizer
ALONE = "kernels/test_memcheck.py"  # it is slow, and checks the memory of a process of its own
# "tests/x.py::test_y PASSED [ 1%]", or by several processes "[gw0] [ 1%] PASSED tests/x.py::test_y"
OUTCOME = re.compile(
    r"(?:\[gw\d+\] \[ *\d+%\] (?P<reported>PASSED|FAILED|ERROR|SKIPPED) (?P<tested>.+?) *$)"
    r"|(?:(?P<test>\S+::.+?) (?P<outcome>PASSED|FAILED|ERROR|SKIPPED)\b)"
)
SUMMARY = 12_000  # characters at most, for logs that keep no more
WRONG = 3  # a stage's exit status when something measured was wrong; Python's own for a crash is 1
EVERY = 5.0  # seconds between two writes of what a stage has so far
WRITING = 3.0  # seconds that a stage has to write what it has, when it is stopped
RECENT = 1800.0  # seconds after which a ceiling is measured again
TELLING = 14.0  # seconds that pytest has to say what failed, when it is stopped: xdist waits 10 for who is busy
HANGS = 150  # seconds after which a test has hung; torch.compile's takes the longest, by estimate
GRACE = 60.0  # seconds at most that a stage may go on beyond its share, for a provider that is being measured


@dataclass
class Stage:
    """What a stage gets: where it writes, how long it may take, and whether it is a rehearsal."""

    out: Path
    minutes: float
    dry: bool
    more: dict[str, Any] = field(default_factory=dict)  # what a result says beside its rows, from the start

    def __post_init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() and not self.dry else "cpu")
        self.matrix = shapes.TOY if self.dry else shapes.FULL if self.device.type == "cuda" else shapes.ON_CPU

    def ceilings(self) -> dict[str, Any]:
        """As the stage of that name measured them a little before, or measured now."""
        path = self.out / "ceilings.json"
        if path.is_file():
            found, here = record.read(path), record.environment()
            age = datetime.fromisoformat(here["date"]) - datetime.fromisoformat(found["date"])
            cards = [(one["gpu"] or {}).get("uuid") for one in (found, here)]
            same = cards[0] == cards[1] and all(found[name] == here[name] for name in ("cpu", "torch", "commit"))
            if same and age.total_seconds() < RECENT and found["dry"] == self.dry:
                return found["ceilings"]
        return timing.ceilings(self.device, self.dry)


Result = tuple[dict[str, Any], list[str], bool]  # what is written, lines of the summary, whether it is right
Keep = Callable[[list[dict[str, Any]]], None]


def environment(stage: Stage, keep: Keep) -> Result:
    found = record.environment()
    gpu = found["gpu"] or {"name": "no GPU"}
    lines = [f"{gpu['name']}, torch {found['torch']}, triton {found['triton']}, Python {found['python']}"]
    lines += [
        f"{name}: {gpu[name]}" for name in ("uuid", "driver_version", "clocks.max.sm", "power.limit") if name in gpu
    ]
    why = ops.why_eager(stage.device)
    if why is not None:  # every op would be eager torch's, its tests pass and its times stand under our name
        lines.append(f"{'' if stage.dry else 'WRONG '}no kernel runs here: {why}")
    return {}, lines, stage.dry or (found["gpu"] is not None and why is None)


def correctness(stage: Stage, keep: Keep) -> Result:
    """The tests that need a GPU: all at once, and what failed there again by file, for one test that breaks the device
    takes those along that come after it in its process."""
    end = time.monotonic() + 60 * stage.minutes
    runs: dict[str, dict[str, Any]] = {}

    def run(name: str, tests: list[str], processes: int) -> None:
        runs[name] = _pytest(tests, processes, end - time.monotonic(), stage.dry)
        keep([{"run": name} | found for name, found in runs.items()])

    if stage.dry:
        run("together", ["test_ops.py"], 0)
    else:
        run("together", list(WITH_GPU), 8)
    among = runs["together"]["failed_tests"]
    for file in dict.fromkeys(test.partition("::")[0] for test in among):
        tests = [test.removeprefix("tests/") for test in among if test.partition("::")[0] == file]
        run(f"{file} again", tests, 0)
    left, unchecked = end - time.monotonic(), []
    if not stage.dry and left >= CHECKING:
        run("memory", [ALONE], 0)
        if runs["memory"]["ended"] == NO_TIME:  # what it found until then stays
            runs["memory"]["ended"] = ""
            unchecked.append(f"{ALONE}: {NO_TIME}")
    elif not stage.dry:
        unchecked.append(f"{ALONE} was not run: it takes up to {CHECKING} s, {max(left, 0):.0f} s were left")
    first = [found for name, found in runs.items() if not name.endswith(" again")]
    passed = {test for name, found in runs.items() if name.endswith(" again") for test in found["passed_tests"]}
    failures = [line for found in first for line in found["failures"] if not any(_is_of(line, test) for test in passed)]
    counts = {what: sum(found[what] for found in first) for what in ("passed", "skipped")} | {"failed": len(failures)}
    lines = [", ".join(f"{n} {what}" for what, n in counts.items())]
    told = [f"{name}: {found['ended']}" for name, found in runs.items() if found["ended"]] + failures
    lines += [f"WRONG {line}" for line in told] + unchecked + [line for found in first for line in found["skips"]]
    lines += [f"failed among others and passed by itself: {test}" for test in among if test in passed]
    return {"counts": counts, "runs": runs}, lines, counts["passed"] > 0 and not told


def _is_of(line: str, test: str) -> bool:
    """Whether a line of pytest's summary is about a test."""
    return line.partition(" ")[2] == test or line.partition(" ")[2].startswith(f"{test} - ")


def _pytest(tests: list[str], processes: int, seconds: float, dry: bool) -> dict[str, Any]:
    """outcomes() of the tests, with the output and how it ended where that was out of order."""
    if seconds < 5:
        return outcomes("") | {"ended": "not run: no time was left", "output": ""}
    chosen = ["-k", "what_is_no_tensor"] if dry else ["-m", "gpu"]
    command = [sys.executable, "-m", "pytest", "-v", "-rfEs", "--no-header", "--tb=short", "-p", "no:randomly", *chosen]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(processes)]
    if importlib.util.find_spec("pytest_timeout"):  # one that hangs ends its own process, which is replaced
        command += [f"--timeout={HANGS}", "--timeout-method=thread"]
    command += [str(record.ROOT / "tests" / name) for name in tests]
    with tempfile.TemporaryFile("w+") as log:
        done = subprocess.Popen(command, cwd=record.ROOT, stdout=log, stderr=subprocess.STDOUT)  # in the stage's group
        telling = min(TELLING, seconds / 3)
        try:
            code = done.wait(seconds - telling)
            ended = "" if code in (0, 1, 5) else f"pytest ended with status {code}"
        except subprocess.TimeoutExpired:
            ended = NO_TIME
            done.send_signal(signal.SIGINT)  # it says why tests have failed, and ends
            with suppress(subprocess.TimeoutExpired):
                done.wait(telling)
        finally:
            done.kill()
            done.wait()
        log.seek(0)
        output = log.read()
    found = outcomes(output)
    if not ended and code == 1 and not found["failures"]:
        ended = "pytest failed, and named no test"
    return found | {"ended": ended, "output": output[-100_000:]}


def outcomes(output: str) -> dict[str, Any]:
    """Of pytest -v -rfEs, whole or cut off: how many passed, failed and were skipped, which passed and failed, and a
    line a failure or a reason to skip."""
    found: dict[str, str] = {}
    for line in output.splitlines():
        if (one := OUTCOME.match(line)) is not None:
            test, outcome = one["test"] or one["tested"], one["outcome"] or one["reported"]
            found[test] = "failed" if outcome in ("FAILED", "ERROR") else outcome.lower()
    failures = [line[:500] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    told = " ".join(failures)
    failures += [f"FAILED {test}" for test, outcome in found.items() if outcome == "failed" and test not in told]
    counts = {what: list(found.values()).count(what) for what in ("passed", "failed", "skipped")}
    counts["failed"] = max(counts["failed"], len(failures))  # a file that cannot be collected has no line of its own
    skips = [line[:300] for line in output.splitlines() if re.match(r"SKIPPED \[\d+\] ", line)]
    tests = {f"{what}_tests": [t for t, outcome in found.items() if outcome == what] for what in ("passed", "failed")}
    return counts | tests | {"failures": failures, "skips": skips}


def ceilings(stage: Stage, keep: Keep) -> Result:
    found = timing.ceilings(stage.device, stage.dry)
    lines = [f"copy {found['copy']['bytes_per_s'] / 1e12:.2f} TB/s"]
    lines += [f"{name} {f['flops_per_s'] / 1e12:.1f} TFLOP/s" for name, f in found.items() if name != "copy"]
    return {"ceilings": found}, [", ".join(lines)], True


def of_kernels(stage: Stage, keep: Keep) -> Result:
    limits = stage.ceilings()
    stage.more = {"ceilings": limits, "shape": asdict(stage.matrix.shape)}
    rows = kernels.run(stage.matrix, stage.device, limits, minutes=stage.minutes, keep=keep)
    return {"rows": rows}, list(kernels.lines(rows)), not kernels.failed(rows)


def of_encoder(stage: Stage, keep: Keep) -> Result:
    stage.more = {"shape": asdict(stage.matrix.shape)}
    rows = encoder.run(stage.matrix, stage.device, minutes=stage.minutes, keep=keep)
    lines = list(encoder.lines(rows))
    if (chip := roofline.at_hand(stage.device)) is not None:
        found = encoder.predicted(rows, chip, stage.matrix.shape)
        lines += [
            f"predicted {batch}: {guess:,.0f} tokens/s, measured {real / guess:.2f} of it"
            for batch, guess, real in found
        ]
    return {"rows": rows}, lines, not kernels.failed(rows)


def of_engine(stage: Stage, keep: Keep) -> Result:
    stage.more = {"shape": asdict(stage.matrix.shape)}
    rows = engine.run(stage.matrix, stage.device, minutes=stage.minutes, keep=keep)
    return {"rows": rows}, list(engine.lines(rows)), not kernels.failed(rows)


def of_tune(stage: Stage, keep: Keep) -> Result:
    """Gains are kept as they are found; `python -m benchmarks.tune --apply` records them."""
    path = stage.out / "tune.json"
    names, most = (("bias_gelu",), 2) if stage.dry else (kernels.TUNED, None)
    rows = tune.run(stage.matrix, stage.device, path, names=names, minutes=stage.minutes, most=most)
    return {"rows": rows}, list(tune.lines(rows)), True


RUN: dict[str, Callable[[Stage, Keep], Result]] = {
    "environment": environment,
    "correctness": correctness,
    "ceilings": ceilings,
    "kernels": of_kernels,
    "encoder": of_encoder,
    "engine": of_engine,
    "tune": of_tune,
}


LINES: dict[str, Callable[[list[dict[str, Any]]], Iterator[str]]] = {
    "kernels": kernels.lines,
    "encoder": encoder.lines,
    "engine": engine.lines,
    "tune": tune.lines,
}


def run_stage(name: str, stage: Stage) -> int:
    """In a process of its own."""
    path = stage.out / f"{name}.json"
    around = record.environment() | {"stage": name, "dry": stage.dry}
    written = time.monotonic()
    latest: list[dict[str, Any]] = []

    def keep(rows: list[dict[str, Any]]) -> None:
        nonlocal latest
        latest = rows
        if time.monotonic() > written + EVERY:
            write()

    def write() -> None:
        nonlocal written
        record.write(path, around | stage.more | {"rows": latest, "whole": False, "clocks": watch.samples})
        written = time.monotonic()

    with timing.Watch() as watch:
        try:
            found, lines, right = RUN[name](stage, keep)
        except BaseException:
            if latest:
                write()
            raise
    result = around | stage.more | found | {"whole": True, "right": right, "lines": lines, "clocks": watch.samples}
    record.write(path, result)
    return 0 if right else WRONG


def run_all(names: list[str], out: Path, minutes: float, dry: bool) -> int:
    """Each stage's process, one after another; then what they found."""
    end = time.monotonic() + 60 * minutes
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    path = os.pathsep.join([str(record.ROOT), *map(os.path.abspath, given)])  # stages run elsewhere
    states: dict[str, str] = {}
    for i, name in enumerate(names):
        left = (end - time.monotonic()) / 60
        share = left * STAGES[name] / sum(STAGES[n] for n in names[i:])
        if name != "tune":  # which goes on with what an earlier run found
            (out / f"{name}.json").unlink(missing_ok=True)
        if left < 0.05:
            states[name] = "not run: no time was left"
            continue
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--stage",
            name,
            "--out",
            str(out),
            "--minutes",
            f"{max(0.001, share - min(share / 10, 0.3)):.3f}",
        ]
        start = time.monotonic()
        # measuring ends a little before its share is over, and at the latest when all minutes are
        most = max(1.0, min(60 * share + GRACE, 60 * left) - WRITING)
        print(f"--- {name}, {share:.1f} minutes", flush=True)
        # a group of its own, so that what it has started ends with it
        process = subprocess.Popen(
            [*command, *(["--dry"] if dry else [])],
            cwd=record.ROOT,
            env=os.environ | {"PYTHONPATH": path},
            process_group=0,
        )
        try:
            code = process.wait(most)
            words = {0: "right", WRONG: "WRONG"}.get(code, f"BROKE with status {code}")
            if code == 0 and not (out / f"{name}.json").is_file():
                words = "BROKE: it wrote nothing"
        except subprocess.TimeoutExpired:
            words = "STOPPED"
            os.killpg(process.pid, signal.SIGTERM)  # it writes what it has
            with suppress(subprocess.TimeoutExpired):
                process.wait(WRITING)
        except (KeyboardInterrupt, SystemExit):
            states[name] = "STOPPED from outside"
            with suppress(ProcessLookupError, subprocess.TimeoutExpired, KeyboardInterrupt, SystemExit):
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(WRITING)
            break
        finally:
            with suppress(ProcessLookupError):  # what it started may outlive it, and would disturb what comes next
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        states[name] = f"{words}, {time.monotonic() - start:.0f} s"
    print(*summary(out, states), sep="\n", flush=True)
    return int(any("right" not in state for state in states.values()))


def _terminated(number: int, frame: Any) -> None:
    sys.exit(128 + number)  # as an exception, so that the stage's process is ended, too


def summary(out: Path, states: dict[str, str]) -> Iterator[str]:
    """What went wrong first, then an equal share of the lines for each stage, in at most SUMMARY characters."""
    yield "--- summary"
    room = SUMMARY - 100 - sum(len(name) + len(state) + 3 for name, state in states.items())
    for i, (name, state) in enumerate(states.items()):
        yield f"{name}: {state}"
        path = out / f"{name}.json"
        lines: list[str] = []
        if path.is_file():
            try:
                found = record.read(path)
                lines = found.get("lines") or [
                    "what it had so far:",
                    *(LINES[name](found["rows"]) if name in LINES else ()),
                ]
            except ValueError as error:
                lines = [f"WRONG {error}"]
        lines = sorted((line[:300] for line in lines), key=lambda line: not line.startswith("WRONG"))
        share = room // (len(states) - i)
        for n, line in enumerate(lines):
            if len(line) + 40 > share:
                yield f"  ... and {len(lines) - n} more lines"
                room -= 40
                break
            yield f"  {line}"
            share -= len(line) + 3
            room -= len(line) + 3


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for a JSON file a stage")
    parser.add_argument("--minutes", type=record.minutes, default=25.0)
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated")
    parser.add_argument("--dry", action="store_true", help="toy sizes on CPU")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.stage:
        signal.signal(signal.SIGTERM, _terminated)
        faulthandler.register(signal.SIGTERM, all_threads=False, chain=True)  # says where it was, also within a library
        return run_stage(args.stage, Stage(args.out, args.minutes, args.dry))
    names = args.stages.split(",")
    if unknown := set(names) - set(STAGES):
        parser.error(f"{sorted(unknown)[0]!r} is none of {', '.join(STAGES)}")
    if not (torch.cuda.is_available() or args.dry):
        parser.error("torch finds no CUDA device; --dry rehearses on CPU")
    try:
        args.out = args.out.resolve()
        args.out.mkdir(parents=True, exist_ok=True)
        record.check_writable(args.out)
    except (OSError, record.WrongUse) as error:
        parser.error(f"--out {args.out}: {error}")
    if not (args.dry or record.is_commit(record.commit()) or os.environ.get("FASTDISTIL_COMMIT") == "unknown"):
        parser.error(
            "no repository is here to say which commit this is, and the report refuses such results; set the variable "
            "FASTDISTIL_COMMIT to what `git describe --always --dirty --abbrev=40 --exclude='*'` says where it is"
        )
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        return run_all([name for name in STAGES if name in names], args.out, args.minutes, args.dry)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
