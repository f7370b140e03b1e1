"""One process a device: each takes a shard of the input, and what they wrote is merged in the end."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from fastdistil.jobs.manifest import MANIFEST, Lock, Manifest, read_manifest
from fastdistil.jobs.merge import merge, shard_directory

LIFELINE = "FASTDISTIL_LIFELINE"


def split_devices(device: str | None) -> list[str]:
    """ "cuda:0,1" -> ["cuda:0", "cuda:1"]; what is one device stays one."""
    found: list[str] = []
    for name in (device or "").split(","):
        name = name.strip()
        if name.isdecimal() and found:
            name = f"{found[0].partition(':')[0]}:{name}"
        found.append(name)
    twice = {name for name in found if found.count(name) > 1 and name != "cpu"}
    if twice:
        raise ValueError(f"device {sorted(twice)[0]} is named twice")
    return found


def run_on(
    devices: list[str], command: list[str], output: Path, *, shard: int, shards: int, resume: bool, overwrite: bool
) -> Manifest | None:
    """The command once a device, with its device, shard and output at the end; the merged manifest, or None where other
    shards are elsewhere.

    Raises ChildProcessError where one fails; the others are stopped, and what all have finished stays.
    """
    output.mkdir(parents=True, exist_ok=True)
    total = shards * len(devices)
    directories = [shard_directory(output, shard * len(devices) + i, total) for i in range(len(devices))]
    known = {path.name for path in directories} | {".lock"}
    present = [path.name for path in output.iterdir() if path.name not in known and not path.name.startswith("shard-")]
    if present and not overwrite and not (resume and (output / MANIFEST).is_file()):
        raise FileExistsError(f"{output} is not empty ({sorted(present)[0]}); give another directory, or --overwrite")
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(devices)))}
    start = [sys.executable, "-m", "fastdistil.cli", *command]
    if resume and shards == 1 and (output / MANIFEST).is_file() and read_manifest(output).finished:
        # merged already: one process sees whether it is this job's, and whole
        alone = [*start, "--device", devices[0], "--output", str(output), "--num-shards", "1", "--shard-index", "0"]
        ended = subprocess.run(alone, env=environment, stdin=subprocess.DEVNULL)
        if ended.returncode not in (0, 3):
            raise ChildProcessError(f"the process on {devices[0]} ended with status {ended.returncode}")
        return read_manifest(output)
    with Lock(output), _lifeline() as line:
        children = [
            subprocess.Popen(
                [
                    *(*start, "--device", device, "--output", str(directory)),
                    *("--num-shards", str(total), "--shard-index", str(shard * len(devices) + i)),
                ],
                env=environment | {LIFELINE: str(line)},
                stdin=subprocess.DEVNULL,
                pass_fds=[line],
            )
            for i, (device, directory) in enumerate(zip(devices, directories, strict=True))
        ]
        before = signal.getsignal(signal.SIGTERM)
        try:
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(signal.SIGTERM, _interrupt)  # so that the children end, too
            while True:
                states = [child.poll() for child in children]
                for device, state in zip(devices, states, strict=True):
                    if state not in (None, 0, 3):
                        raise ChildProcessError(
                            f"the process on {device} ended with status {state}; what is finished stays, go on with "
                            "--resume"
                        )
                if None not in states:
                    break
                time.sleep(0.2)
        finally:
            for child in children:
                if child.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        child.send_signal(signal.SIGINT)
            for child in children:
                child.wait()
            with contextlib.suppress(ValueError):
                signal.signal(signal.SIGTERM, before)
    if shards > 1:
        return None
    merged = merge(directories, output, overwrite=True)
    for directory in directories:
        shutil.rmtree(directory)
    return merged


@contextlib.contextmanager
def _lifeline() -> Iterator[int]:
    """What children read from to see that this process is gone, however it ended: nothing is ever written there."""
    there, here = os.pipe()
    try:
        yield there
    finally:
        os.close(there)
        os.close(here)


def end_with_parent() -> None:
    """In a child of `run_on`: stop as on Ctrl-C when the parent is gone."""
    if (line := os.environ.pop(LIFELINE, None)) is None:
        return

    def wait() -> None:
        os.read(int(line), 1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
