"""Texts with their ids from files: .txt, .jsonl, .csv, .tsv (also .gz, .zst), .parquet, directories, globs and stdin.

Rows come one at a time and in order. A row that cannot be used is a row all the same, which says why: what becomes of
it is the caller's choice. Rows can be counted and skipped without being parsed.
"""

import codecs
import csv
import ctypes
import glob
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

KINDS = ("txt", "jsonl", "csv", "tsv")
SUFFIXES = (".txt", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")  # what is taken from a directory
PACKED = (".gz", ".zst")
STDIN = "-"
PACKERS = {b"\x1f\x8b": "gzip (.gz)", b"\x28\xb5\x2f\xfd": "zstandard (.zst)"}
OBJECT = re.compile(rb"(?:\xef\xbb\xbf)?\s*\{(?![{%#])")  # how an object begins, and no template
MARKS = {  # that a file begins with; the longer ones first
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class Row(NamedTuple):
    """number: over all inputs. where: file and line, for messages. id: the id column's value, or the number; None where
    it cannot be read. text: a string, or of a column of token ids an integer array. error: why the row is unusable."""

    number: int
    where: str
    id: str | int | None
    text: Any
    question: str | None = None
    error: str | None = None


class Columns(NamedTuple):
    """Names of the columns. question: beside the text, for question answering. tokens: token ids instead of a text.
    kind: txt, jsonl, csv or tsv, for inputs whose names do not tell, such as standard input."""

    text: str = "text"
    id: str | None = None
    question: str | None = None
    tokens: str | None = None
    kind: str | None = None

    def names(self) -> list[str]:
        return [name for name in (self.tokens or self.text, self.question, self.id) if name is not None]


def find_inputs(inputs: Iterable[str | Path]) -> list[str]:
    """The files that are meant, in order: a directory means its files, by name, and a pattern what it matches.

    Raises FileNotFoundError where nothing is found.
    """
    found: list[str] = []
    for name in map(str, inputs):
        if not name:
            raise ValueError("an input is named '', which is no file; is a variable unset?")
        if name == STDIN:
            if not hasattr(sys.stdin, "buffer"):  # none, or somebody's own that has text alone
                raise OSError("the input is standard input, which is closed")
            if name in found:
                raise ValueError("standard input (-) is given twice; it can be read once")
            found.append(name)
        elif Path(name).is_dir():
            inside = _files_in(name)
            if not inside:
                raise FileNotFoundError(f"the directory {name} holds no {', '.join(SUFFIXES)} file")
            found += inside
        elif Path(name).is_file():
            found.append(name)
        elif Path(name).exists():
            raise ValueError(f"{name} is no regular file; send a pipe to standard input, and give -")
        else:
            matches = sorted(set(_matches(name)))
            if not matches:
                raise FileNotFoundError(f"there is no input file {name}")
            # of ** both a directory and its files match; what is neither, such as a pipe, is passed over
            places = {match: os.path.realpath(match) for match in matches if Path(match).is_dir()}
            # what lies below a directory that matches, too, is found there
            tops = {
                match for match in places if not any(str(p) in places.values() for p in Path(places[match]).parents)
            }
            files = [f for m in matches for f in ([m] if m not in places else _files_in(m) if m in tops else [])]
            files = [f for f in files if Path(f).is_file()]
            if not files:
                what = "a directory without such files" if Path(matches[0]).is_dir() else "no regular file"
                raise ValueError(f"{matches[0]} is {what}")
            found += dict.fromkeys(files)
    return found


def _matches(pattern: str) -> Iterator[str]:
    """As glob.glob(recursive=True), but for a link to a directory above, which that follows round and round."""
    parts = re.split(r"(?:(?<=/)|^)(?:\*\*/+)*\*\*(?:/+|$)", pattern, maxsplit=1)
    if len(parts) == 1:
        yield from glob.iglob(pattern)
        return
    for top in glob.iglob(parts[0]) if parts[0] else ["."]:
        for there, inside in _walk(Path(top)):
            place = there if parts[0] else "" if there == "." else there.removeprefix("./")
            if parts[1]:
                yield from _matches(os.path.join(glob.escape(place), parts[1]))
            else:
                yield os.path.join(place, "")
                if not pattern.endswith("/"):
                    yield from (os.path.join(place, name) for name in inside)


def _files_in(directory: str) -> list[str]:
    names = (Path(there, name) for there, inside in _walk(Path(directory)) for name in inside)
    return sorted(str(path) for path in names if path.is_file() and _kind(str(path)))


def _walk(directory: Path) -> Iterator[tuple[str, list[str]]]:
    """Directories and the names in them, links followed as patterns do, but not in a circle; as by patterns, names that
    begin with a dot are passed over."""
    seen: set[Path] = set()
    for there, below, inside in os.walk(directory, followlinks=True):
        if (real := Path(there).resolve()) in seen:
            below.clear()
            continue
        seen.add(real)
        # sorted: which of two links to one directory counts is not to be chance
        below[:] = sorted(name for name in below if not name.startswith("."))
        yield there, [name for name in inside if not name.startswith(".")]


def read_rows(inputs: Iterable[str | Path], columns: Columns = Columns()) -> Iterator[Row]:  # noqa: B008  (immutable)
    """Rows of all inputs. Raises as `find_inputs` and `read_files`."""
    return read_files(find_inputs(inputs), columns)


def read_files(
    files: Iterable[str], columns: Columns, *, skip: int = 0, progress: "Progress | None" = None
) -> Iterator[Row]:
    """Rows of all files, from the one numbered `skip` on.

    Raises OSError for a file that cannot be read (to its end), ValueError for one that is not what its name says.
    """
    number = 0
    for name in files:
        source = open_source(name, columns, progress)
        number += source.skip(skip - number) if number < skip else 0
        if number < skip:
            continue
        if progress is not None:
            progress.begin()
        for row in source.rows():
            if progress is not None:
                progress.rows += 1
            yield row._replace(number=number, id=number if columns.id is None else row.id)
            number += 1


def count_rows(files: Iterable[str], columns: Columns) -> int:
    return sum(open_source(name, columns).skip(sys.maxsize) for name in files)


def checked(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows; ValueError for the first that cannot be used."""
    for row in rows:
        if row.error is not None:
            raise ValueError(f"{row.where}: {row.error}")
        yield row


class Progress:
    """How far the inputs are read, in bytes on disk."""

    def __init__(self, inputs: list[str]):
        sizes = {name: Path(name).stat().st_size for name in inputs if name != STDIN}
        self.total = sum(sizes.values()) if len(sizes) == len(set(inputs)) else 0
        self.before = 0
        self.file: Any = None
        self.rows = 0  # that were read
        self.began: float | None = None

    def at(self, file: Any) -> None:
        self.file = file

    def passed(self, size: int) -> None:
        self.before, self.file = self.before + size, None

    def begin(self) -> None:
        """What was passed over by now is not part of the work."""
        if self.began is None:
            self.began = self.fraction()

    def rows_expected(self) -> float | None:
        """How many rows there are from where the work began, as far as the bytes tell."""
        fraction = self.fraction()
        if fraction is None or self.began is None or fraction <= self.began:
            return None
        return self.rows * (1 - self.began) / (fraction - self.began)

    def fraction(self) -> float | None:
        """None where it cannot be told: of standard input."""
        if not self.total:
            return None
        file = self.file  # the thread that reads may close it meanwhile
        try:
            inside = file.tell() if file is not None else 0
        except (OSError, ValueError):  # closed, or a pipe
            inside = 0
        return min(1.0, (self.before + inside) / self.total)


def open_source(name: str, columns: Columns, progress: Progress | None = None) -> "Source":
    kind = _kind(name) or (columns.kind and f".{columns.kind}")
    if kind is None and ".json" in [suffix.lower() for suffix in Path(name).suffixes[-2:]]:
        raise ValueError(f"{name}: a .json file is one value; if it holds an object a line, name it .jsonl")
    if kind == ".parquet":
        return Parquet(name, columns, progress)
    if columns.tokens is not None:
        raise ValueError(f"{_named(name)}: a column of token ids is read from .parquet files only")
    if kind in (".csv", ".tsv"):
        return Table(name, columns, progress, "," if kind == ".csv" else "\t")
    return Lines(name, columns, progress, {".jsonl": True, ".ndjson": True, None: None}.get(kind, False))


def _kind(name: str) -> str | None:
    """The suffix that tells a file's format, None where it tells none."""
    path = Path(name)
    suffix = path.suffix.lower()
    if suffix in PACKED:
        suffix = Path(path.stem).suffix.lower()
    return suffix if suffix in SUFFIXES else None


def has_kind(name: str) -> bool:
    """Whether a file's name tells its format."""
    return _kind(name) is not None


def _named(name: str) -> str:
    return "standard input" if name == STDIN else name


class Source:
    """One file. `skip` and then `rows` go on from where the other ended."""

    def __init__(self, name: str, columns: Columns, progress: Progress | None = None):
        self.name, self.columns, self.progress = name, columns, progress
        self.where = _named(name)

    def skip(self, rows: int) -> int:
        """Passes at most so many rows and says how many there were."""
        raise NotImplementedError

    def rows(self) -> Iterator[Row]:
        raise NotImplementedError

    def _row(self, line: Any, values: dict[str, Any]) -> Row:
        """A row of named values; the number is put in by the reader of all files."""
        columns, where = self.columns, f"{self.where}, {line}"
        identity: Any = None
        try:
            if columns.id is not None:
                identity = _identity(_value(values, columns.id), columns.id)
            if columns.tokens is not None:
                return Row(0, where, identity, _tokens(_value(values, columns.tokens), columns.tokens))
            text = _text(_value(values, columns.text), columns.text)
            question = None if columns.question is None else _text(_value(values, columns.question), columns.question)
            return Row(0, where, identity, text, question)
        except ValueError as error:
            return Row(0, where, identity, None, error=str(error))


class Lines(Source):
    """A text a line, or a JSON object a line; is_json None tells by how the first line that is not blank begins."""

    def __init__(self, name: str, columns: Columns, progress: Progress | None, is_json: bool | None):
        super().__init__(name, columns, progress)
        self._lines = _raw_lines(name, progress)
        self.is_json, self.line = is_json, 0

    def _numbered(self) -> Iterator[bytes]:
        """Lines that are rows: in JSON a blank one is none."""
        head: list[bytes] = []
        if self.is_json is None:
            for raw in self._lines:
                head.append(raw)
                if raw.strip():
                    break
            # no matter whether it can be read: a damaged object is an object
            self.is_json = bool(head) and OBJECT.match(head[-1]) is not None
            self._lines = _chain(head, self._lines)
        for raw in self._lines:
            self.line += 1
            if not self.is_json or raw.removeprefix(codecs.BOM_UTF8).strip(b" \t\r\n"):
                yield raw

    def skip(self, rows: int) -> int:
        return sum(1 for _ in islice(self._numbered(), rows))

    def rows(self) -> Iterator[Row]:
        columns = self.columns
        for raw in self._numbered():
            line = f"line {self.line}"
            try:
                text = raw.decode("utf-8-sig" if self.line == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                reason = f"not UTF-8 ({error.reason} at byte {error.start}); convert the file"
                yield Row(0, f"{self.where}, {line}", None, None, error=reason)
                continue
            if self.is_json:
                yield self._object(line, text)
            elif columns.id is not None or columns.question is not None:
                column = f"id column {columns.id!r}" if columns.id is not None else f"column {columns.question!r}"
                raise ValueError(f"{self.where} is plain text, which has no {column}")
            else:
                yield Row(0, f"{self.where}, {line}", None, text)

    def _object(self, line: str, text: str) -> Row:
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            return Row(0, f"{self.where}, {line}", None, None, error=f"not JSON ({error})")
        if not isinstance(values, dict):
            reason = f"a JSON {type(values).__name__}, not an object with the column {self.columns.text!r}"
            return Row(0, f"{self.where}, {line}", None, None, error=reason)
        return self._row(line, values)


class Table(Source):
    """Comma- or tab-separated values under a line of names; quoted values may hold line breaks."""

    def __init__(self, name: str, columns: Columns, progress: Progress | None, delimiter: str):
        super().__init__(name, columns, progress)
        csv.field_size_limit(2**31 - 1)
        # a byte that is not UTF-8 becomes a lone surrogate, so that it spoils its own row only
        lines = (raw.decode("utf-8-sig" if i == 0 else "utf-8", "surrogateescape")
                 for i, raw in enumerate(_raw_lines(name, progress)))  # fmt: skip
        self._reader = csv.reader(lines, delimiter=delimiter, strict=True)
        self._names: list[str] | None = None

    def _records(self) -> Iterator[list[str] | csv.Error]:
        while True:
            before = self._reader.line_num
            try:
                values = next(self._reader)
            except StopIteration:
                if self._names is None:
                    raise ValueError(f"{self.where} has no line of column names") from None
                return
            except csv.Error as error:
                if "new-line character" in str(error):
                    error = csv.Error("a carriage return within a line; convert line ends of old Macs")
                if self._reader.line_num > before + 1:  # a quote that is not closed takes what follows along
                    error = csv.Error(f"{error}; it takes lines {before + 1} to {self._reader.line_num}")
                if self._names is None:
                    raise ValueError(f"{self.where}: the line of column names cannot be read ({error})") from error
                yield error
                continue
            if not values:
                continue  # a blank line
            if self._names is None:
                self._names = values
                if twice := [name for name in self.columns.names() if values.count(name) > 1]:
                    raise ValueError(f"{self.where} has {values.count(twice[0])} columns {twice[0]!r}")
                if missing := [name for name in self.columns.names() if name not in values]:
                    raise ValueError(f"{self.where} has no column {missing[0]!r} among {_listed(values)}")
                continue
            yield values

    def skip(self, rows: int) -> int:
        return sum(1 for _ in islice(self._records(), rows))

    def rows(self) -> Iterator[Row]:
        for values in self._records():
            line = f"line {self._reader.line_num}"
            names = self._names or []
            if isinstance(values, csv.Error):
                yield Row(0, f"{self.where}, {line}", None, None, error=f"not a table's row ({values})")
            elif len(values) != len(names):
                reason = f"{len(values)} values under {len(names)} names"
                yield Row(0, f"{self.where}, {line}", None, None, error=reason)
            else:
                yield self._row(line, dict(zip(names, values, strict=True)))


class Parquet(Source):
    """A parquet file, a row group at a time; one that cannot be read spoils its own rows only."""

    AT_ONCE = 1_024  # rows made into Python objects together

    def __init__(self, name: str, columns: Columns, progress: Progress | None = None):
        super().__init__(name, columns, progress)
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ValueError(f"{name}: parquet needs pyarrow; install fastdistil[arrow]") from error
        try:
            self._file = pyarrow.parquet.ParquetFile(name)  # not mapped: an error while reading would end the process
        except OSError:
            raise
        except Exception as error:  # pyarrow raises errors of its own
            raise ValueError(f"{name} is not a readable parquet file: {error}") from error
        names = self._file.schema_arrow.names
        if missing := [column for column in columns.names() if column not in names]:
            raise ValueError(f"{name} has no column {missing[0]!r} among {_listed(names)}")
        if twice := [column for column in columns.names() if names.count(column) > 1]:
            raise ValueError(f"{name} has {names.count(twice[0])} columns {twice[0]!r}")
        self._group, self._inside, self._row_number = 0, 0, 0

    def skip(self, rows: int) -> int:
        passed = 0
        while passed < rows and self._group < self._file.num_row_groups:
            left = self._file.metadata.row_group(self._group).num_rows - self._inside
            step = min(left, rows - passed)
            passed, self._row_number = passed + step, self._row_number + step
            self._inside += step
            if step == left:
                self._group, self._inside = self._group + 1, 0
        return passed

    def rows(self) -> Iterator[Row]:
        names = self.columns.names()
        size = Path(self.name).stat().st_size
        before = self._group
        for group in range(self._group, self._file.num_row_groups):
            first, self._inside = self._inside, 0
            left = self._file.metadata.row_group(group).num_rows - first
            found = self._batches(group, list(dict.fromkeys(names)), first)
            while left:
                try:
                    batch = next(found)
                except Exception as error:  # pyarrow raises errors of its own, OSError among them
                    reason = f"row group {group} cannot be read ({error})"
                    for _ in range(left):
                        yield Row(0, f"{self.name}, row {self._row_number}", None, None, error=reason)
                        self._row_number += 1
                    break
                values = {name: self._column(batch.column(name), name) for name in batch.schema.names}
                for i in range(batch.num_rows):
                    yield self._row(f"row {self._row_number}", {name: column[i] for name, column in values.items()})
                    self._row_number += 1
                left -= batch.num_rows
            if self.progress is not None:
                self.progress.passed(size // max(1, self._file.num_row_groups - before))

    def _batches(self, group: int, names: list[str], first: int) -> Iterator[Any]:
        """A row group from its row `first` on, never all of it at once: some are as large as their file."""
        for batch in self._file.iter_batches(self.AT_ONCE, row_groups=[group], columns=names):
            passed = min(first, batch.num_rows)
            first -= passed
            if passed < batch.num_rows:
                yield batch.slice(passed)

    def _column(self, column: Any, name: str) -> list[Any]:
        """Python values; of token ids numpy arrays, which share the column's memory."""
        import pyarrow

        if name == self.columns.tokens and (
            pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type)
        ):
            ends = column.offsets.to_numpy()
            flat = column.values
            if flat.null_count == 0 and pyarrow.types.is_integer(flat.type):
                ids, valid = flat.to_numpy(), column.is_valid().to_numpy(zero_copy_only=False)
                return [ids[a:b] if ok else None for a, b, ok in zip(ends[:-1], ends[1:], valid, strict=True)]
        try:
            return column.to_pylist()
        except Exception:  # a row holds what Python cannot: find out which
            return [_python_value(value) for value in column]


class _Unreadable:
    """A value that pyarrow cannot make into a Python object, and why."""

    def __init__(self, error: Exception):
        self.error = error

    def __repr__(self) -> str:
        return f"unreadable ({self.error})"


def _python_value(value: Any) -> Any:
    try:
        return value.as_py()
    except Exception as error:
        return _Unreadable(error)


# --- values -------------------------------------------------------------------------------------------------------


def _listed(names: Iterable[str]) -> str:
    """Ten names, and how many more there are."""
    every = [name if len(name) <= 60 else f"{name[:60]}..." for name in map(repr, names)]
    more = f" and {len(every) - 10:,} more" if len(every) > 10 else ""
    return ", ".join(every[:10]) + more or "none"


def _value(values: dict[str, Any], name: str) -> Any:
    if name not in values:
        raise ValueError(f"no column {name!r} among {_listed(values)}")
    return values[name]


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} is {_shown(value)}, not a string")
    if not value.isascii() and (at := next((c for c in value if "\ud800" <= c <= "\udfff"), None)):
        if "\udc80" <= at <= "\udcff":
            raise ValueError(f"column {column!r} is not UTF-8 (byte 0x{ord(at) - 0xDC00:02x})")
        raise ValueError("the text holds a lone surrogate, which is not text")
    return value


def _tokens(value: Any, column: str) -> np.ndarray:
    found = np.asarray([] if value is None else value, None if not isinstance(value, _Unreadable) else object)
    if value is None or found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise ValueError(f"column {column!r} is {_shown(value)}, not a list of token ids")
    if not found.size:
        raise ValueError(f"column {column!r} holds no token ids")
    if found.dtype.kind == "u" and (largest := found.max()) > 2**63 - 1:
        raise ValueError(f"column {column!r} holds the id {largest}, which is in no vocabulary")
    return found.astype(np.int64, copy=False) if found.dtype.kind == "u" else found


def _identity(value: Any, column: str) -> str | int:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"id column {column!r} is {_shown(value)}, not a string or integer")
    return value


def _shown(value: Any) -> str:
    if isinstance(value, _Unreadable):
        return repr(value)
    try:
        return json.dumps(value)[:60]
    except (TypeError, ValueError):
        return repr(value)[:60]


# --- bytes --------------------------------------------------------------------------------------------------------


def _chain(head: list[bytes], rest: Iterator[bytes]) -> Iterator[bytes]:
    yield from head
    yield from rest


def _raw_lines(name: str, progress: Progress | None) -> Iterator[bytes]:
    """Lines as bytes, unpacked. Raises OSError naming the file for one that ends too early, ValueError for UTF-16."""
    begun = b""
    for i, line in enumerate(_all_lines(name, progress)):
        if i == 0 and (found := next((kind for mark, kind in MARKS.items() if line.startswith(mark)), None)):
            raise ValueError(f"{_named(name)} is {found}; convert it, as with: iconv -f {found} -t UTF-8")
        if i == 0 and (packer := next((by for mark, by in PACKERS.items() if line.startswith(mark)), None)):
            raise ValueError(
                f"{_named(name)} is packed by {packer}; unpack it first, or give it as a file of that suffix"
            )
        if i == 0 or len(begun) < 4:  # a first line may be empty
            begun += line
            if found := _wide(begun):
                raise ValueError(
                    f"{_named(name)} looks like {found} without a mark; convert it, as with: iconv -f {found} -t UTF-8"
                )
        yield line


def _wide(begun: bytes) -> str:
    """The encoding of more than a byte a letter, of which a text's first bytes look to be; most letters are Latin."""
    if len(begun) < 4:
        return ""
    even, odd = (half.count(0) / len(half) for half in (begun[0::2], begun[1::2]))
    if odd > 0.7:
        return "UTF-32LE" if even > 0.25 else "UTF-16LE"
    if even > 0.7:
        return "UTF-32BE" if odd > 0.25 else "UTF-16BE"
    return ""


def _all_lines(name: str, progress: Progress | None) -> Iterator[bytes]:
    if name == STDIN:
        # never closed: when the process ends that would ask for its lock, which a thread that waits here holds
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(sys.stdin))
        yield from sys.stdin.buffer
        return
    with open(name, "rb") as raw:
        size = raw.seek(0, io.SEEK_END)
        raw.seek(0)
        if not size and Path(name).suffix.lower() in (".gz", ".zst"):
            raise OSError(f"{name} is empty, which no packed file is: its writing was cut off")
        if progress is not None:
            progress.at(raw)
        with _unpacked(name, raw) as file:
            try:
                yield from file
            except (EOFError, OSError, ValueError, zlib.error) as error:  # what the packers say
                raise OSError(f"{name} cannot be read to its end: {error}") from error
        if progress is not None:
            progress.passed(size)  # the unpacker may have closed the file


@contextmanager
def _unpacked(name: str, raw: BinaryIO) -> Iterator[Any]:
    suffix = Path(name).suffix.lower()
    if suffix == ".gz":
        with gzip.open(raw) as file:
            yield file
    elif suffix == ".zst":
        try:
            import pyarrow
        except ImportError as error:
            raise ValueError(f"{name}: zstandard needs pyarrow; install fastdistil[arrow]") from error
        with pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd") as stream:
            yield io.BufferedReader(stream, 1 << 20)
    else:
        yield raw
