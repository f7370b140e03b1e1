"""Whether modules compute what their classes say, so that fused ops may take their weights instead of calling them.

What users put in a part's place, patch, hook or trace is called as it is; everything here errs on that side.
"""

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _every_module
from torch.utils.hooks import RemovableHandle

from fastdistil.int8 import Int8Linear

# config's activation -> the module that computes it
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_new": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}
# what classes computed when this was imported; our own are added below
AS_WRITTEN: dict[Any, Any] = {
    kind: kind.forward
    for kind in (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.GELU, nn.ReLU, nn.SiLU, Int8Linear)
}
_KINDS = (
    *(nn.GELU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU),
    *(nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid, nn.Identity),
)
ELEMENTWISE = {kind.forward for kind in _KINDS}
FUNCTIONS = (F.gelu, F.relu, F.silu, F.mish, F.elu, F.leaky_relu, F.softplus, torch.relu, torch.tanh, torch.sigmoid)
_ROW_BY_ROW = {kind.forward for kind in (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Identity, Int8Linear)}
_OF_ROWS = ("torch.ao.nn.", "torchao.", "peft.", "bitsandbytes.")  # whose layers in a Linear's place are like it
_UNHOOKED: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()


def is_as_written(kind: type[nn.Module]) -> bool:
    """Whether nobody has put another forward into the class."""
    return AS_WRITTEN.get(kind) is kind.forward


def is_touched(module: nn.Module) -> bool:
    """Whether its forward was replaced, or has a hook."""
    state = module.__dict__
    return "forward" in state or bool(state["_forward_hooks"] or state["_forward_pre_hooks"])


def is_ours(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    return type(module) is kind and is_as_written(kind) and "forward" not in module.__dict__


def is_off(dropout: Any) -> bool:
    return is_ours(dropout, nn.Dropout) and not dropout.training and not is_touched(dropout)


def is_plain(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether `module` computes just what its class says, so that a fused op may take its weights."""
    return (
        type(module) is kind
        and is_as_written(kind)
        and module.bias is not None
        and not is_packed_otherwise(module.weight)
        and not (is_touched(module) or module._backward_hooks)
        and not (_every_module._global_forward_hooks or _every_module._global_forward_pre_hooks)
    )


def is_packed_otherwise(weight: Any) -> bool:
    """Whether a weight is a tensor of tensors, as torchao's quantised and torch's distributed ones are."""
    return hasattr(type(weight), "__tensor_flatten__")


def weights_of(modules: Iterable[Any], kind: type[nn.Module], like: Tensor) -> list[tuple[Tensor, Tensor]] | None:
    """Each one's weight and bias, where all are plain, see `is_plain`, and these ordinary ones of a tensor's dtype and
    device."""
    if not is_as_written(kind):
        return None
    found: list[tuple[Tensor, Tensor]] = []
    dtype, device = like.dtype, like.device
    for module in modules:
        if type(module) is not kind or is_touched(module):
            return None
        state = module.__dict__
        if "weight" in state or "bias" in state:  # an attribute comes before a parameter
            return None
        parameters = state["_parameters"]
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if not (type(weight) is type(bias) is nn.Parameter and weight.dtype is bias.dtype is dtype):
            return None
        if weight.device != device or bias.device != device:
            return None
        if not weight.layout is bias.layout is torch.strided:
            return None
        if weight.is_neg() or bias.is_neg():  # a view whose numbers are not what its memory says
            return None
        found.append((weight, bias))
    return found


def are_of(leaf: tuple[Tensor, Tensor], *shape: int) -> bool:
    return leaf[0].shape == shape and leaf[1].shape == shape[:1]


def is_of_rows(kind: Any) -> bool:
    """Whether modules of a class give each row of [rows, dim] what they give it in [batch, length, dim]; of somebody's
    own nobody knows."""
    return getattr(kind, "forward", None) in _ROW_BY_ROW or kind.__module__.startswith(_OF_ROWS)


def acts_on_rows(module: Any) -> bool:
    """The same of a module, which may be None, patched or hooked."""
    return module is not None and not is_touched(module) and is_of_rows(type(module))


def is_elementwise(activation: Any) -> bool:
    """Whether an activation, ours or what somebody put in its place, looks at one number at a time."""
    if not isinstance(activation, nn.Module):
        return activation in FUNCTIONS
    kind = type(activation)
    known = kind.forward in ELEMENTWISE or kind.__module__ == "transformers.activations"
    return known and not is_touched(activation)


def activation_of(module: Any) -> str | None:
    """What the fused ops call an activation, where they have it."""
    kind = type(module)
    if kind not in (nn.GELU, nn.ReLU, nn.SiLU) or not is_as_written(kind) or is_touched(module):
        return None
    if kind is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_new"}.get(module.approximate)
    return "relu" if kind is nn.ReLU else "silu"


def is_hooked(model: nn.Module, blocks: nn.ModuleList) -> bool:
    """Whether a module inside has a forward hook, which is to see [batch, length, dim].

    The scan takes as long as a small op, so it is made only where a hook was registered, or a block or a part of one
    replaced, since the last one.
    """
    if torch.compiler.is_compiling():
        return _scan(model)
    parts = (id(part) for block in blocks for part in (block, *block._modules.values()))
    registered = (RemovableHandle.next_id, *parts)
    if _UNHOOKED.get(model) == registered:
        return False
    if _scan(model):
        return True
    _UNHOOKED[model] = registered
    return False


def _scan(model: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if m is not model)


def to_eval(module: nn.Module) -> None:
    """`eval()` where it changes something: to see that it does not takes far less time, which a query feels."""
    parts = [module]
    for part in parts:  # which grows
        if part.training:
            module.eval()
            return
        parts.extend(child for child in part._modules.values() if child is not None)
