"""Launches past Triton's own look at their arguments: what the driver is handed is what Triton hands it.

The driver is a stand-in that runs nothing; kernels are compiled, loaded and launched by Triton's own launcher.
"""

import gc
import weakref
from itertools import product
from unittest.mock import patch

import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

from fastdistil import DistilBertConfig, DistilBertModel, ops
from fastdistil._register import FORMS
from fastdistil.kernels import _configs, _launch
from fastdistil.kernels._launch import Launcher
from fastdistil.kernels._target import interpreted, missing_compiler

if interpreted() or torch.cuda.is_available() or missing_compiler():
    pytest.skip("needs Triton's launcher, a C compiler and no GPU", allow_module_level=True)

idle = pytest.importorskip("benchmarks.idle")
from fastdistil.kernels import _gemm, attention, layer_norm, packing, pooling  # noqa: E402

HALF = torch.float16


@pytest.fixture(scope="module")
def driver():
    with idle.idle_driver() as driver:
        yield driver


def zeros(*shape, dtype=HALF):
    return torch.zeros(shape, dtype=dtype)


CU = torch.arange(0, 5, dtype=torch.int32) * 4
VECTOR = zeros(768)


def product_of(op, rows, dtype=HALF, width=768, depth=768, live=CU, **more):
    x, weight, bias = zeros(rows, depth, dtype=dtype), zeros(width, depth, dtype=dtype), zeros(width, dtype=dtype)
    return lambda: _gemm.gemm(op, x, weight, bias, "gelu" if op == "bias_gelu" else "none", live, **more)


CALLS = {
    "few rows": product_of("linear", 16),
    "parts": product_of("linear_add_layer_norm", 16, depth=3_072, in_parts=True),
    "tiles by descriptors": product_of("bias_gelu", 5_632),
    "wide tiles": product_of("linear", 16_896, live=None),
    "unaligned rows": product_of("linear", 100, depth=769),
    "float32": product_of("linear", 5_632, torch.float32),
    "sum of parts": lambda: layer_norm.add_layer_norm(
        zeros(8, 16, 768, dtype=torch.float32), zeros(16, 768), VECTOR, VECTOR, 1e-12, CU
    ),
    "rows of nobody": lambda: layer_norm.add_layer_norm(zeros(16, 768), zeros(16, 768), VECTOR, VECTOR, 1e-5),
    "embeddings": lambda: layer_norm.embed_layer_norm(
        *(torch.zeros(16, dtype=torch.int64),) * 2, zeros(99, 768), zeros(512, 768), VECTOR, VECTOR, 1e-12, CU
    ),
    "short attention": lambda: attention.attention(zeros(16, 2_304), CU, 16, 12),
    "single attention": lambda: attention.attention(zeros(16, 2_304), CU, 64, 12, zeros(12)),
    "looped attention": lambda: attention.attention(zeros(16, 2_304), CU, 512, 12),
    "pooling": lambda: pooling.pool(zeros(16, 768), CU, "mean", True),
    "packing": lambda: packing.pack(torch.ones(2, 9, dtype=torch.bool), torch.ones(2, 9, dtype=torch.int64)),
    "unpacking": lambda: packing.unpack(zeros(16, 768), torch.zeros(18, dtype=torch.int64), zeros(1, 768)),
}


def refuse(*args):
    raise AssertionError("left to Triton")


@pytest.mark.parametrize(
    ("name", "overlap"), [*((name, False) for name in CALLS), ("tiles by descriptors", True), ("sum of parts", True)]
)
def test_the_driver_is_handed_what_triton_hands_it(name, overlap, driver, modes, monkeypatch):
    modes.overlap = overlap
    by_triton, mine, seen = Launcher._by_triton, Launcher.__call__, []

    def both(self, grid, tensors, numbers):
        driver.expect(by_triton(self, grid, tensors, numbers))
        by_triton(self, grid, tensors, numbers)
        expected = driver.last
        assert len(expected) > 36 + 8 * len(tensors)  # the grid and the like, a pointer for each, and numbers
        mine(self, grid, tensors, numbers)  # of its kind the first
        with patch.object(Launcher, "_by_triton", refuse):
            before = driver.launches
            mine(self, grid, tensors, numbers)
        assert driver.last == expected and driver.launches == before + 1
        seen.append(self.kernel.__name__)

    monkeypatch.setattr(Launcher, "__call__", both)
    CALLS[name]()
    assert len(seen) == 1
    assert ("tma" in seen[0]) == ("tiles" in name)


def test_every_kernel_is_among_the_calls(driver, monkeypatch):
    launched = set()
    monkeypatch.setattr(Launcher, "__call__", lambda self, *given: launched.add(self.kernel.__name__))
    for call in CALLS.values():
        call()
    modules = _gemm, attention, layer_norm, packing, pooling
    kernels = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
    assert launched == {kernel.__name__ for kernel in kernels if "OVERLAP" in kernel.arg_names} - {"begin"}


@pytest.mark.parametrize("size", [(1, 16), (4, 128), (48, 128)], ids=str)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_model_launches_past_the_ops_what_they_launch(batch_invariant, size, driver, modes, monkeypatch):
    modes.batch_invariant = batch_invariant
    for name, forms in FORMS.items():
        monkeypatch.setattr(ops, f"_{name}", forms["cuda"])
    for module in ("ops", "packing", "inputs", "model"):
        monkeypatch.setattr(f"fastdistil.{module}.can_look", lambda device: False)
    torch.manual_seed(0)
    model = DistilBertModel(DistilBertConfig(vocab_size=99, n_layers=1)).half().eval()
    model.transformer.layer[0].sa_layer_norm.eps = 1e-5
    ids, launched, mine = torch.ones(size, dtype=torch.int64), [], Launcher.__call__

    def record(self, grid, tensors, numbers):
        kinds = [None if t is None else (t.shape, t.dtype) for t in tensors]
        launched.append((self.kernel.__name__, self.constants, grid, kinds, numbers))
        return mine(self, grid, tensors, numbers)

    monkeypatch.setattr(Launcher, "__call__", record)
    with torch.inference_mode():
        for mask in (torch.ones_like(ids), None):
            launched.clear()
            model(ids, mask)
            direct = launched.copy()
            launched.clear()
            with monkeypatch.context() as patch:
                patch.setattr(ops, "is_unseen", lambda device: False)
                model(ids, mask)
            assert launched == direct and len(direct) == (10 if mask is not None else 8)


def test_another_kind_of_call_is_compiled_for_itself(driver):
    """Each differs from the first in one thing that Triton compiles for."""
    launch = Launcher(layer_norm._add_layer_norm, False, (), dict(DIM=48, BLOCK=64, ROWS=2, PARTS=1, num_warps=4))
    half, single = zeros(4, 48), zeros(4, 48, dtype=torch.float32)

    def launched(x=half, residual=half, y=half, cu_seqlens=CU, vector=half, eps=1e-12):
        launch((2,), (x, residual, vector, vector, y, cu_seqlens), (4, 4, eps))
        return driver.last

    kinds = [{}, {"x": single}, {"residual": single}, {"y": single}, {"vector": single}, {"cu_seqlens": None}]
    first = [launched(**kind) for kind in kinds]
    assert [launched(**kind) for kind in kinds] == first and len(set(first)) == len(kinds)
    assert len(launch._compiled) == len(kinds)
    launch = Launcher(_gemm.gemm_pointer, False, (), _pointer_constants())
    found = set()
    for n, k in product((16, 24, 1), (16, 24)):  # multiples of 16, others, and 1
        launch((1, 1), (half, half, half, half, None), (0, 4, n, k))
        found.add(next(reversed(launch._compiled.values()))[1])
    assert len(found) == 6


def test_a_binary_stays_while_it_can_be_launched(driver):
    launch = Launcher(layer_norm._add_layer_norm, False, (), dict(DIM=48, BLOCK=64, ROWS=4, PARTS=1, num_warps=4))
    given = (1,), (*[zeros(4, 48)] * 5, None), (0, 4, 1e-12)
    launch(*given)
    compiled = weakref.ref(launch._by_triton(*given))
    launch.kernel.device_caches.clear()  # which Triton holds it by
    gc.collect()
    assert compiled() is not None
    launch._compiled.clear()
    gc.collect()
    assert compiled() is None


def _pointer_constants():
    how = _configs.GemmLaunch(_configs.Gemm("pointer", 16, 16, 16, warps=4, stages=1), "ieee", False, 1)
    return _gemm._pointer(how, "none", 1, False, 1, False).constants


def test_what_is_left_to_triton(driver, monkeypatch):
    launch = Launcher(layer_norm._add_layer_norm, False, (), dict(DIM=48, BLOCK=64, ROWS=2, PARTS=1, num_warps=4))
    x, odd = zeros(4, 48), zeros(4 * 48 + 1)[1:].view(4, 48)
    by_triton, seen = Launcher._by_triton, []
    monkeypatch.setattr(Launcher, "_by_triton", lambda *args: seen.append(args) or by_triton(*args))

    def is_left(y=x, rows=4):
        seen.clear()
        launch((2,), (x, x, x, x, y, None), (0, rows, 1e-12))
        return bool(seen)

    assert is_left() and not is_left()
    assert is_left(y=odd) and is_left(y=odd)  # its kernel has no wide accesses
    assert is_left(rows=2**31) and is_left(rows=2**31)  # and its rows are counted in 64 bits
    kernel, runtime = layer_norm._add_layer_norm, triton.knobs.runtime
    watched = []
    for times, hooks in enumerate((runtime.launch_enter_hook, runtime.launch_exit_hook), 1):
        hooks.add(watched.append)
        assert is_left() and len(watched) == times
        hooks.remove(watched.append)
        assert not is_left()
    with patch.object(kernel, "pre_run_hooks", [lambda *args, **kwargs: None]):
        assert is_left()
    with patch.object(triton, "__version__", "3.99.0"):  # of which nobody knows how it launches
        newer = Launcher(kernel, False, (), launch.constants)
        assert not newer._is_known and launch._is_known
        monkeypatch.setattr(launch, "_is_known", newer._is_known)
        assert is_left() and is_left()
        monkeypatch.setattr(launch, "_is_known", True)
    with patch.object(_launch, "_device_of", lambda tensor: 1):
        assert is_left() and not is_left()  # another device has its own binary
    assert not is_left()


def test_the_stand_in_may_be_entered_again(driver, monkeypatch):
    before = driver.launches
    with idle.idle_driver() as again:
        layer_norm.add_layer_norm(zeros(16, 768), zeros(16, 768), VECTOR, VECTOR, 1e-5)
    assert again.launches == driver.launches == before + 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="this machine has a GPU"), idle.idle_driver():
        pass


def test_what_the_driver_refuses_is_an_error(driver):
    how = _configs.GemmLaunch(_configs.GEMM[90]["half", "many"], "ieee", True, 132)
    launch, numbers = _gemm._tma(how, "none", 8, overlap=False), (0, 128, 128, 64, 1)
    x, odd, y = zeros(128, 64), zeros(128, 68), zeros(128, 128)
    for _ in range(2):
        launch((1,), (x, x, y, VECTOR, None), numbers)
    with pytest.raises(RuntimeError, match="refused by the stand-in"):  # rows of 136 bytes
        launch((1,), (odd, odd, y, VECTOR, None), numbers)
