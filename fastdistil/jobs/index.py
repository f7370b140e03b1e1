"""An index directory: numbered parts of embeddings with their ids, and a manifest written last.

manifest.json             model, pooling, dim, ... and the list of parts
part-00000.npy            float32 [rows, dim]   (or part-00000.safetensors with one tensor, "embeddings")
part-00000.ids.jsonl      the id of each row, a JSON string or integer a line
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

MANIFEST = "manifest.json"
FORMATS = ("npy", "safetensors")


@dataclass
class Part:
    file: str
    ids: str
    rows: int


@dataclass
class Manifest:
    model: str
    dim: int
    pooling: str
    normalize: bool
    max_length: int
    dtype: str
    fastdistil: str
    format: str = "npy"
    rows: int = 0
    parts: list[Part] = field(default_factory=list)
    version: int = 1


class IndexWriter:
    """Writes parts, each under a temporary name first; `finish` writes the manifest that makes them an index."""

    def __init__(self, directory: Path, manifest: Manifest, *, overwrite: bool = False):
        if manifest.format not in FORMATS:
            raise ValueError(f"format {manifest.format!r} is not one of {', '.join(FORMATS)}")
        if directory.exists() and not directory.is_dir():
            raise NotADirectoryError(f"{directory} is a file; give a directory for the index")
        directory.mkdir(parents=True, exist_ok=True)
        if (present := sorted(directory.iterdir())) and not overwrite:
            raise FileExistsError(
                f"{directory} is not empty ({present[0].name}); give another directory, or --overwrite"
            )
        self.directory, self.manifest = directory, manifest
        self._stale = bool(present)

    def _clear(self) -> None:
        """Remove the earlier index only when there is something to put in its place."""
        if self._stale:
            _remove_index(self.directory)
            self._stale = False

    def write(self, ids: list[str | int], embeddings: np.ndarray) -> None:
        self._clear()
        name = f"part-{len(self.manifest.parts):05d}"
        part = Part(f"{name}.{self.manifest.format}", f"{name}.ids.jsonl", len(ids))
        if self.manifest.format == "npy":
            _replace(self.directory / part.file, lambda path: _save_npy(path, embeddings))
        else:
            _replace(self.directory / part.file, lambda path: save_file({"embeddings": embeddings}, path))
        lines = "".join(json.dumps(i) + "\n" for i in ids)
        _replace(self.directory / part.ids, lambda path: path.write_text(lines, encoding="utf-8"))
        self.manifest.parts.append(part)
        self.manifest.rows += part.rows

    def finish(self) -> None:
        self._clear()
        text = json.dumps(asdict(self.manifest), indent=2) + "\n"
        _replace(self.directory / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _save_npy(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:  # np.save would add a suffix to the name
        np.save(file, array)


def _check_types(manifest: Manifest) -> None:
    kinds = {"str": str, "int": int, "bool": bool, "list": list}
    records: list[Any] = [manifest, *manifest.parts]
    for record in records:
        for item in fields(record):
            value = getattr(record, item.name)
            if type(value) is not kinds[str(getattr(item.type, "__name__", item.type)).removesuffix("[Part]")]:
                raise TypeError(f"{item.name} is {value!r}")


def _remove_index(directory: Path) -> None:
    """The files of an earlier index, and nothing else."""
    ours = re.compile(rf"(?:{re.escape(MANIFEST)}|part-\d{{5,}}\.(?:npy|safetensors|ids\.jsonl))(?:\.tmp)?")
    for path in directory.iterdir():
        if ours.fullmatch(path.name) and path.is_file():
            path.unlink()


class Index:
    """An index opened for reading. Raises OSError for missing files and ValueError for what is in them."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        path = self.directory / MANIFEST
        if not path.is_file():
            hint = "its job did not finish" if any(self.directory.glob("part-*")) else "it is no index"
            raise FileNotFoundError(f"{self.directory} holds no {MANIFEST}: {hint}")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            parts = [Part(**part) for part in values.pop("parts")]
            self.manifest = Manifest(**values, parts=parts)
            _check_types(self.manifest)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not an index manifest: {error}") from error
        if self.manifest.version != 1 or self.manifest.format not in FORMATS:
            raise ValueError(f"{path} is not a manifest this version reads (version 1, {' or '.join(FORMATS)})")
        for part in parts:
            for name in (part.file, part.ids):
                if Path(name).name != name or name in ("", ".", ".."):
                    raise ValueError(f"{path} names the file {name!r}; it must lie in the index's own directory")
                if not (self.directory / name).is_file():
                    raise FileNotFoundError(f"{path} names {name}, which is not there")

    def parts(self) -> Iterator[tuple[list[str | int], np.ndarray]]:
        """(ids, float32 [rows, dim]) part by part; the embeddings are read from disk as they are used."""
        for part in self.manifest.parts:
            path = self.directory / part.file
            try:
                embeddings = self._embeddings(path)
            except Exception as error:  # numpy's reader fails in many ways
                raise ValueError(f"{path} is not a readable {self.manifest.format} file: {error}") from error
            if not isinstance(embeddings, np.ndarray):  # an .npz under this name
                raise ValueError(f"{path} is not a readable {self.manifest.format} file but an archive of arrays")
            if embeddings.shape != (part.rows, self.manifest.dim) or embeddings.dtype != np.float32:
                raise ValueError(
                    f"{path} is {embeddings.dtype} {list(embeddings.shape)}; the manifest says float32 "
                    f"{[part.rows, self.manifest.dim]}"
                )
            try:
                lines = (self.directory / part.ids).read_text(encoding="utf-8").split("\n")[:-1]
                ids = [json.loads(line) for line in lines]
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{self.directory / part.ids} does not hold a JSON id a line: {error}") from error
            if len(ids) != part.rows:
                raise ValueError(f"{self.directory / part.ids} has {len(ids)} ids for {part.rows} rows")
            yield ids, embeddings

    def _embeddings(self, path: Path) -> np.ndarray:
        if self.manifest.format == "npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with safe_open(path, framework="numpy") as file:
            if "embeddings" not in file.keys():  # noqa: SIM118  (a file, not a mapping)
                raise ValueError("no tensor 'embeddings'")
            return file.get_tensor("embeddings")

    def search(self, queries: np.ndarray, top_k: int = 3) -> list[list[tuple[str | int, float]]]:
        """The top_k rows for each query (float32 [n, dim]) by dot product, which is the cosine where both are
        normalised: (id, score), best first."""
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be 1 or more")
        if queries.ndim != 2 or queries.shape[1] != self.manifest.dim:
            raise ValueError(f"queries must be [n, {self.manifest.dim}], got {list(queries.shape)}")
        best: list[list[tuple[str | int, float]]] = [[] for _ in queries]
        for ids, embeddings in self.parts():
            scores = queries @ embeddings.T  # [n, rows]
            rows = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
            for q, found in enumerate(rows):
                merged = best[q] + [(ids[r], float(scores[q, r])) for r in found]
                best[q] = sorted(merged, key=lambda hit: -hit[1])[:top_k]
        return best
