"""Read and write checkpoints: directories and hub ids, safetensors, key names, BERT conversion.

A checkpoint is untrusted input. Shapes are compared by the file headers before anything is allocated, an index cannot
name a file outside its directory, and pickles are read only on request. A local path never opens a socket.
"""

import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastdistil.config import DistilBertConfig, may_be_hub_id
from fastdistil.cpu import copy_alone

logger = logging.getLogger("fastdistil")

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
BASE_PREFIX = "distilbert."
HUB_FILES = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "tokenizer.json",
    "vocab.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "modules.json",
    "sentence_*_config.json",
    "config_sentence_transformers.json",
    "*_Pooling/config.json",
    "*_Normalize/config.json",
    "*_Dense/config.json",
    "*_Dense/model.safetensors",
]

# BERT's names -> DistilBERT's, as in HF's extract_distilbert.py
BERT_NAMES = (
    (r"^bert\.", ""),
    (r"^encoder\.layer\.(\d+)\.", r"transformer.layer.\1."),
    (r"\.attention\.self\.(q)uery\.", r".attention.\1_lin."),
    (r"\.attention\.self\.(k)ey\.", r".attention.\1_lin."),
    (r"\.attention\.self\.(v)alue\.", r".attention.\1_lin."),
    (r"\.attention\.output\.dense\.", ".attention.out_lin."),
    (r"\.attention\.output\.LayerNorm\.", ".sa_layer_norm."),
    (r"\.intermediate\.dense\.", ".ffn.lin1."),
    (r"(layer\.\d+)\.output\.dense\.", r"\1.ffn.lin2."),
    (r"(layer\.\d+)\.output\.LayerNorm\.", r"\1.output_layer_norm."),
    (r"^cls\.predictions\.transform\.dense\.", "vocab_transform."),
    (r"^cls\.predictions\.transform\.LayerNorm\.", "vocab_layer_norm."),
    (r"^cls\.predictions\.decoder\.", "vocab_projector."),
    (r"^cls\.predictions\.bias$", "vocab_projector.bias"),
)
TOKEN_TYPES = "embeddings.token_type_embeddings.weight"
POSITIONS = "embeddings.position_embeddings.weight"


@dataclass
class LoadReport:
    """What did not fit one to one. mismatched_keys: (model's name, shape in the checkpoint, shape in the model)."""

    missing_keys: set[str] = field(default_factory=set)
    unexpected_keys: set[str] = field(default_factory=set)
    mismatched_keys: set[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=set)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"error_msgs": []}


# --- finding files ------------------------------------------------------------------------------------------------


def find(
    path_or_repo: str | os.PathLike,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    extra_files: Iterable[str] = (),
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> Path:
    """The checkpoint's directory: the path itself when it exists, else a download of that hub id.

    Raises OSError (FileNotFoundError, NotADirectoryError) with what to do.
    """
    if not isinstance(path_or_repo, (str, os.PathLike)) or not str(path_or_repo):
        raise TypeError(f"a checkpoint is given by a directory or a hub id, got {path_or_repo!r}")
    try:
        path = Path(path_or_repo).expanduser()
    except RuntimeError as error:  # ~user, and no such user
        raise FileNotFoundError(f"{path_or_repo}: {error}") from error
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{path} is a file; give the directory that holds config.json and the weights")
    name = str(path_or_repo)
    if not may_be_hub_id(path_or_repo):
        raise FileNotFoundError(f"there is no directory {name}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                local_files_only=local_files_only,
                cache_dir=cache_dir,
                token=token,
                allow_patterns=[*HUB_FILES, *extra_files],
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{name!r} is neither a local directory nor a hub id that could be "
            f"{'found in the local cache' if local_files_only else 'downloaded'}: {error}"
        ) from error


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where it is missing."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file's object; an empty one where it is missing."""
    values = read_json(path)
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{path} holds a JSON {type(values).__name__}, not an object")
    return values or {}


def read_config(directory: Path, **overrides: Any) -> DistilBertConfig:
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no config.json; it is not a checkpoint directory")
    return DistilBertConfig.from_json_file(path, **overrides)


def _weight_files(directory: Path, use_safetensors: bool | None) -> tuple[list[Path], dict[str, str]]:
    """The files, and which tensor is to be in which where an index says so."""
    names = (PICKLE,) if use_safetensors is False else (SAFETENSORS,)
    for name in names:
        if (directory / name).is_file():
            return [directory / name], {}
        index = directory / f"{name}.index.json"
        if index.is_file():
            return _indexed_files(index)
    if use_safetensors is not False and any((directory / f"{PICKLE}{end}").is_file() for end in ("", ".index.json")):
        raise FileNotFoundError(
            f"{directory} holds {PICKLE} but no {SAFETENSORS}. A .bin file is a pickle: if you trust it, pass "
            "use_safetensors=False to read it with torch.load(weights_only=True), then save_pretrained converts it"
        )
    raise FileNotFoundError(f"{directory} holds neither {names[0]} nor {names[0]}.index.json")


def _indexed_files(index: Path) -> tuple[list[Path], dict[str, str]]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not a weight index: it needs an object 'weight_map' of tensor to file") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"{index} names the file {name!r}; it must lie in the index's own directory")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index} names {name}, which is not there")
    return [index.parent / name for name in names], weight_map


# --- reading tensors ----------------------------------------------------------------------------------------------


class Weights:
    """Tensors of a checkpoint by name, read one at a time. Use as a context manager."""

    def __init__(self, directory: Path, use_safetensors: bool | None = None):
        self.where = directory
        self._stack = ExitStack()
        self._read: dict[str, Callable[[], Tensor]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype | None] = {}
        self.dtype: torch.dtype | None = None  # of the first floating-point tensor
        files, self.promised = _weight_files(directory, use_safetensors)
        for path in files:
            for name, shape, dtype, read in self._pickled(path) if use_safetensors is False else self._safe(path):
                self.add(name, shape, dtype, read)

    @classmethod
    def of_file(cls, safe: Path, pickled: Path, use_safetensors: bool | None = None) -> "Weights":
        """One file's tensors: `safe`, or where it is missing, `pickled`, unless use_safetensors says which."""
        self = cls.from_tensors({})
        is_safe = safe.is_file() or not pickled.is_file() if use_safetensors is None else use_safetensors
        self.where = safe if is_safe else pickled
        for found in self._safe(safe) if self.where == safe else self._pickled(pickled):
            self.add(*found)
        return self

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Weights":
        if not isinstance(tensors, dict):
            raise TypeError(f"state_dict must be a dictionary of tensors, got {type(tensors).__name__}")
        self = cls.__new__(cls)
        self.where, self._stack, self._read = Path("state_dict"), ExitStack(), {}
        self.shapes, self.dtypes, self.dtype, self.promised = {}, {}, None, {}
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not _is_usable(tensor):
                raise ValueError(
                    f"state_dict holds a {type(tensor).__name__} under {name!r}, not a plain tensor with values"
                )
            self.add(name, tuple(tensor.shape), tensor.dtype, partial(tensors.__getitem__, name))
        return self

    def add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None, read: Callable[[], Tensor]) -> None:
        self._read[name], self.shapes[name], self.dtypes[name] = read, shape, dtype
        if self.dtype is None and dtype is not None and dtype.is_floating_point:
            self.dtype = dtype

    def _safe(self, path: Path) -> Iterator[tuple]:
        with open(path, "rb"):  # whose error says why, where the library says that there is no such file
            pass
        try:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError, ValueError) as error:
            raise OSError(f"{path} is not a readable safetensors file: {error}") from error
        for name in file.keys():  # noqa: SIM118  (a file, not a mapping)
            part = file.get_slice(name)
            dtype = _SAFETENSORS_DTYPES.get(part.get_dtype())
            yield name, tuple(part.get_shape()), dtype, partial(file.get_tensor, name)

    def _pickled(self, path: Path) -> Iterator[tuple]:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a pickle can fail in any way
            raise OSError(f"{path} could not be read with weights_only=True: {error}") from error
        if not isinstance(tensors, dict):
            raise ValueError(f"{path} holds a {type(tensors).__name__}, not a dictionary of tensors")
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not _is_usable(tensor):
                raise ValueError(
                    f"{path} holds a {type(tensor).__name__} under {name!r}, not a plain tensor with values"
                )
            yield name, tuple(tensor.shape), tensor.dtype, partial(tensors.__getitem__, name)

    def read(self, name: str) -> Tensor:
        return self._read[name]()

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


def _is_usable(tensor: Any) -> bool:
    plain = isinstance(tensor, Tensor) and tensor.layout is torch.strided
    return plain and not tensor.is_quantized and not tensor.is_meta


_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _is_bert(names: Iterable[str]) -> bool:
    return any(re.search(r"(^|\.)encoder\.layer\.\d+\.attention\.self\.query\.", name) for name in names)


def model_names(names: Iterable[str], model: nn.Module) -> dict[str, str]:
    """Checkpoint name -> what the model calls it (or would, were it there), over prefixes, BERT and legacy names."""
    names = list(names)
    expected = model.state_dict().keys()
    has_head = any(name.startswith(BASE_PREFIX) for name in expected)
    is_bert = _is_bert(names)
    renamed = {}
    for name in names:
        if re.search(r"(^|\.)position_ids$", name):
            continue
        new = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
        for pattern, replacement in BERT_NAMES if is_bert else ():
            new = re.sub(pattern, replacement, new)
        new = model.renamed(new)  # type: ignore[operator]
        bare = new.removeprefix(BASE_PREFIX)
        if bare in expected:
            new = bare
        elif has_head and BASE_PREFIX + bare in expected:
            new = BASE_PREFIX + bare
        renamed[name] = new
    return renamed


def load_weights(model: nn.Module, weights: Weights, *, ignore_mismatched_sizes: bool = False) -> LoadReport:
    """Copy a checkpoint into `model`, which may still be on the meta device while shapes are compared.

    The caller materialises the model through `model.materialize(missing)` once the shapes fit. Raises ValueError for
    shapes that differ and for a checkpoint none of whose tensors belongs to the model.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied: dict[str, str] = getattr(model, "_tied_weights_keys", None) or {}
    source: dict[str, str] = {}
    report = LoadReport()
    types, is_bert = None, _is_bert(weights.shapes)
    for name, new in model_names(weights.shapes, model).items():
        if is_bert and new.removeprefix(BASE_PREFIX) == TOKEN_TYPES:
            types = name
        elif new not in expected:
            report.unexpected_keys.add(name)
        elif weights.shapes[name] == expected[new]:
            source[new] = name
        else:
            report.mismatched_keys.add((new, weights.shapes[name], expected[new]))
    if report.mismatched_keys and not ignore_mismatched_sizes:
        lines = "\n".join(f"  {n}: {list(a)} in the file, {list(b)} by the config" for n, a, b in _sorted(report))
        raise ValueError(
            f"{weights.where}: the weights do not have the shapes its configuration tells:\n{lines}\n"
            "correct config.json, or pass ignore_mismatched_sizes=True to initialise these anew"
        )
    if not source:
        raise ValueError(
            f"{weights.where}: none of its {len(weights.shapes)} tensors belongs to {type(model).__name__} "
            f"(the first is {next(iter(weights.shapes), 'missing')!r})"
        )
    for name in source.values():
        dtype = weights.dtypes[name]
        if dtype is None or not dtype.is_floating_point:
            raise ValueError(
                f"{weights.where}: {name} is {dtype or 'of a dtype that is not supported'}; weights are float64, "
                "float32, float16 or bfloat16 (a quantised checkpoint has to be converted first)"
            )
    for name, new in model_names(set(weights.promised) - set(weights.shapes), model).items():
        if new in expected and new not in source:
            raise ValueError(
                f"{weights.where}: the index puts {name} in {weights.promised[name]}, which does not hold it; one of "
                "the two files is of another checkpoint"
            )
    untied = _share_tied(tied, source, weights)
    fresh = set(expected) - set(source)
    report.missing_keys = fresh - {name for name, *_ in report.mismatched_keys}
    folded = next((name for name in source if name.endswith(POSITIONS)), None)
    if types is None:
        folded = None
    elif folded is None:
        report.unexpected_keys.add(types)
    elif (
        len(weights.shapes[types]) != 2
        or weights.shapes[types][0] < 1
        or weights.shapes[types][1:] != expected[folded][1:]
    ):
        raise ValueError(f"{weights.where}: {types} has shape {list(weights.shapes[types])}, not [types, dim]")
    try:
        model.materialize(fresh, untied)  # type: ignore[operator]
    except (RuntimeError, MemoryError) as error:
        total = sum(math.prod(shape) for shape in expected.values())
        raise ValueError(
            f"{weights.where}: its configuration asks for {total:,} parameters, for which there is no memory "
            f"({len(fresh)} of its {len(expected)} tensors are not in the file): {error}"
        ) from error
    state = model.state_dict()
    with torch.no_grad():
        for new, name in source.items():
            tensor = weights.read(name)
            if new == folded:
                # one segment: its type's vector is added at every position; row by row, see copy_alone
                first = weights.read(types)[0].double()  # type: ignore[arg-type]
                for row, values in zip(state[new], tensor, strict=True):
                    row.copy_(values.double() + first)
            else:
                copy_alone(state[new], tensor)
    _log(model, report)
    return report


def _share_tied(tied: dict[str, str], source: dict[str, str], weights: Weights) -> set[str]:
    """Let either name of a tied pair stand for both; the names whose two tensors differ, which stay untied."""
    untied = set()
    for one, other in tied.items():
        if one in source and other in source:
            if not torch.equal(weights.read(source[one]), weights.read(source[other])):
                logger.warning("%s and %s differ in %s: they are not tied", one, other, weights.where)
                untied.add(one)
        elif one in source or other in source:
            source.setdefault(one, source.get(other, ""))
            source.setdefault(other, source[one])
    return untied


def _sorted(report: LoadReport) -> list:
    return sorted(report.mismatched_keys)


def _log(model: nn.Module, report: LoadReport) -> None:
    name = type(model).__name__
    if report.missing_keys:
        logger.warning("%s: not in the checkpoint, initialised anew: %s", name, ", ".join(sorted(report.missing_keys)))
    if report.mismatched_keys:
        names = ", ".join(key for key, *_ in _sorted(report))
        logger.warning("%s: of another shape in the checkpoint, initialised anew: %s", name, names)
    if report.unexpected_keys:
        logger.info("%s: in the checkpoint, not used: %s", name, ", ".join(sorted(report.unexpected_keys)))


# --- writing ------------------------------------------------------------------------------------------------------


def save(
    model: nn.Module,
    directory: Path,
    config: DistilBertConfig,
    wanted: Callable[[str], bool],
    *,
    max_shard_size: int | str = "50GB",
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write config.json and model.safetensors (or its shards and their index), which transformers reads back. wanted:
    whether a tensor of this name is written. state_dict: the tensors, by default the model's own."""
    from huggingface_hub import save_torch_state_dict

    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file; give a directory to save into")
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    tied = getattr(model, "_tied_weights_keys", None) or {}
    given = model.state_dict() if state_dict is None else state_dict
    state = {name: tensor for name, tensor in given.items() if wanted(name)}
    kept = {n: t for n, t in state.items() if not (tied.get(n) in state and t.data_ptr() == state[tied[n]].data_ptr())}
    save_torch_state_dict(
        kept,
        directory,
        max_shard_size=max_shard_size,
        metadata={"format": "pt"},
    )
