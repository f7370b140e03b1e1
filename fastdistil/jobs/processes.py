"""One process a device: each takes a shard of the input, and what they wrote is merged in the end."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fastdistil.jobs.manifest import LOCK, MANIFEST, SHARD, Lock, read_manifest, remove, set_aside
from fastdistil.jobs.merge import merge, shard_directory

REJECTED = 3  # a process's status when it is done, but for some rows
LIFELINE = "FASTDISTIL_LIFELINE"
Replaced = tuple[Path, Callable[[Path], None]]  # a directory, and what removes from it what a job wrote


def split_devices(device: str | None) -> list[str]:
    """ "cuda:0,1" or "0,1" -> ["cuda:0", "cuda:1"]; what is one device stays one."""
    found: list[str] = []
    for name in (device or "").split(","):
        name = name.strip()
        if name.isdecimal():
            if found and found[0] == "cpu":
                raise ValueError(f"device {device!r} has a number behind cpu; write cuda:{name} for that CUDA device")
            name = f"{found[0].partition(':')[0] if found else 'cuda'}:{int(name)}"
        found.append(name)
    if len(found) > 1 and "" in found:
        raise ValueError(f"device {device!r} leaves one between commas out")
    whole = [name if ":" in name or name == "cpu" else f"{name}:0" for name in found]
    twice = [name for name in whole if whole.count(name) > 1 and name != "cpu"]
    if twice:
        raise ValueError(f"device {twice[0]} is named twice")
    return found


class Failed(ChildProcessError):
    """A device's process ended with `status`."""

    def __init__(self, device: str, status: int):
        # with 1 and 2 it has said itself what is wrong, and what to do
        hint = "" if status in (1, 2) else "; what is finished stays, go on with --resume"
        super().__init__(f"the process on {device} ended with status {status}{hint}")
        self.status = status


def run_on(
    devices: list[str], command: list[str], output: Path, *, shard: int, shards: int, resume: bool, overwrite: bool
) -> bool:
    """The command once a device, with its device, shard and output at the end, and what they wrote merged unless other
    shards are elsewhere; whether rows were rejected.

    Raises Failed where one fails; the others are stopped, and what all have finished stays.
    """
    output.mkdir(parents=True, exist_ok=True)
    total = shards * len(devices)
    directories = [shard_directory(output, shard * len(devices) + i, total) for i in range(len(devices))]
    _refuse(output, directories, total, resume=resume, overwrite=overwrite)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = str(max(1, cores // len(devices)))
    environment = {"OMP_NUM_THREADS": share, "RAYON_NUM_THREADS": share} | os.environ  # torch's, and the tokenizer's
    start = [sys.executable, "-m", "fastdistil.cli", *command]
    if resume and shards == 1 and _is_merged(output):
        # one process sees whether it is this job's, and whole
        alone = [*start, "--device", devices[0], "--output", str(output), "--num-shards", "1", "--shard-index", "0"]
        rejected = REJECTED in _together(devices[:1], [alone], environment, [], [])
        for directory in directories:
            _remove_shard(directory)
        return rejected
    divided = {shard_directory(output, i, total).name for i in range(total)}
    with contextlib.ExitStack() as held:
        held.enter_context(Lock(output))
        others = [p for p in output.iterdir() if SHARD.fullmatch(p.name) and p.name not in divided] if overwrite else []
        for path in others:  # of another division, which nobody may be at
            held.enter_context(Lock(path))
        commands = [
            [
                *(*start, "--device", device, "--output", str(directory)),
                *("--num-shards", str(total), "--shard-index", str(shard * len(devices) + i)),
            ]
            for i, (device, directory) in enumerate(zip(devices, directories, strict=True))
        ]
        replaced: list[Replaced] = [(path, _remove_shard) for path in others]
        replaced += [(output, remove)] if overwrite else []
        rejected = REJECTED in _together(devices, commands, environment, directories, replaced)
        if shards > 1:
            return rejected
        if resume:
            set_aside(output)
        merge(directories, output, overwrite=True, locked=True)
        for directory in directories:
            _remove_shard(directory)
        return rejected


def _refuse(output: Path, directories: list[Path], total: int, *, resume: bool, overwrite: bool) -> None:
    """Raise FileExistsError where the job would lose what lies in its output."""
    present = sorted(path.name for path in output.iterdir() if path.name != LOCK)
    divided = {shard_directory(output, i, total).name for i in range(total)}
    others = [name for name in present if name not in divided]
    if overwrite:
        return
    hint = ", or --overwrite to start over"
    if not resume:
        if found := others or [path.name for path in directories if path.is_dir() and any(path.iterdir())]:
            raise FileExistsError(f"{output} is not empty ({found[0]}); give another directory{hint}")
        return
    if stale := [name for name in others if SHARD.fullmatch(name)]:
        raise FileExistsError(
            f"{output} holds {stale[0]}, of a job on another number of devices; go on with as many{hint}"
        )
    known = (output / MANIFEST).is_file()
    # an unfinished one is a merge that was interrupted, or the work of a job on one device
    if known and not (_is_merged(output) or all(map(_is_finished, directories))):
        raise FileExistsError(f"{output} holds an unfinished job on one device; go on with one{hint}")


def _is_merged(output: Path) -> bool:
    """Whether the output was finished once; what is unfinished and has parts is being made whole again."""
    if not (output / MANIFEST).is_file():
        return False
    manifest = read_manifest(output)
    return manifest.finished or bool(manifest.parts)


def _is_finished(directory: Path) -> bool:
    return (directory / MANIFEST).is_file() and read_manifest(directory).finished


def _together(
    devices: list[str],
    commands: list[list[str]],
    environment: dict[str, str],
    directories: list[Path],
    replaced: list[Replaced],
) -> list[int]:
    """The status of each command. What earlier jobs wrote is removed, each in its way, when one of the directories
    holds something to put in its place."""
    began, cleared = time.time() - 0.1, False
    with _lifeline() as (line, stop):
        children: list[subprocess.Popen] = []
        try:
            for command in commands:
                child = subprocess.Popen(
                    command,
                    env=environment | {LIFELINE: str(line)},
                    stdin=subprocess.DEVNULL,
                    pass_fds=[line],
                    process_group=0,  # Ctrl-C is for this process, which tells them
                )
                children.append(child)
            while True:
                states = [child.poll() for child in children]
                for device, state in zip(devices, states, strict=True):
                    if state not in (None, 0, REJECTED):
                        raise Failed(device, state)
                if not cleared and any(_since(directory / MANIFEST, began) for directory in directories):
                    for path, clear in replaced:
                        clear(path)
                    cleared = True
                if None not in states:
                    return [child.returncode for child in children]
                time.sleep(0.2)
        finally:
            stop()
            for child in children:
                child.wait()


def _since(path: Path, moment: float) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime >= moment
    return False


def _remove_shard(directory: Path) -> None:
    """What a job wrote there; what is somebody else's stays."""
    remove(directory)
    (directory / LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is not there, or not empty
        directory.rmdir()


@contextlib.contextmanager
def _lifeline() -> Iterator[tuple[int, Callable[[], None]]]:
    """What children read from to see that they have to stop, for nothing is ever written there: it ends when this
    process does, however that ends, or by the function."""
    there, here = os.pipe()
    ends = [here]

    def stop() -> None:
        while ends:
            os.close(ends.pop())

    try:
        yield there, stop
    finally:
        stop()
        os.close(there)


def end_with_parent() -> None:
    """In a child of `run_on`: stop as on Ctrl-C when the parent is gone or says so."""
    if (line := os.environ.pop(LIFELINE, None)) is None:
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background of a script ignores

    def wait() -> None:
        os.read(int(line), 1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()
