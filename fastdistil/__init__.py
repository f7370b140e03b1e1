"""fastdistil: DistilBERT encoders on packed rows, exact and fast."""

from fastdistil import ops
from fastdistil.config import DistilBertConfig
from fastdistil.engine import Embedder
from fastdistil.flexible_heads import DistilBertAdapterModel, DistilBertModelWithHeads
from fastdistil.heads import (
    DistilBertForMaskedLM,
    DistilBertForMultipleChoice,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
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
