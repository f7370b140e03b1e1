"""The attention implementation "fastdistil" for any transformers model.

Where an encoder attends to all real tokens of its own sequence, padding is dropped and the packed attention op runs;
everything else (causal and sliding masks, caches, biases, grouped heads, gradients, dropout) is computed by
transformers' own sdpa, so that the name is right for every model.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from fastdistil import ops
from fastdistil.packing import find_rows

NAME = "fastdistil"
# whose attention takes the mask as it is; other models may reckon with four dimensions
ENCODERS = ("bert", "distilbert", "electra", "roberta", "xlm-roberta", "camembert")
WIDEST = 128  # head size


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
    known = getattr(kwargs.get("config"), "model_type", None) in ENCODERS
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
        or query.shape[-1] > WIDEST
        or query.numel() == 0
        or dropout
        or (attention_mask is not None and not padded)
        or (attention_mask is None and causal)
        or any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "sliding_window", "s_aux"))
        or torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)))
    ):
        if (
            attention_mask is not None and padded
        ):  # a row without a real token attends to everything, as elsewhere in transformers
            keep = attention_mask.ne(0)
            attention_mask = (keep | ~keep.any(-1, keepdim=True))[:, None, None]
            is_causal = False
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    batch, heads, length, size = query.shape
    at = find_rows(None if attention_mask is None else attention_mask != 0, batch, length, query.device)
    if scaling is not None:
        query = query * (scaling * size**0.5)  # the op divides by sqrt(head_size)
    qkv = torch.stack([query, key, value], dim=2).permute(0, 3, 2, 1, 4).reshape(batch, length, -1)
    rows = ops.attention(at.pack(qkv), at.cu_seqlens, at.max_seqlen, heads)  # [rows, heads * head_size]
    return at.unpack(rows).view(batch, length, heads, size), None


def register() -> str:
    """Make the name known to transformers: `AutoModel.from_pretrained(..., attn_implementation="fastdistil")`."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    return NAME
