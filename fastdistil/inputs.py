"""A padded batch as callers give it, checked. Values on the device are looked at on CPU only."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdistil import ops
from fastdistil._register import can_look, is_one_of

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Inputs(NamedTuple):
    """A padded batch, checked. Of ids and embeds there is one, of keep and mask at most one."""

    ids: Tensor | None  # integers [B, L]
    embeds: Tensor | None  # [B, L, dim], in place of the word embeddings
    keep: Tensor | None  # bool [B, L], True at real tokens
    mask: Tensor | None  # [B, 1 or heads, L, L], bool (True attends) or additive
    positions: Tensor  # integers [1 or B, L]
    heads: Tensor | None = None  # [layers, heads], what each head's attention is multiplied by
    adapters: Sequence[str] = ()


def size_of(given: Inputs) -> tuple[int, int]:
    """B, L. A function, for Dynamo of torch 2.10 traces no property of a NamedTuple."""
    whole = given.ids if given.embeds is None else given.embeds
    assert whole is not None
    return whole.shape[0], whole.shape[1]


def check_beside(given: object, **tensors: object) -> None:
    """What comes beside the input: tensors, where it is."""
    for name, value in tensors.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if isinstance(given, Tensor) and value.device != given.device:
            raise ValueError(f"{name} is on {value.device}, the input on {given.device}; move it")


def check_given(
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    token_type_ids: Tensor | None,
    dim: int,
    one_segment: bool,
) -> Tensor:
    """-> the one that is given, [B, L] or [B, L, dim]. one_segment: token types other than 0 are an error."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    given = input_ids if inputs_embeds is None else inputs_embeds
    if not isinstance(given, Tensor):
        raise TypeError(f"the input must be a tensor, got {type(given).__name__}; see the tokenizer's return_tensors")
    if inputs_embeds is None and (given.dim() != 2 or given.dtype not in INTEGERS):
        raise ValueError(f"input_ids must be integers [batch, length], got {given.dtype} {list(given.shape)}")
    if inputs_embeds is not None and not given.is_floating_point():
        raise ValueError(f"inputs_embeds must be floating point, got {given.dtype}")
    if inputs_embeds is not None and (given.dim() != 3 or given.shape[2] != dim):
        raise ValueError(f"inputs_embeds must be [batch, length, {dim}], got {list(given.shape)}")
    if token_type_ids is not None:
        if not is_one_of(token_type_ids.shape, given.shape[:2], (1, given.shape[1])):
            raise ValueError(f"token_type_ids must be {list(given.shape[:2])}, got {list(token_type_ids.shape)}")
        if one_segment and can_look(given.device) and bool(token_type_ids.any()):
            raise ValueError(
                "token_type_ids has nonzero values, but this BERT checkpoint was converted for a single segment "
                "(token type 0 is folded into the positions)"
            )
    return given


def as_index(ids: Tensor) -> Tensor:
    """int64 or int32, which the ops take."""
    return ids if ids.dtype in (torch.int64, torch.int32) else ids.long()


def check_ids(input_ids: Tensor, keep: Tensor | None, vocab_size: int) -> None:
    if not can_look(input_ids.device) or input_ids.numel() == 0:
        return  # reading a value back would stall the device: there a bad id makes its own sequence NaN
    lowest, highest = input_ids.aminmax()
    if lowest >= 0 and highest < vocab_size:
        return
    outside = (input_ids < 0) | (input_ids >= vocab_size)
    for row, column in (outside if keep is None else outside & keep).nonzero().tolist():
        raise ValueError(
            f"input_ids[{row}, {column}] is {int(input_ids[row, column])}, outside the vocabulary of "
            f"{vocab_size} tokens"
        )


def too_long(length: int, longest: int) -> str:
    return (
        f"the input is {length} tokens long, but the model has {longest} positions; "
        "truncate it (the tokenizer's truncation=True), or resize_position_embeddings"
    )


def positions(position_ids: Tensor | None, batch: int, length: int, longest: int, device: torch.device) -> Tensor:
    """-> integers [1 or batch, length]"""
    if position_ids is None:
        if length > longest:
            raise ValueError(too_long(length, longest))
        return torch.arange(length, device=device)[None]
    position_ids = torch.atleast_2d(position_ids)
    if not is_one_of(position_ids.shape, (1, length), (batch, length)) or position_ids.dtype not in INTEGERS:
        raise ValueError(
            f"position_ids must be integers [{length}], [1, {length}] or [{batch}, {length}], got "
            f"{position_ids.dtype} {list(position_ids.shape)}"
        )
    if can_look(device) and position_ids.numel():
        lowest, highest = (int(v) for v in position_ids.aminmax())
        if lowest < 0 or highest >= longest:
            bad = lowest if lowest < 0 else highest
            raise ValueError(f"position_ids holds {bad}, but the model has positions 0 to {longest - 1}")
    return as_index(position_ids)


def head_scale(head_mask: Tensor | None, layers: int, heads: int) -> Tensor | None:
    """-> [layers, heads]"""
    if head_mask is None:
        return None
    shape = head_mask.shape
    if head_mask.dim() == 5:  # transformers' own broadcast form, [layers, 1, heads, 1, 1]
        shape = torch.Size((shape[0], shape[2])) if shape[1:2] + shape[3:] == (1, 1, 1) else shape
    if not is_one_of(shape, (heads,), (layers, heads)):
        raise ValueError(f"head_mask must be [{heads}] or [{layers}, {heads}], got {list(head_mask.shape)}")
    return head_mask.reshape(shape).expand(layers, heads)


def masks(
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


def check_packed(
    input_ids: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    position_ids: Tensor | None,
    only: Tensor | None,
    longest: int,
) -> Tensor:
    """Arguments of `forward_packed` -> the ids as an index. longest: the model's positions."""
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
    input_ids = as_index(input_ids)
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen is {max_seqlen}")
    if max_seqlen > longest:
        raise ValueError(too_long(max_seqlen, longest))
    ops.check_cu_seqlens(cu_seqlens, input_ids, max_seqlen)
    return input_ids


def check_chosen(only: Tensor, batch: int, length: int, device: torch.device) -> None:
    if only.dim() != 2 or only.shape[1] != 2 or only.dtype is not torch.int64:
        raise ValueError(f"positions must be int64 [n, 2] of (row, column), got {only.dtype} {list(only.shape)}")
    if can_look(device):
        for row, column in only.tolist():
            if not (0 <= row < batch and 0 <= column < length):
                raise ValueError(f"positions hold ({row}, {column}), outside the batch of [{batch}, {length}]")


def flat_positions(only: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor | None]:
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
        flat, outside = flat_positions(only, *hidden.shape[:2])
        chosen = hidden.flatten(0, 1)[flat]
        return chosen if outside is None else chosen.masked_fill(outside[:, None], torch.nan)
    if hidden.shape[1] == 0:
        return hidden.new_zeros(hidden.shape[0], hidden.shape[2])
    if keep is None:
        return hidden[:, 0]
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), keep.to(torch.int8).argmax(1)]
