"""The cases and peers of `python -m benchmarks kernels` and `encoder` for pytest-benchmark, whose options all work:

    python -m pytest --benchmark-only benchmarks/bench_kernels.py -k "attention and fastdistil" --benchmark-autosave

Equality with float64 comes first, and a round ends when the device is done. BENCH_TOY=1 takes tiny sizes.
"""

import os
from contextlib import ExitStack
from functools import cache
from itertools import islice, product

import pytest
import torch

from benchmarks import encoder, kernels, shapes, timing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MATRIX = shapes.TOY if os.environ.get("BENCH_TOY") else shapes.FULL if DEVICE.type == "cuda" else shapes.ON_CPU
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in MATRIX.dtypes}
ROUNDS, WARMUP = 20, 3


def op_cases():
    for name_of_dtype, dtype in DTYPES.items():
        for op in kernels.OPS:
            # on the meta device the shapes have names and no memory
            for at, case in enumerate(kernels.cases(op, MATRIX, dtype, torch.device("meta"))):
                for name, _ in kernels.PROVIDERS[op]:
                    yield pytest.param(op, name_of_dtype, at, name, id=f"{op}, {case.name}, {name_of_dtype}, {name}")


def batches():
    for dtype, texts, longest in product(DTYPES, MATRIX.batches, MATRIX.lengths):
        for name, _ in encoder.PROVIDERS:
            yield pytest.param(dtype, texts, longest, name, id=f"encoder, {texts} x {longest}, {dtype}, {name}")


@cache
def model(dtype):
    return encoder.model_of(MATRIX.shape, DEVICE, DTYPES[dtype])


_last: dict = {}


def remembered(key, compute):
    """Of neighbouring tests on one case, computed once."""
    if key not in _last:
        _last.clear()
        _last[key] = compute()
    return _last[key]


def timed(benchmark, check):
    with ExitStack() as stack:
        try:
            run, error = check(stack)
        except kernels.Missing as why:
            pytest.skip(str(why))
        benchmark.extra_info["error"] = error

        def synchronized():
            run()
            timing.synchronize(DEVICE)

        benchmark.pedantic(synchronized, rounds=ROUNDS, warmup_rounds=WARMUP)


@pytest.mark.parametrize(("op", "dtype", "at", "provider"), op_cases())
def bench_op(benchmark, op, dtype, at, provider):
    def compute():
        case = next(islice(kernels.cases(op, MATRIX, DTYPES[dtype], DEVICE), at, None))
        return case, *kernels.expected(case)

    case, truth, plain = remembered((op, dtype, at), compute)
    benchmark.extra_info |= {"flops": case.cost.flops, "bytes": case.cost.bytes}
    make = dict(kernels.PROVIDERS[op])[provider]
    timed(benchmark, lambda stack: kernels.checked(case, make, stack, truth, plain))


@pytest.mark.parametrize(("dtype", "texts", "longest", "provider"), batches())
def bench_encoder(benchmark, dtype, texts, longest, provider):
    def compute():
        batch = encoder.batch_of(model(dtype), f"{texts} x {longest}", [longest] * texts, longest)
        return batch, *encoder.truth_of(batch)

    batch, truth, eager = remembered((dtype, texts, longest), compute)
    benchmark.extra_info["tokens"] = texts * longest
    make, peer = dict(encoder.PROVIDERS)[provider], not provider.startswith("fastdistil")
    timed(benchmark, lambda stack: encoder.checked(batch, make, stack, truth, eager, peer))
