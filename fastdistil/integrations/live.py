"""transformers' DistilBertModel and BertModel on packed rows.

An instance is accelerated by giving it a subclass of its class. The subclass runs our blocks, which are built around
the instance's own Linears and LayerNorms and are not part of it: they are made when first needed, again when a leaf is
another one, and never copied or pickled with the model.
"""

import contextlib
import functools
import importlib
import inspect
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPoolingAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastdistil import ops
from fastdistil._register import is_transformed
from fastdistil.config import ACTIVATION_ALIASES
from fastdistil.layers import FFN, MultiHeadSelfAttention, TransformerBlock, apply_add_norm
from fastdistil.packing import Packing, find_tokens
from fastdistil.plain import ACTIVATIONS, is_of_rows, is_packed_otherwise, is_plain

# heads that read each sequence's first token alone, by the end of their names
READ_COLUMN_0 = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")
OLD = int(transformers.__version__.split(".")[0]) < 5
# arguments that the packed path answers; any other, if given, is for transformers' own code
KNOWN = {
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "inputs_embeds",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "use_cache",
}


@dataclass(frozen=True)
class Layer:
    """A block's leaf modules, by DistilBERT's names, and the module that attends."""

    attention: nn.Module
    q_lin: nn.Module
    k_lin: nn.Module
    v_lin: nn.Module
    out_lin: nn.Module
    sa_layer_norm: nn.Module
    lin1: nn.Module
    lin2: nn.Module
    output_layer_norm: nn.Module


class Unknown(Exception):
    """A module that is not transformers' own stands where our blocks would read its leaves."""


class Fast:
    """Our blocks around a live model's leaf modules, and what tells whether they still compute what the model does.

    Anything unusual inside the model leaves the call to transformers' code: another class, a patched forward, a hook,
    a Dropout in training mode. `blocks` is None where that was so from the start.
    """

    def __init__(self, model: Any):
        # of the model itself its parts alone: it holds this, and would else wait for the garbage collector
        self.parts = tuple(model._modules.values())
        self.watched = [(m, m.__dict__, type(m), tuple(m._modules.values())) for m in [*model.modules()][1:]]
        kinds = {kind for _, _, kind, _ in self.watched}
        self.forwards = [(kind, _WRITTEN.get(kind, kind.forward)) for kind in kinds]
        self.blocks: list[TransformerBlock] | None = None
        self.attentions: list[dict[str, Any]] = []
        try:
            heads, dim, activation = model._heads_and_activation()
            layers = list(model._layers())
        except (Unknown, AttributeError):
            return
        self.attentions = [layer.attention.__dict__ for layer in layers]
        self.heads, self.head_size = heads, dim // heads
        if all(getattr(layer.q_lin, "out_features", dim) == dim for layer in layers):  # no head was pruned
            blocks = [_block(layer, dim, heads, activation) for layer in layers]
            if all(is_of_rows(type(part)) for block in blocks for part in block.leaves()):
                self.blocks = blocks

    def lay_side_by_side(self) -> None:
        """The weights of q, k and v, unless they lie so already. No other thread may read them meanwhile."""
        for block in self.blocks or ():
            attention: Any = block.attention
            if attention.looked_at != _address(attention):  # not yet, or moved to another place or dtype
                _lay_side_by_side(attention)

    def is_current(self, model: nn.Module) -> bool:
        """Whether the model is made of the same modules."""
        return tuple(model._modules.values()) == self.parts and all(
            type(m) is kind and tuple(state["_modules"].values()) == children
            for m, state, kind, children in self.watched
        )

    def is_plain(self) -> bool:
        return self.blocks is not None and not any(
            (state["training"] and isinstance(m, _DropoutNd))
            or "forward" in state
            or state.get("max_norm") is not None  # an embedding's, which changes its weights
            or ((state["_forward_hooks"] or state["_forward_pre_hooks"]) and _is_watched(m))
            for m, state, _, _ in self.watched
        )

    def attends_as_usual(self, config: Any) -> bool:
        """Whether no class has another forward than it came with, and each block attends as its configuration says."""
        scaling = self.head_size**-0.5
        usual = all(
            state.get("scaling", scaling) == scaling
            and state.get("attention_head_size", self.head_size) == self.head_size
            and state.get("n_heads", state.get("num_attention_heads")) == self.heads
            and not (state.get("is_causal") or state.get("is_decoder"))
            for state in self.attentions
        )
        return usual and all(kind.forward is forward for kind, forward in self.forwards) and _is_usual(config)


_MODELING = [
    importlib.import_module(kind.__module__) for kind in (transformers.DistilBertModel, transformers.BertModel)
]
# what was computed when this was imported; of other classes, such as quantised layers, nobody knows
_WRITTEN: dict[type, Any] = {
    kind: kind.forward
    for kind in chain(*(vars(module).values() for module in _MODELING), vars(nn).values())
    if isinstance(kind, type) and issubclass(kind, nn.Module) and kind is not nn.Module
}
_EAGER = [(module, getattr(module, "eager_attention_forward", None)) for module in _MODELING]
_USUAL = {*ALL_ATTENTION_FUNCTIONS.values()}


def _is_usual(config: Any) -> bool:
    """Whether the attention function that the configuration names is one of transformers' own, or ours."""
    name = getattr(config, "_attn_implementation", None)
    if OLD:  # there they are chosen when a model is made
        return True
    if name in (None, "eager"):
        return all(getattr(module, "eager_attention_forward", None) is eager for module, eager in _EAGER)
    function = ALL_ATTENTION_FUNCTIONS.get(name)
    function = getattr(function, "func", function)  # a kernel's name may stand for a part of transformers' own
    return function in _USUAL or str(getattr(function, "__module__", "")).startswith("fastdistil.")


def _wants_dict(config: Any, asked: bool | None) -> bool:
    return bool(config.use_return_dict if asked is None else asked)


def _is_watched(module: nn.Module) -> bool:
    """Whether a user's hook is on a module; transformers' own, which collect outputs, are not needed."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)


def _theirs(module: nn.Module, like: type) -> Any:
    """The module, if it is of a class that stands beside `like`; else Unknown."""
    if type(module).__module__ != like.__module__:
        raise Unknown(type(module))
    return module


def _lay_side_by_side(attention: Any) -> None:
    attention._qkv, attention.looked_at = None, _address(attention)
    attention._lay_side_by_side_if_alone()
    attention.looked_at = _address(attention)


def _address(attention: Any) -> int:
    weight = getattr(attention.q_lin, "weight", None)
    return weight.data_ptr() if type(weight) is nn.Parameter and type(weight.data) is Tensor else 0


def _block(layer: Layer, dim: int, heads: int, activation: str) -> TransformerBlock:
    def bare(cls: Any) -> Any:  # without weights of its own
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        return module

    attention, ffn, block = bare(MultiHeadSelfAttention), bare(FFN), bare(TransformerBlock)
    attention.n_heads, attention.dim, attention.attention_head_size = heads, dim, dim // heads
    attention.scaling = (dim // heads) ** -0.5
    for name in ("q_lin", "k_lin", "v_lin", "out_lin"):
        setattr(attention, name, getattr(layer, name))
    attention._qkv = attention.looked_at = None
    ffn.lin1, ffn.lin2, ffn.activation = layer.lin1, layer.lin2, ACTIVATIONS[activation]()
    block.attention, block.ffn = attention, ffn
    block.sa_layer_norm, block.output_layer_norm = layer.sa_layer_norm, layer.output_layer_norm
    block.attention_adapters = block.output_adapters = None
    return block


_entry = threading.RLock()  # held while a call begins or ends; a signal may come in between
_running: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # how many calls of each model there are


def _after_fork() -> None:
    global _entry
    _entry = threading.RLock()  # another thread of the parent may have held it
    _running.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Live:
    """What an accelerated encoder does in place of its class's forward. Mixed in before transformers' class."""

    plain: type  # transformers' class

    def _result(self, hidden: Tensor, states: tuple[Tensor, ...] | None) -> Any:
        raise NotImplementedError

    def __getstate__(self) -> dict:
        state: dict = super().__getstate__()  # type: ignore[assignment]
        return {name: value for name, value in state.items() if name != "_fast"}

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()  # type: ignore[misc]
        replica.__dict__.pop("_fast", None)  # of the original
        return replica

    def __init_subclass__(cls) -> None:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        cls.forward = functools.wraps(cls.plain.forward)(forward)  # type: ignore[attr-defined]

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(_parameters(self.plain), args, strict=False)) | kwargs
        if torch.compiler.is_compiling():
            return self.plain.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        with self._entered(given) as fast:
            if fast is None:
                return self.plain.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
            return self._answer(fast, given)

    @contextlib.contextmanager
    def _entered(self, given: dict[str, Any]) -> Iterator[Fast | None]:
        """Our blocks for a call, if they answer it. Weights are moved only while no call of another thread runs."""
        model: Any = self
        entered = False
        try:
            with _entry:
                running = _running[model] = _running.get(model, 0) + 1
                entered = True
                fast = self._fast_for(given)
                if fast is not None and running == 1:  # a call from within one, of a hook or a signal, makes two
                    fast.lay_side_by_side()
            yield fast
        finally:
            if entered:
                with _entry:
                    _running[model] = max(_running.get(model, 1) - 1, 0)  # of a process forked meanwhile there is none

    def _answer(self, fast: Fast, given: dict[str, Any]) -> Any:
        config: Any = self.config  # type: ignore[attr-defined]
        want_states = given.get("output_hidden_states")
        every = bool(config.output_hidden_states if want_states is None else want_states)
        states = self._packed(fast, given, every)
        out = self._result(states[-1], tuple(states) if every else None)
        return_dict = given.get("return_dict")
        return out if (config.return_dict if return_dict is None else return_dict) else out.to_tuple()

    def _fast_for(self, given: dict[str, Any]) -> Fast | None:
        """Our blocks, if the call is one that they answer."""
        model: Any = self
        padding_is_read = getattr(_called, "encoder", None) is self
        _called.encoder = None
        mask, ids, embeds = given.get("attention_mask"), given.get("input_ids"), given.get("inputs_embeds")
        attentions = given.get("output_attentions")
        if (
            model.training
            or torch.jit.is_tracing()
            or is_transformed()
            or "forward" in self.__dict__
            or padding_is_read
            or (OLD and not _wants_dict(model.config, given.get("return_dict")))  # its tuples keep what is None
            or any(value is not None and value is not False for k, value in given.items() if k not in KNOWN)
            or given.get("output_hidden_states") not in (None, True, False)  # or a list of layers
            or (model.config.output_attentions if attentions is None else attentions)
            or (ids is None) is (embeds is None)
            or (mask is not None and not _fits(mask, ids if embeds is None else embeds))
            or (ids is not None and (ids.dim() != 2 or ids.numel() == 0))
            or (embeds is not None and embeds.numel() == 0)
            or (given.get("position_ids") is None and _is_too_long(model, ids if embeds is None else embeds))
            or (torch.is_grad_enabled() and (_is_trained(model) or _wants_grad(embeds)))
        ):
            return None
        fast = self.__dict__.get("_fast")
        if fast is None or not fast.is_current(model):
            fast = self.__dict__["_fast"] = Fast(model)
        return fast if fast.is_plain() and fast.attends_as_usual(model.config) else None

    def _packed(self, fast: Fast, given: dict[str, Any], every: bool) -> list[Tensor]:
        ids, embeds, mask = given.get("input_ids"), given.get("inputs_embeds"), given.get("attention_mask")
        first: Any = ids if embeds is None else embeds
        batch, length, device = first.shape[0], first.shape[1], first.device
        keep = None if mask is None else (mask != 0).expand(batch, length)
        positions = given.get("position_ids")
        positions = torch.arange(length, device=device)[None] if positions is None else torch.atleast_2d(positions)
        at, row_ids, row_positions = find_tokens(keep, batch, length, device, ids, positions)
        x = self._embed(at, row_ids, row_positions, embeds, given.get("token_type_ids"))  # [rows, dim]
        states = [x]
        block: Any
        for block in fast.blocks or ():
            x = block.packed(x, at)
            states = [*states, x] if every else [x]
        padded = [at.unpack(x) for x in states]
        if at.source is not None:  # a head reads column 0: where that is padding, it finds the first real token
            rows, there = at.first()
            first = x[rows] if len(x) else x.new_zeros(batch, x.shape[1])
            padded[-1][:, 0] = first if there is None else first.masked_fill(~there[:, None], 0)
        return padded

    def _embed(self, at: Packing, ids: Any, positions: Any, embeds: Any, types: Any) -> Tensor:
        """ids, positions: [rows]; embeds: [B, L, dim]; types: [1 or B, L] -> [rows, dim]"""
        own: Any = self.embeddings  # type: ignore[attr-defined]
        table, norm, place = own.word_embeddings, own.LayerNorm, own.position_embeddings
        kinds = getattr(own, "token_type_embeddings", None)
        plain = type(table) is type(place) is nn.Embedding and is_plain(norm, nn.LayerNorm)
        plain = plain and norm.weight.dtype is table.weight.dtype
        plain = plain and not any(is_packed_otherwise(one.weight) for one in (table, place))
        if embeds is None and kinds is None and plain:
            return ops.embed_layer_norm(
                ids, positions, table.weight, place.weight, norm.weight, norm.bias, norm.eps, at.live
            )
        x = table(ids) if embeds is None else at.pack(embeds)
        more = place(positions)
        if kinds is not None:
            x = x + kinds(torch.zeros_like(positions) if types is None else at.pack(types.expand(at.batch, at.length)))
        return apply_add_norm(norm, x, more, at.live)


def _fits(mask: Any, given: Any) -> bool:
    """Whether a mask tells which tokens of the input are real, and no more."""
    return isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape in (given.shape[:2], (1, given.shape[1]))


def _is_trained(model: nn.Module) -> bool:
    """Of one of DataParallel's replicas, whose weights are no parameters, that cannot be told."""
    return getattr(model, "_is_replica", False) or any(p.requires_grad for p in model.parameters())


def _is_too_long(model: Any, given: Any) -> bool:
    """Whether there are no positions for all tokens: transformers says so."""
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    return given.shape[1] > getattr(table, "num_embeddings", given.shape[1])


def _wants_grad(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad


@functools.cache
def _parameters(cls: Any) -> list[str]:
    return [name for name in inspect.signature(cls.forward).parameters if name != "self"]


class DistilBertModel(Live, transformers.DistilBertModel):
    """An accelerated transformers.DistilBertModel."""

    plain = transformers.DistilBertModel

    def _layers(self) -> Iterator[Layer]:
        for block in _theirs(self.transformer, self.plain).layer:
            a, ffn = _theirs(_theirs(block, self.plain).attention, self.plain), _theirs(block.ffn, self.plain)
            _check_activation(ffn.activation, self.config.activation)
            _check_dropouts(a, ffn)
            yield Layer(
                a, a.q_lin, a.k_lin, a.v_lin, a.out_lin, block.sa_layer_norm,
                ffn.lin1, ffn.lin2, block.output_layer_norm,
            )  # fmt: skip

    def _heads_and_activation(self) -> tuple[int, int, str]:
        _check_dropouts(_theirs(self.embeddings, self.plain))
        return self.config.n_heads, self.config.dim, ACTIVATION_ALIASES[self.config.activation]

    def _result(self, hidden: Tensor, states: tuple[Tensor, ...] | None) -> Any:
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=states)


class BertModel(Live, transformers.BertModel):
    """An accelerated transformers.BertModel, with token types and pooler."""

    plain = transformers.BertModel

    def _layers(self) -> Iterator[Layer]:
        def own(module: nn.Module) -> Any:
            return _theirs(module, self.plain)

        for block in own(self.encoder).layer:
            a, out = own(own(own(block).attention).self), own(block.attention.output)
            _check_activation(own(block.intermediate).intermediate_act_fn, self.config.hidden_act)
            _check_dropouts(a, out, own(block.output))
            yield Layer(
                a, a.query, a.key, a.value, out.dense, out.LayerNorm,
                block.intermediate.dense, block.output.dense, block.output.LayerNorm,
            )  # fmt: skip

    def _heads_and_activation(self) -> tuple[int, int, str]:
        _check_dropouts(_theirs(self.embeddings, self.plain))
        config = self.config
        return config.num_attention_heads, config.hidden_size, ACTIVATION_ALIASES[config.hidden_act]

    def _result(self, hidden: Tensor, states: tuple[Tensor, ...] | None) -> Any:
        pooled = self.pooler(hidden) if self.pooler is not None else None
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden, pooler_output=pooled, hidden_states=states
        )


def _check_dropouts(*owners: Any) -> None:
    for owner in owners:
        if type(owner.dropout) is not nn.Dropout:
            raise Unknown(type(owner.dropout))


def _check_activation(module: Any, name: str) -> None:
    """Unknown unless the module is the activation that transformers makes for the name."""
    made = ACT2FN[name]
    if type(module) is not type(made) or getattr(module, "act", None) != getattr(made, "act", None):
        raise Unknown(type(module))


CLASSES: dict[type, type] = {cls.plain: cls for cls in (DistilBertModel, BertModel)}

# transformers keeps what a model can record (attentions) by the class's text, and fills it in when a model is made
for _module in ("transformers.utils.output_capturing", "transformers.utils.generic"):
    with contextlib.suppress(ImportError, AttributeError):
        _known = importlib.import_module(_module)._CAN_RECORD_REGISTRY
        _known |= {str(cls): getattr(cls, "_can_record_outputs", None) for cls in CLASSES.values()}


def accelerate(model: nn.Module) -> Any:
    found = [m for m in model.modules() if type(m) in CLASSES]
    if not found and not any(isinstance(m, Live) for m in model.modules()):
        raise TypeError(f"{type(model).__name__} holds no transformers DistilBertModel or BertModel")
    for encoder in found:
        _check(encoder)
    for encoder in found:
        encoder.__class__ = CLASSES[type(encoder)]
    for head in model.modules():
        if (
            isinstance(head, transformers.PreTrainedModel)
            and isinstance(head.base_model, Live)
            and head.base_model is not head
        ):
            if type(head).__name__.endswith(READ_COLUMN_0) or _look_for_labels in head._forward_pre_hooks.values():
                continue
            head.register_forward_pre_hook(_look_for_labels, with_kwargs=True)
    return model


def _look_for_labels(head: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """A loss is computed from padded positions, too; the encoder then leaves the call to transformers' code."""
    kind: Any = type(head)
    names = _parameters(kind)
    given = dict(zip(names, args, strict=False)) | kwargs
    labels = any(given.get(name) is not None for name in ("labels", "start_positions", "end_positions"))
    _called.encoder = head.base_model if labels and given.get("attention_mask") is not None else None


_called = threading.local()  # the encoder whose padding the head that is being called in this thread reads


def _check(encoder: Any) -> None:
    config = encoder.config
    name = config.activation if hasattr(config, "activation") else config.hidden_act
    if not isinstance(name, str) or name not in ACTIVATION_ALIASES:
        raise ValueError(f"activation {name!r} is not supported; it must be one of {', '.join(ACTIVATION_ALIASES)}")
    if config.hidden_size // config.num_attention_heads > ops.MAX_HEAD_SIZE:
        raise ValueError(f"a head size above {ops.MAX_HEAD_SIZE} is not supported")
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError("a decoder is not supported, only an encoder")
    if getattr(config, "position_embedding_type", "absolute") not in (None, "absolute"):
        raise ValueError(
            f"position_embedding_type {config.position_embedding_type!r} is not supported, only 'absolute'"
        )


def restore(model: nn.Module) -> Any:
    for encoder in model.modules():
        if isinstance(encoder, Live):
            encoder.__dict__.pop("_fast", None)
            encoder.__class__ = encoder.plain
        for number, hook in list(encoder._forward_pre_hooks.items()):
            if hook is _look_for_labels:
                del encoder._forward_pre_hooks[number]
                encoder._forward_pre_hooks_with_kwargs.pop(number, None)
    return model
