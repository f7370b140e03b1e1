"""DistilBERT's heads: what they read, how they are trained, and transformers' classes around them.

`HEADS` describes each kind of head once. A head is a list of layers; `read` runs it on what the encoder leaves, packed
where it is packed, and pads its logits at the end. At padded positions logits are those of a hidden state of zeros,
unless a loss is asked for that reads them: then they are transformers'.
"""

import inspect
import json
import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdistil._register import can_look
from fastdistil.checkpoint import Weights, read_object
from fastdistil.config import ACTIVATION_ALIASES, DistilBertConfig
from fastdistil.inputs import pick
from fastdistil.layers import apply_linear
from fastdistil.model import DistilBertModel, Encoded, has_own_forward, padding_asked
from fastdistil.outputs import (
    MaskedLMOutput,
    ModelOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from fastdistil.plain import ACTIVATIONS
from fastdistil.pretrained import PreTrainedModel, mean_rows

logger = logging.getLogger("fastdistil")

IGNORED = -100  # a label that counts for nothing
IN_HEADS = ACTIVATIONS | {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "leakyrelu": nn.LeakyReLU}


# --- losses ---------------------------------------------------------------------------------------------------------


def sequence_loss(logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """logits: [batch, n]; labels: [batch] class numbers, [batch] or [batch, n] values, or [batch, n] of 0 and 1."""
    _check_tensor("labels", labels)
    if problem_type == "single_label_classification":
        return token_loss(logits, labels, problem_type)
    if labels.numel() != logits.numel():
        raise ValueError(f"labels must hold {logits.numel()} values for {problem_type}, got {list(labels.shape)}")
    if problem_type == "regression":
        return F.mse_loss(logits.flatten(), labels.flatten())
    return F.binary_cross_entropy_with_logits(logits, _as_numbers(labels, logits).view_as(logits))


def _as_numbers(labels: Tensor, logits: Tensor) -> Tensor:
    return labels if labels.is_floating_point() else labels.to(logits.dtype)


def token_loss(logits: Tensor, labels: Tensor, problem_type: str = "") -> Tensor:
    """Cross entropy; logits: [..., n]; labels: [...] class numbers, -100 where none."""
    _check_tensor("labels", labels)
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
    if not isinstance(labels, (tuple, list)) or len(labels) != 2:
        raise TypeError("question answering takes start_positions and end_positions, two tensors")
    for name, scores, wanted in zip(("start_positions", "end_positions"), logits.unbind(-1), labels, strict=True):
        _check_tensor(name, wanted)
        if wanted.is_floating_point() or wanted.numel() != len(scores):
            raise ValueError(f"{name} must be {len(scores)} integers, got {wanted.dtype} {list(wanted.shape)}")
        losses.append(F.cross_entropy(scores, wanted.flatten().long().clamp(0, length), ignore_index=length))
    return (losses[0] + losses[1]) / 2


def reads_padding(kind: str, labels: Any, mask: Tensor | None) -> bool:
    """Whether the loss of a head of this kind is computed from logits at padded positions. (Where looking would stall
    the device, labels at padding are taken to be -100 unless there is a gradient.)"""
    if HEADS[kind].first or labels is None or not isinstance(mask, Tensor) or mask.dim() != 2:
        return False
    if kind == "question_answering":
        return True  # a softmax over the length
    length = mask.shape[1]
    if not isinstance(labels, Tensor) or length == 0 or labels.numel() % length:
        return False  # an error
    labels = labels.reshape(-1, length)
    if len(mask) not in (1, len(labels)):
        return False  # as above, or choices
    if not can_look(labels.device):
        return torch.is_grad_enabled()
    return bool(((labels != IGNORED) & (mask == 0)).any())


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _check_labels(labels: Tensor, classes: int) -> None:
    if not can_look(labels.device):
        return  # reading a value back would stall the device
    outside = ((labels < 0) | (labels >= classes)) & (labels != IGNORED)
    for place in outside.nonzero().tolist():
        raise ValueError(
            f"labels{place} is {int(labels[tuple(place)])}, but there are {classes} classes, and {IGNORED} for none"
        )


# --- the kinds of heads ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadType:
    """One kind of head.

    output: what a model returns. loss(logits, labels, problem_type). settings: a flexible head's, with their defaults.
    first: reads each sequence's first token only. static: transformers' class around it, and `parts`, what that class
    calls the layers, by their place in a flexible head.
    """

    output: Callable[..., ModelOutput]
    loss: Callable[[Tensor, Any, str], Tensor]
    settings: dict[str, Any]
    first: bool = False
    static: str | None = None
    parts: dict[str, int] = field(default_factory=dict)


_ONE = {"num_labels": 2, "layers": 1, "activation_function": "tanh", "label2id": None, "dropout_prob": None}
_TWO = _ONE | {"layers": 2, "use_pooler": False}
HEADS = {
    "classification": HeadType(
        SequenceClassifierOutput,
        sequence_loss,
        _TWO | {"bias": True},
        first=True,
        static="DistilBertForSequenceClassification",
        parts={"pre_classifier": 1, "classifier": 4},
    ),
    "multilabel_classification": HeadType(SequenceClassifierOutput, sequence_loss, _TWO | {"bias": True}, first=True),
    "tagging": HeadType(
        TokenClassifierOutput, token_loss, _ONE, static="DistilBertForTokenClassification", parts={"classifier": 1}
    ),
    "question_answering": HeadType(
        QuestionAnsweringModelOutput,
        span_loss,
        _ONE,
        static="DistilBertForQuestionAnswering",
        parts={"qa_outputs": 1},
    ),
    "multiple_choice": HeadType(
        MultipleChoiceModelOutput,
        token_loss,
        {"num_choices" if k == "num_labels" else k: v for k, v in _TWO.items()},
        first=True,
        static="DistilBertForMultipleChoice",
        parts={"pre_classifier": 1, "classifier": 4},
    ),
    "masked_lm": HeadType(
        MaskedLMOutput,
        token_loss,
        {
            "vocab_size": None,
            "embedding_size": None,
            "layers": 2,
            "activation_function": "gelu",
            "layer_norm": True,
            "bias": True,
            "shift_labels": False,
            "label2id": None,
        },
        static="DistilBertForMaskedLM",
        parts={"vocab_transform": 0, "vocab_layer_norm": 2, "vocab_projector": 3},
    ),
}


_KINDS: tuple[Any, ...] = (nn.Linear, nn.LayerNorm, nn.Dropout, *(type(make()) for make in IN_HEADS.values()))
_ROW_BY_ROW = {kind: kind.forward for kind in _KINDS}


def is_row_wise(layers: Sequence[nn.Module]) -> bool:
    """Whether a head's layers are those it was made with, each token's result its own; else they get padded states."""
    return all(
        _ROW_BY_ROW.get(type(m)) is type(m).forward
        and "forward" not in m.__dict__
        and not (m._forward_hooks or m._forward_pre_hooks)
        for m in layers
    )


def score(layers: Sequence[nn.Module], x: Tensor, live: Tensor | None = None) -> Tensor:  # [..., dim] -> [..., out]
    fused = x.dim() == 2 and not torch.jit.is_tracing()
    for layer in layers:
        x = apply_linear(layer, x, live) if fused and isinstance(layer, nn.Linear) else layer(x)
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


RELU = nn.ReLU()


# of `DistilBertModel.encode`, in its order; somebody's own encoder gets by name what is given
_INPUTS = (
    *("input_ids", "attention_mask", "head_mask", "inputs_embeds"),
    *("output_attentions", "output_hidden_states", "position_ids", "token_type_ids"),
)


class Headed(PreTrainedModel):
    """An encoder, `distilbert`, and what stands on it."""

    def __init__(self, config: DistilBertConfig):
        super().__init__(config)
        self.distilbert = DistilBertModel(config)

    def _encode(self, *inputs: Any, adapter_names: Any, only: Any = None, padding_too: bool = False) -> Encoded:
        """`DistilBertModel.encode`; as a call of the encoder where that is what someone watches or has patched."""
        encoder: Any = self.distilbert
        if not (
            encoder._forward_hooks
            or encoder._forward_pre_hooks
            or has_own_forward(encoder)
            or encoder._compiled_call_impl
        ):
            return encoder.encode(*inputs, only=only, adapter_names=adapter_names, padding_too=padding_too)
        asked = dict(zip(_INPUTS, inputs, strict=True)) | {"adapter_names": adapter_names}
        named = {name: value for name, value in asked.items() if value is not None}
        takes = padding_too and "padding_too" in inspect.signature(encoder.forward).parameters
        with padding_asked(encoder) if padding_too and not takes else nullcontext():
            out: Any = encoder(**named, return_dict=True, **({"padding_too": True} if takes else {}))
        hidden, mask = out.last_hidden_state, inputs[1]
        keep = None if mask is None or mask.dim() != 2 else (mask != 0).expand(hidden.shape[:2])
        states, attentions = (getattr(out, name, None) for name in ("hidden_states", "attentions"))
        return Encoded(pick(hidden, keep, only), None, states, attentions)

    def projectors(self) -> dict[str, nn.Linear]:
        """The Linears onto the vocabulary, by name; the configuration ties them to the word embeddings."""
        return {}

    def post_init(self) -> None:
        if self.device.type != "meta":  # the encoder has had its own
            for name, module in self.named_children():
                if name != "distilbert":
                    module.apply(self._init_weights)
        self.tie_weights()

    def cuda_graphs(self, on: bool = True, most: int = 64) -> Any:
        """As `DistilBertModel.cuda_graphs`, for the encoder; returns the model."""
        self.distilbert.cuda_graphs(on, most)
        return self

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        if not self.config.tie_word_embeddings:
            return {}
        words = self.get_input_embeddings().weight.shape
        fit = (name for name, projector in self.projectors().items() if projector.weight.shape == words)
        return {f"{name}.weight": "distilbert.embeddings.word_embeddings.weight" for name in fit}

    def tie_weights(self, but: Collection[str] = ()) -> None:
        for key in self._tied_weights_keys.keys() - set(but):
            self.get_submodule(key.removesuffix(".weight")).weight = self.get_input_embeddings().weight

    @torch.no_grad()
    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in the encoder; the projectors onto the vocabulary follow. A new entry's bias is 0, or of a projector that
        is not tied, with mean_resizing, the mean of the old."""
        words = self.get_input_embeddings()
        before, count = words.weight, words.num_embeddings
        words = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        n = words.num_embeddings
        for projector in self.projectors().values():
            old, bias, fill = projector.weight, projector.bias, 0.0
            if old is before:
                projector.weight = words.weight
            elif n != len(old) == count:
                new = old.new_empty(n, old.shape[1]).normal_(0, self.config.initializer_range or 0.02)
                if n > len(old) and mean_resizing:
                    new[len(old) :] = mean_rows(old, n - len(old))
                    fill = 0.0 if bias is None else float(bias.float().mean())
                new[: len(old)] = old[:n]
                projector.weight = nn.Parameter(new, requires_grad=old.requires_grad)
            projector.out_features = len(projector.weight)
            if bias is not None and len(bias) != projector.out_features:
                padded = F.pad(bias.data, (0, projector.out_features - len(bias)), value=fill)
                projector.bias = nn.Parameter(padded, requires_grad=bias.requires_grad)
        return words


class WithHead(Headed):
    """One head, whose layers a subclass makes and lists."""

    head_type: ClassVar[str]

    def layers(self) -> list[nn.Module]:
        raise NotImplementedError

    def task(self) -> tuple[str, list[nn.Module], dict[int, str]]:
        """The head's kind, its layers, and the names of its labels."""
        return self.head_type, self.layers(), self.config.id2label

    def save_adapter(
        self, save_directory: str | Path, adapter_name: str, use_safetensors: bool = True, with_head: bool = True
    ) -> None:
        """As the encoder's; with_head: beside it the head, which `train_adapter` trains too."""
        super().save_adapter(save_directory, adapter_name, use_safetensors)
        if with_head:
            labels = {label: number for number, label in self.config.id2label.items()}
            description = {"config": None, "name": None, "label2id": labels, "num_labels": self.config.num_labels}
            write_head(self, Path(save_directory), description, self._head())

    def load_adapter(
        self,
        save_directory: str | Path,
        load_as: str | None = None,
        set_active: bool = False,
        overwrite_ok: bool = True,
        use_safetensors: bool | None = None,
        with_head: bool = True,
    ) -> str:
        """As the encoder's; with_head: also the head that was saved beside it, if it is one of this class."""
        directory = Path(save_directory)
        given = save_directory, load_as, set_active, overwrite_ok, use_safetensors
        if not with_head or not (directory / HEAD_CONFIG).is_file():
            return super().load_adapter(*given)
        description, own = read_object(directory / HEAD_CONFIG), self._head()
        if description.get("model_class") != type(self).__name__:
            name = super().load_adapter(*given)
            logger.warning(
                "%s: the head is left out, for it is one of %s, not of %s",
                *(directory, description.get("model_class"), type(self).__name__),
            )
            return name
        with Weights.of_file(directory / HEAD_WEIGHTS, directory / HEAD_PICKLE, use_safetensors) as weights:
            for key in sorted(own.keys() | weights.shapes.keys()):
                expected, found = (tuple(own[key].shape) if key in own else None), weights.shapes.get(key)
                if expected != found:
                    raise ValueError(
                        f"{weights.where}: {key} should be {expected or 'absent'}, but is {found or 'absent'}"
                    )
            state = {key: weights.read(key) for key in own}
        name = super().load_adapter(*given)  # after the head was looked at, for an error leaves all as it was
        untie(self, state, directory)
        with torch.no_grad():
            for key, value in self._head().items():
                value.copy_(state[key])
        if isinstance(labels := description.get("label2id"), dict) and len(labels) == self.config.num_labels:
            self.config.id2label = {number: label for label, number in labels.items()}
            self.config.label2id = dict(labels)
        return name

    def _head(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.state_dict().items() if not k.startswith("distilbert.")}

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
        adapter_names: str | Sequence[str] | None = None,
    ) -> ModelOutput | tuple:
        inputs = (
            *(input_ids, attention_mask, head_mask, inputs_embeds),
            *(output_attentions, output_hidden_states, position_ids, token_type_ids),
        )
        only = "first" if HEADS[self.head_type].first else None
        padding_too = self._padding_too(labels, attention_mask)
        return self._run(inputs, labels, return_dict, adapter_names, only, padding_too)

    def _run(
        self, inputs: tuple, labels: Any, return_dict: bool | None, adapter_names: Any, only: Any, padding_too: bool
    ) -> ModelOutput | tuple:
        encoded = self._encode(*inputs, only=only, adapter_names=adapter_names, padding_too=padding_too)
        return self._answer(encoded, read(self.layers(), encoded), labels, return_dict)

    def _padding_too(self, labels: Any, mask: Tensor | None) -> bool:
        """Whether the head is to get transformers' states at padded positions, too."""
        if not HEADS[self.head_type].first and not is_row_wise(self.layers()):
            return True
        return reads_padding(self.head_type, labels, mask)

    def _answer(self, encoded: Encoded, logits: Tensor, labels: Any, return_dict: bool | None) -> ModelOutput | tuple:
        problem_type = "" if labels is None else self._problem_type(labels)
        out = finish(self.head_type, logits, labels, problem_type, encoded)
        if problem_type:  # of the first labels that gave a loss, as with transformers
            self.config.problem_type = problem_type
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()

    def _problem_type(self, labels: Any) -> str:
        return ""


class DistilBertForMaskedLM(WithHead):
    """Scores of every vocabulary entry at every token, by the word embeddings unless config.tie_word_embeddings is off.

    HF's `DistilBertForMaskedLM`. labels: integers [batch, length], -100 where there is nothing to predict.
    """

    head_type = "masked_lm"

    def __init__(self, config: DistilBertConfig):
        super().__init__(config)
        self.vocab_transform = nn.Linear(config.dim, config.dim)
        self.vocab_layer_norm = nn.LayerNorm(config.dim, eps=config.layer_norm_eps)
        self.vocab_projector = nn.Linear(config.dim, config.vocab_size)
        self.activation = ACTIVATIONS[ACTIVATION_ALIASES[config.activation]]()
        self.post_init()

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
        adapter_names: str | Sequence[str] | None = None,
        logits_at: Tensor | None = None,
    ) -> ModelOutput | tuple:
        """Inputs as in `DistilBertModel.forward`. logits_at: int64 [n, 2], the (row, column) of tokens; then logits
        (and labels) are [n, vocab] (and [n]) of those alone, and nothing of [batch, length, vocab] is made."""
        inputs = (
            *(input_ids, attention_mask, head_mask, inputs_embeds),
            *(output_attentions, output_hidden_states, position_ids, token_type_ids),
        )
        padding_too = logits_at is None and self._padding_too(labels, attention_mask)
        return self._run(inputs, labels, return_dict, adapter_names, logits_at, padding_too)

    def projectors(self) -> dict[str, nn.Linear]:
        return {"vocab_projector": self.vocab_projector}

    def get_output_embeddings(self) -> nn.Linear:
        return self.vocab_projector

    def set_output_embeddings(self, projector: nn.Linear) -> None:
        self.vocab_projector = projector


class DistilBertForSequenceClassification(WithHead):
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
        return [self.pre_classifier, RELU, self.dropout, self.classifier]

    def _problem_type(self, labels: Tensor) -> str:
        _check_tensor("labels", labels)
        if self.config.problem_type is not None:
            return self.config.problem_type
        if self.num_labels == 1:
            return "regression"
        kind = "single" if labels.dtype in (torch.int64, torch.int32) else "multi"
        return f"{kind}_label_classification"


class DistilBertForTokenClassification(WithHead):
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


class DistilBertForQuestionAnswering(WithHead):
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
        adapter_names: str | Sequence[str] | None = None,
    ) -> ModelOutput | tuple:
        """Inputs as in `DistilBertModel.forward`. start_positions, end_positions: integers [batch], both or no loss."""
        labels = None if start_positions is None or end_positions is None else (start_positions, end_positions)
        inputs = (
            *(input_ids, attention_mask, head_mask, inputs_embeds),
            *(output_attentions, output_hidden_states, position_ids, token_type_ids),
        )
        return self._run(inputs, labels, return_dict, adapter_names, None, self._padding_too(labels, attention_mask))


class DistilBertForMultipleChoice(WithHead):
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
        return [self.pre_classifier, RELU, self.dropout, self.classifier]

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
        adapter_names: str | Sequence[str] | None = None,
    ) -> ModelOutput | tuple:
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(
                f"the input must be a tensor, got {type(given).__name__}; see the tokenizer's return_tensors"
            )
        if given is None or given.shape[1:2] == (0,) or given.dim() != (3 if inputs_embeds is None else 4):
            shape = None if given is None else list(given.shape)
            raise ValueError(f"multiple choice takes input_ids [batch, choices, length], or inputs_embeds, got {shape}")
        choices = given.shape[1]

        def flat(x: Tensor | None) -> Tensor | None:  # [batch, choices, ...] -> [batch * choices, ...]
            return x.flatten(0, 1) if x is not None and x.dim() > 2 else x

        if dims(attention_mask) != 4:  # [batch * choices, 1, L, L] is flat
            attention_mask = flat(attention_mask)
        encoded = self._encode(
            flat(input_ids),
            attention_mask,
            head_mask,
            flat(inputs_embeds),
            output_attentions,
            output_hidden_states,
            flat(position_ids),
            flat(token_type_ids),
            only="first",
            adapter_names=adapter_names,
        )
        return self._answer(encoded, read(self.layers(), encoded).view(-1, choices), labels, return_dict)


# --- files ----------------------------------------------------------------------------------------------------------

HEAD_CONFIG, HEAD_WEIGHTS, HEAD_PICKLE = "head_config.json", "model_head.safetensors", "pytorch_model_head.bin"


def write_head(model: Headed, directory: Path, described: dict[str, Any], state: dict[str, Tensor]) -> None:
    """A head's files in the adapters library's format."""
    description = described | {
        "hidden_size": model.config.dim,
        "model_class": type(model).__name__,
        "model_name": "",
        "model_type": model.config.model_type,
        "version": "adapters.1.3.0",  # whose format it is
    }
    (directory / HEAD_CONFIG).write_text(json.dumps(description, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file({k: v.contiguous().clone() for k, v in state.items()}, directory / HEAD_WEIGHTS, {"format": "pt"})


def untie(model: Headed, state: dict[str, Tensor], where: Path) -> None:
    """A weight of its own to every projector whose saved one is not this model's word embeddings."""
    words = model.get_input_embeddings().weight
    for name, projector in model.projectors().items():
        saved = state.get(f"{name}.weight")
        if projector.weight is words and saved is not None and not torch.equal(saved.to(words), words):
            logger.warning("%s: %s.weight is not this model's word embeddings: they are not tied", where, name)
            projector.weight = nn.Parameter(words.detach().clone())


def dims(x: Any) -> int:
    return x.dim() if isinstance(x, Tensor) else 0
