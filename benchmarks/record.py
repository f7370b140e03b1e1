"""Result files: JSON with where, when and of what commit it was measured, and a digest that an edit breaks."""

import argparse
import functools
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import fastdistil
from benchmarks.timing import gpu_uuid, nvidia_smi

ROOT = Path(__file__).resolve().parent.parent
DRIVER = Path("/proc/driver/nvidia/version")
GPU = ("name", "uuid", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.mem", "power.limit")


def environment() -> dict[str, Any]:
    """The machine, versions, commit and command of this process."""
    import triton

    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *_command()]),
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
        uuid = gpu_uuid()
        # nvidia-smi lists every card, whatever CUDA_VISIBLE_DEVICES leaves to this process
        cards = [card for card in nvidia_smi(*GPU) if uuid and card["uuid"].endswith(uuid)]
        found["gpu"] = (cards or [{"uuid": f"GPU-{uuid}" if uuid else "", "driver_version": _driver()}])[0] | {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "l2": properties.L2_cache_size,
        }
    return found


def _driver() -> str:
    """Of a card that nvidia-smi does not list, or where there is no nvidia-smi."""
    for card in nvidia_smi("driver_version"):
        return card["driver_version"]
    try:
        said = DRIVER.read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", said)
    return found[0] if found else ""


def commit() -> dict[str, Any]:
    """Where this lies in no repository of its own, what FASTDISTIL_COMMIT says, as `git describe --always --dirty
    --abbrev=40 --exclude=*` writes it, or None."""

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True, check=True).stdout.strip()

    with suppress(OSError, subprocess.SubprocessError):
        if Path(git("rev-parse", "--show-toplevel")).samefile(ROOT):  # and not of what it was copied into
            return {"id": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    told = os.environ.get("FASTDISTIL_COMMIT")
    return {"id": told and told.removesuffix("-dirty"), "dirty": told and told.endswith("-dirty")}


def is_commit(found: dict[str, Any]) -> bool:
    return bool(re.fullmatch("[0-9a-f]{7,40}", found.get("id") or "")) and isinstance(found.get("dirty"), bool)


def _command() -> list[str]:
    module = getattr(sys.modules["__main__"], "__spec__", None)
    return [*(["-m", module.name.removesuffix(".__main__")] if module else sys.argv[:1]), *sys.argv[1:]]


def _cpu() -> str:
    """The processor's name, and of AMD's with AVX-512 the generation: a name for clouds does not tell it."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0]
    except OSError:
        return platform.processor()
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    name = said.get("model name") or platform.processor()
    if said.get("vendor_id") == "AuthenticAMD" and "avx512f" in said.get("flags", "").split():
        generation = {"25": "Zen 4", "26": "Zen 5"}.get(said.get("cpu family", ""))
        return f"{name}, {generation}" if generation else name
    return name


class WrongUse(ValueError):
    """Of a command: said in a line, exit status 2."""


def command(main: Callable[[list[str] | None], int]) -> Callable[..., int]:
    """A `main` that says wrong use in a line."""

    @functools.wraps(main)
    def saying(argv: list[str] | None = None) -> int:
        try:
            return main(argv)
        except WrongUse as error:
            print(f"{main.__module__}: {error}", file=sys.stderr)
            return 2

    return saying


def minutes(text: str) -> float:
    """The type of an argument."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text}: it must be more than 0")
    return float(text)


def check_out(path: Path | None) -> None:
    """Raise WrongUse, before anything is measured, where a result could not be written."""
    if path is None:
        return
    if path.is_dir():
        raise WrongUse(f"--out {path} is a directory; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WrongUse(f"--out {path}: {error}") from error
    check_writable(path.parent)


def check_writable(directory: Path) -> None:
    """By writing, for some file systems say yes to who asks."""
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise WrongUse(f"--out: {directory} cannot be written to: {error}") from error


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
    return _digested(path.read_text(encoding="utf-8"), path)


def _digested(text: str, name: Any) -> dict[str, Any]:
    try:
        result = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is no JSON: {error}") from error
    if not isinstance(result, dict) or result.get("digest") != digest(result):
        raise ValueError(f"{name} is not as it was measured: its digest does not fit; measure again")
    return result


SAID = ("date", "command", "torch", "triton", "cpu")
SAID_OF_GPU = ("name", "uuid", "driver_version")


def measured(path: Path) -> dict[str, Any]:
    """`read`, and ValueError for what does not say where it comes from, has no raw samples, or is a rehearsal."""
    return checked(path.read_text(encoding="utf-8"), path)


def checked(text: str, path: Any) -> dict[str, Any]:
    """`measured`, of a file's text."""
    result = _digested(text, path)
    if result.get("dry"):
        raise ValueError(f"{path} is a rehearsal's, not a measurement")
    around = result.get("machine_info") or result
    missing = [name for name in SAID if not around.get(name)]
    if not is_commit(around.get("commit") or {}):
        missing.append("commit")
    if "gpu" not in around:
        missing.append("gpu, or null")
    if (gpu := around.get("gpu")) is not None:
        missing += [f"gpu's {name}" for name in SAID_OF_GPU if not gpu.get(name)]
        # or why there are none, which the watch says
        if not any(
            ("clocks.sm" in one and "power.draw" in one) or "missing" in one for one in result.get("clocks", ())
        ):
            missing.append("clocks")
    rows = result.get("rows", [])
    if result.get("stage") in ("kernels", "encoder", "engine") and not rows:
        missing.append("rows")
    if "machine_info" in result and not result.get("benchmarks") and not result.get("wrong"):
        missing.append("benchmarks")
    timed = [row[way] for row in rows for way in ("cold", "graph") if way in row]
    timed += [row for row in rows if "median_us" in row]
    if not all(took.get("samples_us") for took in timed) or not all(
        row.get("samples_s") for row in rows if "tokens_per_s" in row and "median_us" not in row
    ):
        missing.append("samples of a row")
    if not all((entry.get("stats") or {}).get("data") for entry in result.get("benchmarks", [])):
        missing.append("data of a benchmark")
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; measure again")
    return result
