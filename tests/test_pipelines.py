"""The pipelines against transformers' on tiny random models, and what they do with bad input."""

import itertools
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdistil
from fastdistil import DistilBertConfig, DistilBertModelWithHeads, DistilBertTokenizer, pipeline, pipelines

transformers = pytest.importorskip("transformers")

GOLDEN = json.loads((Path(__file__).parent / "golden" / "question_answering.json").read_text())
TINY = dict(
    vocab_size=30522, dim=16, n_heads=2, hidden_dim=32, n_layers=2, max_position_embeddings=64, initializer_range=0.3
)
NER = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}
TEXTS = [
    "Wolfgang Amadeus Mozart lived in Salzburg and Vienna",
    "unaffordable microarchitectures are uninterestingly expensive",
    "a",
    "the cat sat on the mat while Zoë naïvely sang ßtraße 12345 ☃ in tokyo",
    "B - PER words",
]


@pytest.fixture(scope="module")
def tokenizer(minilm):
    return DistilBertTokenizer.from_pretrained(minilm)


@pytest.fixture(scope="module")
def their_tokenizer(minilm):
    return transformers.DistilBertTokenizer.from_pretrained(minilm)


def pair(task, name, tokenizer, their_tokenizer, **settings):
    torch.manual_seed(3)
    theirs = getattr(transformers, name)(transformers.DistilBertConfig(**TINY, **settings)).eval()
    ours = getattr(fastdistil, name)(DistilBertConfig(**TINY, **settings))
    ours.load_state_dict(theirs.state_dict())
    # a budget that holds a few texts, so that there are several batches
    return pipeline(task, ours, tokenizer, max_batch_tokens=30), transformers.pipeline(
        task, model=theirs, tokenizer=their_tokenizer, device="cpu"
    )


def same(ours, theirs):
    """Equal dictionaries in equal order, scores within 1e-5."""
    assert type(ours) is type(theirs) or {type(ours), type(theirs)} <= {float, np.float32, np.float64}
    if isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            same(ours[key], theirs[key])
    elif isinstance(theirs, (float, np.floating)):
        assert float(ours) == pytest.approx(float(theirs), abs=1e-5)
    else:
        assert ours == theirs


MASKED = ["the [MASK] sat on the mat", "[MASK] and [MASK] are words", "paris is the [MASK] of france"]


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 2}, {"targets": ["cat", "dog"]}, {"targets": "cats", "top_k": 3}], ids=str
)
def test_fill_mask(options, tokenizer, their_tokenizer):
    ours, theirs = pair("fill-mask", "DistilBertForMaskedLM", tokenizer, their_tokenizer)
    for inputs in (MASKED[0], MASKED[1], MASKED[:1], MASKED):
        same(ours(inputs, **options), theirs(inputs, **options))


def test_fill_mask_replaces_a_target_that_is_no_word(tokenizer, their_tokenizer, caplog):
    ours, theirs = pair("fill-mask", "DistilBertForMaskedLM", tokenizer, their_tokenizer)
    options = {"targets": ["zyxwvut", "dog"]}
    same(ours(MASKED[0], **options), theirs(MASKED[0], **options))
    assert "'zyxwvut' is not in the vocabulary" in caplog.text
    with pytest.raises(ValueError, match="At least one target must be provided"):
        ours(MASKED[0], targets=[])


@pytest.mark.parametrize("stated", [True, False, None])
def test_fill_mask_cleans_up_where_the_tokenizers_files_say_so(stated, minilm, tmp_path):
    given = {} if stated is None else {"clean_up_tokenization_spaces": stated}
    DistilBertTokenizer.from_pretrained(minilm, **given).save_pretrained(tmp_path)
    saved = DistilBertTokenizer.from_pretrained(tmp_path)
    other = transformers.DistilBertTokenizer.from_pretrained(tmp_path)
    ours, theirs = pair("fill-mask", "DistilBertForMaskedLM", saved, other)
    text = "new york's [MASK] isn't, well, far."
    same(ours(text), theirs(text))
    assert ("york's" in ours(text)[0]["sequence"]) == bool(stated)
    ids = saved(text)["input_ids"]
    assert ("york's" in saved.decode(ids)) == (stated is not False)


def test_options_as_transformers_takes_them(tokenizer, their_tokenizer):
    ours, theirs = pair("text-classification", "DistilBertForSequenceClassification", tokenizer, their_tokenizer)
    for options in ({"top_k": 2}, {"top_k": None}, {"top_k": 1}):
        one = pipeline("text-classification", ours.model, tokenizer, **options)
        other = transformers.pipeline("text-classification", theirs.model, tokenizer=their_tokenizer, **options)
        for text in (TEXTS[0], TEXTS[:1], TEXTS):
            same(one(text), other(text))
            same(one(text, top_k=2), other(text, top_k=2))
    sigmoid = transformers.pipelines.text_classification.ClassificationFunction.SIGMOID
    same(ours(TEXTS[0], function_to_apply=sigmoid), theirs(TEXTS[0], function_to_apply=sigmoid))
    ours, theirs = pair("fill-mask", "DistilBertForMaskedLM", tokenizer, their_tokenizer)
    same(ours(MASKED[0], top_k=None), theirs(MASKED[0], top_k=None))
    ours, theirs = pair("token-classification", "DistilBertForTokenClassification", tokenizer, their_tokenizer)
    upper = transformers.pipelines.token_classification.AggregationStrategy.SIMPLE
    for strategy in (upper, "SIMPLE", None):
        options = {"aggregation_strategy": strategy, "ignore_labels": None}
        same(ours(TEXTS[0], **options), theirs(TEXTS[0], **options))


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("fill-mask", "DistilBertForMaskedLM"),
        ("text-classification", "DistilBertForSequenceClassification"),
        ("token-classification", "DistilBertForTokenClassification"),
        ("question-answering", "DistilBertForQuestionAnswering"),
    ],
)
def test_answers_that_are_not_finite(task, name, tokenizer):
    model = getattr(fastdistil, name)(DistilBertConfig(**TINY))
    ours = pipeline(task, model, tokenizer, max_batch_tokens=30)
    with torch.no_grad():
        model.distilbert.embeddings.position_embeddings.weight[12] = torch.nan
    texts = ["the [MASK] sat", "the [MASK] sat on the mat and was one of a few", "a [MASK]"]
    inputs = [{"question": "who?", "context": text} for text in texts] if task == "question-answering" else texts
    with pytest.raises(ValueError, match=r"inputs\[1\]: the model's answer is not finite") as caught:
        ours(inputs)
    assert list(caught.value.messages) == [1] and ours([inputs[0], inputs[2]])


@pytest.mark.parametrize("task", ["token-classification", "question-answering"])
def test_windows_whose_answers_are_not_finite_are_named_by_their_text(task, tokenizer):
    names = {"token-classification": "TokenClassification", "question-answering": "QuestionAnswering"}
    model = getattr(fastdistil, f"DistilBertFor{names[task]}")(DistilBertConfig(**TINY))
    ours = pipeline(task, model, tokenizer)
    with torch.no_grad():
        model.distilbert.embeddings.word_embeddings.weight[tokenizer.convert_tokens_to_ids("cat")] = torch.nan
    texts = ["long " * 150, "a b", "word " * 150 + "cat", "a b"]
    options = {} if task == "question-answering" else {"aggregation_strategy": "simple", "stride": 5}
    inputs = [{"question": "who?", "context": text} for text in texts] if task == "question-answering" else texts
    with pytest.raises(ValueError, match=r"inputs\[2\]: the model's answer is not finite") as caught:
        ours(inputs, **options)
    assert list(caught.value.messages) == [2]


def test_a_label_may_be_forbidden(tokenizer, their_tokenizer):
    ours, theirs = pair("text-classification", "DistilBertForSequenceClassification", tokenizer, their_tokenizer)
    for model in (ours.model, theirs.model):
        with torch.no_grad():
            model.classifier.bias[0] = -torch.inf
    same(ours(TEXTS, top_k=None), theirs(TEXTS, top_k=None))


def test_a_long_text_is_cut_on_request(tokenizer, their_tokenizer):
    ours, theirs = pair("fill-mask", "DistilBertForMaskedLM", tokenizer, their_tokenizer)
    text = MASKED[0] + " word" * 100
    cut = {"truncation": True, "max_length": 64}
    same(ours(text, **cut), theirs(text, tokenizer_kwargs=cut))
    with pytest.raises(ValueError, match=r"inputs\[1\] is 108 tokens long, the model has 64 positions"):
        ours([MASKED[0], text])


def test_feature_extraction(tokenizer, their_tokenizer):
    ours, theirs = pair("feature-extraction", "DistilBertModel", tokenizer, their_tokenizer)
    same(ours(TEXTS[0]), theirs(TEXTS[0]))
    same(ours(TEXTS), theirs(TEXTS))
    for a, b in zip(ours(TEXTS, return_tensors=True), theirs(TEXTS, return_tensors=True), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


class Rows(torch.utils.data.Dataset):
    """Without an end that iteration would find."""

    def __len__(self):
        return len(TEXTS)

    def __getitem__(self, i):
        return TEXTS[i % len(TEXTS)]


def test_how_transformers_is_called(tokenizer, their_tokenizer):
    """With a batch size, padding, a tokenizer's options, a Dataset; and after a training step."""
    ours, theirs = pair("text-classification", "DistilBertForSequenceClassification", tokenizer, their_tokenizer)
    given = {"batch_size": 2, "padding": True, "truncation": True}
    same(ours(TEXTS, **given), theirs(TEXTS, **given))
    same(ours(Rows(), batch_size=2, num_workers=0), list(theirs(Rows(), batch_size=2, num_workers=0)))
    ours.model.train()
    same(ours(TEXTS), theirs(TEXTS))
    made = pipeline("text-classification", ours.model, tokenizer, batch_size=8, top_k=2)
    same(made(TEXTS), theirs(TEXTS, top_k=2))
    ours, theirs = pair("feature-extraction", "DistilBertModel", tokenizer, their_tokenizer)
    cut = {"tokenize_kwargs": {"truncation": True, "max_length": 5}}
    same(ours(TEXTS[1], **cut), theirs(TEXTS[1], **cut))
    ours, theirs = pair("fill-mask", "DistilBertForMaskedLM", tokenizer, their_tokenizer)
    cut = {"tokenizer_kwargs": {"truncation": True, "max_length": 8}}
    text = "a [MASK] sat " + "and sat " * 20
    same(ours(text, **cut), theirs(text, **cut))
    cut["tokenizer_kwargs"]["padding"] = True
    same(ours(text, **cut), theirs(text, **cut))
    with pytest.raises(TypeError, match="tokenizer_kwargs must be a dictionary, got .1."):
        ours(text, tokenizer_kwargs=[1])
    with pytest.raises(TypeError, match="nonsense"):
        ours(text, tokenizer_kwargs={"nonsense": 1})


def test_how_transformers_makes_one(tokenizer, tmp_path):
    fastdistil.DistilBertForSequenceClassification(DistilBertConfig(**TINY)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    path = str(tmp_path)
    made = [
        pipeline("sentiment-analysis", path, device="cpu"),
        pipeline("sentiment-analysis", model=path, tokenizer=path, device=-1, framework="pt", use_fast=True),
        pipeline("sentiment-analysis", path, device_map="cpu", torch_dtype=torch.float32, trust_remote_code=False),
        pipeline("sentiment-analysis", path, device_map={"": "cpu"}, token=False, cache_dir=tmp_path),
    ]
    assert len({str(one(TEXTS)) for one in made}) == 1
    half = pipeline("sentiment-analysis", path, device=-1, torch_dtype=torch.bfloat16)
    assert half.model.dtype is torch.bfloat16
    for make in (
        lambda: pipeline("sentiment-analysis", path, device=99),
        lambda: fastdistil.DistilBertModel.from_pretrained(path, device=99),
    ):
        with pytest.raises(ValueError, match="'cuda:99' was asked for, but torch finds no CUDA device of that number"):
            make()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'cuda:0' was asked for"):
            fastdistil.Embedder.from_pretrained(path, device=0)


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 1}, {"top_k": 2}, {"top_k": None}, {"function_to_apply": "sigmoid"}], ids=str
)
@pytest.mark.parametrize(
    "settings",
    [
        {"num_labels": 3, "id2label": {0: "bad", 1: "so so", 2: "good"}, "label2id": {"bad": 0, "so so": 1, "good": 2}},
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        {"num_labels": 1},
        {"num_labels": 1, "problem_type": "regression"},
    ],
    ids=lambda s: f"{s['num_labels']} {s.get('problem_type')}",
)
def test_text_classification(settings, options, tokenizer, their_tokenizer):
    name = "DistilBertForSequenceClassification"
    ours, theirs = pair("text-classification", name, tokenizer, their_tokenizer, **settings)
    both = {"text": TEXTS[0], "text_pair": TEXTS[1]}
    single = {"text": TEXTS[0], "text_pair": ""}  # no pair at all
    for inputs in (TEXTS[0], TEXTS, TEXTS[:1], both, [both, both | {"text": "other"}], single, [both, single, both]):
        same(ours(inputs, **options), theirs(inputs, **options))


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
@pytest.mark.parametrize("labels", [NER, {0: "NOUN", 1: "VERB", 2: "O"}], ids=["ner", "tags"])
def test_token_classification(strategy, labels, tokenizer, their_tokenizer):
    settings = {"id2label": labels, "label2id": {v: k for k, v in labels.items()}}
    name = "DistilBertForTokenClassification"
    ours, theirs = pair("token-classification", name, tokenizer, their_tokenizer, **settings)
    options = {"aggregation_strategy": strategy}
    for inputs in (TEXTS[0], TEXTS, TEXTS[:1]):
        found = ours(inputs, **options)
        same(found, theirs(inputs, **options))
    assert any(found)
    same(ours(TEXTS, ignore_labels=[], **options), theirs(TEXTS, ignore_labels=[], **options))


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_labels_that_are_not_counted_from_0(task, tokenizer, their_tokenizer):
    name = {"text": "DistilBertForSequenceClassification", "token": "DistilBertForTokenClassification"}
    ours, _ = pair(task, name[task.split("-")[0]], tokenizer, their_tokenizer, id2label={1: "a", 2: "b"})
    with pytest.raises(ValueError, match=r"id2label names \[1, 2\]; number its labels from 0 on"):
        ours("text")


@pytest.mark.parametrize("strategy", ["none", "simple", "first"])
def test_words_that_are_split_already(strategy, tokenizer, their_tokenizer):
    settings = {"id2label": NER, "label2id": {v: k for k, v in NER.items()}}
    ours, theirs = pair(
        "token-classification", "DistilBertForTokenClassification", tokenizer, their_tokenizer, **settings
    )
    words = [text.split() for text in TEXTS]
    for options in ({}, {"delimiter": "--"}):
        options |= {"aggregation_strategy": strategy, "is_split_into_words": True, "ignore_labels": []}
        same(ours(words, **options), theirs(words, **options))
        same(ours(words[0], **options), theirs(words[0], **options))
    long = [f"{word}x{i}" for i, word in enumerate(TEXTS[0].split() * 9)]
    if strategy == "simple":
        start = ours([long], stride=5, **options)[0][-1]["end"]
        assert start == len("--".join(long)) and ours([long], **options)[0][-1]["end"] < start


def test_a_word_of_an_answer(tokenizer, their_tokenizer):
    """The sequence is put together as the library does it, without spaces before full stops, but around quotes."""
    ours, theirs = pair("fill-mask", "DistilBertForMaskedLM", tokenizer, their_tokenizer)
    for text in ("you'd [MASK] it, don't you? no.", "[MASK] [MASK], it's ok!"):
        same(ours(text), theirs(text))


def test_a_context_of_spaces(answerer):
    """As in transformers 4.57."""
    nothing = {"score": 0.0, "start": 0, "end": 0, "answer": ""}
    assert answerer(question="where?", context="   ") == nothing
    assert answerer(question="where?", context="   ", max_question_len=3, padding="max_length") == nothing


@pytest.mark.parametrize("strategy", ["simple", "first", "average", "max"])
def test_windows_of_a_long_text(strategy, tokenizer, their_tokenizer):
    name = "DistilBertForTokenClassification"
    settings = {"id2label": NER, "label2id": {v: k for k, v in NER.items()}}
    ours, theirs = pair("token-classification", name, tokenizer, their_tokenizer, **settings)
    theirs.tokenizer.model_max_length = 32
    ours.tokenizer.model_max_length = 32
    try:
        text = " ".join(TEXTS) * 3
        options = {"aggregation_strategy": strategy, "stride": 7}
        same(ours([TEXTS[2], text], **options), theirs([TEXTS[2], text], **options))
        with pytest.raises(
            ValueError, match=r"inputs\[1\]: windows of 32 tokens hold 30 of the text, too few to share 30"
        ):
            ours([TEXTS[2], text], aggregation_strategy=strategy, stride=30)
    finally:
        theirs.tokenizer.model_max_length = ours.tokenizer.model_max_length = 512


@pytest.fixture(scope="module")
def answerer(tokenizer):
    torch.manual_seed(0)
    model = fastdistil.DistilBertForQuestionAnswering(DistilBertConfig(**GOLDEN["config"]))
    return pipeline("question-answering", model, tokenizer, max_batch_tokens=500)


@pytest.mark.parametrize("number", range(len(GOLDEN["options"])))
def test_question_answering(number, answerer):
    options, expected = GOLDEN["options"][number], GOLDEN["answers"][number]
    for sample, answer in zip(GOLDEN["samples"], expected, strict=True):
        same(answerer(**sample, **options), answer)
    same(answerer(GOLDEN["samples"], **options), expected)
    whole = {key: [sample[key] for sample in GOLDEN["samples"]] for key in ("question", "context")}
    same(answerer(**whole, **options), expected)


def test_a_flexible_head_answers(tokenizer):
    torch.manual_seed(0)
    model = DistilBertModelWithHeads(DistilBertConfig(**TINY))
    model.add_masked_lm_head("words")
    model.add_tagging_head("names", num_labels=5, id2label=NER)
    model.add_classification_head("mood", num_labels=2, id2label={0: "bad", 1: "good"}, activation_function="relu")
    mood = pipeline("sentiment-analysis", model, tokenizer)
    static = pipeline("sentiment-analysis", model.to_static(), tokenizer)
    same(mood(TEXTS), static(TEXTS))
    assert {item["label"] for item in mood(TEXTS)} <= {"bad", "good"}
    with pytest.raises(ValueError, match="needs a tagging head, DistilBertModelWithHeads has classification"):
        pipeline("ner", model, tokenizer)
    model.active_head = "names"
    assert pipeline("ner", model, tokenizer)(TEXTS[0], ignore_labels=[])[0]["word"] == "wolfgang"
    model.active_head = "words"
    assert len(pipeline("fill-mask", model, tokenizer)(MASKED[0])) == 5


def test_a_model_by_its_directory(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = fastdistil.DistilBertForSequenceClassification(DistilBertConfig(**TINY)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = pipeline("text-classification", str(tmp_path), device="cpu")
    same(found(TEXTS), pipeline("text-classification", model, tokenizer)(TEXTS))
    assert found([]) == [] and found.model.dtype is torch.float32


@pytest.mark.parametrize(
    ("task", "call", "error", "message"),
    [
        ("fill-mask", lambda p: p(["a [MASK]", "a b"]), ValueError, r"inputs\[1\]: No mask_token \(\[MASK\]\) found"),
        ("fill-mask", lambda p: p("[MASK]", top_k=0), ValueError, "top_k is 0"),
        ("fill-mask", lambda p: p("[MASK]", top_k=10**6), ValueError, "top_k is 1000000; it must be from 1 to"),
        ("fill-mask", lambda p: p(["[MASK]", None]), TypeError, r"inputs\[1\] must be a string"),
        ("fill-mask", lambda p: p(b"[MASK]"), TypeError, "inputs must be a text or a list of texts, got bytes"),
        ("fill-mask", lambda p: p(["[MASK]", "\ud800 [MASK]"]), ValueError, r"inputs\[1\] holds a lone surrogate"),
        ("text-classification", lambda p: p([["a", "b"]]), TypeError, r"inputs\[0\] must be a string, or a dictionary"),
        (
            "text-classification",
            lambda p: p(["a", {"text": "a", "text_pair": "\ud800"}]),
            ValueError,
            r"inputs\[1\] holds a lone surrogate",
        ),
        (
            "text-classification",
            lambda p: p("a", max_length=0),
            ValueError,
            "max_length is 0, which does not even hold",
        ),
        ("text-classification", lambda p: p("a", top_k=0), ValueError, "top_k is 0"),
        ("text-classification", lambda p: p("a", function_to_apply="max"), ValueError, "'max' is not one of softmax"),
        ("text-classification", lambda p: p(["a", "b " * 99]), ValueError, r"inputs\[1\] is 101 tokens long"),
        ("token-classification", lambda p: p("a", aggregation_strategy="sum"), ValueError, "'sum' is not one of none"),
        ("token-classification", lambda p: p("a", stride=3), ValueError, "stride needs an aggregation_strategy"),
        ("token-classification", lambda p: p([1]), TypeError, r"inputs\[0\] must be a string, got 1"),
        ("question-answering", lambda p: p(question="a"), ValueError, "a question and a context are needed"),
        ("question-answering", lambda p: p(question="a", context=""), ValueError, "`context` cannot be empty"),
        (
            "question-answering",
            lambda p: p([{"question": "a"}]),
            ValueError,
            r"inputs\[0\]: `context` must be a string",
        ),
        ("question-answering", lambda p: p(["a"]), TypeError, r"inputs\[0\] must be a dictionary"),
        (
            "question-answering",
            lambda p: p(question=["a"], context=["b", "c"]),
            ValueError,
            "1 questions, but 2 contexts",
        ),
        (
            "question-answering",
            lambda p: p(question="a " * 70, context="b " * 99),
            ValueError,
            r"inputs\[0\]: windows of 64 tokens hold -9 of the text beside a question of 70",
        ),
        (
            "question-answering",
            lambda p: p(question="a", context="b", top_k=0),
            ValueError,
            "top_k parameter should be",
        ),
        ("question-answering", lambda p: p(question="a", context="b", doc_stride=70), ValueError, "is larger than"),
        (
            "question-answering",
            lambda p: p(question="a", context="b", max_seq_len="9"),
            TypeError,
            "must be an integer, got '9'",
        ),
        (
            "question-answering",
            lambda p: p(question="a", context="b", top_k="2"),
            TypeError,
            "must be an integer, got '2'",
        ),
        (
            "token-classification",
            lambda p: p([["a", "b"], "c"], is_split_into_words=True),
            TypeError,
            r"inputs\[1\] must be a list of words, got 'c'",
        ),
        ("token-classification", lambda p: p([["a"]]), TypeError, r"inputs\[0\] must be a string"),
        ("token-classification", lambda p: p(["a", "\ud800"]), ValueError, r"inputs\[1\] holds a lone surrogate"),
        (
            "token-classification",
            lambda p: p([["a"], ["b", "\ud800"]], is_split_into_words=True),
            ValueError,
            r"inputs\[1\]\[1\]",
        ),
    ],
)
def test_bad_input(task, call, error, message, tokenizer):
    names = {"fill-mask": "MaskedLM", "question-answering": "QuestionAnswering"}
    name = names.get(task) or task.replace("text", "Sequence").replace("token", "Token").replace("-c", "C")
    model = getattr(fastdistil, f"DistilBertFor{name}")(DistilBertConfig(**TINY))
    with pytest.raises(error, match=message):
        call(pipeline(task, model, tokenizer))


def test_bad_arguments(tokenizer):
    model = fastdistil.DistilBertModel(DistilBertConfig(**TINY))
    with pytest.raises(ValueError, match="task 'translation' is not one of fill-mask"):
        pipeline("translation", model, tokenizer)
    with pytest.raises(ValueError, match="a loaded model comes without a tokenizer"):
        pipeline("feature-extraction", model)
    with pytest.raises(TypeError, match="must be one of fastdistil's, got Linear"):
        pipeline("feature-extraction", torch.nn.Linear(1, 1), tokenizer)
    with pytest.raises(ValueError, match="needs a masked_lm head, DistilBertModel has None"):
        pipeline("fill-mask", model, tokenizer)
    with pytest.raises(FileNotFoundError, match="no directory"):
        pipeline("fill-mask", "./nowhere")
    with pytest.raises(ValueError, match=r"max_batch_tokens parameter should be >= 1 \(got 0\)"):
        pipeline("feature-extraction", model, tokenizer, max_batch_tokens=0)
    with pytest.raises(TypeError, match="max_batch_tokens must be an integer, got '5'"):
        pipeline("feature-extraction", model, tokenizer, max_batch_tokens="5")


@pytest.mark.parametrize("task", ["token-classification", "fill-mask"])
def test_a_head_that_looks_along_the_text(task, tokenizer, their_tokenizer):
    """Of one text it must not see another."""

    class Head(torch.nn.Module):
        def __init__(self, out):
            super().__init__()
            self.rnn = torch.nn.LSTM(16, 8, bidirectional=True, batch_first=True)
            self.out = torch.nn.Linear(16, out)

        def forward(self, x):
            return self.out(self.rnn(x)[0])

    name = {"token-classification": "DistilBertForTokenClassification", "fill-mask": "DistilBertForMaskedLM"}[task]
    ours, theirs = pair(task, name, tokenizer, their_tokenizer)
    part = "classifier" if task == "token-classification" else "vocab_transform"
    head = Head(2 if task == "token-classification" else 16).eval()
    for model in (ours.model, theirs.model):
        setattr(model, part, head)
    inputs = TEXTS if task == "token-classification" else MASKED
    options = {"ignore_labels": []} if task == "token-classification" else {}
    same(ours(inputs, **options), theirs(inputs, **options))


def test_a_changed_model_answers_as_it_is_now(tokenizer):
    model = DistilBertModelWithHeads(DistilBertConfig(**TINY))
    model.add_classification_head("a", num_labels=2, id2label={0: "no", 1: "yes"})
    model.add_classification_head("b", num_labels=1)
    answer = pipeline("text-classification", model, tokenizer)
    assert answer("a")[0]["label"] == "LABEL_0"
    model.active_head = "a"
    assert answer("a")[0]["label"] in ("no", "yes") and sum(
        x["score"] for x in answer("a", top_k=None)
    ) == pytest.approx(1)


def test_a_flexible_checkpoint_by_its_directory(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = DistilBertModelWithHeads(DistilBertConfig(**TINY))
    model.add_classification_head("a", num_labels=3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    same(
        pipeline("text-classification", tmp_path, device="cpu")(TEXTS),
        pipeline("text-classification", model, tokenizer)(TEXTS),
    )


@pytest.mark.parametrize("task", ["fill-mask", "text-classification", "feature-extraction"])
def test_a_checkpoint_without_what_the_task_needs(task, tokenizer, tmp_path):
    model = fastdistil.DistilBertForTokenClassification(DistilBertConfig(**TINY))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if task == "feature-extraction":
        assert pipeline(task, tmp_path, device="cpu")("a")
        return
    with pytest.raises(ValueError, match=rf"is no checkpoint for {task}: it lacks .*, which would be random"):
        pipeline(task, tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("named", "task"),
    [
        ("DistilBertForSequenceClassification", "ner"),
        ("BertForSequenceClassification", "ner"),
        ("DistilBertForMultipleChoice", "text-classification"),
        ("DistilBertForTokenClassification", None),
    ],
)
def test_a_head_of_another_task_with_the_same_names(named, task, tokenizer, tmp_path):
    """classifier.weight is a sentence's, a token's and a choice's."""
    sizes = (
        TINY
        if named.startswith("Distil")
        else dict(vocab_size=30522, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    )
    config = getattr(transformers, f"{named.partition('For')[0]}Config")(**sizes, num_labels=1)
    getattr(transformers, named)(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if task is None:
        assert pipeline("ner", tmp_path, device="cpu")("a cat")
        return
    with pytest.raises(ValueError, match=rf"is no checkpoint for .*-classification: its configuration names {named}"):
        pipeline(task, tmp_path, device="cpu")
    settings = json.loads((tmp_path / "config.json").read_text()) | {"architectures": None}  # nothing tells
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert pipeline("ner", tmp_path, device="cpu")("a cat")


def test_a_pair_of_texts_needs_two_segments(tokenizer, tmp_path):
    """A BERT checkpoint has folded its first into the positions."""
    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    transformers.BertForQuestionAnswering(config).save_pretrained(tmp_path)
    answer = pipeline("question-answering", tmp_path, tokenizer)
    with pytest.raises(ValueError, match=r"converted for one segment, .* use transformers' own pipeline"):
        answer(question="who", context="a cat")
    extract = pipeline("feature-extraction", tmp_path, tokenizer)
    assert len(extract("a cat")[0]) == 4
    with pytest.raises(ValueError, match="converted for one segment"):
        extract([{"text": "a cat", "text_pair": "a mat"}])


def test_options_for_every_call(tokenizer, their_tokenizer):
    ours, theirs = pair("text-classification", "DistilBertForSequenceClassification", tokenizer, their_tokenizer)
    mine = pipeline("text-classification", ours.model, tokenizer, top_k=None)
    same(mine(TEXTS), theirs(TEXTS, top_k=None))
    same(mine(TEXTS, top_k=1), theirs(TEXTS, top_k=1))
    with pytest.raises(TypeError, match="stride"):
        pipeline("text-classification", ours.model, tokenizer, stride=3)


def test_a_single_answer_stands_alone(answerer):
    """As in 4.57, whatever top_k."""
    found = answerer(question="who", context="a", top_k=5)
    assert isinstance(found, dict) and found["answer"] == "a"
    assert isinstance(answerer(question="who", context="a cat", top_k=5), list)


def test_arguments_of_transformers_pipeline(tmp_path, tokenizer):
    fastdistil.DistilBertForSequenceClassification(DistilBertConfig(**TINY)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = DistilBertConfig.from_pretrained(tmp_path, id2label={0: "no", 1: "yes"})
    pipe = pipeline(
        "sentiment-analysis", tmp_path, (tmp_path, {"truncation_side": "left"}), config=config,
        model_kwargs={"torch_dtype": "float64", "attn_implementation": "eager"}, feature_extractor=None, device=-1,
    )  # fmt: skip
    assert (pipe.task, pipe.device, pipe.model.dtype) == ("text-classification", torch.device("cpu"), torch.float64)
    assert pipe.tokenizer.truncation_side == "left" and pipe("one")[0]["label"] in ("no", "yes")


def test_labels_with_more_than_one_dash(tokenizer, their_tokenizer):
    labels = {0: "O", 1: "B-LOC-CITY", 2: "I-LOC-CITY", 3: "X-PER", 4: "I-LOC"}
    settings = {"id2label": labels, "label2id": {v: k for k, v in labels.items()}}
    ours, theirs = pair(
        "token-classification", "DistilBertForTokenClassification", tokenizer, their_tokenizer, **settings
    )
    found = ours(TEXTS, aggregation_strategy="simple", ignore_labels=[])
    same(found, theirs(TEXTS, aggregation_strategy="simple", ignore_labels=[]))
    assert {"LOC-CITY", "PER"} & {entity["entity_group"] for text in found for entity in text}


def test_a_flexible_regression_is_not_squashed(tokenizer):
    torch.manual_seed(0)
    model = DistilBertModelWithHeads(DistilBertConfig(**TINY)).eval()
    settings = {"head_type": "classification", "num_labels": 2, "problem_type": "regression"}
    model.add_prediction_head_from_config("a", settings)
    with torch.inference_mode():
        logits = model(torch.tensor([tokenizer.encode("text")])).logits[0]
    found = {
        one["label"]: one["score"] for one in pipeline("text-classification", model, tokenizer)("text", top_k=None)
    }
    assert found == pytest.approx({f"LABEL_{i}": value for i, value in enumerate(logits.tolist())}, abs=1e-6)


def test_labels_that_are_all_forbidden(tokenizer, their_tokenizer):
    ours, _ = pair("text-classification", "DistilBertForSequenceClassification", tokenizer, their_tokenizer)
    with torch.no_grad():
        ours.model.classifier.bias[0] = -torch.inf
        assert ours("text")[0]["label"] == "LABEL_1"
        ours.model.classifier.bias[1] = -torch.inf
    with pytest.raises(ValueError, match=r"inputs\[0\]: the model's answer is not finite"):
        ours("text")


def test_labels_that_are_numbers(tokenizer):
    model = fastdistil.DistilBertForTokenClassification(DistilBertConfig(**TINY)).eval()
    model.config.id2label = {0: 5, 1: 7}
    found = pipeline("token-classification", model, tokenizer)("some text", aggregation_strategy="simple")
    assert {entity["entity_group"] for entity in found} <= {"5", "7"} and found


def test_a_softmax_of_large_numbers():
    assert pipelines._softmax(np.float32([[1000, 0]])).tolist() == [[1, 0]]


def test_tokens_of_a_long_text_are_cut(tokenizer, their_tokenizer):
    ours, _ = pair("token-classification", "DistilBertForTokenClassification", tokenizer, their_tokenizer)
    found = ours("word " * 600, ignore_labels=[])
    assert len(found) == 62 and found[-1]["end"] == 62 * 5 - 1


def test_one_text_whose_labels_are_all_forbidden(tokenizer, their_tokenizer):
    ours, _ = pair("text-classification", "DistilBertForSequenceClassification", tokenizer, their_tokenizer)
    forward = ours.model.classifier.forward
    ours.model.classifier.forward = lambda x: forward(x).index_fill(0, torch.tensor([1]), -torch.inf)
    with pytest.raises(pipelines.BadInputs) as caught:
        ours(["aaa", "aaa aaa"], max_length=16)
    assert len(caught.value.messages) == 1


def test_a_text_of_one_token_too_many(tokenizer, their_tokenizer):
    ours, _ = pair("text-classification", "DistilBertForSequenceClassification", tokenizer, their_tokenizer)
    assert ours("a " * 62)
    with pytest.raises(ValueError, match=r"inputs\[0\] is 65 tokens long, the model has 64 positions"):
        ours("a " * 63)


def test_a_flexible_multilabel_head_gives_each_label_its_own(tokenizer):
    torch.manual_seed(0)
    model = DistilBertModelWithHeads(DistilBertConfig(**TINY)).eval()
    model.add_classification_head("a", num_labels=3, multilabel=True)
    with torch.inference_mode():
        expected = model(torch.tensor([tokenizer.encode("text")])).logits[0].sigmoid()
    found = {
        one["label"]: one["score"] for one in pipeline("text-classification", model, tokenizer)("text", top_k=None)
    }
    assert found == pytest.approx({f"LABEL_{i}": value for i, value in enumerate(expected.tolist())}, abs=1e-6)


def test_states_hold_no_more_than_their_own(tokenizer):
    model = fastdistil.DistilBertModel(DistilBertConfig(**TINY)).eval()
    for one in pipeline("feature-extraction", model, tokenizer)(["a", "b c d e", "f"], return_tensors=True):
        assert one.untyped_storage().nbytes() == one.numel() * 4


@pytest.mark.parametrize("spread", [1, 100, 20_000])
@pytest.mark.parametrize(
    ("candidates", "longest"), [(1, 15), (12, 15), (50, 15), (12, 1), (12, 3), (30, 1000), (400, 5)]
)
def test_spans_by_their_definition(spread, candidates, longest, tokenizer, answerer):
    """transformers': the likeliest of all pairs of tokens, then without those that are none or outside the text; also
    where most have no probability at all."""
    rng = np.random.default_rng(candidates)
    for text in ("a cat", "the cat sat on a mat and was a dog in paris, or a bird"):
        window = tokenizer("who?", text).encodings[0]
        for _ in range(5):
            logits = np.float32(rng.normal(scale=spread, size=(len(window.ids), 2)))
            allowed = np.array([i == 1 for i in window.sequence_ids])
            allowed[0] = True
            start, end = (pipelines._softmax(np.where(allowed, x, np.float32(-10000))) for x in logits.T)
            null = float(start[0] * end[0])
            start[0] = end[0] = 0
            scores = np.tril(np.triu(np.outer(start, end)), longest - 1)
            firsts, lasts = np.unravel_index(np.argsort(-scores, axis=None, kind="stable")[:candidates], scores.shape)
            expected = [
                (float(scores[i, j]), i, j)
                for i, j in zip(firsts.tolist(), lasts.tolist(), strict=True)
                if 0 < i <= j < i + longest and allowed[i] and allowed[j]
            ]
            assert answerer._spans(window, logits, candidates, longest) == (null, expected)


def test_a_pair_as_the_text_of_a_dictionary(tokenizer):
    torch.manual_seed(3)
    model = fastdistil.DistilBertForSequenceClassification(DistilBertConfig(**TINY))
    ours = pipeline("text-classification", model, tokenizer)
    pair, alone = ours([{"text": "a cat", "text_pair": "it sat"}]), ours(["the mat"])
    assert pair != ours(["a cat"])
    for one in (["a cat", "it sat"], ("a cat", "it sat")):
        same(ours([{"text": one}]), pair)
        same(ours([{"text": one}, "the mat", {"text": "the mat"}]), [*pair, *alone, *alone])
    ours.encoder.config.token_types_folded = True
    with pytest.raises(ValueError, match="converted for one segment"):
        ours([{"text": ["a cat", "it sat"]}])
    with pytest.raises(TypeError, match=r"inputs\[1\] must be a string"):
        ours(["a cat", {"text": ["a", "b", "c"]}])


def test_what_is_ready_is_what_a_call_gives(tokenizer):
    torch.manual_seed(3)
    model = fastdistil.DistilBertForSequenceClassification(DistilBertConfig(**TINY))
    for options in ({}, {"top_k": 2}, {"top_k": None}):
        ours = pipeline("text-classification", model, tokenizer, **options)
        for given in ("a cat", ["a cat", "it sat"]):
            found = ours.ready(given)()
            assert found == ours(given) and ours.ready(given, top_k=1)() == ours(given, top_k=1)
            assert len(found) == (1 if given == "a cat" else 2) and isinstance(found[0], list if options else dict)


def test_states_are_no_part_of_a_batchs(tokenizer, monkeypatch):
    pipe = pipeline("feature-extraction", fastdistil.DistilBertModel(DistilBertConfig(**TINY)), tokenizer)
    batch = np.zeros((4, 16), np.float32)
    monkeypatch.setattr(pipe, "run", lambda rows: iter([(0, batch[:2]), (1, batch[2:])]))
    for one in pipe(["a", "b"], return_tensors=True):
        assert one.shape == (1, 2, 16) and not np.shares_memory(one.numpy(), batch)


def test_memory_that_runs_out_is_told_by_its_input(answerer, tokenizer, monkeypatch):
    """Not by its window's number."""
    forward, dog = answerer.encoder.forward_packed, tokenizer.convert_tokens_to_ids("dog")

    def without_memory_for_dogs(ids, *args, **kwargs):
        if (ids == dog).any():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(ids, *args, **kwargs)

    monkeypatch.setattr(answerer.encoder, "forward_packed", without_memory_for_dogs)
    contexts = ["a cat " * 50, "a dog", "a bird"]  # three windows, one, one
    options = {"max_seq_len": 40, "doc_stride": 0}
    assert len(answerer(question=["who?"] * 2, context=contexts[::2], **options)) == 2
    with pytest.raises(MemoryError, match=r"^inputs\[1\]: there is no memory for a text of 7 tokens"):
        answerer(question=["who?"] * 3, context=contexts, **options)


def test_no_answer_is_as_likely_as_in_the_surest_window(answerer, monkeypatch):
    """transformers 4.57 takes the smallest of the windows' probabilities of no answer."""
    likely = iter([0.5, 0.25, 0.75])
    monkeypatch.setattr(answerer, "_spans", lambda *args: (next(likely), []))
    options = {"max_seq_len": 40, "doc_stride": 0, "handle_impossible_answer": True}
    assert answerer(question="who?", context="a cat " * 50, **options)["score"] == 0.25
    assert next(likely, None) is None  # three windows


def test_how_long_the_windows_of_a_context_are(tokenizer, monkeypatch):
    model = fastdistil.DistilBertForQuestionAnswering(DistilBertConfig(**TINY | {"max_position_embeddings": 512}))
    ours = pipeline("question-answering", model, tokenizer)
    asked = {"question": "who?", "context": "a cat " * 400}

    def longest():
        seen = []
        run = ours.run
        with monkeypatch.context() as patch:
            patch.setattr(ours, "run", lambda ids, **options: (seen.extend(map(len, ids)), run(ids, **options))[1])
            ours(**asked)
        return max(seen)

    assert longest() == 384
    monkeypatch.setattr(ours.tokenizer, "model_max_length", 48)
    assert longest() == 48


def test_a_question_as_one_dictionary(answerer):
    asked = {"question": "who?", "context": "a cat"}
    assert answerer(asked) == answerer([asked]) == answerer(**asked)
    assert isinstance(answerer(asked), dict)


@pytest.mark.parametrize("targets", [["##ing", "dog"], ["[MASK]", "cat"], ["cat", "cat", "dog"], "the"], ids=str)
def test_targets_that_the_vocabulary_has(targets, tokenizer, their_tokenizer, caplog):
    ours, theirs = pair("fill-mask", "DistilBertForMaskedLM", tokenizer, their_tokenizer)
    same(ours(MASKED[0], targets=targets), theirs(MASKED[0], targets=targets))
    assert not caplog.text


def test_padding_that_is_filled_in(tokenizer, their_tokenizer):
    """It is no word of the sequence where other masks stay in it, as in transformers."""
    ours, theirs = pair("fill-mask", "DistilBertForMaskedLM", tokenizer, their_tokenizer)
    text = "a [MASK] and a [MASK] and a dog"
    found = ours(text, targets=["[PAD]", "[SEP]", "cat"])
    same(found, theirs(text, targets=["[PAD]", "[SEP]", "cat"]))
    filled = {one["token_str"]: one["sequence"] for one in found[0]}
    assert filled["[PAD]"].count("[PAD]") == 0 and filled["[SEP]"].count("[SEP]") == 2


@pytest.mark.parametrize("ignored", [None, [], ["O"], ["B-PER"], ("O", "B-LOC")], ids=str)
def test_labels_that_are_left_out(ignored, tokenizer, their_tokenizer):
    settings = {"id2label": NER, "label2id": {v: k for k, v in NER.items()}}
    name = "DistilBertForTokenClassification"
    ours, theirs = pair("token-classification", name, tokenizer, their_tokenizer, **settings)
    found = ours(TEXTS, ignore_labels=ignored)
    same(found, theirs(TEXTS, ignore_labels=ignored))
    every = {entity["entity"] for text in ours(TEXTS, ignore_labels=[]) for entity in text}
    left = {entity["entity"] for text in found for entity in text}
    assert {"O", "B-PER"} <= every and left == every - set(("O",) if ignored is None else ignored)


@pytest.mark.parametrize("ignored", [["PER"], ["B-PER"], ["O", "LOC"], [], ("PER",), {"LOC": 1}], ids=str)
@pytest.mark.parametrize("strategy", ["simple", "first", "average", "max"])
def test_names_that_are_left_out(strategy, ignored, tokenizer, their_tokenizer):
    """By the name of their group, which has lost its B- or I-."""
    settings = {"id2label": NER, "label2id": {v: k for k, v in NER.items()}}
    name = "DistilBertForTokenClassification"
    ours, theirs = pair("token-classification", name, tokenizer, their_tokenizer, **settings)
    found = ours(TEXTS, aggregation_strategy=strategy, ignore_labels=ignored)
    same(found, theirs(TEXTS, aggregation_strategy=strategy, ignore_labels=ignored))
    left = {entity["entity_group"] for text in found for entity in text}
    assert left == {"O", "PER", "LOC"} - set(ignored)
    same(ours(TEXTS, aggregation_strategy=strategy, ignore_labels=iter(ignored)), found)  # which is read once


def test_transformers_names_for_ways_to_cut(tokenizer):
    torch.manual_seed(3)
    model = fastdistil.DistilBertForSequenceClassification(DistilBertConfig(**TINY))
    ours, text = pipeline("text-classification", model, tokenizer), "the cat sat on the mat and was a dog"
    short, whole = ours("the cat sat on"), ours(text)
    for truncation, expected in (("longest_first", short), ("only_first", short), (True, short)):
        same(ours(text, truncation=truncation, max_length=6), expected)
    for truncation in ("do_not_truncate", False):
        same(ours(text, truncation=truncation, max_length=6), whole)
    assert abs(short[0]["score"] - whole[0]["score"]) > 1e-4


def test_an_infinite_answer_is_none(tokenizer):
    torch.manual_seed(3)
    ours = pipeline(
        "text-classification", fastdistil.DistilBertForSequenceClassification(DistilBertConfig(**TINY)), tokenizer
    )
    with torch.no_grad():
        ours.model.classifier.bias[0] = torch.inf
    with pytest.raises(ValueError, match=r"inputs\[0\]: the model's answer is not finite"):
        ours("a cat")


@pytest.mark.parametrize("task", ["text-classification", "token-classification", "question-answering", "fill-mask"])
def test_the_time_of_tokens_and_of_the_model_is_told_apart(task, tokenizer, monkeypatch):
    names = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM")
    kinds = ("text-classification", "token-classification", "question-answering", "fill-mask")
    name = dict(zip(kinds, names, strict=True))[task]
    ours = pipeline(task, getattr(fastdistil, f"DistilBertFor{name}")(DistilBertConfig(**TINY)), tokenizer)
    given, prepare = (
        {"question": "who?", "context": "a cat"} if task == "question-answering" else "a [MASK]",
        ours.prepare,
    )
    monkeypatch.setattr(ours, "prepare", lambda *a, **k: time.sleep(0.1) or prepare(*a, **k))
    ours(given)
    # the engine's own look at its windows, which are made by then, counts as tokenising too
    tokens, model = (ours.stages.seconds[name] for name in ("tokenizer", "model"))
    assert tokens > 0.09 and model > 0
    answers = ours.ready(given)
    assert ours.stages.seconds == {"tokenizer": tokens, "model": model} and answers()
    assert ours.stages.seconds["model"] > model


def test_labels_that_end_alike(tokenizer, their_tokenizer):
    """What stands before a label's third letter is part of it unless it is B- or I-."""
    labels = {0: "xxname", 1: "yyname", 2: "I-name", 3: "B-name", 4: "name"}
    settings = {"id2label": labels, "label2id": {v: k for k, v in labels.items()}}
    name = "DistilBertForTokenClassification"
    ours, theirs = pair("token-classification", name, tokenizer, their_tokenizer, **settings)
    options = {"aggregation_strategy": "simple", "ignore_labels": []}
    found = ours(TEXTS, **options)
    same(found, theirs(TEXTS, **options))
    each = [[entity["entity"] for entity in text] for text in ours(TEXTS, ignore_labels=[])]
    assert any({"xxname", "yyname"} == {a, b} for text in each for a, b in itertools.pairwise(text))


def test_the_precision_of_a_checkpoint_of_half_precision(tokenizer, tmp_path):
    fastdistil.DistilBertForSequenceClassification(DistilBertConfig(**TINY)).half().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    kinds = {"device": "cpu"}, {"device": "cpu", "dtype": "auto"}, {"device": "cpu", "torch_dtype": "auto"}
    for options in kinds:
        assert pipeline("text-classification", tmp_path, **options).model.dtype is torch.float32
    for options in ({"dtype": torch.float16}, {"model_kwargs": {"dtype": torch.float16}}, {"torch_dtype": "float16"}):
        assert pipeline("text-classification", tmp_path, device="cpu", **options).model.dtype is torch.float16


def test_states_of_a_flexible_checkpoint(tokenizer, tmp_path):
    """Its heads are not asked for."""
    torch.manual_seed(0)
    model = DistilBertModelWithHeads(DistilBertConfig(**TINY)).eval()
    model.add_tagging_head("names", num_labels=5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = pipeline("feature-extraction", tmp_path, device="cpu")
    assert type(found.model) is fastdistil.DistilBertModel
    same(found(TEXTS), pipeline("feature-extraction", model.distilbert, tokenizer)(TEXTS))


def test_an_option_of_a_call_comes_before_one_of_its_tokenizer(tokenizer):
    model = fastdistil.DistilBertModel(DistilBertConfig(**TINY)).eval()
    extract = pipeline("feature-extraction", model, tokenizer)
    text = "a cat sat on the mat"
    assert len(extract(text, tokenize_kwargs={"truncation": True, "max_length": 4})[0]) == 4
    assert len(extract(text, tokenize_kwargs={"max_length": 4}, max_length=6)[0]) == 6
    assert len(extract(text, tokenizer_kwargs={"max_length": 4}, tokenize_kwargs={"max_length": 5})[0]) == 5
