"""What makes a job the same job: digests of its model and inputs, its lock, its files."""

import errno
import gc
import json
import os
from itertools import chain

import numpy as np
import pytest

from fastdistil.jobs import merge as module
from fastdistil.jobs.index import Index
from fastdistil.jobs.manifest import (
    SAMPLE,
    Lock,
    Manifest,
    Part,
    commit,
    fingerprint_of_files,
    fingerprint_of_model,
    is_whole,
    part_name,
    read_manifest,
    write_manifest,
    write_text,
)
from fastdistil.jobs.merge import merge
from fastdistil.jobs.writers import write_columns, write_embeddings, write_lines


def make(directory, rows, shard=0, shards=1, first=0, budget=0, **settings):
    """A finished job of parts of two rows, whose values are the rows' numbers."""
    directory.mkdir(parents=True)
    settings = {"shard": shard, "shards": shards, "on_error": "fail", "inputs": [["in", 9, 1, "ab"]]} | settings
    manifest = Manifest("embed", "m", settings.pop("format", "npy"), settings, 3)
    for number, start in enumerate(range(first, first + rows, 2)):
        ids = list(range(start, min(start + 2, first + rows)))
        values = np.repeat(np.array(ids, np.float32)[:, None], 3, 1)
        names = write_embeddings(directory, part_name(number), manifest.format, ids, values, False)
        sizes = {name: (directory / name).stat().st_size for name in names}
        manifest.parts.append(Part(number, start, len(ids), len(ids), sizes, 0, budget))
    manifest.finished, manifest.rows = True, rows
    write_manifest(directory, manifest)
    return directory


def files(directory):
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir()) if p.is_file() and p.name != ".lock"}


# --- digests ----------------------------------------------------------------------------------------------------------


def test_whatever_decides_of_a_model_is_in_its_digest(tmp_path):
    (tmp_path / "m" / "2_Dense").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "vocab.txt", "old.bin", "2_Dense/model.safetensors"):
        (tmp_path / "m" / name).write_text(name)
    seen = {fingerprint_of_model(tmp_path / "m")}
    for name in ("config.json", "model.safetensors", "vocab.txt", "old.bin", "2_Dense/model.safetensors"):
        (tmp_path / "m" / name).write_text(name.upper())
        seen.add(fingerprint_of_model(tmp_path / "m"))
    assert len(seen) == 6
    (tmp_path / "m" / "vocab.txt").rename(tmp_path / "m" / "words.txt")  # in the same place among the names
    assert fingerprint_of_model(tmp_path / "m") not in seen
    (tmp_path / "m" / "words.txt").rename(tmp_path / "m" / "vocab.txt")
    (tmp_path / "m" / "README.md").write_text("of no matter")
    assert fingerprint_of_model(tmp_path / "m") in seen


def test_both_ends_of_an_input_are_in_its_digest(tmp_path):
    path, content = tmp_path / "in.txt", bytearray(3 * SAMPLE)
    digests = []
    for at in (None, 0, -1):
        changed = content.copy()
        if at is not None:
            changed[at] = 1
        path.write_bytes(changed)
        ((name, size, _, digest),) = fingerprint_of_files([str(path)])
        assert (name, size) == ("in.txt", 3 * SAMPLE)
        digests.append(digest)
    assert len(set(digests)) == 3


# --- files ------------------------------------------------------------------------------------------------------------


def test_writing_leaves_nothing_open(tmp_path):
    write_text(tmp_path / "a", "x")
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        write_text(tmp_path / "a", "x")
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("form", ["npy", "safetensors", "parquet", "jsonl", "answers"])
def test_a_part_is_on_the_disk_before_it_has_its_name(form, tmp_path, monkeypatch):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    order, fsync, rename = [], os.fsync, os.replace

    def synced(number):
        order.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{number}"))))
        fsync(number)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(("name", b.name)), rename(a, b))[1])
    if form == "answers":
        names = write_lines(tmp_path, "part-00000", [1], ['{"label": "a"}'])
    else:
        names = write_embeddings(tmp_path, "part-00000", form, [1], np.ones((1, 3), np.float32), False)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    for name in names:
        assert order.index(("sync", f"{name}.tmp")) < order.index(("name", name))


def test_a_lock_names_its_own_process_alone(tmp_path):
    (tmp_path / ".lock").write_text("123456789")  # of one that was killed
    with Lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    assert (tmp_path / ".lock").read_text() == ""


# --- an index ---------------------------------------------------------------------------------------------------------


def test_no_more_hits_than_asked_for(tmp_path):
    index = Index(make(tmp_path / "o", 7))
    ((*hits,),) = index.search(np.ones((1, 3), np.float32), top_k=2)
    assert hits == [(6, 18.0), (5, 15.0)]
    with pytest.raises(ValueError, match="top_k is 0; it must be 1 or more"):
        index.search(np.ones((1, 3), np.float32), top_k=0)


class Harm:
    def __reduce__(self):
        return os.mkdir, (os.environ["HARM"],)


def test_an_index_is_no_program(tmp_path, monkeypatch):
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    made = make(tmp_path / "o", 2)
    np.save(made / "part-00000.npy", np.array([Harm()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"part-00000.npy is not a readable npy file"):
        Index(made).search(np.ones((1, 3), np.float32))
    assert not (tmp_path / "harm").exists()


def test_an_index_of_whole_numbers_is_none(tmp_path):
    made = make(tmp_path / "o", 2)
    np.save(made / "part-00000.npy", np.ones((2, 3), np.int64))
    with pytest.raises(ValueError, match=r"part-00000.npy is int64 \[2, 3\]; the manifest says \[2, 3\]"):
        Index(made).search(np.ones((1, 3), np.float32))


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model_digest": "x"}, "the model's files"),
        ({"inputs": [["in", 9, 1, "cd"]]}, "the input in (content)"),
        ({"inputs": [["in", 8, 1, "ab"]]}, "the input in (size: was 9)"),
        ({"inputs": [["on", 9, 1, "ab"]]}, "the input on (name: was in)"),
        ({"format": "safetensors"}, "format was 'npy', now 'safetensors'"),
        ({"pooling": "cls"}, "pooling was None, now 'cls'"),
        ({"inputs": [["in", 9, 1]]}, "the input in (content)"),
        ({"inputs": [["in", 9, 2, "ab"]]}, None),  # a copy of the input, elsewhere
        ({"threads": 5, "device": "cuda", "max_batch_tokens": 5}, None),
    ],
    ids=str,
)
def test_shards_of_other_jobs_are_not_merged(change, what, tmp_path):
    one, two = make(tmp_path / "a", 3, 0, 2), make(tmp_path / "b", 3, 1, 2, 3, **change)
    if what is None:
        assert merge([one, two], tmp_path / "o").rows == 6
        return
    with pytest.raises(ValueError, match=r"b is of another job than .*a: ") as caught:
        merge([one, two], tmp_path / "o")
    assert str(caught.value).endswith(what) and not (tmp_path / "o").exists()


@pytest.mark.parametrize("way", ["link", "round"])
def test_a_shard_is_not_merged_into_itself(way, tmp_path):
    one, two = make(tmp_path / "a", 3, 0, 2), make(tmp_path / "b", 3, 1, 2, 3)
    (tmp_path / "link").symlink_to(one)
    before = files(one)
    with pytest.raises(ValueError, match="is one of the shards"):
        merge([one, two], {"link": tmp_path / "link", "round": one / ".." / "a"}[way], overwrite=True)
    assert files(one) == before


def test_nothing_of_an_earlier_job_is_left_beside_what_is_merged(tmp_path, monkeypatch):
    one, two = make(tmp_path / "a", 3, 0, 2), make(tmp_path / "b", 3, 1, 2, 3)
    old = make(tmp_path / "o", 20)
    with Lock(old), pytest.raises(BlockingIOError, match="another job"):
        merge([one, two], old, overwrite=True)
    assert read_manifest(old).rows == 20

    def dying(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_placed", dying)
        with pytest.raises(KeyboardInterrupt):
            merge([one, two], old, overwrite=True)
        assert not read_manifest(old).finished  # no manifest of other parts
    merge([one, two], old, overwrite=True)
    assert sorted(files(old)) == sorted(
        [f"part-{i:05d}{e}" for i in range(4) for e in (".npy", ".ids.jsonl")] + ["manifest.json"]
    )
    ids, values = zip(*Index(old).parts(), strict=True)
    assert list(chain.from_iterable(ids)) == list(range(6)) and np.concatenate(values)[:, 0].tolist() == list(range(6))


def test_where_links_cannot_be_made_files_are_copied(tmp_path, monkeypatch):
    """And with a part goes the budget it was computed by."""
    one, two = make(tmp_path / "a", 3, 0, 2, budget=77), make(tmp_path / "b", 3, 1, 2, 3)

    def apart(*args, **kwargs):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", apart)
    merged = merge([one, two], tmp_path / "o")
    assert [part.budget for part in merged.parts] == [77, 77, 0, 0]
    assert [part.budget for part in read_manifest(tmp_path / "o").parts] == [77, 77, 0, 0]
    assert (tmp_path / "o" / "part-00000.npy").stat().st_nlink == 1
    assert all(is_whole(shard, part) for shard in (one, two) for part in read_manifest(shard).parts)
    assert list(chain.from_iterable(ids for ids, _ in Index(tmp_path / "o").parts())) == list(range(6))


def test_a_record_of_a_part_holds_what_it_was(tmp_path):
    commit(tmp_path, Part(3, 6, 2, 1, {"a": 5}, 1, 77))
    told = json.loads((tmp_path / "part-00003.done.json").read_text())
    assert Part(**told) == Part(3, 6, 2, 1, {"a": 5}, 1, 77)


def test_an_index_is_searched_whatever_it_says_of_inputs(tmp_path):
    """An earlier version told no digests."""
    index = Index(make(tmp_path / "o", 3, inputs=[["in", 9, 1]]))
    assert [identity for identity, _ in index.search(np.ones((1, 3), np.float32))[0]] == [2, 1, 0]


def test_numbers_of_answers_are_wide(tmp_path):
    """Scores as JSON has them, tokens and places that no text outgrows."""
    pyarrow = pytest.importorskip("pyarrow")
    columns = {"score": [0.1], "start": [2**40], "all": [[{"label": "a", "score": 0.1}]]}
    kinds = {"score": "float", "start": "int", "all": [{"label": "string", "score": "float"}]}
    (name,) = write_columns(tmp_path, "part-00000", "parquet", [0], columns, False, kinds)
    schema = pyarrow.parquet.read_schema(tmp_path / name)
    assert (schema.field("score").type, schema.field("start").type) == (pyarrow.float64(), pyarrow.int64())
    assert schema.field("all").type.value_type.field("score").type == pyarrow.float64()
    assert pyarrow.parquet.read_table(tmp_path / name).to_pylist() == [
        {"id": 0} | {k: v[0] for k, v in columns.items()}
    ]


@pytest.mark.parametrize("left", ["finished", "a part", "a part's record", "nothing"])
def test_a_merge_that_was_begun_is_one_of_nothing_else(left, tmp_path):
    """A job that ran there, with the shards of another one beside it, is not written over as one."""
    out = tmp_path / "o"
    out.mkdir()
    for i in range(2):
        make(out / f"shard-0000{i}-of-00002", 3, i, 2, 3 * i)
    manifest = read_manifest(out / "shard-00000-of-00002")
    parts, manifest.parts = manifest.parts, []
    manifest.finished, manifest.settings["shards"], manifest.settings["shard"] = left == "finished", 1, 0
    if left == "a part":
        manifest.parts = parts
    write_manifest(out, manifest)
    if left == "a part's record":
        commit(out, parts[0])
    assert module._is_begun(out) is (left == "nothing")
