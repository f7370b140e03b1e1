"""transformers' DistilBertModel and BertModel on packed rows.

An instance is accelerated by giving it a subclass of its class. The subclass runs our blocks, which are built around
the instance's own Linears and LayerNorms and are not part of it: they are made when first needed, again when a leaf is
another one, and never copied or pickled with the model.
"""

import contextlib
import functools
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPoolingAndCrossAttentions

from fastdistil import ops
from fastdistil.config import ACTIVATION_ALIASES
from fastdistil.model import FFN, MultiHeadSelfAttention, TransformerBlock, apply_add_norm, is_plain
from fastdistil.packing import Packing, find_rows

TOO_WIDE = 128  # head size
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
    """A block's leaf modules, by DistilBERT's names."""

    q_lin: nn.Module
    k_lin: nn.Module
    v_lin: nn.Module
    out_lin: nn.Module
    sa_layer_norm: nn.Module
    lin1: nn.Module
    lin2: nn.Module
    output_layer_norm: nn.Module


class Fast:
    """Our blocks around a live model's leaf modules, and what tells whether they are still its own."""

    def __init__(self, model: Any):
        self.layers = tuple(model._layers())
        self.inner = [m for m in model.modules() if m is not model and next(m.children(), None) is not None]
        heads, activation = model._heads_and_activation()
        self.blocks = [_block(layer, model.config.hidden_size, heads, activation) for layer in self.layers]

    def is_current(self, model: Any) -> bool:
        same = all(
            getattr(old, name) is getattr(new, name)
            for old, new in zip(self.layers, model._layers(), strict=False)
            for name in Layer.__dataclass_fields__
        )
        return same and len(self.layers) == model.config.num_hidden_layers

    def is_hooked(self) -> bool:
        """Whether a user's hook is on an inner module; transformers' own, which collect outputs, are not needed."""
        hooks = (hook for m in self.inner for d in (m._forward_hooks, m._forward_pre_hooks) if d for hook in d.values())
        return any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)


@torch.inference_mode(False)  # what is made inside could not be trained afterwards
def _lay_side_by_side(attention: MultiHeadSelfAttention) -> None:
    attention._lay_side_by_side()


def _block(layer: Layer, dim: int, heads: int, activation: str) -> TransformerBlock:
    def bare(cls: Any) -> Any:  # without weights of its own
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        return module

    attention, ffn, block = bare(MultiHeadSelfAttention), bare(FFN), bare(TransformerBlock)
    attention.n_heads, attention.dim, attention.attention_head_size = heads, dim, dim // heads
    for name in ("q_lin", "k_lin", "v_lin", "out_lin"):
        setattr(attention, name, getattr(layer, name))
    _lay_side_by_side(attention)
    ffn.lin1, ffn.lin2, ffn.activation = layer.lin1, layer.lin2, activation
    block.attention, block.ffn = attention, ffn
    block.sa_layer_norm, block.output_layer_norm = layer.sa_layer_norm, layer.output_layer_norm
    block.attention_adapters = block.output_adapters = None
    return block


class Live:
    """What an accelerated encoder does in place of its class's forward. Mixed in before transformers' class."""

    plain: type  # transformers' class

    def _result(self, hidden: Tensor, states: tuple[Tensor, ...] | None) -> Any:
        raise NotImplementedError

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_fast"}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names = _parameters(self.plain)
        given = dict(zip(names, args, strict=False)) | kwargs
        fast = self._fast_for(given)
        if fast is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
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
        mask, ids, embeds = given.get("attention_mask"), given.get("input_ids"), given.get("inputs_embeds")
        attentions = given.get("output_attentions")
        if (
            model.training
            or torch.compiler.is_compiling()
            or any(value is not None and value is not False for k, value in given.items() if k not in KNOWN)
            or given.get("output_hidden_states") not in (None, True, False)  # or a list of layers
            or (model.config.output_attentions if attentions is None else attentions)
            or (ids is None) is (embeds is None)
            or (mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2))
            or (ids is not None and (ids.dim() != 2 or ids.numel() == 0))
            or (embeds is not None and embeds.numel() == 0)
            or (torch.is_grad_enabled() and (any(p.requires_grad for p in model.parameters()) or _wants_grad(embeds)))
        ):
            return None
        fast = self.__dict__.get("_fast")
        if fast is None or not fast.is_current(model):
            fast = self.__dict__["_fast"] = Fast(model)
        return None if fast.is_hooked() else fast

    def _packed(self, fast: Fast, given: dict[str, Any], every: bool) -> list[Tensor]:
        ids, embeds, mask = given.get("input_ids"), given.get("inputs_embeds"), given.get("attention_mask")
        first: Any = ids if embeds is None else embeds
        batch, length, device = first.shape[0], first.shape[1], first.device
        if mask is not None and mask.shape not in ((batch, length), (1, length)):
            raise ValueError(f"attention_mask must be [{batch}, {length}], got {list(mask.shape)}")
        at = find_rows(None if mask is None else (mask != 0).expand(batch, length), batch, length, device)
        positions = given.get("position_ids")
        positions = torch.arange(length, device=device)[None] if positions is None else torch.atleast_2d(positions)
        x = self._embed(at, ids, embeds, positions.expand(batch, length), given.get("token_type_ids"))  # [rows, dim]
        states = [x]
        for block in fast.blocks:
            attention = block.attention
            if attention._qkv is None or not attention._still_fits():  # moved to another place or dtype
                _lay_side_by_side(attention)
            x = block.packed(x, at)
            states = [*states, x] if every else [x]
        return [at.unpack(x) for x in states]

    def _embed(self, at: Packing, ids: Any, embeds: Any, positions: Tensor, types: Any) -> Tensor:
        """-> [rows, dim]"""
        own: Any = self.embeddings  # type: ignore[attr-defined]
        table, norm, place = own.word_embeddings, own.LayerNorm, own.position_embeddings
        kinds = getattr(own, "token_type_embeddings", None)
        plain = all(map(_is_plain_embedding, (table, place))) and is_plain(norm, nn.LayerNorm)
        if embeds is None and kinds is None and plain:
            return ops.embed_layer_norm(
                at.pack(ids), at.pack(positions), table.weight, place.weight, norm.weight, norm.bias, norm.eps, at.live
            )
        x = table(at.pack(ids)) if embeds is None else at.pack(embeds)
        more = place(at.pack(positions))
        if kinds is not None:
            types = torch.zeros_like(positions) if types is None else types
            x = x + kinds(at.pack(types.expand(positions.shape)))
        return apply_add_norm(norm, x, more, at.live)


def _is_plain_embedding(table: nn.Module) -> bool:
    return type(table) is nn.Embedding and not (table._forward_hooks or table._forward_pre_hooks)


def _wants_grad(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad


@functools.cache
def _parameters(cls: Any) -> list[str]:
    return [name for name in inspect.signature(cls.forward).parameters if name != "self"]


class DistilBertModel(Live, transformers.DistilBertModel):
    """An accelerated transformers.DistilBertModel."""

    plain = transformers.DistilBertModel

    def _layers(self) -> Iterator[Layer]:
        for block in self.transformer.layer:
            a = block.attention
            yield Layer(
                a.q_lin, a.k_lin, a.v_lin, a.out_lin, block.sa_layer_norm,
                block.ffn.lin1, block.ffn.lin2, block.output_layer_norm,
            )  # fmt: skip

    def _heads_and_activation(self) -> tuple[int, str]:
        return self.config.n_heads, ACTIVATION_ALIASES[self.config.activation]

    def _result(self, hidden: Tensor, states: tuple[Tensor, ...] | None) -> Any:
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=states)


class BertModel(Live, transformers.BertModel):
    """An accelerated transformers.BertModel, with token types and pooler."""

    plain = transformers.BertModel

    def _layers(self) -> Iterator[Layer]:
        for block in self.encoder.layer:
            a, out = block.attention.self, block.attention.output
            yield Layer(
                a.query, a.key, a.value, out.dense, out.LayerNorm,
                block.intermediate.dense, block.output.dense, block.output.LayerNorm,
            )  # fmt: skip

    def _heads_and_activation(self) -> tuple[int, str]:
        return self.config.num_attention_heads, ACTIVATION_ALIASES[self.config.hidden_act]

    def _result(self, hidden: Tensor, states: tuple[Tensor, ...] | None) -> Any:
        pooled = self.pooler(hidden) if self.pooler is not None else None
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden, pooler_output=pooled, hidden_states=states
        )


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
    return model


def _check(encoder: Any) -> None:
    config = encoder.config
    name = config.activation if hasattr(config, "activation") else config.hidden_act
    if not isinstance(name, str) or name not in ACTIVATION_ALIASES:
        raise ValueError(f"activation {name!r} is not supported; it must be one of {', '.join(ACTIVATION_ALIASES)}")
    if config.hidden_size // config.num_attention_heads > TOO_WIDE:
        raise ValueError(f"a head size above {TOO_WIDE} is not supported")
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
    return model
