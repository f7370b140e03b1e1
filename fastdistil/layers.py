"""DistilBERT's blocks with transformers' parameter names, each with two ways through the same weights.

`forward` is differentiable torch on padded `[batch, length, dim]`. `packed` is inference: fused ops on live rows
`[rows, dim]`, or the modules themselves where they are not just ours.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint as recompute

from fastdistil import cpu, int8, ops, side_by_side
from fastdistil.adapters import Adapters, add_norm_through, apply_to_merged, is_merged, low_rank
from fastdistil.config import ACTIVATION_ALIASES, DistilBertConfig
from fastdistil.int8 import Int8Linear
from fastdistil.outputs import BaseModelOutput
from fastdistil.packing import Packing
from fastdistil.plain import (
    ACTIVATIONS,
    AS_WRITTEN,
    activation_of,
    acts_on_rows,
    are_of,
    is_elementwise,
    is_off,
    is_ours,
    is_packed_otherwise,
    is_plain,
    is_touched,
    weights_of,
)


def apply_linear(module: Any, x: Tensor, live: Tensor | None) -> Tensor:  # [rows, in] -> [rows, out]
    return ops.linear(x, module.weight, module.bias, live) if is_plain(module) else module(x)


def apply_add_norm(module: Any, x: Tensor, residual: Tensor, live: Tensor | None) -> Tensor:  # [rows, dim] x 2
    if not is_plain(module, nn.LayerNorm) or module.weight.dtype is not x.dtype:
        return module(x + residual)
    return ops.add_layer_norm(x, residual, module.weight, module.bias, module.eps, live)


def apply_linear_add_norm(linear: Any, norm: Any, x: Tensor, residual: Tensor, live: Tensor | None) -> Tensor:
    """LayerNorm(linear(x) + residual); x: [rows, in], residual: [rows, dim] -> [rows, dim]"""
    if not (is_plain(linear) and is_plain(norm, nn.LayerNorm) and norm.weight.dtype is x.dtype):
        return apply_add_norm(norm, apply_linear(linear, x, live), residual, live)
    weights = linear.weight, linear.bias, norm.weight, norm.bias
    return ops.linear_add_layer_norm(x, residual, *weights, norm.eps, live)


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
            is_ours(self, Embeddings)
            and is_off(self.dropout)
            and is_plain(self.LayerNorm, nn.LayerNorm)
            and all(
                is_ours(table, nn.Embedding)
                and table.weight.dtype is self.LayerNorm.weight.dtype
                and table.max_norm is None
                and not is_packed_otherwise(table.weight)
                and not is_touched(table)
                for table in (self.word_embeddings, self.position_embeddings)
            )
        )

    @staticmethod
    def _lookup(table: nn.Embedding, index: Tensor) -> Tensor:
        if not isinstance(getattr(table, "weight", None), Tensor):  # somebody's own
            return table(index)
        # an index outside the table is NaN, not an illegal access
        inside = (index >= 0) & (index < rows_of(table))
        return table(index.where(inside, 0)).masked_fill(~inside.unsqueeze(-1), float("nan"))


def rows_of(table: nn.Embedding) -> int:
    """How many rows a table has, also while its weight lies elsewhere, as partitioned ones do between calls."""
    return len(table.weight) if table.weight.dim() == 2 and len(table.weight) else table.num_embeddings


def _padding_idx(config: DistilBertConfig) -> int | None:
    pad = config.pad_token_id
    return pad if pad is not None and -config.vocab_size <= pad < config.vocab_size else None


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

    def attend(
        self,
        x: Tensor,
        at: Packing,
        head_scale: Tensor | None,
        only: Tensor | None = None,
        adapters: Sequence[str] = (),
    ) -> Tensor:
        """What out_lin is applied to. x: [rows, dim]; only: [n], the rows to answer for, by default all; every row is
        attended to. -> [rows or n, dim]"""
        qkv = self.project(x, at.live)  # [rows, 3 * dim]
        if adapters:
            self._add_low_rank(qkv, x, adapters)
        context = ops.attention(qkv, at.cu_seqlens, at.max_seqlen, self.n_heads, head_scale)  # [rows, dim]
        return context if only is None else context[only]

    def _add_low_rank(self, qkv: Tensor, x: Tensor, adapters: Sequence[str]) -> None:  # [rows, 3 * dim], [rows, dim]
        for part, linear in zip(qkv.chunk(3, dim=1), self._projections(), strict=True):
            more = low_rank(linear, adapters, x)
            if more is not None:
                part += more.to(part.dtype)

    def project(self, x: Tensor, live: Tensor | None) -> Tensor:  # [rows, dim] -> [rows, 3 * dim]
        parts = self._projections()
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

    def _projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.q_lin, self.k_lin, self.v_lin

    def _still_fits(self) -> bool:
        if (torch.is_grad_enabled() and self.q_lin.weight.requires_grad) or forward_ad._current_level >= 0:
            return False  # the buffer is outside autograd
        return self._lie_side_by_side()

    def _lie_side_by_side(self) -> bool:
        return self._qkv is not None and side_by_side.lie(self._qkv, self._projections())

    def _lay_side_by_side(self) -> None:
        self._qkv = None  # so that its memory is free for the next one
        self._qkv = side_by_side.lay(self._projections())

    def _lay_side_by_side_if_alone(self) -> None:
        """Unless they lie so already, or others hold their memory too: a state dict, another model, a flat buffer."""
        parts = self._projections()
        if not (all(map(is_plain, parts)) and self._lie_side_by_side()):
            self._qkv = None
            if side_by_side.are_alone(parts):
                self._lay_side_by_side()

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        for linear in self._projections():
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
    for linear in attention._projections():
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

    def hidden(self, x: Tensor, live: Tensor | None) -> Tensor:
        """What lin2 is applied to. [rows, dim] -> [rows, hidden_dim]"""
        activation = activation_of(self.activation)
        if activation is not None and is_plain(self.lin1):
            return ops.bias_gelu(x, self.lin1.weight, self.lin1.bias, activation, live)
        if activation is not None and is_plain(self.lin1, Int8Linear):
            return int8.apply([self.lin1], x, activation)  # type: ignore[list-item]
        return self.activation(self.lin1(x))


def _attends_whole(attention: Any) -> bool:
    """Whether its heads are as many and as wide as it was made with, and scores are scaled as usual."""
    size, queries = attention.attention_head_size, attention._modules["q_lin"]
    wide = getattr(queries, "out_features", attention.dim) == attention.dim == attention.n_heads * size
    return wide and attention.scaling == size**-0.5


def given_options(**options: Any) -> dict[str, Any]:
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
            is_ours(self, TransformerBlock)
            and is_ours(attention, MultiHeadSelfAttention)
            and is_ours(ffn, FFN)
            and is_off(attention._modules["dropout"])  # type: ignore[union-attr]
            and is_off(ffn._modules["dropout"])  # type: ignore[union-attr]
            and _attends_whole(attention)
            and is_elementwise(ffn.activation)  # type: ignore[union-attr]
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
        more = given_options(head_mask=head_mask, probabilities=probabilities is not None, adapters=adapters)
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
        if (at.starts is not None or at.launched) and not adapters and head_scale is None and type(x) is Tensor:
            leaves = self._leaves(x) if x.dim() == 2 and x.device == at.cu_seqlens.device else None
            if leaves is not None:
                return self._unseen(x, at, only, leaves)
        out_lin, lin2 = self.attention.out_lin, self.ffn.lin2
        context = self.attention.attend(x, at, head_scale, only, adapters)  # [rows or n, dim]
        x, live = (x, at.live) if only is None else (x[only], None)
        if adapters:
            context = apply_linear(out_lin, context, live)
            return self._through(
                adapters, context, x, lambda x: apply_linear(lin2, self.ffn.hidden(x, live), live), live
            )
        x = apply_linear_add_norm(out_lin, self.sa_layer_norm, context, x, live)
        return apply_linear_add_norm(lin2, self.output_layer_norm, self.ffn.hidden(x, live), x, live)

    def _leaves(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], ...] | None:
        """(weight, bias) of what `_unseen` computes with; None where a part is not just ours, or the ops' to refuse."""
        own: Any = self._modules
        attention, ffn = own["attention"], own["ffn"]
        dim, of_attention, of_ffn = x.shape[1], attention._modules, ffn._modules
        linears = [of_attention.get(name) for name in ("q_lin", "k_lin", "v_lin", "out_lin")]
        linears += [of_ffn.get("lin1"), of_ffn.get("lin2")]
        norms = own.get("sa_layer_norm"), own.get("output_layer_norm")
        of_linears, of_norms = weights_of(linears, nn.Linear, x), weights_of(norms, nn.LayerNorm, x)
        if not (of_linears and of_norms and attention._qkv):
            return None
        (q, k, v, out, lin1, lin2), (norm, last) = of_linears, of_norms
        hidden = lin1[1].numel()
        fits = all(are_of(leaf, dim, dim) for leaf in (q, k, v, out)) and are_of(lin1, hidden, dim)
        fits = fits and are_of(lin2, dim, hidden) and are_of(norm, dim) and are_of(last, dim)
        fits = fits and type(attention.n_heads) is int and attention.attention_head_size <= ops.MAX_HEAD_SIZE
        fits = fits and attention.n_heads * attention.attention_head_size == dim
        fits = fits and type(norms[0].eps) is type(norms[1].eps) is float and bool(activation_of(ffn.activation))
        return (
            (attention._qkv, out, norm, lin1, lin2, last)
            if fits and side_by_side.are_thirds(attention._qkv, q, k, v)
            else None
        )

    def products(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """The weights that `_unseen` multiplies with: w_qkv, w_out, w_1, w_2."""
        if (leaves := self._leaves(x)) is None:
            return None
        (w_qkv, _), (w_out, _), _, (w_1, _), (w_2, _), _ = leaves
        return w_qkv, w_out, w_1, w_2

    def _unseen(self, x: Tensor, at: Packing, only: Tensor | None, leaves: tuple[tuple[Tensor, Tensor], ...]) -> Tensor:
        """`packed` by the ops' forms as they are: of few texts' time their checks and dispatch are a good part."""
        own: Any = self._modules
        (w_qkv, b_qkv), (w_out, b_out), (w_norm, b_norm), (w_1, b_1), (w_2, b_2), (w_last, b_last) = leaves
        eps, last_eps, heads = own["sa_layer_norm"].eps, own["output_layer_norm"].eps, own["attention"].n_heads
        activation: Any = activation_of(own["ffn"].activation)
        if at.starts is not None:
            context = cpu.attend(cpu.linear(x, w_qkv, b_qkv), at.starts, heads)  # [rows, dim]
            if only is not None:
                context, x = context[only], x[only]
            x = cpu.linear_add_layer_norm(context, x, w_out, b_out, w_norm, b_norm, eps)
            y = cpu.feed_forward(x, w_1, b_1, w_2, b_2, activation)  # [rows, dim]
            return cpu.add_layer_norm(y, x, w_last, b_last, last_eps)
        run, live = ops.kernel_forms, at.live
        qkv = run.qkv_projection(x, w_qkv, b_qkv, live)  # [rows, 3 * dim]
        context = run.attention(qkv, at.cu_seqlens, at.max_seqlen, heads)  # [rows, dim]
        if only is not None:
            context, x, live = context[only], x[only], None
        x = run.linear_add_layer_norm(context, x, w_out, b_out, w_norm, b_norm, eps, live)
        y = run.bias_gelu(x, w_1, b_1, activation, live)  # [rows, hidden_dim]
        return run.linear_add_layer_norm(y, x, w_2, b_2, w_last, b_last, last_eps, live)

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
    more = given_options(head_mask=heads, adapters=adapters) | ({"probabilities": weights} if probabilities else {})
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
        """hidden_states: [B, L, dim]. attention_mask: 4-D, see `inputs.masks`. padded: bool [B, L, 1], where what is
        told is 0. -> the last block's, as hidden_states the input's and each block's, and with `probabilities`
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


AS_WRITTEN |= {kind: kind.forward for kind in (Embeddings, MultiHeadSelfAttention, FFN, TransformerBlock, Transformer)}
