"""DistilBertConfig: transformers' fields, aliases, label maps and file format, with values checked when given."""

import copy
import json
import math
import numbers
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

# activation name in a checkpoint (transformers' ACT2FN) -> the form our ops compute
ACTIVATION_ALIASES = {
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
# what a BERT configuration calls our fields
BERT_FIELDS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
# sizes beyond these are a broken file, not a model
LIMITS = {
    "vocab_size": 2**24,
    "max_position_embeddings": 2**20,
    "n_layers": 1024,
    "n_heads": 4096,
    "dim": 2**16,
    "hidden_dim": 2**18,
}


def may_be_hub_id(name: str | os.PathLike) -> bool:
    """Whether the hub may be asked for what is no path here: not for what is plainly meant as one."""
    looks_local = isinstance(name, os.PathLike) or name[:1] in "./~\\" or name.count("/") > 1
    return not looks_local and re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", str(name)) is not None


class DistilBertConfig:
    """Configuration of a DistilBERT model, field for field as in transformers (`DistilBertConfig`).

    Sizes: vocab_size, max_position_embeddings (longest input, in tokens), n_layers, n_heads, dim (hidden width, a
    multiple of n_heads), hidden_dim (FFN width). activation: gelu, gelu_new, relu, silu, or the aliases gelu_fast,
    gelu_pytorch_tanh, swish. sinusoidal_pos_embds: fixed sine positions instead of learned ones. layer_norm_eps is
    1e-12 in every DistilBERT; converted BERT checkpoints may bring another.

    hidden_size, num_hidden_layers and num_attention_heads are aliases. Unknown keywords become attributes and are
    saved. Raises ValueError or TypeError naming the field.
    """

    model_type: ClassVar[str] = "distilbert"
    _commit_hash: ClassVar[str | None] = None  # which transformers' pipelines ask for
    _aliases: ClassVar[dict[str, str]] = {
        "hidden_size": "dim",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    }

    def __init__(
        self,
        vocab_size: int = 30522,
        max_position_embeddings: int = 512,
        sinusoidal_pos_embds: bool = False,
        n_layers: int = 6,
        n_heads: int = 12,
        dim: int = 768,
        hidden_dim: int = 3072,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        activation: str = "gelu",
        initializer_range: float = 0.02,
        qa_dropout: float = 0.1,
        seq_classif_dropout: float = 0.2,
        pad_token_id: int | None = 0,
        *,
        eos_token_id: int | None = None,
        bos_token_id: int | None = None,
        tie_word_embeddings: bool = True,
        layer_norm_eps: float = 1e-12,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
        chunk_size_feed_forward: int = 0,
        architectures: list[str] | None = None,
        id2label: dict | None = None,
        label2id: dict | None = None,
        num_labels: int | None = None,
        problem_type: str | None = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        **kwargs: Any,
    ):
        given = dict(locals())
        for name in ("self", "kwargs", "__class__", "id2label", "label2id", "num_labels", "dtype", "torch_dtype"):
            given.pop(name, None)
        for alias, name in self._aliases.items():
            if alias in kwargs:
                given[name] = kwargs.pop(alias)
        for name, value in given.items():
            object.__setattr__(self, name, value)
        # a torch.dtype is kept by name, as in the file
        self.dtype = str(dtype if dtype is not None else torch_dtype or "").removeprefix("torch.") or None
        self.id2label = _labels(id2label or {0: "LABEL_0", 1: "LABEL_1"})
        if isinstance(label2id, dict):
            label2id = {str(label): i for label, i in label2id.items()}
        self.label2id = label2id if label2id or id2label else {label: i for i, label in self.id2label.items()}
        if num_labels is not None:
            self.num_labels = num_labels
        self._name_or_path = kwargs.pop("_name_or_path", None) or kwargs.pop("name_or_path", "")
        asked = [kwargs.pop(name, None) for name in ("attn_implementation", "_attn_implementation")]
        self._attn_implementation = asked[0] or asked[1]
        self.is_encoder_decoder = bool(kwargs.pop("is_encoder_decoder", False))
        for name in ("use_return_dict", "model_type"):  # which a dictionary of a configuration holds too
            kwargs.pop(name, None)
        for name, value in kwargs.items():
            if hasattr(type(self), name):
                raise ValueError(f"config.{name} cannot be set: DistilBertConfig has a method of this name")
            setattr(self, name, value)
        self._validate()

    # --- values -------------------------------------------------------------------------------------------------

    def _validate(self) -> None:
        for name, limit in LIMITS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"config.{name} must be an integer, got {value!r}")
            # a model without layers is the embeddings alone, which is allowed
            lowest = 0 if name == "n_layers" else 1
            if not lowest <= value <= limit:
                raise ValueError(f"config.{name} is {value}; it must be from {lowest} to {limit}")
        for name in ("dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout"):
            value = self._number(name)
            if not 0 <= value <= 1:
                raise ValueError(f"config.{name} is {value}; a probability is from 0 to 1")
        if not (math.isfinite(self._number("initializer_range")) and self.initializer_range >= 0):
            raise ValueError(f"config.initializer_range is {self.initializer_range}; it must be 0 or more")
        if not 0 < self._number("layer_norm_eps") < 1:
            raise ValueError(f"config.layer_norm_eps is {self.layer_norm_eps}; it must be between 0 and 1")
        if self.dim % self.n_heads:
            raise ValueError(f"config.n_heads {self.n_heads} must divide config.dim {self.dim} evenly")
        if self.dim // self.n_heads > 128:
            raise ValueError(
                f"config.dim {self.dim} over config.n_heads {self.n_heads} is a head size of "
                f"{self.dim // self.n_heads}; the largest supported is 128"
            )
        if not isinstance(self.activation, str) or self.activation not in ACTIVATION_ALIASES:
            raise ValueError(
                f"config.activation {self.activation!r} is not supported; it must be one of "
                f"{', '.join(ACTIVATION_ALIASES)}"
            )
        for name in (
            "sinusoidal_pos_embds",
            "output_hidden_states",
            "output_attentions",
            "return_dict",
            "tie_word_embeddings",
        ):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"config.{name} must be true or false, got {value!r}")
        if self.label2id is not None and not isinstance(self.label2id, dict):
            raise TypeError(f"config.label2id must map names to numbers, got {self.label2id!r}")
        if self.pad_token_id is not None and (
            isinstance(self.pad_token_id, bool) or not isinstance(self.pad_token_id, int)
        ):
            raise TypeError(f"config.pad_token_id must be an integer or None, got {self.pad_token_id!r}")
        chunk = self.chunk_size_feed_forward
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 0:
            raise ValueError(f"config.chunk_size_feed_forward is {chunk!r}; it must be 0 or more")
        if self.problem_type is not None and self.problem_type not in PROBLEM_TYPES:
            raise ValueError(f"config.problem_type {self.problem_type!r} is not one of {', '.join(PROBLEM_TYPES)}")
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError("config.problem_type single_label_classification needs more than one label")

    def _number(self, name: str) -> float:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"config.{name} must be a number, got {value!r}")
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"config.{name} is a number of {len(str(value))} digits") from None

    def __getattr__(self, name: str) -> Any:  # only reached for what is not set
        if name in self._aliases:
            return getattr(self, self._aliases[name])
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, self._aliases.get(name, name), value)

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, n: int) -> None:
        if isinstance(n, bool) or not isinstance(n, int) or not 0 < n <= LIMITS["vocab_size"]:
            raise ValueError(f"config.num_labels is {n!r}; it must be an integer of 1 or more")
        if n != self.num_labels or self.label2id is None:
            self.id2label = {i: f"LABEL_{i}" for i in range(n)}
            self.label2id = {label: i for i, label in self.id2label.items()}

    @property
    def name_or_path(self) -> str:
        """Where it was loaded from."""
        return self._name_or_path

    @name_or_path.setter
    def name_or_path(self, value: str) -> None:
        self._name_or_path = value

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "DistilBertConfig":
        """Itself, for transformers' callers."""
        return self

    @property
    def use_return_dict(self) -> bool:
        return self.return_dict

    # --- dictionaries and files ---------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Every attribute but private ones, plus model_type."""
        return copy.deepcopy(self._values()) | {"model_type": self.model_type}

    def _values(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name[:1] != "_"}

    def to_diff_dict(self) -> dict[str, Any]:
        """What a file holds: every DistilBERT field, and of the common ones those that are not at their default."""
        default = type(self)().__dict__
        common = [
            "architectures",
            "chunk_size_feed_forward",
            "dtype",
            "id2label",
            "label2id",
            "layer_norm_eps",
            "output_attentions",
            "output_hidden_states",
            "problem_type",
            "return_dict",
            "tie_word_embeddings",
            "eos_token_id",
            "bos_token_id",
            "is_encoder_decoder",
        ]
        return {k: v for k, v in self.to_dict().items() if k not in common or v != default.get(k)}

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, path: str | Path, use_diff: bool = True) -> None:
        Path(path).write_text(self.to_json_string(use_diff), encoding="utf-8")

    def save_pretrained(self, directory: str | Path) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.to_json_file(Path(directory) / "config.json")

    def update(self, values: dict[str, Any]) -> None:
        if not isinstance(values, dict):
            raise TypeError(f"update takes a dictionary of fields, got {type(values).__name__}")
        changed = copy.copy(self)  # what is refused changes nothing
        for name, value in values.items():
            setattr(changed, name, value)
        changed._validate()
        self.__dict__.update(changed.__dict__)

    def updated(self, values: dict[str, Any]) -> "DistilBertConfig":
        """This configuration with other values of its own fields; TypeError for a field it lacks."""
        _check_names(values, self.__dict__)
        self.update(values)
        return self

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> "DistilBertConfig":
        """From a config.json's dictionary, of a DistilBERT or of a BERT that converts to one. Overrides win; TypeError
        for one that is no field of either."""
        if not isinstance(values, dict):
            raise ValueError(f"a configuration is a JSON object, got {type(values).__name__}")
        values = dict(values)
        model_type = values.pop("model_type", cls.model_type)
        if model_type == "bert":
            values = _from_bert(values)
        elif model_type != cls.model_type:
            raise ValueError(
                f"model_type is {model_type!r}; fastdistil loads 'distilbert' and 'bert' checkpoints, whose encoders "
                "it computes exactly, and no others"
            )
        _check_names(overrides, values.keys() | cls().__dict__.keys())
        if "num_labels" in overrides and "id2label" not in overrides:
            values.pop("id2label", None), values.pop("label2id", None)
        return cls(**(values | overrides))

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: Any,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        return_unused_kwargs: bool = False,
        **overrides: Any,
    ) -> Any:
        """From a directory, a config.json or a hub id. Overrides win; what is no field is an error, or with
        return_unused_kwargs comes back beside the configuration."""
        if not isinstance(path_or_repo, (str, Path)):
            raise TypeError(f"a configuration is given by a directory, a file or a hub id, got {path_or_repo!r}")
        with suppress(RuntimeError):  # ~user, and no such user
            path_or_repo = Path(path_or_repo).expanduser() if str(path_or_repo).startswith("~") else path_or_repo
        path = Path(path_or_repo)
        if path.is_dir():
            path = path / "config.json"
        elif not path.exists() and may_be_hub_id(path_or_repo):
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

            where: dict[str, Any] = dict(revision=revision, cache_dir=cache_dir, token=token)
            try:
                path = Path(hf_hub_download(path_or_repo, "config.json", local_files_only=local_files_only, **where))
            except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
                raise FileNotFoundError(
                    f"{path_or_repo!r} is neither a local directory nor a hub id that could be found: {error}"
                ) from error
        if not path.is_file():
            raise FileNotFoundError(f"there is no configuration {path}")
        unused = {}
        if return_unused_kwargs:
            unused = {name: overrides.pop(name) for name in _unknown(overrides, cls.from_json_file(path).__dict__)}
        config = cls.from_json_file(path, **overrides)
        config.name_or_path = str(path_or_repo)
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def from_json_file(cls, path: str | Path, **overrides: Any) -> "DistilBertConfig":
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a JSON file: {error}") from error
        try:
            return cls.from_dict(values, **overrides)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DistilBertConfig) and self._values() == other._values()

    __hash__ = None  # type: ignore[assignment]

    def __iter__(self):
        return iter(self._values())

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


def _check_names(given: dict[str, Any], known: Iterable[str]) -> None:
    for name in _unknown(given, known):
        raise TypeError(f"{name!r} is neither an argument nor a field of the configuration")


def _unknown(given: Iterable[str], known: Iterable[str]) -> list[str]:
    allowed = {*known, *DistilBertConfig._aliases, "num_labels", "torch_dtype"}
    return [name for name in given if name not in allowed]


def _labels(id2label: Any) -> dict[int, str]:
    if not isinstance(id2label, dict):
        raise TypeError(f"config.id2label must map numbers to names, got {id2label!r}")
    try:
        return {int(i): str(label) for i, label in id2label.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.id2label has a key that is no number: {error}") from error


def _from_bert(values: dict[str, Any]) -> dict[str, Any]:
    if (positions := values.pop("position_embedding_type", "absolute")) != "absolute":
        raise ValueError(f"position_embedding_type {positions!r} cannot be converted, only 'absolute' can")
    for name in ("is_decoder", "add_cross_attention"):
        if values.pop(name, False):
            raise ValueError(f"{name} is true: only BERT encoders can be converted")
    if values.pop("embedding_size", values.get("hidden_size")) != values.get("hidden_size"):
        raise ValueError("embedding_size differs from hidden_size: factorised embeddings cannot be converted")
    for name in ("type_vocab_size", "use_cache", "gradient_checkpointing", "classifier_dropout", "_name_or_path"):
        values.pop(name, None)
    values = {"num_hidden_layers": 12} | values  # BERT's default, where ours is 6; the other defaults agree
    return {BERT_FIELDS.get(name, name): value for name, value in values.items()} | {"token_types_folded": True}
