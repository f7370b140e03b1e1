"""The command line as a user runs it, and the index it writes."""

import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import fastdistil
from fastdistil import DistilBertConfig, DistilBertTokenizer, Embedder, cli
from fastdistil.cli import main
from fastdistil.jobs.index import Index
from fastdistil.jobs.readers import Columns, checked, read_rows

ROWS = [
    {"name": f"row {i}", "text": t}
    for i, t in enumerate(["a cat sat", "read a CSV file", "", "naïve 中文", "x " * 300])
]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n")
    return path


def embed(minilm, *args):
    return main(["embed", "--model", str(minilm), "--device", "cpu", *map(str, args)])


@pytest.mark.parametrize("form", ["npy", "safetensors"])
def test_embed_and_search(form, minilm, jsonl, tmp_path, capsys):
    out = tmp_path / "index"
    assert embed(minilm, "--input", jsonl, "--output", out, "--id-column", "name", "--format", form) == 0
    assert "float32" in capsys.readouterr().err
    files = sorted(p.name for p in out.iterdir())
    assert files == sorted([".lock", "manifest.json", f"part-00000.{form}", "part-00000.ids.jsonl"])
    path = out / f"part-00000.{form}"
    got = np.load(path) if form == "npy" else load_file(path)["embeddings"]
    expected = Embedder.from_pretrained(minilm, device="cpu").encode([row["text"] for row in ROWS])
    np.testing.assert_allclose(got, expected, atol=2e-6)
    ids = [json.loads(line) for line in (out / "part-00000.ids.jsonl").read_text().splitlines()]
    assert ids == [row["name"] for row in ROWS]
    assert main(["search", "--index", str(out), "--quiet", "comma separated values", "kitten"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "comma separated values" and lines[1].endswith("row 1") and lines[5].endswith("row 0")
    assert len(lines) == 8
    assert main(["search", "--index", str(out), "--json", "--top-k", "1", "kitten"]) == 0
    assert json.loads(capsys.readouterr().out)["hits"][0]["id"] == "row 0"


def test_doctor_where_there_are_no_file_locks():
    """As on Windows, which only this stands in for."""
    code = "import sys; sys.modules['fcntl'] = None; from fastdistil.cli import main; sys.exit(main(['doctor']))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_prompts_and_fewer_numbers(minilm, jsonl, tmp_path, capsys):
    model, out = tmp_path / "model", tmp_path / "index"
    shutil.copytree(minilm, model)
    (model / "config_sentence_transformers.json").write_text('{"prompts": {"query": "find: ", "passage": "text: "}}')
    given = ("--input", jsonl, "--output", out, "--prompt-name", "passage", "--truncate-dim", 100)
    assert embed(model, *given) == 0
    settings = Index(out).manifest.settings
    assert (settings["prompt"], settings["truncate_dim"], settings["normalize"]) == ("text: ", 100, None)
    whole = Embedder.from_pretrained(minilm, device="cpu")
    ((_, found),) = Index(out).parts()
    expected = whole.encode(["text: " + row["text"] for row in ROWS])[:, :100]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert embed(model, *given[:-3], "query", *given[-2:], "--resume") == 1
    assert "prompt was 'text: ', now 'find: '" in capsys.readouterr().err
    for how in (("--prompt-name", "query"), ("--prompt", "find: ")):
        assert main(["search", "--index", str(out), "--json", "--top-k", "1", *how, "--quiet", "kitten"]) == 0
        (hit,) = json.loads(capsys.readouterr().out)["hits"]
        np.testing.assert_allclose(hit["score"], (expected @ whole.encode("find: kitten")[:100]).max(), atol=1e-5)
    with pytest.raises(SystemExit) as caught:
        embed(model, *given, "--prompt", "x")
    assert caught.value.code == 2
    assert embed(model, *given, "--tokens-column", "ids") == 2
    assert "go with texts, not with --tokens-column" in capsys.readouterr().err


def test_text_file_several_inputs_and_options(minilm, jsonl, tmp_path):
    text = tmp_path / "lines.txt"
    text.write_bytes(b"\xef\xbb\xbffirst\r\n\r\nthird without end")
    out = tmp_path / "index"
    args = ("--input", text, jsonl, "--output", out, "--no-normalize", "--pooling", "cls", "--max-length", 8, "--quiet")
    assert embed(minilm, *args) == 0
    manifest = Index(out).manifest
    assert manifest.rows == 8
    assert [manifest.settings[name] for name in ("pooling", "normalize", "max_length")] == ["cls", False, 8]
    ((ids, embeddings),) = Index(out).parts()
    assert ids == list(range(8))
    own = Embedder.from_pretrained(minilm, "cpu", pooling="cls", normalize=False, max_length=8)
    np.testing.assert_allclose(embeddings[:3], own.encode(["first", "", "third without end"]), atol=1e-5)


def test_standard_input_without_the_column_is_refused(monkeypatch):
    for lines, error in (
        ('{"txt": "one"}\n', "no column 'text' among 'txt'"),
        ('"text"\n', None),
        ('["text"]\n', None),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        if error is None:
            assert [row.text for row in read_rows(["-"])] == [lines.strip()]
            continue
        with pytest.raises(ValueError, match=f"standard input, line 1: {error}"):
            list(checked(read_rows(["-"])))


@pytest.mark.parametrize(
    "lines", ['{"text": "one"}\n{"text": "two"}\n', "one\ntwo\n", '\n  \n{"text": "one"}\n\n{"text": "two"}']
)
def test_standard_input(lines, minilm, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert embed(minilm, "--input", "-", "--output", tmp_path / "o", "--quiet") == 0
    ((_, got),) = Index(tmp_path / "o").parts()
    np.testing.assert_allclose(got, Embedder.from_pretrained(minilm, "cpu").encode(["one", "two"]), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("csv", 'n,text\na,"one, or 1"\nb,two\n'),
        ("tsv", "n\ttext\na\tone, or 1\nb\ttwo\n"),
        ("txt", "one, or 1\ntwo\n"),
    ],
)
def test_the_format_of_standard_input_and_of_files_of_other_names(kind, lines, minilm, tmp_path, monkeypatch, capsys):
    (tmp_path / "data").write_text(lines)
    named = [] if kind == "txt" else ["--id-column", "n"]
    for given in ("-", tmp_path / "data"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        out = tmp_path / f"o{given == '-'}"
        assert embed(minilm, "--input", given, "--input-format", kind, *named, "--output", out, "--quiet") == 0
        ((ids, got),) = Index(out).parts()
        assert list(ids) == ([0, 1] if kind == "txt" else ["a", "b"])
        np.testing.assert_allclose(got, Embedder.from_pretrained(minilm, "cpu").encode(["one, or 1", "two"]), atol=1e-6)
    assert embed(minilm, "--input", tmp_path / "data", "--output", out, "--quiet", "--resume", *named) == 1
    assert f"input_format was '{kind}', now None" in capsys.readouterr().err
    (tmp_path / "own.jsonl").write_text('{"text": "one"}\n')  # its name tells
    assert [r.text for r in read_rows([tmp_path / "own.jsonl"], Columns(kind=kind))] == ["one"]
    own = ("--input", tmp_path / "own.jsonl", "--output", tmp_path / "own", "--quiet")
    assert embed(minilm, *own) == 0 and embed(minilm, *own, "--resume", "--input-format", kind) == 0


@pytest.mark.parametrize(
    ("packed", "by"),
    [(gzip.compress(b"one\n", mtime=0), "gzip"), (b"\x28\xb5\x2f\xfd\n", "zstandard")],
    ids=["gzip", "zstandard"],  # else of the bytes, which hold the time
)
def test_packed_standard_input_is_named(packed, by, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(packed)))
    with pytest.raises(ValueError, match=f"standard input is packed by {by}"):
        list(read_rows(["-"]))


@pytest.fixture
def terminate():
    """What SIGTERM does is as it was afterwards."""
    before = signal.getsignal(signal.SIGTERM)
    yield lambda: os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)


def test_sigterm_belongs_to_the_command_for_its_time(terminate, monkeypatch, capsys):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    during = []

    def command(arguments):
        try:
            terminate()
            time.sleep(5)
        finally:
            during.append(signal.getsignal(signal.SIGTERM))

    monkeypatch.setattr(cli, "doctor", command)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "fastdistil: ended by SIGTERM\n"  # which has no parts, and no --resume
    assert during == [signal.SIG_DFL]  # a second one ends it at once
    monkeypatch.setattr(cli, "doctor", lambda arguments: during.append(signal.getsignal(signal.SIGTERM)))
    assert cli.main(["doctor"]) == 0 and callable(during[1]) and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    for own in (signal.SIG_IGN, lambda *_: None):  # of somebody who calls it
        signal.signal(signal.SIGTERM, own)
        assert cli.main(["doctor"]) == 0 and during[-1] is own and signal.getsignal(signal.SIGTERM) is own
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    found = []
    thread = threading.Thread(target=lambda: found.append(cli.main(["doctor"])))
    thread.start()
    thread.join()
    assert found == [0] and during[-1] == signal.SIG_DFL


@pytest.mark.parametrize(
    ("given", "stays"),
    [("a.txt", "; finished parts stay, go on with --resume"), ("-", "; finished parts stay")],
)
def test_what_stays_after_ctrl_c_is_what_can_go_on(given, stays, monkeypatch, capsys):
    def command(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "embed", command)
    assert cli.main(["embed", "--model", "m", "--input", given, "--output", "o"]) == 1
    assert capsys.readouterr().err == f"fastdistil: interrupted{stays}\n"


def test_blank_lines_of_plain_text_stay_rows(monkeypatch):
    for lines, texts in (("\n\n", ["", ""]), ("\n\na\n\n", ["", "", "a", ""]), ("", [])):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        rows = list(read_rows(["-"]))
        assert [row.text for row in rows] == texts
        assert [row.where for row in rows] == [f"standard input, line {n + 1}" for n in range(len(texts))]


def test_a_directory_in_use_is_refused_and_overwriting_spares_other_files(minilm, jsonl, tmp_path, capsys):
    out = tmp_path / "index"
    assert embed(minilm, "--input", jsonl, "--output", out, "--quiet") == 0
    (out / "notes.txt").write_text("mine")
    assert embed(minilm, "--input", jsonl, "--output", out, "--quiet") == 1
    assert "is not empty" in capsys.readouterr().err
    assert embed(minilm, "--input", jsonl, "--output", out, "--quiet", "--overwrite") == 0
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": ', "in.jsonl, line 2: not JSON"),
        (b'{"text": "a"}\n[1]', "in.jsonl, line 2: a JSON list"),
        (b'{"words": "a"}', "in.jsonl, line 1: no column 'text' among 'words'"),
        (b'{"text": null}', "in.jsonl, line 1: column 'text' is null"),
        (b'{"text": "a\xff"}', "in.jsonl, line 1: not UTF-8"),
        (b'{"text": "\\ud800"}', "in.jsonl, line 1: the text holds a lone surrogate"),
        (b'{"text": "a", "name": 1.5}', "line 1: id column 'name' is 1.5"),
    ],
)
def test_bad_rows_are_named_with_status_1(content, message, minilm, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_bytes(content)
    args = () if b"name" not in content else ("--id-column", "name")
    assert embed(minilm, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "o", "--overwrite", *args) == 1
    assert message in capsys.readouterr().err


def test_missing_things_and_wrong_use(minilm, jsonl, tmp_path, capsys):
    assert embed(minilm, "--input", tmp_path / "none", "--output", tmp_path / "o") == 1
    assert "no input file" in capsys.readouterr().err
    assert main(["embed", "--model", "/none", "--input", str(jsonl), "--output", str(tmp_path / "o")]) == 1
    assert "there is no directory /none" in capsys.readouterr().err
    assert main(["search", "--index", str(tmp_path), "q"]) == 1
    assert "it is no index" in capsys.readouterr().err
    for args in ([], ["embed"], ["embed", "--model", "m", "--input", "a", "--output", "o", "--max-length", "0"]):
        with pytest.raises(SystemExit) as caught:
            main(args)
        assert caught.value.code == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["parts"][0]["files"].update({"../part-00000.npy": 3}), "must lie in the same directory"),
        (lambda m: m["parts"][0]["files"].update({"/etc/passwd": 3}), "must lie in the same directory"),
        (lambda m: m["parts"][0]["files"].update({"gone.npy": 3}), "gone.npy, which is not there"),
        (lambda m: m["parts"][0].update(rows=4), "the manifest says [4, 384]"),
        (lambda m: m["parts"][0].update(rows=-1), "rows is -1"),
        (lambda m: m.update(version=1), "its version is 1, this one reads 2"),
        (lambda m: m.update(format="pickle"), "format 'pickle', not an index"),
        (lambda m: m.update(task="fill-mask"), "the task 'fill-mask'"),
        (lambda m: m.update(finished=False), "its job did not finish"),
        (lambda m: m.pop("settings"), "is not a manifest"),
        (lambda m: m.update(parts=[3]), "is not a manifest"),
        (lambda m: m["settings"].update(inputs=5), "is not a manifest of finished work: settings.inputs is 5"),
        (lambda m: m["settings"].update(inputs=[[]]), "settings.inputs is [[]]"),
    ],
)
def test_bad_indexes(change, message, minilm, jsonl, tmp_path, capsys):
    out = tmp_path / "index"
    assert embed(minilm, "--input", jsonl, "--output", out, "--quiet") == 0
    shutil.copy(out / "part-00000.npy", tmp_path / "part-00000.npy")
    manifest = json.loads((out / "manifest.json").read_text())
    change(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert main(["search", "--index", str(out), "--quiet", "q"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("part-00000.npy", b"\x93NUMPY\x01\x00garbage", "is not a readable npy file"),
        ("part-00000.npy", b"", "is not a readable npy file"),
        ("part-00000.ids.jsonl", b"1\n2\n", "has 2 ids for 5 rows"),
        ("part-00000.ids.jsonl", b"{\n" * 5, "does not hold a JSON id a line"),
        ("manifest.json", b"{", "is not a manifest"),
        ("manifest.json", b"[]", "it holds a JSON list"),
    ],
)
def test_damaged_index_files(name, content, message, minilm, jsonl, tmp_path, capsys):
    out = tmp_path / "index"
    assert embed(minilm, "--input", jsonl, "--output", out, "--quiet") == 0
    (out / name).write_bytes(content)
    assert main(["search", "--index", str(out), "--quiet", "q"]) == 1
    assert message in capsys.readouterr().err


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("torch:", "triton:", "cuda:", "C compiler:", "kernel cache:", "attention", "cpu (eager torch)"):
        assert word in out


def test_the_installed_command(minilm):
    done = subprocess.run([sys.executable, "-m", "fastdistil.cli", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("fastdistil ")


def test_a_job_that_cannot_start_leaves_the_old_index(minilm, jsonl, tmp_path, capsys):
    out = tmp_path / "index"
    assert embed(minilm, "--input", jsonl, "--output", out, "--quiet") == 0
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "empty").mkdir()
    for wrong in (tmp_path / "missing.txt", tmp_path / "empty", tmp_path / "bad.jsonl"):
        assert embed(minilm, "--input", wrong, "--output", out, "--overwrite", "--quiet") == 1
        assert Index(out).manifest.rows == len(ROWS)
    assert "holds no .txt" in capsys.readouterr().err


def test_ids_with_line_separators_and_surrogates(minilm, tmp_path, capsys):
    ids = ["x\u2028y", "a\u0085b", "new\nline", "\ud800"]
    lines = [json.dumps({"text": "t", "id": i}, ensure_ascii=i == "\ud800") for i in ids]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    assert embed(minilm, "--input", tmp_path / "in.jsonl", "--id-column", "id", "--output", tmp_path / "o") == 0
    assert next(Index(tmp_path / "o").parts())[0] == ids
    for how in (["--json"], []):
        assert main(["search", "--index", str(tmp_path / "o"), "--top-k", "4", "--quiet", *how, "t"]) == 0
        printed = capsys.readouterr().out
        assert "\\ud800" in printed and "x\u2028y" in printed
        assert not how or [hit["id"] for hit in json.loads(printed)["hits"]] == ids


def test_more_wrong_use(minilm, jsonl, tmp_path, capsys):
    (tmp_path / "lines.txt").write_text("a")
    out = ("--output", tmp_path / "o", "--overwrite")
    for args, message in (
        (("--input", tmp_path / "lines.txt", "--id-column", "id", *out), "has no id column 'id'"),
        (("--input", jsonl, "--device", "foo", *out), "device 'foo'"),
    ):
        assert embed(minilm, *args) == 1
        assert message in capsys.readouterr().err
    assert embed(minilm, "--input", jsonl, *out) == 0
    for change in ({"normalize": "x"}, {"rows": None}, {"dim": "x"}):
        manifest = json.loads((tmp_path / "o" / "manifest.json").read_text()) | change
        (tmp_path / "o" / "manifest.json").write_text(json.dumps(manifest))
        assert main(["search", "--index", str(tmp_path / "o"), "q"]) == 1
        assert "is not a manifest" in capsys.readouterr().err


@pytest.fixture(scope="module")
def heads(minilm, tmp_path_factory):
    """task -> directory of a tiny random model."""
    torch.manual_seed(0)
    config = dict(vocab_size=30522, dim=16, n_heads=2, hidden_dim=32, n_layers=1, max_position_embeddings=64)
    names = {
        "fill-mask": "DistilBertForMaskedLM",
        "text-classification": "DistilBertForSequenceClassification",
        "token-classification": "DistilBertForTokenClassification",
        "question-answering": "DistilBertForQuestionAnswering",
        "feature-extraction": "DistilBertModel",
    }
    out = {}
    for task, name in names.items():
        out[task] = str(tmp_path_factory.mktemp(task))
        getattr(fastdistil, name)(DistilBertConfig(**config)).save_pretrained(out[task])
        DistilBertTokenizer.from_pretrained(minilm).save_pretrained(out[task])
    return out


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("task", ["fill-mask", "text-classification", "token-classification", "question-answering"])
def test_predict(task, rows, heads, tmp_path, capsys):
    texts = [f"word {'more ' * i} [MASK]" for i in range(rows)]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"name": f"n{i}", "text": t}) + "\n" for i, t in enumerate(texts)))
    question = ["--question", "which word?"] if task == "question-answering" else []
    arguments = ["predict", "--task", task, "--model", heads[task], "--device", "cpu", "--input", str(path), *question]
    assert main([*arguments, "--id-column", "name"]) == 0
    out, err = capsys.readouterr()
    assert "float32" in err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["id"] for line in lines] == [f"n{i}" for i in range(rows)]
    answer = fastdistil.pipeline(task, heads[task], device="cpu")
    options = {"aggregation_strategy": "simple"} if task == "token-classification" else {}
    for text, line in zip(texts, lines, strict=True):
        expected = answer(question="which word?", context=text) if question else answer(text, **options)
        expected = expected[0] if task == "text-classification" else expected
        expected = json.loads(json.dumps(expected, default=float))
        assert str(type(line["result"])) == str(type(expected))
        first = [x[0] if isinstance(x, list) else x for x in (line["result"], expected)]
        assert first[0].keys() == first[1].keys()
        assert first[0]["score"] == pytest.approx(first[1]["score"], abs=1e-5)


def test_fill_mask(heads, capsys):
    arguments = ["fill-mask", "--model", heads["fill-mask"], "--device", "cpu", "--quiet", "--top-k", "2"]
    assert main([*arguments, "a [MASK] b", "[MASK] [MASK]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a [MASK] b" and lines[3] == "[MASK] [MASK]" and len(lines) == 8
    assert main([*arguments, "--json", "a [MASK] b"]) == 0
    assert len(json.loads(capsys.readouterr().out)["result"]) == 2
    assert main([*arguments, "a b"]) == 1
    assert "'a b': No mask_token ([MASK]) found" in capsys.readouterr().err
    long = "[MASK] " + "long " * 99
    assert main([*arguments, long]) == 1
    assert "has 64 positions; pass --truncate" in capsys.readouterr().err
    assert main([*arguments, "--truncate", long]) == 0


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (
            "text-classification",
            ["--question", "a?"],
            "--question or --question-column goes with --task",
        ),
        ("question-answering", [], "--question or --question-column goes with --task"),
        ("token-classification", ["--top-k", "2"], "--top-k is not for --task token-classification"),
        ("text-classification", ["--no-truncate"], "in.jsonl, line 3 is 101 tokens long, the model has 64 positions; "),
        ("text-classification", ["--no-truncate"], "positions; leave --no-truncate out"),
        ("fill-mask", [], "in.jsonl, line 2: No mask_token"),
        ("ner", ["--no-truncate", "--aggregation-strategy", "none"], "needs an --aggregation-strategy other than none"),
    ],
)
def test_predict_names_what_is_wrong(task, options, message, heads, tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    path.write_text("\n" + "".join(json.dumps({"text": t}) + "\n" for t in ("short", "long " * 99)))
    model = heads["token-classification" if task == "ner" else task]
    arguments = ["predict", "--task", task, "--model", model, "--device", "cpu", "--input", str(path), *options]
    assert main(arguments) == (2 if message.startswith(("--", "needs")) else 1)
    out, err = capsys.readouterr()
    done = 1 if "line 3" in message or "leave" in message else 0  # what came before the bad row
    assert message in err and [json.loads(line)["id"] for line in out.splitlines()] == list(range(done))


def test_predict_answers_all_rows_before_a_bad_one(heads, tmp_path, capsys):
    path = tmp_path / "in.txt"
    path.write_text("".join(f"row {i} [MASK]\n" for i in range(1500)) + "no mask\n")
    arguments = ["predict", "--task", "fill-mask", "--model", heads["fill-mask"], "--device", "cpu", "--quiet"]
    assert main([*arguments, "--top-k", "1", "--input", str(path)]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1500 and "in.txt, line 1501: No mask_token" in err


def test_predict_answers_what_comes_before_a_row_that_cannot_be_read(heads, tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a [MASK]"}\n{"text": "b [MASK]"}\n{"text": 5}\n')
    arguments = ["predict", "--task", "fill-mask", "--model", heads["fill-mask"], "--device", "cpu", "--quiet"]
    assert main([*arguments, "--input", str(path)]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 and "in.jsonl, line 3" in err


def test_the_first_of_two_wrong_rows_is_named(heads, tmp_path, capsys, monkeypatch):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("a [MASK]", "b [MASK]", "c [MASK]", "none")))
    answers = []

    def answer(self, texts, **options):
        if "none" in texts:
            raise ValueError("inputs[3]: no mask")
        if "b [MASK]" in texts:
            raise MemoryError("inputs[1]: too large")
        answers.extend(texts)
        return [[]] * len(texts) if len(texts) > 1 else []

    monkeypatch.setattr("fastdistil.pipelines.FillMaskPipeline.__call__", answer)
    arguments = ["predict", "--task", "fill-mask", "--model", heads["fill-mask"], "--device", "cpu", "--quiet"]
    assert main([*arguments, "--input", str(path)]) == 1 and answers == ["a [MASK]"]
    assert "in.jsonl, line 2: too large" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_answers_are_json_whatever_the_output_can_hold(heads, encoding, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "a [MASK]", "id": "é😀"}) + "\n")
    command = [sys.executable, "-m", "fastdistil.cli", "predict", "--task", "fill-mask", "--model", heads["fill-mask"]]
    command += ["--device", "cpu", "--quiet", "--input", str(tmp_path / "in.jsonl"), "--id-column", "id"]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, check=True)
    said = done.stdout.decode(encoding)
    assert json.loads(said)["id"] == "é😀" and ("é😀" in said) is (encoding == "utf-8")


def test_long_texts_are_labelled_to_their_end(heads, tmp_path, capsys):
    path = tmp_path / "in.txt"
    path.write_text("word " * 150 + "\n")
    arguments = ["predict", "--task", "ner", "--model", heads["token-classification"], "--device", "cpu", "--quiet"]
    ends = []
    for option in ("--truncate", "--no-truncate"):
        assert main([*arguments, option, "--input", str(path)]) == 0
        ends.append(max(found["end"] for found in json.loads(capsys.readouterr().out)["result"]))
    assert ends[0] < 64 * 5 < 700 < ends[1]


def test_a_reader_that_has_enough(heads, tmp_path):
    (tmp_path / "in.txt").write_text("a [MASK]\n" * 3000)
    command = f"{sys.executable} -m fastdistil.cli predict --task fill-mask --device cpu --quiet --top-k 1"
    pipe = f"{command} --model {heads['fill-mask']} --input {tmp_path / 'in.txt'} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 1 and not done.stderr and done.returncode == 1


def test_verify_wants_texts(minilm, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("")
    assert main(["verify", str(minilm), "--input", str(tmp_path / "in.txt")]) == 1
    assert "in.txt holds no text" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["npz", "zip", "negative", "syntax", "deep ids"])
def test_a_damaged_part_is_named(kind, minilm, jsonl, tmp_path, capsys):
    out = tmp_path / "index"
    assert embed(minilm, "--input", jsonl, "--output", out) == 0
    part = out / "part-00000.npy"
    good = part.read_bytes()
    if kind == "npz":
        with open(part, "wb") as file:
            np.savez(file, a=np.zeros(3))
    elif kind == "zip":
        part.write_bytes(b"PK\x03\x04" + good)
    elif kind == "negative":
        part.write_bytes(good.replace(b"(5, 384)", b"(-5, 384)"[:8] + b" "[:0], 1))
    elif kind == "syntax":
        part.write_bytes(good.replace(b"{'descr'", b"{{'desc'", 1))
    else:
        (out / "part-00000.ids.jsonl").write_text("[" * 10**5 + "\n" * 5)
    capsys.readouterr()
    assert main(["search", "--index", str(out), "--quiet", "query"]) == 1
    assert "part-00000" in capsys.readouterr().err


def test_overwrite_removes_an_index_and_nothing_else(minilm, jsonl, tmp_path):
    out = tmp_path / "index"
    assert embed(minilm, "--input", jsonl, "--output", out) == 0
    mine = ["notes.tmp", "part-of-thesis.npy", "part-1.npy", "part-00000.npy.bak"]
    for name in [*mine, "part-00007.npy"]:
        (out / name).write_text("precious")
    assert embed(minilm, "--input", jsonl, "--output", out, "--overwrite") == 0
    assert {p.name for p in out.iterdir()} == {
        *(".lock", "manifest.json", "part-00000.npy", "part-00000.ids.jsonl"),
        *mine,
    }


def test_a_closed_standard_input(minilm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert embed(minilm, "--input", "-", "--output", tmp_path / "index") == 1
    assert "standard input, which is closed" in capsys.readouterr().err


def test_the_dtype_of_answers_and_of_a_check(heads, minilm, jsonl, tmp_path, monkeypatch):
    """Not of embeddings alone."""
    (tmp_path / "in.txt").write_text("a [MASK]\n")
    for task in ("fill-mask", "token-classification"):
        out = tmp_path / task
        command = ["predict", "--task", task, "--model", heads[task], "--device", "cpu", "--quiet"]
        command += ["--input", str(tmp_path / "in.txt"), "--output", str(out), "--dtype", "bfloat16"]
        assert main(command) == 0
        assert json.loads((out / "manifest.json").read_text())["settings"]["dtype"] == "bfloat16"
    asked = []

    def verify(model, texts, **options):
        asked.append(options["dtype"])
        raise ValueError("enough")

    monkeypatch.setattr(cli, "verify", verify)
    for more in ([], ["--dtype", "bfloat16"]):
        assert main(["verify", str(minilm), "--device", "cpu", *more]) == 1
    assert asked == ["auto", "bfloat16"]


@pytest.mark.parametrize("text", ['{"text": "a"}', '{"text": 3}'])
def test_nothing_is_left_of_a_jobs_log(text, minilm, tmp_path):
    """Its thread ends with the job, also with one that failed."""
    (tmp_path / "in.jsonl").write_text(f"{text}\n")
    command = ["embed", "--model", str(minilm), "--device", "cpu", "--json-logs"]
    main([*command, "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "o")])
    assert not [one for one in threading.enumerate() if "_watch" in one.name]


def test_closed_standard_output_takes_no_answers(heads, tmp_path, monkeypatch, capsys):
    (tmp_path / "in.txt").write_text("a [MASK]\n")
    monkeypatch.setattr(sys, "stdout", None)
    command = ["predict", "--task", "fill-mask", "--model", heads["fill-mask"], "--device", "cpu", "--quiet"]
    assert main([*command, "--input", str(tmp_path / "in.txt")]) == 2
    monkeypatch.undo()
    assert "standard output is closed; give --output, a directory" in capsys.readouterr().err
