"""Shards of one job into one output: the parts are linked or copied under new numbers, and nothing is computed."""

import os
import shutil
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from fastdistil.jobs.manifest import (
    ASIDE,
    MANIFEST,
    Lock,
    Manifest,
    Part,
    differences,
    is_whole,
    part_name,
    read_manifest,
    replace,
    start_over,
    write_manifest,
)


def shard_directory(output: Path, shard: int, shards: int) -> Path:
    return output / f"shard-{shard:05d}-of-{shards:05d}"


def find_shards(directories: Iterable[str | Path]) -> list[Path]:
    """The directories, and of one that only holds shards these."""
    found: list[Path] = []
    for given in map(Path, directories):
        if not given.is_dir():
            raise FileNotFoundError(f"there is no directory {given}")
        whole = (given / MANIFEST).is_file() and not _is_begun(given)
        below = [] if whole else sorted(path for path in given.iterdir() if path.is_dir())
        inside = [path for path in below if _is_shard(path)] or [path for path in below if _is_one_of_many(path)]
        found += find_shards(inside) if inside else [given]
    return found


def merge(
    directories: Iterable[str | Path], output: Path, *, overwrite: bool = False, locked: bool = False
) -> Manifest:
    """locked: the caller holds the output's lock. Raises ValueError where a shard is missing, unfinished, there twice,
    or of another job, OSError for files."""
    shards: dict[int, tuple[Path, Manifest]] = {}
    for directory in find_shards(directories):
        if not (directory / MANIFEST).is_file():
            raise FileNotFoundError(f"{directory} holds no {MANIFEST}: it is no shard")
        manifest = read_manifest(directory)
        if not manifest.finished:
            raise ValueError(f"{directory} is not finished; go on with its job by --resume")
        number = manifest.settings.get("shard")
        if not isinstance(number, int) or number in shards:
            other = f" {shards[number][0]} has" if number in shards else ""
            raise ValueError(f"{directory} is shard {number!r}, as{other}" if other else f"{directory} is no shard")
        shards[number] = directory, manifest
    if not shards:
        raise ValueError("give the shards' directories")
    first_directory, first = shards[min(shards)]
    count = first.settings.get("shards")
    for directory, manifest in shards.values():
        if changed := differences(_meaning(first), _meaning(manifest)):
            raise ValueError(f"{directory} is of another job than {first_directory}: {'; '.join(changed)}")
    # it makes a difference only where rows were rejected, and a failed job may go on with another
    rejecting = [(directory, manifest) for directory, manifest in shards.values() if manifest.rejected]
    policies = {manifest.settings.get("on_error"): directory for directory, manifest in rejecting}
    if len(policies) > 1:
        (one, here), (another, there), *_ = policies.items()
        raise ValueError(f"{there} is of another job than {here}: on_error was {one!r}, now {another!r}")
    if missing := sorted(set(range(count if isinstance(count, int) else 0)) - shards.keys()):
        raise ValueError(f"of {count} shards, these are missing: {', '.join(map(str, missing[:10]))}")
    output.mkdir(parents=True, exist_ok=True)
    for directory, manifest in shards.values():  # before anything is touched
        if directory.resolve() == output.resolve():
            raise ValueError(f"{output} is one of the shards; give another directory for what they are merged into")
        for part in manifest.parts:
            if not is_whole(directory, part):
                raise ValueError(f"{directory / part.name} is missing or damaged; go on with its job by --resume")
    with nullcontext() if locked else Lock(output):
        mine = (p for p in output.iterdir() if p.name != ".lock" and not p.name.startswith(ASIDE))
        present = sorted(p.name for p in mine if not _is_shard(p))
        if present and not overwrite:
            raise FileExistsError(f"{output} is not empty ({present[0]}); give another directory, or --overwrite")
        whole = {"shard": 0, "shards": 1, "on_error": next(iter(policies), first.settings.get("on_error"))}
        merged = Manifest(first.task, first.model, first.format, first.settings | whole, first.dim)
        start_over(output, merged, [])
        for _, (directory, manifest) in sorted(shards.items()):
            for part in manifest.parts:
                merged.parts.append(_placed(directory, part, output, len(merged.parts)))
        merged.finished, merged.rows = True, sum(part.rows for part in merged.parts)
        merged.rejected = sum(part.rejected for part in merged.parts)
        write_manifest(output, merged)
    return merged


def _meaning(manifest: Manifest) -> dict[str, Any]:
    """What shards have to share: all but where they were computed, when their copy of the input was made, and what was
    to be done with rows that cannot be used."""
    own = ("shard", "threads", "device", "max_batch_tokens", "on_error")
    settings = {k: v for k, v in manifest.settings.items() if k not in own}
    inputs = [[*one[:2], 0, *one[3:]] for one in manifest.settings.get("inputs", [])]  # name, size, time, digest
    return settings | {"inputs": inputs, "task": manifest.task, "format": manifest.format, "dim": manifest.dim}


def _is_begun(directory: Path) -> bool:
    """Whether a merge of the shards inside was begun there and did not come to its end."""
    shards = [path for path in directory.iterdir() if _is_shard(path) and (path / MANIFEST).is_file()]
    manifest = read_manifest(directory)
    if not shards or manifest.finished or manifest.parts or any(directory.glob("part-*.done.json")):
        return False
    one = {"shards": read_manifest(shards[0]).settings.get("shards")}  # of which a merge is the only one
    manifest.settings |= one
    return not differences(_meaning(read_manifest(shards[0])), _meaning(manifest))


def _is_shard(path: Path) -> bool:
    return path.is_dir() and path.name.startswith("shard-")


def _is_one_of_many(path: Path) -> bool:
    with suppress(ValueError):  # somebody else's manifest
        return (path / MANIFEST).is_file() and read_manifest(path).settings.get("shards", 1) != 1
    return False


def _placed(directory: Path, part: Part, output: Path, number: int) -> Part:
    files = {}
    for name, size in part.files.items():
        new = part_name(number) + name.removeprefix(part.name)

        def place(temporary: Path, source: Path = directory / name) -> None:
            try:
                os.link(source, temporary)
            except OSError:  # another file system, or one without links
                shutil.copyfile(source, temporary)

        replace(output / new, place)
        files[new] = size
    return Part(number, part.first, part.read, part.rows, files, part.rejected, part.budget)
