"""The engine's throughput on texts and on token ids, by length, with what it waited for.

    python -m benchmarks engine [--toy] [--out FILE] [--minutes N]

Beside it the encoder alone on one full batch: what the engine could reach at best. Weights are random at
DistilBERT-base size, and the vocabulary is trained by the run on the docstrings of Python's standard library.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import record, shapes, timing
from benchmarks.corpus import VOCABULARY, stdlib_docstrings, tokenizer_for
from benchmarks.encoder import FAR, Batch, batch_of, chosen, largest_error, model_of, truth_of
from benchmarks.kernels import failed
from benchmarks.shapes import Matrix
from fastdistil import Embedder, reference
from fastdistil.engine.scheduler import TOKENIZE, Window, batches, cuts
from fastdistil.testing import cu_seqlens, error_law

REPEATS = 20  # of the same lengths, in other batches
ROUNDS = 3
SOME = 64  # texts that are held to float64
SAME = 0.02  # how far the embeddings of two rounds, which need not have the same bits, may be apart
BATCHES = 200  # full ones, that a measurement on CUDA takes
MAX_LENGTH = 256


def drive(embedder: Embedder, windows: Iterator[Window], texts: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Embeddings, float32 [texts, dim], and the seconds of each stage, as `encode` makes them."""
    engine = embedder.engine()
    out = np.empty((texts, embedder.dim), np.float32)
    start = time.perf_counter()
    for done in embedder.run(engine, windows):
        if done.result is not None:
            at, which = done.window.texts(done.rows)
            out[at] = done.result.numpy()[which]
    seconds = time.perf_counter() - start
    stages = engine.stages
    return out, {
        "seconds": seconds,
        "tokens": stages.tokens,
        "tokens_per_s": stages.tokens / seconds,
        "stages": stages.seconds,
        "bottleneck": stages.bottleneck(),
    }


@dataclass(frozen=True)
class Truth:
    """Embeddings of texts by the dense forward: exact in float64, plain in the model's precision, both [texts, dim]."""

    which: list[int]
    exact: Tensor
    plain: Tensor
    eps: float

    def hold(self, found: np.ndarray, **bounds: float) -> None:
        """Hold embeddings, of which these texts' are compared, to the error law."""
        result = torch.from_numpy(found[self.which]).to(self.exact.device)
        error_law(result, self.plain, self.exact, eps=self.eps, **bounds)

    def near(self, found: np.ndarray, other: np.ndarray) -> None:
        """Hold every embedding to another library's, or another precision's, by the errors of these texts'."""
        off = np.linalg.norm(found.astype(np.float64) - other, axis=1)
        allowed = FAR * (float((self.plain.double() - self.exact).norm(dim=1).max()) + self.eps)
        assert off.max() <= allowed, f"text {off.argmax()} is off by {off.max():.3e}, allowed {allowed:.3e}"


def pooled_truth(embedder: Embedder, batch: Batch) -> Truth:
    (exact, plain), texts = truth_of(batch), chosen(batch)
    cu = cu_seqlens([batch.lengths[i] for i in texts], str(batch.device))
    exact, plain = (reference.pool(h, cu, embedder.pooling, embedder.normalize) for h in (exact, plain))
    return Truth(texts, exact, plain, torch.finfo(batch.model.dtype).eps)


def truth_of_texts(embedder: Embedder, texts: list[str], most: int = 64) -> Truth:
    """Of the first texts, tokenised by the plain call."""
    ids = embedder.tokenizer(texts[:most], truncation=True, max_length=embedder.max_length)["input_ids"]
    batch = batch_of(embedder.model, "", [len(i) for i in ids], max(map(len, ids)))
    batch.ids[batch.keep] = torch.tensor([i for one in ids for i in one], device=batch.device)
    return pooled_truth(embedder, batch)


def check_texts(embedder: Embedder, found: np.ndarray, texts: list[str], most: int = 64) -> Truth:
    """Hold the embeddings of the first texts to the error law."""
    truth = truth_of_texts(embedder, texts, most)
    truth.hold(found, largest=largest_error(embedder.model.device))
    return truth


def of_tokens(embedder: Embedder, longest: int, form: str, tokens: int) -> dict[str, Any]:
    """Token ids of random texts of a length, through the engine; and one full batch of them by the encoder alone."""
    lengths = np.tile(shapes.lengths(form, longest, tokens // REPEATS), REPEATS)  # a draw takes microseconds
    ids = np.random.default_rng(0).integers(1, embedder.model.config.vocab_size, lengths.sum(), dtype=np.int32)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    some = np.unique(np.linspace(0, len(lengths) - 1, SOME).astype(int))  # from all over, held to float64
    first = batch_of(embedder.model, "", lengths[some].tolist(), longest)
    first.ids[first.keep] = torch.from_numpy(np.concatenate([ids[ends[i] : ends[i + 1]] for i in some])).to(first.ids)

    def windows() -> Iterator[Window]:
        return (Window(ids[ends[a] : ends[b]], lengths[a:b], first=a) for a, b in cuts(len(lengths)))

    truth = pooled_truth(embedder, first)
    found, _ = drive(embedder, windows(), len(lengths))  # compiles and captures
    row = timed(embedder, windows, found, lambda again: truth.hold(again[some], largest=largest_error(first.device)))
    budget = embedder.budget(None)
    rows_of_batch = next(batches(lengths, budget))  # as the engine cuts it
    batch = batch_of(embedder.model, "", lengths[rows_of_batch].tolist(), int(lengths[rows_of_batch].max()))
    packed, cu, most, positions = batch.packed
    none = np.empty(0, np.int64)

    def compute() -> Tensor:
        return embedder._compute(packed, cu, most, positions, none, True)

    pooled_truth(embedder, batch).hold(compute().cpu().numpy(), largest=largest_error(batch.device))
    alone = timing.in_graph(compute, batch.device, 0.3)
    return row | {"encoder_tokens_per_s": sum(batch.lengths) / alone.median, "budget": budget}


def timed(
    embedder: Embedder,
    windows: Callable[[], Iterator[Window]],
    found: np.ndarray,
    hold: Callable[[np.ndarray], Any],
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """The row of the median round. What each gives is held as what was found before, and to it."""
    hold(found)
    rows, before = [], torch.from_numpy(found)  # whose threads matter: these are hundreds of megabytes
    for _ in range(rounds):
        again, row = drive(embedder, windows(), len(found))
        hold(again)
        off = (torch.from_numpy(again) - before).norm(dim=1)
        assert off.max() <= SAME, f"text {int(off.argmax())} is off by {off.max():.3e} in another round"
        rows.append(row)
    assert (before.norm(dim=1) - 1).abs().max() <= SAME, "an embedding is not of length 1"
    return sorted(rows, key=lambda row: row["seconds"])[rounds // 2] | {"samples_s": [r["seconds"] for r in rows]}


def of_texts(embedder: Embedder, texts: list[str], processes: int) -> dict[str, Any]:
    """Texts through tokenizer and engine; and the tokenizer alone."""
    source = embedder.text_windows(processes)

    def windows() -> Iterator[Window]:
        return (source.window(texts[a:b], a) for a, b in cuts(len(texts)))

    try:
        source.window(texts[: 4 * TOKENIZE], 0)  # starts the processes
        start = time.perf_counter()
        lengths = [window.lengths.sum() for window in windows()]
        alone = sum(lengths) / (time.perf_counter() - start)
        found, _ = drive(embedder, windows(), len(texts))
        truth = check_texts(embedder, found, texts)
        hold = partial(truth.hold, largest=largest_error(embedder.model.device))
        row = timed(embedder, windows, found, hold)
    finally:
        source.close()
    assert row["tokens"] == sum(lengths), (
        f"the tokenizer alone gave {sum(lengths)} tokens, in the engine {row['tokens']}"
    )
    return row | {"tokenizer_tokens_per_s": alone}


def run(
    matrix: Matrix,
    device: torch.device,
    *,
    minutes: float = 5,
    keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Token ids by length, and texts. keep: gets all rows so far after each."""
    deadline = time.monotonic() + 60 * minutes
    toy = matrix is shapes.TOY
    docstrings = [text for _, text in stdlib_docstrings()][: 200 if toy else None]
    tokenizer = tokenizer_for(docstrings, 500 if toy else VOCABULARY)
    copies = 1 if toy or device.type == "cpu" else 2
    texts = [text if i == 0 else f"{i} {text}" for i in range(copies) for text in docstrings]  # none twice
    rows: list[dict[str, Any]] = []
    for dtype in matrix.dtypes:
        if dtype is torch.float32 and not toy and device.type == "cuda":
            continue  # half precision is what the engine takes there
        model = model_of(matrix.shape, device, dtype)
        embedder = Embedder(model, tokenizer, pooling="mean", normalize=True, max_length=MAX_LENGTH)
        tokens = embedder.budget(None) * BATCHES if device.type == "cuda" else matrix.attended * 4
        for name, measure in _plan(embedder, texts, matrix, tokens):
            row: dict[str, Any] = {"input": name, "dtype": str(dtype).removeprefix("torch.")}
            if rows and time.monotonic() > deadline:  # the first, for the tokenizer's making took of the time
                rows.append(row | {"missing": "no time was left"})
                continue
            try:
                rows.append(row | measure())
            except Exception as error:  # of one input; the others go on, and the run fails in the end
                rows.append(row | {"wrong": f"{type(error).__name__}: {str(error)[:300]}"})
            keep(rows)
    return rows


def _plan(
    embedder: Embedder, texts: list[str], matrix: Matrix, tokens: int
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    of_ids = [
        (f"ids, L={longest}, {form}", partial(of_tokens, embedder, longest, form, tokens))
        for longest, form in product(matrix.lengths, ("fixed", "long-tailed"))
    ]
    yield from of_ids[:2]
    yield "texts, 0 tokenizer processes", partial(of_texts, embedder, texts, 0)
    yield from of_ids[2:]
    if embedder.model.device.type != "cpu":
        yield "texts, 4 tokenizer processes", partial(of_texts, embedder, texts, 4)


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        name = f"{row['input']:30} {row['dtype']:8}"
        if "wrong" in row:
            yield f"WRONG {name} {row['wrong']}"
        elif "tokens_per_s" in row:
            best = row.get("encoder_tokens_per_s") or row["tokenizer_tokens_per_s"]
            of = "encoder" if "encoder_tokens_per_s" in row else "tokenizer"
            yield (
                f"{name} {row['tokens_per_s']:12,.0f} tokens/s, {row['tokens_per_s'] / best:.2f} of the {of} alone, "
                f"waiting for the {row['bottleneck']}"
            )


@record.command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks engine", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="tiny sizes, for CPU")
    parser.add_argument("--minutes", type=record.minutes, default=5.0)
    parser.add_argument("--out", type=Path, help="a result file")
    args = parser.parse_args(argv)
    record.check_out(args.out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    matrix = shapes.TOY if args.toy else shapes.FULL if device.type == "cuda" else shapes.ON_CPU
    around = record.environment()
    with timing.Watch() as watch:
        rows = run(matrix, device, minutes=args.minutes)
    print(*lines(rows), sep="\n")
    if args.out:
        result = {"stage": "engine", "dry": args.toy, "rows": rows, "clocks": watch.samples}
        record.write(args.out, around | result)
    return int(failed(rows))


if __name__ == "__main__":
    sys.exit(main())
