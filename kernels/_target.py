"""Whether Triton kernels can run on a device, and if not, why: the one question asked before any launch."""

import functools
import importlib.metadata
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch

OLDEST_CAPABILITY = (8, 0)  # Ampere: the first with bf16 tensor cores and cp.async


@functools.cache
def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def why_not(device: torch.device) -> str | None:
    """The reason Triton kernels cannot run on `device`, in words, or None when they can."""
    if device.type == "cpu" and interpreted():
        return None if importlib.util.find_spec("triton") else "triton is not installed (pip install triton)"
    if device.type != "cuda":
        return f"Triton runs on CUDA, not on {device.type}"
    if torch.version.hip is not None:
        return "this torch is built for ROCm, which is not supported"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if (found := torch.cuda.get_device_capability(device)) < OLDEST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} is sm_{found[0]}{found[1]}; kernels need sm_80 (Ampere) or newer"
    return missing_compiler()


@functools.cache
def missing_compiler() -> str | None:
    """Triton builds its launcher with the C compiler and Python's headers at the first call."""
    if (cc := os.environ.get("CC")) is not None and not shutil.which(cc):
        return f"CC is {cc!r}, which is no program; unset it or set it to gcc or clang"
    if not (cc or any(map(shutil.which, ("gcc", "clang")))):
        return "no C compiler found; install gcc or clang, or set CC"
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # where Debian keeps the headers, and Triton looks
    header = Path(sysconfig.get_paths(scheme)["include"]) / "Python.h"
    return None if header.is_file() else f"{header} is missing; install Python's development headers"


def triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def cache_directory() -> Path:
    """Where Triton keeps compiled kernels."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    return Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
