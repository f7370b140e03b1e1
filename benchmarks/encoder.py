"""The whole encoder, pre-tokenised: ours padded, packed and captured, beside transformers, at batch x length x fill.

    python -m benchmarks encoder [--toy] [--model M] [--lengths-from texts.jsonl] [--out FILE] [--minutes N]

Only real tokens are counted. Hidden states at real positions are held to the error law against float64 first.
A peer is one function under `@provider`: it gets a Batch and gives back a call that computes the last hidden state of
what batch.ids holds then, for the ids are changed in place between calls.
"""

import argparse
import copy
import ctypes
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import record, roofline, shapes, timing
from benchmarks.corpus import docstring_lengths
from benchmarks.kernels import KEPT, NO_TIME, Missing, absent, errors, failed, once_if_late, passes, take_turns
from benchmarks.roofline import Shape
from benchmarks.shapes import Matrix
from fastdistil import DistilBertConfig, DistilBertModel, DistilBertTokenizer, cpu
from fastdistil.graphs import MOST_TOKENS
from fastdistil.kernels import _configs
from fastdistil.testing import FACTOR, cu_seqlens, error_law

MAX_LENGTH = 256  # of docstrings
COMPILED = 128  # the length at which torch.compile takes part
TELLING = ((256, 128, 1.0), (256, 128, 0.5), *((1, n, 1.0) for n in (16, 32, 64)))  # what the goals are about
CHUNK = 32  # texts at a time, of what is computed beside the measuring
# Times eager torch's errors, that a peer's may be: the exponential of torch's SDPA is coarser on Intel's processors,
# where the mean of a model's was 1.8 times eager's.
PEER = {"largest": 4, "mean": 2}
FAR = 5  # times the largest error of eager's rows at the chosen texts: what a row of another may be off eager's
TRUTH_TOKENS = 4_096  # of a batch that are computed in float64: more would take longer than the rest


@dataclass(frozen=True)
class Batch:
    """A padded batch and the model's weights. ids, keep: [batch, length], int64 and bool."""

    name: str
    model: DistilBertModel
    ids: Tensor
    keep: Tensor
    lengths: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @property
    def packed(self) -> tuple[Tensor, Tensor, int, Tensor]:
        """ids int32 [rows], cu_seqlens int32 [batch + 1], longest, positions int32 [rows]: what the engine passes."""
        starts = cu_seqlens(list(self.lengths), str(self.device))
        column = torch.arange(self.ids.shape[1], dtype=torch.int32, device=self.device).expand(self.ids.shape)
        return self.ids[self.keep].int(), starts, max(self.lengths), column[self.keep]


Make = Callable[[Batch, ExitStack], timing.Run]
PROVIDERS: list[tuple[str, Make]] = []


def provider(name: str) -> Callable[[Any], Any]:
    """Registers (batch, stack) -> a call that gives [batch, length, dim], or [rows, dim] where padding is left out."""

    def register(function: Any) -> Any:
        PROVIDERS.append((name, function))
        return function

    return register


# --- providers --------------------------------------------------------------------------------------------------------


@provider("fastdistil, padded call")
def padded(batch: Batch, stack: ExitStack) -> timing.Run:
    mask = _mask(batch)
    return lambda: batch.model(batch.ids, mask).last_hidden_state


@provider("fastdistil, packed call")
def packed(batch: Batch, stack: ExitStack) -> timing.Run:
    packed = batch.packed
    return lambda: batch.model.forward_packed(*packed, all_live=True)


CAPTURED = "fastdistil, captured graph"
OVERLAPPING = 1_024  # tokens up to which overlapping launches are tried


@provider(CAPTURED)
def captured(batch: Batch, stack: ExitStack) -> timing.Run:
    if batch.device.type != "cuda":
        raise Missing("CUDA graphs are for CUDA")
    if batch.ids.numel() > MOST_TOKENS:
        raise Missing(f"batches of more than {MOST_TOKENS} tokens are not captured: their launches cost nothing")
    batch.model.cuda_graphs(True)
    stack.callback(batch.model.cuda_graphs, False)
    call = padded(batch, stack)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        call()
    graphs = batch.model._graphs
    if graphs is None or not graphs.captured(*batch.ids.shape):
        raise Missing(f"not captured: {said[-1].message if said else 'the model would not be'}"[:200])
    return call


@provider(timing.OVERLAPPED)
def overlapped(batch: Batch, stack: ExitStack) -> timing.Run:
    """Each kernel launched while the one before still runs: not the default, for nobody has measured it yet."""
    if batch.device.type != "cuda" or torch.cuda.get_device_capability(batch.device) < (9, 0):
        raise Missing("launches overlap from sm_90 on")
    if batch.ids.numel() > OVERLAPPING:
        raise Missing(f"tried up to {OVERLAPPING} tokens: more keep the GPU busy")
    stack.enter_context(patch.object(_configs.modes, "overlap", True))
    return captured(batch, stack)


def transformers(attention: str) -> Make:
    def run(batch: Batch, stack: ExitStack) -> timing.Run:
        if attention == "flash_attention_2" and (batch.device.type != "cuda" or batch.model.dtype is torch.float32):
            raise Missing("float16 and bfloat16 on CUDA only")
        model, mask = _theirs(batch, attention), _mask(batch)
        return lambda: model(input_ids=batch.ids, attention_mask=mask).last_hidden_state

    return run


for _attention in ("eager", "sdpa", "flash_attention_2"):
    provider(f"transformers {_attention}")(transformers(_attention))


@provider("ONNX Runtime")
def onnx_runtime(batch: Batch, stack: ExitStack) -> timing.Run:
    """transformers' model exported by torch.onnx, on all threads."""
    if batch.device.type != "cpu" or batch.model.dtype is not torch.float32:
        raise Missing("float32 on CPU only")
    session = _exported(batch)
    feeds = dict(
        zip((i.name for i in session.get_inputs()), (batch.ids.numpy(), batch.keep.long().numpy()), strict=True)
    )
    return lambda: torch.from_numpy(session.run(None, feeds)[0])


def _exported(batch: Batch) -> Any:
    """An InferenceSession of [batch, length] ids and mask, exported once a model."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  what torch.onnx needs
    except ImportError as error:
        raise Missing(str(error)) from error
    if id(batch.model) not in _sessions:
        model = _Hidden(_theirs(batch, "sdpa")).eval()
        either = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        example = torch.ones(2, 8, dtype=torch.int64), torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
        with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                program = torch.onnx.export(model, example, dynamo=True, dynamic_shapes=(either, either), verbose=False)
            except Exception as error:  # of many kinds; it is torch's exporter that cannot
                raise Missing(f"torch.onnx cannot export it: {str(error).splitlines()[0]}"[:200]) from error
            program.save(path := f"{directory}/model.onnx")  # type: ignore[union-attr]
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        _sessions[id(batch.model)] = session
    return _sessions[id(batch.model)]


class _Hidden(torch.nn.Module):
    """transformers' model, giving the last hidden state alone."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=keep).last_hidden_state


@provider("sentence-transformers")
def sentence_transformers(batch: Batch, stack: ExitStack) -> timing.Run:
    raise Missing("it takes texts, not token ids: `fastdistil bench encode`")


@provider("transformers sdpa, torch.compile")
def compiled(batch: Batch, stack: ExitStack) -> timing.Run:
    return _compile(batch, stack, None)


@provider("transformers sdpa, torch.compile max-autotune")
def autotuned(batch: Batch, stack: ExitStack) -> timing.Run:
    return _compile(batch, stack, "max-autotune")  # with CUDA graphs


LATE = (compiled, autotuned)  # they compile for up to minutes, after all else


def _compile(batch: Batch, stack: ExitStack, mode: str | None) -> timing.Run:
    if batch.device.type != "cuda":
        raise Missing("compiled for CUDA only")
    if batch.model.dtype is not torch.bfloat16 or batch.ids.shape[1] != COMPILED:
        raise Missing(f"compiled in bfloat16 at a length of {COMPILED} only: it takes up to minutes a shape")
    model, mask = _theirs(batch, "sdpa"), _mask(batch)
    stack.callback(torch._dynamo.reset)
    forward = torch.compile(model, mode=mode, dynamic=False)

    def call() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return forward(input_ids=batch.ids, attention_mask=mask).last_hidden_state

    return call


def _mask(batch: Batch) -> Tensor | None:
    """What a caller gives who knows whether there is padding: the same for every provider."""
    return None if bool(batch.keep.all()) else batch.keep.long()


_cached: dict[Any, Any] = {}
_wides: dict[str, Any] = {}
_sessions: dict[int, Any] = {}


def _theirs(batch: Batch, attention: str) -> Any:
    """transformers' model with our weights, made once."""
    try:
        import transformers as hf
    except ImportError as error:
        raise Missing(str(error)) from error
    key = id(batch.model), batch.model.dtype, attention
    if key not in _cached:
        config = hf.DistilBertConfig(**_config(batch.model), attn_implementation=attention)
        try:
            model = hf.DistilBertModel(config)
        except (ImportError, ValueError) as error:
            raise Missing(str(error).splitlines()[0][:200]) from error
        model.load_state_dict(batch.model.state_dict(), strict=False)
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = batch.model.config.layer_norm_eps
        _cached[key] = model.eval().to(batch.device, batch.model.dtype)
    return _cached[key]


def _config(model: DistilBertModel) -> dict[str, Any]:
    names = ("vocab_size", "max_position_embeddings", "dim", "hidden_dim", "n_layers", "n_heads", "activation")
    return {name: getattr(model.config, name) for name in names}


# --- measuring --------------------------------------------------------------------------------------------------------


def model_of(shape: Shape, device: torch.device, dtype: torch.dtype) -> DistilBertModel:
    """Random weights, biases and norms among them, for a model that is initialised has many zeros."""
    config = DistilBertConfig(dim=shape.dim, hidden_dim=shape.hidden, n_layers=shape.layers, n_heads=shape.heads)
    torch.manual_seed(0)
    model = DistilBertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.to(device, dtype)


def batch_of(model: DistilBertModel, name: str, lengths: list[int], longest: int) -> Batch:
    g = torch.Generator().manual_seed(0)
    keep = torch.arange(longest) < torch.tensor(lengths)[:, None]
    ids = torch.randint(1, model.config.vocab_size, keep.shape, generator=g).masked_fill(~keep, 0)
    device = model.device
    return Batch(name, model, ids.to(device), keep.to(device), tuple(lengths))


def plans(matrix: Matrix, telling: bool | None = None) -> Iterator[tuple[str, list[int], int]]:
    """(name, lengths, longest) of each batch: batch x length x fill, and docstrings; with `telling` those of TELLING
    alone, or the others. At a fill below one, lengths are spread evenly around it, the first being the longest."""
    for texts, longest, fill in product(matrix.batches, matrix.lengths, matrix.fills):
        if telling is not None and ((texts, longest, fill) in TELLING) != telling:
            continue
        if fill == 1:
            lengths = [longest] * texts
        elif texts == 1:
            continue  # one text is its own padding
        else:
            spread = [max(1, round(longest * fill * (0.5 + i / max(1, texts - 2)))) for i in range(texts - 1)]
            lengths = [longest, *(min(longest, n) for n in spread)]
        yield f"{texts} x {longest}, fill {sum(lengths) / (texts * longest):.2f}", lengths, longest
    if matrix.docstrings and not telling:
        lengths = list(docstring_lengths(matrix.docstrings, MAX_LENGTH))
        yield f"{len(lengths)} docstrings", lengths, max(lengths)


def batches(model: DistilBertModel, matrix: Matrix) -> Iterator[Batch]:
    yield from (batch_of(model, *plan) for plan in plans(matrix))


def chosen(batch: Batch) -> list[int]:
    """The texts that are held to float64, from all over the batch."""
    count = max(1, min(len(batch.ids), TRUTH_TOKENS // batch.ids.shape[1]))
    return [i * (len(batch.ids) - 1) // max(1, count - 1) for i in range(count)]


@contextmanager
def renamed(batch: Batch) -> Iterator[None]:
    """The batch with other ids in the same place."""

    def mirror() -> None:
        batch.ids.copy_((batch.model.config.vocab_size - batch.ids).where(batch.keep, 0))

    mirror()
    try:
        yield
    finally:
        mirror()


def truth_of(batch: Batch, which: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """(float64, the same precision by eager torch): hidden states of the real positions [rows, dim] of the texts, by
    default the chosen ones."""
    texts = torch.tensor(chosen(batch) if which is None else which, device=batch.device)
    ids, keep = batch.ids[texts], batch.keep[texts]

    def dense(model: DistilBertModel) -> Tensor:
        with torch.enable_grad():  # a gradient could be asked for: the differentiable definitions
            return model(ids, keep).last_hidden_state.detach()[keep]

    return dense(_wide(batch.model)), dense(batch.model)


def rest_of(batch: Batch, which: list[int] | None = None) -> Tensor | None:
    """What eager torch gives in the same precision for all texts, where not all of them are chosen, or in `which`."""
    if len(chosen(batch) if which is None else which) == len(batch.ids):
        return None
    with torch.enable_grad():  # as in truth_of
        parts = zip(batch.ids.split(CHUNK), batch.keep.split(CHUNK), strict=True)
        return torch.cat([batch.model(ids, keep).last_hidden_state.detach()[keep] for ids, keep in parts])


def _wide(model: DistilBertModel) -> DistilBertModel:
    """The same in float64, made once."""
    if _wides.get("of") is not model:
        wide = copy.deepcopy(model).to(torch.float64)
        _wides.update(of=model, wide=wide)
    return _wides["wide"]


def checked(
    batch: Batch, make: Make, stack: ExitStack, truth: Tensor, eager: Tensor, peer: bool = False
) -> tuple[timing.Run, dict[str, float]]:
    """A provider's call and its errors; raises AssertionError where it breaks the error law, Missing where it cannot
    run."""
    run = make(batch, stack)
    return run, hold(run, batch, truth, eager, peer=peer)


def hold(
    run: timing.Run,
    batch: Batch,
    truth: Tensor,
    eager: Tensor,
    which: list[int] | None = None,
    rest: Tensor | None = None,
    peer: bool = False,
) -> dict[str, float]:
    """The errors of what a call computes now; raises AssertionError where it breaks the error law, or is far from rest,
    which is eager torch's of all texts. A peer may be somewhat further off than ours."""
    rows = eager.new_empty(sum(batch.lengths), batch.model.config.dim)
    timing.poison(rows, rows.new_empty(*batch.ids.shape, rows.shape[1]))
    result = run()
    result = result[batch.keep] if result.dim() == 3 else result
    if result.shape != (sum(batch.lengths), batch.model.config.dim) or not bool(result.isfinite().all()):
        raise AssertionError(f"the result is not [{sum(batch.lengths)}, dim] or not finite")
    rows_of = torch.arange(len(batch.lengths)).repeat_interleave(torch.tensor(batch.lengths))
    if rest is not None:  # whose own error is not known: it is that of the chosen texts, about
        largest, eps, of = float(_off(eager, truth).max()), torch.finfo(rest.dtype).eps, torch.tensor(batch.lengths)
        off = torch.segment_reduce(_off(result, rest).cpu(), "max", lengths=of)
        # as if a text were multiplied by 1 + bias: what goes both ways within a row cancels
        dots = [(one.double() * rest.double()).sum(1).cpu() for one in (result, rest)]
        bias = (torch.div(*(torch.segment_reduce(dot, "sum", lengths=of) for dot in dots)) - 1).abs()
        most = (2 if peer else 1) * (largest / 8 + eps * FACTOR[rest.dtype is torch.float32])
        laws = ((off, FAR * (largest + eps)), (bias, most))
        # beside a few texts only another result is to be seen, such as one that was remembered
        for found, allowed in laws if which is None else ((off, 10 * FAR * (largest + eps)),):
            assert found.max() <= allowed, (
                f"text {int(found.argmax())}, which was not held to float64, is off by {found.max():.3e}, allowed "
                f"{allowed:.3e}"
            )
    result = result[torch.isin(rows_of, torch.tensor(chosen(batch) if which is None else which)).to(result.device)]
    bounds = PEER if peer else {"largest": largest_error(batch.device)}
    # float32's errors of six layers add up: a right model's were 1.8 eps in one direction (torch 2.10)
    error_law(result, eager, truth, **bounds, factor=2.0 if result.dtype is torch.float32 else None)
    return errors(result, truth)


def _off(result: Tensor, other: Tensor) -> Tensor:  # [rows, dim] twice -> [rows]
    """How long the difference is, by how long the row is."""
    return (result.double() - other.double()).norm(dim=1) / other.double().norm(dim=1)


class Peak:
    """The most memory in use since, beyond what was: on a GPU torch's, on CPU the process's, where Linux tells it."""

    def __init__(self, device: torch.device):
        self.device, self.before = device, 0
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            with suppress(OSError, AttributeError):  # what is free goes back, or it would be taken again unseen
                ctypes.CDLL(None).malloc_trim(0)
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the peak from here on, proc(5)
                self.before = self._resident()

    def bytes(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return self._resident() - self.before if self.before else None

    @staticmethod
    def _resident() -> int:
        """Bytes, at most, since the last reset."""
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def largest_error(device: torch.device) -> float:
    """Times eager torch's: oneDNN's products add in another order than those of eager's library."""
    return 4 if device.type == "cpu" and not cpu.why_not_onednn() else 2


@torch.no_grad()
def measure(
    batch: Batch,
    deadline: float,
    seconds: float = 0.1,
    *,
    late: bool | None = None,
    keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """A row a provider: what is missing or wrong, or its times, from turns that all of them take. late: only
    those that compile for long, or only the others. keep: gets the rows so far after each provider."""
    about = _about(batch.name, batch.lengths, batch.ids.shape[1], batch.model.dtype)
    tokens = about["tokens"]
    known: list[tuple[Tensor, Tensor]] = []
    rest: list[Tensor | None] = []
    ends = sorted({0, len(batch.lengths) - 1})
    turns = once_if_late(batch.device, late)

    def attempt(turn: int, make: Make, stack: ExitStack, row: dict[str, Any]) -> timing.Timing:
        peer = not row["provider"].startswith("fastdistil")
        peak = Peak(batch.device)
        run = make(batch, stack)
        # a replay allocates nothing: what a graph took, it took when it was captured. Theirs brings weights along
        of_capture = (peak.bytes() or 0) if row["provider"] in (CAPTURED, timing.OVERLAPPED) else 0
        if not known:  # only where a provider runs at all
            known.append(truth_of(batch))
            rest.append(rest_of(batch))
            with renamed(batch):
                known.append(truth_of(batch, ends))
                rest.append(rest_of(batch, ends))
        if turn == 0:
            row["error"] = hold(run, batch, *known[0], rest=rest[0], peer=peer)
        peak = Peak(batch.device)
        each = 2 * seconds if batch.device.type == "cpu" or turns else seconds
        took = timing.wall(run, batch.device, each, least=2 if turn else 3)
        most = peak.bytes()
        if most is not None and make is not onnx_runtime:  # whose own arena keeps what it once took
            row["peak_bytes"] = max(row.get("peak_bytes", 0), of_capture, most)
        hold(run, batch, *known[0], rest=rest[0], peer=peer)
        with renamed(batch):  # a result that was remembered is of the ids as they were
            hold(make(batch, stack) if make is packed else run, batch, *known[1], ends, rest=rest[1], peer=peer)
        return took

    def figures(taken: list[timing.Timing]) -> dict[str, Any]:
        found = timing.joined(taken, KEPT)
        samples = sorted(s for turn in taken for s in turn.samples)
        p99 = samples[math.ceil(0.99 * len(samples)) - 1]
        return found | {"tokens_per_s": tokens / found["median_us"] * 1e6, "p99_us": p99 * 1e6}

    return take_turns(of_kind(late), about, batch.device, deadline, attempt, figures, keep, turns)


def of_kind(late: bool | None) -> list[tuple[str, Make]]:
    """The providers: those that compile for long, or only the others."""
    return [one for one in PROVIDERS if late is None or (one[1] in LATE) == late]


def _about(name: str, lengths: Sequence[int], longest: int, dtype: torch.dtype) -> dict[str, Any]:
    tokens, texts = sum(lengths), len(lengths)
    found = {"batch": name, "tokens": tokens, "texts": texts, "length": longest, "fill": tokens / (texts * longest)}
    return found | {"dtype": str(dtype).removeprefix("torch.")}


def run(
    matrix: Matrix,
    device: torch.device,
    *,
    minutes: float = 10,
    keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Every batch by every provider. keep: gets all rows so far after each provider."""
    deadline = time.monotonic() + 60 * minutes
    rows: list[dict[str, Any]] = []

    def so_far(found: list[dict[str, Any]]) -> None:
        keep(rows + found)

    model = None
    for dtype, telling, late in passes(matrix.dtypes):
        if model is not None and model.dtype is not dtype:
            model = None
            _forget()
        for plan in plans(matrix, telling):
            if time.monotonic() > deadline:  # to make a batch takes time, too
                rows.extend(_about(*plan, dtype) | {"provider": n, "missing": NO_TIME} for n, _ in of_kind(late))
                continue
            model = model or model_of(matrix.shape, device, dtype)
            rows.extend(measure(batch_of(model, *plan), deadline, matrix.seconds, late=late, keep=so_far))
    _forget()
    keep(rows)
    return sorted(rows, key=lambda row: matrix.dtypes.index(getattr(torch, row["dtype"])))


def _forget() -> None:
    """The models of one precision."""
    for made in (_cached, _sessions, _wides):
        made.clear()


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Who is missing, and a line a batch: our quickest call, and the peers by it."""
    yield from (f"missing {name}: {why}" for name, why in absent(rows).items())
    by_batch: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        by_batch.setdefault((row["batch"], row["dtype"]), []).append(row)
    for (name, dtype), found in by_batch.items():
        for row in found:
            if "wrong" in row:
                yield f"WRONG {name} {dtype} {row['provider']}: {row['wrong']}"
        timed = {row["provider"]: row for row in found if "tokens_per_s" in row}
        ours = {n.removeprefix("fastdistil, "): r for n, r in timed.items() if timing.is_ours(n)}
        if not ours:
            continue
        best = min(ours, key=lambda n: ours[n]["median_us"])
        mine = ours[best]
        line = f"{name:22} {dtype:8} {mine['tokens_per_s']:12,.0f} tokens/s, {mine['median_us']:.0f} us"
        line += f", {'p99' if mine['rounds'] >= 100 else 'slowest'} {mine['p99_us']:.0f}"
        if "peak_bytes" in mine:
            line += f", {mine['peak_bytes'] / 2**20:,.0f} MiB"
        peers = [
            f"{timing.ratio(row, mine):.2f}x {n.removeprefix('transformers ')}"
            for n, row in timed.items()
            if not n.startswith("fastdistil")
        ]
        yield f"{line} ({best}): {', '.join(peers)}"


@record.command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks encoder", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="tiny sizes, for CPU")
    parser.add_argument("--model", help="a checkpoint instead of DistilBERT-base with random weights")
    parser.add_argument(
        "--lengths-from", type=Path, help="jsonl of {text}: the first 256 in batches of 32 as they come (with --model)"
    )
    parser.add_argument("--dtypes", help="comma-separated, such as bfloat16,float32")
    parser.add_argument("--minutes", type=record.minutes, default=10.0)
    parser.add_argument("--out", type=Path, help="a result file")
    args = parser.parse_args(argv)
    if args.lengths_from and not args.model:
        parser.error("--lengths-from goes with --model, whose tokenizer tells the lengths")
    record.check_out(args.out)
    texts = read_texts(args.lengths_from) if args.lengths_from else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    matrix = shapes.TOY if args.toy else shapes.FULL if device.type == "cuda" else shapes.ON_CPU
    if args.dtypes:
        matrix = shapes.with_dtypes(matrix, args.dtypes.split(","))
    shape = None if args.model else asdict(matrix.shape)
    about = record.environment() | {"stage": "encoder", "model": args.model, "shape": shape, "dry": args.toy}

    def keep(rows: list[dict[str, Any]], name: str = ".partial") -> None:  # an earlier result stays until this is whole
        if args.out:
            path = args.out.with_name(args.out.name + name)
            record.write(path, about | {"rows": rows, "whole": not name, "clocks": watch.samples})

    with timing.Watch() as watch:
        if args.model:
            rows = of_checkpoint(args.model, texts, matrix, device, args.minutes, keep)
        else:
            rows = run(matrix, device, minutes=args.minutes, keep=keep)
    print(*lines(rows), sep="\n")
    keep(rows, "")
    if args.out:
        args.out.with_name(args.out.name + ".partial").unlink(missing_ok=True)
    return int(failed(rows))


def of_checkpoint(
    path: str,
    texts: list[str] | None,
    matrix: Matrix,
    device: torch.device,
    minutes: float,
    keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Somebody's own model, at the matrix's shapes or in batches of 32 of somebody's own texts. keep: as in `run`."""
    deadline = time.monotonic() + 60 * minutes
    rows: list[dict[str, Any]] = []

    def so_far(found: list[dict[str, Any]]) -> None:
        keep(rows + found)

    for dtype in matrix.dtypes:
        try:
            model = DistilBertModel.from_pretrained(path, dtype=dtype, device=device)
        except (OSError, ValueError) as error:
            raise record.WrongUse(f"--model {path}: {error}") from error
        own = _batches_of_texts(model, path, texts) if texts else batches(model, matrix)
        for batch in own:
            rows += measure(batch, deadline, matrix.seconds, keep=so_far)
        _forget()
    return rows


MOST_TEXTS = 8 * 32  # of a file


def read_texts(path: Path) -> list[str]:
    """The first MOST_TEXTS of jsonl with {"text": ...} a line; raises WrongUse naming the line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON may hold what else splits lines
    except (OSError, UnicodeDecodeError) as error:
        raise record.WrongUse(f"--lengths-from {path}: {error}") from error
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise record.WrongUse(f"{path}, line {number} is no JSON: {error}") from error
        if not isinstance(found, dict) or not isinstance(found.get("text"), str):
            raise record.WrongUse(f'{path}, line {number} is not {{"text": ...}}: {line[:80]}')
        if any("\ud800" <= c <= "\udfff" for c in found["text"]):
            raise record.WrongUse(f"{path}, line {number} holds a lone surrogate, which is not text")
        texts.append(found["text"])
        if len(texts) == MOST_TEXTS:
            break
    if not texts:
        raise record.WrongUse(f"{path} holds no texts")
    return texts


def _batches_of_texts(model: DistilBertModel, path: str, texts: list[str]) -> Iterator[Batch]:
    try:
        tokenizer = DistilBertTokenizer.from_pretrained(path)
    except (OSError, ValueError, TypeError) as error:
        raise record.WrongUse(f"--model {path}: {error}") from error
    longest = model.config.max_position_embeddings
    lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=longest)["input_ids"]]
    for first in range(0, len(lengths), 32):
        part = lengths[first : first + 32]
        yield batch_of(model, f"texts {first}-{first + len(part) - 1}", part, max(part))


def predicted(rows: list[dict[str, Any]], chip: roofline.Chip, shape: Shape) -> Iterator[tuple[str, float, float]]:
    """(batch, predicted, measured) tokens/s of our captured graph, where it was measured."""
    for row in rows:
        if row["provider"] == CAPTURED and "tokens_per_s" in row and row["fill"] == 1:
            lengths = [row["length"]] * row["texts"]
            with suppress(LookupError):  # a configuration that was recorded and never compiled for the table
                yield row["batch"], roofline.predict(chip, lengths, shape, row["dtype"]), row["tokens_per_s"]


if __name__ == "__main__":
    sys.exit(main())
