"""What a registered op costs beside the function that it calls: dispatch alone, then with the public op's checks.

The scale is a bare op by the same scheme on the same machine, with nothing but define and impl.
"""

from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import microseconds
from fastdistil import ops
from fastdistil._register import register

CALLS, ROUNDS = 2_000, 60


def body(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def bench_a_registered_op(benchmark):
    library = torch.library.Library("fastdistil_bench", "DEF")
    library.define("bare(Tensor x, Tensor weight, Tensor bias, Tensor? cu_seqlens=None) -> Tensor")
    library.impl("bare", body, "CPU")
    bare = torch.ops.fastdistil_bench.bare.default
    registered = register(body, fake=lambda x, w, *a: x.new_empty(x.shape[0], w.shape[0]), autocast="compute")
    given = torch.randn(4, 32), torch.randn(32, 32), torch.randn(32), torch.tensor([0, 4], dtype=torch.int32)
    calls = {
        "body": lambda: body(*given),
        "bare": lambda: bare(*given),
        "registered": lambda: registered(*given),
        "checks": lambda: ops._check_linear(*given),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}

    def once():  # all of them in every round, for the machine is shared
        for name, call in calls.items():
            times[name].append(microseconds(call, CALLS))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            assert torch.equal(registered(*given), body(*given)) and torch.equal(bare(*given), body(*given))
            benchmark.pedantic(once, rounds=ROUNDS, warmup_rounds=2)
    finally:
        torch.set_num_threads(threads)
    taken = {name: median(found) for name, found in times.items()}
    benchmark.extra_info.update(
        body_us=taken["body"],
        bare_overhead_us=taken["bare"] - taken["body"],
        registered_overhead_us=taken["registered"] - taken["body"],
        checks_us=taken["checks"],
        compared={"registered by bare": [r / b for r, b in zip(times["registered"], times["bare"], strict=True)]},
    )
    assert taken["registered"] <= taken["body"] + 1.5 * (taken["bare"] - taken["body"])
    print(*(f"\n{name}: {value:.2f}" for name, value in benchmark.extra_info.items() if name != "compared"))
