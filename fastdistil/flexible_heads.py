"""An encoder with any number of named heads: described, added, switched, saved and loaded one by one."""

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.adapters import named, only_safetensors
from fastdistil.checkpoint import Weights, read_object
from fastdistil.config import ACTIVATION_ALIASES, DistilBertConfig
from fastdistil.heads import (
    HEAD_CONFIG,
    HEAD_PICKLE,
    HEAD_WEIGHTS,
    HEADS,
    IGNORED,
    IN_HEADS,
    Headed,
    WithHead,
    dims,
    finish,
    is_row_wise,
    read,
    reads_padding,
    untie,
    write_head,
)
from fastdistil.inputs import pick
from fastdistil.model import DistilBertModel, Encoded
from fastdistil.outputs import BaseModelOutput, ModelOutput
from fastdistil.pretrained import PreTrainedModel

logger = logging.getLogger("fastdistil")

# BERT's heads that stand on the encoder as ours do (the others read its pooler, or predict sentences, too)
_LIKE_OURS = {
    "BertForMaskedLM": "DistilBertForMaskedLM",
    "BertForTokenClassification": "DistilBertForTokenClassification",
    "BertForQuestionAnswering": "DistilBertForQuestionAnswering",
}


STATIC = {head.static: kind for kind, head in HEADS.items() if head.static}


@dataclass
class MultiHeadOutput:
    """What several heads gave. head_outputs: one output each, also by number and in a loop. loss: their losses' sum, if
    labels were given by head name."""

    head_outputs: list[Any]
    loss: Tensor | None = None

    def __getitem__(self, key: int | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.head_outputs[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.head_outputs)

    def __len__(self) -> int:
        return len(self.head_outputs)


def complete(settings: dict[str, Any], config: DistilBertConfig) -> dict[str, Any]:
    """A flexible head's settings with defaults filled in, checked: they may come from a file."""
    if not isinstance(settings, dict):
        raise TypeError(f"a head is described by a dictionary, got {settings!r}")
    settings = dict(settings)
    kind = settings.pop("head_type", None)
    if kind not in HEADS:
        raise ValueError(f"head_type {kind!r} is not one of {', '.join(HEADS)}")
    id2label = settings.pop("id2label", None)
    if id2label is not None:
        if not isinstance(id2label, dict):
            raise TypeError(f"id2label must map numbers to names, got {id2label!r}")
        settings["label2id"] = {label: int(i) for i, label in id2label.items()}
    unknown = settings.keys() - HEADS[kind].settings.keys() - {"bias", "dropout_prob"}
    if kind == "classification":
        unknown -= {"problem_type"}  # which a checkpoint of transformers' class brings
    if unknown:
        raise ValueError(f"a {kind} head has no setting {sorted(unknown)[0]!r}")
    settings = {"head_type": kind} | HEADS[kind].settings | settings
    if kind == "masked_lm":
        settings["vocab_size"] = settings["vocab_size"] or config.vocab_size
        settings["embedding_size"] = settings["embedding_size"] or config.dim
    for name in ("num_labels", "num_choices", "layers", "vocab_size", "embedding_size"):
        value = settings.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**24:
            raise ValueError(f"a head's {name} must be an integer of 1 or more, got {value!r}")
    activation = settings["activation_function"]
    if activation is not None and _activation(activation) not in IN_HEADS:
        raise ValueError(f"activation_function {activation!r} is not one of {', '.join(IN_HEADS)}")
    if settings.get("use_pooler") or settings.get("shift_labels"):
        raise ValueError("use_pooler and shift_labels are not for DistilBERT's heads, which have neither")
    probability = settings.get("dropout_prob")
    if probability is not None and not (isinstance(probability, (int, float)) and 0 <= probability <= 1):
        raise ValueError(f"a head's dropout_prob must be from 0 to 1, got {probability!r}")
    count = settings.get("num_labels", settings.get("num_choices"))
    if kind == "question_answering" and count != 2:
        raise ValueError(f"a head's num_labels is {count}; question answering has 2, a start and an end")
    if settings.get("problem_type") not in (None, "regression"):
        raise ValueError(f"a head's problem_type is regression or absent, got {settings['problem_type']!r}")
    if count is not None:
        labels = settings["label2id"] or {f"LABEL_{i}": i for i in range(count)}
        told = list(labels.values()) if isinstance(labels, dict) else []
        if not all(isinstance(i, Integral) for i in told) or set(told) != set(range(count)):
            raise ValueError(f"a head of {count} labels needs names for 0 to {count - 1}, got {labels}")
        settings["label2id"] = labels
    return settings


def _activation(name: Any) -> str:
    return ACTIVATION_ALIASES.get(name, name) if isinstance(name, str) else ""


def build(settings: dict[str, Any], config: DistilBertConfig) -> nn.Sequential:
    """The layers of a flexible head, numbered as adapters (Poth et al., 2023, arXiv:2311.11077) does."""
    layers: list[nn.Module] = []
    bias, activation = settings.get("bias", True), settings["activation_function"]

    def add(width: int, out: int, last: bool) -> None:
        layers.append(nn.Linear(width, out, bias=bias if last else True))
        if not last and activation:
            layers.append(IN_HEADS[_activation(activation)]())

    depth = settings["layers"]
    if settings["head_type"] == "masked_lm":
        width = config.dim
        for _ in range(depth - 1):
            add(width, width := settings["embedding_size"], last=False)
            if settings["layer_norm"]:
                layers.append(nn.LayerNorm(width, eps=config.layer_norm_eps))
        add(width, settings["vocab_size"], last=True)
        return nn.Sequential(*layers)
    probability = settings["dropout_prob"]
    for i in range(depth):
        layers.append(nn.Dropout(config.seq_classif_dropout if probability is None else probability))
        add(config.dim, settings.get("num_labels", 1) if i == depth - 1 else config.dim, last=i == depth - 1)
    return nn.Sequential(*layers)


class DistilBertModelWithHeads(Headed):
    """An encoder with any number of named heads, which can be added, switched, saved and loaded one by one.

    `DistilBertAdapterModel` of the adapters library, formerly DistilBertModelWithHeads. Heads are described in
    config.prediction_heads and saved with the model. A checkpoint of one of transformers' classes loads as head
    "default"; `to_static` goes the other way.
    """

    def __init__(self, config: DistilBertConfig):
        config = copy.deepcopy(config)  # its heads are this model's alone
        super().__init__(config)
        self.heads = nn.ModuleDict()
        self._active: list[str] = []
        told = getattr(config, "prediction_heads", None) or {}
        if not isinstance(told, dict):
            raise ValueError(f"config.prediction_heads must map names to heads, got {str(told)[:80]}")
        config.prediction_heads = {}
        for name, settings in told.items():
            kind = settings.get("head_type") if isinstance(settings, dict) else None
            if isinstance(kind, str) and kind not in HEADS:
                logger.warning("head %r of the checkpoint is left out: heads of type %r are not supported", name, kind)
                continue
            try:
                self.add_prediction_head_from_config(name, settings, overwrite_ok=True)
            except (ValueError, TypeError) as error:
                raise ValueError(f"config.prediction_heads[{name!r}]: {error}") from error

    @classmethod
    def _for_checkpoint(cls, config: DistilBertConfig) -> DistilBertConfig:
        """The head that a checkpoint of one of transformers' classes has, as head "default"."""
        named = (config.architectures or [""])[0]
        kind = STATIC.get(_LIKE_OURS.get(named, named))
        if kind is None:
            return config
        settings: dict[str, Any] = {"head_type": kind}
        if kind == "masked_lm":
            settings |= {"activation_function": config.activation}
        elif kind == "multiple_choice":
            settings |= {"activation_function": "relu"}
        else:
            two = kind == "classification"
            dropout = {"tagging": config.dropout, "question_answering": config.qa_dropout}.get(kind)
            settings |= {
                "num_labels": config.num_labels,
                "activation_function": "relu" if two else None,
                "id2label": config.id2label,
                "dropout_prob": dropout,
            }
            if two and config.problem_type == "multi_label_classification":
                settings["head_type"] = "multilabel_classification"
            elif two and config.problem_type == "regression":
                settings["problem_type"] = "regression"
        config = copy.deepcopy(config)
        config.prediction_heads = dict(getattr(config, "prediction_heads", None) or {}) | {"default": settings}
        return config

    def renamed(self, name: str) -> str:
        """What a parameter of one of transformers' classes is called here."""
        if "default" in self.heads and not name.startswith(("heads.", "distilbert.")):
            part, _, rest = name.rpartition(".")
            place = HEADS[_static_kind(self.heads_config["default"])].parts.get(part)
            if place is not None:
                return f"heads.default.{place}.{rest}"
        return name

    # --- adding and choosing ------------------------------------------------------------------------------------

    @property
    def heads_config(self) -> dict[str, dict[str, Any]]:
        return self.config.prediction_heads

    def get_prediction_heads_config(self) -> dict[str, dict[str, Any]]:
        return dict(self.heads_config)

    def add_prediction_head_from_config(
        self, head_name: str, config: dict[str, Any], overwrite_ok: bool = False, set_active: bool = True
    ) -> None:
        """config: head_type and its settings, as in config.prediction_heads. Raises ValueError."""
        if not isinstance(head_name, str) or not head_name or "." in head_name or hasattr(nn.ModuleDict(), head_name):
            raise ValueError(f"a head cannot be named {head_name!r}")
        if head_name in self.heads and not overwrite_ok:
            raise ValueError(f"there is a head {head_name!r}; pass overwrite_ok=True to replace it")
        settings = complete(config, self.config)
        head = build(settings, self.config)
        if self.device.type != "meta":
            head.apply(self._init_weights).to(self.device, self.dtype)
        self.heads[head_name] = head.train(self.training)
        self.heads_config[head_name] = settings
        self.tie_weights(but=[k for k in self._tied_weights_keys if not k.startswith(f"heads.{head_name}.")])
        if set_active:
            self.active_head = head_name

    def add_classification_head(
        self,
        head_name: str,
        num_labels: int = 2,
        layers: int = 2,
        activation_function: str | None = "tanh",
        overwrite_ok: bool = False,
        multilabel: bool = False,
        id2label: dict[int, str] | None = None,
        use_pooler: bool = False,
    ) -> None:
        """Classes of a text; one label is a regression; multilabel: any number of the labels may hold."""
        kind = "multilabel_classification" if multilabel else "classification"
        self._add(
            kind, head_name, overwrite_ok, num_labels, layers, activation_function, id2label, use_pooler=use_pooler
        )

    def add_multiple_choice_head(
        self,
        head_name: str,
        num_choices: int = 2,
        layers: int = 2,
        activation_function: str | None = "tanh",
        overwrite_ok: bool = False,
        id2label: dict[int, str] | None = None,
        use_pooler: bool = False,
    ) -> None:
        self._add(
            "multiple_choice",
            head_name,
            overwrite_ok,
            None,
            layers,
            activation_function,
            id2label,
            num_choices=num_choices,
            use_pooler=use_pooler,
        )

    def add_tagging_head(
        self,
        head_name: str,
        num_labels: int = 2,
        layers: int = 1,
        activation_function: str | None = "tanh",
        overwrite_ok: bool = False,
        id2label: dict[int, str] | None = None,
    ) -> None:
        self._add("tagging", head_name, overwrite_ok, num_labels, layers, activation_function, id2label)

    def add_qa_head(
        self,
        head_name: str,
        num_labels: int = 2,
        layers: int = 1,
        activation_function: str | None = "tanh",
        overwrite_ok: bool = False,
        id2label: dict[int, str] | None = None,
    ) -> None:
        self._add("question_answering", head_name, overwrite_ok, num_labels, layers, activation_function, id2label)

    def add_masked_lm_head(
        self,
        head_name: str,
        activation_function: str | None = "gelu",
        layers: int = 2,
        overwrite_ok: bool = False,
    ) -> None:
        self._add("masked_lm", head_name, overwrite_ok, None, layers, activation_function, None)

    def _add(
        self,
        kind: str,
        head_name: str,
        overwrite_ok: bool,
        num_labels: int | None,
        layers: int,
        activation_function: str | None,
        id2label: dict[int, str] | None,
        **more: Any,
    ) -> None:
        settings = {"head_type": kind, "layers": layers, "activation_function": activation_function} | more
        if num_labels is not None:
            settings["num_labels"] = num_labels
        if id2label is not None:
            settings["id2label"] = id2label
        self.add_prediction_head_from_config(head_name, settings, overwrite_ok)

    def delete_head(self, head_name: str) -> None:
        self._known(head_name)
        del self.heads[head_name], self.heads_config[head_name]
        self._active = [name for name in self._active if name != head_name]

    @property
    def active_head(self) -> str | list[str] | None:
        """The head or heads that answer when a call names none: the one added last, or what was set here."""
        return self._active[0] if len(self._active) == 1 else list(self._active) or None

    @active_head.setter
    def active_head(self, names: str | Sequence[str] | None) -> None:
        self._active = self._names(names)
        if len(self._active) == 1:
            labels = self.get_labels_dict(self._active[0])
            if labels is not None:  # a masked-LM head has none
                self.config.id2label = labels
                self.config.label2id = {label: i for i, label in labels.items()}

    def _names(self, names: str | Sequence[str] | None) -> list[str]:
        return [self._known(name) for name in named(names, "head")]

    def _known(self, name: str) -> str:
        if name not in self.heads:
            raise ValueError(f"there is no head {name!r}; there are {', '.join(self.heads) or 'none'}")
        return name

    def get_labels_dict(self, head_name: str | None = None) -> dict[int, str] | None:
        """Number -> name of a head's labels, by default the active one's."""
        name = self.active_head if head_name is None else head_name
        if not isinstance(name, str):
            raise ValueError(f"name one head; the active ones are {name}")
        label2id = self.heads_config[self._known(name)]["label2id"]
        return None if label2id is None else {i: label for label, i in label2id.items()}

    def get_labels(self, head_name: str | None = None) -> list[str] | None:
        labels = self.get_labels_dict(head_name)
        return None if labels is None else [labels[i] for i in sorted(labels)]

    def task(self) -> tuple[str, list[nn.Module], dict[int, str]]:
        """The active head's kind, its layers, and the names of its labels."""
        name = self.active_head
        if not isinstance(name, str):
            raise ValueError(f"one head must be active, not {name}; set model.active_head")
        head: Any = self.heads[name]
        return self.heads_config[name]["head_type"], list(head), self.get_labels_dict(name) or {}

    def projectors(self) -> dict[str, nn.Linear]:
        found = {}
        for name, settings in self.heads_config.items():
            if settings["head_type"] == "masked_lm" and name in self.heads:
                head: Any = self.heads[name]
                found[f"heads.{name}.{len(head) - 1}"] = head[-1]
        return found

    def get_output_embeddings(self) -> nn.Module | None:
        active = self._active[0] if len(self._active) == 1 else ""
        return next((p for name, p in self.projectors().items() if name.startswith(f"heads.{active}.")), None)

    def set_output_embeddings(self, projector: nn.Linear) -> None:
        old = self.get_output_embeddings()
        name = next((name for name, found in self.projectors().items() if found is old), None)
        if name is None:
            raise ValueError("no masked-LM head is active, so there are no output embeddings to set")
        holder: Any = self.heads[name.split(".")[1]]
        holder[len(holder) - 1] = projector

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        words = super().resize_token_embeddings(*args, **kwargs)
        for name, projector in self.projectors().items():
            self.heads_config[name.split(".")[1]]["vocab_size"] = projector.out_features
        return words

    # --- answering ----------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        head: str | Sequence[str] | None = None,
        labels: Tensor | dict[str, Any] | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        adapter_names: str | Sequence[str] | None = None,
        logits_at: Tensor | None = None,
    ) -> Any:
        """Inputs as in `DistilBertModel.forward`, or with choices, [batch, choices, length]. head: the name of the head
        to answer, or a list of names, by default the active ones; without any, the encoder's output.

        labels: for one head as in the classes above (question answering: start_positions and end_positions); for
        several a dictionary by head name, a pair for question answering. Several heads give a `MultiHeadOutput`.
        logits_at: as in `DistilBertForMaskedLM`, for masked-LM heads.
        """
        names = self._names(self._active if head is None else head)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        kinds = [self.heads_config[name]["head_type"] for name in names]
        if logits_at is not None and set(kinds) != {"masked_lm"}:
            raise ValueError(f"logits_at is for masked-LM heads, not for {', '.join(kinds) or 'the encoder alone'}")
        only = "first" if names and all(HEADS[kind].first for kind in kinds) else logits_at
        mask = attention_mask if dims(attention_mask) == 4 else _flat(attention_mask, 2)
        given = self._labels(names, kinds, labels, start_positions, end_positions)
        encoded = self._encode(
            _flat(input_ids, 2),
            mask,
            head_mask,
            _flat(inputs_embeds, 3),
            output_attentions,
            output_hidden_states,
            _flat(position_ids, 2),
            _flat(token_type_ids, 2),
            only=only,
            adapter_names=adapter_names,
            padding_too=logits_at is None
            and any(
                (not HEADS[kind].first and not is_row_wise(list(self.heads[name])))  # type: ignore[call-overload]
                or (kind != "tagging" and reads_padding(kind, of_head, mask))  # which leaves padding out of its loss
                for name, kind, of_head in zip(names, kinds, given, strict=True)
            ),
        )
        if not names:
            hidden = encoded.hidden if encoded.at is None else encoded.at.unpack(encoded.hidden)
            whole = BaseModelOutput(hidden, encoded.states, encoded.attentions)
            return whole if return_dict else whole.to_tuple()
        outputs, losses = [], []
        for name, of_head in zip(names, given, strict=True):
            out = self._answer(name, encoded, of_head, mask)
            outputs.append(out if return_dict else out.to_tuple())
            losses.append(getattr(out, "loss", None))
        if len(outputs) == 1:
            return outputs[0]
        summed = [loss for loss in losses if loss is not None] if isinstance(labels, dict) else []
        return MultiHeadOutput(outputs, torch.stack(summed).sum() if summed else None)

    def _labels(self, names: list[str], kinds: list[str], labels: Any, start: Any, end: Any) -> list[Any]:
        """The labels of each head, None where it has none."""
        spans = None if start is None or end is None else (start, end)
        if isinstance(labels, dict):
            for name in labels:
                if name not in names:
                    raise ValueError(f"there are labels for head {name!r}, which does not answer; {names} do")
            return [labels.get(name) for name in names]
        if labels is not None and kinds == ["question_answering"]:
            raise ValueError("question answering takes start_positions and end_positions, not labels")
        return [spans if kind == "question_answering" else labels for kind in kinds]

    def _answer(self, name: str, encoded: Encoded, labels: Any, mask: Tensor | None) -> ModelOutput:
        head: Any = self.heads[name]
        settings = self.heads_config[name]
        kind = settings["head_type"]
        if HEADS[kind].first:
            encoded = replace(encoded, hidden=_first(encoded, mask), at=None)
        logits = read(list(head), encoded)
        problem_type = "single_label_classification"
        if kind == "multiple_choice":
            if len(logits) % settings["num_choices"]:
                raise ValueError(
                    f"head {name!r} has {settings['num_choices']} choices, which {len(logits)} texts do not divide into"
                )
            logits = logits.view(-1, settings["num_choices"])
        elif kind == "multilabel_classification":
            problem_type = "multi_label_classification"
        elif kind == "classification" and (settings["num_labels"] == 1 or settings.get("problem_type") == "regression"):
            problem_type = "regression"
        elif kind == "tagging" and isinstance(labels, Tensor) and mask is not None and mask.dim() == 2:
            places = logits.shape[:-1]
            if labels.numel() == places.numel():  # flat ones, too; of a wrong number the loss tells
                labels = labels.reshape(places).where(mask.expand(places) != 0, IGNORED)
        return finish(kind, logits, labels, problem_type, encoded)

    # --- files --------------------------------------------------------------------------------------------------

    def save_head(self, save_directory: str | Path, head_name: str | None = None, use_safetensors: bool = True) -> None:
        """Write head_config.json and model_head.safetensors, which adapters reads with its use_safetensors=True."""
        only_safetensors(use_safetensors)
        name = self.active_head if head_name is None else head_name
        if not isinstance(name, str):
            raise ValueError(f"name the head to save; the active ones are {name}")
        self._known(name)
        directory = Path(save_directory)
        if directory.exists() and not directory.is_dir():
            raise NotADirectoryError(f"{directory} is a file; give a directory to save into")
        directory.mkdir(parents=True, exist_ok=True)
        state = {f"heads.{name}.{k}": v for k, v in self.heads[name].state_dict().items()}
        write_head(self, directory, {"config": self.heads_config[name], "name": name}, state)

    def save_all_heads(self, save_directory: str | Path, use_safetensors: bool = True) -> None:
        """`save_head` of every head, each into a directory of its name."""
        for name in self.heads:
            self.save_head(Path(save_directory) / name, name, use_safetensors)

    def load_head(
        self,
        save_directory: str | Path,
        load_as: str | None = None,
        id2label: dict[int, str] | None = None,
        use_safetensors: bool | None = None,
    ) -> tuple[str, str]:
        """Add (or replace) and activate a saved head, of this library or of adapters; returns (directory, name).

        load_as: another name for it. id2label: other names for its labels. model_head.safetensors is read, or where it
        is missing pytorch_model_head.bin with weights_only=True; use_safetensors says which. A head that adapters
        saved from one of transformers' classes has no name: it is "default". Raises OSError for files, ValueError for
        what is in them.
        """
        directory = Path(save_directory)
        if not (directory / HEAD_CONFIG).is_file():
            raise FileNotFoundError(f"{directory} holds no {HEAD_CONFIG}; give the directory of a saved head")
        description = read_object(directory / HEAD_CONFIG)
        settings, name = description.get("config"), load_as or description.get("name")
        prefix, places = f"heads.{description.get('name')}.", dict[str, int]()
        if settings is None and description.get("model_class") in STATIC:
            settings, places = self._of_static(description)
            prefix, name = "", name or "default"
        if not isinstance(settings, dict) or not isinstance(name, str):
            raise ValueError(f"{directory / HEAD_CONFIG} describes no flexible head (its config and its name)")
        if id2label is not None:
            settings = settings | {"id2label": id2label}
        try:
            if description.get("hidden_size", self.config.dim) != self.config.dim:
                raise ValueError(f"hidden_size is {description['hidden_size']}, but the model's is {self.config.dim}")
            settings = complete(settings, self.config)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{directory / HEAD_CONFIG}: {error}") from error
        head = build(settings, self.config)
        with Weights.of_file(directory / HEAD_WEIGHTS, directory / HEAD_PICKLE, use_safetensors) as weights:
            expected = {k: tuple(v.shape) for k, v in head.state_dict().items()}
            source = {}
            for key in weights.shapes:
                part, _, end = key.rpartition(".")
                if part in places:
                    source[f"{places[part]}.{end}"] = key
                elif not places and key.startswith(prefix):
                    source[key.removeprefix(prefix)] = key
            found = {k: weights.shapes[key] for k, key in source.items()}
            for key in sorted(expected.keys() | found.keys()):
                if expected.get(key) != found.get(key):
                    raise ValueError(
                        f"{weights.where}: {prefix}{key} should be {expected.get(key, 'absent')} by {HEAD_CONFIG}, "
                        f"but is {found.get(key, 'absent')}"
                    )
            state = {key: weights.read(source[key]) for key in expected}
        self.add_prediction_head_from_config(name, settings, overwrite_ok=True)
        untie(self, {f"heads.{name}.{key}": value for key, value in state.items()}, directory)
        self.heads[name].load_state_dict(state)
        return str(directory), name

    def _of_static(self, description: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
        """The settings of a head saved from one of transformers' classes, and where its layers go."""
        config = copy.deepcopy(self.config)
        config.architectures, config.problem_type = [description["model_class"]], None
        labels = description.get("label2id")
        if isinstance(labels, dict) and labels:
            config.id2label = {number: label for label, number in labels.items()}
        kind = STATIC[description["model_class"]]
        return self._for_checkpoint(config).prediction_heads["default"], HEADS[kind].parts

    # --- adapters of the same name -----------------------------------------------------------------------------

    def set_active_adapters(self, names: str | Sequence[str] | None) -> None:
        """As the encoder's; a head with the last one's name becomes the active one."""
        super().set_active_adapters(names)
        if (active := self.active_adapters) and active[-1] in self.heads:
            self.active_head = active[-1]

    def save_adapter(
        self, save_directory: str | Path, adapter_name: str, use_safetensors: bool = True, with_head: bool = True
    ) -> None:
        """As the encoder's; with_head: beside it the head of the same name, if there is one."""
        super().save_adapter(save_directory, adapter_name, use_safetensors)
        if with_head and adapter_name in self.heads:
            self.save_head(save_directory, adapter_name)

    def load_adapter(
        self,
        save_directory: str | Path,
        load_as: str | None = None,
        set_active: bool = False,
        overwrite_ok: bool = True,
        use_safetensors: bool | None = None,
        with_head: bool = True,
    ) -> str:
        """As the encoder's; with_head: also the head that was saved beside it, if there is one."""
        name = super().load_adapter(save_directory, load_as, set_active, overwrite_ok, use_safetensors)
        if with_head and (Path(save_directory) / HEAD_CONFIG).is_file():
            active = self.active_head
            self.load_head(save_directory, load_as=load_as, use_safetensors=use_safetensors)
            if active is not None and not set_active:
                self.active_head = active
        return name

    def to_static(self, head_name: str | None = None) -> WithHead:
        """One of transformers' classes with the encoder's and a head's weights (copies). ValueError if none computes
        what the head computes, and while adapters are active: merge them, or switch them off."""
        if active := self.adapter_stack(self.active_adapters):
            raise ValueError(
                f"adapters {', '.join(active)} are active, and would be lost; merge_adapter makes a LoRA part of the "
                "weights, set_active_adapters(None) switches adapters off"
            )
        name = self.active_head if head_name is None else head_name
        if not isinstance(name, str):
            raise ValueError(f"name the head to export; the active ones are {name}")
        settings = self.heads_config[self._known(name)]
        kind = _static_kind(settings)
        head = HEADS[kind]
        assert head.static is not None
        config = copy.deepcopy(self.config)
        del config.prediction_heads
        config.architectures, config.problem_type = [head.static], None
        if settings["label2id"] is not None and kind != "multiple_choice":
            config.id2label, config.label2id = self.get_labels_dict(name) or {}, dict(settings["label2id"])
        if settings["head_type"] == "multilabel_classification":
            config.problem_type = "multi_label_classification"
        elif settings.get("problem_type") == "regression":
            config.problem_type = "regression"
        given = settings.get("dropout_prob")
        probability = config.seq_classif_dropout if given is None else given
        field_name = {"tagging": "dropout", "question_answering": "qa_dropout"}.get(kind, "seq_classif_dropout")
        if kind != "tagging":  # whose dropout is the encoder's
            setattr(config, field_name, probability)
        wanted = self._for_checkpoint(copy.deepcopy(config)).prediction_heads["default"]
        wanted = complete(wanted, self.config)
        for setting in ("layers", "activation_function", "bias", "layer_norm", "embedding_size", "vocab_size"):
            if settings.get(setting) != wanted.get(setting) and not (
                setting == "activation_function" and settings["layers"] == 1
            ):
                raise ValueError(
                    f"head {name!r} has {setting} {settings.get(setting)!r}, but {head.static} has "
                    f"{wanted.get(setting)!r}"
                )
        config.__dict__.pop("adapters", None)
        model = next(cls for cls in WithHead.__subclasses__() if cls.__name__ == head.static)(config)
        own = self.state_dict()
        state = {k: own[k] for k in model.state_dict() if k.startswith("distilbert.")}
        for part, place in head.parts.items():
            for end in ("weight", "bias"):
                state[f"{part}.{end}"] = own[f"heads.{name}.{place}.{end}"]
        model.to(self.device, self.dtype).load_state_dict(state)
        return model.train(self.training)


DistilBertAdapterModel = DistilBertModelWithHeads


def model_class(config: DistilBertConfig) -> type[PreTrainedModel]:
    """The class that a checkpoint's configuration names; the encoder where it names none of ours."""
    classes = [*WithHead.__subclasses__(), DistilBertModelWithHeads]
    named = (getattr(config, "architectures", None) or [""])[0]
    named = _LIKE_OURS.get(named, named)
    return next((cls for cls in classes if cls.__name__ == named), DistilBertModel)


def _static_kind(settings: dict[str, Any]) -> str:
    kind = settings["head_type"]
    return "classification" if kind == "multilabel_classification" else kind


def _flat(x: Tensor | None, dim: int) -> Tensor | None:
    """[batch, choices, ...] -> [batch * choices, ...]; what has `dim` dimensions stays."""
    return x.flatten(0, 1) if isinstance(x, Tensor) and x.dim() == dim + 1 else x


def _first(encoded: Encoded, mask: Tensor | None) -> Tensor:
    """Each sequence's first token, [batch, dim]."""
    hidden, at = encoded.hidden, encoded.at
    if hidden.dim() == 2 and at is None:
        return hidden
    keep = None if mask is None or mask.dim() != 2 else mask != 0
    if at is None:
        return pick(hidden, None if keep is None else keep.expand(hidden.shape[:2]), "first")
    rows, there = at.first()
    first = hidden[rows]
    return first if there is None else first.masked_fill(~there[:, None], 0)
