"""What becomes of files: their names, their lines, tables and row groups."""

import csv
import gzip
import json
import os
import zlib

import numpy as np
import pytest

from fastdistil.jobs.manifest import apart
from fastdistil.jobs.readers import Columns, count_rows, find_inputs, read_files, read_rows

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def texts_of(path, columns=Columns()):  # noqa: B008
    return [row.error or row.text for row in read_rows([path], columns)]


@pytest.mark.parametrize("name", ["in.ndjson", "in.JSONL", "in.NdJson.GZ", "in.CSV", "in.Csv.GZ", "in.TSV", "in.TXT"])
def test_names_tell_a_format_however_they_are_written(name, tmp_path):
    kind = name.lower().split(".")[1]
    content = {
        "csv": "text,n\na,1\nb,2\n",
        "tsv": "text\tn\na\t1\nb\t2\n",
        "txt": "a\nb\n",
    }.get(kind, '{"text": "a"}\n{"text": "b"}\n')
    packed = gzip.compress(content.encode()) if name.lower().endswith(".gz") else content.encode()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / name).write_bytes(packed)
    assert texts_of(tmp_path / "deep" / name) == ["a", "b"]
    assert find_inputs([tmp_path]) == [str(tmp_path / "deep" / name)]


def test_files_of_a_directory_come_in_the_order_of_their_names(tmp_path, monkeypatch):
    """On every machine the same, or shards would overlap."""
    for name in ("b.txt", "a.txt", "c.txt"):
        (tmp_path / name).write_text("x\n")
    walk = os.walk
    for order in (False, True):
        monkeypatch.setattr(
            os, "walk", lambda *a, o=order, **k: ((p, d, sorted(f, reverse=o)) for p, d, f in walk(*a, **k))
        )
        assert find_inputs([tmp_path]) == [str(tmp_path / name) for name in ("a.txt", "b.txt", "c.txt")]


def test_blank_lines_of_a_table_are_no_rows(tmp_path):
    (tmp_path / "in.csv").write_text("text,n\na,1\n\n\nb,2\n\n")
    rows = list(read_rows([tmp_path / "in.csv"], Columns(id="n")))
    assert [(row.number, row.id, row.text) for row in rows] == [(0, "1", "a"), (1, "2", "b")]
    assert count_rows([str(tmp_path / "in.csv")], Columns()) == 2
    assert [row.text for row in read_files([str(tmp_path / "in.csv")], Columns(), skip=1)] == ["b"]


def test_a_cell_may_be_long(tmp_path):
    csv.field_size_limit(131_072)  # as it is in a new process
    (tmp_path / "in.csv").write_text(f"text\n{'x' * 200_000}\nb\n")
    assert [len(text) for text in texts_of(tmp_path / "in.csv")] == [200_000, 1]


@pytest.mark.parametrize("kind", [pyarrow.list_(pyarrow.int32()), pyarrow.large_list(pyarrow.int64())], ids=str)
def test_token_ids_from_the_middle_of_a_row_group(kind, tmp_path):
    ids = [None if i == 5 else list(range(i, i + i % 7 + 1)) for i in range(2_000)]
    parquet.write_table(pyarrow.table({"input_ids": pyarrow.array(ids, kind)}), tmp_path / "in.parquet")
    columns = Columns(tokens="input_ids")
    path = str(tmp_path / "in.parquet")
    for skip in (0, 3, 6, 1_000, 1_024, 1_500, 1_999):
        rows = list(read_files([path], columns, skip=skip))
        assert [row.number for row in rows] == list(range(skip, 2_000))
        for row, expected in zip(rows, ids[skip:], strict=True):
            assert (row.error is not None) if expected is None else np.array_equal(row.text, expected)


def test_a_null_among_token_ids_spoils_its_row_alone(tmp_path):
    column = pyarrow.array([[1, 2], [3, None], [4]], pyarrow.list_(pyarrow.int32()))
    parquet.write_table(pyarrow.table({"input_ids": column}), tmp_path / "in.parquet")
    rows = list(read_rows([tmp_path / "in.parquet"], Columns(tokens="input_ids")))
    assert [row.error is None for row in rows] == [True, False, True]
    assert "[3, null], not a list of token ids" in rows[1].error


def test_a_deep_line_spoils_no_other(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": ' + "[" * 100_000 + '\n{"text": "b"}\n')
    first, second = texts_of(tmp_path / "in.jsonl")
    assert "not JSON" in first and second == "b"


def test_a_packed_file_that_is_damaged_within(tmp_path):
    texts = [f"text {i * 7919 % 10_007}" for i in range(5_000)]
    packed = bytearray(gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in texts).encode()))
    seen = set()
    for at in range(200, len(packed) - 200, 37):  # flips that end the unpacking
        damaged = packed.copy()
        damaged[at] ^= 0xFF
        try:
            gzip.decompress(bytes(damaged))
        except zlib.error:
            (tmp_path / "in.jsonl.gz").write_bytes(damaged)
            with pytest.raises(OSError, match=r"in.jsonl.gz cannot be read to its end: Error -3"):
                list(read_rows([tmp_path / "in.jsonl.gz"]))
            seen.add(at)
        except (OSError, EOFError):
            continue
        if len(seen) == 3:
            break
    assert seen


def test_plain_text_has_no_questions(tmp_path):
    (tmp_path / "in.txt").write_text("a\n")
    with pytest.raises(ValueError, match="is plain text, which has no column 'q'"):
        list(read_rows([tmp_path / "in.txt"], Columns(question="q")))


def test_truth_is_no_id(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a", "id": true}\n{"text": "b", "id": 1}\n')
    first, second = read_rows([tmp_path / "in.jsonl"], Columns(id="id"))
    assert "id column 'id' is true, not a string or integer" in first.error and second.id == 1


def test_what_is_read_and_written_in_one_place(tmp_path, monkeypatch):
    """Named by itself, from within, or by a link."""
    (tmp_path / "deep" / "o").mkdir(parents=True)
    output = tmp_path / "deep" / "o"
    own, other = output / "part-00000.jsonl", tmp_path / "other.jsonl"
    for path in (own, other):
        path.write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"part-00000.jsonl lies in the output directory"):
        apart([str(own), str(other)], [str(own), str(other)], output)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"lies in the input directory \.; give another"):
        apart(["."], ["other.jsonl"], output)
    (tmp_path / "link").symlink_to(tmp_path / "deep")
    with pytest.raises(ValueError, match=r"lies in the input directory .*link; give another"):
        apart([str(tmp_path / "link")], [str(other)], output)
