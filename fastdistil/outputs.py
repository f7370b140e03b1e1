"""Model outputs that read as attributes, by name, by number and as a tuple, like transformers' ModelOutput."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from torch import Tensor
from torch.utils import _pytree as pytree


class ModelOutput(OrderedDict):
    """Ordered mapping of the fields that are not None. Subclasses are dataclasses whose fields default to None.

    `out.name` is None for an absent field and `out["name"]` a KeyError; `out[0]`, `out[:2]` and `to_tuple()` leave the
    absent ones out. Items cannot be deleted; one that is set under another name is not in copies.
    `type(out)(mapping or pairs)` makes one from names and values, as tools do that move or cast a model's results.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        pytree.register_pytree_node(
            cls,
            lambda out: (list(out.values()), (cls, list(out.keys()))),
            lambda values, context: context[0](**dict(zip(context[1], values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__name__}",
            to_dumpable_context=lambda context: list(context[1]),
            from_dumpable_context=lambda names: (cls, names),
        )

    def __post_init__(self) -> None:
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        first, *rest = (getattr(self, name) for name in names)
        if all(value is None for value in rest) and isinstance(first, Iterable) and not isinstance(first, Tensor):
            given = _by_name(first, names)
            super().clear()
            for name in names:
                setattr(self, name, given.get(name))

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if value is not None and name in self.__dataclass_fields__:  # type: ignore[attr-defined]
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __reduce__(self) -> tuple:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]

    def to_tuple(self) -> tuple:
        return tuple(self.values())

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"the fields of {type(self).__name__} cannot be added or removed")

    __delitem__ = pop = popitem = setdefault = update = _refuse


def _by_name(given: Iterable[Any], names: list[str]) -> dict[str, Any]:
    """A mapping or pairs of these names and values as a dictionary; anything else is the value of the first."""
    pairs = list(given.items() if isinstance(given, Mapping) else given)
    for pair in pairs:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str) and pair[0] in names):
            return {names[0]: pairs if isinstance(given, Iterator) else given}
    return dict(pairs)


@dataclass
class BaseModelOutput(ModelOutput):
    """last_hidden_state: [batch, length, dim]. hidden_states: n_layers + 1 of them, the embeddings' output first.
    attentions: n_layers of [batch, heads, length, length], after softmax."""

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class LogitsOutput(ModelOutput):
    """loss: scalar. logits: as the subclass says. hidden_states, attentions: as in BaseModelOutput."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class MaskedLMOutput(LogitsOutput):
    """logits: [batch, length, vocab], or [n, vocab] of chosen tokens."""


@dataclass
class SequenceClassifierOutput(LogitsOutput):
    """logits: [batch, num_labels]."""


@dataclass
class TokenClassifierOutput(LogitsOutput):
    """logits: [batch, length, num_labels]."""


@dataclass
class MultipleChoiceModelOutput(LogitsOutput):
    """logits: [batch, choices]; hidden_states and attentions of batch * choices sequences."""


@dataclass
class QuestionAnsweringModelOutput(ModelOutput):
    """loss: scalar. start_logits, end_logits: [batch, length]. The rest as in BaseModelOutput."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
