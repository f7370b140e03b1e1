"""Batches through a model: every core on CPU; staged copies, captured graphs and no waiting on CUDA.

Lengths are known on the host, so nothing is read back to find them. On CUDA a batch is gathered into pinned memory,
copied on a stream of its own, computed, and its result copied back on a third, while the host prepares the next ones.
"""

import functools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastdistil import cpu, ops
from fastdistil.engine.scheduler import CPU_BUDGET, Batch, Window, batches, cuda_budget
from fastdistil.graphs import Snapshot, after, can_capture, capture

logger = logging.getLogger("fastdistil")

MOST_WORKERS = 16  # each holds the activations of a batch
LONGEST_START = 60.0  # seconds that a worker waits for the others
LONGEST_END = 1.0  # seconds
WORTH_PREPARING = 2**13  # tokens a thread; all threads laid MiniLM's weights out in 7 ms, for a gain of 3 % of the run
WORTH_A_WORKER = 512  # fewer tokens a thread are quicker with all threads on one batch
SLOTS = 4  # batches in flight on CUDA
ALIGNED = 64  # int32 elements
MOST_GRAPHS = 64
SMALLEST_GRAPH = 256, 16, 16  # tokens, sequences, longest: sizes below share a graph
FULL = 0.9  # of a budget: what is left of it may be computed, too

Compute = Callable[[Tensor, Tensor, int, Tensor, np.ndarray, bool], Tensor]  # see Engine.run


_NONE = np.empty(0, np.int64)


class Done(NamedTuple):
    """The result of some sequences of a window, on the CPU, or why there is none."""

    window: Window
    rows: np.ndarray
    result: Tensor | None
    error: str | None = None


@dataclass
class Stages:
    """Where a run's seconds went, as seen by the thread that drives it."""

    seconds: dict[str, float] = field(default_factory=dict)
    tokens: int = 0

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def bottleneck(self) -> str | None:
        """The stage that the others waited for longest."""
        return max(self.seconds, key=self.seconds.__getitem__, default=None)


class Engine:
    """Runs windows of token ids through a function of packed batches, within a budget of tokens a batch.

    Where memory runs out the budget is halved and the batch divided; a sequence that does not fit alone fails alone.
    """

    def __init__(
        self,
        device: torch.device,
        budget: int,
        graphs: "GraphCache | None" = None,
        stages: Stages | None = None,
    ):
        self.device, self.budget, self.graphs = device, budget, graphs
        self.stages = Stages() if stages is None else stages

    def run(
        self,
        windows: Iterable[Window],
        compute: Compute,
        *,
        key: Any = None,
        prepare: Callable[[], cpu.Prepared] = dict,
    ) -> Iterator[Done]:
        """Results batch by batch, in no order; of a window without sequences one that is empty.

        compute: (ids int32 [tokens], cu_seqlens int32 [batch + 1], longest, positions int32 [tokens], numbers of the
        sequences, whether no token is dead or hardly any) to a tensor, all on the device; longest may be more than the
        model has positions. key: what else than shapes decides what is computed, hashable; with it CUDA graphs may be
        replayed, so that compute must then give a row a sequence and not look at their numbers. prepare: weights for
        `cpu.using`, made for each window of many tokens; what is written to weights meanwhile counts from the next on.
        """
        windows = self._timed(windows)
        if self.device.type == "cpu":
            for window in windows:
                if not len(window.lengths):
                    yield Done(window, _NONE, None)
                yield from self._on_all_cores(window, compute, prepare)
        else:
            yield from self._staged(windows, compute, key)

    def _timed(self, windows: Iterable[Window]) -> Iterator[Window]:
        iterator = iter(windows)
        while True:
            with self.stages.timed("tokenizer"):
                window = next(iterator, None)
            if window is None:
                return
            self.stages.tokens += len(window.ids)
            yield window

    # --- CPU ------------------------------------------------------------------------------------------------------

    def _on_all_cores(
        self, window: Window, compute: Compute, prepare: Callable[[], cpu.Prepared] = dict
    ) -> Iterator[Done]:
        tokens, threads = len(window.ids), torch.get_num_threads()
        prepared: cpu.Prepared = {}

        def one(rows: np.ndarray) -> list[Done]:
            fitting = self._fitting(window, rows, lambda batch: self._compute(compute, batch), prepared)
            return cpu.using(prepared, lambda: list(fitting))

        if tokens > self.budget:
            cpu.keep_freed_memory()
        if threads == 1 or tokens < threads * WORTH_A_WORKER:
            if tokens >= threads * WORTH_PREPARING:
                prepared |= self._prepared(prepare)
            for rows in batches(window.lengths, self.budget):
                with self.stages.timed("model"):
                    done = one(rows)
                yield from done
            return
        on, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")  # which a thread does not inherit

        def there(rows: np.ndarray) -> list[Done]:
            with torch.autocast("cpu", dtype, enabled=on):
                return one(rows)

        # a batch a thread beats every thread on one batch, for no op waits for its slowest thread
        with cpu_workers(threads) as (pool, workers):
            if tokens >= workers * WORTH_PREPARING:
                # by a worker: this thread would start an OpenMP team, which a forked process lacks
                prepared |= pool.submit(self._prepared, prepare).result()
            rounds = -(-tokens // (self.budget * workers))
            even = min(self.budget, -(-tokens // (rounds * workers)) + 1)
            results = pool.map(there, batches(window.lengths, even))
            while True:
                with self.stages.timed("model"):
                    found = next(results, None)
                if found is None:
                    return
                yield from found

    @staticmethod
    def _prepared(prepare: Callable[[], cpu.Prepared]) -> cpu.Prepared:
        try:
            return prepare()
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            return {}

    def _compute(self, compute: Compute, batch: Batch) -> Tensor:
        ids, cu_seqlens, positions = map(torch.from_numpy, (batch.ids, batch.cu_seqlens, batch.positions))
        return compute(ids, cu_seqlens, batch.longest, positions, batch.rows, True)

    def _fitting(
        self, window: Window, rows: np.ndarray, run: Callable[[Batch], Tensor], prepared: cpu.Prepared
    ) -> Iterator[Done]:
        """One batch, in as many parts as memory asks for, once it has taken what is prepared."""
        pending = deque(self._within(window, rows))
        while pending:
            rows, spare = pending.popleft(), len(prepared)
            try:
                yield Done(window, rows, run(window.gather(rows)))
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                if spare:
                    prepared.clear()
                    pending.appendleft(rows)
                elif (failed := self._make_room(window, rows, pending)) is not None:
                    yield failed

    def _within(self, window: Window, rows: np.ndarray) -> list[np.ndarray]:
        """A batch as it was planned, or divided where the budget was halved since."""
        lengths = window.lengths[rows]
        if lengths.sum() <= self.budget or len(rows) == 1:
            return [rows]
        return [rows[part] for part in batches(lengths, self.budget)]

    def _make_room(self, window: Window, rows: np.ndarray, pending: "deque[np.ndarray]") -> Done | None:
        """After memory ran out: smaller batches from here on. A sequence alone has failed."""
        tokens = int(window.lengths[rows].sum())
        if len(rows) == 1:
            return Done(window, rows, None, f"there is no memory for a text of {tokens} tokens")
        if tokens <= self.budget:
            self.budget = max(1, tokens // 2)
            logger.warning("out of memory at %d tokens a batch; going on with %d", tokens, self.budget)
        pending.extendleft(self._within(window, rows)[::-1])
        return None

    # --- CUDA -----------------------------------------------------------------------------------------------------

    def _staged(self, windows: Iterable[Window], compute: Compute, key: Any) -> Iterator[Done]:
        lanes = _lanes(self.device)
        free = deque(_Slot() for _ in range(SLOTS))
        flying: deque[tuple[_Slot, Window, np.ndarray]] = deque()

        def land(most: int) -> Iterator[Done]:
            while len(flying) > most:
                slot, window, rows = flying.popleft()
                with self.stages.timed("model"):
                    slot.wait()
                result, slot.result = slot.result, None
                free.append(slot)
                yield Done(window, rows, result)

        for window in windows:
            if not len(window.lengths):
                yield Done(window, _NONE, None)
            for planned in batches(window.lengths, self.budget):
                pending, cleared = deque(self._within(window, planned)), False
                while pending:
                    rows = pending.popleft()
                    yield from land(SLOTS - 1)
                    slot = free.popleft()
                    try:
                        with self.stages.timed("launching"):
                            self._launch(lanes, slot, window.gather(rows), compute, key)
                    except RuntimeError as error:
                        if not _is_out_of_memory(error):
                            raise
                        slot.wait()  # for its copy, which may still be read
                        free.append(slot)
                        yield from land(0)  # what is on its way may hold the memory
                        if self.graphs is not None and self.graphs.clear() and not cleared:
                            cleared = True  # it was the graphs' memory that was wanting
                            pending.appendleft(rows)
                        elif (failed := self._make_room(window, rows, pending)) is not None:
                            yield failed
                        continue
                    flying.append((slot, window, rows))
        yield from land(0)

    def _launch(self, lanes: "_Lanes", slot: "_Slot", batch: Batch, compute: Compute, key: Any) -> None:
        ids, positions, cu_seqlens = slot.stage(lanes, batch)
        result = None
        # autocast frees the weights it has cast, which a graph would go on reading
        cast = torch.is_autocast_enabled(self.device.type)
        if key is not None and self.graphs is not None and can_capture(self.device) and not cast:
            result = self.graphs.replay(ids, positions, cu_seqlens, batch.longest, compute, key, self.budget)
        if result is None:
            result = compute(ids, cu_seqlens, batch.longest, positions, batch.rows, True)
        slot.fetch(lanes, result)


def budget_for(device: torch.device, dim: int) -> int:
    """Tokens a batch that suit a device."""
    if device.type != "cuda":
        return CPU_BUDGET
    return cuda_budget(torch.cuda.get_device_properties(device).multi_processor_count, dim)


def _is_out_of_memory(error: BaseException) -> bool:
    """Of any device; torch's on CPU raises a RuntimeError of its own."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return "can't allocate memory" in text or "not enough memory" in text or "out of memory" in text


class _Lanes:
    """Streams for the way in and the way out, beside the one that computes. Without CUDA everything is in order."""

    def __init__(self, device: torch.device):
        self.device, self.pinned = device, device.type == "cuda"
        self.copying = torch.cuda.Stream(device) if self.pinned else None
        self.fetching = torch.cuda.Stream(device) if self.pinned else None

    def on(self, stream: Any) -> Any:
        return torch.cuda.stream(stream) if self.pinned else nullcontext()


@functools.cache
def _lanes(device: torch.device) -> _Lanes:
    """The same for every run: torch deals out 32 streams in turn, and one of a graph's might come again."""
    return _Lanes(device)


class _Slot:
    """The memory of one batch in flight: int32 ids, positions and cu_seqlens in one block, pinned and on the device."""

    def __init__(self) -> None:
        self.host = self.there = torch.empty(0, dtype=torch.int32, device="cpu")
        self.result: Tensor | None = None
        self.done: torch.cuda.Event | None = None

    def stage(self, lanes: _Lanes, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        tokens, ends = len(batch.ids), len(batch.cu_seqlens)
        step = -(-tokens // ALIGNED) * ALIGNED  # kernels are compiled for where their arguments begin
        size = 2 * step + ends
        if len(self.host) < size:
            room = 1 << (size - 1).bit_length()  # so that it seldom grows again
            there = torch.empty(room, dtype=torch.int32, device=lanes.device)  # for which there may be no memory
            self.host, self.there = torch.empty(room, dtype=torch.int32, device="cpu", pin_memory=lanes.pinned), there
            if lanes.copying is not None:
                # the memory was the computing stream's: what that still does there comes first, now and after us
                lanes.copying.wait_stream(torch.cuda.current_stream(lanes.device))
                self.there.record_stream(lanes.copying)
        block = self.host.numpy()
        block[:tokens], block[step : step + tokens] = batch.ids, batch.positions
        block[2 * step : size] = batch.cu_seqlens
        with lanes.on(lanes.copying):
            self.there[:size].copy_(self.host[:size], non_blocking=True)
        if lanes.copying is not None:
            self.done = lanes.copying.record_event()
            torch.cuda.current_stream(lanes.device).wait_stream(lanes.copying)
        there = self.there
        return there[:tokens], there[step : step + tokens], there[2 * step : size]

    def fetch(self, lanes: _Lanes, result: Tensor) -> None:
        self.result = torch.empty(result.shape, dtype=result.dtype, device="cpu", pin_memory=lanes.pinned)
        if lanes.fetching is not None:
            lanes.fetching.wait_stream(torch.cuda.current_stream(lanes.device))
            result.record_stream(lanes.fetching)
        with lanes.on(lanes.fetching):
            self.result.copy_(result, non_blocking=True)
        if lanes.fetching is not None:
            self.done = lanes.fetching.record_event()

    def wait(self) -> None:
        if self.done is not None:
            self.done.synchronize()


class GraphCache:
    """Captured graphs of packed batches, by bucket of tokens, sequences and longest, and by what else decides them.

    Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._graphs: dict[Any, _Graph | None] = {}
        self._key: Any = None
        self._shared: Any = None
        self._lock = threading.Lock()
        self._done: torch.cuda.Event | None = None
        self._seen: tuple[tuple[nn.Module, ...], Snapshot, nn.ModuleList] | None = None

    def __reduce__(self) -> tuple:
        return GraphCache, ()

    def state_of(self, *parts: nn.Module) -> Snapshot | None:
        """What a graph of these modules has fixed inside it, one object for as long as that is so; None where it cannot
        be told."""
        with self._lock:
            now = None if self._seen is None or self._seen[0] != parts else self._seen[1]
            if now is None or now.state() != now.when_captured:
                together = nn.ModuleList(parts)  # which a snapshot does not keep
                now = Snapshot(together)
                self._seen = parts, now, together
            return now if now.is_plain() else None

    def clear(self) -> bool:
        """Frees the memory of all graphs; whether there was one."""
        with self._lock:
            held = any(graph is not None for graph in self._graphs.values())
            self._clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return held

    def _clear(self) -> None:
        if self._done is not None:
            self._done.synchronize()  # what is freed here may be written to until then
        self._graphs.clear()
        self._shared = self._done = None  # they belong to a device, which the model may have left

    def replay(
        self, ids: Tensor, positions: Tensor, cu_seqlens: Tensor, longest: int, compute: Compute, key: Any, budget: int
    ) -> Tensor | None:
        """The result, a row a sequence, by the graph of a bucket that holds the batch, or None where there is none.

        What the bucket has more of is dead tokens and empty sequences. budget: tokens, the largest bucket; batches that
        nearly fill it have one for themselves.
        """
        sequences = len(cu_seqlens) - 1
        size = tuple(
            max(least, 1 << (n - 1).bit_length())
            for least, n in zip(SMALLEST_GRAPH, (len(ids), sequences, longest), strict=True)
        )
        if len(ids) > budget:  # a text of a length of its own
            return None
        full = len(ids) >= FULL * budget
        size = budget if full else min(size[0], budget), *size[1:]
        with self._lock:
            if key != self._key:  # they read memory that the model no longer owns
                self._clear()
                self._key = key
            after(self._done, ids)
            at = size, full, ops.launch_modes()
            if at not in self._graphs:
                if len(self._graphs) >= MOST_GRAPHS:
                    return None
                self._graphs[at] = self._capture(size, ids.device, compute, full)
            graph = self._graphs[at]
            if graph is None:
                return None
            graph.ids[: len(ids)].copy_(ids)
            graph.positions[: len(ids)].copy_(positions)
            graph.cu_seqlens[: len(cu_seqlens)].copy_(cu_seqlens)
            graph.cu_seqlens[len(cu_seqlens) :].fill_(len(ids))
            graph.replay()
            result = graph.result[:sequences].clone()
            if ids.is_cuda:
                self._done = torch.cuda.current_stream(ids.device).record_event(self._done)
            return result

    def _capture(self, size: tuple[int, ...], device: torch.device, compute: Compute, full: bool) -> "_Graph | None":
        with torch.inference_mode(False), torch.no_grad():  # whose tensors could not be written to outside it
            graph = _Graph(size, device)
            given = graph.ids, graph.cu_seqlens, graph.longest, graph.positions, _NONE, full
            try:
                graph.replay, graph.result, self._shared = capture(lambda: compute(*given), device, self._shared)
            except RuntimeError as error:
                if _is_out_of_memory(error):
                    raise
                logger.warning("no CUDA graph of %d tokens, %d sequences of %d at most: %s", *size, error)
                return None
        return graph


class _Graph:
    """What a captured graph reads, int32, and where its result is."""

    replay: Callable[[], None]
    result: Tensor

    def __init__(self, size: tuple[int, ...], device: torch.device):
        tokens, sequences, self.longest = size
        self.ids, self.positions = (torch.zeros(tokens, dtype=torch.int32, device=device) for _ in range(2))
        self.cu_seqlens = torch.zeros(sequences + 1, dtype=torch.int32, device=device)


@contextmanager
def cpu_workers(threads: int) -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """Threads that share out torch's intra-op threads: (pool, how many). The caller's own number stays as it is."""
    workers = min(threads, MOST_WORKERS)
    made: list[int] = []

    def share_out() -> None:
        made.append(threading.get_native_id())
        torch.get_num_threads()  # a thread's first look at the number would overwrite what is set before it
        torch.set_num_threads(threads // workers)
        with suppress(threading.BrokenBarrierError):
            ready.wait()

    ready, started = threading.Barrier(workers, timeout=LONGEST_START), False
    pool = ThreadPoolExecutor(workers, initializer=share_out)
    try:
        # the barrier holds each worker in its start until all have started
        list(pool.map(lambda _: None, range(workers)))
        torch.set_num_threads(threads)  # set_num_threads also sets what threads made later start with
        started = True
        yield pool, workers
    finally:
        ready.abort()  # workers would wait for one that an interrupt, or a limit on threads, kept from starting
        try:
            pool.shutdown(cancel_futures=True)
            _await_the_end_of(made)
        finally:
            if not started:
                torch.set_num_threads(threads)


def _await_the_end_of(threads: list[int]) -> None:
    """Python waits for its own part of a thread; one that ends just then would leave a forked process locks that nobody
    holds there."""
    deadline = time.monotonic() + LONGEST_END
    for one in threads:
        while os.path.exists(f"/proc/self/task/{one}") and time.monotonic() < deadline:
            time.sleep(1e-4)
