"""The rows of a part, written to files: embeddings as .npy or .safetensors with their ids beside them, and any columns
as .parquet or .jsonl."""

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from fastdistil.jobs.manifest import replace

EMBEDDINGS = ("npy", "safetensors", "parquet", "jsonl")  # formats of embeddings
ANSWERS = ("parquet", "jsonl")  # formats of anything else
ROW_GROUP = 25_000  # rows; a viewer reads one at a time


def check_format(form: str) -> None:
    """Raise ValueError where the library that a format needs is missing."""
    if form == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError("parquet needs pyarrow; install fastdistil[arrow], or choose another --format")


Ids = list[str | int | None]


def write_embeddings(
    directory: Path, name: str, form: str, ids: Ids, embeddings: np.ndarray, of_column: bool
) -> list[str]:
    """embeddings: float32 or float16 [len(ids), dim] -> the files that were written. of_column: whether the ids are a
    column's values and not the rows' numbers."""
    path = directory / f"{name}.{form}"
    if form in ANSWERS:
        return write_columns(directory, name, form, ids, {"embedding": embeddings}, of_column)
    if form == "npy":
        replace(path, lambda temporary: _save_npy(temporary, embeddings))
    else:
        content = save({"embeddings": np.ascontiguousarray(embeddings)})
        replace(path, lambda temporary: temporary.write_bytes(content))
    beside = directory / f"{name}.ids.jsonl"
    lines = "".join(json.dumps(i) + "\n" for i in ids)
    replace(beside, lambda temporary: temporary.write_text(lines, encoding="utf-8"))
    return [path.name, beside.name]


def write_columns(
    directory: Path,
    name: str,
    form: str,
    ids: Ids,
    columns: dict[str, Any],
    of_column: bool,
    kinds: dict[str, Any] | None = None,
) -> list[str]:
    """columns: by name, an array [n, dim], a list of n values or Arrow's. kinds: of lists, as in `arrow_type`."""
    path = directory / f"{name}.{form}"
    if form == "parquet":
        table = as_table(ids, columns, kinds or {}, of_column)
        replace(path, lambda temporary: _save_parquet(temporary, table))
    else:
        replace(path, lambda temporary: _save_jsonl(temporary, ids, columns))
    return [path.name]


def write_lines(directory: Path, name: str, ids: Ids, objects: Iterable[str]) -> list[str]:
    """JSON objects, not empty, each with its id put before the rest -> the file that was written"""
    path = directory / f"{name}.jsonl"

    def save_lines(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            for identity, one in zip(ids, objects, strict=True):
                file.write(f'{{"id": {json.dumps(identity)}, {one[1:]}\n')

    replace(path, save_lines)
    return [path.name]


def _save_npy(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:  # np.save adds a suffix to the name, and hides why a disk is full
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _save_jsonl(path: Path, ids: Ids, columns: dict[str, Any]) -> None:
    missing = {k: _missing(v) for k, v in columns.items() if isinstance(v, np.ndarray)}
    with open(path, "w", encoding="utf-8") as file:
        for i, identity in enumerate(ids):
            row: dict[str, Any] = {"id": identity}
            for name, values in columns.items():
                if name in missing:
                    row[name] = None if missing[name][i] else values[i].tolist()
                else:
                    row[name] = values[i]
            file.write(json.dumps(row, default=float) + "\n")


def _missing(array: np.ndarray) -> np.ndarray:
    """Rows of nothing but NaN, which stand for rows that could not be used: bool [n]"""
    if not array.shape[1]:
        return np.zeros(len(array), bool)
    found = np.isnan(array[:, 0])
    found[found] = np.isnan(array[found]).all(1)
    return found


def as_table(ids: Ids, columns: dict[str, Any], kinds: dict[str, Any], of_column: bool) -> Any:
    """A pyarrow table; an array [n, dim] becomes a column of lists of that size without a copy."""
    import pyarrow

    if of_column:  # strings whatever they are, for all parts of a job have one schema; what is no text is escaped
        texts = [None if i is None else str(i).encode("utf-8", "backslashreplace").decode() for i in ids]
        made = {"id": pyarrow.array(texts, pyarrow.string())}
    else:
        made = {"id": pyarrow.array(ids, pyarrow.int64())}
    for name, values in columns.items():
        if isinstance(values, np.ndarray):
            flat, missing = pyarrow.array(np.ascontiguousarray(values).reshape(-1)), _missing(values)
            # before 26 a null list of a fixed size cannot be written, or not be read again: such a row is NaN there
            nulls = missing.any() and int(pyarrow.__version__.split(".")[0]) >= 26
            mask = pyarrow.array(missing) if nulls else None
            made[name] = pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=mask)
        elif isinstance(values, pyarrow.ChunkedArray):
            made[name] = values
        else:
            made[name] = pyarrow.array(values, arrow_type(kinds[name]))
    return pyarrow.table(made)


def arrow_type(kind: Any) -> Any:
    """ "string", "int" or "float"; a dictionary of kinds is a struct, a list of one kind a list."""
    import pyarrow

    if isinstance(kind, dict):
        return pyarrow.struct([(name, arrow_type(of)) for name, of in kind.items()])
    if isinstance(kind, list):
        return pyarrow.list_(arrow_type(kind[0]))
    return {"string": pyarrow.string(), "int": pyarrow.int64(), "float": pyarrow.float64()}[kind]


def _save_parquet(path: Path, table: Any) -> None:
    import pyarrow.parquet

    texts = [f.name for f in table.schema if str(f.type) == "string"]  # a dictionary of floats would only cost
    pyarrow.parquet.write_table(
        table, path, row_group_size=ROW_GROUP, compression="zstd", use_dictionary=texts, write_page_index=True
    )
