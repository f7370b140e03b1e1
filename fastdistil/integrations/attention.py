"""The attention implementation "fastdistil" for any transformers model.

Where an encoder attends to all real tokens of its own sequence, padding is dropped and the packed attention op runs;
everything else (causal and sliding masks, caches, biases, grouped heads, gradients, dropout) is computed by
transformers' own sdpa, and what that leaves out (capped scores, attention sinks) step by step, so that the name is
right for every model.
"""

import logging
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, __version__
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastdistil import ops
from fastdistil.packing import find_rows

try:
    from transformers.masking_utils import bidirectional_mask_function
except ImportError:  # before 5, where encoders do not ask for their masks here
    bidirectional_mask_function = None

logger = logging.getLogger("fastdistil")

NAME = "fastdistil"
# whose attention takes the mask as it is; other models may reckon with four dimensions
ENCODERS = ("bert", "distilbert", "electra", "roberta", "xlm-roberta", "camembert")


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The padding mask [batch, length] itself where it is all there is to mask, else sdpa's [batch, 1, q, kv]."""
    config = kwargs.get("config")
    known = getattr(config, "model_type", None) in ENCODERS
    # a mask for cross-attention, which only a decoder has, tells nothing about the queries
    known = known and not (getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False))
    alone = q_length == kv_length and q_offset == kv_offset == 0 and mask_function is bidirectional_mask_function
    if known and alone and attention_mask is not None and attention_mask.shape == (batch_size, kv_length):
        return attention_mask
    function = {} if mask_function is None else {"mask_function": mask_function}
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        **function,
        **kwargs,
    )


def attention(
    module: nn.Module,
    query: Tensor,  # [batch, heads, length, head_size]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # [batch, length, heads, head_size]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    padded = attention_mask is not None and attention_mask.dim() == 2
    if (
        query.shape != key.shape
        or query.shape != value.shape
        or query.shape[-1] > ops.MAX_HEAD_SIZE
        or query.numel() == 0
        or dropout
        or (attention_mask is not None and not padded)
        or (attention_mask is None and causal)
        or any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "sliding_window", "s_aux"))
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or (torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)))
    ):
        if attention_mask is not None and padded:
            attention_mask, is_causal = attention_mask.ne(0)[:, None, None], False
        softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
        if softcap is not None or sinks is not None:
            p = dropout if module.training else 0.0
            return step_by_step(query, key, value, attention_mask, p, scaling, bool(causal), softcap, sinks), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    batch, heads, length, size = query.shape
    real = None if attention_mask is None else attention_mask.ne(0).expand(batch, length)
    at = find_rows(real, batch, length, query.device)
    if scaling is not None and not math.isclose(scaling * size**0.5, 1):
        query = query * (scaling * size**0.5)  # the op divides by sqrt(head_size)
    qkv = torch.stack([query, key, value], dim=2).permute(0, 3, 2, 1, 4).reshape(batch, length, -1)
    rows = ops.attention(at.pack(qkv), at.cu_seqlens, at.max_seqlen, heads)  # [rows, heads * head_size]
    return at.unpack(rows).view(batch, length, heads, size), None


def step_by_step(
    query: Tensor,  # [batch, heads, q, head_size]
    key: Tensor,  # [batch, groups, kv, head_size]
    value: Tensor,
    mask: Tensor | None,  # bool (True attends) or additive, broadcast to [batch, heads, q, kv]
    dropout: float,
    scaling: float | None,
    causal: bool,
    softcap: float | None,  # scores become softcap * tanh(scores / softcap) (Gemma 2)
    sinks: Tensor | None,  # [heads], the score of a key without a value (GPT-OSS)
) -> Tensor:  # [batch, q, heads, head_size]
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    q, kv = scores.shape[-2:]
    if mask is None and causal and q > 1:
        mask = torch.ones(q, kv, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        mask = mask[..., :kv]
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype is torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32)[..., :kv].to(value.dtype)
    return (F.dropout(weights, dropout) @ value).transpose(1, 2).contiguous()


def register() -> str:
    """Make the name known to transformers: `AutoModel.from_pretrained(..., attn_implementation="fastdistil")`."""
    if bidirectional_mask_function is None:
        logger.warning("transformers %s has encoders that take no attention of this kind; those of 5 do", __version__)
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask if bidirectional_mask_function is None else mask)
    return NAME
