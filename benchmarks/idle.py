"""Triton's own launcher on a machine without a GPU, on top of a driver that runs nothing.

So a launch is all that it is on the host: kernels are compiled and loaded, descriptors made, arguments unpacked and
handed over. What is handed over can be looked at, and how long that takes can be measured. Nothing is computed.
"""

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.runtime import driver

from fastdistil.kernels import _configs, _launch, _target

SOURCE = Path(__file__).with_name("idle_driver.c")
WIDTHS = {"i1": 4, "i8": 1, "i32": 4, "i64": 8, "fp32": 4}  # bytes that a launcher hands over; of pointers 8
TENSOR_MAP = 128
ARCH, PROCESSORS, STREAM = 90, 132, 77  # an H200's; the stream is a number


class Idle:
    """What the stand-in was asked for."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library

    def _number(self, name: str, kind: type = ctypes.c_long) -> Any:
        return kind.in_dll(self._library, name)  # type: ignore[attr-defined]

    @property
    def launches(self) -> int:
        return self._number("launches").value

    def expect(self, compiled: CompiledKernel) -> None:
        """Keep the parameters of this kernel's launches from now on."""
        widths = []
        for kind in compiled.src.signature.values():
            if kind.startswith("tensordesc"):
                widths += [TENSOR_MAP, 4, 4, 8, 8]  # its shape and strides, too
            elif kind != "constexpr":
                widths.append(8 if kind[0] == "*" else WIDTHS[kind])
        known = (ctypes.c_int * 64).in_dll(self._library, "widths")
        for i, width in enumerate(widths):
            known[i] = width
        self._number("n", ctypes.c_int).value = len(widths)
        self._number("expected").value = compiled.function

    @property
    def last(self) -> bytes:
        """The last launch: grid, block, shared memory, kernel, stream, attributes and parameters."""
        size = self._number("given_bytes", ctypes.c_int).value
        return bytes((ctypes.c_ubyte * 4096).in_dll(self._library, "given"))[:size]


class _Driver(nvidia.CudaDriver):
    def __init__(self) -> None:
        super().__init__()
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: STREAM
        self.get_device_capability = lambda device: divmod(ARCH, 10)


@functools.cache
def _stand_in() -> tuple[Idle, str]:
    """The library, which stays loaded, and where it is."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = Path(folder, "libcuda.so.1")
    headers = Path(nvidia.__file__).with_name("include")
    compiler = os.environ.get("CC") or shutil.which("gcc") or "clang"
    command = [compiler, "-O2", "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    subprocess.run([*command, f"-I{headers}", str(SOURCE), "-o", str(library)], check=True)
    return Idle(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)), folder  # found by its name from now on


@contextmanager
def idle_driver() -> Iterator[Idle]:
    """Within, kernels are launched with CPU tensors as if these were on an H200, and nothing runs.

    Needs a C compiler. Raises RuntimeError where there is a GPU, whose driver would be in its place.
    """
    if torch.cuda.is_available():
        raise RuntimeError("this machine has a GPU: a stand-in for its driver would come in its way")
    idle, folder = _stand_in()
    caches = nvidia.libcuda_dirs, nvidia.library_dirs
    with ExitStack() as within:
        within.enter_context(patch.dict(os.environ, TRITON_LIBCUDA_PATH=folder))
        for cache in caches:
            cache.cache_clear()
            within.callback(cache.cache_clear)
        within.enter_context(patch.object(driver, "_active", _Driver()))
        within.enter_context(patch.object(_configs, "architecture", lambda device: ARCH))
        within.enter_context(patch.object(_configs, "processors", lambda device: PROCESSORS))
        within.enter_context(patch.object(_launch, "_device_of", lambda tensor: 0))
        within.enter_context(patch.object(_target, "why_not", lambda device: None))
        _configs._gemm.cache_clear()
        within.callback(_configs._gemm.cache_clear)
        yield idle
