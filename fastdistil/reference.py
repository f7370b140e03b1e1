"""What every op means, in plain torch, at any floating-point precision, on any device, differentiable.

These definitions are the truth the Triton kernels and `cpu.py` are tested against, and the path taken when a
gradient is asked for. They are kept short and are never optimised.

Packed rows: the tokens of all sequences lie one after another in `[rows, ...]`; sequence `b` owns the rows
`cu_seqlens[b] : cu_seqlens[b + 1]`. `rows` is a capacity: rows from `cu_seqlens[-1]` on are dead. An op never lets
a dead row reach a live one, and what it leaves in the dead rows of its result means nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "gelu": F.gelu,  # exact, by erf
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def embed_layer_norm(
    input_ids: Tensor,  # [rows] int
    position_ids: Tensor,  # [rows] int
    word_embeddings: Tensor,  # [vocab, dim]
    position_embeddings: Tensor,  # [positions, dim]
    weight: Tensor,  # [dim]
    bias: Tensor,  # [dim]
    eps: float,
    cu_seqlens: Tensor | None = None,  # [batch + 1] int32
) -> Tensor:  # [rows, dim]
    """LayerNorm(word_embeddings[id] + position_embeddings[position]); an index outside its table gives a NaN row."""

    def lookup(table: Tensor, index: Tensor) -> Tensor:
        inside = (index >= 0) & (index < table.shape[0])
        return F.embedding(index.where(inside, 0), table).masked_fill(~inside.unsqueeze(-1), float("nan"))

    x = lookup(word_embeddings, input_ids) + lookup(position_embeddings, position_ids)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def qkv_projection(
    x: Tensor,  # [rows, dim]
    weight: Tensor,  # [3 * dim, dim], the query, key and value weights one above the other
    bias: Tensor,  # [3 * dim]
    cu_seqlens: Tensor | None = None,
) -> Tensor:  # [rows, 3 * dim]
    """x @ weight.T + bias: query, key and value of every row, side by side."""
    return F.linear(x, weight, bias)


def linear(
    x: Tensor,  # [rows, in]
    weight: Tensor,  # [out, in]
    bias: Tensor,  # [out]
    cu_seqlens: Tensor | None = None,
) -> Tensor:  # [rows, out]
    """x @ weight.T + bias."""
    return F.linear(x, weight, bias)


def bias_gelu(
    x: Tensor,  # [rows, in]
    weight: Tensor,  # [out, in]
    bias: Tensor,  # [out]
    activation: str = "gelu",
    cu_seqlens: Tensor | None = None,
) -> Tensor:  # [rows, out]
    """activation(x @ weight.T + bias); activation is gelu (erf), gelu_new (tanh), relu or silu."""
    return ACTIVATIONS[activation](F.linear(x, weight, bias))


def add_layer_norm(
    x: Tensor,  # [rows, dim]
    residual: Tensor,  # [rows, dim]
    weight: Tensor,  # [dim]
    bias: Tensor,  # [dim]
    eps: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:  # [rows, dim]
    """LayerNorm(x + residual)."""
    return F.layer_norm(x + residual, x.shape[-1:], weight, bias, eps)


def linear_add_layer_norm(
    x: Tensor,  # [rows, in]
    residual: Tensor,  # [rows, dim]
    weight: Tensor,  # [dim, in]
    bias: Tensor,  # [dim]
    norm_weight: Tensor,  # [dim]
    norm_bias: Tensor,  # [dim]
    eps: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:  # [rows, dim]
    """LayerNorm(x @ weight.T + bias + residual)."""
    return add_layer_norm(linear(x, weight, bias), residual, norm_weight, norm_bias, eps)


def attention(
    qkv: Tensor,  # [rows, 3 * dim]
    cu_seqlens: Tensor,  # [batch + 1] int32
    max_seqlen: int,  # no sequence is longer
    num_heads: int,
    head_scale: Tensor | None = None,  # [num_heads]
) -> Tensor:  # [rows, dim]
    """softmax(q @ k.T / sqrt(head_size)) @ v within each sequence, times head_scale[h] for head h.

    The rows are laid out as `[batch, max_seqlen]` by arithmetic on `cu_seqlens` alone, so nothing is read back
    from the device. Keys and values past a sequence's end become zeros, because 0 * NaN would be NaN.
    """
    rows, dim = qkv.shape[0], qkv.shape[1] // 3
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    if rows == 0 or lengths.shape[0] == 0 or max_seqlen == 0:
        return qkv.new_zeros(rows, dim)
    column = torch.arange(max_seqlen, device=qkv.device)
    live = column < lengths[:, None]  # [batch, max_seqlen]
    padded = qkv[(starts[:, None] + column).where(live, 0).clamp(max=rows - 1)].masked_fill(~live[..., None], 0)
    padded = padded.view(*live.shape, 3, num_heads, dim // num_heads).permute(2, 0, 3, 1, 4)
    q, k, v = padded.unbind(0)  # each [batch, num_heads, max_seqlen, head_size]
    scores = (q @ k.mT) * (dim // num_heads) ** -0.5
    # of an empty sequence nothing is read, and a softmax over nothing would have NaN for a gradient
    scores = scores.masked_fill(~live[:, None, None] & (lengths > 0)[:, None, None, None], -torch.inf)
    out = scores.softmax(-1) @ v
    if head_scale is not None:
        out = out * head_scale.to(out.dtype)[:, None, None]
    out = out.transpose(1, 2).reshape(*live.shape, dim)
    row = torch.arange(rows, device=qkv.device)
    sequence = (torch.searchsorted(cu_seqlens, row, right=True) - 1).clamp(0, lengths.shape[0] - 1)
    out = out[sequence, (row - starts[sequence]).clamp(0, max_seqlen - 1)]
    wrong = (lengths > max_seqlen) | (cu_seqlens[1:] > rows)
    return out.masked_fill(wrong[sequence, None], float("nan"))  # nothing else could be right


def pool(
    x: Tensor,  # [rows, dim]
    cu_seqlens: Tensor,  # [batch + 1] int32
    mode: str = "mean",
    normalize: bool = False,
) -> Tensor:  # [batch, dim], float32 (float64 for float64 rows)
    """Mean over each sequence's rows, or its first row (cls), then x / max(|x|_2, 1e-12); 0 for an empty sequence."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    if mode == "cls":
        empty = (lengths == 0)[:, None]
        out = F.pad(x, (0, 0, 0, 1))[starts.where(lengths > 0, 0).clamp(max=len(x))].masked_fill(empty, 0)
    else:
        # dead rows go to a bucket of their own behind the last sequence
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(len(x), device=x.device), right=True)
        sums = x.new_zeros(len(lengths) + 1, x.shape[1]).index_add(0, sequence, x)
        out = sums[:-1] / lengths.clamp(min=1)[:, None]
    out = out.masked_fill((cu_seqlens[1:] > len(x))[:, None], float("nan"))  # of rows that nobody gave
    return F.normalize(out, dim=-1) if normalize else out


def pack(
    keep: Tensor,  # [batch, length] bool, True at real tokens
    input_ids: Tensor | None = None,  # [batch, length] int
    position_ids: Tensor | None = None,  # [1 or batch, length] int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Row r is the r-th real token -> cu_seqlens [batch + 1] int32; source [batch * length], each row's flat padded
    position; target [batch * length], each padded position's row, -1 where padded; the rows' ids and positions (empty
    if not given). Dead rows are 0."""
    flat = keep.reshape(-1)
    cu_seqlens = F.pad(keep.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    target = (flat.cumsum(0) - 1).where(flat, -1)
    # a padded position writes into one spare slot behind the rows, which is cut off
    slot = target.where(flat, flat.shape[0])

    def of_rows(values: Tensor | None) -> Tensor:
        if values is None:
            return target.new_empty(0)
        values = values.expand(keep.shape).reshape(-1)
        return values.new_zeros(flat.shape[0] + 1).scatter(0, slot, values)[:-1].clone()

    source = of_rows(torch.arange(flat.shape[0], device=keep.device).view(keep.shape))
    return cu_seqlens, source, target, of_rows(input_ids), of_rows(position_ids)


def unpack(
    rows: Tensor,  # [capacity, dim]
    target: Tensor,  # [batch * length] int64, a row or -1
    fill: Tensor | None = None,  # [1, dim]
) -> Tensor:  # [batch * length, dim]
    """rows[target], and fill (by default 0) where target is -1."""
    if rows.shape[0] == 0:
        rows = rows.new_zeros(1, rows.shape[1])
    padded = (target < 0)[:, None]
    out = rows[target.clamp(min=0)]
    return out.masked_fill(padded, 0) if fill is None else torch.where(padded, fill, out)
