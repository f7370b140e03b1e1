"""Texts with their ids from .txt, .jsonl and standard input, one row at a time."""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple


class Row(NamedTuple):
    """where: file and line, for messages; id: the id column's value, or the row's number over all inputs."""

    where: str
    id: str | int
    text: str


def read_rows(inputs: Iterable[str], *, text_column: str = "text", id_column: str | None = None) -> Iterator[Row]:
    """Rows of all inputs in order. .jsonl and .ndjson hold an object a line, anything else a text a line; "-" is
    standard input, read as jsonl when its first line that is not blank is a JSON object.

    Raises FileNotFoundError for a missing file and ValueError naming file and line for a row that cannot be read.
    """
    inputs = list(inputs)
    for name in inputs:  # before any work is done
        if name == "-" and sys.stdin is None:
            raise OSError("the input is standard input, which is closed")
        if name != "-" and Path(name).is_dir():
            raise IsADirectoryError(f"the input {name} is a directory; name the files in it")
        if name != "-" and not Path(name).exists():
            raise FileNotFoundError(f"there is no input file {name}")
    return _read(inputs, text_column, id_column)


def _read(inputs: list[str], text_column: str, id_column: str | None) -> Iterator[Row]:
    number = 0
    for name in inputs:
        with nullcontext(sys.stdin.buffer) if name == "-" else open(name, "rb") as file:
            where = "standard input" if name == "-" else name
            for line, row in _rows(file, where, name.endswith((".jsonl", ".ndjson")), text_column):
                if id_column is not None and not isinstance(row, dict):
                    raise ValueError(f"{where} is plain text, which has no id column {id_column!r}")
                identity = number
                if id_column is not None and isinstance(row, dict):
                    identity = _id(row, id_column, where, line)  # type: ignore[assignment]
                text = row[text_column] if isinstance(row, dict) else row
                yield Row(f"{where}, line {line}", identity, text)
                number += 1


def _rows(file: BinaryIO, where: str, jsonl: bool, text_column: str) -> Iterator[tuple[int, str | dict]]:
    lines: Iterator[bytes] = iter(file)
    if where == "standard input":  # which has no name to tell by
        head = []
        for raw in lines:
            head.append(raw)
            if raw.strip():
                jsonl = _is_object(raw.decode("utf-8-sig", "replace"))
                break
        lines = chain(head, lines)
    for line, raw in enumerate(lines, 1):
        try:
            text = raw.decode("utf-8-sig" if line == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}, line {line}: not UTF-8 ({error.reason} at byte {error.start})") from error
        if not jsonl:
            yield line, text
        elif text.strip():  # a blank line in jsonl is no row
            yield line, _object(text, f"{where}, line {line}", text_column)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _object(text: str, where: str, text_column: str) -> dict:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a JSON {type(row).__name__}, not an object with the column {text_column!r}")
    if text_column not in row:
        raise ValueError(f"{where}: no column {text_column!r} among {', '.join(map(repr, row)) or 'none'}")
    if not isinstance(row[text_column], str):
        raise ValueError(f"{where}: column {text_column!r} is {json.dumps(row[text_column])[:60]}, not a string")
    return row


def _id(row: dict, column: str, where: str, line: int) -> str | int:
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(
            f"{where}, line {line}: id column {column!r} is {json.dumps(value)[:60]}, not a string or integer"
        )
    return value
