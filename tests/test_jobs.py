"""Jobs on files: every format in and out, bad rows, stopping and resuming, shards, and what they refuse."""

import contextlib
import errno
import fcntl
import functools
import gc
import gzip
import importlib.metadata
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from itertools import chain
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import fastdistil
from fastdistil import DistilBertConfig, DistilBertTokenizer, Embedder, cli
from fastdistil.cli import main
from fastdistil.engine.runner import Engine
from fastdistil.jobs import manifest as manifests
from fastdistil.jobs import processes
from fastdistil.jobs import run as module
from fastdistil.jobs.index import Index
from fastdistil.jobs.manifest import LOCK, Lock, read_manifest, write_manifest
from fastdistil.jobs.merge import merge, shard_directory
from fastdistil.jobs.readers import Columns, count_rows, find_inputs, read_files, read_rows
from fastdistil.pipelines import Pipeline, TextClassificationPipeline

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = ["a cat sat", "read a CSV, file", 'he said "no"', "naïve 中文", "two\nlines", "x " * 150, "", "a cat sat"]
LINES = [text.replace("\n", " ") for text in TEXTS]
TINY = dict(vocab_size=30522, dim=16, n_heads=2, hidden_dim=24, n_layers=1, max_position_embeddings=64)


@pytest.fixture(scope="module")
def checkpoint(minilm, tmp_path_factory):
    """A tiny random model with the real tokenizer."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    fastdistil.DistilBertModel(DistilBertConfig(**TINY)).save_pretrained(path)
    DistilBertTokenizer.from_pretrained(minilm).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def embedder(checkpoint):
    return Embedder.from_pretrained(checkpoint, device="cpu")


def embed(checkpoint, *args):
    return main(["embed", "--model", str(checkpoint), "--device", "cpu", "--quiet", *map(str, args)])


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def files(directory):
    return {p.name: p.read_bytes() for p in sorted(Path(directory).rglob("*")) if p.is_file() and p.name != ".lock"}


# --- what goes in -------------------------------------------------------------------------------------------------


def write(kind, path, texts=TEXTS):
    """The texts as a file of a kind, ids `n0`, `n1`..."""
    rows = [{"name": f"n{i}", "text": text} for i, text in enumerate(texts)]
    packed = {".gz": gzip.compress, ".zst": lambda b: pyarrow.compress(b, "zstd", asbytes=True)}
    base, _, pack = kind.partition("+")
    if base == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
        return
    if base == "jsonl":
        content = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    elif base == "txt":
        content = "\r\n".join(texts) + "\r\n"
    else:
        import csv

        file = io.StringIO()
        writer = csv.writer(file, delimiter="," if base == "csv" else "\t")
        writer.writerows([["text", "name"], *([row["text"], row["name"]] for row in rows)])
        content = "\ufeff" + file.getvalue()
    content = content.encode()
    if pack == ".zst":
        with pyarrow.CompressedOutputStream(pyarrow.OSFile(str(path), "wb"), "zstd") as stream:
            stream.write(content)
    else:
        path.write_bytes(packed[pack](content) if pack else content)


KINDS = ["txt", "jsonl", "csv", "tsv", "parquet", "txt+.gz", "jsonl+.gz", "csv+.gz", "jsonl+.zst", "tsv+.zst"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_rows(kind, tmp_path):
    path = tmp_path / f"in.{kind.replace('+', '')}"
    texts = LINES if kind.startswith("txt") else TEXTS
    write(kind, path, texts)
    columns = Columns() if kind.startswith("txt") else Columns(id="name")
    rows = list(read_rows([path], columns))
    assert [row.text for row in rows] == texts and not any(row.error for row in rows)
    assert [row.number for row in rows] == list(range(len(texts)))
    assert [row.id for row in rows] == (list(range(len(texts))) if columns.id is None else [f"n{i}" for i in range(8)])
    assert count_rows([str(path)], columns) == len(texts)
    for skip in (0, 1, 4, len(texts)):
        twice = [str(path)] * 2
        assert list(read_files(twice, columns, skip=skip)) == list(read_rows(twice, columns))[skip:]


def test_directories_patterns_and_order(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / ".ipynb_checkpoints").mkdir()
    hidden = (".a.jsonl", "deep/._c.csv", "deep/.ipynb_checkpoints/c.csv")  # what editors and copies leave behind
    for name in ("b.txt", "a.jsonl", "deep/c.csv", "ignored.md", "manifest.json", *hidden):
        (tmp_path / name).write_text("text\n")
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.txt", "deep/c.csv")]
    assert find_inputs([tmp_path]) == names
    assert find_inputs([tmp_path / "*.txt", tmp_path / "**" / "*.csv"]) == names[1:]
    assert find_inputs([names[1], names[0]]) == [names[1], names[0]]
    assert find_inputs([tmp_path / "d*"]) == names[2:]
    assert find_inputs([tmp_path / ".a.jsonl", tmp_path / "deep" / ".ipynb_checkpoints"]) == [
        str(tmp_path / name) for name in hidden[::2]
    ]
    with pytest.raises(ValueError, match=r"standard input \(-\) is given twice"):
        find_inputs(["-", names[0], "-"])
    for nothing, message in ((tmp_path / "*.parquet", "no input file"), (tmp_path / "x", "no input file")):
        with pytest.raises(FileNotFoundError, match=message):
            find_inputs([nothing])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \.txt"):
        find_inputs([tmp_path / "empty"])


BAD = {
    "in.jsonl": (
        b'{"text": "a", "id": 1}\n{"text": \n[1]\n{"words": 1}\n{"text": null, "id": 5}\n{"text": "a\xff"}\n'
        b'{"text": "\\ud800", "id": 7}\n{"text": "a", "id": 1.5}\n{"text": "b", "id": "x"}\n',
        ["line 2: not JSON", "line 3: a JSON list", "line 4: no column", "line 5: column 'text' is null",
         "line 6: not UTF-8", "line 7: the text holds a lone surrogate", "line 8: id column 'id' is 1.5"],
    ),
    "in.csv": (
        b'id,text\n1,a\n2\n3,b,c\n4,"a"x"\n5,caf\xe9\n6,"ok\nok"\n',
        ["line 3: 1 values under 2 names", "line 4: 3 values under 2 names", "line 5: not a table's row",
         "line 6: column 'text' is not UTF-8 (byte 0xe9)"],
    ),
    "in.txt": (b"a\n\xff\nb\n", ["line 2: not UTF-8"]),
    "mark.jsonl": (
        b'\xef\xbb\xbf\n{"text": "a", "id": 1}\n\xbf\xbf\xef\n\xef\xbb\n \t\r\n{"text": "b", "id": 2}\n',
        ["line 3: not UTF-8", "line 4: not UTF-8"],
    ),
    "mac.csv": (b"id,text\n1,a\rb\n2,c\n", ["line 2: not a table's row (a carriage return within a line; convert"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_spoils_no_other(name, checkpoint, tmp_path, capsys):
    content, reasons = BAD[name]
    (tmp_path / name).write_bytes(content)
    columns = Columns() if name == "in.txt" else Columns(id="id")
    rows = list(read_rows([tmp_path / name], columns))
    errors = [f"{row.where.rpartition(', ')[2]}: {row.error}" for row in rows if row.error]
    assert len(errors) == len(reasons) and all(a.startswith(b) for a, b in zip(errors, reasons, strict=True)), errors
    assert count_rows([str(tmp_path / name)], columns) == len(rows)
    ids = [] if name == "in.txt" else ["--id-column", "id"]
    given = ["--input", tmp_path / name, *ids]
    # fail: the first one is named, and nothing is written
    assert embed(checkpoint, *given, "--output", tmp_path / "fail") == 1
    assert f"{name}, {reasons[0]}" in capsys.readouterr().err
    # skip: the others are there, and each bad one in the rejects
    assert embed(checkpoint, *given, "--output", tmp_path / "skip", "--on-error", "skip") == 3
    rejects = [json.loads(line) for line in (tmp_path / "skip" / "part-00000.rejects.jsonl").read_text().splitlines()]
    assert [r["row"] for r in rejects] == [row.number for row in rows if row.error]
    assert all(r["reason"] == row.error for r, row in zip(rejects, (r for r in rows if r.error), strict=True))
    good = [row for row in rows if not row.error]
    ((found, vectors),) = Index(tmp_path / "skip").parts()
    assert found == [row.id for row in good] and len(vectors) == len(good)
    # null: they are rows of nothing
    assert embed(checkpoint, *given, "--output", tmp_path / "null", "--on-error", "null") == 3
    ((found, nulls),) = Index(tmp_path / "null").parts()
    assert len(found) == len(rows)
    bad = np.array([row.error is not None for row in rows])
    assert np.isnan(nulls[bad]).all()
    np.testing.assert_array_equal(nulls[~bad], vectors)


def test_an_unreadable_row_group(checkpoint, tmp_path, capsys):
    path = tmp_path / "in.parquet"
    texts = [f"text number {i}" for i in range(90)]
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=30, compression="snappy")
    column = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    first = column.dictionary_page_offset or column.data_page_offset
    content[first : first + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    assert embed(checkpoint, "--input", path, "--output", tmp_path / "o") == 1
    assert "in.parquet, row 30: row group 1 cannot be read" in capsys.readouterr().err
    assert embed(checkpoint, "--input", path, "--output", tmp_path / "o", "--on-error", "skip") == 3
    ((ids, _),) = Index(tmp_path / "o").parts()
    assert ids == [*range(30), *range(60, 90)]


def test_values_that_python_cannot_hold(checkpoint, tmp_path, capsys):
    far = pyarrow.array([0, 2**62], pyarrow.int64()).view(pyarrow.timestamp("us"))
    table = pyarrow.table({"id": pyarrow.array([1, 2]), "text": far})
    parquet.write_table(table, tmp_path / "far.parquet")
    arguments = ["--input", tmp_path / "far.parquet", "--output", tmp_path / "o", "--on-error", "skip"]
    assert embed(checkpoint, *arguments) == 3
    rejects = [json.loads(line) for line in (tmp_path / "o" / "part-00000.rejects.jsonl").read_text().splitlines()]
    assert "not a string" in rejects[0]["reason"] and "unreadable" in rejects[1]["reason"]
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    assert embed(checkpoint, "--input", tmp_path / "twice.parquet", "--output", tmp_path / "p") == 1
    assert "has 2 columns 'text'" in capsys.readouterr().err


def test_what_is_no_line_format(checkpoint, tmp_path, capsys):
    for name in ("in.json", "in.json.gz"):
        (tmp_path / name).write_text('[{"text": "a"}]')
        assert embed(checkpoint, "--input", tmp_path / name, "--output", tmp_path / "o") == 1
        assert f"{name}: a .json file is one value" in capsys.readouterr().err


def test_standard_input_with_a_damaged_first_line(checkpoint, tmp_path, monkeypatch):
    lines = b'{"text": "bad\n{"text": "good"}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert embed(checkpoint, "--input", "-", "--output", tmp_path / "o", "--on-error", "skip") == 3
    assert next(Index(tmp_path / "o").parts())[0] == [1]


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.txt.zst", "in.parquet", "other.parquet"])
def test_a_file_that_ends_too_early_or_is_another(name, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "PART_ROWS", 3)
    path = tmp_path / name
    write({"in.jsonl.gz": "jsonl+.gz", "in.txt.zst": "txt+.zst"}.get(name, "parquet"), path, LINES * 200)
    path.write_bytes(path.read_bytes()[:-9] if not name.startswith("other") else b"text")
    assert embed(checkpoint, "--input", path, "--output", tmp_path / "o") == 1
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("name", ["in.txt", "in.csv", "in.jsonl"])
def test_other_encodings_are_named(name, checkpoint, tmp_path, capsys):
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        (tmp_path / name).write_bytes("\ufefftext\nß\n".encode(encoding))
        job = ("--input", tmp_path / name, "--output", tmp_path / "o", "--on-error", "skip")
        assert embed(checkpoint, *job) == 1
        assert f"{name} is {encoding[:6].upper()}; convert it" in capsys.readouterr().err


def test_columns_that_are_not_there(checkpoint, tmp_path, capsys):
    for kind in ("parquet", "csv"):
        write(kind, tmp_path / f"in.{kind}")
        assert (
            embed(checkpoint, "--input", tmp_path / f"in.{kind}", "--output", tmp_path / "o", "--text-column", "b") == 1
        )
        assert f"in.{kind} has no column 'b' among" in capsys.readouterr().err
    write("txt", tmp_path / "in.txt", LINES)
    assert embed(checkpoint, "--input", tmp_path / "in.txt", "--output", tmp_path / "o", "--id-column", "b") == 1
    assert "is plain text, which has no id column 'b'" in capsys.readouterr().err


def test_tables_that_are_none(checkpoint, tmp_path, capsys):
    for content, message in [
        (b"", "has no line of column names"),
        (b"text\ra\rb\r", "in.csv: the line of column names cannot be read (a carriage return within a line"),
        (b"text,text\na,b\n", "has 2 columns 'text'"),
        (b'id,text\n1,a\n2,"b\n3,c\n4,d\n', "unexpected end of data; it takes lines 3 to 5"),
    ]:
        (tmp_path / "in.csv").write_bytes(content)
        assert embed(checkpoint, "--input", tmp_path / "in.csv", "--output", tmp_path / "o") == 1
        assert message in capsys.readouterr().err


def test_a_column_of_token_ids(checkpoint, embedder, tmp_path, capsys):
    ids = [embedder.tokenizer.encode_ids([text], 64)[0] for text in TEXTS]
    path = tmp_path / "in.parquet"
    for kind in (pyarrow.list_(pyarrow.int32()), pyarrow.large_list(pyarrow.int64())):
        parquet.write_table(pyarrow.table({"input_ids": pyarrow.array(ids, kind)}), path)
        arguments = ["--input", path, "--output", tmp_path / "o", "--tokens-column", "input_ids", "--overwrite"]
        assert embed(checkpoint, *arguments) == 0
        np.testing.assert_allclose(np.load(tmp_path / "o" / "part-00000.npy"), embedder.encode(TEXTS), atol=1e-6)
    parquet.write_table(pyarrow.table({"input_ids": [[1, 2], None, [3, 99999], [5] * 65, [-1], [7], []]}), path)
    assert embed(checkpoint, *arguments) == 1
    assert "row 1: column 'input_ids' is null, not a list of token ids" in capsys.readouterr().err
    assert embed(checkpoint, *arguments, "--on-error", "skip") == 3
    rejects = [json.loads(line) for line in (tmp_path / "o" / "part-00000.rejects.jsonl").read_text().splitlines()]
    assert [r["row"] for r in rejects] == [1, 2, 3, 4, 6]
    assert "outside the vocabulary" in rejects[1]["reason"] and "65 tokens, more than" in rejects[2]["reason"]
    assert next(Index(tmp_path / "o").parts())[0] == [0, 5]
    huge = pyarrow.array([[1], [2**63 + 5]], pyarrow.list_(pyarrow.uint64()))
    parquet.write_table(pyarrow.table({"input_ids": huge}), path)
    assert embed(checkpoint, *arguments) == 1
    assert "row 1: column 'input_ids' holds the id 9223372036854775813, which is in no" in capsys.readouterr().err
    write("jsonl", tmp_path / "in.jsonl")
    assert embed(checkpoint, "--input", tmp_path / "in.jsonl", *arguments[2:]) == 1
    assert "token ids is read from .parquet files only" in capsys.readouterr().err


@pytest.mark.parametrize("windows", [1, 3])
def test_texts_that_are_too_long(windows, checkpoint, embedder, tmp_path, capsys, request):
    if windows == 3:
        request.getfixturevalue("small_windows")
    jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS])
    arguments = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "o", "--no-truncate"]
    assert embed(checkpoint, *arguments) == 1
    assert "in.jsonl, line 6: 152 tokens, more than max_length 64" in capsys.readouterr().err
    assert embed(checkpoint, *arguments, "--on-error", "null") == 3
    got = np.load(tmp_path / "o" / "part-00000.npy")
    assert np.isnan(got[5]).all()
    good = [i for i in range(len(TEXTS)) if i != 5]
    np.testing.assert_allclose(got[good], embedder.encode([TEXTS[i] for i in good]), atol=1e-6)


# --- what comes out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("form", ["npy", "safetensors", "parquet", "jsonl"])
def test_every_format_holds_the_same(form, dtype, checkpoint, embedder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module.Job, "__init__", _with(module.Job.__init__, part_rows=3))
    rows = [{"id": f"n{i}", "text": t} for i, t in enumerate(TEXTS)]
    rows[4]["text"] = None
    path = jsonl(tmp_path / "in.jsonl", rows)
    arguments = ["--input", path, "--id-column", "id", "--format", form, "--output-dtype", dtype, "--on-error", "null"]
    assert embed(checkpoint, *arguments, "--output", tmp_path / "o") == 3
    index = Index(tmp_path / "o")
    assert [part.rows for part in index.manifest.parts] == [3, 3, 2]
    ids, vectors = zip(*index.parts(), strict=True)
    vectors = np.concatenate(vectors)
    assert [i for part in ids for i in part] == [f"n{i}" for i in range(8)]
    assert np.isnan(vectors[4]).all() and (dtype == "float32" or form == "jsonl" or vectors.dtype == np.float16)
    good = [i for i in range(8) if i != 4]
    expected = embedder.encode([TEXTS[i] for i in good])
    np.testing.assert_allclose(vectors[good], expected, atol=1e-6 if dtype == "float32" else 1e-3)
    found = index.search(expected[:1].astype(np.float32), 8)[0]
    assert len(found) == 7 and "n4" not in [name for name, _ in found]
    if form == "parquet":
        file = parquet.ParquetFile(tmp_path / "o" / "part-00000.parquet")
        kind = "float" if dtype == "float32" else "halffloat"
        assert str(file.schema_arrow.field("embedding").type) == f"fixed_size_list<element: {kind}>[16]"
        nulls = [
            parquet.read_table(p).column("embedding").null_count for p in sorted((tmp_path / "o").glob("*.parquet"))
        ]
        assert nulls == [0, int(pyarrow_major() >= 26), 0]
        monkeypatch.setattr("pyarrow.__version__", "25.0.0")  # which cannot read such nulls, nor 24 write them
        assert embed(checkpoint, *arguments, "--output", tmp_path / "older") == 3
        older = np.concatenate([found for _, found in Index(tmp_path / "older").parts()])
        np.testing.assert_array_equal(older, vectors)
        table = parquet.read_table(tmp_path / "older" / "part-00001.parquet")
        assert table.column("embedding").null_count == 0


def pyarrow_major():
    return int(importlib.metadata.version("pyarrow").split(".")[0])


def _with(init, **more):
    return lambda self, *args, **kwargs: init(self, *args, **(kwargs | more))


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_of_every_format(kind, checkpoint, embedder, tmp_path):
    texts = LINES if kind.startswith("txt") else TEXTS
    write(kind, tmp_path / f"in.{kind.replace('+', '')}", texts)
    assert embed(checkpoint, "--input", tmp_path / f"in.{kind.replace('+', '')}", "--output", tmp_path / "o") == 0
    np.testing.assert_allclose(np.load(tmp_path / "o" / "part-00000.npy"), embedder.encode(texts), atol=1e-6)


def test_parts_of_a_job_have_one_schema(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(module.Job, "__init__", _with(module.Job.__init__, part_rows=2))
    rows = [{"id": i, "text": "a"} for i in (1, 2, "x", "y", 2**70, 3)] + [{"text": 1}] * 2
    path = jsonl(tmp_path / "in.jsonl", rows)
    arguments = ["--input", path, "--output", tmp_path / "o", "--id-column", "id", "--format", "parquet"]
    assert embed(checkpoint, *arguments, "--on-error", "null") == 3
    tables = [parquet.read_table(p) for p in sorted((tmp_path / "o").glob("*.parquet"))]
    assert len({str(table.schema) for table in tables}) == 1
    ids = [i for table in tables for i in table.column("id").to_pylist()]
    assert ids == ["1", "2", "x", "y", str(2**70), "3", None, None]


def test_rejected_rows_are_not_held(checkpoint, tmp_path, monkeypatch):
    """Parts without a usable row are written as they come, not when there is one with some."""
    monkeypatch.setattr(module.Job, "__init__", _with(module.Job.__init__, part_rows=2))
    path = jsonl(tmp_path / "in.jsonl", [{"text": 1}] * 10)
    job, work = make_job(checkpoint, path, tmp_path / "o", on_error="skip")
    taken = []

    def parts():
        for i in range(5):
            taken.append(i)
            yield module.Rows(i, 2 * i, [], errors={0: "bad"})

    stream = work.run(parts())
    assert next(stream).number == 0 and taken == [0]
    assert embed(checkpoint, "--input", path, "--output", tmp_path / "p", "--on-error", "skip") == 3
    assert [part.rejected for part in Index(tmp_path / "p").manifest.parts] == [2] * 5
    assert job.on_error == "skip"


def test_row_groups_are_small(tmp_path):
    from fastdistil.jobs.writers import as_table, write_embeddings

    vectors = np.arange(60_000 * 2, dtype=np.float32).reshape(-1, 2)
    write_embeddings(tmp_path, "part-00000", "parquet", list(range(60_000)), vectors, False)
    metadata = parquet.ParquetFile(tmp_path / "part-00000.parquet").metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [25_000, 25_000, 10_000]
    column = as_table([0, 1], {"embedding": vectors[:2]}, {}, False).column("embedding").chunk(0)
    assert column.values.buffers()[1].address == vectors.ctypes.data  # no copy


# --- stopping and going on ----------------------------------------------------------------------------------------

JOB = """
import os, random, signal, sys, time
import torch, numpy
torch.set_num_threads(1)
from fastdistil import Embedder
from fastdistil.jobs.run import Embedding, Job, Log, run_job
model, source, output, kills = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
from pathlib import Path

def job(resume):
    embedder = Embedder.from_pretrained(model, device="cpu")
    work = Embedding(embedder, "npy")
    made = Job([source], Path(output), "embed", model, "npy", {"max_length": 64}, resume=resume, part_rows=40,
               on_error="skip")
    run_job(made, work, Log(quiet=True))

def child(seconds):
    # forked before torch has started any thread
    pid = os.fork()
    if pid == 0:
        try:
            job(True)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    start = time.time()
    while seconds is None or time.time() - start < seconds:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0, status
            return False
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True

rng = random.Random(0)
killed = 0
for _ in range(kills):
    killed += child(rng.uniform(0.02, 0.3))
child(None)
print(killed)
"""


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed(checkpoint, tmp_path):
    """SIGKILL at 20 random moments; the output is the same bytes, and no finished part is computed again."""
    rng = np.random.default_rng(0)
    words = "the quick brown fox jumps over a lazy dog".split()  # noqa: SIM905
    rows = [{"text": " ".join(rng.choice(words, n))} for n in rng.integers(1, 60, 8_000)]
    rows[777]["text"] = None
    path = jsonl(tmp_path / "in.jsonl", rows)

    def run(output, kills):
        command = [sys.executable, "-c", JOB, str(checkpoint), str(path), str(output), str(kills)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert run(tmp_path / "whole", 0) == 0
    killed = run(tmp_path / "killed", 20)
    assert killed >= 10, "the job is over too soon to be killed"
    whole, resumed = files(tmp_path / "whole"), files(tmp_path / "killed")
    assert len(whole) == 2 * 200 + 1 + 1 and whole.keys() == resumed.keys()
    assert [name for name in whole if whole[name] != resumed[name]] == []


class Stop(BaseException):
    pass


def stop_at(monkeypatch, number):
    """The job ends when it comes to write this part."""
    write = module._write

    def stopping(job, directory, manifest, work, part):
        if part.number == number:
            raise Stop
        return write(job, directory, manifest, work, part)

    monkeypatch.setattr(module, "_write", stopping)


def make_job(checkpoint, source, output, **changes):
    embedder = Embedder.from_pretrained(checkpoint, device="cpu")
    work = module.Embedding(embedder, "npy")
    options = dict(part_rows=2, resume=True) | changes
    job = module.Job([str(source)], output, "embed", str(checkpoint), "npy", {"max_length": 64}, **options)
    return job, work


@pytest.fixture
def stopped(checkpoint, tmp_path, monkeypatch):
    """A job of four parts, of which two are finished."""
    path = jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS])
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Stop):
            module.run_job(*make_job(checkpoint, path, tmp_path / "o"), module.Log(True))
    return path, tmp_path / "o"


def test_finished_parts_are_not_computed_again(stopped, checkpoint, monkeypatch):
    path, output = stopped
    assert (output / "part-00001.done.json").exists() and not (output / "part-00002.npy").exists()
    before = {p.name: p.stat().st_mtime_ns for p in output.glob("part-*.npy")}
    seen = []
    encode = DistilBertTokenizer.encode_ids
    monkeypatch.setattr(
        DistilBertTokenizer, "encode_ids", lambda self, t, *a, **k: seen.extend(t) or encode(self, t, *a, **k)
    )
    module.run_job(*make_job(checkpoint, path, output), module.Log(True))
    assert seen == TEXTS[4:]
    assert all((output / name).stat().st_mtime_ns == then for name, then in before.items())
    module.run_job(*make_job(checkpoint, path, output.parent / "whole"), module.Log(True))
    assert files(output) == files(output.parent / "whole")
    # a finished job is left alone
    module.run_job(*make_job(checkpoint, path, output), module.Log(True))
    assert seen == TEXTS[4:] + TEXTS


def test_damaged_parts_are_made_again(stopped, checkpoint, tmp_path):
    path, output = stopped
    (output / "part-00001.npy").write_bytes(b"short")
    (output / "part-00002.npy.tmp").write_bytes(b"torn")
    module.run_job(*make_job(checkpoint, path, output), module.Log(True))
    module.run_job(*make_job(checkpoint, path, tmp_path / "whole"), module.Log(True))
    assert files(output) == files(tmp_path / "whole")


def test_a_record_of_a_part_that_no_job_wrote_ends_what_is_finished(stopped):
    _, output = stopped
    whole = len(manifests.finished_parts(output))
    path = output / "part-00000.done.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": None}))
    assert whole and not manifests.finished_parts(output)


def test_a_resume_that_is_killed_keeps_what_is_finished(stopped, checkpoint, monkeypatch):
    """At every step it takes on the disk before it computes anything."""
    path, output = stopped
    whole = len(manifests.finished_parts(output))
    for moment in range(6):
        left = [moment]

        def dying(real, left=left):
            def step(*args, **kwargs):
                if left[0] == 0:
                    raise Stop
                left[0] -= 1
                return real(*args, **kwargs)

            return step

        (output / "part-00002.npy").write_bytes(b"torn")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", dying(Path.unlink))
            patch.setattr(os, "replace", dying(os.replace))
            patch.setattr(module, "read_files", dying(module.read_files))
            with pytest.raises(Stop):
                module.run_job(*make_job(checkpoint, path, output), module.Log(True))
        assert len(manifests.finished_parts(output)) == whole, moment


@pytest.mark.parametrize("harm", ["gone", "torn"])
def test_a_finished_job_that_lost_files(harm, checkpoint, tmp_path):
    path = jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS])
    for name in ("o", "whole"):
        module.run_job(*make_job(checkpoint, path, tmp_path / name), module.Log(True))
    if harm == "gone":
        (tmp_path / "o" / "part-00001.npy").unlink()
    else:
        (tmp_path / "o" / "part-00003.ids.jsonl").write_text("")
    module.run_job(*make_job(checkpoint, path, tmp_path / "o"), module.Log(True))
    assert files(tmp_path / "o") == files(tmp_path / "whole")


def test_an_overwriting_job_that_is_killed_leaves_nothing_to_be_mistaken(stopped, checkpoint, tmp_path, monkeypatch):
    """Its parts have the names of the earlier job's."""
    _path, output = stopped
    other = jsonl(tmp_path / "other.jsonl", [{"text": f"{t} x"} for t in TEXTS])
    unlink, left = Path.unlink, [0]

    def dying(self, **kwargs):
        if left[0] == 0:
            raise Stop
        left[0] -= 1
        return unlink(self, **kwargs)

    for moment in range(8):
        with monkeypatch.context() as patch:
            left[0] = moment
            patch.setattr(Path, "unlink", dying)
            with contextlib.suppress(Stop):
                module.run_job(*make_job(checkpoint, other, output, resume=False, overwrite=True), module.Log(True))
        try:
            module.run_job(*make_job(checkpoint, other, output), module.Log(True))
        except ValueError as error:  # the earlier job is still there
            assert "the input other.jsonl (name" in str(error)
            continue
        module.run_job(*make_job(checkpoint, other, tmp_path / "whole", overwrite=True), module.Log(True))
        assert files(output) == files(tmp_path / "whole")
        break
    else:
        raise AssertionError("the job never got that far")


def test_files_of_others_are_not_taken_for_ours(checkpoint, tmp_path, capsys):
    out = tmp_path / "o"
    out.mkdir()
    rows = jsonl(out / "part-00000.jsonl", [{"text": t} for t in TEXTS]).read_text()
    other = jsonl(tmp_path / "in.jsonl", [{"text": "a"}])
    assert embed(checkpoint, "--input", other, "--output", out) == 1
    assert "is not empty (part-00000.jsonl)" in capsys.readouterr().err
    for how in ("--resume", "--overwrite"):
        assert embed(checkpoint, "--input", out, "--output", out, how) == 1
        assert "part-00000.jsonl lies in the output directory" in capsys.readouterr().err
    assert (out / "part-00000.jsonl").read_text() == rows
    assert embed(checkpoint, "--input", other, "--output", out, "--resume") == 0  # aside, where it stays as it was
    (aside,) = out.glob("without-manifest-*/part-00000.jsonl")
    assert aside.read_text() == rows
    assert embed(checkpoint, "--input", tmp_path, "--output", tmp_path / "deep" / "o") == 1
    assert "lies in the input directory" in capsys.readouterr().err


@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
def test_a_pattern_that_also_finds_what_the_job_writes(devices, checkpoint, tmp_path, capfd):
    jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS])
    out = tmp_path / "a" / "o"
    given = ["--input", tmp_path / "**" / "*.jsonl", "--output", out, "--format", "jsonl", "--device", devices]
    assert embed(checkpoint, *given) == 0
    whole = files(out)
    (out / "part-00000.jsonl").unlink()
    assert embed(checkpoint, *given, "--resume") == 0 and files(out) == whole
    for i in range(2):  # of several devices each finds what the others write, too
        shard_directory(out, i, 2).mkdir()
        jsonl(shard_directory(out, i, 2) / "part-00000.jsonl", [{"text": "half"}])
    assert embed(checkpoint, *given, "--overwrite") == 0
    assert all((out / name).read_bytes() == content for name, content in whole.items())
    # what lies there and is nobody's work is still refused
    jsonl(out / "mine.jsonl", [{"text": "a"}])
    assert embed(checkpoint, *given, "--resume") == 1
    assert "mine.jsonl lies in the output directory" in capfd.readouterr().err


def test_inputs_that_are_called_like_parts_are_read(checkpoint, tmp_path, monkeypatch, capfd):
    """A directory below the output, or the place of shards, may hold them: what is no job's is not left out."""
    (tmp_path / "o" / "raw").mkdir(parents=True)
    for name in ("part-00000", "more"):
        jsonl(tmp_path / "o" / "raw" / f"{name}.jsonl", [{"text": name}])
        jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
    given = ["--input", tmp_path / "o" / "raw", "--output", tmp_path / "o", "--overwrite"]
    assert embed(checkpoint, *given) == 0 and Index(tmp_path / "o").manifest.rows == 2
    for shard in range(2):
        monkeypatch.setenv("RANK", str(shard)), monkeypatch.setenv("WORLD_SIZE", "2")
        assert embed(checkpoint, "--input", tmp_path / "*.jsonl", "--output", tmp_path / "two") == 0
    assert sum(Index(shard_directory(tmp_path / "two", i, 2)).manifest.rows for i in range(2)) == 2
    # and parts that lost their manifest are set aside, not read
    (tmp_path / "lost").mkdir()
    given = ["--input", tmp_path / "lost" / "**" / "*.jsonl", "--output", tmp_path / "lost" / "o", "--format", "jsonl"]
    jsonl(tmp_path / "lost" / "in.jsonl", [{"text": "a"}])
    monkeypatch.setenv("RANK", "0"), monkeypatch.setenv("WORLD_SIZE", "1")
    assert embed(checkpoint, *given) == 0
    (tmp_path / "lost" / "o" / "manifest.json").unlink()
    assert embed(checkpoint, *given, "--resume") == 0 and Index(tmp_path / "lost" / "o").manifest.rows == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    # shards beside their inputs
    for shard in range(2):
        monkeypatch.setenv("RANK", str(shard))
        assert embed(checkpoint, "--input", tmp_path / "*.jsonl", "--output", tmp_path) == 0
    assert sum(Index(shard_directory(tmp_path, i, 2)).manifest.rows for i in range(2)) == 2


def test_a_merge_that_was_killed_is_made_again(checkpoint, tmp_path, monkeypatch):
    path = jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS])
    for shard in range(2):
        monkeypatch.setenv("RANK", str(shard)), monkeypatch.setenv("WORLD_SIZE", "2")
        assert embed(checkpoint, "--input", path, "--output", tmp_path / "o") == 0
    with monkeypatch.context() as patch:
        patch.setattr("fastdistil.jobs.merge._placed", Mock(side_effect=Stop))
        with pytest.raises(Stop):
            merge([tmp_path / "o"], tmp_path / "o")
    assert merge([tmp_path / "o"], tmp_path / "o", overwrite=True).rows == len(TEXTS)
    assert [part.rows for part in Index(tmp_path / "o").manifest.parts] == [4, 4]
    # but the shards are not what an unfinished job of other settings beside them stands for
    manifest = read_manifest(tmp_path / "o")
    manifest.finished, manifest.parts = False, []
    manifest.settings["max_length"] = 9
    manifests.start_over(tmp_path / "o", manifest, [])
    with pytest.raises(ValueError, match="o is not finished; go on with its job by --resume"):
        merge([tmp_path / "o"], tmp_path / "all")


def test_a_pattern_does_not_go_round_in_circles(tmp_path, monkeypatch):
    (tmp_path / "d" / "e").mkdir(parents=True)
    for name in ("a.txt", "e/b.txt"):
        (tmp_path / "d" / name).write_text("one\n")
    (tmp_path / "d" / "e" / "loop").symlink_to("..")
    (tmp_path / "d" / "link").symlink_to("e")
    (tmp_path / "d" / ".hidden").mkdir(), (tmp_path / "d" / ".hidden" / "c.txt").write_text("no\n")
    for pattern in ("**/*.txt", "**", "**/", "**/**/*.txt"):
        found = [os.path.relpath(f, tmp_path / "d") for f in find_inputs([f"{tmp_path}/d/{pattern}"])]
        assert found == ["a.txt", "e/b.txt"], pattern
    monkeypatch.chdir(tmp_path / "d")
    assert find_inputs(["**/*.txt"]) == ["a.txt", "e/b.txt"]
    (tmp_path / "d" / "notes.log").write_text("no\n"), (tmp_path / "d" / "only").mkdir()
    assert find_inputs(["**/"]) == ["a.txt", "e/b.txt"] == find_inputs([f"{'**/' * 3}*.txt"])
    with pytest.raises(ValueError, match="only/ is a directory without such files"):
        find_inputs(["only/**"])
    with pytest.raises(ValueError, match="an input is named '', which is no file"):
        find_inputs([""])


def test_what_changed_is_named(stopped, checkpoint, tmp_path, minilm):
    path, output = stopped

    def refused(message, source=path, **changes):
        with pytest.raises(ValueError, match=message):
            module.run_job(*make_job(checkpoint, source, output, **changes), module.Log(True))

    refused("part_rows was 2, now 3", part_rows=3)
    refused("shards was 1, now 2", shards=2)
    job, work = make_job(checkpoint, path, output)
    job.fingerprint = {"max_length": 32}
    with pytest.raises(ValueError, match="max_length was 64, now 32"):
        module.run_job(job, work, module.Log(True))
    other = jsonl(tmp_path / "other.jsonl", [{"text": t} for t in TEXTS])
    refused(r"the input other.jsonl \(name: was in.jsonl\)", source=other)
    os.utime(path, (1, 1))
    refused(r"the input in.jsonl \(time of change")
    before = manifests.fingerprint_of_files([str(path)])[0][3]
    path.write_text(path.read_text() + "\n")
    refused(r"the input in.jsonl \(size: was")
    content = path.read_text()
    path.write_text("#" + content[1:])
    assert manifests.fingerprint_of_files([str(path)])[0][3] != before
    # another checkpoint
    moved = tmp_path / "moved"
    shutil.copytree(checkpoint, moved)
    assert manifests.fingerprint_of_model(moved) == manifests.fingerprint_of_model(checkpoint)
    (moved / "config.json").write_text((moved / "config.json").read_text() + " ")
    assert manifests.fingerprint_of_model(moved) != manifests.fingerprint_of_model(checkpoint)


def test_a_job_that_failed_on_a_row_goes_on_without_it(checkpoint, tmp_path):
    rows = [{"text": t} for t in TEXTS]
    rows[5]["text"] = 3
    path = jsonl(tmp_path / "in.jsonl", rows)
    with pytest.raises(ValueError, match="in.jsonl, line 6: column 'text' is 3, not a string"):
        module.run_job(*make_job(checkpoint, path, tmp_path / "o"), module.Log(True))
    assert sorted(p.name for p in (tmp_path / "o").glob("*.npy")) == ["part-00000.npy", "part-00001.npy"]
    done = module.run_job(*make_job(checkpoint, path, tmp_path / "o", on_error="skip"), module.Log(True))
    assert (done.rows, done.rejected) == (7, 1)
    with pytest.raises(ValueError, match="on_error was 'skip', now 'null'"):
        module.run_job(*make_job(checkpoint, path, tmp_path / "o", on_error="null"), module.Log(True))


def test_directories_in_use(checkpoint, tmp_path, capsys):
    path = jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS])
    out = tmp_path / "o"
    given = ["--input", path, "--output", out]
    assert embed(checkpoint, *given, "--resume") == 0  # of nothing: a new job
    assert embed(checkpoint, *given) == 1
    assert (
        "is not empty (manifest.json); give another directory, or --overwrite, or --resume" in capsys.readouterr().err
    )
    assert embed(checkpoint, *given, "--resume") == 0
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "notes.txt").write_text("mine")
    assert embed(checkpoint, "--input", path, "--output", tmp_path / "p") == 1
    assert "is not empty (notes.txt); give another directory, or --overwrite\n" in capsys.readouterr().err
    assert files(tmp_path / "p").keys() == {"notes.txt"}
    assert embed(checkpoint, "--input", path, "--output", tmp_path / "p", "--resume") == 0
    assert (tmp_path / "p" / "notes.txt").read_text() == "mine"
    with pytest.raises(SystemExit) as caught:
        embed(checkpoint, *given, "--resume", "--overwrite")
    assert caught.value.code == 2
    assert embed(checkpoint, "--input", path, "--output", path) == 1
    assert "in.jsonl is a file" in capsys.readouterr().err


@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
def test_parts_without_a_manifest_are_moved_aside(devices, checkpoint, tmp_path, capfd, caplog):
    """A resumed job starts afresh there, and nothing is lost."""
    path, out = jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS]), tmp_path / "o"
    given = ["embed", "--model", str(checkpoint), "--input", str(path), "--output", str(out), "--device", devices]
    out.mkdir()
    for name in ("part-00000.npy", "part-00007.done.json", "part-00001.npy.tmp", "manifest.json.tmp", "notes.tmp"):
        (out / name).write_text("theirs")
    shard = shard_directory(out, 0, 2)
    if "," in devices:
        shard.mkdir()
        (shard / "part-00003.npy").write_text("theirs")
    assert main(given) == 1 and "is not empty (manifest.json.tmp)" in capfd.readouterr().err
    assert main([*given, "--resume", "--model", str(tmp_path / "nowhere")]) == 1
    assert (out / "part-00000.npy").read_text() == "theirs"  # not before there is a job
    assert main([*given, "--resume"]) == 0 and not shard.exists()
    found = {p.name: p for p in out.glob("without-manifest-*/*")}
    assert found.keys() - {"part-00003.npy"} == {"part-00000.npy", "part-00007.done.json"}
    assert ("part-00003.npy" in found) is ("," in devices)
    assert {p.read_text() for p in found.values()} == {(out / "notes.tmp").read_text()} == {"theirs"}
    assert f"they are in {found['part-00000.npy'].parent} now" in caplog.text
    before = sorted(out.rglob("*"))
    manifests.set_aside(out)  # there is a manifest now
    assert sorted(out.rglob("*")) == before
    (out / "notes.tmp").unlink()
    asides = sorted(out.glob("without-manifest-*"))
    vectors = np.concatenate([vectors for _, vectors in Index(out).parts()])
    assert len(vectors) == len(TEXTS) and not list(out.glob("*.tmp"))
    (out / "manifest.json").rename(out / "manifest.json.tmp")  # killed before there was one: nothing to keep
    for part in out.glob("part-*"):
        part.unlink()
    assert main([*given, "--resume"]) == 0 and sorted(out.glob("without-manifest-*")) == asides


def test_shards_are_merged_beside_what_was_moved_aside(checkpoint, tmp_path):
    path, out = jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS]), tmp_path / "o"
    for i in range(2):
        shard = shard_directory(out, i, 2)
        shard.mkdir(parents=True)
        (shard / "part-00000.npy").write_text("theirs")
        of = ["--num-shards", 2, "--shard-index", i]
        assert embed(checkpoint, "--input", path, "--output", shard, "--resume", *of) == 0
    assert main(["merge", str(out), "--output", str(out)]) == 0
    assert [p.read_text() for p in out.glob("without-manifest-*/part-00000.npy")] == ["theirs"] * 2


def test_a_lock_of_somebody_elses(checkpoint, tmp_path, capsys):
    path = jsonl(tmp_path / "in.jsonl", [{"text": "a"}])
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / ".lock").write_text("do not touch")
    assert embed(checkpoint, "--input", path, "--output", tmp_path / "o") == 1
    assert "is somebody else's file" in capsys.readouterr().err
    assert (tmp_path / "o" / ".lock").read_text() == "do not touch"


def test_an_output_in_the_models_directory(checkpoint, tmp_path):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    path = jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS])
    for name in ("a", "b"):
        assert embed(model, "--input", path, "--output", model / name) == 0
    for name in ("a", "b"):
        assert embed(model, "--input", path, "--output", model / name, "--resume") == 0


def test_pipes_and_links_below_an_input(checkpoint, tmp_path, capsys):
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "beside").mkdir()
    write("txt", tmp_path / "in" / "a" / "x.txt", ["one"])
    write("txt", tmp_path / "beside" / "y.txt", ["two"])
    (tmp_path / "in" / "b").symlink_to(tmp_path / "beside")
    (tmp_path / "beside" / "round").symlink_to(tmp_path / "in")
    os.mkfifo(tmp_path / "in" / "a" / "p.txt")
    found = [str(tmp_path / "in" / "a" / "x.txt"), str(tmp_path / "in" / "b" / "y.txt")]
    assert find_inputs([tmp_path / "in"]) == found == find_inputs([tmp_path / "in" / "[ab]" / "*.txt"])
    (tmp_path / "in" / "c").symlink_to(tmp_path / "in" / "a")  # the same again
    assert find_inputs([tmp_path / "in"]) == found
    with pytest.raises(ValueError, match=r"p.txt is no regular file"):
        find_inputs([tmp_path / "in" / "a" / "p*"])


def test_lines_in_a_file_of_another_name(checkpoint, tmp_path):
    """JSON or text, told apart as on standard input."""
    path = jsonl(tmp_path / "in.dat", [{"text": "a"}, {"text": "b"}])
    assert [row.text for row in read_rows([path])] == ["a", "b"]
    (tmp_path / "damaged").write_text('{text: "a"}\n{"text": "b"}\n')
    assert [(row.text, row.error is None) for row in read_rows([tmp_path / "damaged"])] == [(None, False), ("b", True)]
    for text in ("a\n{b\n", "{{cite}} a\nb\n", "{% if %}\n"):
        (tmp_path / "plain").write_text(text)
        assert [row.text for row in read_rows([tmp_path / "plain"])] == text.splitlines()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_text(path.read_text()[: -len("text 7\n")]), "truncated"),
        (lambda path: path.write_text(path.read_text() + "more\n"), "grown"),
        (lambda path: path.write_text(path.read_text().replace("text 0", "tXxt 0")), "edited"),
        (lambda path: os.utime(path, (1, 1)), "touched"),
        (lambda path: path.unlink(), None),
    ],
)
def test_an_input_that_changes_while_it_is_read(change, message, checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "in.txt"
    path.write_text("".join(f"text {i}\n" for i in range(8)))
    content, times, real = path.read_bytes(), path.stat(), module._write

    def write_(job, directory, manifest, work, part):
        if part.number == 2:
            change(path)
        return real(job, directory, manifest, work, part)

    monkeypatch.setattr(module, "_write", write_)
    job, work = make_job(checkpoint, path, tmp_path / "o")
    if message is None:
        assert module.run_job(job, work, module.Log(True)).finished
        return
    with pytest.raises(ValueError, match=r"the input in.txt changed while it was read; start over with --overwrite"):
        module.run_job(job, work, module.Log(True))
    monkeypatch.setattr(module, "_write", real)
    with pytest.raises(ValueError, match="the input in.txt"):
        module.run_job(*make_job(checkpoint, path, tmp_path / "o"), module.Log(True))
    path.write_bytes(content)  # as it was: what is written is of that
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    for output in ("o", "whole"):
        module.run_job(*make_job(checkpoint, path, tmp_path / output), module.Log(True))
    assert files(tmp_path / "o") == files(tmp_path / "whole")


def _with_a_nan(compute, value=float("nan")):
    def computed(*args):
        out = compute(*args).clone()
        out[-1, 0] = value  # as of a text that the model cannot bear
        return out

    return computed


def test_embeddings_beyond_float16(minilm, tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    model = fastdistil.DistilBertModel(DistilBertConfig(**TINY))
    with torch.no_grad():
        model.transformer.layer[-1].output_layer_norm.weight.mul_(1e6)
    model.save_pretrained(tmp_path / "m")
    DistilBertTokenizer.from_pretrained(minilm).save_pretrained(tmp_path / "m")
    path = jsonl(tmp_path / "in.jsonl", [{"text": "a"}, {"text": "b"}, {"text": "c"}])
    given = ["--input", path, "--output", tmp_path / "o", "--no-normalize", "--output-dtype"]
    monkeypatch.setattr(Embedder, "_compute", _with_a_nan(Embedder._compute))
    assert embed(tmp_path / "m", *given, "float16") == 1
    assert "in.jsonl, line 1: its embedding is beyond float16's range" in capsys.readouterr().err
    assert embed(tmp_path / "m", *given, "float32", "--on-error", "skip") == 3
    assert next(Index(tmp_path / "o").parts())[0] == [0, 1]


@pytest.mark.parametrize("form", ["npy", "jsonl"])
def test_embeddings_that_are_not_finite(form, checkpoint, tmp_path, capsys, monkeypatch):
    path = jsonl(tmp_path / "in.jsonl", [{"text": 1}, {"text": "a"}, {"text": "b"}, {"text": "c"}])
    given = ["--input", path, "--output", tmp_path / "o", "--format", form, "--overwrite", "--on-error"]
    compute = Embedder._compute
    for value in (float("nan"), float("inf"), -float("inf")):
        monkeypatch.setattr(Embedder, "_compute", _with_a_nan(compute, value))
        assert embed(checkpoint, *given, "null") == 3
        ids, vectors = next(Index(tmp_path / "o").parts())
        assert ids == [0, 1, 2, 3] and np.isfinite(vectors[1:3]).all() and np.isnan(vectors[[0, 3]]).all()
        if form == "jsonl":
            assert json.loads((tmp_path / "o" / "part-00000.jsonl").read_text().splitlines()[3])["embedding"] is None
        rejects = (tmp_path / "o" / "part-00000.rejects.jsonl").read_text().splitlines()
        assert [json.loads(line)["row"] for line in rejects] == [0, 3] and "is not finite" in rejects[1]
    jsonl(path, [{"text": "a"}, {"text": "b"}])
    assert embed(checkpoint, *given, "fail") == 1
    assert "in.jsonl, line 2: its embedding is not finite" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["closed", "gone", "full"])
def test_a_job_whose_messages_nobody_can_read(how, checkpoint, tmp_path):
    path = jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS])
    command = [sys.executable, "-m", "fastdistil.cli", "embed", "--model", str(checkpoint), "--input", str(path)]
    shell = {
        "closed": '"$@" 2>&-',
        "gone": '"$@" 2>&1 >/dev/null | true; exit ${PIPESTATUS[0]}',
        "full": '"$@" 2>/dev/full',
    }
    done = subprocess.run(["bash", "-c", shell[how], "bash", *command, "--json-logs", "--output", str(tmp_path / "o")])
    assert done.returncode == 0 and read_manifest(tmp_path / "o").finished


def test_a_pipe_by_its_name(checkpoint, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert embed(checkpoint, "--input", tmp_path / "pipe.jsonl", "--output", tmp_path / "o") == 1
    assert "pipe.jsonl is no regular file; send a pipe to standard input, and give -" in capsys.readouterr().err


def test_the_second_of_two_jobs_refuses(checkpoint, tmp_path, capsys):
    path = jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS])
    out = tmp_path / "o"
    out.mkdir()
    with Lock(out):
        assert embed(checkpoint, "--input", path, "--output", out) == 1
        assert f"another job (process {os.getpid()}) is writing to {out}" in capsys.readouterr().err
    assert embed(checkpoint, "--input", path, "--output", out) == 0


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="cannot be locked .No locks available.; give a directory on another file system"):
        Lock(tmp_path)


def test_processes_share_the_cores_unless_told(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(processes, "_together", lambda *a: seen.append(a[2]) or [processes.REJECTED])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    options = dict(shard=0, shards=2, resume=False, overwrite=False)
    processes.run_on(["cuda:0", "cuda:1"], ["embed"], tmp_path / "o", **options)
    assert [seen[0][name] for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")] == ["7", "4"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.delenv("OMP_NUM_THREADS")
    processes.run_on(["cuda:0", "cuda:1"], ["embed"], tmp_path / "p", **options)
    assert [seen[1][name] for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")] == ["1", "1"]


def test_a_lock_alone_is_nothing_to_lose(tmp_path):
    """It is left by a run that failed before it wrote anything."""
    Lock(tmp_path).release()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    processes._refuse(tmp_path, [tmp_path / "shard"], 1, resume=False, overwrite=False)
    (tmp_path / "mine").write_text("")
    with pytest.raises(FileExistsError, match="mine"):
        processes._refuse(tmp_path, [tmp_path / "shard"], 1, resume=False, overwrite=False)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, [""]),
        ("cpu", ["cpu"]),
        ("cuda", ["cuda"]),
        ("1", ["cuda:1"]),
        ("0,1", ["cuda:0", "cuda:1"]),
        ("cuda:0, 1,cuda:2", ["cuda:0", "cuda:1", "cuda:2"]),
        ("xpu:0,1", ["xpu:0", "xpu:1"]),
        ("cpu,cpu", ["cpu", "cpu"]),
        ("cuda,cuda:0", "device cuda:0 is named twice"),
        ("cuda:1,01", "device cuda:1 is named twice"),
        ("cuda:0,,1", "leaves one between commas out"),
        ("cpu,0", "has a number behind cpu; write cuda:0"),
    ],
)
def test_which_devices_are_named(given, found):
    if isinstance(found, list):
        assert processes.split_devices(given) == found
        return
    with pytest.raises(ValueError, match=found):
        processes.split_devices(given)


def test_what_several_devices_would_lose(tmp_path, monkeypatch):
    """A shard's parts are a job's, too; an unfinished merge of finished shards is gone on with."""
    shards = [processes.shard_directory(tmp_path, i, 2) for i in range(2)]
    shards[1].mkdir()
    processes._refuse(tmp_path, shards, 2, resume=False, overwrite=False)
    (shards[1] / "part-00000.npy").write_bytes(b"")
    with pytest.raises(FileExistsError, match=f"is not empty .{shards[1].name}."):
        processes._refuse(tmp_path, shards, 2, resume=False, overwrite=False)
    processes._refuse(tmp_path, shards, 2, resume=False, overwrite=True)
    (tmp_path / processes.MANIFEST).write_text("{}")
    monkeypatch.setattr(processes, "_is_merged", lambda output: False)
    for finished in (shards, shards[:1]):
        monkeypatch.setattr(processes, "_is_finished", finished.__contains__)
        if finished == shards:
            processes._refuse(tmp_path, shards, 2, resume=True, overwrite=False)
        else:
            with pytest.raises(FileExistsError, match="holds an unfinished job on one device"):
                processes._refuse(tmp_path, shards, 2, resume=True, overwrite=False)


@pytest.mark.parametrize("status", [1, 2, -9, 4])
def test_what_is_said_of_a_process_that_failed(status):
    """Of one that was killed what to do; one that ended by itself has said so."""
    message = str(processes.Failed("cuda:1", status))
    assert message.startswith(f"the process on cuda:1 ended with status {status}")
    assert ("--resume" in message) == (status not in (1, 2))


def together(*children, directories=(), replaced=()):
    """Pieces of Python as the processes of devices."""
    start = (
        "import os, pathlib, signal, sys, time\nlifeline = int(os.environ['FASTDISTIL_LIFELINE'])\nsignal.alarm(20)\n"
    )
    commands = [[sys.executable, "-c", start + code] for code in children]
    devices = [f"cuda:{i}" for i in range(len(children))]
    return processes._together(devices, commands, dict(os.environ), list(directories), list(replaced))


def test_devices_processes_have_neither_this_ones_signals_nor_its_input():
    mine, (there, here) = os.dup(0), os.pipe()
    os.write(here, b"a line\n")
    os.close(here)
    os.dup2(there, 0)
    try:
        before = len(os.listdir("/proc/self/fd"))
        in_a_group, without_input = "os.getpgid(0) == os.getpid()", "sys.stdin.read() == ''"
        assert together(f"sys.exit(3 * ({in_a_group}))", f"sys.exit(3 * ({without_input}))") == [3, 3]
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        os.dup2(mine, 0)
        os.close(mine)
        os.close(there)


@pytest.mark.parametrize("status", [1, 2, 4])
def test_when_one_devices_process_fails_the_others_are_waited_for(status, tmp_path):
    """They read the end of their lifeline, and have stopped when the error is raised."""
    stopped = f"os.read(lifeline, 1); time.sleep(0.5); pathlib.Path({str(tmp_path / 'stopped')!r}).touch()"
    with pytest.raises(processes.Failed, match=f"the process on cuda:1 ended with status {status}"):
        together(stopped, f"sys.exit({status})")
    assert (tmp_path / "stopped").exists()


def test_earlier_jobs_work_is_removed_once_there_is_something_in_its_place(tmp_path):
    manifest, cleared = tmp_path / manifests.MANIFEST, []

    def run(code):
        cleared.clear()
        replaced = [(tmp_path, lambda path: cleared.append((path, written.exists())))]
        return together(code, directories=[tmp_path / "none", tmp_path], replaced=replaced)

    written = tmp_path / "written"
    manifest.write_text("of an earlier job")
    os.utime(manifest, (1, 1))
    assert run("pass") == [0] and cleared == []
    write = f"pathlib.Path({str(written)!r}).touch(); pathlib.Path({str(manifest)!r}).touch(); time.sleep(1)"
    assert run(write) == [0] and cleared == [(tmp_path, True)]


def test_a_child_lets_its_own_children_know_no_lifeline(monkeypatch):
    there, here = os.pipe()
    monkeypatch.setenv(processes.LIFELINE, str(there))
    before, told = signal.getsignal(signal.SIGINT), threading.Event()
    try:
        processes.end_with_parent()
        assert processes.LIFELINE not in os.environ
        signal.signal(signal.SIGINT, lambda *_: told.set())
        os.close(here)
        assert told.wait(10)
    finally:
        signal.signal(signal.SIGINT, before)
        os.close(there)


def test_of_a_shard_what_is_somebody_elses_stays(tmp_path):
    mine, shared = tmp_path / "a", tmp_path / "b"
    for shard in (mine, shared):
        shard.mkdir()
        (shard / LOCK).touch()
    (shared / "notes.txt").touch()
    for shard in (mine, shared, tmp_path / "none"):
        processes._remove_shard(shard)
    assert not mine.exists() and [path.name for path in shared.iterdir()] == ["notes.txt"]


def test_which_shards_several_devices_take(tmp_path, monkeypatch):
    """Of three jobs on two devices each the second has the third and the fourth of six, which others merge."""
    seen = []
    monkeypatch.setattr(processes, "_together", lambda *given: (seen.append(given), [0, processes.REJECTED])[1])
    monkeypatch.setattr(processes, "merge", lambda *_, **__: pytest.fail("merged"))
    options = dict(shard=1, shards=3, resume=False, overwrite=False)
    assert processes.run_on(["cuda:0", "cuda:1"], ["embed"], tmp_path / "o", **options) is True
    devices, commands, _, directories, replaced = seen[0]
    assert devices == ["cuda:0", "cuda:1"] and replaced == []
    assert directories == [processes.shard_directory(tmp_path / "o", i, 6) for i in (2, 3)]
    for device, directory, index, command in zip(devices, directories, ("2", "3"), commands, strict=True):
        tail = ["--device", device, "--output", str(directory), "--num-shards", "6", "--shard-index", index]
        assert command[1:] == ["-m", "fastdistil.cli", "embed", *tail]


def test_ids_of_rows_are_integers_in_parquet(checkpoint, tmp_path):
    """Those of a column are as the column has them."""
    path = jsonl(tmp_path / "in.jsonl", [{"text": t, "id": f"n{i}"} for i, t in enumerate(TEXTS)])
    arguments = ["--input", path, "--format", "parquet"]
    assert embed(checkpoint, *arguments, "--output", tmp_path / "o") == 0
    assert embed(checkpoint, *arguments, "--output", tmp_path / "p", "--id-column", "id") == 0
    kinds = [parquet.read_schema(tmp_path / name / "part-00000.parquet").field("id").type for name in "op"]
    assert kinds == [pyarrow.int64(), pyarrow.string()]
    assert next(Index(tmp_path / "o").parts())[0] == list(range(len(TEXTS)))


def test_the_lock_ends_with_its_process(tmp_path):
    code = f"from fastdistil.jobs.manifest import Lock; from pathlib import Path; import time\n" \
           f"lock = Lock(Path({str(tmp_path)!r})); print('held', flush=True); time.sleep(60)"  # fmt: skip
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError, match=f"process {holder.pid}"):
        Lock(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    Lock(tmp_path).release()


FULL = """
import resource, sys
from fastdistil.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))  # a quota: no file may grow larger
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("form", ["npy", "safetensors", "parquet", "jsonl"])
def test_no_room_for_a_part(form, checkpoint, tmp_path):
    path = jsonl(tmp_path / "in.jsonl", [{"text": f"{t} {i}"} for i in range(20) for t in TEXTS])
    arguments = ["embed", "--model", checkpoint, "--device", "cpu", "--input", path, "--output", tmp_path / "o"]
    command = [sys.executable, "-c", FULL, *map(str, arguments), "--format", form]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # for the fingerprint holds threads
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and f"part-00000.{form} cannot be written" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert {p.name for p in (tmp_path / "o").iterdir()} <= {".lock", "manifest.json"}
    assert embed(checkpoint, *arguments[5:], "--format", form, "--resume") == 0


def test_a_full_disk(checkpoint, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("no small file system can be made here")
    try:
        path = jsonl(tmp_path / "in.jsonl", [{"text": f"{t} {i}"} for i in range(250) for t in TEXTS])
        with pytest.raises(OSError, match="no space is left for .*; make room and go on with --resume") as caught:
            module.run_job(*make_job(checkpoint, path, small / "o", part_rows=500), module.Log(True))
        assert caught.value.errno == 28
        kept = {p.name: p.read_bytes() for p in (small / "o").glob("part-*") if not p.name.endswith(".done.json")}
        assert len(kept) >= 2 and not list((small / "o").glob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(small)], check=True)
        module.run_job(*make_job(checkpoint, path, small / "o", part_rows=500), module.Log(True))
        module.run_job(*make_job(checkpoint, path, tmp_path / "whole", part_rows=500), module.Log(True))
        assert files(small / "o") == files(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_an_input_that_vanishes(checkpoint, tmp_path, capsys, monkeypatch):
    for name in ("a", "b"):
        jsonl(tmp_path / f"{name}.jsonl", [{"text": t} for t in TEXTS])
    monkeypatch.setattr(module.Job, "__init__", _with(module.Job.__init__, part_rows=4))
    read = module.read_files

    def gone(*args, **kwargs):
        (tmp_path / "b.jsonl").unlink()
        return read(*args, **kwargs)

    monkeypatch.setattr(module, "read_files", gone)
    arguments = ["--input", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--output", tmp_path / "o"]
    assert embed(checkpoint, *arguments) == 1
    assert "b.jsonl" in capsys.readouterr().err
    assert len(list((tmp_path / "o").glob("part-*.npy"))) == 2


def test_interrupted(checkpoint, tmp_path, capsys, monkeypatch):
    path = jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS])
    monkeypatch.setattr(module.Job, "__init__", _with(module.Job.__init__, part_rows=4))
    write = module._write

    def interrupt(*args):
        if args[-1].number:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(module, "_write", interrupt)
    assert embed(checkpoint, "--input", path, "--output", tmp_path / "o") == 1
    assert "interrupted; finished parts stay, go on with --resume" in capsys.readouterr().err
    assert len(list((tmp_path / "o").glob("part-*.npy"))) == 1


def test_standard_input(checkpoint, tmp_path, capsys, monkeypatch):
    def stdin():
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(LINES).encode())))

    stdin()
    assert embed(checkpoint, "--input", "-", "--output", tmp_path / "o") == 0
    assert len(np.load(tmp_path / "o" / "part-00000.npy")) == len(LINES)
    stdin()
    assert embed(checkpoint, "--input", "-", "--output", tmp_path / "o", "--resume") == 1
    assert "standard input cannot be resumed" in capsys.readouterr().err
    assert embed(checkpoint, "--input", "-", "--output", tmp_path / "p", "--num-shards", 2, "--shard-index", 0) == 2
    assert "standard input cannot be split into shards" in capsys.readouterr().err


def test_long_texts_make_smaller_parts(checkpoint, tmp_path, monkeypatch):
    path = jsonl(tmp_path / "in.jsonl", [{"text": "x " * n} for n in (10, 600, 10, 10, 10)])
    done = module.run_job(
        *make_job(checkpoint, path, tmp_path / "o", part_rows=100, part_characters=1_000), module.Log(True)
    )
    assert [part.rows for part in done.parts] == [2, 3]


# --- shards -------------------------------------------------------------------------------------------------------


def test_shards_and_their_merging(checkpoint, embedder, tmp_path, capsys, monkeypatch):
    rows = [{"id": i * 10, "text": t} for i, t in enumerate(TEXTS * 3)]
    rows[13]["text"] = None
    a, b = jsonl(tmp_path / "a.jsonl", rows[:9]), tmp_path / "b.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows[9:]), b, row_group_size=4)
    given = ["--input", a, b, "--id-column", "id", "--on-error", "skip"]
    for shard in range(3):
        where = ["--output", tmp_path / f"s{shard}", "--num-shards", 3, "--shard-index", shard]
        assert embed(checkpoint, *given, *where) == (3 if shard == 1 else 0)
    shards = [str(tmp_path / f"s{i}") for i in (2, 0, 1)]
    assert main(["merge", *shards, "--output", str(tmp_path / "m")]) == 3
    index = Index(tmp_path / "m")
    ids, vectors = zip(*index.parts(), strict=True)
    good = [row for row in rows if row["text"] is not None]
    assert [i for part in ids for i in part] == [row["id"] for row in good]
    np.testing.assert_allclose(np.concatenate(vectors), embedder.encode([row["text"] for row in good]), atol=1e-6)
    assert [json.loads(x)["row"] for x in (tmp_path / "m" / "part-00001.rejects.jsonl").read_text().splitlines()] == [
        13
    ]
    # by the environment, each into a directory of its own
    for shard in range(2):
        monkeypatch.setenv("RANK", str(shard)), monkeypatch.setenv("WORLD_SIZE", "2")
        assert embed(checkpoint, *given, "--output", tmp_path / "ranks") in (0, 3)
    assert sorted(p.name for p in (tmp_path / "ranks").iterdir()) == ["shard-00000-of-00002", "shard-00001-of-00002"]
    assert main(["merge", str(tmp_path / "ranks"), "--output", str(tmp_path / "n"), "--quiet"]) == 3
    assert [i for part, _ in Index(tmp_path / "n").parts() for i in part] == [row["id"] for row in good]
    monkeypatch.delenv("RANK"), monkeypatch.delenv("WORLD_SIZE")
    capsys.readouterr()
    # two machines: other threads, and the input copied at another time
    merged = read_manifest(tmp_path / "s0")
    merged.settings["threads"], merged.settings["inputs"][0][2] = 64, 1
    write_manifest(tmp_path / "s0", merged)
    assert main(["merge", *shards, "--output", str(tmp_path / "far"), "--quiet"]) == 3
    # shards in shards, as several devices on several machines leave them
    (tmp_path / "deep").mkdir()
    for i in range(3):
        shutil.copytree(tmp_path / f"s{i}", tmp_path / "deep" / "shard-0-of-1" / f"shard-{i}-of-3")
    assert main(["merge", str(tmp_path / "deep"), "--output", str(tmp_path / "all"), "--quiet"]) == 3
    # the directory that they lie in, beside what is merged already
    assert main(["merge", str(tmp_path), "--output", str(tmp_path / "again"), "--quiet"]) == 3
    (tmp_path / "s0" / "site").mkdir()  # somebody else's, beside and below
    for place in (tmp_path / "s0" / "site", tmp_path / "theirs"):
        place.mkdir(exist_ok=True)
        (place / "manifest.json").write_text('{"name": "x"}')
    assert main(["merge", str(tmp_path), "--output", str(tmp_path / "once more"), "--quiet"]) == 3
    assert main(["merge", *shards, "--output", str(tmp_path / "each"), "--quiet"]) == 3
    # what cannot be merged
    (tmp_path / "nothing").mkdir()
    for given, message in [
        (shards[:2], "of 3 shards, these are missing: 1"),
        ([*shards, shards[0]], "is shard 2, as"),
        ([shards[0], str(tmp_path / "ranks" / "shard-00000-of-00002")], "of another job"),
        ([str(tmp_path / "none")], "there is no directory"),
        ([str(tmp_path / "nothing")], "is no shard"),
    ]:
        assert main(["merge", *given, "--output", str(tmp_path / "x")]) == 1
        assert message in capsys.readouterr().err
    assert main(["merge", *shards, "--output", str(tmp_path / "m")]) == 1
    assert "is not empty" in capsys.readouterr().err
    before = files(tmp_path / "s0")
    assert main(["merge", *shards, "--output", shards[1], "--overwrite"]) == 1
    assert "is one of the shards" in capsys.readouterr().err and files(tmp_path / "s0") == before
    (tmp_path / "s1" / "part-00000.npy").write_bytes(b"")
    before = files(tmp_path / "m")
    assert main(["merge", *shards, "--output", str(tmp_path / "m"), "--overwrite"]) == 1
    assert "is missing or damaged" in capsys.readouterr().err and files(tmp_path / "m") == before


def test_wrong_shards(checkpoint, tmp_path, capsys, monkeypatch):
    path = jsonl(tmp_path / "in.jsonl", [{"text": "a"}])
    for rank, world, args, message in [
        ("", "", ["--num-shards", 2], "--num-shards and --shard-index go together"),
        ("", "2", ["--shard-index", 1], "--num-shards and --shard-index go together"),
        ("1", "", ["--num-shards", 2], "--num-shards and --shard-index go together"),
        ("", "", ["--num-shards", 2, "--shard-index", 2], "shard 2 is none of 2; they are numbered from 0"),
        ("0", "4", ["--num-shards", 2], "--num-shards is 2, but WORLD_SIZE 4; give --shard-index, too"),
        ("a", "2", [], "RANK and WORLD_SIZE are 'a' and '2', not integers"),
    ]:
        monkeypatch.setenv("RANK", rank), monkeypatch.setenv("WORLD_SIZE", world)
        assert embed(checkpoint, "--input", path, "--output", tmp_path / "o", *args) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rank", "world", "args", "shard"),
    [
        ("1", "2", [], (1, 2, "o/shard-00001-of-00002")),
        ("1", "2", ["--num-shards", "2"], (1, 2, "o/shard-00001-of-00002")),
        ("1", "2", ["--num-shards", "3", "--shard-index", "2"], (2, 3, "o")),
        ("1", "4", ["--shard-index", "2"], (2, 4, "o")),
        ("0", "1", [], (0, 1, "o")),
        ("", "", [], (0, 1, "o")),
        ("", "", ["--num-shards", "1"], (0, 1, "o")),
        ("1", "", [], (0, 1, "o")),
        ("x", "y", ["--num-shards", "2", "--shard-index", "1"], (1, 2, "o")),
    ],
)
def test_which_shard_a_process_takes(rank, world, args, shard, monkeypatch):
    monkeypatch.setenv("RANK", rank), monkeypatch.setenv("WORLD_SIZE", world)
    arguments = cli.parser().parse_args(["embed", "--model", "m", "--input", "i", "--output", "o", *args])
    assert (*cli._shard(arguments), str(arguments.output)) == shard


def test_an_output_without_a_name(checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit):
        embed(checkpoint, "--input", jsonl(tmp_path / "in.jsonl", [{"text": "a"}]), "--output", "")
    assert "--output: it is empty; is a variable unset?" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["merge", "", "--output", "o"], ["search", "--index", "", "query"]], ids=str)
def test_a_directory_without_a_name_is_not_the_current_one(command, capsys):
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 2 and "it is empty; is a variable unset?" in capsys.readouterr().err


def test_errors_as_json(checkpoint, tmp_path, capsys):
    path = jsonl(tmp_path / "in.jsonl", [{"text": "a"}, {"text": None}])
    assert embed(checkpoint, "--input", path, "--output", tmp_path / "o", "--json-logs") == 1
    last = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert last["event"] == "error" and "in.jsonl, line 2" in last["text"]


@pytest.mark.parametrize("as_json", [True, False])
def test_a_defect_is_told_with_its_trace(as_json, checkpoint, tmp_path, capsys, monkeypatch):
    path = jsonl(tmp_path / "in.jsonl", [{"text": "a"}])
    monkeypatch.setattr(cli, "run_job", Mock(side_effect=KeyError("x")))
    assert embed(checkpoint, "--input", path, "--output", tmp_path / "o", *["--json-logs"] * as_json) == 1
    lines = capsys.readouterr().err.splitlines()
    if as_json:
        last = json.loads(lines[-1])
        assert last["event"] == "error" and last["text"] == "KeyError: 'x'" and "in embed" in last["traceback"]
    else:
        assert lines[-1] == "fastdistil: KeyError: 'x'; this is a defect, please report it" and "Traceback" in lines[0]


def test_a_want_of_memory_is_no_defect(checkpoint, tmp_path, capsys, monkeypatch):
    path = jsonl(tmp_path / "in.jsonl", [{"text": "a"}])
    monkeypatch.setattr(cli, "run_job", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    assert embed(checkpoint, "--input", path, "--output", tmp_path / "o") == 1
    assert capsys.readouterr().err == "fastdistil: CUDA out of memory\n"


@pytest.mark.parametrize("code", [errno.EFBIG, errno.EDQUOT])
def test_a_part_is_told_of_when_it_is_written(code, checkpoint, tmp_path, capsys, monkeypatch):
    path = jsonl(tmp_path / "in.jsonl", [{"text": f"text {i}"} for i in range(30)])
    monkeypatch.setattr(module.Job, "__init__", _with(module.Job.__init__, part_rows=10))
    commit = module.commit

    def second_fails(directory, part):
        if part.number == 1:
            raise OSError(code, os.strerror(code))
        commit(directory, part)

    monkeypatch.setattr(module, "commit", second_fails)
    given = ["--input", path, "--output", tmp_path / "o", "--json-logs"]
    assert embed(checkpoint, *given) == 1
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [event["number"] for event in events if event["event"] == "part"] == [0]
    assert ("no space is left" in events[-1]["text"]) is (code == errno.EDQUOT)
    monkeypatch.setattr(module, "commit", commit)
    for parts in (2, 0):  # the second time nothing is left
        assert embed(checkpoint, *given, "--resume") == 0
        events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
        assert [event["event"] for event in events].count("part") == parts
        assert events[-1]["event"] == "done" and (events[-1]["rows"], events[-1]["parts"]) == (30, 3)
        assert {"rejected", "rows_per_s", "tokens_per_s", "eta_s", "bottleneck"} <= events[-1].keys()


def test_progress_without_a_terminal(checkpoint, embedder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "SELDOM", 0.01)
    path = jsonl(tmp_path / "in.jsonl", [{"text": f"text {i}"} for i in range(3_000)])
    job, work = make_job(checkpoint, path, tmp_path / "o", part_rows=1_000)
    module.run_job(job, work, module.Log())
    assert "rows/s" in capsys.readouterr().err.splitlines()[0]


def start(checkpoint, tmp_path, *more, texts=200_000, words=40, again=False, **options):
    """A job in a process of its own, that takes long enough to be stopped."""
    path = tmp_path / "in.jsonl"
    if not again:
        jsonl(path, [{"text": f"text {i} {'word ' * words}"} for i in range(texts)])
    command = [sys.executable, "-m", "fastdistil.cli", "embed", "--model", checkpoint, "--input", path, "--quiet"]
    return subprocess.Popen([*map(str, command), "--output", str(tmp_path / "o"), *more], **options)


def holders(tmp_path):
    """The processes of both shards, once they have begun."""
    locks = [shard_directory(tmp_path / "o", i, 2) / ".lock" for i in range(2)]
    wait_for(lambda: all(lock.is_file() and lock.read_text() for lock in locks))
    return [int(lock.read_text()) for lock in locks]


@pytest.mark.parametrize(
    ("end", "background"), [(signal.SIGKILL, False), (signal.SIGKILL, True), (signal.SIGTERM, True)]
)
def test_processes_end_with_the_one_that_started_them(end, background, checkpoint, tmp_path):
    # what a script starts with & ignores Ctrl-C, and so do its children
    ignore = (lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if background else None
    parent = start(checkpoint, tmp_path, "--device", "cpu,cpu", preexec_fn=ignore)
    children = holders(tmp_path)
    parent.send_signal(end)
    parent.wait(20)
    wait_for(lambda: not any(map(alive, children)), seconds=10)


def children(job, what):
    """Those of its processes whose command says so."""
    found = map(int, Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split())
    return [pid for pid in found if what in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_the_check_of_a_finished_output_ends_with_the_one_that_started_it(checkpoint, tmp_path):
    assert start(checkpoint, tmp_path, "--device", "cpu,cpu", texts=4).wait(60) == 0
    (tmp_path / "o" / "part-00000.npy").unlink()
    parent = start(checkpoint, tmp_path, "--device", "cpu,cpu", "--resume", texts=4, again=True)
    wait_for(lambda: children(parent, b"--shard-index"))
    (child,) = children(parent, b"--shard-index")
    parent.kill()
    parent.wait()
    wait_for(lambda: not alive(child), seconds=20)
    assert not (tmp_path / "o" / "part-00000.npy").exists()


def test_tokenizers_end_with_the_job(checkpoint, tmp_path):
    job = start(checkpoint, tmp_path, "--device", "cpu", "--tokenizer-processes", "2")
    wait_for(lambda: len(children(job, b"spawn_main")) == 2)
    found = children(job, b"spawn_main")
    job.kill()
    job.wait()
    wait_for(lambda: not any(map(alive, found)), seconds=20)


@pytest.mark.parametrize("device", ["cpu", "cpu,cpu"])
def test_sigterm_is_one_line(device, checkpoint, tmp_path):
    """What a scheduler sends to take a machine back."""
    job = start(checkpoint, tmp_path, "--device", device, stderr=subprocess.PIPE)
    lock = tmp_path / "o" / ".lock"
    wait_for(lambda: lock.is_file() and lock.read_text()) if device == "cpu" else holders(tmp_path)
    job.send_signal(signal.SIGTERM)
    error = job.communicate(timeout=30)[1].decode()
    assert job.returncode == 1
    assert error.splitlines() == ["fastdistil: ended by SIGTERM; finished parts stay, go on with --resume"]


def test_ctrl_c_is_one_line(checkpoint, tmp_path):
    """The terminal sends it to the whole group."""

    def heed():  # what runs the tests may be in the background, where it is ignored, and that is inherited
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    options = dict(stderr=subprocess.PIPE, start_new_session=True, preexec_fn=heed)
    job = start(checkpoint, tmp_path, "--device", "cpu,cpu", **options)
    children = holders(tmp_path)
    os.killpg(job.pid, signal.SIGINT)
    error = job.communicate(timeout=30)[1].decode()
    assert job.returncode == 1 and not any(map(alive, children))
    assert error.splitlines() == ["fastdistil: interrupted; finished parts stay, go on with --resume"]


def test_other_shards_stay_until_there_is_something_in_their_place(checkpoint, tmp_path, capfd):
    path = jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS])
    given = ["embed", "--model", str(checkpoint), "--input", str(path), "--quiet", "--output", str(tmp_path / "o")]
    for i in range(3):
        shard = ["--num-shards", "3", "--shard-index", str(i), "--device", "cpu"]
        assert main([*given[:-1], str(shard_directory(tmp_path / "o", i, 3)), *shard]) == 0
    before, several = files(tmp_path / "o"), ["--device", "cpu,cpu", "--overwrite"]
    assert (
        main(["embed", "--model", str(tmp_path / "none"), *given[3:], *several]) == 1
        and files(tmp_path / "o") == before
    )
    with Lock(shard_directory(tmp_path / "o", 1, 3)):
        assert main([*given, *several]) == 1 and files(tmp_path / "o") == before
    assert "is writing to" in capfd.readouterr().err
    assert main([*given, *several]) == 0
    assert sorted(p.name for p in (tmp_path / "o").iterdir() if p.is_dir()) == []


def test_the_lock_of_a_shard_on_several_devices_stays(checkpoint, tmp_path, monkeypatch):
    """What it overwrites is in the directory that it holds."""
    path = jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS])
    given = ["embed", "--model", str(checkpoint), "--input", str(path), "--quiet", "--output", str(tmp_path / "o")]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    lock, seen = shard_directory(tmp_path / "o", 0, 2) / ".lock", []
    together = processes._together
    monkeypatch.setattr(processes, "_together", lambda *a: [together(*a), seen.append(lock.is_file())][0])
    assert main([*given, "--device", "cpu,cpu"]) == 0 and main([*given, "--device", "cpu,cpu", "--overwrite"]) == 0
    assert seen == [True, True]


def test_several_devices_lose_nothing(checkpoint, tmp_path, capfd):
    path = jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS])
    base = ["embed", "--model", str(checkpoint), "--quiet", "--device", "cpu,cpu"]
    # an input in the output's place
    (tmp_path / "in").mkdir()
    inside = jsonl(tmp_path / "in" / "part-00000.jsonl", [{"text": "a"}])
    assert main([*base, "--input", str(inside), "--output", str(tmp_path / "in"), "--overwrite"]) == 1
    assert "lies in the output directory" in capfd.readouterr().err and inside.exists()
    # somebody's file in a shard's directory
    notes = shard_directory(tmp_path / "o", 0, 2) / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    assert main([*base, "--input", str(path), "--output", str(tmp_path / "o"), "--overwrite"]) == 0
    assert notes.read_text() == "mine" and len(Index(tmp_path / "o").manifest.parts) == 2
    # shards of another division
    other = tmp_path / "p" / "shard-00000-of-00003"
    other.mkdir(parents=True)
    given = [*base, "--input", str(path), "--output", str(tmp_path / "p")]
    assert main(given) == 1 and main([*given, "--resume"]) == 1
    assert "holds shard-00000-of-00003, of a job on another number of devices" in capfd.readouterr().err
    (other / "part-00000.npy").write_bytes(b"in the making")
    with Lock(other):
        assert main([*given, "--overwrite"]) == 1 and (other / "part-00000.npy").exists()
    assert main([*given, "--overwrite"]) == 0 and not other.exists()
    # another's unfinished job on one device
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 1)
        with pytest.raises(Stop):
            module.run_job(*make_job(checkpoint, path, tmp_path / "q"), module.Log(True))
    before = files(tmp_path / "q")
    assert main([*base, "--input", str(path), "--output", str(tmp_path / "q"), "--resume"]) == 1
    assert "holds an unfinished job on one device" in capfd.readouterr().err and files(tmp_path / "q") == before
    # a resume of nothing beside somebody's file
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "notes.txt").write_text("mine")
    given = [*base, "--input", str(path), "--output", str(tmp_path / "r")]
    assert main(given) == 1 and main([*given, "--resume"]) == 0
    assert (tmp_path / "r" / "notes.txt").read_text() == "mine"
    # what a kill behind the merge left
    left = shard_directory(tmp_path / "r", 1, 2)
    left.mkdir()
    (left / "manifest.json").write_text("{}")
    assert main([*given, "--resume"]) == 0 and not left.exists()


def test_an_overwriting_job_on_several_devices_that_was_killed_goes_on(checkpoint, tmp_path):
    first = jsonl(tmp_path / "first.jsonl", [{"text": t} for t in TEXTS])
    arguments = ["embed", "--model", str(checkpoint), "--quiet", "--output", str(tmp_path / "o"), "--device", "cpu,cpu"]
    assert main([*arguments, "--input", str(first)]) == 0
    parent = start(checkpoint, tmp_path, "--device", "cpu,cpu", "--overwrite", texts=160_000, words=6)
    children, shards = holders(tmp_path), [shard_directory(tmp_path / "o", i, 2) for i in range(2)]
    wait_for(lambda: any(map(manifests.finished_parts, shards)))
    wait_for(lambda: not (tmp_path / "o" / "manifest.json").exists())  # there is something to put in its place
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(map(alive, children)), seconds=20)
    assert any(map(manifests.finished_parts, shards))
    assert main([*arguments, "--input", str(tmp_path / "in.jsonl"), "--resume"]) == 0
    assert Index(tmp_path / "o").manifest.rows == 160_000


def test_the_status_of_several_devices(checkpoint, heads, tmp_path, capfd):
    path = jsonl(tmp_path / "in.jsonl", [{"text": "a"}, {"text": None}, {"text": "b"}, {"text": "c"}])
    base = ["embed", "--model", str(checkpoint), "--input", str(path), "--quiet", "--device", "cpu,cpu"]
    base += ["--on-error", "skip", "--num-shards", "2", "--shard-index"]
    assert main([*base, "0", "--output", str(tmp_path / "o")]) == 3
    assert main([*base, "1", "--output", str(tmp_path / "o")]) == 0
    wrong = ["predict", "--task", "token-classification", "--top-k", "2", "--model", heads["token-classification"]]
    wrong += ["--input", str(path), "--output", str(tmp_path / "p"), "--device", "cpu,cpu"]
    assert main(wrong) == 2 and "--resume" not in capfd.readouterr().err
    assert main([*base, "0", "--output", str(tmp_path / "q"), "--device", "cpu,"]) == 2
    assert "leaves one between commas out" in capfd.readouterr().err


@pytest.mark.slow
def test_the_status_of_an_output_that_was_finished(checkpoint, tmp_path):
    """What was rejected still is, when there is nothing left to do."""
    path = jsonl(tmp_path / "in.jsonl", [{"text": "a"}, {"text": None}])
    base = ["embed", "--model", str(checkpoint), "--input", str(path), "--quiet", "--on-error", "skip"]
    for device in ("cpu", "cpu,cpu"):
        given = [*base, "--device", device, "--output", str(tmp_path / device), "--resume"]
        assert [main(given) for _ in range(2)] == [3, 3]


def test_under_torchrun_rejected_rows_are_no_failure(checkpoint, tmp_path, monkeypatch):
    """It would end the other processes, and every resumed run again."""
    path = jsonl(tmp_path / "in.jsonl", [{"text": None}, {"text": "b"}])
    given = ["--input", path, "--on-error", "skip"]
    assert embed(checkpoint, *given, "--output", tmp_path / "o") == 3
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert embed(checkpoint, *given, "--output", tmp_path / "p") == 0


def alive(pid):
    with contextlib.suppress(OSError):
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # empty when it has ended but nobody has asked how
    return False


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def test_a_process_a_device(checkpoint, embedder, tmp_path, capfd):
    path = jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS * 3])
    arguments = ["embed", "--model", str(checkpoint), "--input", str(path), "--output", str(tmp_path / "o"), "--quiet"]
    assert main([*arguments, "--device", "cpu,cpu"]) == 0
    assert sorted(p.name for p in (tmp_path / "o").iterdir() if p.is_dir()) == []
    ids, vectors = zip(*Index(tmp_path / "o").parts(), strict=True)
    assert [len(part) for part in ids] == [12, 12] and [i for part in ids for i in part] == list(range(24))
    np.testing.assert_allclose(np.concatenate(vectors), embedder.encode(TEXTS * 3), atol=1e-6)
    assert main([*arguments, "--device", "cpu,cpu", "--resume"]) == 0
    assert main([*arguments, "--device", "cpu,cpu", "--resume", "--output-dtype", "float16"]) == 1
    assert "output_dtype was 'float32', now 'float16'" in capfd.readouterr().err
    assert main([*arguments, "--device", "cpu,cpu"]) == 1
    assert "is not empty" in capfd.readouterr().err
    path.write_text(path.read_text() + "[]\n")
    assert main([*arguments, "--device", "cpu,cpu", "--overwrite"]) == 1
    err = capfd.readouterr().err
    assert "in.jsonl, line 25: a JSON list" in err and "the process on cpu ended with status 1" in err
    assert main([*arguments, "--device", "cuda:0,0"]) == 2
    assert "device cuda:0 is named twice" in capfd.readouterr().err


def test_a_merge_that_was_killed_goes_on(checkpoint, tmp_path, monkeypatch):
    merging = sys.modules["fastdistil.jobs.merge"]
    path = jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS * 3])
    arguments = ["embed", "--model", str(checkpoint), "--input", str(path), "--quiet", "--device", "cpu,cpu"]
    placed = merging._placed

    def dying(directory, part, output, number):
        if number:
            raise Stop
        return placed(directory, part, output, number)

    with monkeypatch.context() as patch:
        patch.setattr(merging, "_placed", dying)
        with pytest.raises(Stop):
            main([*arguments, "--output", str(tmp_path / "o")])
    assert (tmp_path / "o" / "part-00000.npy").exists()
    assert main([*arguments, "--output", str(tmp_path / "o"), "--resume"]) == 0
    assert [part.rows for part in Index(tmp_path / "o").manifest.parts] == [12, 12]


def test_a_repair_of_several_devices_output_that_is_stopped_goes_on(checkpoint, tmp_path, capfd, monkeypatch):
    path = jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS * 2])
    given = ["embed", "--model", str(checkpoint), "--input", str(path), "--output", str(tmp_path / "o")]
    given += ["--quiet", "--device", "cpu,cpu"]
    assert main(given) == 0
    whole = files(tmp_path / "o")
    (tmp_path / "o" / "part-00000.npy").unlink()
    settings = read_manifest(tmp_path / "o").settings
    with monkeypatch.context() as patch, pytest.raises(Stop):  # what the process that makes it whole leaves when killed
        stop_at(patch, 1)
        patch.setattr(module, "_settings", lambda job, inputs: settings)
        module.run_job(*make_job(checkpoint, path, tmp_path / "o"), module.Log(True))
    assert not read_manifest(tmp_path / "o").finished
    assert main([*given, "--resume"]) == 0 and files(tmp_path / "o").keys() == whole.keys()
    assert Index(tmp_path / "o").manifest.rows == 16


def test_a_pattern_that_matches_the_output(checkpoint, tmp_path):
    """Its directory has nothing to read, or only what the job wrote."""
    write("txt", tmp_path / "in.txt", LINES)
    for devices in ("cpu", "cpu,cpu"):
        given = ["--input", tmp_path / "*", "--output", tmp_path / "o", "--device", devices, "--overwrite"]
        for _ in range(2):
            assert embed(checkpoint, *given) == 0 and Index(tmp_path / "o").manifest.rows == len(LINES)


@pytest.mark.parametrize("lost", [[0], [1], [1, 3], [0, 1, 2, 3]])
def test_a_merged_output_that_lost_files(lost, checkpoint, tmp_path, monkeypatch):
    """Its parts are not those that one job would have cut."""
    path = jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS])
    for i in range(2):
        job, work = make_job(checkpoint, path, tmp_path / f"s{i}", shard=i, shards=2, part_rows=3)
        module.run_job(job, work, module.Log(True))
    merge([tmp_path / "s0", tmp_path / "s1"], tmp_path / "o")
    whole = files(tmp_path / "o")
    assert [part.rows for part in Index(tmp_path / "o").manifest.parts] == [3, 1, 3, 1]
    for i in lost:
        (tmp_path / "o" / f"part-{i:05d}.npy").unlink()
    with monkeypatch.context() as patch, pytest.raises(Stop):  # killed on its way
        stop_at(patch, lost[0] + 1)
        module.run_job(*make_job(checkpoint, path, tmp_path / "o", part_rows=3), module.Log(True))
    module.run_job(*make_job(checkpoint, path, tmp_path / "o", part_rows=3), module.Log(True))
    assert files(tmp_path / "o") == whole


# --- answers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def heads(minilm, tmp_path_factory):
    torch.manual_seed(0)
    names = {
        "fill-mask": "DistilBertForMaskedLM",
        "text-classification": "DistilBertForSequenceClassification",
        "token-classification": "DistilBertForTokenClassification",
        "question-answering": "DistilBertForQuestionAnswering",
    }
    out = {}
    for task, name in names.items():
        out[task] = str(tmp_path_factory.mktemp(task))
        getattr(fastdistil, name)(DistilBertConfig(**TINY, initializer_range=0.3)).save_pretrained(out[task])
        DistilBertTokenizer.from_pretrained(minilm).save_pretrained(out[task])
    return out


TASKS = [
    ("text-classification", [], {}),
    ("text-classification", ["--top-k", "2"], {"top_k": 2}),
    ("token-classification", [], {"aggregation_strategy": "simple"}),
    ("token-classification", ["--aggregation-strategy", "none"], {"aggregation_strategy": "none"}),
    ("question-answering", ["--question-column", "asked"], {}),
    ("question-answering", ["--question", "who?", "--top-k", "3"], {"top_k": 3}),
    ("question-answering", ["--question", "who?", "--top-k", "1"], {"top_k": 1}),
    ("fill-mask", [], {}),
]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize(("task", "args", "options"), TASKS, ids=[" ".join([t, *a]) for t, a, _ in TASKS])
def test_answers_are_columns(task, args, options, form, heads, tmp_path):
    texts = [f"word {'more ' * i}[MASK]" for i in range(6)]
    rows = [{"name": f"n{i}", "text": text, "asked": f"which {i}?"} for i, text in enumerate(texts)]
    rows[2]["text"] = {"fill-mask": "no mask", "question-answering": ""}.get(task)
    path = jsonl(tmp_path / "in.jsonl", rows)
    arguments = ["predict", "--task", task, "--model", heads[task], "--device", "cpu", "--quiet", "--input", str(path)]
    arguments += ["--id-column", "name", "--format", form, *args]
    for on_error in ("skip", "null"):
        out = tmp_path / on_error
        assert main([*arguments, "--output", str(out), "--on-error", on_error]) == 3
        if form == "jsonl":
            found = [json.loads(line) for line in (out / "part-00000.jsonl").read_text().splitlines()]
        else:
            found = parquet.read_table(out / "part-00000.parquet").to_pylist()
        keep = [i for i in range(6) if i != 2 or on_error == "null"]
        assert [row.pop("id") for row in found] == [f"n{i}" for i in keep]
        (reject,) = [json.loads(line) for line in (out / "part-00000.rejects.jsonl").read_text().splitlines()]
        assert reject["row"] == 2 and "inputs[" not in reject["reason"]
        if task == "question-answering":
            assert reject["reason"] == "the text cannot be empty"
        answer = fastdistil.pipeline(task, heads[task], device="cpu")
        for i, row in zip(keep, found, strict=True):
            if i == 2:
                assert set(row.values()) == {None}
                continue
            if task == "question-answering":
                asked = "who?" if "--question" in args else rows[i]["asked"]
                expected = answer(question=asked, context=texts[i], **options)
            else:
                expected = answer([texts[i]], **options)
                expected = expected[0] if task != "fill-mask" else expected
            wrapped = {"question-answering": "answers", "token-classification": "entities", "fill-mask": "guesses"}
            if task == "text-classification" and options:
                expected = {f"{k}s": [one[k] for one in expected] for k in ("label", "score")}
            elif task != "text-classification" and options != {"top_k": 1} and (options or task == "fill-mask"):
                expected = {wrapped[task]: [expected] if task == "fill-mask" else expected}
            alike(row, expected)


def alike(found, expected):
    """Equal but for scores, whose bits depend on the batch."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            alike(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            alike(one, other)
    else:
        near = isinstance(expected, (float, np.floating))
        assert found == (pytest.approx(float(expected), abs=1e-5) if near else expected)


@pytest.mark.parametrize(
    ("task", "args", "row", "bad", "reason"),
    [
        ("text-classification", ["--no-truncate"], {"text": "a"}, {"text": "x " * 99}, "is 101 tokens long"),
        ("question-answering", ["--question-column", "q"], {"text": "a", "q": "b"}, {"text": "", "q": "b"}, "the text"),
        ("fill-mask", [], {"text": "a [MASK]"}, {"text": "a"}, "No mask_token"),
    ],
)
def test_many_bad_rows_cost_little(task, args, row, bad, reason, heads, tmp_path, monkeypatch):
    """All of a call are named at once, so that the others are answered together and not a few at a time."""
    calls, real = [], Engine.run
    monkeypatch.setattr(Engine, "run", lambda self, *a, **k: calls.append(1) or real(self, *a, **k))
    path = jsonl(tmp_path / "in.jsonl", [bad if i % 7 == 3 else row for i in range(200)])
    given = ["predict", "--task", task, "--model", heads[task], "--input", str(path), "--quiet", "--device", "cpu"]
    assert main([*given, *args, "--on-error", "skip", "--output", str(tmp_path / "o")]) == 3
    rejects = [json.loads(line) for line in (tmp_path / "o" / "part-00000.rejects.jsonl").read_text().splitlines()]
    assert [r["row"] for r in rejects] == list(range(3, 200, 7)) and all(reason in r["reason"] for r in rejects)
    assert read_manifest(tmp_path / "o").rows == 200 - len(rejects) and len(calls) == 1


def test_what_goes_with_an_output_directory(heads, tmp_path, capsys, monkeypatch):
    path = jsonl(tmp_path / "in.jsonl", [{"text": "a"}])
    model = heads["text-classification"]
    arguments = ["predict", "--task", "text-classification", "--model", model, "--device", "cpu", "--input", str(path)]
    for more, message in [
        (["--resume"], "--resume goes with --output"),
        (["--on-error", "skip"], "--on-error skip and null go with --output"),
        (["--device", "cpu,cpu"], "several devices need an --output directory"),
    ]:
        assert main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments) == 2 and "each would print every answer" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    assert main(["predict", "--task", "feature-extraction", *arguments[3:], "--output", str(tmp_path / "o")]) == 1


# --- what is said -------------------------------------------------------------------------------------------------


def test_all_that_is_said_as_json(heads, tmp_path, capsys, monkeypatch):
    path = jsonl(tmp_path / "in.jsonl", [{"text": "a"}])
    arguments = ["predict", "--task", "text-classification", "--model", heads["text-classification"], "--device", "cpu"]
    warn = module.find_inputs
    monkeypatch.setattr(
        module, "find_inputs", lambda *a: logging.getLogger("fastdistil").warning("look out") or warn(*a)
    )
    assert main([*arguments, "--input", str(path), "--output", str(tmp_path / "o"), "--json-logs"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert events[0]["event"] == "message" and {"event": "warning", "text": "look out"}.items() <= events[1].items()


def test_json_logs(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "EVERY", 0.001)
    monkeypatch.setattr(module.Job, "__init__", _with(module.Job.__init__, part_rows=50))
    path = jsonl(tmp_path / "in.jsonl", [{"text": f"{t} {i}"} for i in range(50) for t in TEXTS])
    arguments = ["embed", "--model", str(checkpoint), "--device", "cpu", "--input", str(path), "--json-logs"]
    assert main([*arguments, "--output", str(tmp_path / "o")]) == 0
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "message" and kinds[-1] == "done" and kinds.count("part") == 8 and "progress" in kinds
    last = events[-1]
    assert (last["rows"], last["parts"], last["rejected"]) == (400, 8, 0)
    assert last["tokens_per_s"] > last["rows_per_s"] > 0 and last["bottleneck"] in ("model", "tokenizer")
    assert any(event["eta_s"] is not None for event in events if event["event"] in ("progress", "done"))


def test_progress_is_of_what_is_computed(checkpoint, tmp_path, monkeypatch):
    """Not of what is read or skipped: within a part, behind one that was finished, and of a shard."""
    path = jsonl(tmp_path / "in.jsonl", [{"text": f"text {i:04d}"} for i in range(1_000)])

    def job(**changes):
        seen, log = [], module.Log(True)
        made, work = make_job(checkpoint, path, tmp_path / f"o{len(changes)}", part_rows=500, **changes)
        put = work._put
        monkeypatch.setattr(work, "_put", lambda *a: put(*a) or seen.append(log.figures()))
        module.run_job(made, work, log)
        return seen, log.figures()

    seen, last = job()
    assert 0 < seen[1]["rows"] < 500 and last["rows"] == 1_000 and last["eta_s"] == 0
    assert 0 < seen[2]["tokens_per_s"] < 20 * seen[2]["rows_per_s"]  # five tokens a row
    (tmp_path / "o0" / "part-00001.npy").unlink()
    seen, last = job()  # goes on behind the first part
    assert seen[0]["rows"] == 500 and last["rows"] == 1_000
    rate = seen[1]["rows_per_s"]
    assert seen[1]["eta_s"] == pytest.approx((1_000 - seen[1]["rows"]) / rate, rel=0.1, abs=0.2)
    seen, last = job(shard=1, shards=4)
    assert last["rows"] == 250 and last["eta_s"] == 0


def test_progress_of_rows_that_lie_behind_one_another():
    progress = module.Progress([])
    progress.total, progress.before = 1_000, 600
    assert progress.rows_expected() is None
    progress.begin()
    assert progress.rows_expected() is None
    progress.before, progress.rows = 700, 50  # a quarter of what was left
    assert progress.rows_expected() == pytest.approx(200)


def test_without_pyarrow(checkpoint, tmp_path):
    """Everything but parquet and zstandard works, and these say what is missing."""
    write("parquet", tmp_path / "in.parquet")
    write("txt+.zst", tmp_path / "in.txt.zst", LINES)
    write("txt", tmp_path / "in.txt", LINES)
    code = textwrap.dedent("""
        import sys
        sys.modules["pyarrow"] = None
        from fastdistil.cli import main
        base = ["embed", "--model", sys.argv[1], "--device", "cpu", "--output", sys.argv[2] + "/o", "--input"]
        print([main([*base, sys.argv[2] + name]) for name in ("/in.txt", "/in.parquet", "/in.txt.zst")])
        print(main([*base, sys.argv[2] + "/in.txt", "--format", "parquet", "--overwrite"]))
    """)
    command = [sys.executable, "-c", code, str(checkpoint), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[0, 1, 1]\n1\n"
    assert "parquet needs pyarrow; install fastdistil[arrow], or choose another --format" in done.stderr


def test_starting_is_quick(checkpoint, tmp_path):
    """Without transformers, pyarrow or Triton: what an import costs is paid in every process."""
    path = jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS])
    names = ("transformers", "pyarrow", "triton", "sentence_transformers", "pandas")
    code = (
        f"import sys; from fastdistil.cli import main; main(sys.argv[1:]); print([*sys.modules.keys() & {{*{names}}}])"
    )
    arguments = ["embed", "--model", checkpoint, "--device", "cpu", "--input", path, "--output", tmp_path / "o"]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr
    assert time.perf_counter() - start < 60


# --- what a long job meets ----------------------------------------------------------------------------------------


def test_shards_of_which_one_failed_on_a_row_are_merged(checkpoint, tmp_path, monkeypatch, capfd):
    """It goes on with another --on-error; that of the others made no difference."""
    rows = [{"text": t} for t in TEXTS]
    rows[6]["text"] = 3
    path = jsonl(tmp_path / "in.jsonl", rows)
    given = ["--input", path, "--output", tmp_path / "o", "--device", "cpu,cpu"]
    assert embed(checkpoint, *given) == 1
    assert "in.jsonl, line 7: column 'text' is 3, not a string" in capfd.readouterr().err
    assert embed(checkpoint, *given, "--resume", "--on-error", "skip") == 3
    assert (Index(tmp_path / "o").manifest.rows, Index(tmp_path / "o").manifest.rejected) == (7, 1)
    assert read_manifest(tmp_path / "o").settings["on_error"] == "skip"
    # two that rejected rows must have treated them alike
    rows[0]["text"] = None
    path = jsonl(tmp_path / "in.jsonl", rows)
    for shard, policy in enumerate(("skip", "null")):
        monkeypatch.setenv("RANK", str(shard))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert embed(checkpoint, "--input", path, "--output", tmp_path / "p", "--on-error", policy) == 3
    monkeypatch.delenv("RANK"), monkeypatch.delenv("WORLD_SIZE")
    assert main(["merge", str(tmp_path / "p"), "--output", str(tmp_path / "q")]) == 1
    assert "on_error was 'skip', now 'null'" in capfd.readouterr().err


def test_a_budget_that_memory_made_smaller_is_gone_on_with(checkpoint, tmp_path, monkeypatch):
    path = jsonl(tmp_path / "in.jsonl", [{"text": f"a {'word ' * (i % 30)}"} for i in range(120)])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    once, compute = [], Embedder._compute

    def out_of_memory(self, ids, *args):
        if not once and len(ids) > 50:
            once.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, ids, *args)

    monkeypatch.setattr(Embedder, "_compute", out_of_memory)
    budgets = []
    for output in ("whole", "stopped"):
        once.clear()
        job, work = make_job(checkpoint, path, tmp_path / output, part_rows=30)
        work.engine.budget = 400
        if output == "stopped":
            with monkeypatch.context() as patch:
                stop_at(patch, 2)
                with pytest.raises(Stop):
                    module.run_job(job, work, module.Log(True))
            job, work = make_job(checkpoint, path, tmp_path / output, part_rows=30)
            work.engine.budget = 400
        done = module.run_job(job, work, module.Log(True))
        budgets.append([part.budget for part in done.parts])
    assert budgets[0] == budgets[1] and max(budgets[0]) < 400
    names = [f"part-{i:05d}.npy" for i in range(4)]
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "stopped" / n).read_bytes() for n in names)


def test_an_output_that_is_replaced_meanwhile_ends_the_job(checkpoint, tmp_path, monkeypatch):
    path = jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS])
    commit = module.commit

    def replaced(directory, part):
        commit(directory, part)
        if part.number == 1:
            (tmp_path / "o").rename(tmp_path / "away")
            (tmp_path / "o").mkdir()

    monkeypatch.setattr(module, "commit", replaced)
    with pytest.raises(OSError, match="was moved or replaced while the job wrote there"):
        module.run_job(*make_job(checkpoint, path, tmp_path / "o"), module.Log(True))
    assert not list((tmp_path / "o").iterdir()) and (tmp_path / "away" / "part-00001.done.json").exists()


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_answers_are_kept_small_until_they_are_written(heads, tmp_path, form, monkeypatch):
    """Of a token with a label an entity is kept, as text or in Arrow's memory, not as Python's objects."""
    from fastdistil.jobs import predict

    monkeypatch.setattr(predict, "AT_ONCE", 3)
    task = "token-classification"
    rows = [{"text": t} for t in [*TEXTS, None, "the end"]]
    path = jsonl(tmp_path / "in.jsonl", rows)
    base = ["predict", "--task", task, "--model", heads[task], "--device", "cpu", "--quiet", "--input", str(path)]
    kept, write_part = [], predict.Prediction.write

    def write(self, directory, name, part, keep):
        kept.extend(part.answers)
        return write_part(self, directory, name, part, keep)

    monkeypatch.setattr(predict.Prediction, "write", write)
    assert main([*base, "--output", str(tmp_path / "o"), "--format", form, "--on-error", "null"]) == 3
    assert len(kept) == 3
    inner = [one for chunk in kept for one in (chunk if form == "jsonl" else chain(*chunk.values()))]
    assert all(isinstance(one, str if form == "jsonl" else pyarrow.Array) for one in inner)
    pipe = fastdistil.pipeline(task, heads[task], device="cpu")
    expected = [None if row["text"] is None else pipe(row["text"], aggregation_strategy="simple") for row in rows]
    if form == "parquet":
        found = parquet.read_table(tmp_path / "o" / "part-00000.parquet").to_pylist()
    else:
        found = [json.loads(line) for line in (tmp_path / "o" / "part-00000.jsonl").read_text().splitlines()]
    assert [row["id"] for row in found] == list(range(10))
    for one, other in zip(found, expected, strict=True):
        if other is None:
            assert one["entities"] is None
            continue
        assert [e["word"] for e in one["entities"]] == [e["word"] for e in other]
        assert [e["score"] for e in one["entities"]] == pytest.approx([float(e["score"]) for e in other], abs=1e-5)
    assert read_manifest(tmp_path / "o").settings["part_characters"] == predict.A_TOKENS_CHARACTERS


CHANGES = {
    "the weights": (lambda m, p: touch_weights(p), "the model's files"),
    "the budget": (["--max-batch-tokens", "77"], "max_batch_tokens was"),
    "the threads": (lambda m, p: m.setattr(torch, "get_num_threads", lambda: 7), "threads was"),
    "the column": (["--text-column", "other"], "columns was"),
    "truncation": (["--no-truncate"], "truncate was True, now False"),
    "the length": (["--max-length", "9"], "max_length was"),
    "the prompt": (["--prompt", "query: "], "prompt was '', now 'query: '"),
    "the pooling": (["--pooling", "cls"], "pooling was"),
    "the dtype": (["--dtype", "bfloat16"], "dtype was 'float32', now 'bfloat16'"),
    "the output's dtype": (["--output-dtype", "float16"], "output_dtype was"),
    "the format": (["--format", "safetensors"], "format was"),
    "fastdistil": (lambda m, p: m.setattr(fastdistil, "__version__", "9"), "fastdistil was"),
    "torch": (lambda m, p: m.setattr(torch, "__version__", "9.9.9"), "torch was"),
    "tokenizers": (lambda m, p: m.setattr(importlib.metadata, "version", lambda name: "9"), "tokenizers was"),
    "the parts": (lambda m, p: m.setattr(fastdistil.cli, "PART_CHARACTERS", 5), "part_characters was"),
    "the dimensions": (["--truncate-dim", "8"], "truncate_dim was None, now 8"),
    "the ids": (["--id-column", "other"], "columns was"),
}


def touch_weights(directory):
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("change", CHANGES)
def test_no_job_goes_on_as_another(change, checkpoint, tmp_path, monkeypatch, capsys):
    """Each thing that decides what comes out, by the command line."""
    model = shutil.copytree(checkpoint, tmp_path / "model")
    path = jsonl(tmp_path / "in.jsonl", [{"text": t, "other": t} for t in TEXTS])
    given = ["--input", path, "--output", tmp_path / "o", "--format", "npy", "--resume"]
    assert embed(model, *given) == 0
    before = files(tmp_path / "o")
    how, message = CHANGES[change]
    more = how if isinstance(how, list) else how(monkeypatch, model) or []
    assert embed(model, *given, *more) == 1
    assert "holds a job that differs from this one" in (said := capsys.readouterr().err) and message in said
    assert files(tmp_path / "o") == before


@pytest.mark.parametrize(
    ("task", "first", "then", "message"),
    [
        ("question-answering", ["--question", "who?"], ["--question", "what?"], "question was 'who?', now 'what?'"),
        ("question-answering", ["--question", "who?"], ["--question", "who?", "--top-k", "2"], "options was"),
        ("text-classification", [], ["--top-k", "2"], "options was"),
        ("question-answering", ["--question-column", "text"], ["--question-column", "other"], "columns was"),
        ("token-classification", [], ["--aggregation-strategy", "first"], "options was"),
        ("text-classification", [], ["--max-batch-tokens", "77"], "max_batch_tokens was"),
        ("text-classification", [], ["--no-truncate"], "options was"),
    ],
)
def test_no_prediction_goes_on_as_another(task, first, then, message, heads, tmp_path, capsys):
    path = jsonl(tmp_path / "in.jsonl", [{"text": "a text", "other": "a text"}])
    base = ["predict", "--task", task, "--model", heads[task], "--device", "cpu", "--quiet", "--input", str(path)]
    base += ["--output", str(tmp_path / "o"), "--resume"]
    assert main([*base, *first]) == 0
    assert main([*base, *then]) == 1 and message in capsys.readouterr().err


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """And its name before the job goes on: also where the machine loses its power."""
    order, fsync, rename = [], os.fsync, os.replace

    def synced(number):
        order.append(f"sync {Path(os.readlink(f'/proc/self/fd/{number}')).name}")
        fsync(number)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(f"rename {Path(b).name}"), rename(a, b))[1])
    manifests.write_text(tmp_path / "a.json", "{}")
    assert order == ["sync a.json.tmp", "rename a.json", f"sync {tmp_path.name}"]


def test_a_large_row_group_is_read_in_pieces(tmp_path):
    texts = [f"text {i}" for i in range(10_000)]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "in.parquet", row_group_size=20_000)
    import pyarrow.parquet as reader

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader.ParquetFile, "read_row_group", lambda *a, **k: pytest.fail("all of it at once"))
        rows = list(read_rows([tmp_path / "in.parquet"], Columns()))
        assert [row.text for row in rows] == texts
        for skip in (1, 4_095, 4_096, 9_999):
            left = list(read_files([str(tmp_path / "in.parquet")], Columns(), skip=skip))
            assert [row.text for row in left] == texts[skip:] and left[0].where.endswith(f"row {skip}")


def test_inputs_that_are_no_texts(tmp_path):
    wide = jsonl(tmp_path / "wide.jsonl", [{f"column {i}": i for i in range(2_000)}])
    (row,) = read_rows([wide], Columns())
    assert "'column 9' and 1,990 more" in row.error and len(row.error) < 300
    for name in ("a.jsonl.gz", "a.txt.zst"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(OSError, match="is empty, which no packed file is"):
            list(read_rows([tmp_path / name], Columns()))
    (tmp_path / "empty.txt").write_bytes(b"")
    assert list(read_rows([tmp_path / "empty.txt"], Columns())) == []
    for encoding in ("UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"):
        for text in ("some text\nmore\n", "\nsome text\n", "é\nü\n"):
            (tmp_path / "a.txt").write_bytes(text.encode(encoding))
            with pytest.raises(ValueError, match=f"looks like {encoding} without a mark.* iconv -f {encoding}"):
                list(read_rows([tmp_path / "a.txt"], Columns()))
    for content in (b"a\0b text\nmore\n", b"a\0\nabc\n", b"\0\nabc\n"):
        (tmp_path / "a.txt").write_bytes(content)
        assert len(list(read_rows([tmp_path / "a.txt"], Columns()))) == 2


def test_answers_that_nobody_could_read_are_refused(heads, tmp_path):
    path = jsonl(tmp_path / "in.jsonl", [{"text": "a"}])
    command = [sys.executable, "-m", "fastdistil", "predict", "--task", "text-classification", "--quiet"]
    command += ["--model", heads["text-classification"], "--device", "cpu", "--input", str(path)]
    found = subprocess.run(["bash", "-c", '"$@" >&-', "-", *command], capture_output=True, text=True, check=False)
    assert found.returncode == 2 and "standard output is closed; give --output" in found.stderr


def test_answers_that_no_array_holds_together(monkeypatch):
    """Arrow's arrays of text end at 2 GiB: pieces are never joined, whoever is left out."""
    from fastdistil.jobs import predict

    kind = pyarrow.list_(pyarrow.string())
    pieces = [pyarrow.array(rows, kind) for rows in ([["a"], ["b"]], [], [["c"], None], [["d"]])]
    monkeypatch.setattr(pyarrow, "concat_arrays", lambda *_: pytest.fail("joined"))
    for at, expected in (
        ([0, 1, 2, 3, 4], [["a"], ["b"], ["c"], None, ["d"]]),
        ([None, 0, None, 2, None, 4, None], [None, ["a"], None, ["c"], None, ["d"], None]),
        ([1, 4], [["b"], ["d"]]),
        ([None], [None]),
        ([], []),
    ):
        assert predict._placed(pieces, at, kind).to_pylist() == expected
    assert predict._placed([], [None, None], kind).to_pylist() == [None, None]
    several = pyarrow.chunked_array(pieces[2:])
    made = predict.Prediction(None, "text-classification", "parquet", {})
    monkeypatch.setattr(pyarrow, "array", lambda *_: several)
    assert made._packed([])["label"] == several.chunks


def test_an_empty_job_whose_output_was_replaced_touches_nothing(checkpoint, tmp_path, monkeypatch):
    path = jsonl(tmp_path / "in.jsonl", [])
    run = module.Embedding.run

    def replaced(self, parts):
        yield from run(self, parts)
        (tmp_path / "o").rename(tmp_path / "away")
        (tmp_path / "o").mkdir()
        (tmp_path / "o" / "part-00000.npy").write_bytes(b"another's")

    monkeypatch.setattr(module.Embedding, "run", replaced)
    with pytest.raises(OSError, match="was moved or replaced"):
        module.run_job(*make_job(checkpoint, path, tmp_path / "o"), module.Log(True))
    assert files(tmp_path / "o") == {"part-00000.npy": b"another's"}


# --- whose answer is whose --------------------------------------------------------------------------------------------


@pytest.fixture
def small_windows(monkeypatch):
    """A part of eight rows has three of them."""
    monkeypatch.setattr("fastdistil.engine.scheduler.HEAD", 3)
    monkeypatch.setattr("fastdistil.engine.scheduler.WINDOW", 4)


@pytest.mark.parametrize("of_tokens", [False, True])
def test_parts_of_several_windows(of_tokens, small_windows, checkpoint, embedder, tmp_path):
    """More than the 4,096 rows of a first one, as parts usually are."""
    path, more = jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS]), []
    if of_tokens:
        ids = embedder.tokenizer.encode_ids(TEXTS, 64)
        path, more = tmp_path / "in.parquet", ["--tokens-column", "input_ids"]
        parquet.write_table(pyarrow.table({"input_ids": ids}), path)
    assert embed(checkpoint, "--input", path, "--output", tmp_path / "o", *more) == 0
    found = np.load(tmp_path / "o" / "part-00000.npy")
    np.testing.assert_allclose(found, [embedder.encode(t) for t in TEXTS], atol=1e-6)


def test_a_text_without_memory_is_rejected_alone(small_windows, checkpoint, embedder, tmp_path, monkeypatch):
    path = jsonl(tmp_path / "in.jsonl", [{"text": t} for t in [1, "a", "b", "word " * 50, "c", "d", "word " * 40, "e"]])
    compute = Embedder._compute

    def limited(self, ids, *rest):
        if len(ids) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, ids, *rest)

    monkeypatch.setattr(Embedder, "_compute", limited)
    assert embed(checkpoint, "--input", path, "--output", tmp_path / "o", "--on-error", "skip") == 3
    rejects = [json.loads(line) for line in (tmp_path / "o" / "part-00000.rejects.jsonl").read_text().splitlines()]
    assert [(r["row"], "no memory" in r["reason"]) for r in rejects] == [(0, False), (3, True), (6, True)]
    found = np.load(tmp_path / "o" / "part-00000.npy")
    np.testing.assert_allclose(found, [embedder.encode(t) for t in "abcde"], atol=1e-6)


def test_answers_of_halves_that_are_tried_by_themselves(heads, tmp_path, monkeypatch):
    """Where the pipeline says of one row that there is no memory for it."""
    texts = ["one", "two", "bad", "three", "four"]
    path = jsonl(tmp_path / "in.jsonl", [{"text": t} for t in texts])

    def ready(self, inputs, **options):
        def answers():
            if "bad" in inputs:
                raise MemoryError(f"inputs[{inputs.index('bad')}]: there is no memory for it")
            return [{"label": text, "score": 1.0} for text in inputs]

        return answers

    monkeypatch.setattr("fastdistil.pipelines.TextClassificationPipeline.ready", ready)
    command = ["predict", "--task", "text-classification", "--model", heads["text-classification"], "--device", "cpu"]
    command += ["--quiet", "--input", str(path), "--output", str(tmp_path / "o"), "--on-error", "skip"]
    assert main([*command, "--format", "jsonl"]) == 3
    rows = [json.loads(line) for line in (tmp_path / "o" / "part-00000.jsonl").read_text().splitlines()]
    assert [(row["id"], row["label"]) for row in rows] == [(0, "one"), (1, "two"), (3, "three"), (4, "four")]
    (reject,) = (tmp_path / "o" / "part-00000.rejects.jsonl").read_text().splitlines()
    assert json.loads(reject)["row"] == 2 and "no memory" in json.loads(reject)["reason"]


REPEATED = ["a cat", "it sat", "a cat", "word " * 600, "a cat", "it sat", "word " * 600, "on a mat", "a cat"]


@pytest.mark.parametrize("task", ["text-classification", "question-answering"])
def test_rows_that_ask_for_the_same_are_answered_once(task, heads, tmp_path, monkeypatch):
    asked = ["who?", "who?", "what?", "who?", "who?", "who?", "who?", "who?", "what?"]
    rows = [{"text": t, "asked": q} for t, q in zip(REPEATED, asked, strict=True)]
    path, of_spans = jsonl(tmp_path / "in.jsonl", rows), task == "question-answering"
    expected = fastdistil.pipeline(task, heads[task], device="cpu")
    seen, run = [], Pipeline.run
    monkeypatch.setattr(
        Pipeline, "run", lambda self, given, *a, **k: seen.append(len(given)) or run(self, given, *a, **k)
    )
    command = ["predict", "--task", task, "--model", heads[task], "--device", "cpu", "--quiet", "--input", str(path)]
    command += ["--question-column", "asked"] if of_spans else ["--no-truncate"]
    command += ["--output", str(tmp_path / "o"), "--format", "jsonl", "--on-error", "skip"]
    if of_spans:
        expected({"question": "who?", "context": REPEATED[3]})
        windows = seen.pop()  # of the long text
    assert main(command) == (0 if of_spans else 3)
    found = [json.loads(line) for line in (tmp_path / "o" / "part-00000.jsonl").read_text().splitlines()]
    kept = [i for i, text in enumerate(REPEATED) if of_spans or len(text) < 99]
    assert [row.pop("id") for row in found] == kept
    if of_spans:
        assert seen == [4 + windows]
    else:  # once with the long text, once without
        assert seen == [4, 3]
        rejects = [json.loads(line) for line in (tmp_path / "o" / "part-00000.rejects.jsonl").read_text().splitlines()]
        assert [r["row"] for r in rejects] == [3, 6] and rejects[0]["reason"] == rejects[1]["reason"]
        assert "602 tokens" in rejects[0]["reason"]
    for i, row in zip(kept, found, strict=True):
        alone = expected({"question": asked[i], "context": REPEATED[i]} if of_spans else [REPEATED[i]])
        assert row == pytest.approx(alone if of_spans else alone[0], abs=1e-6)


@pytest.mark.parametrize("task", ["text-classification", "token-classification", "question-answering", "fill-mask"])
def test_texts_are_tokenised_while_a_gpu_is_busy(task, heads, tmp_path, monkeypatch):
    """Of the next call, of the next part too; on CPU that would take the model's cores."""
    texts = [f"a cat sat on mat [MASK] {i}" for i in range(11)]
    texts[6], bad = "a cat" if task == "fill-mask" else "", task in ("fill-mask", "question-answering")
    path = jsonl(tmp_path / "in.jsonl", [{"text": t, "asked": "who?"} for t in texts])
    monkeypatch.setattr("fastdistil.jobs.predict.AT_ONCE", 2)
    events, ready, run = [], Pipeline.ready, Pipeline.run

    def readied(self, *args, **options):
        events.append(("ready", threading.current_thread() is threading.main_thread()))
        return ready(self, *args, **options)

    def ran(self, *args, **options):
        events.append(("run", threading.current_thread() is threading.main_thread()))
        if on_gpu and (calls := runs()) < 6:  # until the next one is on its way
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline and readies() <= calls:
                time.sleep(0.01)
            meanwhile.append(readies() > calls)
        yield from run(self, *args, **options)

    on_gpu, meanwhile = False, []
    readies = lambda: events.count(("ready", False))  # noqa: E731
    runs = lambda: [what for what, _ in events].count("run")  # noqa: E731

    monkeypatch.setattr(Pipeline, "ready", readied)
    monkeypatch.setattr(Pipeline, "run", ran)
    command = ["predict", "--task", task, "--model", heads[task], "--device", "cpu", "--quiet", "--input", str(path)]
    command += ["--question-column", "asked"] if task == "question-answering" else []
    command += ["--format", "jsonl", "--on-error", "skip"]
    monkeypatch.setattr(cli, "Job", functools.partial(cli.Job, part_rows=4))
    status = 3 if bad else 0
    assert main([*command, "--output", str(tmp_path / "cpu")]) == status
    on_cpu, on_gpu = [*events], True
    events.clear()
    monkeypatch.setattr(Pipeline, "device", property(lambda self: torch.device("cuda")))
    assert main([*command, "--output", str(tmp_path / "gpu")]) == status
    written = lambda o: {n: b for n, b in files(tmp_path / o).items() if n.startswith("part")}  # noqa: E731
    assert written("gpu") == written("cpu") and len(written("cpu")) >= 3
    assert all(main for _, main in on_cpu) and all(main for what, main in events if what == "run")
    calls = [main for what, main in events if what == "ready"]
    assert calls.count(False) == 6 and calls.count(True) == (1 if bad else 0)  # those left beside what is wrong
    assert len(meanwhile) == 5 and all(meanwhile)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_texts_that_there_was_no_memory_for_are_made_ready_once_more(device, heads, tmp_path, monkeypatch):
    task, ready, times = "text-classification", Pipeline.ready, []

    def hungry(self, *args, **options):
        times.append(threading.current_thread() is threading.main_thread())
        if len(times) == 1:
            raise MemoryError("while the model is at work")
        return ready(self, *args, **options)

    monkeypatch.setattr(Pipeline, "ready", hungry)
    monkeypatch.setattr(Pipeline, "device", property(lambda self: torch.device(device)))
    path = jsonl(tmp_path / "in.jsonl", [{"text": "a cat"}, {"text": "a dog"}])
    command = ["predict", "--task", task, "--model", heads[task], "--device", "cpu", "--quiet", "--input", str(path)]
    assert main([*command, "--output", str(tmp_path / "o"), "--format", "jsonl"]) == 0
    assert len((tmp_path / "o" / "part-00000.jsonl").read_text().splitlines()) == 2
    assert times == [device == "cpu", True]


IDLE = """
import functools, sys, torch
from fastdistil import cli
from fastdistil.jobs import predict
from fastdistil.pipelines import Pipeline
predict.AT_ONCE, cli.Job = 2, functools.partial(cli.Job, part_rows=2)
if sys.argv.pop(1) == "cuda":
    Pipeline.device = property(lambda self: torch.device("cuda"))
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("end", ["interrupt", "bad row"])
def test_a_job_ends_while_its_input_is_idle(end, device, heads, tmp_path):
    """Where rows are read ahead, too, and the bad row that is named is the first."""
    task, output = "text-classification", tmp_path / "o"
    command = [sys.executable, "-c", IDLE, device, "predict", "--task", task, "--model", heads[task], "--device", "cpu"]
    command += ["--quiet", "--input", "-", "--output", str(output), "--format", "jsonl", "--no-truncate"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as job:
        rows = [{"text": f"a cat {i}"} for i in range(4)] + [{"text": "word " * 600}] * (end == "bad row")
        rows += [{"text": "a dog"}] * (end == "bad row")
        job.stdin.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        job.stdin.flush()
        deadline = time.monotonic() + 60
        while not (output / "part-00000.jsonl").exists() and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if end == "interrupt":
            job.send_signal(signal.SIGINT)
        assert job.wait(30) == 1
        said = job.stderr.read().decode()
    assert "interrupted; finished parts stay" in said if end == "interrupt" else "line 5: is 602 tokens long" in said
    assert "Fatal Python error" not in said and (output / "part-00000.jsonl").exists()


def test_the_first_failure_is_the_one_that_is_told(checkpoint, tmp_path):
    """Also where a later row's was met meanwhile, by who reads ahead."""
    path = jsonl(tmp_path / "in.jsonl", [{"text": "a"}, {"text": 4}])
    (job, *_) = make_job(checkpoint, path, tmp_path / "o")
    reading = module._Reading(read_rows([str(path)], Columns()), job, 0, 9, 0, [])
    reading.failure = first = ValueError("of a part before")
    assert list(reading) == [] and reading.failure is first


@pytest.mark.parametrize("slow", ["tokenizer", "model"])
def test_what_a_prediction_waits_for(slow, heads, tmp_path, monkeypatch, capsys):
    of_model, of_pipeline = (fastdistil.DistilBertModel, "forward_packed"), (TextClassificationPipeline, "prepare")
    where, name = of_model if slow == "model" else of_pipeline
    method = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *a, **k: time.sleep(0.5) or method(*a, **k))
    path = jsonl(tmp_path / "in.jsonl", [{"text": "a cat"}])
    task = "text-classification"
    command = ["predict", "--task", task, "--model", heads[task], "--device", "cpu", "--input", str(path)]
    assert main([*command, "--json-logs", "--output", str(tmp_path / "o")]) == 0
    assert json.loads(capsys.readouterr().err.splitlines()[-1])["bottleneck"] == slow


def test_a_job_goes_on_behind_a_part_that_left_rows_out(checkpoint, tmp_path, monkeypatch):
    path = jsonl(tmp_path / "in.jsonl", [{"text": t} for t in ["a", "b", "c", 4, "e", "f", "g"]])
    module.run_job(*make_job(checkpoint, path, tmp_path / "whole", on_error="skip"), module.Log(True))
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Stop):
            module.run_job(*make_job(checkpoint, path, tmp_path / "o", on_error="skip"), module.Log(True))
    module.run_job(*make_job(checkpoint, path, tmp_path / "o", on_error="skip"), module.Log(True))
    assert files(tmp_path / "o") == files(tmp_path / "whole")
    assert [row for ids, _ in Index(tmp_path / "o").parts() for row in ids] == [0, 1, 2, 4, 5, 6]


@pytest.mark.parametrize(
    ("how", "options"),
    [
        (["--pooling", "cls", "--normalize"], {"pooling": "cls", "normalize": True}),
        (["--max-length", "8", "--truncate-dim", "7"], {"max_length": 8, "truncate_dim": 7}),
    ],
)
def test_a_question_is_embedded_as_the_index_was(how, options, checkpoint, tmp_path, capsys):
    path = jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS])
    assert embed(checkpoint, "--input", path, "--output", tmp_path / "o", *how) == 0
    query = "a long question of more than eight tokens about a cat that sat"
    assert main(["search", "--index", str(tmp_path / "o"), "--json", "--quiet", "--top-k", "8", query]) == 0
    own = Embedder.from_pretrained(checkpoint, "cpu", **options)
    scores = own.encode(TEXTS) @ own.encode(query)
    hits = json.loads(capsys.readouterr().out)["hits"]
    assert {hit["id"]: hit["score"] for hit in hits} == pytest.approx(dict(enumerate(scores.tolist())), abs=1e-5)


def test_an_index_is_searched_from_elsewhere(checkpoint, tmp_path, monkeypatch, capsys):
    shutil.copytree(checkpoint, tmp_path / "model")
    path = jsonl(tmp_path / "in.jsonl", [{"text": "a"}])
    monkeypatch.chdir(tmp_path)
    assert embed("model", "--input", path, "--output", tmp_path / "o") == 0
    monkeypatch.chdir("/")
    assert main(["search", "--index", str(tmp_path / "o"), "--quiet", "a"]) == 0
    assert "  0" in capsys.readouterr().out


def test_an_input_that_changes_while_the_last_part_is_written(checkpoint, tmp_path, monkeypatch):
    path, write_ = jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS]), module._write

    def changing(job, lock, manifest, work, part):
        if part.number == 3:
            with open(path, "a") as file:
                file.write('{"text": "more"}\n')
        return write_(job, lock, manifest, work, part)

    monkeypatch.setattr(module, "_write", changing)
    with pytest.raises(ValueError, match=r"the input in.jsonl changed while it was read"):
        module.run_job(*make_job(checkpoint, path, tmp_path / "o"), module.Log(True))
    assert not read_manifest(tmp_path / "o").finished


def test_nothing_is_left_of_a_job_that_an_empty_one_replaces(checkpoint, tmp_path):
    path = jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS])
    module.run_job(*make_job(checkpoint, path, tmp_path / "o"), module.Log(True))
    empty = jsonl(tmp_path / "empty.jsonl", [])
    module.run_job(*make_job(checkpoint, empty, tmp_path / "o", resume=False, overwrite=True), module.Log(True))
    assert list(files(tmp_path / "o")) == ["manifest.json"]


def test_a_local_rank_has_a_gpu_of_its_own(monkeypatch):
    seen = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cli, "embed", lambda arguments: seen.append(arguments.device))
    for device, found in (([], "cuda:1"), (["--device", "cpu"], "cpu")):
        assert main(["embed", "--model", "m", "--input", "i", "--output", "o", *device]) == 0
        assert seen.pop() == found
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["embed", "--model", "m", "--input", "i", "--output", "o"]) == 0 and seen == [None]


def test_processes_have_ended_when_one_has_failed(tmp_path):
    """So that what they write is not written behind the message."""
    marks = [tmp_path / "a", tmp_path / "b"]
    slow = (
        "import os, sys, time\ntry: os.read(int(os.environ['%s']), 1)\nfinally: time.sleep(1); open(sys.argv[1], 'w')"
    )
    code = [slow % processes.LIFELINE, "import sys, time; time.sleep(0.5); open(sys.argv[1], 'w'); sys.exit(1)"]
    commands = [[sys.executable, "-c", text, str(mark)] for text, mark in zip(code, marks, strict=True)]
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(processes.Failed, match="the process on two ended with status 1"):
        processes._together(["one", "two"], commands, dict(os.environ), [], [])
    assert all(mark.exists() for mark in marks)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_processes_have_ended_when_one_could_not_start(tmp_path):
    """Nor is their lock given up before."""
    mark = tmp_path / "a"
    code = (
        "import os, sys, time\ntry: os.read(int(os.environ['%s']), 1)\nfinally: time.sleep(1); open(sys.argv[1], 'w')"
    )
    commands = [[sys.executable, "-c", code % processes.LIFELINE, str(mark)], ["./nowhere"]]
    with pytest.raises(FileNotFoundError):
        processes._together(["one", "two"], commands, dict(os.environ), [], [])
    assert mark.exists()


def test_ids_that_are_no_text_in_every_format(checkpoint, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"id": "\\ud800", "text": "a"}\n')
    for form in ("npy", "safetensors", "parquet", "jsonl"):
        given = ["--input", path, "--output", tmp_path / form, "--format", form, "--id-column", "id"]
        assert embed(checkpoint, *given) == 0
        ((ids, _),) = Index(tmp_path / form).parts()
        assert ids == ["\\ud800" if form == "parquet" else "\ud800"]
