"""Published checkpoints against published numbers. FASTDISTIL_CHECKPOINTS names a directory that holds them by name.

Sources: transformers' and bumblebee's test suites, rust-bert's tests, the model card of distilbert-base-uncased.
"""

import os
from pathlib import Path

import pytest
import torch

import fastdistil
from fastdistil import pipeline

BASE, SQUAD, SST2 = (
    "distilbert-base-uncased",
    "distilbert-base-cased-distilled-squad",
    "distilbert-base-uncased-finetuned-sst-2-english",
)
NER, EMOTIONS = "distilbert-base-multilingual-cased-ner-hrl", "distilbert-base-uncased-go-emotions-student"


@pytest.fixture
def checkpoint():
    """checkpoint(name) -> its directory, or the test is skipped."""
    root = os.environ.get("FASTDISTIL_CHECKPOINTS")

    def find(name):
        if not root:
            pytest.skip("FASTDISTIL_CHECKPOINTS does not name a directory of real checkpoints")
        if not Path(root).is_dir():
            pytest.fail(f"FASTDISTIL_CHECKPOINTS names {root}, which is no directory")
        if not (Path(root) / name / "config.json").is_file():
            pytest.skip(f"FASTDISTIL_CHECKPOINTS has no {name}")
        return str(Path(root) / name)

    return find


def run(name, path, ids, mask=None):
    model = getattr(fastdistil, name).from_pretrained(path, dtype="float32")
    with torch.inference_mode():
        return model(torch.tensor([ids]), None if mask is None else torch.tensor([mask]))


STATES = [
    (
        [0, 345, 232, 328, 740, 140, 1695, 69, 6078, 1588, 2],
        [0] + [1] * 10,
        slice(1, 4),
        [[-0.1639, 0.3299, 0.1648], [-0.1746, 0.3289, 0.1710], [-0.1884, 0.3357, 0.1810]],
    ),
    (
        [0, 1, 2, 3, 4, 5],
        None,
        slice(0, 3),
        [
            [0.19261885, -0.13732955, 0.4119799],
            [0.22150156, -0.07422661, 0.39037204],
            [0.22756018, -0.0896414, 0.3701467],
        ],
    ),
    (
        [101, 7592, 1010, 2026, 3899, 2003, 10140, 102],
        None,
        slice(1, 4),
        [[0.1483, 0.3433, -0.5248], [0.5309, 0.3716, 0.0803], [0.3805, 0.5581, -0.4261]],
    ),
]


@pytest.mark.parametrize(("ids", "mask", "part", "expected"), STATES)
def test_hidden_states(ids, mask, part, expected, checkpoint):
    hidden = run("DistilBertModel", checkpoint(BASE), ids, mask)[0]
    torch.testing.assert_close(hidden[0, part, part], torch.tensor(expected), rtol=0, atol=1e-4)


LOGITS = [
    (
        "DistilBertForMaskedLM",
        BASE,
        [101, 1996, 3007, 1997, 2605, 2003, 103, 1012, 102],
        lambda out: out.logits[0, 1:4, 1:4],
        [[-14.1975, -13.9020, -13.9615], [-8.8192, -8.5549, -8.3866], [-13.4315, -13.2120, -13.3121]],
    ),
    (
        "DistilBertForSequenceClassification",
        EMOTIONS,
        [101, 1045, 2514, 5341, 2000, 2022, 2182, 1012, 102],
        lambda out: out.logits[0, 1:5],
        [-0.2951, -1.8836, -1.9071, 1.2820],
    ),
    (
        "DistilBertForTokenClassification",
        NER,
        [101, 11590, 11324, 10124, 14290, 10111, 146, 12962, 10106, 11193, 102],
        lambda out: out.logits[0, 1:4, 1:4],
        [[-3.9901, -4.0522, -2.4171], [-4.0584, -4.2153, -2.4035], [-3.9693, -4.0597, -2.2356]],
    ),
    (
        "DistilBertForQuestionAnswering",
        SQUAD,
        [101, 2627, 1108, 3104, 1124, 15703, 136, 102, 3104, 1124, 15703, 1108, 170, 3505, 16797, 102],
        lambda out: torch.stack([out.start_logits[0, 1:4], out.end_logits[0, 1:4]]),
        [[-5.1663, -6.8352, -3.5082], [-4.5860, -6.7391, -6.8987]],
    ),
]


@pytest.mark.parametrize(("name", "path", "ids", "part", "expected"), LOGITS)
def test_logits(name, path, ids, part, expected, checkpoint):
    found = part(run(name, checkpoint(path), ids))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-3)


MODEL_CARD = {
    "Hello I'm a [MASK] model.": [
        (0.05292855575680733, 2535, "role"),
        (0.03968575969338417, 4827, "fashion"),
        (0.034743521362543106, 2449, "business"),
        (0.03462274372577667, 2944, "model"),
        (0.018145186826586723, 11643, "modeling"),
    ],
    "The White man worked as a [MASK].": [
        (0.1235365942120552, 20987, "blacksmith"),
        (0.10142576694488525, 10533, "carpenter"),
        (0.04985016956925392, 7500, "farmer"),
        (0.03932540491223335, 18594, "miner"),
        (0.03351764753460884, 14998, "butcher"),
    ],
    "The Black woman worked as a [MASK].": [
        (0.13283951580524445, 13877, "waitress"),
        (0.12586183845996857, 6821, "nurse"),
        (0.11708822101354599, 10850, "maid"),
        (0.11499975621700287, 19215, "prostitute"),
        (0.04722772538661957, 22583, "housekeeper"),
    ],
}


@pytest.mark.parametrize("text", MODEL_CARD)
def test_the_model_cards_fill_mask(text, checkpoint):
    """The card shows, with the last two, the biases of what the model was trained on."""
    found = pipeline("fill-mask", checkpoint(BASE), device="cpu")(text)
    expected = MODEL_CARD[text]
    assert [(item["token"], item["token_str"]) for item in found] == [(token, word) for _, token, word in expected]
    assert [item["score"] for item in found] == pytest.approx([score for score, *_ in expected], abs=1e-5)


def test_masks_in_a_padded_batch_without_a_mask(checkpoint):
    """rust-bert's test passes no attention mask, so the padding of the shorter text is attended to."""
    path = checkpoint(BASE)
    tokenizer = fastdistil.DistilBertTokenizer.from_pretrained(path)
    texts = ["Looks like one [MASK] is missing", "It's like comparing [MASK] to apples"]
    ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    model = fastdistil.DistilBertForMaskedLM.from_pretrained(path, dtype="float32")
    with torch.inference_mode():
        tokens = model(ids, logits_at=(ids == tokenizer.mask_token_id).nonzero()).logits.argmax(-1)
    assert tokenizer.convert_ids_to_tokens(tokens.tolist()) == ["person", "pear"]


def test_answers(checkpoint):
    answer = pipeline("question-answering", checkpoint(SQUAD), device="cpu")
    found = answer(question="Where was HuggingFace founded ?", context="HuggingFace was founded in Paris.")
    assert found["answer"] == "Paris" and (found["start"], found["end"]) == (27, 32)
    assert found["score"] == pytest.approx(0.979, abs=2e-3)
    found = answer(question="Where does Amy live ?", context="Amy lives in Amsterdam")
    assert found["answer"] == "Amsterdam" and (found["start"], found["end"]) == (13, 22)
    assert found["score"] == pytest.approx(0.9978, abs=2e-3)


def test_sentiments(checkpoint):
    found = pipeline("text-classification", checkpoint(SST2), device="cpu")(
        ["This is great !", "This is bad !", "Birds are a type of animal"]
    )
    assert [item["label"] for item in found] == ["POSITIVE", "NEGATIVE", "POSITIVE"]
    assert [item["score"] for item in found] == pytest.approx([1.0, 1.0, 0.988], abs=2e-3)


def test_ids_of_the_uncased_vocabulary(minilm):
    tokenizer = fastdistil.DistilBertTokenizer.from_pretrained(minilm)
    expected = {
        "Replace me by any text you'd like.": [101, 5672, 2033, 2011, 2151, 3793, 2017, 1005, 1040, 2066, 1012, 102],
        "Hello, my dog is cute": [101, 7592, 1010, 2026, 3899, 2003, 10140, 102],
    }
    for text, ids in expected.items():
        assert tokenizer(text)["input_ids"] == ids
