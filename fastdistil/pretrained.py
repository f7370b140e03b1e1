"""What every DistilBERT model shares: checkpoints, initial weights, sizes, gradient checkpointing."""

import copy
import inspect
import logging
from collections.abc import Callable, Collection
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastdistil import int8
from fastdistil.adapters import LoRA, WithAdapters
from fastdistil.checkpoint import Weights, find, load_weights, read_config, save
from fastdistil.config import LIMITS, DistilBertConfig
from fastdistil.int8 import Int8Linear
from fastdistil.layers import Embeddings

logger = logging.getLogger("fastdistil")
# transformers' keywords of from_pretrained: without a meaning here, and those that ask for something if they are set
_IGNORED = ("trust_remote_code", "weights_only", "use_cache", "resume_download")
_ABSENT = (
    "adapter_kwargs",
    "force_download",
    "key_mapping",
    "offload_folder",
    "proxies",
    "quantization_config",
    "subfolder",
    "use_auth_token",
    "variant",
)


class PreTrainedModel(WithAdapters):
    """What every DistilBERT model shares: checkpoints, initial weights, embeddings' sizes, gradient checkpointing."""

    config_class = DistilBertConfig
    base_model_prefix = "distilbert"
    main_input_name = "input_ids"
    name_or_path = ""  # of the checkpoint, for tools that write down where a model came from

    def __init__(self, config: DistilBertConfig):
        super().__init__()
        if not isinstance(config, DistilBertConfig):
            raise TypeError(f"config must be a fastdistil.DistilBertConfig, got {type(config).__name__}")
        config._validate()
        self.config = config

    # --- weights ------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: Any,
        *,
        config: DistilBertConfig | None = None,
        dtype: str | torch.dtype | None = "auto",
        device: str | torch.device | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        use_safetensors: bool | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        state_dict: dict[str, Tensor] | None = None,
        torch_dtype: str | torch.dtype | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        low_cpu_mem_usage: bool | None = None,
        **overrides: Any,
    ) -> Any:
        """Load a DistilBERT or BERT checkpoint from a directory or a hub id, in eval mode.

        dtype: "auto" is the checkpoint's own; else a torch dtype or its name, or "int8" for inference on CPU: the
        encoder's linear layers in int8, the rest in float32. A local directory is read without any network access.
        use_safetensors=False reads pytorch_model.bin (with weights_only=True) instead.
        output_loading_info: also return a dictionary of missing_keys, unexpected_keys and mismatched_keys.
        cache_dir and token are the hub's. device_map: one device, or "auto". attn_implementation: see
        `set_attn_implementation`. low_cpu_mem_usage and what else transformers' callers pass to its loader
        (trust_remote_code, an empty variant) mean nothing here.
        Other keywords override the configuration. BERT checkpoints convert exactly for a single segment: the vector of
        token type 0 is added to every position. Raises OSError for files, ValueError for what is in them, TypeError for
        a keyword that is none of the configuration's.
        """
        overrides = {k: v for k, v in overrides.items() if k not in _IGNORED and not (k in _ABSENT and not v)}
        if device is None and device_map is not None:
            device = one_device(device_map)
        if config is not None and not isinstance(config, DistilBertConfig):
            raise TypeError(f"config must be a fastdistil.DistilBertConfig, got {type(config).__name__}")
        if path_or_repo is None and state_dict is not None and config is not None:
            directory, config = None, copy.deepcopy(config).updated(overrides)
        else:
            extra = ("pytorch_model*.bin", "pytorch_model.bin.index.json") if use_safetensors is False else ()
            directory = find(
                path_or_repo,
                revision=revision,
                local_files_only=local_files_only,
                extra_files=extra,
                cache_dir=cache_dir,
                token=token,
            )
            config = read_config(directory, **overrides) if config is None else copy.deepcopy(config).updated(overrides)
        config = cls._for_checkpoint(config)
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation
        if state_dict is not None:
            weights = Weights.from_tensors(state_dict)
        else:
            assert directory is not None
            weights = Weights(directory, use_safetensors)
        with weights:
            with torch.device("meta"), _WithoutInit():
                model = cls(config)
            wanted = torch_dtype if torch_dtype is not None else dtype
            if to_int8 := wanted in ("int8", "torch.int8", torch.int8):
                wanted = "float32"
                if as_device("cpu" if device is None else device).type != "cpu":
                    raise ValueError(f"dtype int8 is for CPU, not for {device}; use float16 there")
            model = model.to(_dtype(wanted, config, weights))
            model.__dict__["_load_device"] = as_device("cpu" if device is None else device)
            report = load_weights(model, weights, ignore_mismatched_sizes=ignore_mismatched_sizes)
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.name_or_path = "" if path_or_repo is None else str(path_or_repo)
        for one in {model, model.base_model}:
            one.name_or_path = model.config.name_or_path
        if to_int8:
            if model.adapters_config:
                raise ValueError("dtype int8 takes no adapters; use float32, or save the model with one merged")
            int8.convert(model, model.base_model.transformer.layer)
        model.eval()
        return (model, report.as_dict()) if output_loading_info else model

    @classmethod
    def _for_checkpoint(cls, config: DistilBertConfig) -> DistilBertConfig:
        """The configuration to build a model from that a checkpoint with `config` is to fill."""
        return config

    def renamed(self, name: str) -> str:
        """What a checkpoint's parameter is called here."""
        return name

    def materialize(self, fresh: set[str], untied: set[str]) -> None:
        """Allocate a model built on the meta device and give initial values to the parameters named in `fresh`."""
        device = self.__dict__.pop("_load_device", "cpu")
        # not to_empty, whose empty_like of a meta tensor imports sympy: half a second
        self._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))
        self.tie_weights(untied)
        # in the modules' order, and none whose weight the checkpoint has: one seed gives one model in both libraries
        for prefix, module in self.named_modules():
            own = chain(module.named_parameters(prefix, recurse=False), module.named_buffers(prefix, recurse=False))
            missing = [name for name, _ in own if name in fresh]
            if missing and isinstance(module, nn.Linear) and all(name.endswith(".bias") for name in missing):
                nn.init.zeros_(module.bias)
            elif missing:
                if not isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm, LoRA, Embeddings)):
                    _reset(module)
                self._draw(module)
                if type(self)._init_weights is not PreTrainedModel._init_weights:  # a user's own rule has the last word
                    module.__dict__.pop("_is_hf_initialized", None)
                    self._init_weights(module)
        for module in self.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]
        if any(name.endswith("position_embeddings.weight") for name in fresh):
            self._draw(next(m for m in self.modules() if isinstance(m, Embeddings)))

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        save_function: Callable | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        token: str | bool | None = None,
        save_peft_format: bool = True,
        save_original_format: bool = True,
        *,
        safe_serialization: bool = True,
    ) -> None:
        """Write config.json and model.safetensors, or shards of at most max_shard_size with their index; nothing unless
        is_main_process. state_dict: tensors gathered elsewhere, in place of the model's own. safe_serialization is
        always on; save_function, token and the save_..._format are for transformers' callers and mean nothing here."""
        if push_to_hub or variant:
            what = "push_to_hub=True" if push_to_hub else f"variant={variant!r}"
            raise ValueError(f"{what} is not supported; save into a directory and upload it with huggingface_hub")
        if not safe_serialization:
            raise ValueError("safe_serialization=False asks for a pickle; only safetensors are written")
        if not is_main_process:
            return
        if self.precision == "int8":
            raise ValueError("the weights were rounded to int8 and cannot be saved; save the model they came from")
        self.config.architectures = [type(self).__name__]
        self.config.dtype = str(self.dtype).removeprefix("torch.")
        config, merged = copy.deepcopy(self.config), self._merged_adapter()
        if config.layer_norm_eps != type(config)().layer_norm_eps:
            logger.warning(
                "transformers computes a DistilBERT with layer_norm_eps 1e-12, not %s", config.layer_norm_eps
            )
        adapters = self._adapters_in_file()
        config.__dict__.pop("adapters", None)
        if adapters is not None:
            config.adapters = adapters
        if merged is not None:
            logger.warning(
                "adapter %r is merged: the weights are saved with it, and it is not saved beside them", merged
            )
        kept = (lambda name: True) if merged is None else (lambda name: f".loras.{merged}." not in name)
        save(self, Path(save_directory), config, kept, max_shard_size=max_shard_size, state_dict=state_dict)

    def post_init(self) -> None:
        """Initial values in transformers' order, so that one seed gives one model in both libraries; what has its own,
        from a checkpoint or drawn before, keeps them."""
        if self.device.type != "meta":
            self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """`_draw`, once a module: the mark is transformers', whose loaders and modules heed it, too."""
        if not module.__dict__.get("_is_hf_initialized"):
            self._draw(module)
            module._is_hf_initialized = True  # type: ignore[assignment]

    @torch.no_grad()
    def _draw(self, module: nn.Module) -> None:
        std = self.config.initializer_range or 0.02
        if isinstance(module, nn.Linear):
            module.weight.normal_(0, std)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0, std)
            if module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
        elif isinstance(module, nn.LayerNorm):
            if module.weight is not None:
                module.weight.fill_(1)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, LoRA):
            module.reset()
        elif isinstance(module, Embeddings) and self.config.sinusoidal_pos_embds:
            table = module.position_embeddings.weight
            table.copy_(sinusoidal_positions(*table.shape))

    # --- size and place -----------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self._one_weight().device

    @property
    def dtype(self) -> torch.dtype:
        return self._one_weight().dtype

    def _one_weight(self) -> Tensor:
        """A floating-point parameter; of replicas, whose weights are attributes, the word embeddings."""
        found = next((p for p in self.parameters() if p.is_floating_point()), None)
        return self.get_input_embeddings().weight if found is None else found

    @property
    def precision(self) -> str:
        """The dtype's name, or "int8" where the linear layers are."""
        if any(isinstance(m, Int8Linear) for m in self.modules()):
            return "int8"
        return str(self.dtype).removeprefix("torch.")

    @property
    def base_model(self) -> Any:
        return getattr(self, self.base_model_prefix, self)

    @classmethod
    def from_config(cls, config: DistilBertConfig) -> Any:
        """A model with initial weights."""
        return cls(config)

    _from_config = from_config

    def init_weights(self) -> None:
        """Give initial values to what has none yet, as `post_init` does; what was loaded stays."""
        if self.device.type != "meta":
            self.apply(self._init_weights)
        self.tie_weights()

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of parameters, and of buffers."""
        held = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nbytes for tensor in held)

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[7, 6, 0, 0, 1], [1, 2, 3, 0, 0], [0, 0, 0, 4, 5]], device=self.device)}

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """ "eager": a gradient's way computes attention step by step, as derivatives of second order need; else nothing
        changes."""
        self.config._attn_implementation = attn_implementation

    def enable_input_require_grads(self) -> None:
        """Let the word embeddings' result require a gradient, as training adapters under checkpointing needs."""
        words = self.get_input_embeddings()
        self.disable_input_require_grads()
        self.__dict__["_grads_hook"] = words.register_forward_hook(lambda module, args, out: out.requires_grad_(True))

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        hook = self.__dict__.pop("_grads_hook", None)
        if hook is not None:
            hook.remove()

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        skip = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)} if exclude_embeddings else set()
        found = sum(
            p.numel() for p in self.parameters() if id(p) not in skip and (p.requires_grad or not only_trainable)
        )
        rounded = () if only_trainable else (m for m in self.modules() if type(m) is Int8Linear)
        return found + sum(m.weight.numel() + m.bias.numel() for m in rounded)

    # --- embeddings ---------------------------------------------------------------------------------------------

    @property
    def _embeddings(self) -> Any:
        return self.base_model.embeddings

    def get_input_embeddings(self) -> nn.Embedding:
        return self._embeddings.word_embeddings

    def set_input_embeddings(self, embeddings: nn.Embedding) -> None:
        self._embeddings.word_embeddings = embeddings

    def get_output_embeddings(self) -> nn.Module | None:
        return None

    def tie_weights(self, but: Collection[str] = ()) -> None:
        """Share what the configuration says is shared, but for the named; only a masked-LM head shares anything."""

    def get_position_embeddings(self) -> nn.Embedding:
        return self._embeddings.position_embeddings

    @torch.no_grad()
    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Grow or cut the vocabulary in place and return the embedding, the same module as before.

        New rows are drawn around the old rows' mean (covariance scaled by 1e-9), or with mean_resizing=False like
        initial weights. The optimizer must be made anew, since the parameter is a new one unless the size stays.
        """
        words = self.get_input_embeddings()
        old = words.weight
        if new_num_tokens is None and pad_to_multiple_of is None:
            return words
        for name, value in (("new_num_tokens", new_num_tokens), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name} must be an integer, got {value!r}")
        n = len(old) if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            if pad_to_multiple_of < 1:
                raise ValueError(f"pad_to_multiple_of is {pad_to_multiple_of}; it must be 1 or more")
            n = -(-n // pad_to_multiple_of) * pad_to_multiple_of
        if not 1 <= n <= LIMITS["vocab_size"]:
            raise ValueError(f"new_num_tokens is {n}; a vocabulary has from 1 to {LIMITS['vocab_size']} tokens")
        if n == len(old):
            self.config.vocab_size = n
            return words
        new = old.new_empty(n, old.shape[1]).normal_(0, self.config.initializer_range or 0.02)
        if n > len(old) and mean_resizing:
            new[len(old) :] = mean_rows(old, n - len(old))
        new[: len(old)] = old[:n]
        words.weight = nn.Parameter(new, requires_grad=old.requires_grad)
        words.num_embeddings = self.config.vocab_size = n
        if words.padding_idx is not None and words.padding_idx >= n:
            words.padding_idx = None
        return words

    @torch.no_grad()
    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """Change the longest input, in tokens. Learned positions keep their rows and get initial values for new ones;
        sinusoidal ones are computed."""
        n = new_num_position_embeddings
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"new_num_position_embeddings must be an integer, got {n!r}")
        if not 1 <= n <= LIMITS["max_position_embeddings"]:
            most = LIMITS["max_position_embeddings"]
            raise ValueError(f"new_num_position_embeddings is {n}; it must be from 1 to {most}")
        positions = self.get_position_embeddings()
        old = positions.weight
        if n == len(old):
            return
        if self.config.sinusoidal_pos_embds:
            new = sinusoidal_positions(n, old.shape[1]).to(old)
        else:
            new = old.new_empty(n, old.shape[1]).normal_(0, self.config.initializer_range or 0.02)
            if getattr(self.config, "token_types_folded", False):
                new += old.mean(0)  # above all the token type's vector, which is part of each row
            new[: len(old)] = old[:n]
        positions.weight = nn.Parameter(new, requires_grad=old.requires_grad)
        positions.num_embeddings = self.config.max_position_embeddings = n

    # --- gradient checkpointing ---------------------------------------------------------------------------------

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute each block, or each n-th, in the backward pass instead of keeping its activations; only in training
        mode. offload: what is kept for that lies in the host's memory. The keywords go to torch's checkpoint."""
        if isinstance(every_n_layers, bool) or not isinstance(every_n_layers, int) or every_n_layers < 1:
            raise ValueError(f"every_n_layers is {every_n_layers!r}; it must be an integer from 1 on")
        transformer = self.base_model.transformer
        transformer.gradient_checkpointing, transformer.checkpointing_step = True, every_n_layers
        transformer.checkpoints_on_host = bool(offload)
        transformer.checkpointing_options = dict(gradient_checkpointing_kwargs or {})

    def gradient_checkpointing_disable(self) -> None:
        self.base_model.transformer.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.base_model.transformer.gradient_checkpointing


def _reset(module: nn.Module) -> None:
    """Initial values of a user's own part, where its class gives it some."""
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if callable(reset):
        try:
            inspect.signature(reset).bind()
        except TypeError:  # it wants to be told something
            return
        reset()


class _WithoutInit(TorchFunctionMode):
    """Skips torch.nn.init: on the meta device its random numbers would cost the import of torch's compiler, 2 s."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))


def as_device(name: str | int | torch.device) -> torch.device:
    """A device that is there, or ValueError. A number is transformers': of a CUDA device, or below 0 the CPU."""
    if isinstance(name, str) and name.isdecimal():  # of a command line
        name = int(name)
    if isinstance(name, int) and not isinstance(name, bool):
        name = f"cuda:{name}" if name >= 0 else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {name!r} is not a device; use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(name)!r} is not supported; use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {str(name)!r} was asked for, but torch finds no CUDA device of that number")
    return device


def one_device(device_map: Any) -> str | torch.device:
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map in ("auto", "balanced", "sequential"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device_map, int) and not isinstance(device_map, bool):
        return as_device(device_map)
    if not isinstance(device_map, (str, torch.device)):
        raise ValueError(f"device_map {device_map!r} spreads a model over devices, which is not supported; name one")
    return device_map


def _dtype(wanted: str | torch.dtype | None, config: DistilBertConfig, weights: Weights) -> torch.dtype:
    if wanted is None or wanted == "auto":
        wanted = config.dtype or weights.dtype or torch.float32
    found = getattr(torch, wanted.removeprefix("torch."), None) if isinstance(wanted, str) else wanted
    if found not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ValueError(
            f"dtype {wanted!r} is not one of auto, float32, float16, bfloat16, float64 (or, as an argument, int8)"
        )
    return found


def sinusoidal_positions(positions: int, dim: int) -> Tensor:
    """[positions, dim] float32: sin on even columns, cos on odd, of position / 10000^(2 * (column // 2) / dim).

    Source: Attention Is All You Need, section 3.5; computed in float64 as HF does.
    """
    column = torch.arange(dim)
    rate = 10000.0 ** (2 * (column // 2).double() / dim)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] / rate
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()


def mean_rows(rows: Tensor, n: int) -> Tensor:
    """n draws from a normal with the rows' mean and 1e-9 of their covariance; the mean where that is degenerate."""
    x = rows.float()
    mean = x.mean(0)
    covariance = (x - mean).T @ (x - mean) / len(x) * 1e-9
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        return mean.expand(n, -1).to(rows.dtype)
    return (mean + torch.randn(n, x.shape[1], device=x.device) @ factor.T).to(rows.dtype)
