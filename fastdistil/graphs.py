"""CUDA graphs of a model's padded forward: one launch where there were dozens, for batches small enough to gain by it.

Sizes are rounded up to buckets, so that few graphs serve every batch. That costs little: the number of live tokens is
read on the device, and what a bucket has more of is padding, which kernels skip.
"""

import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

MOST_TOKENS = 16_384  # by estimate, not measured: a larger batch keeps the GPU busy for longer than its launches take
LENGTH_STEP = 32
# what state() sees through, the parts of adapters that lie beside the graph among them
PLAIN = (
    *(nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.ModuleList),
    *(nn.ModuleDict, nn.Sequential, nn.ReLU, nn.SiLU, nn.GELU, nn.Tanh),
    *(nn.Sigmoid, nn.Identity),
)


def bucket(batch: int, length: int, longest: int) -> tuple[int, int]:
    """The batch as the next power of two, the length as the next multiple of 32, at most `longest`."""
    return 1 << (batch - 1).bit_length(), min(-(-length // LENGTH_STEP) * LENGTH_STEP, longest)


class Graphs:
    """The graphs captured of one model, by bucket and by all that a graph has fixed inside it.

    A call is first launched and then checked, while the device computes: whether the arguments are right, and whether
    the model still is what was captured. If it is not, nobody sees the result. What the graphs read stays allocated
    until then. Copies and pickles of a model start without graphs of their own.
    """

    def __init__(self, most: int = 64):
        self.most = most
        self._captured: dict[Any, _Graph | None] = {}
        self._weights: Snapshot | None = None
        self._lock = threading.RLock()  # a warning of ours may be handled by whoever moves the model
        self._shared: Any = None
        self._done: torch.cuda.Event | None = None
        self._ahead = False  # the last call was served: this one may be launched before it is checked

    def __reduce__(self) -> tuple:
        return Graphs, (self.most,)

    def __call__(
        self,
        model: nn.Module,
        forward: Callable[[Tensor, Tensor, Tensor], Tensor],
        input_ids: Tensor,
        mask: Tensor | None,
        longest: int,
        fixed: tuple,
        check: Callable[[], bool],
        can_capture: Callable[[], bool],
    ) -> Tensor | None:
        """forward(ids, keep, positions) by a graph, or None where none serves.

        input_ids: integers [B, L]; mask: [B or 1, L], nonzero at real tokens, or None -> [B, L, dim], or [B, dim] where
        the forward gives that. longest: the model's positions. fixed: what else decides how the forward runs. check:
        whether this call may be answered by a graph; raises where an argument is wrong. can_capture: whether the
        model's forward is the one to capture.
        """
        batch, length = input_ids.shape
        size = bucket(batch, length, longest)
        if length > longest or size[0] * size[1] > MOST_TOKENS:
            return None
        key = (size, fixed)
        with self._lock:
            ahead, self._ahead = self._captured.get(key) if self._ahead else None, False
            if ahead is not None and ahead.ids.device != input_ids.device:
                ahead = None  # which is an error
            out = None if ahead is None else self._replay(ahead, input_ids, mask)
            if not check():
                return None
            if self.is_stale():
                self._forget()
            if self._weights is None:
                self._weights = Snapshot(model)
            if not self._weights.is_plain():
                return None
            if key not in self._captured:
                if len(self._captured) >= self.most:
                    return None
                after(self._done, input_ids)
                self._captured[key] = self._capture(forward, size, input_ids.device) if can_capture() else None
            graph = self._captured.get(key)
            if graph is None:
                return None
            self._weights.hold()
            if graph is not ahead:
                out = self._replay(graph, input_ids, mask)
            self._ahead = True
            return out

    def is_stale(self) -> bool:
        """Whether the model is no longer what was captured."""
        return self._weights is not None and self._weights.state() != self._weights.when_captured

    def forget_if_stale(self) -> None:
        """Free what the graphs hold, if they can serve no more."""
        with self._lock:
            if self.is_stale():
                self._forget()

    def _forget(self) -> None:
        if self._done is not None:
            self._done.synchronize()  # what is freed here may be written to until then
        self._captured.clear()
        self._weights = self._shared = self._done = None  # they belong to a device, which the model may have left

    def captured(self, batch: int, length: int) -> bool:
        """Whether a batch of this size is replayed."""
        return any(
            graph is not None and size[0] >= batch and size[1] >= length for (size, _), graph in self._captured.items()
        )

    def _capture(self, forward: Callable, size: tuple[int, int], device: torch.device) -> "_Graph | None":
        # tensors made in inference mode could not be written to outside it
        with torch.inference_mode(False), torch.no_grad():
            ids = torch.zeros(size, dtype=torch.int64, device=device)
            keep = torch.ones(size, dtype=torch.bool, device=device)
            positions = torch.arange(size[1], device=device)[None]
            try:
                replay, out, self._shared = capture(lambda: forward(ids, keep, positions), device, self._shared)
            except RuntimeError as error:
                warnings.warn(f"no CUDA graph of a batch of {size[0]} x {size[1]}: {error}", stacklevel=4)
                return None
        return _Graph(ids, keep, positions, replay, out)

    def _replay(self, graph: "_Graph", input_ids: Tensor, mask: Tensor | None) -> Tensor:
        batch, length = input_ids.shape
        after(self._done, input_ids)
        graph.ids[:batch, :length] = input_ids
        if graph.keep.shape != input_ids.shape:
            graph.keep.zero_()
        graph.keep[:batch, :length] = True if mask is None else mask  # nonzero is True
        graph.replay()
        out = (graph.out[:batch, :length] if graph.out.dim() == 3 else graph.out[:batch]).clone()
        if input_ids.is_cuda:
            self._done = torch.cuda.current_stream(input_ids.device).record_event(self._done)
        return out


def after(done: "torch.cuda.Event | None", ids: Tensor) -> None:
    """Lets the current stream wait: another may still use the memory that graphs share, or read what one left."""
    if done is not None and ids.is_cuda:
        torch.cuda.current_stream(ids.device).wait_event(done)


@dataclass(frozen=True)
class _Graph:
    """What replays, and the memory that it reads and writes."""

    ids: Tensor
    keep: Tensor
    positions: Tensor
    replay: Callable[[], None]
    out: Tensor


# what a module's forward goes by beside its tensors and children
SETTINGS = ("activation", "approximate", "eps", "max_norm", "n_heads", "norm_first", "scaling")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


class Snapshot:
    """Where a model's tensors lie and what its modules compute: what a graph has fixed, compared at every call."""

    def __init__(self, model: nn.Module):
        self.root = weakref.ref(model)  # which holds its graphs, and them this
        modules = list(model.modules())
        self.modules = modules[1:]
        self.kinds: list[Any] = [*{type(module) for module in modules}]
        self.known = all(kind in PLAIN or kind.__module__.startswith("fastdistil.") for kind in self.kinds)
        self.own: list[dict[str, Any]] = [module.__dict__ for module in self.modules]
        self.settings = [(own, name) for own in self.own for name in SETTINGS if name in own]
        self.children = [module._modules for module in modules]
        self.parameters = [module._parameters for module in modules]
        self.held: list[Tensor] = []
        # tensors of tensors have no address of their own
        self.known &= not any(hasattr(type(p), "__tensor_flatten__") for p in self._tensors())
        self.when_captured = self.state()

    def hold(self) -> None:
        """Keep the memory that a replay reads which is launched before all this is compared."""
        self.held = self.held or [p.detach() for p in self._tensors()]

    def is_plain(self) -> bool:
        """Whether state() sees all that the model computes: only known modules, without hooks."""
        every = [self.root().__dict__, *self.own]
        watched = any("forward" in own or own[hooks] for own in every for hooks in HOOKS)
        return self.known and not watched and not torch.nn.modules.module._has_any_global_hook()

    def state(self) -> list[Any]:
        root: Any = self.root()
        tensors = self._tensors()
        return [  # lists by map, for a graph's replay takes less time than a careless walk
            [type(root), *map(type, self.modules)],
            [getattr(kind, "forward", None) for kind in self.kinds],
            [root.training, *(own["training"] for own in self.own)],
            [own.get(name) for own, name in self.settings],
            [*map(id, chain.from_iterable(map(dict.values, self.children)))],
            [*map(Tensor.data_ptr, tensors)],
            [*map(Tensor.stride, tensors)],
            [*map(Tensor.numel, tensors)],
            [p.dtype for p in tensors],
        ]

    def _tensors(self) -> list[Tensor]:
        return [p for of_module in self.parameters for p in of_module.values() if p is not None]


def can_capture(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()


def capture(run: Callable[[], Tensor], device: torch.device, shared: Any) -> tuple[Callable[[], None], Tensor, Any]:
    """-> (what replays `run`, the tensor its result is in, what captures share: a memory pool, and the stream within
    which alone the allocator uses its memory again). Graphs that share must be replayed one after another."""
    with torch.cuda.device(device):
        before = torch.cuda.current_stream()
        pool, side = shared or (None, torch.cuda.Stream())
        side.wait_stream(before)
        try:
            with torch.cuda.stream(side):
                for _ in range(2):  # compiles the kernels and starts the libraries, which a capture must not
                    run()
        finally:
            before.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # a library's workspace belongs to the graph, which goes on using it, and to nobody else
        forget = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
        forget()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                out = run()
        finally:
            torch.cuda.set_stream(before)  # which a capture that failed leaves at its own
            forget()
    return graph.replay, out, (graph.pool() if pool is None else pool, side)
