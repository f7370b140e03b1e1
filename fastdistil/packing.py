"""Padded `[batch, length]` <-> packed rows, without reading anything back from the device.

On CPU in eager mode the rows are exactly the live tokens. On CUDA, and whenever a graph is traced, the capacity is
`batch * length`, a number the host knows; how many rows are live stays on the device in `cu_seqlens[-1]`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the live tokens of a padded batch lie.

    cu_seqlens: int32 [batch + 1], the packed row at which each sequence starts, and the live count.
    max_seqlen: host integer, an upper bound on a sequence's length.
    source: int64 [rows], the flat padded position (b * length + l) of each packed row; 0 for dead rows.
        None when nothing is padded and packing is a reshape.
    target: int64 [batch * length], the packed row of each flat padded position, -1 where padded; None as above, and
        where the rows are exactly the live tokens.
    live: what row-wise ops are told of the live count: cu_seqlens, or None when no row is dead.
    """

    batch: int
    length: int
    cu_seqlens: Tensor
    max_seqlen: int
    source: Tensor | None = None
    target: Tensor | None = None
    live: Tensor | None = None

    def pack(self, x: Tensor) -> Tensor:
        """[batch, length, ...] -> [rows, ...]"""
        flat = x.reshape(self.batch * self.length, *x.shape[2:])
        return flat if self.source is None else flat[self.source]

    def unpack(self, rows: Tensor) -> Tensor:
        """[rows, ...] -> [batch, length, ...], exactly 0 at padded positions."""
        shape = (self.batch, self.length, *rows.shape[1:])
        if self.source is None:
            return rows.view(shape)
        if self.target is None:  # every row is live
            out = rows.new_zeros(self.batch * self.length, *rows.shape[1:])
            return out.index_copy_(0, self.source, rows).view(shape)
        padded = (self.target < 0).view(-1, *[1] * (rows.dim() - 1))
        return rows[self.target.clamp(min=0)].masked_fill(padded, 0).view(shape)


def find_rows(keep: Tensor | None, batch: int, length: int, device: torch.device) -> Packing:
    """Locate the live tokens. keep: bool [batch, length], True at real tokens, anywhere; None when all are real."""
    exact = device.type == "cpu" and not torch.compiler.is_compiling()
    if keep is None or (exact and bool(keep.all())):
        starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
        return Packing(batch, length, starts, length)
    flat = keep.reshape(-1)
    lengths = keep.sum(1, dtype=torch.int32)
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    if exact:
        return Packing(batch, length, cu_seqlens, int(lengths.max()), flat.nonzero().squeeze(1))
    target = (flat.cumsum(0) - 1).where(flat, -1)
    # a padded position writes into one spare slot behind the rows, which is cut off
    slot = target.where(flat, batch * length)
    source = torch.zeros(batch * length + 1, dtype=torch.int64, device=device)
    source = source.scatter(0, slot, torch.arange(batch * length, device=device))[:-1]
    return Packing(batch, length, cu_seqlens, length, source, target, live=cu_seqlens)
