"""Padded `[batch, length]` <-> packed rows, without reading anything back from the device.

On CPU in eager mode the rows are exactly the live tokens. On CUDA, and whenever a call is traced, the capacity is
`batch * length`, a number the host knows; how many rows are live stays on the device in `cu_seqlens[-1]`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistil import ops
from fastdistil._register import can_look


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
    starts: the values of cu_seqlens, where blocks may call the ops' CPU forms as they are: every row is live and
        nothing looks into the call (see `ops.is_unseen`).
    launched: whether blocks may call the ops' kernels as they are.
    """

    batch: int
    length: int
    cu_seqlens: Tensor
    max_seqlen: int
    source: Tensor | None = None
    target: Tensor | None = None
    live: Tensor | None = None
    starts: list[int] | None = None
    launched: bool = False

    def pack(self, x: Tensor) -> Tensor:
        """[batch, length, ...] -> [rows, ...]"""
        flat = x.reshape(self.batch * self.length, *x.shape[2:])
        return flat if self.source is None else flat[self.source]

    def unpack(self, rows: Tensor, fill: Tensor | None = None) -> Tensor:
        """[rows, dim] -> [batch, length, dim]; at padded positions exactly 0, or `fill` [1, dim]."""
        shape = (self.batch, self.length, rows.shape[1])
        if self.source is None:
            return rows.view(shape)
        if self.target is not None:
            return ops.unpack(rows, self.target, fill).view(shape)
        n = self.batch * self.length  # every row is live
        out = rows.new_zeros(n, rows.shape[1]) if fill is None else fill.repeat(n, 1)
        return out.index_copy_(0, self.source, rows).view(shape)

    def first(self) -> tuple[Tensor, Tensor | None]:
        """The row of each sequence's first token, and where there is one (None: everywhere); [batch] each."""
        starts = self.cu_seqlens[:-1].long()
        if self.source is None:
            return starts, None
        return starts.clamp(max=max(self.source.shape[0] - 1, 0)), self.cu_seqlens.diff() > 0

    def find(self, flat: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rows of flat padded positions [n], and which of them hold a token (None: all); [n] each."""
        if self.source is None:
            return flat, None
        if self.target is not None:
            row = self.target[flat]
            return row.clamp(min=0), row >= 0
        row = torch.searchsorted(self.source, flat).clamp(max=max(self.source.shape[0] - 1, 0))
        return row, self.source[row] == flat


def past_the_ops(device: torch.device) -> str | None:
    """Which of the ops' forms blocks may call as they are, "cpu" or "kernels"."""
    if not ops.is_unseen(device):
        return None
    return "kernels" if ops.runs_kernels(device) else "cpu" if device.type == "cpu" else None


def find_rows(keep: Tensor | None, batch: int, length: int, device: torch.device) -> Packing:
    """Locate the live tokens. keep: bool [batch, length], True at real tokens, anywhere; None when all are real."""
    return find_tokens(keep, batch, length, device, None, None)[0]


def find_tokens(
    keep: Tensor | None, batch: int, length: int, device: torch.device, ids: Tensor | None, positions: Tensor | None
) -> tuple[Packing, Tensor | None, Tensor | None]:
    """`find_rows`, and the ids and positions of the rows, [rows] each. ids: [batch, length]; positions: [1 or batch,
    length]."""
    exact = can_look(device) and not torch.jit.is_tracing()
    forms = past_the_ops(device)
    launched = forms == "kernels"
    if keep is None or (exact and bool(keep.all())):
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
        starts = [b * length for b in range(batch + 1)] if forms == "cpu" else None
        at = Packing(batch, length, cu_seqlens, length, starts=starts, launched=launched)
    elif exact:
        lengths = keep.sum(1, dtype=torch.int32)
        cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        source = keep.reshape(-1).nonzero().squeeze(1)
        starts = cu_seqlens.tolist() if forms == "cpu" else None
        at = Packing(batch, length, cu_seqlens, int(lengths.max()), source, starts=starts, launched=launched)
    else:
        cu_seqlens, source, target, *of_rows = ops.pack(keep, ids, positions)
        at = Packing(batch, length, cu_seqlens, length, source, target, live=cu_seqlens, launched=launched)
        return at, None if ids is None else of_rows[0], None if positions is None else of_rows[1]
    ids, positions = (None if x is None else at.pack(x.expand(batch, length)) for x in (ids, positions))
    return at, ids, positions
