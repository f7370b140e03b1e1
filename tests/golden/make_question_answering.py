"""What transformers 4.57.6, the last with a question-answering pipeline, answers: `question_answering.json`.

    python tests/golden/make_question_answering.py MINILM      # in an environment of its own that holds it

MINILM: a directory with the bert-base-uncased vocabulary. The model is tiny and random; its weights come from the seed,
which gives the same ones in fastdistil.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import DistilBertConfig, DistilBertForQuestionAnswering, DistilBertTokenizerFast, pipeline

HERE = Path(__file__).resolve().parent
CONFIG = dict(vocab_size=30522, dim=16, n_heads=2, hidden_dim=32, n_layers=1, initializer_range=1.0)
LONG = " ".join(
    f"In {year} the town of Number{year % 7}ville had {year * 3} people, who lived there." for year in range(1700, 1760)
)
SAMPLES = [
    {"question": "Where was the library founded?", "context": "The library was founded in Paris by three engineers."},
    {
        "question": "Who wrote it?",
        "context": "Unbelievably, Jean-Baptiste's great-grandmother (née Müller) wrote it. Anne.",
    },
    {"question": "How many people lived there?", "context": LONG},
    {"question": "what is the the", "context": "the the the The THE the the"},
]
OPTIONS = [
    {},
    {"top_k": 3},
    {"top_k": 4, "align_to_words": False},
    {"top_k": 2, "handle_impossible_answer": True},
    {"top_k": 3, "max_seq_len": 48, "doc_stride": 12},
    {"top_k": 2, "max_answer_len": 2},
    {"top_k": 5, "max_seq_len": 40, "doc_stride": 0, "handle_impossible_answer": True},
]


def main(path):
    torch.manual_seed(0)
    model = DistilBertForQuestionAnswering(DistilBertConfig(**CONFIG)).eval()
    qa = pipeline("question-answering", model=model, tokenizer=DistilBertTokenizerFast.from_pretrained(path))
    answers = [[qa(**sample, **options) for sample in SAMPLES] for options in OPTIONS]
    out = {
        "transformers": transformers.__version__,
        "config": CONFIG,
        "samples": SAMPLES,
        "options": OPTIONS,
        "answers": answers,
    }
    (HERE / "question_answering.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
