"""CUDA graphs of a model's padded forward: one launch where there were dozens, for batches small enough to gain by it.

Sizes are rounded up to buckets, so that few graphs serve every batch. That costs little: the number of live tokens is
read on the device, and what a bucket has more of is padding, which kernels skip.
"""

import threading
import warnings
from collections.abc import Callable
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

    Copies and pickles of a model start without graphs of their own.
    """

    def __init__(self, most: int = 64):
        self.most = most
        self._captured: dict[Any, _Graph | None] = {}
        self._weights: _Weights | None = None
        self._lock = threading.Lock()
        self._shared: Any = None
        self._done: torch.cuda.Event | None = None

    def __reduce__(self) -> tuple:
        return Graphs, (self.most,)

    def __call__(
        self,
        model: nn.Module,
        forward: Callable[[Tensor, Tensor], Tensor],
        input_ids: Tensor,
        keep: Tensor | None,
        longest: int,
        fixed: tuple,
    ) -> Tensor | None:
        """forward(ids, keep) by a graph, or None where none serves.

        input_ids: integers [B, L]; keep: bool [B, L] or None -> [B, L, dim]. longest: the model's positions. fixed:
        what else decides how the forward runs.
        """
        batch, length = input_ids.shape
        size = bucket(batch, length, longest)
        if size[0] * size[1] > MOST_TOKENS:
            return None
        with self._lock:
            weights = None if self._weights is None else self._weights.state()
            if self._weights is None or weights != self._weights.when_captured:
                # the graphs read memory that the model no longer owns
                self._captured.clear()
                self._weights = _Weights(model)
                self._shared = self._done = None  # they belong to a device, which the model may have left
            if not self._weights.is_plain():
                return None
            key = (size, fixed)
            after(self._done, input_ids)
            if key not in self._captured:
                if len(self._captured) >= self.most:
                    return None
                self._captured[key] = self._capture(forward, size, input_ids.device)
            graph = self._captured[key]
            return None if graph is None else self._replay(graph, input_ids, keep)

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
            try:
                replay, out, self._shared = capture(lambda: forward(ids, keep), device, self._shared)
            except RuntimeError as error:
                warnings.warn(f"no CUDA graph of a batch of {size[0]} x {size[1]}: {error}", stacklevel=4)
                return None
        return _Graph(ids, keep, replay, out)

    def _replay(self, graph: "_Graph", input_ids: Tensor, keep: Tensor | None) -> Tensor:
        batch, length = input_ids.shape
        graph.ids[:batch, :length] = input_ids
        if graph.keep.shape != input_ids.shape:
            graph.keep.zero_()
        graph.keep[:batch, :length] = True if keep is None else keep
        graph.replay()
        out = graph.out[:batch, :length].clone()
        if input_ids.is_cuda:
            self._done = torch.cuda.current_stream(input_ids.device).record_event(self._done)
        return out


def after(done: "torch.cuda.Event | None", ids: Tensor) -> None:
    """Lets the current stream wait: another may still use the memory that graphs share, or read what one left."""
    if done is not None and ids.is_cuda:
        torch.cuda.current_stream(ids.device).wait_event(done)


class _Graph:
    def __init__(self, ids: Tensor, keep: Tensor, replay: Callable[[], None], out: Tensor):
        self.ids, self.keep, self.replay, self.out = ids, keep, replay, out


class _Weights:
    """Where a model's tensors lie and what its modules compute: what a graph has fixed, compared at every call."""

    def __init__(self, model: nn.Module):
        self.parts = [(m, m.__dict__, m._parameters, m._modules) for m in model.modules()]
        self.when_captured = self.state()
        kinds = {type(module) for module in model.modules()}
        self.known = all(kind in PLAIN or kind.__module__.startswith("fastdistil.") for kind in kinds)
        self.watched = any(
            own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or "forward" in own
            for _, own, _, _ in self.parts
        )

    def is_plain(self) -> bool:
        """Whether state() sees all that the model computes: only known modules, without hooks."""
        return self.known and not self.watched and not torch.nn.modules.module._has_any_global_hook()

    def state(self) -> list[Any]:
        found: list[Any] = []  # in one list, for a graph's replay takes less time than a careless walk
        for module, own, parameters, children in self.parts:
            found += (
                *(type(module).forward, "forward" in own, own.get("eps"), own.get("activation"), own.get("n_heads")),
                *(own["training"], own.get("scaling"), own.get("norm_first")),
                *(len(own["_forward_hooks"]), len(own["_forward_pre_hooks"]), len(own["_backward_hooks"])),
                *map(id, children.values()),
            )
            for p in parameters.values():
                found += (None,) if p is None else (p.data_ptr(), p.dtype, p.stride(), p.numel())
        return found


def state_of(model: nn.Module) -> tuple | None:
    """What a graph of a model would have fixed inside it, or None where that cannot be told."""
    weights = _Weights(model)
    return tuple(weights.when_captured) if weights.is_plain() else None


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
