"""What sentence-transformers writes beside a checkpoint: its modules, their settings, and layers behind the pooling.

Source: sentence_transformers.base.modules (Dense, Normalize, Pooling) and the model's own configuration files.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdistil import ops
from fastdistil.checkpoint import Weights, read_json, read_object

ACTIVATIONS = {kind.__name__: kind for kind in (nn.Tanh, nn.Identity, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid)}
KINDS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")  # as ever named, first wins
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")


class Normalize(nn.Module):
    """Divides by the L2 norm; [rows, dim] -> [rows, dim]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


def read_settings(directory: Path) -> dict[str, Any]:
    """Embedder's arguments as sentence-transformers' files state them; what we cannot compute is an error."""
    settings: dict[str, Any] = {"layers": []}
    modules = read_json(directory / "modules.json")
    if not isinstance(modules, list) and (directory / "modules.json").is_file():
        raise ValueError(f"{directory}/modules.json holds a JSON {type(modules).__name__}, not a list of modules")
    for module in modules or []:
        kind = str(module.get("type", "")).rsplit(".", 1)[-1] if isinstance(module, dict) else ""
        if kind == "Transformer" and module.get("path", "") != "":
            raise ValueError(f"{directory}/modules.json puts the encoder in {module['path']!r}; load that directory")
        elif kind == "Pooling" and "pooling" not in settings:
            settings["pooling"] = _pooling(_inside(directory, str(module.get("path", ""))) / "config.json")
        elif kind in ("Dense", "Normalize") and "pooling" in settings:
            settings["layers"].append(_layer(kind, _inside(directory, str(module.get("path", "")))))
        elif kind in ("Pooling", "Dense", "Normalize"):
            raise ValueError(f"{directory}/modules.json has {kind} before Pooling, or Pooling twice: not supported")
        elif kind != "Transformer":
            raise ValueError(f"{directory}/modules.json asks for the module {kind or module!r}, which is not supported")
    sentence: dict[str, Any] = {}
    where = ""
    for kind in KINDS:
        if sentence := read_object(directory / f"sentence_{kind}_config.json"):
            where = f"{directory}/sentence_{kind}_config.json"
            break
    if (length := sentence.get("max_seq_length")) is not None:
        if isinstance(length, bool) or not isinstance(length, int) or length < 3:
            raise ValueError(f"{where}: max_seq_length is {length!r}; it must be an integer of 3 tokens or more")
        settings["max_length"] = length
    if (lower := sentence.get("do_lower_case")) is not None:
        if not isinstance(lower, bool):
            raise ValueError(f"{where}: do_lower_case is {lower!r}; it must be true or false")
        settings["lower_case"] = lower
    for setting in ("tokenizer_args", "processor_kwargs", "processing_kwargs"):
        if sentence.get(setting):
            raise ValueError(f"{where}: {setting} is {sentence[setting]!r:.80}, which is not supported")
    where = f"{directory}/config_sentence_transformers.json"
    told = read_object(directory / "config_sentence_transformers.json")
    if (dim := told.get("truncate_dim")) is not None:
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ValueError(f"{where}: truncate_dim is {dim!r}; it must be an integer of 1 or more")
        settings["truncate_dim"] = dim
    if (similarity := told.get("similarity_fn_name")) is not None:
        if similarity not in SIMILARITIES:
            raise ValueError(
                f"{where}: similarity_fn_name is {similarity!r}; one of {', '.join(SIMILARITIES)} is known"
            )
        settings["similarity_fn_name"] = similarity
    prompts = told.get("prompts") or {}
    if not isinstance(prompts, dict):
        raise ValueError(f"{where}: prompts is a JSON {type(prompts).__name__}, not an object")
    prompts = {"query": "", "document": ""} | {name: "" if p is None else p for name, p in prompts.items()}  # as there
    settings["prompts"] = prompts
    for name, prompt in prompts.items():
        if not isinstance(prompt, str):
            raise ValueError(f"{where}: the prompt {name!r} is not a string")
    if name := told.get("default_prompt_name"):
        if not isinstance(name, str) or name not in prompts:
            raise ValueError(f"{where} has no prompt {name!r} under prompts")
        settings["prompt"] = prompts[name]
    return settings


def _layer(kind: str, directory: Path) -> nn.Module:
    where = directory / "config.json"
    config = read_object(where)
    names = [config.get(f"module_{end}_name") for end in ("input", "output")]
    if config.get("use_residual") or any(name not in ("sentence_embedding", None) for name in names):
        raise ValueError(f"{where} asks for a residual, or names what it reads or writes, which is not supported")
    if kind == "Normalize":
        return Normalize()
    if not where.is_file():
        raise FileNotFoundError(f"{where} is missing, though modules.json asks for a dense layer")
    return _dense(directory, config)


def _dense(directory: Path, config: dict[str, Any]) -> nn.Module:
    """activation(x @ weight.T + bias) in float32, [rows, in_features] -> [rows, out_features]."""
    where, sizes = directory / "config.json", [config.get(name) for name in ("in_features", "out_features")]
    for name, size in zip(("in_features", "out_features"), sizes, strict=True):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{where}: {name} is {size!r}; it must be an integer of 1 or more")
    path = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    kind = ACTIVATIONS.get(path.rsplit(".", 1)[-1]) if path.startswith("torch.nn.") else None
    if kind is None:
        raise ValueError(f"{where}: activation_function is {path!r}; one of {', '.join(ACTIVATIONS)} is supported")
    bias = bool(config.get("bias", True))
    shapes = {"linear.weight": (sizes[1], sizes[0]), "linear.bias": (sizes[1],) if bias else None}
    safe = directory / "model.safetensors"
    if not safe.is_file() and (directory / "pytorch_model.bin").is_file():
        raise FileNotFoundError(
            f"{directory} holds pytorch_model.bin but no model.safetensors. A .bin file is a pickle: if you trust it, "
            "load the model with sentence-transformers and save it again"
        )
    with Weights.of_file(safe, safe, True) as weights:
        for name, shape in shapes.items():  # by the header, before anything is allocated
            if (found := weights.shapes.get(name)) != shape:
                raise ValueError(f"{safe}: {name} is {found or 'absent'}, and has to be {shape or 'absent'}")
            dtype = weights.dtypes.get(name)
            if shape is not None and not (dtype is not None and dtype.is_floating_point):
                raise ValueError(f"{safe}: {name} has to hold floating point numbers")
        out_features, in_features = weights.shapes["linear.weight"]
        linear = nn.Linear(in_features, out_features, bias=bias, device="cpu", dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in linear.named_parameters():
                parameter.copy_(weights.read(f"linear.{name}"))
    return nn.Sequential(linear, kind())


def _pooling(path: Path) -> str:
    config = read_json(path)
    if not isinstance(config, dict):
        raise FileNotFoundError(f"{path} is missing, though modules.json asks for pooling")
    if "pooling_mode" in config:
        told = config["pooling_mode"]
        modes = told if isinstance(told, list) else [told]
    else:
        names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
        modes = [names.get(k, k) for k, on in config.items() if k.startswith("pooling_mode_") and on in (True, 1)]
    if len(modes) != 1 or not isinstance(modes[0], str) or modes[0] not in ops.POOLING:
        raise ValueError(f"{path} asks for {', '.join(map(str, modes)) or 'no'} pooling; mean or cls is supported")
    if config.get("include_prompt") is False:
        raise ValueError(f"{path} leaves the prompt out of the mean (include_prompt false), which is not supported")
    return modes[0]


def _inside(directory: Path, name: str) -> Path:
    try:
        path = (directory / name).resolve()
    except (ValueError, OSError) as error:
        raise ValueError(f"{directory}/modules.json names {name!r}, which is no path: {error}") from error
    if not path.is_relative_to(directory.resolve()):
        raise ValueError(f"{directory}/modules.json names {name!r}, which is outside its directory")
    return directory / name
