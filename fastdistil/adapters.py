"""Bottleneck adapters and LoRA: added to a model, trained, switched by call, merged, saved and loaded.

    bottleneck  y' = y + s * up(act(down(h))),  h = LayerNorm(y + r) ("seq_bn", Pfeiffer) or y ("double_seq_bn")
                then LayerNorm(y' + r), where y is a sublayer's output and r what it is added to
    LoRA        W x + (alpha / r) * B A x,  W the query's or the value's projection

Numbers, parameter names and files are those of the adapters library (Poth et al., 2023, arXiv:2311.11077). Sources:
Houlsby et al., 2019 (arXiv:1902.00751), Pfeiffer et al., 2020 (arXiv:2005.00247), Hu et al., 2021 (arXiv:2106.09685).
"""

import ast
import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdistil import ops
from fastdistil.checkpoint import Weights, read_object

logger = logging.getLogger("fastdistil")

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
ACTIVATIONS = {"relu": nn.ReLU, "swish": nn.SiLU, "silu": nn.SiLU, "gelu": nn.GELU, "tanh": nn.Tanh}
MATRICES = {"q": "q_lin", "k": "k_lin", "v": "v_lin"}

# what a configuration states -> the one value that is supported; the rest of its fields have no effect on the others
_BOTTLENECK_FIXED: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "is_parallel": False,
    "ln_after": False,
    "ln_before": False,
    "original_ln_after": True,
    "phm_layer": False,
    "residual_before_ln": True,
    "use_gating": False,
    "stochastic_depth": 0.0,
    "inv_adapter": None,
}
_BOTTLENECK: dict[str, Any] = _BOTTLENECK_FIXED | {
    "dropout": 0.0,
    "init_weights": "bert",
    "leave_out": [],
    "mh_adapter": False,
    "non_linearity": "relu",
    "original_ln_before": True,
    "output_adapter": True,
    "reduction_factor": 16,
    "scaling": 1.0,
}
_LORA_FIXED: dict[str, Any] = {
    "architecture": "lora",
    "composition_mode": "add",
    "intermediate_lora": False,
    "output_lora": False,
    "use_dora": False,
    "use_gating": False,
}
# fields whose values change nothing where the fixed ones above are as they are
_NO_EFFECT = {
    "dtype",
    "factorized_phm_W",
    "factorized_phm_rule",
    "hypercomplex_nonlinearity",
    "init_weights_seed",
    "inv_adapter_reduction_factor",
    "learn_phm",
    "phm_bias",
    "phm_c_init",
    "phm_dim",
    "phm_init_range",
    "phm_rank",
    "shared_W_phm",
    "shared_phm_rule",
}
_LORA: dict[str, Any] = _LORA_FIXED | {
    "alpha": 8,
    "attn_matrices": ["q", "v"],
    "dropout": 0.0,
    "init_weights": "lora",
    "leave_out": [],
    "r": 8,
    "selfattn_lora": True,
}
NAMED = {
    "seq_bn": _BOTTLENECK,
    "double_seq_bn": _BOTTLENECK | {"mh_adapter": True, "original_ln_before": False, "non_linearity": "swish"},
    "lora": _LORA,
}
ALIASES = {"pfeiffer": "seq_bn", "houlsby": "double_seq_bn"}


INITIAL = {"lora": ("lora", "bert"), "bottleneck": ("bert", "mam_adapter")}  # values of init_weights


def complete(config: Any) -> dict[str, Any]:
    """An adapter's settings with defaults filled in, checked: they may come from a file.

    config: a name, a name with changes as in "lora[r=4]", a mapping, or the adapters library's configuration object.
    Raises ValueError or TypeError.
    """
    if isinstance(config, str):
        found = re.fullmatch(r"(\w+)(?:\[(.*)\])?", config)
        name = ALIASES.get(found[1], found[1]) if found else ""
        if found is None or name not in NAMED:
            raise ValueError(f"an adapter's config is one of {', '.join(NAMED)}, or a dictionary; got {config!r}")
        config = NAMED[name] | _changes(found[2] or "", config)
    elif hasattr(config, "peft_type"):
        raise TypeError("this is a configuration of peft's: use peft.get_peft_model(model, config), or the name lora")
    elif hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise TypeError(f"an adapter's config is a name or a dictionary of settings, got {config!r}")
    lora = config.get("architecture") == "lora"
    fixed = _LORA_FIXED if lora else _BOTTLENECK_FIXED
    defaults = _LORA if lora else _BOTTLENECK
    settings = defaults | dict(config)
    if settings.get("architecture") not in (None, "lora"):
        raise ValueError(f"adapters of architecture {settings['architecture']!r} are not supported")
    for name in sorted(map(str, settings.keys() - defaults.keys() - _NO_EFFECT)):
        if settings[name] is not None and settings[name] is not False:
            raise ValueError(f"an adapter with {name}={settings[name]!r} is not supported")
    for name, value in fixed.items():
        if settings[name] != value:
            raise ValueError(f"an adapter with {name}={settings[name]!r} is not supported, only {value!r}")
    numbers = ("alpha", "r") if lora else ("reduction_factor", "scaling")
    for name in (*numbers, "dropout"):
        value = settings[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"an adapter's {name} must be a number, got {value!r}")
    if lora and not (isinstance(settings["r"], int) and 1 <= settings["r"] <= 2**16):
        raise ValueError(f"an adapter's r must be an integer of 1 or more, got {settings['r']!r}")
    if not lora and settings["reduction_factor"] <= 0:
        raise ValueError(f"an adapter's reduction_factor must be above 0, got {settings['reduction_factor']!r}")
    if not 0 <= settings["dropout"] <= 1:
        raise ValueError(f"an adapter's dropout must be from 0 to 1, got {settings['dropout']!r}")
    matrices = settings.get("attn_matrices")
    if lora and not (isinstance(matrices, list) and all(isinstance(m, str) and m in MATRICES for m in matrices)):
        raise ValueError(f"an adapter's attn_matrices are q, k and v, got {settings['attn_matrices']!r}")
    if not lora and str(settings["non_linearity"]).lower() not in ACTIVATIONS:
        raise ValueError(f"non_linearity {settings['non_linearity']!r} is not one of {', '.join(ACTIVATIONS)}")
    if not isinstance(settings["leave_out"], list) or any(type(layer) is not int for layer in settings["leave_out"]):
        raise ValueError(f"an adapter's leave_out is a list of layers, got {settings['leave_out']!r}")
    initial = INITIAL["lora" if lora else "bottleneck"]
    if settings["init_weights"] not in initial:
        raise ValueError(f"init_weights {settings['init_weights']!r} is not supported, only {' and '.join(initial)}")
    return settings


def _changes(text: str, config: str) -> dict[str, Any]:
    """What stands in the brackets of "lora[r=4,dropout=0.1]"."""
    changes = {}
    for change in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"{change!r} in the adapter's config {config!r} is not setting=value")
        try:
            changes[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            changes[name.strip()] = {"true": True, "false": False}.get(value.strip().lower(), value.strip())
    return changes


def named(names: str | Sequence[str] | None, what: str) -> list[str]:
    """A name or several as a list; TypeError for anything else."""
    found = [names] if isinstance(names, str) else [] if names is None else names
    if not isinstance(found, Sequence) or not all(isinstance(name, str) for name in found):
        raise TypeError(f"{what} must be a name or a list of names, got {names!r}")
    return list(found)


def only_safetensors(use_safetensors: bool) -> None:
    if not use_safetensors:
        raise ValueError("use_safetensors=False asks for a pickle; only safetensors are written (both are read)")


class Bottleneck(nn.Module):
    def __init__(self, dim: int, settings: dict[str, Any]):
        super().__init__()
        width = max(1, int(dim // settings["reduction_factor"]))
        down, up = nn.Linear(dim, width), nn.Linear(width, dim)
        self.adapter_down = nn.Sequential(down, ACTIVATIONS[settings["non_linearity"].lower()]())
        self.adapter_up = up
        self.dropout = nn.Dropout(settings["dropout"])
        self.scaling = float(settings["scaling"])
        self.norm_first = bool(settings["original_ln_before"])
        for linear in (down, up):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if settings["init_weights"] == "mam_adapter":  # He et al., 2022 (arXiv:2110.04366)
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
            nn.init.zeros_(up.weight)

    def forward(self, y: Tensor, residual: Tensor, add_norm: Callable, live: Tensor | None) -> Tensor:  # [..., dim]
        h = add_norm(y, residual) if self.norm_first else y
        down: Any = self.adapter_down[0]
        h = self.adapter_down[1](_linear(down, h, live))
        return y + self.dropout(_linear(self.adapter_up, h, live) * self.scaling)


class LoRA(nn.Module):
    def __init__(self, dim: int, settings: dict[str, Any]):
        super().__init__()
        rank = settings["r"]
        self.lora_A = nn.Parameter(torch.empty(rank, dim))
        self.lora_B = nn.Parameter(torch.zeros(dim, rank))
        self.dropout = nn.Dropout(settings["dropout"])
        self.scaling = settings["alpha"] / rank
        self.init_weights = settings["init_weights"]
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        if self.init_weights == "bert":
            nn.init.normal_(self.lora_A, std=0.02)
            nn.init.normal_(self.lora_B, std=0.02)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:  # [..., dim] -> [..., dim]
        return self.dropout(x) @ self.lora_A.T @ self.lora_B.T * self.scaling

    def delta(self) -> Tensor:  # [dim, dim]
        return self.lora_B @ self.lora_A * self.scaling


def _linear(linear: nn.Linear, x: Tensor, live: Tensor | None) -> Tensor:
    return ops.linear(x, linear.weight, linear.bias, live) if x.dim() == 2 else linear(x)


class Adapters(nn.Module):
    """The bottleneck adapters behind one sublayer, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()


def add_norm_through(
    slot: Adapters | None,
    names: Sequence[str],
    y: Tensor,
    residual: Tensor,
    add_norm: Callable[[Tensor, Tensor], Tensor],
    live: Tensor | None = None,
) -> Tensor:
    """LayerNorm(y + residual), with y through the active ones of a sublayer's adapters, one after another."""
    for name in names if slot is not None else ():
        if name in slot.adapters:  # type: ignore[union-attr]
            y = slot.adapters[name](y, residual, add_norm, live)  # type: ignore[union-attr]
    return add_norm(y, residual)


def low_rank(linear: nn.Linear, names: Sequence[str], x: Tensor) -> Tensor | None:
    """What the active one of a projection's LoRAs adds to it, None without one; x: [..., dim]"""
    loras: Any = getattr(linear, "loras", None)
    for name in names if loras is not None else ():
        if name in loras:
            return loras[name](x)
    return None


def _merged(weight: Tensor, lora: Any) -> Tensor:
    return weight + lora.delta().to(weight.dtype)


@torch.no_grad()
def is_merged(linear: Any) -> bool:
    """Whether a projection's weight still is what `merge_adapter` made of it, cast and moved with the model."""
    return bool(_as_merged(linear).all())


def _as_merged(linear: Any) -> Tensor:
    """Where a weight still is what merging made of it; NaN is NaN."""
    weight, merged = linear.weight, linear.__dict__["_unmerged"][2].to(linear.weight)
    return (weight == merged) | (weight.isnan() & merged.isnan())


def apply_to_merged(linear: Any, fn: Callable[[Tensor], Tensor]) -> None:
    """What a model's cast or move does to a weight, done to what `merge_adapter` remembers of it."""
    if "_unmerged" in linear.__dict__:
        name, kept, merged = linear.__dict__["_unmerged"]
        linear.__dict__["_unmerged"] = name, kept, fn(merged)


class WithAdapters(nn.Module):
    """Adapters of a model with `base_model`, as the adapters library's methods of these names."""

    config: Any
    base_model: Any
    precision: Any

    def _blocks(self) -> Iterator[tuple[int, Any]]:
        yield from enumerate(self.base_model.transformer.layer)

    @property
    def adapters_config(self) -> dict[str, dict[str, Any]]:
        """name -> settings"""
        return dict(self.base_model.__dict__.get("_adapter_settings", {}))

    def _remember(self, settings: dict[str, dict[str, Any]]) -> None:
        self.base_model.__dict__["_adapter_settings"] = settings

    def _adapters_in_file(self) -> dict[str, Any] | None:
        """What a checkpoint's configuration tells of the adapters, in the adapters library's form."""
        settings = {name: value for name, value in self.adapters_config.items() if name != self._merged_adapter()}
        keys = {
            name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
            for name, value in settings.items()
        }
        form = {
            "adapters": keys,
            "config_map": {keys[name]: value for name, value in settings.items()},
            "fusions": {},
            "fusion_config_map": {},
            "fusion_name_map": {},
        }
        return form if settings else None

    def _build_adapters(self) -> None:
        """The adapters that the configuration of a loaded checkpoint tells of."""
        told = getattr(self.config, "adapters", None) or {}
        keys, configs = (told.get("adapters", {}), told.get("config_map", {})) if isinstance(told, dict) else (None, {})
        if not isinstance(keys, dict) or not isinstance(configs, dict):
            raise ValueError(f"config.adapters holds no adapters and config_map, but {str(told)[:80]}")
        for name, key in keys.items():
            try:
                settings = complete(configs.get(key, key))  # a well-known configuration is told by its name alone
                self._insert(self._usable(name), settings)
            except (ValueError, TypeError) as error:
                logger.warning("adapter %r of the checkpoint is left out: %s", name, error)
            else:
                self._remember(self.adapters_config | {name: settings})

    @staticmethod
    def _usable(name: Any) -> str:
        if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
            raise ValueError(f"an adapter cannot be named {name!r}")
        return name

    def add_adapter(
        self,
        adapter_name: str,
        config: str | dict[str, Any] | None = "seq_bn",
        overwrite_ok: bool = False,
        set_active: bool = False,
    ) -> None:
        """config: seq_bn, double_seq_bn, lora, with changes as in "lora[r=4]", or a dictionary of settings as in
        adapter_config.json. A LoRA changes nothing until it is trained; bottlenecks start near nothing. Raises
        ValueError or TypeError."""
        self._usable(adapter_name)
        known, active = self.adapters_config, self.active_adapters
        if adapter_name in known and not overwrite_ok:
            raise ValueError(f"there is an adapter {adapter_name!r}; pass overwrite_ok=True to replace it")
        settings = complete("seq_bn" if config is None else config)
        merged = None if self._merged_adapter() == adapter_name else self._merged_adapter()
        # before anything changes
        self._refuse_two_loras([adapter_name] if set_active else active, known | {adapter_name: settings}, merged)
        if adapter_name in known:
            self.delete_adapter(adapter_name)
        self._insert(adapter_name, settings)
        self._remember(self.adapters_config | {adapter_name: settings})
        self.set_active_adapters(adapter_name if set_active else active)

    def _insert(self, name: str, settings: dict[str, Any]) -> None:
        if self.precision == "int8":
            raise ValueError("a model in int8 takes no adapters; load it in float32")
        dim, like = self.config.dim, next(self.parameters())

        def placed(module: nn.Module) -> nn.Module:
            return module.train(self.training) if like.is_meta else module.to(like).train(self.training)

        for i, block in self._blocks():
            if i in settings["leave_out"]:
                continue
            if settings.get("architecture") == "lora":
                for matrix in settings["attn_matrices"]:
                    linear = getattr(block.attention, MATRICES[matrix])
                    if not hasattr(linear, "loras"):
                        linear.loras = nn.ModuleDict().train(self.training)
                    linear.loras[name] = placed(LoRA(dim, settings))
                continue
            for on, slot in (
                (settings["mh_adapter"], "attention_adapters"),
                (settings["output_adapter"], "output_adapters"),
            ):
                if on:
                    if getattr(block, slot) is None:
                        setattr(block, slot, Adapters().train(self.training))
                    getattr(block, slot).adapters[name] = placed(Bottleneck(dim, settings))

    def _dicts(self) -> Iterator[nn.ModuleDict]:
        for _, block in self._blocks():
            for slot in (block.attention_adapters, block.output_adapters):
                if slot is not None:
                    yield slot.adapters
            for linear in (block.attention.q_lin, block.attention.k_lin, block.attention.v_lin):
                if hasattr(linear, "loras"):
                    yield linear.loras

    def _modules_of(self, name: str) -> Iterator[nn.Module]:
        yield from (held[name] for held in self._dicts() if name in held)

    def delete_adapter(self, adapter_name: str) -> None:
        self._known_adapter(adapter_name)
        if adapter_name == self._merged_adapter():
            raise ValueError(f"adapter {adapter_name!r} is merged; call reset_adapter first")
        for held in self._dicts():
            if adapter_name in held:
                del held[adapter_name]
        self._remember({name: value for name, value in self.adapters_config.items() if name != adapter_name})
        self.set_active_adapters([name for name in self.active_adapters if name != adapter_name])

    def _known_adapter(self, name: str) -> str:
        known = self.adapters_config
        if name not in known:
            raise ValueError(f"there is no adapter {name!r}; there are {', '.join(known) or 'none'}")
        return name

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that a call uses when it names none."""
        return list(self.base_model.__dict__.get("_active_adapters", ()))

    @active_adapters.setter
    def active_adapters(self, names: str | Sequence[str] | None) -> None:
        self.set_active_adapters(names)

    def set_active_adapters(self, names: str | Sequence[str] | None) -> None:
        self.adapter_stack(names)
        self.base_model.__dict__["_active_adapters"] = tuple(named(names, "adapters"))

    def adapter_stack(self, names: str | Sequence[str] | None) -> tuple[str, ...]:
        """What a call goes through that names these: one after another, at most one LoRA, none that is merged."""
        stack = [self._known_adapter(name) for name in named(names, "adapter_names")]
        merged = self._merged_adapter() if stack else None
        self._refuse_two_loras(stack, self.adapters_config, merged)
        return tuple(name for name in stack if name != merged)

    @staticmethod
    def _refuse_two_loras(stack: Sequence[str], settings: dict[str, dict[str, Any]], merged: str | None) -> None:
        loras = {name for name in stack if settings[name].get("architecture") == "lora"}
        if len(loras | {merged} - {None}) > 1 and loras:
            also = f" ({merged} is merged; reset_adapter undoes it)" if merged else ""
            raise ValueError(f"one LoRA can be active at a time, not {', '.join(sorted(loras))}{also}")

    def train_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Activate an adapter, or several, and let only them, and what stands on the encoder, be trained."""
        names = named(adapter_name, "adapter_name")
        if self._merged_adapter() in names:
            raise ValueError(f"adapter {self._merged_adapter()!r} is merged; call reset_adapter before training it")
        self.set_active_adapters(names)
        self.base_model.requires_grad_(False)
        for name in names:
            for module in self._modules_of(name):
                module.requires_grad_(True)
        self.train()

    # --- merging ------------------------------------------------------------------------------------------------

    def _projections(self) -> Iterator[nn.Linear]:
        for _, block in self._blocks():
            yield from (block.attention.q_lin, block.attention.k_lin, block.attention.v_lin)

    def _merged_adapter(self) -> str | None:
        return next((p.__dict__["_unmerged"][0] for p in self._projections() if "_unmerged" in p.__dict__), None)

    @torch.no_grad()
    def merge_adapter(self, adapter_name: str) -> None:
        """Add a LoRA's product to the weights it stands on, in place: calls then cost nothing more, and all go through
        it. `reset_adapter` restores the weights bit for bit; what `save_pretrained` writes has it for good."""
        if self.adapters_config[self._known_adapter(adapter_name)].get("architecture") != "lora":
            raise ValueError(f"adapter {adapter_name!r} is a bottleneck; only a LoRA can be merged")
        if self._merged_adapter() == adapter_name:
            return
        if self._merged_adapter() is not None:
            raise ValueError(f"adapter {self._merged_adapter()!r} is merged; call reset_adapter first")
        self._refuse_two_loras(self.active_adapters, self.adapters_config, adapter_name)
        for linear in self._projections():
            loras = getattr(linear, "loras", {})
            if adapter_name in loras:
                kept = linear.weight.detach().clone()
                linear.weight.copy_(_merged(kept, loras[adapter_name]))
                linear.__dict__["_unmerged"] = adapter_name, kept, linear.weight.detach().clone()

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Undo `merge_adapter`; what changed the weights since then, such as an optimizer, has changed them."""
        for linear in self._projections():
            if "_unmerged" not in linear.__dict__:
                continue
            same, weight = _as_merged(linear), linear.weight
            _, kept, merged = linear.__dict__.pop("_unmerged")
            kept, merged = kept.to(weight), merged.to(weight)
            weight.copy_(torch.where(same, kept, weight - (merged - kept)))

    # --- files --------------------------------------------------------------------------------------------------

    def _state_of(self, name: str) -> dict[str, Tensor]:
        """An adapter's tensors by the adapters library's names, with the encoder's prefix."""
        prefix = "" if self.base_model is not self else "distilbert."
        ours = (f".adapters.{name}.", f".loras.{name}.")
        return {prefix + key: value for key, value in self.state_dict().items() if any(part in key for part in ours)}

    def save_adapter(self, save_directory: str | Path, adapter_name: str, use_safetensors: bool = True) -> None:
        """Write adapter_config.json and adapter.safetensors, which the adapters library reads with its
        use_safetensors=True."""
        only_safetensors(use_safetensors)
        settings = self.adapters_config[self._known_adapter(adapter_name)]
        directory = Path(save_directory)
        if directory.exists() and not directory.is_dir():
            raise NotADirectoryError(f"{directory} is a file; give a directory to save into")
        directory.mkdir(parents=True, exist_ok=True)
        description = {
            "config": settings,
            "hidden_size": self.config.dim,
            "model_class": "DistilBertModelWithHeads",
            "model_name": "",
            "model_type": self.config.model_type,
            "name": adapter_name,
            "version": "adapters.1.3.0",  # whose format it is
        }
        (directory / CONFIG).write_text(json.dumps(description, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        state = {key: value.detach().clone().contiguous() for key, value in self._state_of(adapter_name).items()}
        save_file(state, directory / WEIGHTS, metadata={"format": "pt"})

    def load_adapter(
        self,
        save_directory: str | Path,
        load_as: str | None = None,
        set_active: bool = False,
        overwrite_ok: bool = True,
        use_safetensors: bool | None = None,
    ) -> str:
        """Add a saved adapter, of this library or of the adapters library, and return its name.

        adapter.safetensors is read, or where it is missing pytorch_adapter.bin with weights_only=True; use_safetensors
        says which. Raises OSError for files, ValueError for what is in them.
        """
        directory = Path(save_directory)
        if not (directory / CONFIG).is_file():
            raise FileNotFoundError(f"{directory} holds no {CONFIG}; give the directory of a saved adapter")
        description = read_object(directory / CONFIG)
        saved, settings = description.get("name"), description.get("config")
        if not isinstance(saved, str) or not isinstance(settings, dict):
            raise ValueError(f"{directory / CONFIG} describes no adapter (its config and its name)")
        if description.get("hidden_size", self.config.dim) != self.config.dim:
            raise ValueError(
                f"{directory / CONFIG}: hidden_size is {description['hidden_size']}, the model's is {self.config.dim}"
            )
        try:
            settings = complete(settings)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{directory / CONFIG}: {error}") from error
        name = saved if load_as is None else load_as
        if name in self.adapters_config and not overwrite_ok:
            raise ValueError(f"there is an adapter {name!r}; pass overwrite_ok=True to replace it")
        with Weights.of_file(directory / WEIGHTS, directory / PICKLE, use_safetensors) as weights:
            found = {}
            for key in weights.shapes:
                new = key if key.startswith("distilbert.") else f"distilbert.{key}"  # saved from a bare encoder
                new = new.replace(f".adapters.{saved}.", f".adapters.{name}.").replace(
                    f".loras.{saved}.", f".loras.{name}."
                )
                found[new] = key
            expected = self._shapes(name, settings)  # compared before the model is touched
            for key in sorted(expected.keys() | found.keys()):
                there = weights.shapes.get(found.get(key, ""))
                if there != expected.get(key):
                    raise ValueError(
                        f"{weights.where}: {key} should be {expected.get(key, 'absent')} by {CONFIG}, but is "
                        f"{there if there is not None else 'absent'}"
                    )
            state = {key: weights.read(found[key]) for key in expected}
        self.add_adapter(name, settings, overwrite_ok=True, set_active=set_active)
        own = self._state_of(name)
        with torch.no_grad():
            for key, value in state.items():
                own[key].copy_(value)
        return name

    def _shapes(self, name: str, settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """The tensors that an adapter of these settings has in this model."""
        shapes: dict[str, tuple[int, ...]] = {}
        with torch.device("meta"):
            lora = settings.get("architecture") == "lora"
            module = (LoRA if lora else Bottleneck)(self.config.dim, settings)
        one = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        for i, _ in self._blocks():
            if i in settings["leave_out"]:
                continue
            where = [f"attention.{MATRICES[m]}.loras" for m in settings.get("attn_matrices", [])]
            if not lora:
                slots = {"attention_adapters": settings["mh_adapter"], "output_adapters": settings["output_adapter"]}
                where = [f"{slot}.adapters" for slot, on in slots.items() if on]
            for place in where:
                shapes |= {
                    f"distilbert.transformer.layer.{i}.{place}.{name}.{key}": shape for key, shape in one.items()
                }
        return shapes
