"""What a job's directory holds: its manifest, the record of each finished part, and the lock of who writes there.

manifest.json           what makes the output what it is (the fingerprint), and in the end all parts
part-00000.<format>     the rows of a part; for npy and safetensors their ids are in part-00000.ids.jsonl
part-00000.done.json    written last of a part, and so the sign that it is finished; gone when the job is
part-00000.rejects.jsonl  rows of a part that could not be used, if there were any
.lock                   held by whoever writes
"""

import errno
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows, where `fastdistil doctor` is to say what works
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("fastdistil")

ASIDE = "without-manifest-"  # begins the directories of parts that had none
MANIFEST, REJECTS, LOCK = "manifest.json", "rejects.jsonl", ".lock"
OURS = re.compile(
    rf"(?:{re.escape(MANIFEST)}|part-\d{{5,}}\.(?:npy|safetensors|parquet|jsonl|(?:ids|rejects)\.jsonl|done\.json))"
    r"(?:\.tmp)?"
)
SHARD = re.compile(r"shard-\d{5,}-of-\d{5,}")
VERSION = 2
SAMPLE = 2**16  # bytes of either end of an input


@dataclass
class Part:
    """files: with their sizes in bytes. first: the number of its first input row, of which it took `read`. budget: of
    tokens a batch at its end, where a want of memory made it smaller, else 0 and not in the file."""

    number: int
    first: int
    read: int
    rows: int
    files: dict[str, int]
    rejected: int = 0
    budget: int = 0

    @property
    def name(self) -> str:
        return part_name(self.number)


@dataclass
class Manifest:
    """settings: the fingerprint, what the output depends on. model: where the checkpoint was found."""

    task: str
    model: str
    format: str
    settings: dict[str, Any]
    dim: int | None = None
    finished: bool = False
    rows: int = 0
    rejected: int = 0
    parts: list[Part] = field(default_factory=list)
    version: int = VERSION


def part_name(number: int) -> str:
    return f"part-{number:05d}"


def read_manifest(directory: Path) -> Manifest:
    """Raises ValueError for what is no manifest of this version."""
    path = directory / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError(f"it holds a JSON {type(values).__name__}")
        if values.get("version") != VERSION:
            raise TypeError(f"its version is {values.get('version')!r}, this one reads {VERSION}")
        manifest = Manifest(**(values | {"parts": [Part(**part) for part in values.get("parts", [])]}))
        _check_types(manifest)
        _check_inputs(manifest.settings.get("inputs", []))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a manifest of finished work: {error}") from error
    for part in manifest.parts:
        for name in part.files:
            if Path(name).name != name or name in ("", ".", ".."):
                raise ValueError(f"{path} names the file {name!r}; it must lie in the same directory")
    return manifest


def _check_types(manifest: Manifest) -> None:
    kinds: dict[str, Any] = {"str": str, "int": int, "bool": bool, "dict": dict, "list": list}
    records: list[Any] = [manifest, *manifest.parts]
    for record in records:
        for item in fields(record):
            value, kind = getattr(record, item.name), str(item.type)
            name = re.split(r"[\[| ]", getattr(item.type, "__name__", kind))[0]
            allowed = (int, type(None)) if item.name == "dim" else (kinds[name],)
            if type(value) not in allowed or (kinds.get(name) is int and value is not None and value < 0):
                raise TypeError(f"{item.name} is {value!r}")


def _check_inputs(inputs: Any) -> None:
    """What `fingerprint_of_files` gave."""
    if not isinstance(inputs, list) or not all(isinstance(one, list) and one for one in inputs):
        raise TypeError(f"settings.inputs is {inputs!r:.80}")


def write_manifest(directory: Path, manifest: Manifest) -> None:
    values = asdict(manifest) | {"parts": [_as_dict(part) for part in manifest.parts]}
    write_text(directory / MANIFEST, json.dumps(values, indent=2, sort_keys=True) + "\n")


def _as_dict(part: Part) -> dict[str, Any]:
    return {name: value for name, value in asdict(part).items() if value or name != "budget"}


def write_text(path: Path, text: str) -> None:
    replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """A file that is there whole or not at all, whenever the process or the machine ends."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the name, too
        finally:
            os.close(directory)
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


# --- finished parts -------------------------------------------------------------------------------------------------


def commit(directory: Path, part: Part) -> None:
    """From here on the part is finished."""
    write_text(directory / f"{part.name}.done.json", json.dumps(_as_dict(part), sort_keys=True) + "\n")


def is_whole(directory: Path, part: Part) -> bool:
    """Whether the part's files are there, and as large as they were."""
    try:
        return all((directory / name).stat().st_size == size for name, size in part.files.items())
    except OSError:
        return False


def finished_parts(directory: Path) -> list[Part]:
    """The parts from the first one on that are whole."""
    found: list[Part] = []
    while (path := directory / f"{part_name(len(found))}.done.json").is_file():
        try:
            part = Part(**json.loads(path.read_text(encoding="utf-8")))
            whole = is_whole(directory, part)
        except (OSError, ValueError, TypeError, AttributeError):  # not what a job wrote
            break
        if not whole:
            break
        found.append(part)
    return found


def start_over(directory: Path, manifest: Manifest, keep: list[Part]) -> None:
    """The manifest of unfinished work over the parts to keep, and none of our other files.

    In an order that leaves no old part to be taken for a new one and no part to keep unfinished, wherever it is
    interrupted.
    """
    for part in keep:
        if not (directory / f"{part.name}.done.json").is_file():  # of a job that was finished
            commit(directory, part)
    kept = {MANIFEST} | {name for part in keep for name in [*part.files, f"{part.name}.done.json"]}
    for path in directory.glob("part-*.done.json"):
        if path.name not in kept:
            path.unlink()
    write_manifest(directory, manifest)
    _remove_ours(directory, kept)


def remove(directory: Path) -> None:
    """Remove all that a job wrote there but its lock, and nothing else."""
    if not directory.is_dir():
        return
    for path in directory.glob("part-*.done.json"):  # first, so that no part is taken for finished without its manifest
        path.unlink()
    (directory / MANIFEST).unlink(missing_ok=True)
    _remove_ours(directory, set())


def set_aside(directory: Path) -> None:
    """Move what is named like a job's files, but has no manifest, into a new directory there, or beside a shard's,
    which goes when its job is done."""
    if (directory / MANIFEST).is_file():
        return
    for path in directory.glob("*.tmp"):  # a file in the making when its job was killed
        if OURS.fullmatch(path.name) and path.is_file():
            path.unlink()
    found = [path for path in directory.iterdir() if OURS.fullmatch(path.name)]
    if not found:
        return
    place = directory.parent if SHARD.fullmatch(directory.name) else directory
    aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=place))
    aside.chmod(directory.stat().st_mode & 0o777)
    for path in found:
        path.rename(aside / path.name)
    logger.warning("%s has parts but no manifest, so the job starts afresh; they are in %s now", directory, aside)


def _remove_ours(directory: Path, kept: set[str]) -> None:
    for path in directory.iterdir():
        if OURS.fullmatch(path.name) and path.name not in kept and path.is_file():
            path.unlink()


def apart(given: list[str], inputs: list[str], directory: Path) -> list[str]:
    """The inputs, without what the job itself wrote and a pattern matches from then on. Raises ValueError where what is
    read and what is written are in one place."""
    output = directory.resolve()
    whole = output.parent if SHARD.fullmatch(output.name) else output

    def is_own(name: str) -> bool:
        if name in given or not OURS.fullmatch(Path(name).name):
            return False
        place = Path(name).resolve().parent
        if place.parent == whole and (place.name.startswith(ASIDE) or SHARD.fullmatch(place.name)):
            return True
        return place == output or (place == whole and (place / MANIFEST).is_file())

    inputs = [name for name in inputs if not is_own(name)] or inputs
    for name in inputs:
        if name != "-" and Path(name).resolve().parent == output:
            raise ValueError(f"the input {name} lies in the output directory; give another directory")
    for name in given:
        if Path(name).is_dir() and output.is_relative_to(Path(name).resolve()):
            raise ValueError(f"the output {directory} lies in the input directory {name}; give another directory")
    return inputs


# --- fingerprint ----------------------------------------------------------------------------------------------------


def fingerprint_of_files(paths: list[str]) -> list[list[Any]]:
    """[name, size, time of the last change, digest of both ends] of each input: what a changed input shows by."""
    found: list[list[Any]] = []
    for path in paths:
        if path == "-":
            found.append(["-", 0, 0, ""])
            continue
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            digest = hashlib.blake2b(file.read(SAMPLE), digest_size=8)
            file.seek(max(0, stat.st_size - SAMPLE))
            digest.update(file.read(SAMPLE))
        found.append([Path(path).name, stat.st_size, stat.st_mtime_ns, digest.hexdigest()])
    return found


def fingerprint_of_model(directory: Path, output: Path | None = None) -> str:
    """A digest of all that decides what a checkpoint computes, and of nothing else in its directory: not of what jobs
    wrote there, this one's `output` above all."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        if output is not None and path.resolve().is_relative_to(output.resolve()):
            continue
        if len(relative.parts) > 1 and (path.parent / MANIFEST).is_file():
            continue
        if path.suffix in (".json", ".safetensors", ".txt", ".bin") and len(relative.parts) <= 2 and path.is_file():
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
            digest.update(os.fsencode(relative) + b"\0" + content)
    return digest.hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What changed between two fingerprints, in words."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            if name == "inputs":
                found.append(_different_inputs(old.get(name) or [], new.get(name) or []))
            elif name == "model_digest":
                found.append("the model's files")
            else:
                found.append(f"{name} was {old.get(name)!r}, now {new.get(name)!r}")
    return found


def _different_inputs(old: list[Any], new: list[Any]) -> str:
    for a, b in zip(old, new, strict=False):
        for i, what in enumerate(("name", "size", "time of change", "content")):
            if a[i : i + 1] != b[i : i + 1]:
                return f"the input {b[0]} ({what}{f': was {a[i]}' if i < 2 else ''})"
    return f"the number of input files, was {len(old)}, now {len(new)}"


# --- lock -----------------------------------------------------------------------------------------------------------


class Lock:
    """Held on a directory while a job writes there; it ends with its process, however that ends."""

    def __init__(self, directory: Path):
        self.path = directory / LOCK
        if fcntl is None:
            raise OSError("jobs need the file locks of Linux or macOS")
        self._file = open(self.path, "a+")  # noqa: SIM115  (closed by release)
        self._file.seek(0)
        if not re.fullmatch(r"\d*", self._file.read(64)):
            self._file.close()
            raise FileExistsError(f"{self.path} is somebody else's file; give another directory")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            who = f" (process {holder})" if holder else ""
            raise BlockingIOError(f"another job{who} is writing to {directory}; wait for it, or stop it") from error
        except OSError as error:
            self._file.close()
            raise OSError(
                error.errno, f"{self.path} cannot be locked ({error.strerror}); give a directory on another file system"
            ) from error
        try:
            self._file.truncate(0)
            self._file.write(str(os.getpid()))
            self._file.flush()
        except OSError as error:
            with suppress(OSError):
                self._file.close()
            raise OSError(error.errno, f"{self.path} cannot be written: {error.strerror}") from error

    def check(self) -> None:
        """Raises OSError where the directory is another one by now."""
        try:
            same = os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            same = False
        if not same:
            raise OSError(errno.ENOENT, f"{self.path.parent} was moved or replaced while the job wrote there")

    def release(self) -> None:
        self._file.truncate(0)
        self._file.close()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
