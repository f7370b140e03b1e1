"""Linear layers in int8 for CPUs with VNNI: weights are rounded once, rows as they come, and sums are exact.

What LLM.int8() (Dettmers et al., 2022) calls vector-wise quantisation: one scale for a row of x, one for a row of the
weights. For inference only; other devices and processors compute the same numbers by a float32 product.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor
from torch.autograd import forward_ad

from fastdistil import cpu, reference

# Rows at a time, so that what is between the steps stays in a core's cache; measured: the quickest of 128 to 4,096.
BLOCK = 512
SMALLEST = 1e-36  # of a row's largest element: a row of zeros has a scale, too
MOST_TERMS = 2**31 // 127**2  # that an int32 can add up; and torch's product of one term is wrong (2.13)


class Int8Linear(nn.Module):
    """x @ (scale * weight).T + bias with x rounded to 255 steps a row; inference only.

    weight: int8 [out, in], scale: float32 [out], bias: float32 [out], whatever the model is cast to. x: floating point
    [..., in] -> [..., out]. Raises ValueError for another width, RuntimeError where a gradient is asked for.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, bias = linear.weight.detach().contiguous(), linear.bias.detach()
        self.register_buffer("weight", torch.empty(weight.shape, dtype=torch.int8, device=weight.device))
        self.register_buffer("scale", torch.empty_like(bias, dtype=torch.float32))
        self.register_buffer("bias", bias.float().clone())
        rows = max(1, cpu.ALONE // max(1, self.in_features))  # by this thread alone: see `cpu.copy_alone`
        for part, values, scale in zip(*(t.split(rows) for t in (weight, self.weight, self.scale)), strict=True):
            rounded, steps = quantize(part.float(), _round_alone)
            values.copy_(rounded)
            scale.copy_(steps[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x is [..., {x.shape[-1]}], the layer takes [..., {self.in_features}]")
        return apply((self,), x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        exact = self.scale, self.bias
        super()._apply(fn, recurse)
        if self.scale.dtype is not torch.float32:
            self.scale, self.bias = (t.to(self.weight.device) for t in exact)
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *more: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.dtype is not torch.int8:
            more[-1].append(f"{prefix}weight is {weight.dtype}, the model's is int8; load the file by from_pretrained")
            return
        super()._load_from_state_dict(state_dict, prefix, *more)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def quantize(x: Tensor, round_: Callable[[Tensor], Tensor] = Tensor.round_) -> tuple[Tensor, Tensor]:
    """x: float32 [rows, in] -> whole numbers from -127 to 127, still float32, and each row's scale [rows, 1]."""
    largest = torch.maximum(x.amax(1, keepdim=True), x.amin(1, keepdim=True).neg()).clamp(min=SMALLEST)
    return round_(x * (127 / largest)), largest / 127


def _round_alone(x: Tensor) -> Tensor:
    for piece in x.view(-1).split(2**11):  # torch's rounding shares out what is longer
        piece.round_()
    return x


def apply(layers: Sequence[Int8Linear], x: Tensor, activation: str | None = None) -> Tensor:
    """activation(layer(x)) of layers side by side: [rows, in] -> [rows, out of all], in x's dtype."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError("int8 weights pass no gradient on; load the model in float32 to train it")
    rows, traced = x.float(), torch.compiler.is_compiling() or torch.jit.is_tracing()
    if not traced:
        dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None
        if dual or is_batchedtensor(x):
            raise RuntimeError(
                "int8 weights pass no tangent on and nothing that vmap batches; load the model in float32"
            )
    if not traced and x.is_cpu and 1 < x.shape[1] <= MOST_TERMS and cpu.sums_int8():
        return _in_blocks(layers, rows, activation).to(x.dtype)
    q, scale = quantize(rows)
    y = torch.cat([F.linear(q, layer.weight.float()) * scale * layer.scale + layer.bias for layer in layers], dim=1)
    return (y if activation is None else reference.ACTIVATIONS[activation](y)).to(x.dtype)


def _in_blocks(layers: Sequence[Int8Linear], x: Tensor, activation: str | None) -> Tensor:
    out = x.new_empty(len(x), sum(layer.out_features for layer in layers))
    for part, y in zip(x.split(BLOCK), out.split(BLOCK), strict=True):
        rows = len(part)
        values, scale = quantize(part)
        q = x.new_empty(cpu.grid(rows), x.shape[1], dtype=torch.int8)  # rows of no meaning behind: see `cpu.grid`
        q[:rows].copy_(values)
        for layer, columns in zip(layers, y.split([layer.out_features for layer in layers], dim=1), strict=True):
            columns.copy_(torch._int_mm(q, layer.weight.T)[:rows]).mul_(scale)
            torch.addcmul(layer.bias, columns, layer.scale, out=columns)
        if activation is not None:
            cpu.activate_(y, activation)
    return out


def convert(model: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Replace the Linears in the blocks by int8 ones, in place; the model's other weights lose their gradients only."""
    for block in blocks:
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, name, Int8Linear(child))
            if hasattr(module, "_qkv"):
                module._qkv = None  # type: ignore[assignment]  # which holds what the Linears were made of
    model.requires_grad_(False)
