"""Embeddings that a job has written, opened for search."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from fastdistil.jobs.manifest import MANIFEST, Part, read_manifest
from fastdistil.jobs.writers import EMBEDDINGS, Ids


class Index:
    """An index opened for reading. Raises OSError for missing files and ValueError for what is in them."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        path = self.directory / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{self.directory} holds no {MANIFEST}: it is no index")
        self.manifest = manifest = read_manifest(self.directory)
        if manifest.task != "embed" or manifest.format not in EMBEDDINGS or not manifest.dim:
            raise ValueError(f"{path} is of the task {manifest.task!r}, format {manifest.format!r}, not an index")
        if not manifest.finished:
            raise ValueError(f"{self.directory} is no index yet: its job did not finish; go on with it by --resume")
        self.dim = manifest.dim
        for part in manifest.parts:
            for name in part.files:
                if not (self.directory / name).is_file():
                    raise FileNotFoundError(f"{path} names {name}, which is not there")

    def parts(self) -> Iterator[tuple[Ids, np.ndarray]]:
        """(ids, float32 or float16 [rows, dim]) part by part; read from disk as they are used."""
        for part in self.manifest.parts:
            path = self.directory / f"{part.name}.{self.manifest.format}"
            try:
                ids, embeddings = self._read(path)
            except FileNotFoundError:
                raise
            except Exception as error:  # the readers fail in many ways
                raise ValueError(f"{path} is not a readable {self.manifest.format} file: {error}") from error
            if not isinstance(embeddings, np.ndarray):  # an .npz under this name
                raise ValueError(f"{path} is not a readable {self.manifest.format} file but an archive of arrays")
            if embeddings.shape != (part.rows, self.dim) or embeddings.dtype not in (np.float32, np.float16):
                raise ValueError(
                    f"{path} is {embeddings.dtype} {list(embeddings.shape)}; the manifest says {[part.rows, self.dim]}"
                )
            if ids is None:
                ids = self._ids_beside(part)
            if len(ids) != part.rows:
                raise ValueError(f"{self.directory / part.name} has {len(ids)} ids for {part.rows} rows")
            yield ids, embeddings

    def _read(self, path: Path) -> tuple[Ids | None, Any]:
        if path.suffix == ".npy":
            return None, np.load(path, mmap_mode="r", allow_pickle=False)
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as file:
                if "embeddings" not in file.keys():  # noqa: SIM118  (a file, not a mapping)
                    raise ValueError("no tensor 'embeddings'")
                return None, file.get_tensor("embeddings")
        if path.suffix == ".parquet":
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(path)
            column = table.column("embedding").combine_chunks()
            if column.null_count:
                kind = np.float16 if column.type.value_type == pyarrow.float16() else float  # which older ones ask for
                column = column.fill_null(pyarrow.scalar([kind("nan")] * self.dim, column.type))
            flat = column.flatten()
            return table.column("id").to_pylist(), flat.to_numpy(zero_copy_only=False).reshape(-1, self.dim)
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        nothing = [float("nan")] * self.dim
        vectors = [nothing if row["embedding"] is None else row["embedding"] for row in rows]
        return [row["id"] for row in rows], np.array(vectors, np.float32).reshape(-1, self.dim)

    def _ids_beside(self, part: Part) -> Ids:
        path = self.directory / f"{part.name}.ids.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]
            return [json.loads(line) for line in lines]
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} does not hold a JSON id a line: {error}") from error

    def search(self, queries: np.ndarray, top_k: int = 3) -> list[list[tuple[str | int | None, float]]]:
        """The top_k rows for each query (float32 [n, dim]) by dot product, which is the cosine where both are
        normalised: (id, score), best first. Rows without an embedding are never found."""
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be 1 or more")
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(f"queries must be [n, {self.dim}], got {list(queries.shape)}")
        best: list[list[tuple[str | int | None, float]]] = [[] for _ in queries]
        for ids, embeddings in self.parts():
            scores = queries @ embeddings.astype(np.float32, copy=False).T  # [n, rows]
            rows = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]  # NaN comes last
            for q, found in enumerate(rows):
                merged = best[q] + [(ids[r], float(scores[q, r])) for r in found if not np.isnan(scores[q, r])]
                best[q] = sorted(merged, key=lambda hit: -hit[1])[:top_k]
        return best
