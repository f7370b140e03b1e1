"""Embedder: texts in, one vector each out, with the checkpoint's own pooling, normalisation and maximum length."""

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastdistil import graphs, ops
from fastdistil._register import FORMS
from fastdistil.checkpoint import find, read_json, read_object
from fastdistil.engine.runner import Done, Engine, GraphCache, budget_for
from fastdistil.engine.scheduler import Window, cuts
from fastdistil.engine.tokens import TextWindows, ahead
from fastdistil.model import DistilBertModel, as_device
from fastdistil.tokenizer import DistilBertTokenizer

logger = logging.getLogger("fastdistil")

DEVICES = ("cpu", "cuda")


class Embedder:
    """Sentence embeddings from a DistilBERT or BERT encoder.

    model, tokenizer: loaded objects. pooling: "mean" or "cls". normalize: divide by the L2 norm. max_length: tokens
    with the special ones, at most the model's positions; longer texts are cut. prompt is put before every text,
    lower_case lowers it first. Source: Sentence-BERT (Reimers and Gurevych, 2019).
    """

    def __init__(
        self,
        model: DistilBertModel,
        tokenizer: DistilBertTokenizer,
        *,
        pooling: str = "mean",
        normalize: bool = False,
        max_length: int | None = None,
        prompt: str = "",
        lower_case: bool = False,
    ):
        if not isinstance(model, DistilBertModel) or not isinstance(tokenizer, DistilBertTokenizer):
            given = f"{type(model).__name__} and {type(tokenizer).__name__}"
            raise TypeError(f"an Embedder is made of a DistilBertModel and a DistilBertTokenizer, got {given}")
        positions = model.config.max_position_embeddings
        if pooling not in ops.POOLING:
            raise ValueError(f"pooling {pooling!r} is not one of {', '.join(ops.POOLING)}")
        if max_length is None:
            max_length = min(positions, tokenizer.model_max_length)
        if isinstance(max_length, bool) or not isinstance(max_length, int):
            raise TypeError(f"max_length must be an integer, got {max_length!r}")
        if not 2 < max_length <= positions:
            raise ValueError(f"max_length is {max_length}; it must be from 3 to the model's {positions} positions")
        largest = max(tokenizer.get_vocab().values())
        if largest >= model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has ids up to {largest}, the model {model.config.vocab_size} embeddings: they do not "
                "belong together (or call model.resize_token_embeddings)"
            )
        if not isinstance(normalize, bool):
            raise TypeError(f"normalize must be true or false, got {normalize!r}")
        self.model, self.tokenizer = model.eval(), tokenizer.lowered() if lower_case else tokenizer
        self.pooling, self.normalize, self.max_length = pooling, normalize, max_length
        self.prompt, self.lower_case = prompt, lower_case
        self._graphs = GraphCache()

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: Any,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        pooling: str | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> "Embedder":
        """From a directory or a hub id. What sentence-transformers' files say (modules.json, the pooling and sentence
        configurations) holds unless given here; without them: mean pooling, no normalisation.

        device: by default cuda when there is one. dtype: "auto" is float32 on CPU and float16 on CUDA; "int8"
        is for CPU, see DistilBertModel.from_pretrained. Raises OSError for files, ValueError for what is in them.
        """
        directory = find(path_or_repo, revision=revision, local_files_only=local_files_only)
        settings = read_settings(directory)
        place = as_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if place.type not in DEVICES:
            raise ValueError(f"device {str(place)!r} is not supported; use cpu or cuda")
        if dtype == "auto":
            dtype = torch.float32 if place.type == "cpu" else torch.float16
        given = {"pooling": pooling, "normalize": normalize, "max_length": max_length}
        settings |= {k: v for k, v in given.items() if v is not None}
        model = DistilBertModel.from_pretrained(directory, dtype=dtype, device=place)
        embedder = cls(model, DistilBertTokenizer.from_pretrained(directory), **settings)
        logger.info("%s", embedder.describe())
        return embedder

    @property
    def dim(self) -> int:
        return self.model.config.dim

    def describe(self) -> str:
        """Device, dtype and where the ops' code comes from, in words."""
        return describe(self.model)

    def encode(
        self,
        texts: str | Iterable[str],
        max_batch_tokens: int | None = None,
        show_progress: bool | None = None,
        *,
        tokenizer_processes: int = 0,
    ) -> np.ndarray:
        """Embeddings of texts, float32 [len(texts), dim] in their order; of one string, [dim].

        max_batch_tokens: by default 2,048 on CPU and about 16,896 on CUDA. show_progress: texts/s and tokens/s on
        stderr; by default when that is a terminal. tokenizer_processes: how many more processes tokenise, for a GPU
        that waits for this one's threads. Memory beyond the output is bounded by the token budget and a look-ahead of
        65,536 texts. Equal texts are computed once. Raises TypeError or ValueError naming the text, MemoryError for a
        text that does not fit alone.
        """
        if isinstance(texts, str):
            return self.encode([texts], max_batch_tokens, show_progress=False)[0]
        if isinstance(texts, (bytes, dict)) or not isinstance(texts, Iterable):
            raise TypeError(f"texts must be a string or an iterable of strings, got {type(texts).__name__}")
        if isinstance(dimensions := getattr(texts, "ndim", 1), (int, np.integer)) and dimensions != 1:
            raise TypeError(
                f"texts must be one column of strings, got {dimensions} dimensions in a {type(texts).__name__}"
            )
        if not isinstance(texts, (list, tuple)):
            texts = list(texts)
        engine = self.engine(max_batch_tokens)
        source = self.text_windows(tokenizer_processes)
        try:
            windows = (source.window(texts[a:b], a) for a, b in cuts(len(texts)))
            return self._collect(engine, windows, len(texts), show_progress)
        finally:
            source.close()

    def encode_tokens(
        self,
        input_ids: Any,
        cu_seqlens: Any,
        max_batch_tokens: int | None = None,
        show_progress: bool | None = None,
    ) -> np.ndarray:
        """Embeddings of texts that are token ids already, special tokens included: float32 [n, dim].

        input_ids: integers [tokens], one text after another. cu_seqlens: integers [n + 1], where each begins, from 0 to
        [tokens]; arrays or CPU tensors. Raises TypeError or ValueError naming the text.
        """
        ids, ends = np.asarray(input_ids), np.asarray(cu_seqlens)
        for name, array in (("input_ids", ids), ("cu_seqlens", ends)):
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise TypeError(f"{name} must be a flat array of integers, got {array.dtype} {list(array.shape)}")
        lengths = np.diff(ends.astype(np.int64))
        if len(ends) == 0 or ends[0] != 0 or ends[-1] != len(ids) or lengths.min(initial=0) < 0:
            raise ValueError(f"cu_seqlens must rise from 0 to the {len(ids)} input_ids")
        self.check_tokens(ids, lengths)
        engine = self.engine(max_batch_tokens)
        windows = (Window(ids[ends[a] : ends[b]], lengths[a:b], first=a) for a, b in cuts(len(lengths)))
        return self._collect(engine, windows, len(lengths), show_progress)

    def check_tokens(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Raise ValueError naming the first text with an id outside the vocabulary or more tokens than max_length."""
        if len(long := np.flatnonzero(lengths > self.max_length)):
            raise ValueError(
                f"texts[{long[0]}] has {lengths[long[0]]} tokens, more than max_length {self.max_length}; cut it"
            )
        size = self.model.config.vocab_size
        if len(ids) and (ids.min() < 0 or ids.max() >= size):
            at = int(np.flatnonzero((ids < 0) | (ids >= size))[0])
            row = int(np.searchsorted(np.cumsum(lengths), at, side="right"))
            raise ValueError(f"texts[{row}] holds the id {ids[at]}, outside the vocabulary of {size}")

    def budget(self, max_batch_tokens: int | None) -> int:
        """Tokens a batch, checked; by default as many as suit the device."""
        if max_batch_tokens is None:
            return budget_for(self.model.device, self.dim)
        whole = isinstance(max_batch_tokens, (int, np.integer)) and not isinstance(max_batch_tokens, bool)
        if not whole or max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens is {max_batch_tokens!r}; it must be an integer of 1 or more")
        return int(max_batch_tokens)

    def text_windows(self, processes: int = 0) -> TextWindows:
        prepare = self._prepare if self.prompt else None
        return TextWindows(self.tokenizer, self.max_length, prepare, processes)

    def run(self, engine: Engine, windows: Iterable[Window]) -> Iterator[Done]:
        """Embeddings of windows, batch by batch: float32 [sequences, dim], one of equal texts."""
        key = None
        if engine.device.type != "cpu":  # where the model has the cores that the tokenizer would need
            windows = ahead(windows)
            if (state := graphs.state_of(self.model)) is not None:
                key = state, self.pooling, self.normalize
        return engine.run(windows, self._compute, key=key)

    def engine(self, max_batch_tokens: int | None = None) -> Engine:
        return Engine(self.model.device, self.budget(max_batch_tokens), self._graphs)

    def _collect(self, engine: Engine, windows: Iterable[Window], rows: int, show_progress: bool | None) -> np.ndarray:
        out = np.empty((rows, self.dim), np.float32)
        seen = sys.stderr is not None and (is_terminal(sys.stderr) if show_progress is None else show_progress)
        shown = tqdm(total=rows, unit="text", unit_scale=True, file=sys.stderr) if seen else nullcontext()
        tokens = 0
        with shown as bar:
            for done in self.run(engine, windows):
                at, which = done.window.texts(done.rows)
                if done.error is not None:
                    raise MemoryError(f"texts[{at[0]}]: {done.error}")
                if done.result is None:
                    continue  # of no sequences
                out[at] = done.result.numpy()[which]
                if bar is not None:
                    tokens += int(done.window.lengths[done.rows].sum())
                    bar.update(len(at))
                    elapsed = bar.format_dict["elapsed"] or 1e-9
                    bar.set_postfix_str(f"{tokens / elapsed:,.0f} tokens/s", refresh=False)
        return out

    def tokenize(self, texts: Sequence[str], *, first_row: int = 0) -> Window:
        """Token ids of all texts, each distinct one tokenised once."""
        return self.text_windows().window(texts, first_row)

    def _prepare(self, text: str) -> str:
        return self.prompt + text

    @torch.inference_mode()
    def _compute(
        self, ids: Tensor, cu_seqlens: Tensor, longest: int, positions: Tensor, rows: np.ndarray, full: bool
    ) -> Tensor:
        longest = min(longest, self.model.config.max_position_embeddings)
        hidden = self.model.forward_packed(ids, cu_seqlens, longest, positions, all_live=full)  # [tokens, dim]
        return ops.pool(hidden, cu_seqlens, self.pooling, self.normalize).float()


def is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, TypeError, ValueError):  # somebody's own, or closed
        return False


def describe(model: DistilBertModel) -> str:
    """A model's device, dtype and where the ops' code comes from, in words."""
    device = model.device
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else f" ({_threads()})"
    modules = sorted({forms[device.type].__module__.removeprefix("fastdistil.") for forms in FORMS.values()})
    kernels = [m.removeprefix("kernels.") for m in modules if m.startswith("kernels")]
    why = ops.why_eager(device)
    if kernels and why is None:
        runs = f"Triton kernels ({', '.join(kernels)})"
    else:
        runs = f"eager torch ops ({why if kernels else ', '.join(modules)})"
    return f"{device}{name}, {model.precision}, {runs}"


def _threads() -> str:
    n = torch.get_num_threads()
    return f"{n} thread{'s' if n != 1 else ''}"


# --- sentence-transformers' files ---------------------------------------------------------------------------------


def read_settings(directory: Path) -> dict[str, Any]:
    """Embedder's arguments as sentence-transformers' files state them; what we cannot compute is an error."""
    settings: dict[str, Any] = {}
    modules = read_json(directory / "modules.json")
    if not isinstance(modules, list) and (directory / "modules.json").is_file():
        raise ValueError(f"{directory}/modules.json holds a JSON {type(modules).__name__}, not a list of modules")
    for module in modules or []:
        kind = str(module.get("type", "")).rsplit(".", 1)[-1] if isinstance(module, dict) else ""
        if kind == "Transformer" and module.get("path", "") != "":
            raise ValueError(f"{directory}/modules.json puts the encoder in {module['path']!r}; load that directory")
        elif kind == "Pooling":
            settings["pooling"] = _pooling(_inside(directory, str(module.get("path", ""))) / "config.json")
        elif kind == "Normalize":
            settings["normalize"] = True
        elif kind != "Transformer":
            raise ValueError(f"{directory}/modules.json asks for the module {kind or module!r}, which is not supported")
    sentence = read_object(directory / "sentence_bert_config.json")
    where = f"{directory}/sentence_bert_config.json"
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
    if told.get("truncate_dim") is not None:
        raise ValueError(f"{where}: truncate_dim is {told['truncate_dim']!r}, which is not supported")
    if name := told.get("default_prompt_name"):
        prompts = told.get("prompts") or {}
        if not isinstance(prompts, dict) or not isinstance(name, str) or name not in prompts:
            raise ValueError(f"{where} has no prompt {name!r} under prompts")
        settings["prompt"] = prompts[name]
        if not isinstance(settings["prompt"], str):
            raise ValueError(f"{where}: the prompt {name!r} is not a string")
    return settings


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
