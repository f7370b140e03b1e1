"""The embedding job: rows in, an index directory out, a window of rows at a time."""

import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import fastdistil
from fastdistil.engine import Embedder
from fastdistil.engine.scheduler import WINDOW
from fastdistil.jobs.index import IndexWriter, Manifest
from fastdistil.jobs.readers import Row


def embed_rows(
    embedder: Embedder,
    rows: Iterable[Row],
    output: Path,
    *,
    model: str,
    file_format: str = "npy",
    max_batch_tokens: int | None = None,
    overwrite: bool = False,
    show_progress: bool | None = None,
    part_rows: int = WINDOW,
) -> Manifest:
    """Embed all rows into `output` in parts of `part_rows`, and return the manifest.

    A bad row stops the job with a ValueError naming its file and line; the parts written before it stay.
    """
    manifest = Manifest(
        model=model,
        dim=embedder.dim,
        pooling=embedder.pooling,
        normalize=embedder.normalize,
        max_length=embedder.max_length,
        dtype=str(embedder.model.dtype).removeprefix("torch."),
        fastdistil=fastdistil.__version__,
        format=file_format,
    )
    writer = IndexWriter(output, manifest, overwrite=overwrite)
    for part in _parts(rows, part_rows):
        texts = [row.text for row in part]
        for row in part:  # JSON can spell what is not text
            if not row.text.isascii() and any("\ud800" <= c <= "\udfff" for c in row.text):
                raise ValueError(f"{row.where}: the text holds a lone surrogate, which is not text")
        writer.write([row.id for row in part], embedder.encode(texts, max_batch_tokens, show_progress))
    writer.finish()
    return manifest


def _parts(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while part := list(islice(iterator, size)):
        yield part


def report(manifest: Manifest, started: float) -> None:
    seconds = time.perf_counter() - started
    parts = f"{len(manifest.parts)} part{'s' if len(manifest.parts) != 1 else ''}"
    print(f"{manifest.rows:,} texts in {seconds:.1f} s, {parts} of {manifest.dim} dimensions", file=sys.stderr)
