"""Result files: JSON with where, when and of what commit it was measured, and a digest that an edit breaks."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import fastdistil
from benchmarks.timing import nvidia_smi

ROOT = Path(__file__).resolve().parent.parent
GPU = ("name", "uuid", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.mem", "power.limit")


def environment() -> dict[str, Any]:
    """The machine, versions, commit and command of this process."""
    import triton

    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.executable).name, *_command()]),
        "fastdistil": fastdistil.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "platform": platform.platform(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["cuda"] = torch.version.cuda
        found["gpu"] = (nvidia_smi(*GPU) or [{}])[0] | {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "l2": properties.L2_cache_size,
        }
    return found


def commit() -> dict[str, Any]:
    """Where there is no repository, both are None."""

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"id": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {"id": os.environ.get("FASTDISTIL_COMMIT"), "dirty": None}


def _command() -> list[str]:
    module = getattr(sys.modules["__main__"], "__spec__", None)
    return [*(["-m", module.name.removesuffix(".__main__")] if module else sys.argv[:1]), *sys.argv[1:]]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def digest(result: dict[str, Any]) -> str:
    """Of all but the digest itself."""
    rest = {key: value for key, value in result.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all."""
    result = json.loads(json.dumps(result))  # tuples become lists, so that what is read has the same digest
    text = json.dumps(result | {"digest": digest(result)}) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def read(path: Path) -> dict[str, Any]:
    """Raises ValueError for a file that was edited after it was measured, or never had a digest."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(result, dict) or result.get("digest") != digest(result):
        raise ValueError(f"{path} is not as it was measured: its digest does not fit; measure again")
    return result
