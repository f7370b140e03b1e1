"""DistilBERT's encoder.

Two ways through the same weights. Packed: padding is dropped once at the embeddings and every op works on live rows
`[rows, dim]`; this is inference. Dense: differentiable torch on `[batch, length, dim]`, taken when a gradient,
training mode, attentions or a 4-D mask is asked for. Both give hidden states that are 0 at padded positions.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil import cpu, graphs, inputs, ops
from fastdistil._register import can_look, is_exported_to_onnx, is_transformed
from fastdistil.config import DistilBertConfig
from fastdistil.inputs import INTEGERS, Inputs, check_chosen, flat_positions, pick, size_of
from fastdistil.layers import Embeddings, Transformer, TransformerBlock, given_options, rows_of
from fastdistil.outputs import BaseModelOutput
from fastdistil.packing import Packing, find_tokens, past_the_ops
from fastdistil.plain import AS_WRITTEN, is_hooked, is_ours, is_touched
from fastdistil.pretrained import PreTrainedModel


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
            check_chosen(only, *size_of(given), given.positions.device)
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
                size = rows_of(words) if isinstance(words, nn.Embedding) else self.config.vocab_size
                looked_up = keep | ((ids >= 0) & (ids < size))
            ids = ids.where(looked_up, 0)
        elif embeds is not None and keep is not None and not padding_too:
            embeds = embeds.masked_fill(~keep.unsqueeze(-1), 0)
        x = self.embeddings(ids, embeds, positions)  # [B, L, dim]
        if keep is not None:  # a row without a real token attends to everything, and is zeroed with the padding
            mask = (keep | ~keep.any(-1, keepdim=True))[:, None, None]  # [B, 1, 1, L]
        padded = ~keep.unsqueeze(-1) if zeroed and keep is not None else None  # [B, L, 1]
        more = given_options(head_mask=heads, probabilities=want_attentions, adapters=adapters)
        if ours := type(self.transformer) is Transformer:
            more["padded"] = padded
        out = self.transformer(hidden_states=x, attention_mask=mask, **more)
        # somebody's own may tell its last states alone; and a starred target is a tuple to Dynamo of torch 2.10
        states = list(getattr(out, "hidden_states", None) or (x, x))[:-1]
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
        batch, length = size_of(given)
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
        flat, outside = (None, None) if isinstance(only, str) else flat_positions(only, batch, length)
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
                check_chosen(only, places[0], places[1], device)
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
        longest = self.config.max_position_embeddings
        input_ids = inputs.check_packed(input_ids, cu_seqlens, max_seqlen, position_ids, only, longest)
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
            forms = past_the_ops(input_ids.device)
            starts = cu_seqlens.tolist() if all_live and forms == "cpu" else None
            at = replace(at, starts=starts, launched=forms == "kernels")
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
            rows = len(input_ids if only is None else only)
            return self.embeddings.word_embeddings.weight.new_zeros(rows, self.config.dim)
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

    @torch.no_grad()
    def prepare(self) -> cpu.Prepared:
        """The blocks' weights for `cpu.using`, where the model is one in float32 on CPU whose parts are just ours."""
        ours = self.dtype is torch.float32 and ops.is_unseen(self.device) and self._can_pack()
        if self.device.type != "cpu" or not ours:
            return {}
        blocks: Any = self.transformer.layer
        like = torch.empty(0, self.config.dim, device="cpu")
        return cpu.prepare(found for block in blocks if (found := block.products(like)) is not None)

    def _adapters(self, names: str | Sequence[str] | None) -> Sequence[str]:
        active = self.__dict__.get("_active_adapters", ()) if names is None else names
        return self.adapter_stack(active) if active else ()

    def _can_pack(self) -> bool:
        """Whether only our own modules run, with nobody to watch them."""
        if not (self._has_own_embeddings() and is_ours(self.transformer, Transformer)):
            return False
        if is_touched(self.embeddings) or is_touched(self.transformer):
            return False
        blocks: Any = self.transformer.layer
        return all(is_ours(block, TransformerBlock) and block.is_plain() for block in blocks) and not is_hooked(
            self, blocks
        )

    def _has_own_embeddings(self) -> bool:
        return is_ours(self.embeddings, Embeddings) and self.embeddings.is_plain()

    def _words(self) -> Any:
        """The word embeddings' table, unless somebody's own module stands there."""
        return getattr(getattr(self.embeddings, "word_embeddings", None), "weight", None)

    def _needs_dense(self, given: Inputs) -> bool:
        if self.training or given.mask is not None or 0 in size_of(given) or not self._can_pack():
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
        config, words = self.config, self._words()
        beside = {"attention_mask": attention_mask, "head_mask": head_mask, "position_ids": position_ids}
        beside["token_type_ids"] = token_type_ids
        inputs.check_beside(input_ids if inputs_embeds is None else inputs_embeds, **beside)
        one_segment = bool(getattr(config, "token_types_folded", False))
        given = inputs.check_given(input_ids, inputs_embeds, token_type_ids, config.dim, one_segment)
        if words is not None and given.device != words.device and self._has_own_embeddings():  # else it may be moved
            raise ValueError(f"the input is on {given.device}, the model on {words.device}; move one of them")
        batch, length = given.shape[:2]
        if inputs_embeds is not None:
            inputs_embeds = inputs_embeds.to(self.dtype if words is None else words.dtype)
        keep, mask = inputs.masks(attention_mask, batch, length, config.n_heads, lambda: self.dtype)
        positions = inputs.positions(position_ids, batch, length, config.max_position_embeddings, given.device)
        heads = inputs.head_scale(head_mask, config.n_layers, config.n_heads)
        if input_ids is not None:
            input_ids = inputs.as_index(input_ids)
            if words is not None and len(words):  # else it is somebody's own, or partitioned
                inputs.check_ids(input_ids, keep, len(words))
        return Inputs(input_ids, inputs_embeds, keep, mask, positions, heads, self._adapters(adapter_names))


AS_WRITTEN[DistilBertModel] = DistilBertModel.forward


def has_own_forward(encoder: nn.Module) -> bool:
    """Whether a call of it is not DistilBertModel's: another class, a subclass's forward, a patched one."""
    return "forward" in encoder.__dict__ or getattr(type(encoder), "forward", None) is not AS_WRITTEN[DistilBertModel]
