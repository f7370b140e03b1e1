"""fastdistil: DistilBERT encoders on packed rows, exact and fast."""

from fastdistil import ops
from fastdistil.config import DistilBertConfig
from fastdistil.engine import Embedder
from fastdistil.heads import (
    DistilBertForMaskedLM,
    DistilBertForMultipleChoice,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
)
from fastdistil.model import DistilBertModel
from fastdistil.tokenizer import DistilBertTokenizer

__version__ = "0.1.0"
__all__ = [
    "DistilBertConfig",
    "DistilBertForMaskedLM",
    "DistilBertForMultipleChoice",
    "DistilBertForQuestionAnswering",
    "DistilBertForSequenceClassification",
    "DistilBertForTokenClassification",
    "DistilBertModel",
    "DistilBertTokenizer",
    "Embedder",
    "ops",
]
