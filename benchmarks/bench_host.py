"""What a model's call on a GPU takes of the host, on a driver that runs nothing: CPU tensors, Triton's own launcher.

DistilBERT-base in float16, with masks, without captured graphs. Beside it the same launches through the ops and by
Triton's own look at every argument, and transformers' DistilBERT on CPU with one short text at a width of 24, which
leaves its dispatch and hardly anything to compute. What a driver needs for a launch is in neither.
"""

from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from unittest.mock import patch

import pytest
import torch

from benchmarks.idle import idle_driver
from benchmarks.timing import microseconds
from fastdistil import DistilBertConfig, DistilBertModel, ops
from fastdistil._register import FORMS
from fastdistil.kernels._launch import Launcher

if torch.cuda.is_available():
    pytest.skip("this suite is of a machine without a GPU", allow_module_level=True)
transformers = pytest.importorskip("transformers")

CALLS, ROUNDS = 20, 40
LAUNCHES = 6 * 7 + 3  # packing, embeddings, unpacking
BATCHES = {"1 x 16": (1, 16), "1 x 128": (1, 128), "32 x 128": (32, 128)}


def _through_the_ops(within: ExitStack) -> None:
    within.enter_context(patch.object(ops, "is_unseen", lambda device: False))
    within.enter_context(patch.object(Launcher, "__call__", Launcher._by_triton))


@pytest.fixture(scope="module")
def driver():
    with idle_driver() as driver, ExitStack() as within:
        kernels = within.enter_context(torch.library._scoped_library("fastdistil", "IMPL"))
        for name, forms in FORMS.items():
            kernels.impl(name, forms["cuda"], "CPU", allow_override=True)
        for module in ("ops", "packing", "inputs", "model"):  # as on CUDA
            within.enter_context(patch(f"fastdistil.{module}.can_look", lambda device: False))
        yield driver


@pytest.mark.parametrize("size", BATCHES)
def bench_host(size, driver, benchmark):
    torch.manual_seed(0)
    model = DistilBertModel(DistilBertConfig(vocab_size=1_000)).half().eval()
    narrow = dict(vocab_size=1_000, dim=24, hidden_dim=96, attn_implementation="sdpa")
    peer = transformers.DistilBertModel(transformers.DistilBertConfig(**narrow)).eval()
    ids = torch.randint(1_000, BATCHES[size])
    mask = torch.ones_like(ids)

    def launched() -> int:
        before = driver.launches
        model(ids, mask)
        return driver.launches - before

    ways: dict[str, Callable[[], object]] = {
        "fastdistil": lambda: model(ids, mask),
        "through the ops": lambda: model(ids, mask),
        # of one short text whatever the batch: more would be computing
        "transformers sdpa": lambda: peer(ids[:1, :16], attention_mask=mask[:1, :16]),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}

    def once():  # all of them in every round, for the machine is shared
        for name, call in ways.items():
            with ExitStack() as within:
                if name == "through the ops":
                    _through_the_ops(within)
                call()
                times[name].append(microseconds(call, CALLS))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            with ExitStack() as within:
                _through_the_ops(within)
                assert launched() == LAUNCHES
            assert launched() == LAUNCHES
            benchmark.pedantic(once, rounds=ROUNDS, warmup_rounds=2)
    finally:
        torch.set_num_threads(threads)
    ours, ops_too, theirs = times.values()
    taken = {name: median(found) for name, found in times.items()}
    benchmark.extra_info.update(
        batch=size,
        us=taken,
        compared={
            f"{size}, the ops by ours": [t / o for t, o in zip(ops_too, ours, strict=True)],
            f"{size}, transformers by ours": [t / o for t, o in zip(theirs, ours, strict=True)],
        },
    )
    print(f"\n{size}: " + ", ".join(f"{name} {us:.0f} us" for name, us in taken.items()))
