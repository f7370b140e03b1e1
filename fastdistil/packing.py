"""Padded `[batch, length]` <-> packed rows, without reading anything back from the device.

On CPU in eager mode the rows are exactly the live tokens. On CUDA, and whenever a call is traced, the capacity is
`batch * length`, a number the host knows; how many rows are live stays on the device in `cu_seqlens[-1]`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, peek_interpreter_stack

SEEING = (TransformType.Grad, TransformType.Jvp)  # transforms within which a tensor's values can be read


def can_look(device: torch.device) -> bool:
    """Whether values may be read: on CPU, unless a compiler traces the call, or torch.func does, or batches it."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not is_transformed() or all(one.key() in SEEING for one in get_interpreter_stack() or ())


def is_transformed() -> bool:
    """Whether the call is within a transform of torch.func."""
    return peek_interpreter_stack() is not None


# what torch.compiler.assume_constant_result does, which imports the compiler: Dynamo cannot see inside, and keeps apart
# what it compiles within a transform
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


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

    def unpack(self, rows: Tensor, fill: Tensor | None = None) -> Tensor:
        """[rows, ...] -> [batch, length, ...]; at padded positions exactly 0, or `fill` [1, ...]."""
        shape = (self.batch, self.length, *rows.shape[1:])
        if self.source is None:
            return rows.view(shape)
        n = self.batch * self.length
        if self.target is None:  # every row is live
            out = rows.new_zeros(n, *rows.shape[1:]) if fill is None else fill.repeat(n, *[1] * (rows.dim() - 1))
            return out.index_copy_(0, self.source, rows).view(shape)
        padded = (self.target < 0).view(-1, *[1] * (rows.dim() - 1))
        out = rows[self.target.clamp(min=0)]
        if fill is None:
            return out.masked_fill_(padded, 0).view(shape)
        again = not (out.requires_grad or fill.requires_grad)  # vocabulary-wide logits are not held twice
        return torch.where(padded, fill, out, out=out if again else None).view(shape)

    def first(self) -> tuple[Tensor, Tensor | None]:
        """The row of each sequence's first token, and where there is one (None: everywhere); [batch] each."""
        starts = self.cu_seqlens[:-1].long()
        if self.source is None:
            return starts, None
        return starts.clamp(max=max(len(self.source) - 1, 0)), self.cu_seqlens.diff() > 0

    def find(self, flat: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rows of flat padded positions [n], and which of them hold a token (None: all); [n] each."""
        if self.source is None:
            return flat, None
        if self.target is not None:
            row = self.target[flat]
            return row.clamp(min=0), row >= 0
        row = torch.searchsorted(self.source, flat).clamp(max=max(len(self.source) - 1, 0))
        return row, self.source[row] == flat


def find_rows(keep: Tensor | None, batch: int, length: int, device: torch.device) -> Packing:
    """Locate the live tokens. keep: bool [batch, length], True at real tokens, anywhere; None when all are real."""
    exact = can_look(device) and not torch.jit.is_tracing()
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
