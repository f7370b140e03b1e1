"""Weights of three Linears side by side in one buffer, so that one GEMM can read them.

They stay three ordinary Linears, whose parameters happen to be neighbours in memory. Nothing is copied, so nothing can
go stale.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from fastdistil import cpu
from fastdistil.plain import is_plain

_use_count = getattr(torch._C, "_storage_Use_Count", None)


def _holders(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    return _use_count(storage._cdata) if _use_count is not None else 2**31


_ALONE = _holders(torch.empty(1))


def is_alone(tensor: Tensor) -> bool:
    """Whether nothing else holds the tensor's memory."""
    if tensor.is_meta or tensor.layout is not torch.strided or not tensor.numel():
        return False
    return tensor.untyped_storage().nbytes() == tensor.nbytes and _holders(tensor) <= _ALONE


def are_thirds(buffers: tuple[Tensor, Tensor], *parts: tuple[Tensor, Tensor]) -> bool:
    """Whether the parts, (weight, bias) each, are the buffers' memory, one after another."""
    for i, buffer in enumerate(buffers):
        start, step, size = buffer.data_ptr(), buffer.nbytes // 3, buffer.numel() // 3
        for part in parts:
            tensor = part[i]
            if tensor.data_ptr() != start or tensor.numel() != size or not tensor.is_contiguous():
                return False
            start += step
    return True


def lie(buffers: tuple[Tensor, Tensor], linears: Sequence[nn.Linear]) -> bool:
    """Whether the linears' weights and biases, as they are now, are the buffers' memory."""
    parts = [(one.weight, one.bias) for one in linears]
    if any(is_functorch_wrapped_tensor(tensor) for part in parts for tensor in part):
        return False
    return are_thirds(buffers, *parts)


def are_alone(linears: Sequence[nn.Module]) -> bool:
    """Whether all have a weight and a bias whose memory is theirs alone."""
    tensors = [getattr(one, name, None) for one in linears for name in ("weight", "bias")]
    return all(isinstance(t, Tensor) and type(t.data) is Tensor and is_alone(t) for t in tensors)


@torch.no_grad()
def lay(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor] | None:
    """Move the three weights (and biases) into one buffer, each keeping a storage of its own.

    Linears [in, out] x 3 -> the buffers [3 * out, in] and [3 * out]; None where they are not plain or not alike.
    """
    if not all(map(is_plain, linears)) or torch.compiler.is_compiling():
        return None
    tensors = [p for one in linears for p in (one.weight, one.bias)]
    device = tensors[0].device
    if (
        len({(t.dtype, t.device) for t in tensors}) > 1
        or any(type(t) is not nn.Parameter or type(t.data) is not Tensor for t in tensors)
        or device.type not in ("cpu", "cuda")
        or (device.type == "cpu" and any(t.is_shared() for t in tensors))  # shared with other processes
    ):
        return None
    buffers = []
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()  # from_dlpack wants it so
    # what is made in inference mode could not be trained afterwards
    with current, torch.inference_mode(any(t.is_inference() for t in tensors)):
        for name in ("weight", "bias"):
            own = [getattr(one, name).data for one in linears]
            buffer = own[0].new_empty(sum(map(len, own)), *own[0].shape[1:])
            for one, piece, values in zip(linears, buffer.chunk(3), own, strict=True):
                cpu.copy_alone(piece, values)
                getattr(one, name).data = torch.from_dlpack(piece)
            buffers.append(buffer)
    return buffers[0], buffers[1]
