"""How long something takes on a device, what the device can do at best, and what state it was in."""

import csv
import io
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any, TypeVar

import torch

from fastdistil.cpu import CHAIN, linear

Run = Callable[[], Any]
Item = TypeVar("Item")
CLOCKS = ("timestamp", "uuid", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "utilization.gpu")


@dataclass
class Timing:
    """Seconds of each round."""

    samples: list[float]

    @property
    def quartiles(self) -> tuple[float, float, float]:
        if len(self.samples) < 2:
            return (self.samples[0],) * 3
        low, middle, high = quantiles(self.samples, n=4, method="inclusive")
        return low, middle, high

    @property
    def median(self) -> float:
        return self.quartiles[1]

    def figures(self) -> dict[str, Any]:
        low, middle, high = self.quartiles
        return {"median_us": middle * 1e6, "iqr_us": (high - low) * 1e6, "samples_us": [s * 1e6 for s in self.samples]}


def microseconds(call: Run, calls: int) -> float:
    """A call's, of so many."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls * 1e6


OVERLAPPED = "fastdistil, captured graph, overlapped"  # a trial: no user gets it


def is_ours(provider: str) -> bool:
    """Whether it is a way in which a user runs fastdistil."""
    return provider.startswith("fastdistil") and provider != OVERLAPPED


POISONED = 4  # blocks of a size, for an allocator may hold several
TURNS = {"cpu": 3, "cuda": 2}  # that each provider gets


def in_turns(device: torch.device, providers: Sequence[Item], turns: int | None = None) -> Iterator[tuple[int, Item]]:
    """(turn, provider), there and back: what a shared machine does for seconds, or a GPU's clocks as they wander, meets
    all of them."""
    for turn in range(turns or TURNS.get(device.type, 1)):
        yield from ((turn, item) for item in (providers if turn % 2 == 0 else providers[::-1]))


def joined(turns: list["Timing"], keep: int) -> dict[str, Any]:
    """Figures of all rounds. turns_us: each turn's median; drift: how far these differ; rounds: how many there were, of
    which samples_us has at most `keep`, from all over each turn."""
    found = Timing([s for turn in turns for s in turn.samples]).figures()
    medians = [turn.median * 1e6 for turn in turns]
    share = max(1, keep // len(turns))
    steps = [-(-len(turn.samples) // share) for turn in turns]
    found["samples_us"] = [round(s * 1e6, 3) for turn, n in zip(turns, steps, strict=True) for s in turn.samples[::n]]
    found["rounds"] = sum(len(turn.samples) for turn in turns)
    return found | {"turns_us": medians, "drift": max(medians) / min(medians) - 1}


def ratio(peer: dict[str, Any], ours: dict[str, Any]) -> float:
    """How many times as long the peer takes: the median over the turns that both had."""
    turns = peer.get("turns_us", []), ours.get("turns_us", [])
    if len(turns[0]) != len(turns[1]) or not turns[0]:
        return peer["median_us"] / ours["median_us"]
    return median(p / o for p, o in zip(*turns, strict=True))


def poison(*likes: torch.Tensor) -> None:
    """NaN where the next tensors of these sizes may come to lie: what lay there before, such as another provider's
    result, is not to pass for what a call computed."""
    held = [torch.full_like(like, float("nan")) for like in likes for _ in range(POISONED)]
    del held


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cold(run: Run, device: torch.device, seconds: float = 0.1) -> Timing:
    """Each round finds none of its arguments in L2. On CPU the caches are left as they are."""
    if device.type != "cuda":
        return wall(run, device, seconds)
    from triton.testing import do_bench

    found = do_bench(run, warmup=int(seconds * 250), rep=int(seconds * 1e3), return_mode="all")
    return Timing([ms / 1e3 for ms in found])


def in_graph(run: Run, device: torch.device, seconds: float = 0.05) -> Timing:
    """Within a captured graph of many calls, one after another: no launch costs, L2 as the last call left it."""
    if device.type != "cuda":
        return wall(run, device, seconds)
    from triton.testing import do_bench_cudagraph

    with torch.cuda.stream(torch.cuda.Stream(device)):  # as many calls as take `rep` are replayed ten times
        found = do_bench_cudagraph(run, rep=max(1, int(seconds * 1e2)), return_mode="all")
    return Timing([ms / 1e3 for ms in found])


def replayed(run: Run, device: torch.device) -> Any:
    """What a captured graph of the call computes when it is replayed."""
    with torch.cuda.stream(torch.cuda.Stream(device)):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    overwrite(result)
    graph.replay()
    synchronize(device)
    return result


def overwrite(result: Any) -> None:
    """A tensor or a tuple of them, by what no op gives."""
    for one in result if isinstance(result, tuple) else (result,):
        one.fill_(float("nan") if one.is_floating_point() else -7)


def wall(run: Run, device: torch.device, seconds: float = 0.2, least: int = 5, most: int = 1_000) -> Timing:
    """From the call to its result, the host's work included: what a caller waits for."""
    run()
    synchronize(device)
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < least or (time.perf_counter() < end and len(samples) < most):
        start = time.perf_counter()
        run()
        synchronize(device)
        samples.append(time.perf_counter() - start)
    return Timing(samples)


def ceilings(device: torch.device, toy: bool = False, dtypes: Sequence[torch.dtype] = ()) -> dict[str, Any]:
    """What this very machine reaches: FLOP/s of large matrix products by dtype (float32, on a GPU all that encoders run
    in, and those asked for), bytes/s of a copy, read and written.

    The quickest round counts, for nothing may pass a ceiling. Random numbers: zeros draw less power and are up to 15 %
    quicker.
    """
    on_cpu = device.type == "cpu"
    n, size = (1_024, 2**24) if toy else (1_024 if on_cpu else 8_192, 2**28 if on_cpu else 2**30)  # beyond any cache
    found: dict[str, Any] = {}
    seconds = 0.02 if toy else 0.5
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    kinds = {"float32": torch.float32} | {str(dtype).removeprefix("torch."): dtype for dtype in dtypes}
    if device.type == "cuda":
        kinds |= {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32}
    try:
        for name, dtype in kinds.items():
            matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            timing = cold(lambda a=a, b=b: a @ b, device, seconds)  # type: ignore[misc]
            found[name] = {"flops_per_s": 2 * n**3 / min(timing.samples)} | timing.figures()
        if device.type == "cpu":  # the quicker of two libraries: on some processors torch takes the other
            a, b, bias = torch.randn(2 * n, CHAIN), torch.randn(n, CHAIN), torch.zeros(n)
            timing = wall(lambda: linear(a, b, bias), device, seconds)
            rate = 4 * n * n * CHAIN / min(timing.samples)
            if rate > found["float32"]["flops_per_s"]:
                found["float32"] = {"flops_per_s": rate} | timing.figures()
    finally:
        matmul.fp32_precision = before
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    timing = cold(lambda: target.copy_(source), device, seconds)
    found["copy"] = {"bytes_per_s": 2 * size / min(timing.samples)} | timing.figures()
    return found


@dataclass
class Watch:
    """Clocks, power and temperature of the GPU while something runs, a sample every two seconds; of all that there are
    where they do not say which one it is."""

    samples: list[dict[str, str]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> "Watch":
        if torch.cuda.is_available():
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _sample(self) -> None:
        own, done = gpu_uuid(), False
        while not done:  # once at least, however soon what is watched has ended
            cards = nvidia_smi(*CLOCKS)
            found = [card for card in cards if own and card.get("uuid", "").endswith(own)] or cards
            self.samples += found or ([] if self.samples else [{"missing": "nvidia-smi tells nothing"}])
            done = self._stop.wait(2.0)


def gpu_uuid() -> str:
    """Of the card in use, as torch tells it; nvidia-smi, which lists every card, puts GPU- before it."""
    try:
        return str(getattr(torch.cuda.get_device_properties(0), "uuid", ""))
    except (RuntimeError, AssertionError):  # there is none
        return ""


def nvidia_smi(*what: str) -> list[dict[str, str]]:
    """A row a GPU, with units; none where the tool is missing or refuses."""
    command = ["nvidia-smi", f"--query-gpu={','.join(what)}", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(what, map(str.strip, row), strict=False)) for row in csv.reader(io.StringIO(out))]
