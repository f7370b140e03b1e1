"""DistilBERT's encoder as plain modules with transformers' parameter names.

Two ways through the same weights. Packed: padding is dropped once at the embeddings and every op works on live rows
`[rows, dim]`; this is inference. Dense: differentiable torch on `[batch, length, dim]`, taken when a gradient,
training mode, attentions or a 4-D mask is asked for. Both give hidden states that are 0 at padded positions.
"""

import copy
import inspect
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu
from torch.nn.modules import module as _every_module
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.hooks import RemovableHandle

from fastdistil import cpu, graphs, int8, ops
from fastdistil._register import can_look, is_exported_to_onnx, is_one_of, is_transformed
from fastdistil.adapters import (
    Adapters,
    LoRA,
    WithAdapters,
    add_norm_through,
    apply_to_merged,
    is_merged,
    low_rank,
)
from fastdistil.checkpoint import Weights, find, load_weights, read_config, save
from fastdistil.config import ACTIVATION_ALIASES, LIMITS, DistilBertConfig
from fastdistil.int8 import Int8Linear
from fastdistil.outputs import BaseModelOutput
from fastdistil.packing import Packing, find_tokens

logger = logging.getLogger("fastdistil")

# transformers' keywords of from_pretrained: without a meaning here, and those that ask for something if they are set
_IGNORED = ("trust_remote_code", "weights_only", "use_cache", "resume_download")
_ABSENT = (
    "adapter_kwargs",
    "force_download",
    "key_mapping",
    "offload_folder",
    "proxies",
    "quantization_config",
    "subfolder",
    "use_auth_token",
    "variant",
)
# config's activation -> the module that computes it
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_new": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


# what classes computed when this was imported; our own are added below
_AS_WRITTEN: dict[Any, Any] = {
    kind: kind.forward
    for kind in (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.GELU, nn.ReLU, nn.SiLU, Int8Linear)
}


def is_as_written(kind: type[nn.Module]) -> bool:
    """Whether nobody has put another forward into the class."""
    return _AS_WRITTEN.get(kind) is kind.forward


def is_plain(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether `module` computes just what its class says, so that a fused op may take its weights."""
    return (
        type(module) is kind
        and is_as_written(kind)
        and module.bias is not None
        and not is_packed_otherwise(module.weight)
        and "forward" not in module.__dict__  # patched on the instance
        and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
        and not (_every_module._global_forward_hooks or _every_module._global_forward_pre_hooks)
    )


_KINDS = (
    *(nn.GELU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU),
    *(nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid, nn.Identity),
)
ELEMENTWISE = {kind.forward for kind in _KINDS}
FUNCTIONS = (F.gelu, F.relu, F.silu, F.mish, F.elu, F.leaky_relu, F.softplus, torch.relu, torch.tanh, torch.sigmoid)
_ROW_BY_ROW = {kind.forward for kind in (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Identity, Int8Linear)}
_OF_ROWS = ("torch.ao.nn.", "torchao.", "peft.", "bitsandbytes.")  # whose layers in a Linear's place are like it


def is_of_rows(kind: Any) -> bool:
    """Whether modules of a class give each row of [rows, dim] what they give it in [batch, length, dim]; of somebody's
    own nobody knows."""
    return getattr(kind, "forward", None) in _ROW_BY_ROW or kind.__module__.startswith(_OF_ROWS)


def acts_on_rows(module: Any) -> bool:
    """The same of a module, which may be None, patched or hooked."""
    if module is None:
        return False
    state = module.__dict__
    watched = "forward" in state or state["_forward_hooks"] or state["_forward_pre_hooks"]
    return not watched and is_of_rows(type(module))


def to_eval(module: nn.Module) -> None:
    """`eval()` where it changes something: to see that it does not takes far less time, which a query feels."""
    parts = [module]
    for part in parts:  # which grows
        if part.training:
            module.eval()
            return
        parts.extend(child for child in part._modules.values() if child is not None)


def is_packed_otherwise(weight: Any) -> bool:
    """Whether a weight is a tensor of tensors, as torchao's quantised and torch's distributed ones are."""
    return hasattr(type(weight), "__tensor_flatten__")


_UNHOOKED: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()


def is_hooked(model: nn.Module, blocks: nn.ModuleList) -> bool:
    """Whether a module inside has a forward hook, which is to see [batch, length, dim].

    The scan takes as long as a small op, so it is made only where a hook was registered, or a block or a part of one
    replaced, since the last one.
    """
    if torch.compiler.is_compiling():
        return _scan(model)
    parts = (id(part) for block in blocks for part in (block, *block._modules.values()))
    registered = (RemovableHandle.next_id, *parts)
    if _UNHOOKED.get(model) == registered:
        return False
    if _scan(model):
        return True
    _UNHOOKED[model] = registered
    return False


def _scan(model: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if m is not model)


def _leaf(module: Any, kind: type[nn.Module], dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """The weight and bias of a plain module, see `is_plain`, where they are ordinary ones of this dtype on CPU."""
    if type(module) is not kind or not is_as_written(kind):
        return None
    state = module.__dict__
    if "forward" in state or "weight" in state or "bias" in state:  # an attribute comes before a parameter
        return None
    if state["_forward_hooks"] or state["_forward_pre_hooks"]:
        return None
    parameters = state["_parameters"]
    weight, bias = parameters.get("weight"), parameters.get("bias")
    for one in (weight, bias):
        if type(one) is not nn.Parameter or one.dtype is not dtype or not one.is_cpu:
            return None
    return weight, bias


def _is_of(leaf: tuple[Tensor, Tensor], *shape: int) -> bool:
    return leaf[0].shape == shape and leaf[1].shape == shape[:1]


def apply_linear(module: Any, x: Tensor, live: Tensor | None) -> Tensor:  # [rows, in] -> [rows, out]
    return ops.linear(x, module.weight, module.bias, live) if is_plain(module) else module(x)


def apply_add_norm(module: Any, x: Tensor, residual: Tensor, live: Tensor | None) -> Tensor:  # [rows, dim] x 2
    if not is_plain(module, nn.LayerNorm) or module.weight.dtype is not x.dtype:
        return module(x + residual)
    return ops.add_layer_norm(x, residual, module.weight, module.bias, module.eps, live)


class Embeddings(nn.Module):
    def __init__(self, config: DistilBertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.dim, padding_idx=_padding_idx(config))
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.dim)
        self.LayerNorm = nn.LayerNorm(config.dim, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.register_load_state_dict_pre_hook(_before_load)

    def forward(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """input_ids: [B, L], or inputs_embeds: [B, L, dim]; position_ids: [1 or B, L] -> [B, L, dim]"""
        words = self._lookup(self.word_embeddings, input_ids) if input_ids is not None else inputs_embeds  # [B, L, dim]
        assert words is not None
        positions = torch.arange(words.shape[1], device=words.device)[None] if position_ids is None else position_ids
        return self.dropout(self.LayerNorm(words + self._lookup(self.position_embeddings, positions)))

    def packed(self, table: Tensor, ids: Tensor, positions: Tensor, live: Tensor | None) -> Tensor:
        """table: [vocab, dim], the word embeddings or the caller's own; ids, positions: [rows] -> [rows, dim]"""
        norm = self.LayerNorm
        return ops.embed_layer_norm(
            ids, positions, table, self.position_embeddings.weight, norm.weight, norm.bias, norm.eps, live
        )

    def is_plain(self) -> bool:
        return (
            _is_ours(self, Embeddings)
            and _is_off(self.dropout)
            and is_plain(self.LayerNorm, nn.LayerNorm)
            and all(
                _is_ours(table, nn.Embedding)
                and table.weight.dtype is self.LayerNorm.weight.dtype
                and table.max_norm is None
                and not is_packed_otherwise(table.weight)
                and not (table._forward_hooks or table._forward_pre_hooks)
                for table in (self.word_embeddings, self.position_embeddings)
            )
        )

    @staticmethod
    def _lookup(table: nn.Embedding, index: Tensor) -> Tensor:
        if not isinstance(getattr(table, "weight", None), Tensor):  # somebody's own
            return table(index)
        # an index outside the table is NaN, not an illegal access
        inside = (index >= 0) & (index < _rows_of(table))
        return table(index.where(inside, 0)).masked_fill(~inside.unsqueeze(-1), float("nan"))


def _rows_of(table: nn.Embedding) -> int:
    """How many rows a table has, also while its weight lies elsewhere, as partitioned ones do between calls."""
    return len(table.weight) if table.weight.dim() == 2 and len(table.weight) else table.num_embeddings


def _is_ours(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    return type(module) is kind and is_as_written(kind) and "forward" not in module.__dict__


def _is_off(dropout: Any) -> bool:
    return _is_ours(dropout, nn.Dropout) and not dropout.training and not _is_touched(dropout)


def _is_touched(module: nn.Module) -> bool:
    """Whether its forward was replaced, or has a hook."""
    state = module.__dict__
    return "forward" in state or bool(state["_forward_hooks"] or state["_forward_pre_hooks"])


def _is_elementwise(activation: Any) -> bool:
    """Whether an activation, ours or what somebody put in its place, looks at one number at a time."""
    if not isinstance(activation, nn.Module):
        return activation in FUNCTIONS
    kind = type(activation)
    known = kind.forward in ELEMENTWISE or kind.__module__ == "transformers.activations"
    return known and not _is_touched(activation)


def activation_of(module: Any) -> str | None:
    """What the fused ops call an activation, where they have it."""
    kind = type(module)
    if kind not in (nn.GELU, nn.ReLU, nn.SiLU) or not is_as_written(kind) or _is_touched(module):
        return None
    if kind is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_new"}.get(module.approximate)
    return "relu" if kind is nn.ReLU else "silu"


def _reset(module: nn.Module) -> None:
    """Initial values of a user's own part, where its class gives it some."""
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if callable(reset):
        try:
            inspect.signature(reset).bind()
        except TypeError:  # it wants to be told something
            return
        reset()


class MultiHeadSelfAttention(nn.Module):
    def __init__(self, config: DistilBertConfig):
        super().__init__()
        self.config = config
        self.n_heads, self.dim = config.n_heads, config.dim
        self.attention_head_size = config.dim // config.n_heads
        self.scaling = self.attention_head_size**-0.5
        self.q_lin = nn.Linear(config.dim, config.dim)
        self.k_lin = nn.Linear(config.dim, config.dim)
        self.v_lin = nn.Linear(config.dim, config.dim)
        self.out_lin = nn.Linear(config.dim, config.dim)
        self.dropout = nn.Dropout(config.attention_dropout)
        self._qkv: tuple[Tensor, Tensor] | None = None
        self.register_load_state_dict_post_hook(_after_load)
        self._lay_side_by_side()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        probabilities: bool = False,
        adapters: Sequence[str] = (),
    ) -> tuple:
        """hidden_states: [B, L, dim]; attention_mask: bool (True attends) or additive, broadcast to [B, heads, L, L];
        head_mask: [heads] -> the same as hidden_states, and the probabilities or None"""
        x, mask = hidden_states, attention_mask

        def split(y: Tensor) -> Tensor:  # [B, L, dim] -> [B, heads, L, head_size], heads as many as were not cut
            return y.unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)

        def project(linear: nn.Linear) -> Tensor:
            y, more = linear(x), low_rank(linear, adapters, x)
            return split(y if more is None else y + more)

        q, k, v = project(self.q_lin), project(self.k_lin), project(self.v_lin)
        weights = None
        forward_mode = not torch.compiler.is_compiling() and forward_ad._current_level >= 0  # the fused one has none
        if probabilities or head_mask is not None or forward_mode or self.config._attn_implementation == "eager":
            scores = q @ k.mT * self.scaling
            if mask is not None:
                lowest = torch.finfo(scores.dtype).min
                scores = scores.masked_fill(~mask, lowest) if mask.dtype is torch.bool else scores + mask
            weights = self.dropout(scores.softmax(-1))  # [B, heads, L, L]
            if head_mask is not None:
                weights = weights * head_mask.to(weights.dtype)[:, None, None]
            context = weights @ v
        else:
            p = self.dropout.p if self.dropout.training else 0.0
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, scale=self.scaling)
        return self.out_lin(context.transpose(1, 2).flatten(2)), weights

    def packed(
        self,
        x: Tensor,
        at: Packing,
        head_scale: Tensor | None,
        only: Tensor | None = None,
        adapters: Sequence[str] = (),
    ) -> Tensor:
        """only: [n], the rows to answer for, by default all; every row is attended to. -> [rows or n, dim]"""
        qkv = self.project(x, at.live)  # [rows, 3 * dim]
        if adapters:
            self._add_low_rank(qkv, x, adapters)
        context = ops.attention(qkv, at.cu_seqlens, at.max_seqlen, self.n_heads, head_scale)  # [rows, dim]
        if only is not None:
            return apply_linear(self.out_lin, context[only], None)
        return apply_linear(self.out_lin, context, at.live)

    def _add_low_rank(self, qkv: Tensor, x: Tensor, adapters: Sequence[str]) -> None:  # [rows, 3 * dim], [rows, dim]
        for part, linear in zip(qkv.chunk(3, dim=1), (self.q_lin, self.k_lin, self.v_lin), strict=True):
            more = low_rank(linear, adapters, x)
            if more is not None:
                part += more.to(part.dtype)

    # q_lin, k_lin and v_lin stay three ordinary Linears whose weights happen to lie side by side in one buffer, so
    # that one GEMM can read them. Nothing is copied, so nothing can go stale.

    def project(self, x: Tensor, live: Tensor | None) -> Tensor:  # [rows, dim] -> [rows, 3 * dim]
        parts = (self.q_lin, self.k_lin, self.v_lin)
        if not all(map(is_plain, parts)):
            if all(is_plain(part, Int8Linear) for part in parts):
                return int8.apply(parts, x)  # type: ignore[arg-type]
            return torch.cat([part(x) for part in parts], dim=-1)
        if self._qkv is not None and type(x) is Tensor and not torch.compiler.is_compiling() and self._still_fits():
            return ops.qkv_projection(x, *self._qkv, live)
        if not torch.compiler.is_compiling() and len(x) <= self.dim:  # the weights are more to copy than the result
            return torch.cat([ops.linear(x, part.weight, part.bias, live) for part in parts], dim=-1)
        weight = torch.cat([part.weight for part in parts])
        return ops.qkv_projection(x, weight, torch.cat([part.bias for part in parts]), live)

    def _still_fits(self) -> bool:
        if (torch.is_grad_enabled() and self.q_lin.weight.requires_grad) or forward_ad._current_level >= 0:
            return False  # the buffer is outside autograd
        return self._lie_side_by_side()

    def _lie_side_by_side(self) -> bool:
        parts = self.q_lin, self.k_lin, self.v_lin
        if self._qkv is None or any(is_functorch_wrapped_tensor(t) for p in parts for t in (p.weight, p.bias)):
            return False
        return _are_thirds(self._qkv, *((p.weight, p.bias) for p in parts))

    def _lay_side_by_side_if_alone(self) -> None:
        """Unless they lie so already, or others hold their memory too: a state dict, another model, a flat buffer."""
        parts = (self.q_lin, self.k_lin, self.v_lin)
        if all(map(is_plain, parts)) and self._lie_side_by_side():
            return
        self._qkv = None
        tensors = [getattr(part, name, None) for part in parts for name in ("weight", "bias")]
        if all(isinstance(p, Tensor) and type(p.data) is Tensor and _is_alone(p) for p in tensors):
            self._lay_side_by_side()

    @torch.no_grad()
    def _lay_side_by_side(self) -> None:
        """Move the three weights (and biases) into one buffer, each keeping a storage of its own."""
        self._qkv = None
        parts = (self.q_lin, self.k_lin, self.v_lin)
        if not all(map(is_plain, parts)) or torch.compiler.is_compiling():
            return
        tensors = [p for part in parts for p in (part.weight, part.bias)]
        if (
            len({(t.dtype, t.device) for t in tensors}) > 1
            or any(type(t) is not nn.Parameter or type(t.data) is not Tensor for t in tensors)
            or tensors[0].device.type not in ("cpu", "cuda")
            or (tensors[0].device.type == "cpu" and any(t.is_shared() for t in tensors))  # shared with other processes
        ):
            return
        buffers = []
        device = tensors[0].device
        current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()  # from_dlpack wants it so
        # what is made in inference mode could not be trained afterwards
        with current, torch.inference_mode(any(t.is_inference() for t in tensors)):
            for name in ("weight", "bias"):
                own = [getattr(part, name).data for part in parts]
                buffer = own[0].new_empty(sum(map(len, own)), *own[0].shape[1:])
                for part, piece, values in zip(parts, buffer.chunk(3), own, strict=True):
                    cpu.copy_alone(piece, values)
                    getattr(part, name).data = torch.from_dlpack(piece)
                buffers.append(buffer)
        self._qkv = (buffers[0], buffers[1])

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        for linear in (self.q_lin, self.k_lin, self.v_lin):
            apply_to_merged(linear, fn)
        self._lay_side_by_side_if_alone()
        return self

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_qkv": None}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._lay_side_by_side()

    def __copy__(self) -> "MultiHeadSelfAttention":
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)  # they share their weights, which stay where they are
        return new


_use_count = getattr(torch._C, "_storage_Use_Count", None)


def _holders(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    return _use_count(storage._cdata) if _use_count is not None else 2**31


_ALONE = _holders(torch.empty(1))


def _is_alone(tensor: Tensor) -> bool:
    """Whether nothing else holds the tensor's memory."""
    if tensor.is_meta or tensor.layout is not torch.strided or not tensor.numel():
        return False
    return tensor.untyped_storage().nbytes() == tensor.nbytes and _holders(tensor) <= _ALONE


def _are_thirds(buffers: tuple[Tensor, Tensor], *parts: tuple[Tensor, Tensor]) -> bool:
    """Whether the parts, (weight, bias) each, are the buffers' memory, one after another."""
    for i, buffer in enumerate(buffers):
        start, step, size = buffer.data_ptr(), buffer.nbytes // 3, buffer.numel() // 3
        for part in parts:
            tensor = part[i]
            if tensor.data_ptr() != start or tensor.numel() != size or not tensor.is_contiguous():
                return False
            start += step
    return True


def _before_load(embeddings: Embeddings, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    state_dict.pop(prefix + "position_ids", None)  # a buffer of older checkpoints


def _refuse_int8(block: nn.Module, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Weights of an int8 model, which torch would cast and load without their scales."""
    for name, own in block.named_parameters():
        given = state_dict.get(prefix + name)
        if isinstance(given, Tensor) and given.dtype is torch.int8 and own.dtype is not torch.int8:
            del state_dict[prefix + name]  # so that the model keeps its own
            rest[-1].append(
                f"{prefix}{name} is of an int8 model, this one's is {own.dtype}; load the file that was saved"
            )


def _after_load(attention: MultiHeadSelfAttention, incompatible_keys: Any) -> None:  # a closure could not be pickled
    for linear in (attention.q_lin, attention.k_lin, attention.v_lin):
        if "_unmerged" in linear.__dict__ and not is_merged(linear):  # other weights: there is nothing to undo
            del linear.__dict__["_unmerged"]
    attention._lay_side_by_side_if_alone()


class FFN(nn.Module):
    def __init__(self, config: DistilBertConfig):
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.lin1 = nn.Linear(config.dim, config.hidden_dim)
        self.lin2 = nn.Linear(config.hidden_dim, config.dim)
        self.activation = ACTIVATIONS[ACTIVATION_ALIASES[config.activation]]()

    def forward(self, input: Tensor) -> Tensor:  # [B, L, dim] -> [B, L, dim]
        return self.dropout(self.lin2(self.activation(self.lin1(input))))

    def packed(self, x: Tensor, live: Tensor | None) -> Tensor:  # [rows, dim] -> [rows, dim]
        activation = activation_of(self.activation)
        if activation is not None and is_plain(self.lin1):
            x = ops.bias_gelu(x, self.lin1.weight, self.lin1.bias, activation, live)  # [rows, hidden_dim]
        elif activation is not None and is_plain(self.lin1, Int8Linear):
            x = int8.apply([self.lin1], x, activation)  # type: ignore[list-item]
        else:
            x = self.activation(self.lin1(x))
        return apply_linear(self.lin2, x, live)


def _attends_whole(attention: Any) -> bool:
    """Whether its heads are as many and as wide as it was made with, and scores are scaled as usual."""
    size, queries = attention.attention_head_size, attention._modules["q_lin"]
    wide = getattr(queries, "out_features", attention.dim) == attention.dim == attention.n_heads * size
    return wide and attention.scaling == size**-0.5


def _given(**options: Any) -> dict[str, Any]:
    """Of a part's keywords those that ask for something: a user's own part need not know the others."""
    return {name: value for name, value in options.items() if isinstance(value, Tensor) or value}


class TransformerBlock(nn.Module):
    def __init__(self, config: DistilBertConfig):
        super().__init__()
        self.attention = MultiHeadSelfAttention(config)
        self.sa_layer_norm = nn.LayerNorm(config.dim, eps=config.layer_norm_eps)
        self.ffn = FFN(config)
        self.output_layer_norm = nn.LayerNorm(config.dim, eps=config.layer_norm_eps)
        self.attention_adapters: Adapters | None = None
        self.output_adapters: Adapters | None = None
        self.register_load_state_dict_pre_hook(_refuse_int8)

    def is_plain(self) -> bool:
        attention, ffn = self._modules["attention"], self._modules["ffn"]
        return (
            _is_ours(self, TransformerBlock)
            and _is_ours(attention, MultiHeadSelfAttention)
            and _is_ours(ffn, FFN)
            and _is_off(attention._modules["dropout"])  # type: ignore[union-attr]
            and _is_off(ffn._modules["dropout"])  # type: ignore[union-attr]
            and _attends_whole(attention)
            and _is_elementwise(ffn.activation)  # type: ignore[union-attr]
            and all(acts_on_rows(part) for part in self.leaves())
        )

    def leaves(self) -> list[Any]:
        own: Any = self._modules
        attention, ffn = own["attention"]._modules, own["ffn"]._modules
        return [
            *(attention.get(name) for name in ("q_lin", "k_lin", "v_lin", "out_lin")),
            *(ffn.get(name) for name in ("lin1", "lin2")),
            *(own.get(name) for name in ("sa_layer_norm", "output_layer_norm")),
        ]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        probabilities: list[Tensor] | None = None,
        adapters: Sequence[str] = (),
    ) -> Tensor:
        """hidden_states: [B, L, dim] -> the same; `probabilities` gets the attention's, [B, heads, L, L]"""
        x = hidden_states
        more = _given(head_mask=head_mask, probabilities=probabilities is not None, adapters=adapters)
        context, weights = self.attention(x, attention_mask=attention_mask, **more)
        if probabilities is not None and weights is not None:
            probabilities.append(weights)
        if adapters:
            x = self._through(adapters, context, x, self.ffn, None)
        else:
            x = self.sa_layer_norm(context + x)  # [B, L, dim]
            x = self.output_layer_norm(self.ffn(x) + x)
        return x

    def packed(
        self,
        x: Tensor,
        at: Packing,
        head_scale: Tensor | None = None,
        only: Tensor | None = None,
        adapters: Sequence[str] = (),
    ) -> Tensor:
        """x: [rows, dim] -> [rows, dim], or of the rows in `only` [n] -> [n, dim]"""
        if at.starts is not None and not adapters and head_scale is None and type(x) is Tensor:
            leaves = self._leaves(x)
            if leaves is not None:
                return self._unseen(x, at.starts, only, leaves)
        context = self.attention.packed(x, at, head_scale, only, adapters)
        x, live = (x, at.live) if only is None else (x[only], None)
        if adapters:
            return self._through(adapters, context, x, lambda x: self.ffn.packed(x, live), live)
        x = apply_add_norm(self.sa_layer_norm, context, x, live)
        return apply_add_norm(self.output_layer_norm, self.ffn.packed(x, live), x, live)

    def _leaves(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], ...] | None:
        """(weight, bias) of what `_unseen` computes with; None where a part is not just ours, or the ops' to refuse."""
        own: Any = self._modules
        attention, ffn = own["attention"], own["ffn"]
        dtype, dim, of_attention, of_ffn = x.dtype, x.shape[1], attention._modules, ffn._modules
        names = ("q_lin", "k_lin", "v_lin", "out_lin")
        q, k, v, out = (_leaf(of_attention.get(name), nn.Linear, dtype) for name in names)
        lin1, lin2 = (_leaf(of_ffn.get(name), nn.Linear, dtype) for name in ("lin1", "lin2"))
        norms = own.get("sa_layer_norm"), own.get("output_layer_norm")
        norm, last = (_leaf(one, nn.LayerNorm, dtype) for one in norms)
        if not (q and k and v and out and norm and lin1 and lin2 and last and attention._qkv):
            return None
        hidden = lin1[1].numel()
        fits = all(_is_of(leaf, dim, dim) for leaf in (q, k, v, out)) and _is_of(lin1, hidden, dim)
        fits = fits and _is_of(lin2, dim, hidden) and _is_of(norm, dim) and _is_of(last, dim)
        fits = fits and attention.n_heads * attention.attention_head_size == dim
        fits = fits and type(norms[0].eps) is type(norms[1].eps) is float and bool(activation_of(ffn.activation))
        return (attention._qkv, out, norm, lin1, lin2, last) if fits and _are_thirds(attention._qkv, q, k, v) else None

    def _unseen(
        self, x: Tensor, starts: list[int], only: Tensor | None, leaves: tuple[tuple[Tensor, Tensor], ...]
    ) -> Tensor:
        """`packed` by the ops' CPU forms as they are: of one text's time their checks and dispatch are a good part."""
        own: Any = self._modules
        (w_qkv, b_qkv), (w_out, b_out), (w_norm, b_norm), (w_1, b_1), (w_2, b_2), (w_last, b_last) = leaves
        context = cpu.attend(cpu.linear(x, w_qkv, b_qkv), starts, own["attention"].n_heads)  # [rows, dim]
        if only is not None:
            context, x = context[only], x[only]
        x = cpu.add_layer_norm(cpu.linear(context, w_out, b_out), x, w_norm, b_norm, own["sa_layer_norm"].eps)
        activation: Any = activation_of(own["ffn"].activation)
        hidden = cpu.bias_gelu(x, w_1, b_1, activation)  # [rows, hidden_dim]
        return cpu.add_layer_norm(cpu.linear(hidden, w_2, b_2), x, w_last, b_last, own["output_layer_norm"].eps)

    def _through(
        self, adapters: Sequence[str], context: Tensor, x: Tensor, ffn: Callable, live: Tensor | None
    ) -> Tensor:
        """The block from its attention on, with adapters; context, x: [..., dim]"""

        def add_norm(norm: nn.LayerNorm) -> Callable[[Tensor, Tensor], Tensor]:
            packed = x.dim() == 2
            return lambda y, residual: apply_add_norm(norm, y, residual, live) if packed else norm(y + residual)

        x = add_norm_through(self.attention_adapters, adapters, context, x, add_norm(self.sa_layer_norm), live)
        return add_norm_through(self.output_adapters, adapters, ffn(x), x, add_norm(self.output_layer_norm), live)


def _call(
    block: nn.Module, adapters: Sequence[str], probabilities: bool, x: Tensor, mask: Tensor | None, heads: Tensor | None
) -> tuple:
    """-> [B, L, dim], and the attention's probabilities where they are wanted and told"""
    weights: list[Tensor] = []
    more = _given(head_mask=heads, adapters=adapters) | ({"probabilities": weights} if probabilities else {})
    return (block(x, mask, **more), *weights)


def _shown(x: Tensor, padded: Tensor | None) -> tuple[Tensor, Tensor]:
    """-> (x with zeros at padding, x as it was, of which real positions come by way of the first, for its gradient)"""
    if padded is None:
        return x, x
    shown = x.masked_fill(padded, 0)
    return shown, torch.where(padded, x, shown)


class Transformer(nn.Module):
    checkpointing_step, checkpoints_on_host = 1, False  # see gradient_checkpointing_enable

    def __init__(self, config: DistilBertConfig):
        super().__init__()
        self.layer = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.gradient_checkpointing = False
        self.checkpointing_options: dict[str, Any] = {}

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        probabilities: bool = False,
        adapters: Sequence[str] = (),
        padded: Tensor | None = None,
    ) -> BaseModelOutput:
        """hidden_states: [B, L, dim]. attention_mask: 4-D, see `_masks`. padded: bool [B, L, 1], where the states that
        are told are 0. -> the last block's, as hidden_states the input's and each block's, and with `probabilities`
        each one's attention"""
        mask, (shown, x) = attention_mask, _shown(hidden_states, padded)
        states, attentions = [shown], []
        block: Any
        for i, block in enumerate(self.layer):
            heads = None if head_mask is None else head_mask[i]
            call = partial(_call, block, adapters, probabilities)
            if self.gradient_checkpointing and self.training and i % self.checkpointing_step == 0:
                how = {"use_reentrant": False} | self.checkpointing_options
                with save_on_cpu(pin_memory=x.is_cuda) if self.checkpoints_on_host else nullcontext():
                    x, *weights = recompute(call, x, mask, heads, **how)
            else:
                x, *weights = call(x, mask, heads)
            attentions += weights
            shown, x = _shown(x, padded)
            states.append(shown)
        return BaseModelOutput(shown, tuple(states), tuple(attentions) or None)

    def packed(
        self,
        x: Tensor,
        at: Packing,
        head_mask: Tensor | None,
        every: bool,
        only: Tensor | None = None,
        adapters: Sequence[str] = (),
    ) -> list[Tensor]:
        """x: [rows, dim] -> the last block's rows, all or `only` [n]; with `every` the input's and each block's"""
        states = [x]
        block: Any
        for i, block in enumerate(self.layer):
            last = i == len(self.layer) - 1
            x = block.packed(x, at, None if head_mask is None else head_mask[i], only if last else None, adapters)
            states.append(x)
            if not every:
                states = [x]
        return states if self.layer or only is None else [x[only]]


class PreTrainedModel(WithAdapters):
    """What every DistilBERT model shares: checkpoints, initial weights, embeddings' sizes, gradient checkpointing."""

    config_class = DistilBertConfig
    base_model_prefix = "distilbert"
    main_input_name = "input_ids"
    name_or_path = ""  # of the checkpoint, for tools that write down where a model came from

    def __init__(self, config: DistilBertConfig):
        super().__init__()
        if not isinstance(config, DistilBertConfig):
            raise TypeError(f"config must be a fastdistil.DistilBertConfig, got {type(config).__name__}")
        config._validate()
        self.config = config

    # --- weights ------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: Any,
        *,
        config: DistilBertConfig | None = None,
        dtype: str | torch.dtype | None = "auto",
        device: str | torch.device | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        use_safetensors: bool | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        state_dict: dict[str, Tensor] | None = None,
        torch_dtype: str | torch.dtype | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        low_cpu_mem_usage: bool | None = None,
        **overrides: Any,
    ) -> Any:
        """Load a DistilBERT or BERT checkpoint from a directory or a hub id, in eval mode.

        dtype: "auto" is the checkpoint's own; else a torch dtype or its name, or "int8" for inference on CPU: the
        encoder's linear layers in int8, the rest in float32. A local directory is read without any network access.
        use_safetensors=False reads pytorch_model.bin (with weights_only=True) instead.
        output_loading_info: also return a dictionary of missing_keys, unexpected_keys and mismatched_keys.
        cache_dir and token are the hub's. device_map: one device, or "auto". attn_implementation: see
        `set_attn_implementation`. low_cpu_mem_usage and what else transformers' callers pass to its loader
        (trust_remote_code, an empty variant) mean nothing here.
        Other keywords override the configuration. BERT checkpoints convert exactly for a single segment: the vector of
        token type 0 is added to every position. Raises OSError for files, ValueError for what is in them, TypeError for
        a keyword that is none of the configuration's.
        """
        overrides = {k: v for k, v in overrides.items() if k not in _IGNORED and not (k in _ABSENT and not v)}
        if device is None and device_map is not None:
            device = one_device(device_map)
        if config is not None and not isinstance(config, DistilBertConfig):
            raise TypeError(f"config must be a fastdistil.DistilBertConfig, got {type(config).__name__}")
        if path_or_repo is None and state_dict is not None and config is not None:
            directory, config = None, copy.deepcopy(config).updated(overrides)
        else:
            extra = ("pytorch_model*.bin", "pytorch_model.bin.index.json") if use_safetensors is False else ()
            directory = find(
                path_or_repo,
                revision=revision,
                local_files_only=local_files_only,
                extra_files=extra,
                cache_dir=cache_dir,
                token=token,
            )
            config = read_config(directory, **overrides) if config is None else copy.deepcopy(config).updated(overrides)
        config = cls._for_checkpoint(config)
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation
        if state_dict is not None:
            weights = Weights.from_tensors(state_dict)
        else:
            assert directory is not None
            weights = Weights(directory, use_safetensors)
        with weights:
            with torch.device("meta"), _WithoutInit():
                model = cls(config)
            wanted = torch_dtype if torch_dtype is not None else dtype
            if to_int8 := wanted in ("int8", "torch.int8", torch.int8):
                wanted = "float32"
                if as_device("cpu" if device is None else device).type != "cpu":
                    raise ValueError(f"dtype int8 is for CPU, not for {device}; use float16 there")
            model = model.to(_dtype(wanted, config, weights))
            model.__dict__["_load_device"] = as_device("cpu" if device is None else device)
            report = load_weights(model, weights, ignore_mismatched_sizes=ignore_mismatched_sizes)
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.name_or_path = "" if path_or_repo is None else str(path_or_repo)
        for one in {model, model.base_model}:
            one.name_or_path = model.config.name_or_path
        if to_int8:
            if model.adapters_config:
                raise ValueError("dtype int8 takes no adapters; use float32, or save the model with one merged")
            int8.convert(model, model.base_model.transformer.layer)
        model.eval()
        return (model, report.as_dict()) if output_loading_info else model

    @classmethod
    def _for_checkpoint(cls, config: DistilBertConfig) -> DistilBertConfig:
        """The configuration to build a model from that a checkpoint with `config` is to fill."""
        return config

    def renamed(self, name: str) -> str:
        """What a checkpoint's parameter is called here."""
        return name

    def materialize(self, fresh: set[str], untied: set[str]) -> None:
        """Allocate a model built on the meta device and give initial values to the parameters named in `fresh`."""
        device = self.__dict__.pop("_load_device", "cpu")
        # not to_empty, whose empty_like of a meta tensor imports sympy: half a second
        self._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))
        self.tie_weights(untied)
        # in the modules' order, and none whose weight the checkpoint has: one seed gives one model in both libraries
        for prefix, module in self.named_modules():
            own = chain(module.named_parameters(prefix, recurse=False), module.named_buffers(prefix, recurse=False))
            missing = [name for name, _ in own if name in fresh]
            if missing and isinstance(module, nn.Linear) and all(name.endswith(".bias") for name in missing):
                nn.init.zeros_(module.bias)
            elif missing:
                if not isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm, LoRA, Embeddings)):
                    _reset(module)
                self._draw(module)
                if type(self)._init_weights is not PreTrainedModel._init_weights:  # a user's own rule has the last word
                    module.__dict__.pop("_is_hf_initialized", None)
                    self._init_weights(module)
        for module in self.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]
        if any(name.endswith("position_embeddings.weight") for name in fresh):
            self._draw(next(m for m in self.modules() if isinstance(m, Embeddings)))

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        save_function: Callable | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        token: str | bool | None = None,
        save_peft_format: bool = True,
        save_original_format: bool = True,
        *,
        safe_serialization: bool = True,
    ) -> None:
        """Write config.json and model.safetensors, or shards of at most max_shard_size with their index; nothing unless
        is_main_process. state_dict: tensors gathered elsewhere, in place of the model's own. safe_serialization is
        always on; save_function, token and the save_..._format are for transformers' callers and mean nothing here."""
        if push_to_hub or variant:
            what = "push_to_hub=True" if push_to_hub else f"variant={variant!r}"
            raise ValueError(f"{what} is not supported; save into a directory and upload it with huggingface_hub")
        if not safe_serialization:
            raise ValueError("safe_serialization=False asks for a pickle; only safetensors are written")
        if not is_main_process:
            return
        if self.precision == "int8":
            raise ValueError("the weights were rounded to int8 and cannot be saved; save the model they came from")
        self.config.architectures = [type(self).__name__]
        self.config.dtype = str(self.dtype).removeprefix("torch.")
        config, merged = copy.deepcopy(self.config), self._merged_adapter()
        if config.layer_norm_eps != type(config)().layer_norm_eps:
            logger.warning(
                "transformers computes a DistilBERT with layer_norm_eps 1e-12, not %s", config.layer_norm_eps
            )
        adapters = self._adapters_in_file()
        config.__dict__.pop("adapters", None)
        if adapters is not None:
            config.adapters = adapters
        if merged is not None:
            logger.warning(
                "adapter %r is merged: the weights are saved with it, and it is not saved beside them", merged
            )
        kept = (lambda name: True) if merged is None else (lambda name: f".loras.{merged}." not in name)
        save(self, Path(save_directory), config, kept, max_shard_size=max_shard_size, state_dict=state_dict)

    def post_init(self) -> None:
        """Initial values in transformers' order, so that one seed gives one model in both libraries; what has its own,
        from a checkpoint or drawn before, keeps them."""
        if self.device.type != "meta":
            self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """`_draw`, once a module: the mark is transformers', whose loaders and modules heed it, too."""
        if not module.__dict__.get("_is_hf_initialized"):
            self._draw(module)
            module._is_hf_initialized = True  # type: ignore[assignment]

    @torch.no_grad()
    def _draw(self, module: nn.Module) -> None:
        std = self.config.initializer_range or 0.02
        if isinstance(module, nn.Linear):
            module.weight.normal_(0, std)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0, std)
            if module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
        elif isinstance(module, nn.LayerNorm):
            if module.weight is not None:
                module.weight.fill_(1)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, LoRA):
            module.reset()
        elif isinstance(module, Embeddings) and self.config.sinusoidal_pos_embds:
            table = module.position_embeddings.weight
            table.copy_(sinusoidal_positions(*table.shape))

    # --- size and place -----------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self._one_weight().device

    @property
    def dtype(self) -> torch.dtype:
        return self._one_weight().dtype

    def _one_weight(self) -> Tensor:
        """A floating-point parameter; of replicas, whose weights are attributes, the word embeddings."""
        found = next((p for p in self.parameters() if p.is_floating_point()), None)
        return self.get_input_embeddings().weight if found is None else found

    @property
    def precision(self) -> str:
        """The dtype's name, or "int8" where the linear layers are."""
        if any(isinstance(m, Int8Linear) for m in self.modules()):
            return "int8"
        return str(self.dtype).removeprefix("torch.")

    @property
    def base_model(self) -> Any:
        return getattr(self, self.base_model_prefix, self)

    @classmethod
    def from_config(cls, config: DistilBertConfig) -> Any:
        """A model with initial weights."""
        return cls(config)

    _from_config = from_config

    def init_weights(self) -> None:
        """Give initial values to what has none yet, as `post_init` does; what was loaded stays."""
        if self.device.type != "meta":
            self.apply(self._init_weights)
        self.tie_weights()

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of parameters, and of buffers."""
        held = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nbytes for tensor in held)

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[7, 6, 0, 0, 1], [1, 2, 3, 0, 0], [0, 0, 0, 4, 5]], device=self.device)}

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """ "eager": a gradient's way computes attention step by step, as derivatives of second order need; else nothing
        changes."""
        self.config._attn_implementation = attn_implementation

    def enable_input_require_grads(self) -> None:
        """Let the word embeddings' result require a gradient, as training adapters under checkpointing needs."""
        words = self.get_input_embeddings()
        self.disable_input_require_grads()
        self.__dict__["_grads_hook"] = words.register_forward_hook(lambda module, args, out: out.requires_grad_(True))

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        hook = self.__dict__.pop("_grads_hook", None)
        if hook is not None:
            hook.remove()

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        skip = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)} if exclude_embeddings else set()
        found = sum(
            p.numel() for p in self.parameters() if id(p) not in skip and (p.requires_grad or not only_trainable)
        )
        rounded = () if only_trainable else (m for m in self.modules() if type(m) is Int8Linear)
        return found + sum(m.weight.numel() + m.bias.numel() for m in rounded)

    # --- embeddings ---------------------------------------------------------------------------------------------

    @property
    def _embeddings(self) -> Any:
        return self.base_model.embeddings

    def get_input_embeddings(self) -> nn.Embedding:
        return self._embeddings.word_embeddings

    def set_input_embeddings(self, embeddings: nn.Embedding) -> None:
        self._embeddings.word_embeddings = embeddings

    def get_output_embeddings(self) -> nn.Module | None:
        return None

    def tie_weights(self, but: Collection[str] = ()) -> None:
        """Share what the configuration says is shared, but for the named; only a masked-LM head shares anything."""

    def get_position_embeddings(self) -> nn.Embedding:
        return self._embeddings.position_embeddings

    @torch.no_grad()
    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Grow or cut the vocabulary in place and return the embedding, the same module as before.

        New rows are drawn around the old rows' mean (covariance scaled by 1e-9), or with mean_resizing=False like
        initial weights. The optimizer must be made anew, since the parameter is a new one unless the size stays.
        """
        words = self.get_input_embeddings()
        old = words.weight
        if new_num_tokens is None and pad_to_multiple_of is None:
            return words
        for name, value in (("new_num_tokens", new_num_tokens), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name} must be an integer, got {value!r}")
        n = len(old) if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            if pad_to_multiple_of < 1:
                raise ValueError(f"pad_to_multiple_of is {pad_to_multiple_of}; it must be 1 or more")
            n = -(-n // pad_to_multiple_of) * pad_to_multiple_of
        if not 1 <= n <= LIMITS["vocab_size"]:
            raise ValueError(f"new_num_tokens is {n}; a vocabulary has from 1 to {LIMITS['vocab_size']} tokens")
        if n == len(old):
            self.config.vocab_size = n
            return words
        new = old.new_empty(n, old.shape[1]).normal_(0, self.config.initializer_range or 0.02)
        if n > len(old) and mean_resizing:
            new[len(old) :] = mean_rows(old, n - len(old))
        new[: len(old)] = old[:n]
        words.weight = nn.Parameter(new, requires_grad=old.requires_grad)
        words.num_embeddings = self.config.vocab_size = n
        if words.padding_idx is not None and words.padding_idx >= n:
            words.padding_idx = None
        return words

    @torch.no_grad()
    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """Change the longest input, in tokens. Learned positions keep their rows and get initial values for new ones;
        sinusoidal ones are computed."""
        n = new_num_position_embeddings
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"new_num_position_embeddings must be an integer, got {n!r}")
        if not 1 <= n <= LIMITS["max_position_embeddings"]:
            most = LIMITS["max_position_embeddings"]
            raise ValueError(f"new_num_position_embeddings is {n}; it must be from 1 to {most}")
        positions = self.get_position_embeddings()
        old = positions.weight
        if n == len(old):
            return
        if self.config.sinusoidal_pos_embds:
            new = sinusoidal_positions(n, old.shape[1]).to(old)
        else:
            new = old.new_empty(n, old.shape[1]).normal_(0, self.config.initializer_range or 0.02)
            if getattr(self.config, "token_types_folded", False):
                new += old.mean(0)  # above all the token type's vector, which is part of each row
            new[: len(old)] = old[:n]
        positions.weight = nn.Parameter(new, requires_grad=old.requires_grad)
        positions.num_embeddings = self.config.max_position_embeddings = n

    # --- gradient checkpointing ---------------------------------------------------------------------------------

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute each block, or each n-th, in the backward pass instead of keeping its activations; only in training
        mode. offload: what is kept for that lies in the host's memory. The keywords go to torch's checkpoint."""
        if isinstance(every_n_layers, bool) or not isinstance(every_n_layers, int) or every_n_layers < 1:
            raise ValueError(f"every_n_layers is {every_n_layers!r}; it must be an integer from 1 on")
        transformer = self.base_model.transformer
        transformer.gradient_checkpointing, transformer.checkpointing_step = True, every_n_layers
        transformer.checkpoints_on_host = bool(offload)
        transformer.checkpointing_options = dict(gradient_checkpointing_kwargs or {})

    def gradient_checkpointing_disable(self) -> None:
        self.base_model.transformer.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.base_model.transformer.gradient_checkpointing


class Inputs(NamedTuple):
    """A padded batch, checked. Of ids and embeds there is one, of keep and mask at most one."""

    ids: Tensor | None  # integers [B, L]
    embeds: Tensor | None  # [B, L, dim], in place of the word embeddings
    keep: Tensor | None  # bool [B, L], True at real tokens
    mask: Tensor | None  # [B, 1 or heads, L, L], bool (True attends) or additive
    positions: Tensor  # integers [1 or B, L]
    heads: Tensor | None = None  # [layers, heads], what each head's attention is multiplied by
    adapters: Sequence[str] = ()


@dataclass(frozen=True)
class Encoded:
    """What an encoder hands to a head.

    hidden: [rows, dim], packed as `at` tells; where at is None, padded [batch, length, dim], or [n, dim] of the tokens
    asked for. states, attentions: as in BaseModelOutput.
    """

    hidden: Tensor
    at: Packing | None
    states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


_asked = threading.local()  # the encoder whose padding a head reads, below a forward that cannot be told so


@contextmanager
def padding_asked(encoder: nn.Module) -> Iterator[None]:
    """Calls of the DistilBertModel in an encoder of somebody's own are with padding_too."""
    _asked.encoder = next((m for m in encoder.modules() if isinstance(m, DistilBertModel)), None)
    try:
        yield
    finally:
        _asked.encoder = None


class DistilBertModel(PreTrainedModel):
    """The DistilBERT encoder (Sanh et al., 2019, arXiv:1910.01108), equal to HF's `DistilBertModel` at real positions.

    Run it under `torch.inference_mode()` (or `no_grad`): then padding is dropped and the fused ops run. Where a
    gradient could be asked for, the differentiable dense path runs instead.
    """

    _graphs: graphs.Graphs | None = None

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()
        replica.__dict__["_graphs"] = None  # which read the original's weights
        return replica

    def __init__(self, config: DistilBertConfig):
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.transformer = Transformer(config)
        self.post_init()
        self._build_adapters()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        adapter_names: str | Sequence[str] | None = None,
        padding_too: bool = False,
    ) -> BaseModelOutput | tuple:
        """Hidden states of a padded batch; exactly 0 at padded positions, or with padding_too transformers'.

        input_ids: integers [B, L]; or inputs_embeds: [B, L, dim] in place of the word embeddings. attention_mask:
        [B, L] or [1, L] of any dtype, nonzero at real tokens, wherever they lie; or [B, 1 or heads, L, L], bool (True
        attends) or additive. head_mask: [heads] or [layers, heads], multiplies each head's attention. position_ids:
        [L], [1, L] or [B, L], by default the column. token_type_ids are accepted for BERT's callers.
        output_attentions and output_hidden_states add `attentions` and `hidden_states`. adapter_names: adapters to go
        through, [] for none, by default the active ones. Raises ValueError.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        encoded = self.encode(
            input_ids,
            attention_mask,
            head_mask,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            position_ids,
            token_type_ids,
            adapter_names=adapter_names,
            padding_too=padding_too,
        )
        hidden = encoded.hidden if encoded.at is None else encoded.at.unpack(encoded.hidden)
        out = BaseModelOutput(hidden, encoded.states, encoded.attentions)
        return out if return_dict else out.to_tuple()

    def encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        only: Tensor | str | None = None,
        adapter_names: str | Sequence[str] | None = None,
        padding_too: bool = False,
    ) -> "Encoded":
        """`forward` for heads: the last hidden states stay packed where they are.

        only: "first", the first token of each sequence, or int64 [n, 2], the (row, column) of chosen tokens; then the
        last block answers for these alone. padding_too: `hidden` is padded, with what transformers has at padded
        positions, which some losses read.
        """
        config = self.config
        padding_too = padding_too or (not torch.compiler.is_compiling() and getattr(_asked, "encoder", None) is self)
        if input_ids is None and inputs_embeds is None and isinstance(head_mask, Tensor) and head_mask.dim() == 3:
            head_mask, inputs_embeds = None, head_mask  # which come third in transformers 5
        want_attentions = bool(config.output_attentions if output_attentions is None else output_attentions)
        want_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        more = head_mask is not None or inputs_embeds is not None or position_ids is not None
        if self._graphs is not None and not (more or want_attentions or want_states or padding_too):
            replayed = self._replayed(input_ids, attention_mask, token_type_ids, adapter_names, only)
            if replayed is not None:
                return Encoded(replayed, None, None, None)
            if not torch.compiler.is_compiling():
                self._graphs.forget_if_stale()
        given = self._checked(
            *(input_ids, attention_mask, head_mask, inputs_embeds, position_ids, token_type_ids, adapter_names)
        )
        keep = given.keep
        if isinstance(only, Tensor):
            _check_only(only, *_shape(given), given.positions.device)
        if padding_too or want_attentions or self._needs_dense(given):
            zeroed = bool(want_states) and not padding_too
            states, weights = self._dense(given, want_attentions, padding_too, zeroed)  # n_layers + 1 times [B, L, dim]
            if keep is not None and not padding_too and not want_states:
                states = [states[-1].masked_fill(~keep.unsqueeze(-1), 0)]
            hidden = pick(states[-1], keep, only)  # [B, L, dim], or [n, dim] of only
            shown = tuple(states) if want_states else None
            return Encoded(hidden, None, shown, tuple(weights) if want_attentions else None)
        if want_states:
            at, states = self._packed(given, every=True)  # n_layers + 1 times [rows, dim]
            states = [at.unpack(x) for x in states]
            return Encoded(pick(states[-1], keep, only), None, tuple(states), None)
        at, states = self._packed(given, only=only)
        return Encoded(states[-1], at if only is None else None, None, None)

    def _dense(
        self, given: Inputs, want_attentions: bool = False, padding_too: bool = False, zeroed: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """-> hidden states n_layers + 1 times [B, L, dim], and attentions. At padded positions they are transformers'
        with padding_too, 0 with zeroed, and else mean nothing."""
        ids, embeds, keep, mask, positions, heads, adapters = given
        if ids is not None and keep is not None:  # what lies in the padding need not be in the vocabulary
            looked_up = keep
            if padding_too:
                words = getattr(self.embeddings, "word_embeddings", None)
                size = _rows_of(words) if isinstance(words, nn.Embedding) else self.config.vocab_size
                looked_up = keep | ((ids >= 0) & (ids < size))
            ids = ids.where(looked_up, 0)
        elif embeds is not None and keep is not None and not padding_too:
            embeds = embeds.masked_fill(~keep.unsqueeze(-1), 0)
        x = self.embeddings(ids, embeds, positions)  # [B, L, dim]
        if keep is not None:  # a row without a real token attends to everything, and is zeroed with the padding
            mask = (keep | ~keep.any(-1, keepdim=True))[:, None, None]  # [B, 1, 1, L]
        padded = ~keep.unsqueeze(-1) if zeroed and keep is not None else None  # [B, L, 1]
        more = _given(head_mask=heads, probabilities=want_attentions, adapters=adapters)
        if ours := type(self.transformer) is Transformer:
            more["padded"] = padded
        out = self.transformer(hidden_states=x, attention_mask=mask, **more)
        *states, _ = getattr(out, "hidden_states", None) or (x, x)  # somebody's own may tell its last states alone
        states.append(out if isinstance(out, Tensor) else out[0])
        if padded is not None and not ours:
            states = [state.masked_fill(padded, 0) for state in states]
        return states, list(getattr(out, "attentions", None) or ())

    def _packed(
        self, given: Inputs, every: bool = False, only: Tensor | str | None = None
    ) -> tuple[Packing, list[Tensor]]:
        """-> the last hidden states [rows, dim], or with `every` the embeddings' and each block's, or those of the
        tokens in `only` [n, dim]"""
        ids, embeds, keep, _, positions, heads, adapters = given
        batch, length = _shape(given)
        at, row_ids, row_positions = find_tokens(keep, batch, length, positions.device, ids, positions)
        table = self.embeddings.word_embeddings.weight if embeds is None else embeds.reshape(batch * length, -1)
        if embeds is not None:  # the caller's own table, whose row is the padded position
            row_ids = torch.arange(batch * length, device=embeds.device) if at.source is None else at.source
        assert row_ids is not None and row_positions is not None
        x = self.embeddings.packed(table, row_ids, row_positions, at.live)  # [rows, dim]
        if only is None:
            return at, self.transformer.packed(x, at, heads, every, adapters=adapters)
        if x.shape[0] == 0:  # nothing is real; len() would fix the size in an export
            return at, [x.new_zeros(batch if isinstance(only, str) else len(only), x.shape[1])]
        flat, outside = (None, None) if isinstance(only, str) else _flat(only, batch, length)
        rows, there = at.first() if flat is None else at.find(flat)
        chosen = self.transformer.packed(x, at, heads, every, rows, adapters)[-1]  # [n, dim]
        chosen = chosen if there is None else chosen.masked_fill(~there[:, None], 0)
        return at, [chosen if outside is None else chosen.masked_fill(outside[:, None], torch.nan)]

    def cuda_graphs(self, on: bool = True, most: int = 64) -> "DistilBertModel":
        """Replay captured CUDA graphs in `forward`, which saves its launches; returns the model.

        A graph is captured when a batch of its size comes first, sizes rounded up (batch to a power of two, length to a
        multiple of 32), at most `most` of them. Everything else runs as before by itself: CPU, large batches, given
        positions, head masks or embeddings, hidden states, attentions, gradients, autocast, modules that are not the
        model's own, hooks. Changed weights are noticed at the next call (`to` and the like at once); until then the
        memory of the old ones stays in use. A capture frees cuBLAS's workspaces of the whole process, which graphs that
        were captured by other means may still use.
        """
        self.__dict__["_graphs"] = graphs.Graphs(most) if on else None
        return self

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        if self._graphs is not None:
            self._graphs.forget_if_stale()
        return self

    def _replayed(
        self,
        input_ids: Tensor | None,
        mask: Tensor | None,
        token_type_ids: Tensor | None,
        adapter_names: str | Sequence[str] | None,
        only: Tensor | str | None,
    ) -> Tensor | None:
        """What `encode` gives, by a graph, or None where none serves. Here only what a launch needs is looked at; the
        rest is checked while the device computes."""
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.numel() == 0:
            return None
        if input_ids.dtype not in INTEGERS or input_ids.layout is not torch.strided:
            return None
        device, places = input_ids.device, input_ids.shape
        if self.training or self._adapters(adapter_names) or is_transformed() or not graphs.can_capture(device):
            return None
        if torch.jit.is_tracing():
            return None
        if torch.is_autocast_enabled(device.type):
            return None  # it frees the weights it has cast, which a graph would go on reading
        if mask is not None and (
            not isinstance(mask, Tensor)
            or mask.shape not in (places, (1, places[1]))
            or mask.device != device
            or mask.layout is not torch.strided
        ):
            return None
        assert self._graphs is not None
        keep: Tensor | None = None

        def check() -> bool:
            nonlocal keep
            given = self._checked(input_ids, mask, None, None, None, token_type_ids, ())
            keep = given.keep
            if isinstance(only, Tensor):
                _check_only(only, places[0], places[1], device)
            return not self._is_trained(given)

        first = isinstance(only, str)

        def forward(ids: Tensor, keep: Tensor, positions: Tensor) -> Tensor:
            at, (hidden,) = self._packed(Inputs(ids, None, keep, None, positions), only="first" if first else None)
            return hidden if first else at.unpack(hidden)

        longest, fixed = self.config.max_position_embeddings, (*ops.launch_modes(), first)
        hidden = self._graphs(self, forward, input_ids, mask, longest, fixed, check, self._can_pack)
        return hidden if hidden is None or first else pick(hidden, keep, only)

    def forward_packed(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        position_ids: Tensor | None = None,
        only: Tensor | None = None,
        all_live: bool | None = None,
    ) -> Tensor:
        """Hidden states of packed sequences, inference only.

        input_ids: integers [rows], sequences one after another. cu_seqlens: int32 [batch + 1], where each starts, on
        the same device. max_seqlen: host integer, at least the longest. position_ids: integers [rows], by default
        each sequence's 0, 1, 2... only: int64 [n], the rows to answer for. all_live: that no row is dead, or so few
        that they may be computed, too; by default that is found out on CPU, and on CUDA nothing is looked at. Returns
        [rows, dim] or [n, dim]; rows from cu_seqlens[-1] on are dead and mean nothing.
        """
        for name, value in (("input_ids", input_ids), ("cu_seqlens", cu_seqlens)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        for name, given in (("position_ids", position_ids), ("only", only)):
            if given is not None and not isinstance(given, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(given).__name__}")
        if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt)):
            raise TypeError(f"max_seqlen must be an integer, got {max_seqlen!r}")
        if only is not None and (only.dim() != 1 or only.dtype is not torch.int64):
            raise ValueError(f"only must be int64 [n], got {only.dtype} {list(only.shape)}")
        if only is not None and len(only) and can_look(only.device):
            lowest, highest = (int(v) for v in only.aminmax())
            if lowest < 0 or highest >= len(input_ids):
                bad = lowest if lowest < 0 else highest
                raise ValueError(f"only holds {bad}, but there are rows 0 to {len(input_ids) - 1}")
        if input_ids.dim() != 1 or input_ids.dtype not in INTEGERS:
            raise ValueError(f"input_ids must be integers [rows], got {input_ids.dtype} {list(input_ids.shape)}")
        if input_ids.dtype not in (torch.int64, torch.int32):
            input_ids = input_ids.long()
        if max_seqlen > self.config.max_position_embeddings:
            raise ValueError(self._too_long(max_seqlen))
        ops.check_cu_seqlens(cu_seqlens, input_ids, max_seqlen)
        if position_ids is None:
            row = torch.arange(len(input_ids), device=input_ids.device)
            sequence = (torch.searchsorted(cu_seqlens, row, right=True) - 1).clamp(max=len(cu_seqlens) - 2)
            # dead rows count on from the last sequence and could leave the table
            position_ids = (row - cu_seqlens[sequence]).clamp(max=max(max_seqlen - 1, 0))
        if all_live is None:
            all_live = can_look(input_ids.device) and int(cu_seqlens[-1]) == len(input_ids)
        live = None if all_live else cu_seqlens
        at = Packing(len(cu_seqlens) - 1, max_seqlen, cu_seqlens, max_seqlen, live=live)
        if not self._can_pack():
            return self._padded(input_ids, position_ids, at, only)
        with torch.no_grad():
            if all_live and ops.is_unseen(input_ids.device):
                at = replace(at, starts=cu_seqlens.tolist())
            table = self.embeddings.word_embeddings.weight
            x = self.embeddings.packed(table, input_ids, position_ids, at.live)
            return self.transformer.packed(x, at, None, every=False, only=only, adapters=self._adapters(None))[-1]

    @torch.no_grad()
    def _padded(self, input_ids: Tensor, position_ids: Tensor, at: Packing, only: Tensor | None) -> Tensor:
        """`forward_packed` by way of [batch, max_seqlen, dim], for modules that are not ours or are watched."""
        starts, column = at.cu_seqlens[:-1].long(), torch.arange(at.max_seqlen, device=input_ids.device)
        keep = column < at.cu_seqlens.diff()[:, None]  # [batch, max_seqlen]
        row = (starts[:, None] + column).where(keep, 0)
        if row.numel() == 0:
            return self.embeddings.word_embeddings.weight.new_zeros(len(input_ids), self.config.dim)
        ids, positions = input_ids[row], position_ids[row]
        if can_look(ids.device):
            live = int(at.cu_seqlens[-1])
            for name, index, of in (("input_ids", input_ids, "word"), ("position_ids", position_ids, "position")):
                table = getattr(self.embeddings, f"{of}_embeddings", None)
                if type(table) is nn.Embedding:
                    cpu.check_inside(name, index[:live], table.weight)
        given = Inputs(ids, None, keep, None, positions, adapters=self._adapters(None))
        hidden = self._dense(given)[0][-1]
        out = hidden.new_zeros(len(input_ids) + 1, hidden.shape[2])  # with a row for what is padded
        out[row.where(keep, len(input_ids))] = hidden
        return out[:-1] if only is None else out[only]

    def _adapters(self, names: str | Sequence[str] | None) -> Sequence[str]:
        active = self.__dict__.get("_active_adapters", ()) if names is None else names
        return self.adapter_stack(active) if active else ()

    def _can_pack(self) -> bool:
        """Whether only our own modules run, with nobody to watch them."""
        if not (self._has_own_embeddings() and _is_ours(self.transformer, Transformer)):
            return False
        if _is_touched(self.embeddings) or _is_touched(self.transformer):
            return False
        blocks: Any = self.transformer.layer
        return all(_is_ours(block, TransformerBlock) and block.is_plain() for block in blocks) and not is_hooked(
            self, blocks
        )

    def _has_own_embeddings(self) -> bool:
        return _is_ours(self.embeddings, Embeddings) and self.embeddings.is_plain()

    def _words(self) -> Any:
        """The word embeddings' table, unless somebody's own module stands there."""
        return getattr(getattr(self.embeddings, "word_embeddings", None), "weight", None)

    def _needs_dense(self, given: Inputs) -> bool:
        if self.training or given.mask is not None or 0 in _shape(given) or not self._can_pack():
            return True
        if torch.jit.is_tracing() or is_exported_to_onnx():  # what is traced runs where our ops are not
            return True
        return self._is_trained(given)

    def _is_trained(self, given: Inputs) -> bool:
        """Whether a gradient could be asked for."""
        if not torch.is_grad_enabled():
            return False
        tensors = [t for t in (given.embeds, given.heads) if t is not None]
        return any(t.requires_grad for t in tensors) or any(p.requires_grad for p in self.parameters())

    def _checked(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        head_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        position_ids: Tensor | None,
        token_type_ids: Tensor | None,
        adapter_names: str | Sequence[str] | None,
    ) -> Inputs:
        beside = input_ids if inputs_embeds is None else inputs_embeds
        for name, value in (
            ("attention_mask", attention_mask),
            ("head_mask", head_mask),
            ("position_ids", position_ids),
            ("token_type_ids", token_type_ids),
        ):
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
            if value is not None and isinstance(beside, Tensor) and value.device != beside.device:
                raise ValueError(f"{name} is on {value.device}, the input on {beside.device}; move it")
        batch, length, device = self._check_inputs(input_ids, inputs_embeds, token_type_ids)
        if input_ids is not None and input_ids.dtype not in (torch.int64, torch.int32):
            input_ids = input_ids.long()
        if inputs_embeds is not None:
            inputs_embeds = inputs_embeds.to(self.dtype if self._words() is None else self._words().dtype)
        keep, mask = _masks(attention_mask, batch, length, self.config.n_heads, lambda: self.dtype)
        positions = self._positions(position_ids, batch, length, device)
        heads = self._head_mask(head_mask)
        if input_ids is not None:
            self._check_ids(input_ids, keep)
        return Inputs(input_ids, inputs_embeds, keep, mask, positions, heads, self._adapters(adapter_names))

    def _check_inputs(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, token_type_ids: Tensor | None
    ) -> tuple[int, int, torch.device]:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        given = input_ids if inputs_embeds is None else inputs_embeds
        if not isinstance(given, Tensor):
            raise TypeError(
                f"the input must be a tensor, got {type(given).__name__}; see the tokenizer's return_tensors"
            )
        if inputs_embeds is None and (given.dim() != 2 or given.dtype not in INTEGERS):
            raise ValueError(f"input_ids must be integers [batch, length], got {given.dtype} {list(given.shape)}")
        if inputs_embeds is not None and not given.is_floating_point():
            raise ValueError(f"inputs_embeds must be floating point, got {given.dtype}")
        if inputs_embeds is not None and (given.dim() != 3 or given.shape[2] != self.config.dim):
            raise ValueError(f"inputs_embeds must be [batch, length, {self.config.dim}], got {list(given.shape)}")
        weight = self._words()
        if weight is not None and given.device != weight.device and self._has_own_embeddings():  # else it may be moved
            raise ValueError(f"the input is on {given.device}, the model on {weight.device}; move one of them")
        places = given.shape[:2], (1, given.shape[1])
        if token_type_ids is not None and not is_one_of(token_type_ids.shape, *places):
            raise ValueError(f"token_type_ids must be {list(given.shape[:2])}, got {list(token_type_ids.shape)}")
        if token_type_ids is not None and getattr(self.config, "token_types_folded", False):  # noqa: SIM102
            if can_look(given.device) and bool(token_type_ids.any()):
                raise ValueError(
                    "token_type_ids has nonzero values, but this BERT checkpoint was converted for a single segment "
                    "(token type 0 is folded into the positions)"
                )
        return given.shape[0], given.shape[1], given.device

    def _check_ids(self, input_ids: Tensor, keep: Tensor | None) -> None:
        if not can_look(input_ids.device) or input_ids.numel() == 0:
            return  # reading a value back would stall the device: there a bad id makes its own sequence NaN
        words = self._words()
        if words is None or not len(words):  # somebody's own, or partitioned
            return
        vocab_size = len(words)
        lowest, highest = input_ids.aminmax()
        if lowest >= 0 and highest < vocab_size:
            return
        outside = (input_ids < 0) | (input_ids >= vocab_size)
        for row, column in (outside if keep is None else outside & keep).nonzero().tolist():
            raise ValueError(
                f"input_ids[{row}, {column}] is {int(input_ids[row, column])}, outside the vocabulary of "
                f"{vocab_size} tokens"
            )

    def _too_long(self, length: int) -> str:
        return (
            f"the input is {length} tokens long, but the model has {self.config.max_position_embeddings} positions; "
            "truncate it (the tokenizer's truncation=True), or resize_position_embeddings"
        )

    def _positions(self, position_ids: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
        limit = self.config.max_position_embeddings
        if position_ids is None:
            if length > limit:
                raise ValueError(self._too_long(length))
            return torch.arange(length, device=device)[None]  # [1, L]
        position_ids = torch.atleast_2d(position_ids)
        if not is_one_of(position_ids.shape, (1, length), (batch, length)) or position_ids.dtype not in INTEGERS:
            raise ValueError(
                f"position_ids must be integers [{length}], [1, {length}] or [{batch}, {length}], got "
                f"{position_ids.dtype} {list(position_ids.shape)}"
            )
        if can_look(device) and position_ids.numel():
            lowest, highest = (int(v) for v in position_ids.aminmax())
            if lowest < 0 or highest >= limit:
                bad = lowest if lowest < 0 else highest
                raise ValueError(f"position_ids holds {bad}, but the model has positions 0 to {limit - 1}")
        return position_ids if position_ids.dtype in (torch.int64, torch.int32) else position_ids.long()

    def _head_mask(self, head_mask: Tensor | None) -> Tensor | None:  # -> [layers, heads]
        if head_mask is None:
            return None
        layers, heads = self.config.n_layers, self.config.n_heads
        shape = head_mask.shape
        if head_mask.dim() == 5:  # transformers' own broadcast form, [layers, 1, heads, 1, 1]
            shape = torch.Size((shape[0], shape[2])) if shape[1:2] + shape[3:] == (1, 1, 1) else shape
        if not is_one_of(shape, (heads,), (layers, heads)):
            raise ValueError(f"head_mask must be [{heads}] or [{layers}, {heads}], got {list(head_mask.shape)}")
        return head_mask.reshape(shape).expand(layers, heads)


_AS_WRITTEN |= {kind: kind.forward for kind in (Embeddings, MultiHeadSelfAttention, FFN, TransformerBlock, Transformer)}
_AS_WRITTEN[DistilBertModel] = DistilBertModel.forward


def has_own_forward(encoder: nn.Module) -> bool:
    """Whether a call of it is not DistilBertModel's: another class, a subclass's forward, a patched one."""
    return "forward" in encoder.__dict__ or getattr(type(encoder), "forward", None) is not _AS_WRITTEN[DistilBertModel]


def _masks(
    attention_mask: Tensor | None, batch: int, length: int, heads: int, dtype: Callable[[], torch.dtype]
) -> tuple[Tensor | None, Tensor | None]:
    """-> (bool [batch, length] of real tokens or None, 4-D mask, bool or in dtype, or None); one of them is None"""
    if attention_mask is None:
        return None, None
    shape = tuple(attention_mask.shape)
    if attention_mask.dim() == 4:
        if shape[2] == 1 and length > 1:  # every query's alike
            attention_mask = attention_mask.expand(-1, -1, length, -1)
            shape = tuple(attention_mask.shape)
        forms = [(b, h, length, length) for b in (1, batch) for h in (1, heads)]
        if not is_one_of(shape, *forms):
            raise ValueError(f"a 4-D attention_mask must be [{batch}, 1, {length}, {length}], got {list(shape)}")
        # as in the padding's case, a query that may attend to nothing attends to everything
        if attention_mask.is_floating_point():
            attention_mask = attention_mask.to(dtype())  # which makes an infinity of another dtype's lowest number
            nothing = attention_mask.amax(-1, keepdim=True) == -torch.inf
            return None, attention_mask.masked_fill(nothing, 0)
        allowed = attention_mask != 0
        return None, allowed | ~allowed.any(-1, keepdim=True)
    if not is_one_of(shape, (batch, length), (1, length)):
        raise ValueError(f"attention_mask must be [{batch}, {length}], got {list(shape)}")
    return (attention_mask != 0).expand(batch, length), None


def _shape(given: Inputs) -> tuple[int, int]:
    """-> B, L"""
    whole = given.ids if given.embeds is None else given.embeds
    assert whole is not None
    return whole.shape[0], whole.shape[1]


def _check_only(only: Tensor, batch: int, length: int, device: torch.device) -> None:
    if only.dim() != 2 or only.shape[1] != 2 or only.dtype is not torch.int64:
        raise ValueError(f"positions must be int64 [n, 2] of (row, column), got {only.dtype} {list(only.shape)}")
    if can_look(device):
        for row, column in only.tolist():
            if not (0 <= row < batch and 0 <= column < length):
                raise ValueError(f"positions hold ({row}, {column}), outside the batch of [{batch}, {length}]")


def _flat(only: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor | None]:
    """The flat padded positions of (row, column) pairs [n, 2], and which are outside the batch (None: checked before);
    [n] each."""
    flat = only[:, 0] * length + only[:, 1]
    if can_look(only.device):
        return flat, None
    inside = (only >= 0).all(1) & (only[:, 0] < batch) & (only[:, 1] < length)
    return flat.where(inside, 0), ~inside


def pick(hidden: Tensor, keep: Tensor | None, only: Tensor | str | None) -> Tensor:
    """The tokens of padded hidden states [B, L, dim] that `only` names, [n, dim]; all as they are without it."""
    if only is None:
        return hidden
    if isinstance(only, Tensor):
        flat, outside = _flat(only, *hidden.shape[:2])
        chosen = hidden.flatten(0, 1)[flat]
        return chosen if outside is None else chosen.masked_fill(outside[:, None], torch.nan)
    if hidden.shape[1] == 0:
        return hidden.new_zeros(hidden.shape[0], hidden.shape[2])
    if keep is None:
        return hidden[:, 0]
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), keep.to(torch.int8).argmax(1)]


class _WithoutInit(TorchFunctionMode):
    """Skips torch.nn.init: on the meta device its random numbers would cost the import of torch's compiler, 2 s."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))


def _padding_idx(config: DistilBertConfig) -> int | None:
    pad = config.pad_token_id
    return pad if pad is not None and -config.vocab_size <= pad < config.vocab_size else None


def as_device(name: str | int | torch.device) -> torch.device:
    """A device that is there, or ValueError. A number is transformers': of a CUDA device, or below 0 the CPU."""
    if isinstance(name, int) and not isinstance(name, bool):
        name = f"cuda:{name}" if name >= 0 else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {name!r} is not a device; use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(name)!r} is not supported; use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {str(name)!r} was asked for, but torch finds no CUDA device of that number")
    return device


def one_device(device_map: Any) -> str | torch.device:
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map in ("auto", "balanced", "sequential"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device_map, int) and not isinstance(device_map, bool):
        return as_device(device_map)
    if not isinstance(device_map, (str, torch.device)):
        raise ValueError(f"device_map {device_map!r} spreads a model over devices, which is not supported; name one")
    return device_map


def _dtype(wanted: str | torch.dtype | None, config: DistilBertConfig, weights: Weights) -> torch.dtype:
    if wanted is None or wanted == "auto":
        wanted = config.dtype or weights.dtype or torch.float32
    found = getattr(torch, wanted.removeprefix("torch."), None) if isinstance(wanted, str) else wanted
    if found not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ValueError(
            f"dtype {wanted!r} is not one of auto, float32, float16, bfloat16, float64 (or, as an argument, int8)"
        )
    return found


def sinusoidal_positions(positions: int, dim: int) -> Tensor:
    """[positions, dim] float32: sin on even columns, cos on odd, of position / 10000^(2 * (column // 2) / dim).

    Source: Attention Is All You Need, section 3.5; computed in float64 as HF does.
    """
    column = torch.arange(dim)
    rate = 10000.0 ** (2 * (column // 2).double() / dim)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] / rate
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()


def mean_rows(rows: Tensor, n: int) -> Tensor:
    """n draws from a normal with the rows' mean and 1e-9 of their covariance; the mean where that is degenerate."""
    x = rows.float()
    mean = x.mean(0)
    covariance = (x - mean).T @ (x - mean) / len(x) * 1e-9
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        return mean.expand(n, -1).to(rows.dtype)
    return (mean + torch.randn(n, x.shape[1], device=x.device) @ factor.T).to(rows.dtype)
