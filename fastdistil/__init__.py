"""fastdistil: DistilBERT encoders on packed rows, exact and fast."""

from fastdistil import ops
from fastdistil.config import DistilBertConfig
from fastdistil.engine import Embedder
from fastdistil.heads import (
    DistilBertAdapterModel,
    DistilBertForMaskedLM,
    DistilBertForMultipleChoice,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModelWithHeads,
)
from fastdistil.integrations import accelerate, restore
from fastdistil.model import DistilBertModel
from fastdistil.pipelines import pipeline
from fastdistil.tokenizer import DistilBertTokenizer

__version__ = "0.1.0"
__all__ = [
    "DistilBertAdapterModel",
    "DistilBertConfig",
    "DistilBertForMaskedLM",
    "DistilBertForMultipleChoice",
    "DistilBertForQuestionAnswering",
    "DistilBertForSequenceClassification",
    "DistilBertForTokenClassification",
    "DistilBertModel",
    "DistilBertModelWithHeads",
    "DistilBertTokenizer",
    "Embedder",
    "accelerate",
    "ops",
    "pipeline",
    "restore",
]
