"""Define an op once: eager definition, faster forms per device, output shape for tracing, autocast. And whether a call
may look at values.

`torch.library`'s low-level define/impl is used because a call through it costs less than through
`custom_op`, and it works in eager, `torch.compile(fullgraph=True)` and `torch.export`.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, peek_interpreter_stack

SEEING = (TransformType.Grad, TransformType.Jvp)  # transforms within which a tensor's values can be read
_LIBRARY = torch.library.Library("fastdistil", "DEF")
FORMS: dict[str, dict[str, Callable[..., Any]]] = {}  # op -> device -> what runs; `fastdistil doctor` prints it


def can_look(device: torch.device) -> bool:
    """Whether values may be read: on CPU, unless a compiler traces the call, or torch.func does, or batches it."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not is_transformed() or all(one.key() in SEEING for one in get_interpreter_stack() or ())


def is_transformed() -> bool:
    """Whether the call is within a transform of torch.func."""
    return peek_interpreter_stack() is not None


def is_one_of(shape: Sequence[int], *allowed: Sequence[int]) -> bool:
    """Whether a shape is one of those, number by number: to Dynamo a tuple of symbols is never one of numbers."""
    return any(len(shape) == len(one) and all(a == b for a, b in zip(shape, one, strict=True)) for one in allowed)


def is_exported_to_onnx() -> bool:
    """Whether torch.onnx traces the call; ONNX has none of our ops."""
    onnx = sys.modules.get("torch.onnx")  # to import it takes long, and another thread may be about it
    try:
        return getattr(onnx, "is_in_onnx_export", bool)()
    except (AttributeError, ImportError):  # it imports what it asks, which a signal's handler may find half done
        return False


# what torch.compiler.assume_constant_result does, which imports the compiler: Dynamo cannot see inside, and keeps apart
# what it compiles within a transform
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]
is_exported_to_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]


def register(
    reference: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    autocast: str | Callable[..., Any] | None,
) -> Callable[..., Any]:
    """Register `fastdistil::<reference.__name__>` and return the callable op.

    reference: the definition in `reference.py`, used on every device that has no form of its own.
    fake: returns an empty tensor of the result's shape, dtype and strides.
    autocast: how autocast casts floating-point inputs, see `by_autocast`, or what it runs in the op's place; None: it
    leaves the op alone.
    """
    name = reference.__name__
    forms = {"CPU": cpu or reference, "CUDA": cuda or reference}
    _LIBRARY.define(name + torch.library.infer_schema(reference, mutates_args=()))
    for device, form in forms.items():
        _LIBRARY.impl(name, form, device)
    torch.library.register_fake(f"fastdistil::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.fastdistil, name).default
    if autocast is not None:
        for device in forms:
            form = _autocast_form(op, device.lower(), autocast) if isinstance(autocast, str) else autocast
            _LIBRARY.impl(name, form, f"Autocast{device}")
    FORMS[name] = {device.lower(): form for device, form in forms.items()}
    return op


def by_autocast(kind: str, device: str, *values: Any) -> list[Any]:
    """The values, tensors cast as autocast casts them: with "compute" to its dtype; with "float32" to float32 on CUDA
    and to the widest of their dtypes on CPU, where autocast leaves a LayerNorm alone. float64 stays as it is."""

    def is_cast(value: Any) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point() and value.dtype is not torch.float64

    if kind == "compute":
        dtype = torch.get_autocast_dtype(device)
    elif device == "cuda":
        dtype = torch.float32
    else:
        dtype = functools.reduce(torch.promote_types, [v.dtype for v in values if is_cast(v)], torch.uint8)
    return [v.to(dtype) if is_cast(v) else v for v in values]


def _autocast_form(op: Callable[..., Tensor], device: str, kind: str) -> Callable[..., Tensor]:
    def autocast_form(*args: Any) -> Tensor:  # by position, however they were given
        values = by_autocast(kind, device, *args)
        with torch.autocast(device, enabled=False):
            return op(*values)

    return autocast_form
