"""A job: rows in, numbered parts out, each whole or not there; what is done stays done.

A part is a run of input rows, cut by their number and their length alone, and is computed by itself: so whichever parts
exist when a job is stopped, resuming it writes the same bytes that it would have written. The budget of tokens that a
want of memory has made smaller holds for the parts behind, and is kept with each.
"""

import errno
import itertools
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from fastdistil.engine import Embedder
from fastdistil.engine.embedder import is_terminal
from fastdistil.engine.runner import Engine
from fastdistil.engine.scheduler import Window, cuts
from fastdistil.engine.tokens import TextWindows
from fastdistil.jobs.manifest import (
    LOCK,
    MANIFEST,
    REJECTS,
    Lock,
    Manifest,
    Part,
    apart,
    commit,
    differences,
    fingerprint_of_files,
    finished_parts,
    is_whole,
    part_name,
    read_manifest,
    set_aside,
    start_over,
    write_manifest,
    write_text,
)
from fastdistil.jobs.readers import Columns, Progress, Row, count_rows, find_inputs, has_kind, read_files
from fastdistil.jobs.writers import check_format, write_embeddings

PART_ROWS = 50_000  # two row groups of a parquet file
PART_CHARACTERS = 2**27  # of all its texts: what bounds the memory of long ones
ON_ERROR = ("fail", "skip", "null")
FLOAT16 = float(np.finfo(np.float16).max)
EVERY, SELDOM = 10.0, 60.0  # seconds between two JSON lines of progress, and two that a log file keeps


@dataclass
class Job:
    """Where rows come from and where answers go. fingerprint: what the answers depend on beside the rows."""

    inputs: list[str]
    output: Path
    task: str
    model: str
    format: str
    fingerprint: dict[str, Any]
    columns: Columns = field(default_factory=Columns)
    on_error: str = "fail"
    resume: bool = False
    overwrite: bool = False
    shard: int = 0
    shards: int = 1
    part_rows: int = PART_ROWS
    part_characters: int = PART_CHARACTERS


@dataclass
class Rows:
    """The rows of a part, and what became of them. named: whether they have ids of their own. errors: by position."""

    number: int
    first: int
    rows: list[Row]
    named: bool = False
    errors: dict[int, str] = field(default_factory=dict)
    usable: list[int] = field(default_factory=list)  # positions of the rows that can be answered
    answers: Any = None
    left: int = 0  # of the usable ones, still to be answered
    budget: int = 0  # of tokens a batch, where a want of memory made it smaller


class Work(Protocol):
    """What a job does with its rows."""

    dim: int | None

    def run(self, parts: Iterable[Rows]) -> Iterator[Rows]:
        """The parts in their order, answered; a row that turns out to be unusable is put into `errors`."""

    def write(self, directory: Path, name: str, part: Rows, keep: list[int]) -> list[str]:
        """The answers of the rows at positions `keep` -> names of the files."""

    def go_on(self, budget: int) -> None:
        """Behind a part at whose end the budget was this."""

    def answered(self) -> tuple[int, int | None]:
        """(rows, tokens) so far, in parts that are not whole, too; tokens None where nobody counts them."""

    def bottleneck(self) -> str | None: ...


def run_job(job: Job, work: Work, log: "Log") -> Manifest:
    """Raises ValueError naming the first unusable row with on_error "fail", OSError for files and directories; parts
    that are finished stay, and a job with `resume` goes on behind them."""
    inputs = find_inputs(job.inputs)
    check_format(job.format)
    directory = _directory(job.output)
    inputs = apart(job.inputs, inputs, directory)
    if not (directory / LOCK).exists():
        _empty(job, directory)  # a refusal leaves no lock behind
    with Lock(directory) as lock:
        manifest = Manifest(job.task, job.model, job.format, _settings(job, inputs), work.dim)
        parts = _start(job, directory, manifest, log)
        if parts is None:
            return read_manifest(directory)
        first, last = _bounds(job, inputs)
        if parts:
            work.go_on(parts[-1].budget)
        progress = Progress(inputs)
        done = parts[-1].first + parts[-1].read if parts else first
        rows = read_files(inputs, job.columns, skip=done, progress=progress)
        reading = _Reading(rows, job, done, last, len(parts), [part.read for part in manifest.parts[len(parts) :]])
        log.start(progress, work, sum(part.read for part in parts), None if last == sys.maxsize else last - done)

        def write(part: Rows) -> Part:
            written = _write(job, lock, manifest, work, part)
            log.part(part)
            return written

        with ThreadPoolExecutor(1) as writer:
            writing: Future | None = None
            for part in work.run(reading):
                # what a part holds was read by now: those that are written are of the input as it was
                if (refused := _refused(job, part) or _changed(manifest, inputs)) is not None:
                    reading.failure = ValueError(refused)
                    break
                if writing is not None:
                    parts.append(writing.result())
                writing = writer.submit(write, part)
            if writing is not None:
                parts.append(writing.result())
        if reading.failure is not None:
            raise reading.failure
        if (changed := _changed(manifest, inputs)) is not None:
            raise ValueError(changed)
        lock.check()
        if not parts:
            start_over(directory, manifest, [])
        _finish(directory, manifest, parts)
        log.done(manifest)
        return manifest


def _directory(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; give a directory for the output")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _settings(job: Job, inputs: list[str]) -> dict[str, Any]:
    return job.fingerprint | {
        "inputs": fingerprint_of_files(inputs),
        "columns": list(job.columns[:4]),
        **({"input_format": kind} if (kind := job.columns.kind) and not all(map(has_kind, inputs)) else {}),
        "part_characters": job.part_characters,
        "part_rows": job.part_rows,
        "on_error": job.on_error,
        "shard": job.shard,
        "shards": job.shards,
    }


def _changed(manifest: Manifest, inputs: list[str]) -> str | None:
    """What is wrong where an input is another than when the job began; one that is gone was opened before."""
    for (name, size, moment, _), path in zip(manifest.settings["inputs"], inputs, strict=True):
        with suppress(FileNotFoundError):
            if path != "-" and ((stat := os.stat(path)).st_size, stat.st_mtime_ns) != (size, moment):
                return f"the input {name} changed while it was read; start over with --overwrite"
    return None


def _empty(job: Job, directory: Path) -> bool:
    """Whether the job begins with its first part. Raises FileExistsError where that would lose what lies there."""
    present = sorted(p.name for p in directory.iterdir() if p.name != LOCK)
    known = (directory / MANIFEST).is_file()
    if not present or (known and job.resume):
        return not present
    if not (job.overwrite or job.resume):
        hint = ", or --resume to go on with the job in it" if known else ""
        raise FileExistsError(f"{directory} is not empty ({present[0]}); give another directory, or --overwrite{hint}")
    return True


def _start(job: Job, directory: Path, manifest: Manifest, log: "Log") -> list[Part] | None:
    """The parts that are finished already; None where all of them are. Those of a job that was finished are the
    manifest's from here on, for the ones to be made again end where they did: a merged one is not cut by its length."""
    if _empty(job, directory):
        if job.resume:
            set_aside(directory)
        return []
    try:
        old = read_manifest(directory)
    except ValueError as error:
        raise ValueError(f"{error}; give another directory, or --overwrite to start over") from error
    parts = finished_parts(directory)
    if old.finished:
        parts = list(itertools.takewhile(lambda part: is_whole(directory, part), old.parts))
    before, now = dict(old.settings), dict(manifest.settings)
    if not any(part.rejected for part in parts):  # then it makes no difference how they are treated
        before.pop("on_error", None), now.pop("on_error", None)
    changed = differences(
        before | {"task": old.task, "format": old.format, "dim": old.dim},
        now | {"task": manifest.task, "format": manifest.format, "dim": manifest.dim},
    )
    if changed:
        raise ValueError(
            f"{directory} holds a job that differs from this one: {'; '.join(changed)}. Give another directory, or "
            "--overwrite to start over"
        )
    if "-" in job.inputs and parts:
        raise ValueError("a job from standard input cannot be resumed, for it cannot be seen to be the same input")
    if old.finished and len(parts) == len(old.parts):
        for path in directory.glob("part-*.done.json"):
            path.unlink()
        log.finished(directory, old)
        return None
    manifest.parts = old.parts
    if parts:
        start_over(directory, manifest, parts)
    damaged = f"; {part_name(len(parts))} is damaged" if old.finished else ""
    log.say(f"going on behind {len(parts)} finished parts{damaged}")
    return parts


def _bounds(job: Job, inputs: list[str]) -> tuple[int, int]:
    """The first row of this shard, and where it ends."""
    if job.shards == 1:
        return 0, sys.maxsize
    if "-" in inputs:
        raise ValueError("standard input cannot be split into shards; give files")
    rows = count_rows(inputs, job.columns)
    return rows * job.shard // job.shards, rows * (job.shard + 1) // job.shards


class _Reading:
    """Parts of the input, until it ends or fails; planned: the sizes of the next ones, where they are known. A failure
    waits until what came before it is written."""

    def __init__(self, rows: Iterator[Row], job: Job, first: int, last: int, number: int, planned: list[int]):
        self.rows, self.job, self.first, self.last, self.number = rows, job, first, last, number
        self.planned = deque(planned)
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[Rows]:
        named = self.job.columns.id is not None
        part, size = Rows(self.number, self.first, [], named), 0
        try:
            for row in self.rows:
                if row.number >= self.last:
                    break
                if row.error is not None:
                    if self.job.on_error == "fail":
                        raise ValueError(f"{row.where}: {row.error}")
                    part.errors[len(part.rows)] = row.error
                else:
                    part.usable.append(len(part.rows))
                    size += len(row.text) + len(row.question or "")
                part.rows.append(row)
                if self._is_full(len(part.rows), size):
                    yield part
                    part, size = Rows(part.number + 1, row.number + 1, [], named), 0
        except (OSError, ValueError) as error:
            self.failure = self.failure or error  # of a part before, while this one was read ahead
            return
        if part.rows:
            yield part

    def _is_full(self, rows: int, characters: int) -> bool:
        if not self.planned:
            return rows >= self.job.part_rows or characters >= self.job.part_characters
        if full := rows >= self.planned[0]:
            self.planned.popleft()
        return full


def _refused(job: Job, part: Rows) -> str | None:
    """Why a part ends the job."""
    if job.on_error != "fail" or not part.errors:
        return None
    position = min(part.errors)
    return f"{part.rows[position].where}: {part.errors[position]}"


def _write(job: Job, lock: Lock, manifest: Manifest, work: Work, part: Rows) -> Part:
    lock.check()
    directory = lock.path.parent
    if part.number == 0:  # the earlier job goes only when there is something to put in its place
        start_over(directory, manifest, [])
    name = part_name(part.number)
    keep = [p for p in range(len(part.rows)) if job.on_error == "null" or p not in part.errors]
    try:
        files = work.write(directory, name, part, keep)
        if part.errors:
            files.append(f"{name}.{REJECTS}")
            lines = [
                {"row": part.rows[p].number, "id": part.rows[p].id, "where": part.rows[p].where, "reason": reason}
                for p, reason in sorted(part.errors.items())
            ]
            write_text(directory / files[-1], "".join(json.dumps(line) + "\n" for line in lines))
        sizes = {file: (directory / file).stat().st_size for file in files}
        done = Part(part.number, part.first, len(part.rows), len(keep), sizes, len(part.errors), part.budget)
        commit(directory, done)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno, f"no space is left for {directory / name}; make room and go on with --resume"
            ) from error
        raise
    return done


def _finish(directory: Path, manifest: Manifest, parts: list[Part]) -> None:
    manifest.finished, manifest.parts = True, parts
    manifest.rows, manifest.rejected = sum(part.rows for part in parts), sum(part.rejected for part in parts)
    write_manifest(directory, manifest)
    for part in parts:
        (directory / f"{part.name}.done.json").unlink(missing_ok=True)


# --- embeddings -----------------------------------------------------------------------------------------------------


class Embedding:
    """Texts, or token ids, to embeddings."""

    def __init__(
        self,
        embedder: Embedder,
        form: str,
        *,
        max_batch_tokens: int | None = None,
        truncate: bool = True,
        dtype: str = "float32",
        tokenizer_processes: int = 0,
        of_tokens: bool = False,
    ):
        self.embedder, self.form, self.truncate, self.dtype = embedder, form, truncate, np.dtype(dtype)
        self.of_tokens = of_tokens
        self.engine: Engine = embedder.engine(max_batch_tokens)
        self.asked = self.engine.budget
        self.source: TextWindows = embedder.text_windows(tokenizer_processes)
        if not truncate:
            self.source.max_length = None
        self.dim: int | None = embedder.dim
        self._rows = self._tokens = 0

    def go_on(self, budget: int) -> None:
        self.engine.budget = min(self.engine.budget, budget or self.engine.budget)

    def answered(self) -> tuple[int, int | None]:
        return self._rows, self._tokens

    def bottleneck(self) -> str | None:
        return self.engine.stages.bottleneck()

    def run(self, parts: Iterable[Rows]) -> Iterator[Rows]:
        waiting: deque[Rows] = deque()

        def windows() -> Iterator[Window]:
            for part in parts:
                texts = [part.rows[p].text for p in part.usable]
                part.answers, part.left = np.empty((len(texts), self.embedder.dim), self.dtype), len(texts)
                waiting.append(part)
                for first, last in cuts(len(texts)) if texts else [(0, 0)]:  # so that an empty part is passed on
                    window = self._window(part, texts[first:last], first)
                    window.owner = part
                    yield window

        try:
            for done in self.embedder.run(self.engine, windows()):
                part: Rows = done.window.owner
                at, which = done.window.texts(done.rows)
                if done.error is not None:
                    part.errors |= {part.usable[i]: done.error for i in at}
                elif done.result is not None:
                    self._put(part, at, done.result.numpy()[which])
                part.left -= len(at)
                self._rows += len(at)
                self._tokens += int(done.window.lengths[done.rows].sum())
                while waiting and not waiting[0].left:
                    yield self._whole(waiting.popleft())
            yield from map(self._whole, waiting)
        finally:
            self.source.close()

    def _whole(self, part: Rows) -> Rows:
        self._rows += len(part.rows) - len(part.usable)  # which needed no answer
        part.budget = self.engine.budget if self.engine.budget < self.asked else 0
        return part

    def _put(self, part: Rows, at: np.ndarray, found: np.ndarray) -> None:
        with np.errstate(over="ignore"):
            part.answers[at] = found
        if self.dtype == np.float16:
            for i in at[(np.abs(found) > FLOAT16).any(1)]:
                part.errors[part.usable[i]] = "its embedding is beyond float16's range; leave --output-dtype float32"
        if not np.isfinite(found).all():
            for i in at[~np.isfinite(found).all(1)]:
                part.errors[part.usable[i]] = "its embedding is not finite; look at the weights, or compute in float32"

    def _window(self, part: Rows, texts: list[Any], first: int) -> Window:
        if self.of_tokens:
            lengths = np.fromiter(map(len, texts), np.int64, len(texts))
            ids = np.concatenate([np.empty(0, np.int32), *texts])
            window = Window(ids, lengths, first=first)
            size = self.embedder.model.config.vocab_size
            bad = np.flatnonzero((ids < 0) | (ids >= size))
            outside, which = np.unique(np.repeat(np.arange(len(texts)), lengths)[bad], return_index=True)
            first_bad = dict(zip(outside.tolist(), ids[bad[which]].tolist(), strict=True))
            wrong = np.zeros(len(texts), bool)
            wrong[outside] = True
            window = self._without(
                part, window, wrong, lambda row: f"the id {first_bad[row]} is outside the vocabulary of {size}"
            )
        else:
            window = self.source.window(texts, first)
        most = self.embedder.max_length
        if self.of_tokens or not self.truncate:
            lengths = window.lengths
            window = self._without(
                part, window, lengths > most, lambda row: f"{lengths[row]} tokens, more than max_length {most}"
            )
        return window

    def _without(self, part: Rows, window: Window, wrong: np.ndarray, why: Callable[[int], str]) -> Window:
        if not wrong.any():
            return window
        sequences = np.flatnonzero(wrong)
        for text, which in zip(*window.texts(sequences), strict=True):
            part.errors[part.usable[text]] = why(int(sequences[which]))
        return window.emptied(wrong)

    def write(self, directory: Path, name: str, part: Rows, keep: list[int]) -> list[str]:
        ids = [part.rows[p].id for p in keep]
        if not part.errors:
            return write_embeddings(directory, name, self.form, ids, part.answers, part.named)
        out = np.full((len(keep), self.embedder.dim), np.nan, self.dtype)
        place = {p: i for i, p in enumerate(part.usable)}
        good = [(i, place[p]) for i, p in enumerate(keep) if p not in part.errors]
        if good:
            to, of = map(list, zip(*good, strict=True))
            out[to] = part.answers[of]
        return write_embeddings(directory, name, self.form, ids, out, part.named)


# --- progress -------------------------------------------------------------------------------------------------------


class Log:
    """What a job says on standard error: a line that is rewritten on a terminal, else one a minute; JSON objects with
    `as_json`."""

    def __init__(self, quiet: bool = False, as_json: bool = False):
        self.quiet, self.as_json = quiet, as_json
        self._bar: Any = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def say(self, text: str) -> None:
        if self.as_json:
            self._json("message", text=text)
        elif not self.quiet:
            _line(text)

    def fail(self, text: str) -> None:
        if self.as_json:
            self._json("error", text=text)
        else:
            _line(f"fastdistil: {text}")

    def crash(self, error: Exception) -> None:
        """A defect, with what whoever mends it needs."""
        text, trace = f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))
        if self.as_json:
            self._json("error", text=text, traceback=trace)
        else:
            _line(f"{trace.rstrip()}\nfastdistil: {text}; this is a defect, please report it")

    @contextmanager
    def warnings(self) -> Iterator[None]:
        """Within, what the library warns of is said here, with `as_json`."""
        logger, handler = logging.getLogger("fastdistil"), _Handler(self)
        if self.as_json:
            logger.addHandler(handler)
            logger.propagate = False
        try:
            yield
        finally:
            if self.as_json:
                logger.removeHandler(handler)
                logger.propagate = True

    def _json(self, event: str, **values: Any) -> None:
        _line(json.dumps({"event": event, "time": round(time.time(), 3)} | values))

    def start(self, progress: Progress, work: Work, before: int, total: int | None) -> None:
        """before: rows of parts that are finished already; total: rows that are left, where that is known."""
        self._progress, self._work, self._before, self._total = progress, work, before, total
        self._started = time.perf_counter()
        if not self.quiet and not self.as_json and is_terminal(sys.stderr):
            self._bar = tqdm(bar_format="{desc}", file=sys.stderr, leave=False)
        if self.as_json or not self.quiet:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(1.0 if self._bar is not None else EVERY if self.as_json else SELDOM):
            self._show()

    def _show(self) -> None:
        found = self.figures()
        if self.as_json:
            self._json("progress", **found)
            return
        eta, tokens = found["eta_s"], found["tokens_per_s"]
        left = "" if eta is None else f", {int(eta) // 3600}:{int(eta) // 60 % 60:02d}:{int(eta) % 60:02d} left"
        line = f"{found['rows']:,} rows, {found['rows_per_s']:,.0f} rows/s{_rate(tokens)}{left}"
        line += f", waiting for the {found['bottleneck'] or 'first batch'}"
        if self._bar is not None:
            self._bar.set_description_str(line)
        else:
            self.say(line)

    def figures(self) -> dict[str, Any]:
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        rows, tokens = self._work.answered()
        total = self._progress.rows_expected() if self._total is None else self._total
        return {
            "rows": self._before + rows,
            "rows_per_s": round(rows / elapsed, 1),
            "tokens_per_s": None if tokens is None else round(tokens / elapsed, 1),
            "eta_s": None if total is None or not rows else round(elapsed * max(0.0, total / rows - 1), 1),
            "bottleneck": self._work.bottleneck(),
        }

    def part(self, part: Rows) -> None:
        if self.as_json:
            self._json("part", number=part.number, rows=len(part.rows), rejected=len(part.errors))

    def finished(self, directory: Path, manifest: Manifest) -> None:
        """Nothing is left to do."""
        self.say(f"{directory} is finished: {manifest.rows:,} rows in {len(manifest.parts)} parts")
        if self.as_json:
            nothing = dict.fromkeys(("rows_per_s", "tokens_per_s", "eta_s", "bottleneck"))
            self._json("done", parts=len(manifest.parts), rejected=manifest.rejected, rows=manifest.rows, **nothing)

    def done(self, manifest: Manifest) -> None:
        found = self.figures()
        self.close()
        if self.as_json:
            self._json("done", parts=len(manifest.parts), rejected=manifest.rejected, **found)
            return
        parts = f"{len(manifest.parts)} part{'s' if len(manifest.parts) != 1 else ''}"
        seconds = time.perf_counter() - self._started
        rejected = f", {manifest.rejected:,} rejected" if manifest.rejected else ""
        self.say(
            f"{manifest.rows:,} rows in {parts}{rejected}; {seconds:.1f} s, {found['rows_per_s']:,.0f} rows/s"
            f"{_rate(found['tokens_per_s'])}, "
            f"mostly waiting for the {found['bottleneck'] or 'input'}"
        )

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._bar is not None:
            self._bar.close()


def _rate(tokens_per_s: float | None) -> str:
    return "" if tokens_per_s is None else f", {tokens_per_s:,.0f} tokens/s"


def _line(text: str) -> None:
    """In one piece, for other processes may write there, too. Where nobody can read it the work goes on."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except OSError:  # the reader is gone, or the disk is full
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


class _Handler(logging.Handler):
    def __init__(self, log: Log):
        super().__init__()
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        self.log._json(record.levelname.lower(), text=record.getMessage())
