"""DistilBERT's heads: what they read, how they are trained, and transformers' classes around them.

`HEADS` describes each kind of head once. A head is a list of layers; `read` runs it on what the encoder leaves, packed
where it is packed, and pads its logits at the end. At padded positions logits are those of a hidden state of zeros.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdistil.config import ACTIVATION_ALIASES, DistilBertConfig
from fastdistil.model import DistilBertModel, Encoded, PreTrainedModel, apply_linear, mean_rows
from fastdistil.outputs import (
    MaskedLMOutput,
    ModelOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

IGNORED = -100  # a label that counts for nothing
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_new": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


# --- losses ---------------------------------------------------------------------------------------------------------


def sequence_loss(logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """logits: [batch, n]; labels: [batch] class numbers, [batch] or [batch, n] values, or [batch, n] of 0 and 1."""
    if problem_type == "single_label_classification":
        return token_loss(logits, labels, problem_type)
    if labels.numel() != logits.numel():
        raise ValueError(f"labels must hold {logits.numel()} values for {problem_type}, got {list(labels.shape)}")
    if problem_type == "regression":
        return F.mse_loss(logits.flatten(), labels.flatten())
    return F.binary_cross_entropy_with_logits(logits, labels.view_as(logits).to(logits.dtype))


def token_loss(logits: Tensor, labels: Tensor, problem_type: str = "") -> Tensor:
    """Cross entropy; logits: [..., n]; labels: [...] class numbers, -100 where none."""
    logits = logits.flatten(0, -2)
    if labels.is_floating_point() or labels.numel() != len(logits):
        raise ValueError(f"labels must be {len(logits)} integers, got {labels.dtype} {list(labels.shape)}")
    _check_labels(labels, logits.shape[-1])
    return F.cross_entropy(logits, labels.flatten().long(), ignore_index=IGNORED)


def span_loss(logits: Tensor, labels: tuple[Tensor, Tensor], problem_type: str = "") -> Tensor:
    """logits: [batch, length, 2]; labels: the first and the last token, [batch] or [batch, 1] each. A negative one is
    0, one past the end counts for nothing."""
    length = logits.shape[1]
    losses = []
    for name, scores, wanted in zip(("start_positions", "end_positions"), logits.unbind(-1), labels, strict=True):
        if wanted.is_floating_point() or wanted.numel() != len(scores):
            raise ValueError(f"{name} must be {len(scores)} integers, got {wanted.dtype} {list(wanted.shape)}")
        losses.append(F.cross_entropy(scores, wanted.flatten().long().clamp(0, length), ignore_index=length))
    return (losses[0] + losses[1]) / 2


def _check_labels(labels: Tensor, classes: int) -> None:
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return  # reading a value back would stall the device
    outside = ((labels < 0) | (labels >= classes)) & (labels != IGNORED)
    for place in outside.nonzero().tolist():
        raise ValueError(
            f"labels{place} is {int(labels[tuple(place)])}, but there are {classes} classes, and {IGNORED} for none"
        )


# --- the kinds of heads ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadType:
    """output: what a model returns. loss(logits, labels, problem_type). first: reads a sequence's first token only."""

    output: Callable[..., ModelOutput]
    loss: Callable[[Tensor, Any, str], Tensor]
    first: bool = False


HEADS = {
    "classification": HeadType(SequenceClassifierOutput, sequence_loss, first=True),
    "tagging": HeadType(TokenClassifierOutput, token_loss),
    "question_answering": HeadType(QuestionAnsweringModelOutput, span_loss),
    "multiple_choice": HeadType(MultipleChoiceModelOutput, token_loss, first=True),
    "masked_lm": HeadType(MaskedLMOutput, token_loss),
}


def score(layers: Sequence[nn.Module], x: Tensor, live: Tensor | None = None) -> Tensor:  # [..., dim] -> [..., out]
    for layer in layers:
        x = apply_linear(layer, x, live) if isinstance(layer, nn.Linear) and x.dim() == 2 else layer(x)
    return x


def read(layers: Sequence[nn.Module], encoded: Encoded) -> Tensor:
    """A head's logits: [batch, length, out], or [n, out] of the tokens the encoder was asked for."""
    x, at = encoded.hidden, encoded.at
    if at is None:
        return score(layers, x)
    logits = score(layers, x, at.live)  # [rows, out]
    if at.source is None:
        return at.unpack(logits)
    return at.unpack(logits, fill=score(layers, x.new_zeros(1, x.shape[1])))


def finish(kind: str, logits: Tensor, labels: Any, problem_type: str, encoded: Encoded) -> ModelOutput:
    """The output of a head's kind, with a loss if there are labels."""
    head = HEADS[kind]
    loss = None if labels is None else head.loss(logits, labels, problem_type)
    if kind == "question_answering":
        start, end = logits.unbind(-1)
        return head.output(loss, start.contiguous(), end.contiguous(), encoded.states, encoded.attentions)
    return head.output(loss, logits, encoded.states, encoded.attentions)


# --- transformers' classes ------------------------------------------------------------------------------------------


class _WithHead(PreTrainedModel):
    """An encoder, `distilbert`, and one head. Subclasses make the head's layers and list them."""

    head_type: ClassVar[str]

    def __init__(self, config: DistilBertConfig):
        super().__init__(config)
        self.distilbert = DistilBertModel(config)

    def layers(self) -> list[nn.Module]:
        raise NotImplementedError

    def post_init(self) -> None:
        if self.device.type != "meta":  # the encoder has had its own
            for name, module in self.named_children():
                if name != "distilbert":
                    module.apply(self._init_weights)

    def cuda_graphs(self, on: bool = True, most: int = 64) -> Any:
        """As `DistilBertModel.cuda_graphs`, for the encoder; returns the model."""
        self.distilbert.cuda_graphs(on, most)
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> ModelOutput | tuple:
        encoded = self.distilbert.encode(
            input_ids,
            attention_mask,
            head_mask,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            position_ids,
            token_type_ids,
            only="first" if HEADS[self.head_type].first else None,
        )
        return self._answer(encoded, read(self.layers(), encoded), labels, return_dict)

    def _answer(self, encoded: Encoded, logits: Tensor, labels: Any, return_dict: bool | None) -> ModelOutput | tuple:
        problem_type = "" if labels is None else self._problem_type(labels)
        out = finish(self.head_type, logits, labels, problem_type, encoded)
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()

    def _problem_type(self, labels: Any) -> str:
        return ""


class DistilBertForMaskedLM(_WithHead):
    """Scores of every vocabulary entry at every token, by the word embeddings unless config.tie_word_embeddings is off.

    HF's `DistilBertForMaskedLM`. labels: integers [batch, length], -100 where there is nothing to predict.
    """

    head_type = "masked_lm"

    def __init__(self, config: DistilBertConfig):
        super().__init__(config)
        self.vocab_transform = nn.Linear(config.dim, config.dim)
        self.vocab_layer_norm = nn.LayerNorm(config.dim, eps=1e-12)
        self.vocab_projector = nn.Linear(config.dim, config.vocab_size)
        self.activation = ACTIVATIONS[ACTIVATION_ALIASES[config.activation]]()
        self.post_init()
        self.tie_weights()

    def layers(self) -> list[nn.Module]:
        return [self.vocab_transform, self.activation, self.vocab_layer_norm, self.vocab_projector]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        logits_at: Tensor | None = None,
    ) -> ModelOutput | tuple:
        """Inputs as in `DistilBertModel.forward`. logits_at: int64 [n, 2], the (row, column) of tokens; then logits
        (and labels) are [n, vocab] (and [n]) of those alone, and nothing of [batch, length, vocab] is made."""
        encoded = self.distilbert.encode(
            input_ids,
            attention_mask,
            head_mask,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            position_ids,
            token_type_ids,
            only=logits_at,
        )
        return self._answer(encoded, read(self.layers(), encoded), labels, return_dict)

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        if not self.config.tie_word_embeddings:
            return {}
        return {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"}

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.vocab_projector.weight = self.get_input_embeddings().weight

    def get_output_embeddings(self) -> nn.Linear:
        return self.vocab_projector

    def set_output_embeddings(self, projector: nn.Linear) -> None:
        self.vocab_projector = projector

    @torch.no_grad()
    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in the encoder; the projector follows, with a bias of 0 for new entries."""
        tied = self.vocab_projector.weight is self.get_input_embeddings().weight
        words = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        projector, n = self.vocab_projector, words.num_embeddings
        old = projector.weight
        if tied:
            projector.weight = words.weight
        elif n != len(old):
            new = old.new_empty(n, old.shape[1]).normal_(0, self.config.initializer_range or 0.02)
            if n > len(old) and mean_resizing:
                new[len(old) :] = mean_rows(old, n - len(old))
            new[: len(old)] = old[:n]
            projector.weight = nn.Parameter(new, requires_grad=old.requires_grad)
        bias = projector.bias
        projector.bias = nn.Parameter(F.pad(bias.data, (0, n - len(bias))), requires_grad=bias.requires_grad)
        projector.out_features = n
        return words


class DistilBertForSequenceClassification(_WithHead):
    """Classes or values of a text, read from its first token.

    HF's `DistilBertForSequenceClassification`. labels: by config.problem_type, which the first call with labels sets
    if it is None: regression for one label, single_label_classification (class numbers [batch]) for integers, else
    multi_label_classification ([batch, num_labels] of 0 and 1).
    """

    head_type = "classification"

    def __init__(self, config: DistilBertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.pre_classifier = nn.Linear(config.dim, config.dim)
        self.classifier = nn.Linear(config.dim, config.num_labels)
        self.dropout = nn.Dropout(config.seq_classif_dropout)
        self.post_init()

    def layers(self) -> list[nn.Module]:
        return [self.pre_classifier, nn.ReLU(), self.dropout, self.classifier]

    def _problem_type(self, labels: Tensor) -> str:
        if self.config.problem_type is None:
            if self.num_labels == 1:
                self.config.problem_type = "regression"
            else:
                kind = "multi" if labels.is_floating_point() else "single"
                self.config.problem_type = f"{kind}_label_classification"
        return self.config.problem_type


class DistilBertForTokenClassification(_WithHead):
    """Classes of every token.

    HF's `DistilBertForTokenClassification`. labels: integers [batch, length], -100 where there is nothing to predict.
    """

    head_type = "tagging"

    def __init__(self, config: DistilBertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.dim, config.num_labels)
        self.post_init()

    def layers(self) -> list[nn.Module]:
        return [self.dropout, self.classifier]


class DistilBertForQuestionAnswering(_WithHead):
    """Where an answer starts and ends. HF's `DistilBertForQuestionAnswering`."""

    head_type = "question_answering"

    def __init__(self, config: DistilBertConfig):
        super().__init__(config)
        if config.num_labels != 2:
            raise ValueError(f"config.num_labels is {config.num_labels}; question answering has 2, a start and an end")
        self.qa_outputs = nn.Linear(config.dim, 2)
        self.dropout = nn.Dropout(config.qa_dropout)
        self.post_init()

    def layers(self) -> list[nn.Module]:
        return [self.dropout, self.qa_outputs]

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> ModelOutput | tuple:
        """Inputs as in `DistilBertModel.forward`. start_positions, end_positions: integers [batch], both or no loss."""
        encoded = self.distilbert.encode(
            input_ids,
            attention_mask,
            head_mask,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            position_ids,
            token_type_ids,
        )
        labels = None if start_positions is None or end_positions is None else (start_positions, end_positions)
        return self._answer(encoded, read(self.layers(), encoded), labels, return_dict)


class DistilBertForMultipleChoice(_WithHead):
    """Scores of the choices, each a text of its own. HF's `DistilBertForMultipleChoice`.

    Inputs are [batch, choices, length] (inputs_embeds [batch, choices, length, dim]); labels: integers [batch].
    """

    head_type = "multiple_choice"

    def __init__(self, config: DistilBertConfig):
        super().__init__(config)
        self.pre_classifier = nn.Linear(config.dim, config.dim)
        self.classifier = nn.Linear(config.dim, 1)
        self.dropout = nn.Dropout(config.seq_classif_dropout)
        self.post_init()

    def layers(self) -> list[nn.Module]:
        return [self.pre_classifier, nn.ReLU(), self.dropout, self.classifier]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> ModelOutput | tuple:
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or given.dim() != (3 if inputs_embeds is None else 4):
            shape = None if given is None else list(given.shape)
            raise ValueError(f"multiple choice takes input_ids [batch, choices, length], or inputs_embeds, got {shape}")
        choices = given.shape[1]

        def flat(x: Tensor | None) -> Tensor | None:  # [batch, choices, ...] -> [batch * choices, ...]
            return x.flatten(0, 1) if x is not None and x.dim() > 2 else x

        encoded = self.distilbert.encode(
            flat(input_ids),
            flat(attention_mask),
            head_mask,
            flat(inputs_embeds),
            output_attentions,
            output_hidden_states,
            flat(position_ids),
            flat(token_type_ids),
            only="first",
        )
        return self._answer(encoded, read(self.layers(), encoded).view(-1, choices), labels, return_dict)
