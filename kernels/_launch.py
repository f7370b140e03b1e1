"""How a kernel is launched, and how it begins where its launch may overlap the kernel before it."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """Waits for the kernel before and all that it wrote, then lets the next one be launched. In this order none begins
    before the last but one has ended, so that whatever memory is taken again is free."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


INT32 = 2**31
LOOKED_AT = ("3.6.", "3.7.", "3.8.", "3.9.")  # versions of Triton whose launches are as `Launcher` makes them
Blocks = tuple[tuple[int, int], ...]
_device_of: Callable[[Tensor], int] = torch.Tensor.get_device  # -1 where there is none to launch on


@functools.cache
def launcher(kernel: Any, overlap: bool, blocks: Blocks = (), **constants: Any) -> "Launcher":
    """The one `Launcher` of a kernel with these constants."""
    return Launcher(kernel, overlap, blocks, constants)


class Launcher:
    """A kernel with its constants. launcher(grid, tensors, numbers) is kernel[grid](*tensors, *numbers, **constants).

    overlap: whether a launch may begin before the kernel before it has ended (CUDA's programmatic dependent launch).
    blocks: of the first tensors, [rows, columns], which the kernel gets as descriptors of such tiles.

    Triton looks at every argument of every call for what it has compiled for its kind, which takes longer than small
    kernels run. Here a call like one before, in what differs between calls of ours, starts what that one had compiled:
    a number is always of one type, and Triton's own settings count when a kind comes first. A tensor at an odd address,
    a number beyond int32, a profiler that wants to see each launch and a new version are left to Triton.
    """

    def __init__(self, kernel: Any, overlap: bool, blocks: Blocks, constants: dict[str, Any]):
        more = {"launch_pdl": True} if overlap else {}
        # products and sums in one step, whatever Triton's default is
        self.constants = constants | {"enable_fp_fusion": True, "OVERLAP": overlap} | more
        self.kernel, self.blocks = kernel, blocks
        # not interpreted, nor by a Triton that nobody has looked at
        self._is_known = isinstance(kernel, JITFunction) and triton.__version__.startswith(LOOKED_AT)
        self._specialised: Callable[[Sequence[float]], Any] | None = None  # picks the numbers that Triton compiles for
        self._compiled: dict[tuple, tuple] = {}

    def __call__(self, grid: tuple[int, ...], tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> None:
        device = _device_of(tensors[0])  # type: ignore[arg-type]
        at: list[Any] = [None if t is None else t.data_ptr() for t in tensors]
        addresses, runtime = 0, knobs.runtime
        for address in at:
            addresses |= address or 0
        if (
            device < 0
            or not self._is_known
            or addresses % 16
            or max(numbers, default=0) >= INT32
            or self.kernel.pre_run_hooks
            or getattr(runtime.launch_enter_hook, "calls", True)
            or getattr(runtime.launch_exit_hook, "calls", True)
        ):
            self._by_triton(grid, tensors, numbers)
            return
        if self._specialised is None:
            self._specialised = _specialised(self.kernel, len(tensors))
        kind = device, self._specialised(numbers), *[None if t is None else t.dtype for t in tensors]
        found = self._compiled.get(kind)
        if found is None:
            compiled = self._by_triton(grid, tensors, numbers)
            if isinstance(compiled, CompiledKernel):
                rest = tuple(self.constants[p.name] for p in self.kernel.params if p.is_constexpr)
                # with the kernel itself, for where the last one lets go of it Triton unloads the binary
                self._compiled[kind] = compiled.run, compiled.function, compiled.packed_metadata, rest, compiled
            return
        run, function, metadata, rest, _ = found
        for i, block in enumerate(self.blocks):
            at[i] = _tiles(tensors[i], block)  # type: ignore[arg-type]
        x, y = grid if len(grid) == 2 else (*grid, 1)
        stream = driver.active.get_current_stream(device)
        run(x, y, 1, stream, function, metadata, None, None, None, *at, *numbers, *rest)

    def _by_triton(self, grid: tuple[int, ...], tensors: Sequence[Any], numbers: Sequence[float]) -> Any:
        described = zip(tensors, self.blocks)  # noqa: B905
        tiles = [TensorDescriptor(t, [*t.shape], [t.shape[1], 1], [*block]) for t, block in described]
        return self.kernel[grid](*tiles, *tensors[len(tiles) :], *numbers, **self.constants)


def _specialised(kernel: Any, tensors: int) -> Callable[[Sequence[float]], Any]:
    given = [p for p in kernel.params if not p.is_constexpr]
    assert kernel.params[: len(given)] == given, f"{kernel.__name__} has a constant before an argument"
    found = [i for i, p in enumerate(given[tensors:]) if not p.do_not_specialize]
    return operator.itemgetter(*found) if found else lambda numbers: None


def _tiles(t: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """A contiguous [rows, columns] in tiles, without TensorDescriptor's own checks, for the driver has them, too."""
    new = object.__new__(TensorDescriptor)
    new.base, new.shape, new.strides, new.block_shape = t, t.shape, (t.shape[1], 1), block
    return new
