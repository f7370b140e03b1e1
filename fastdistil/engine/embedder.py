"""Embedder: texts in, one vector each out, with the checkpoint's own pooling, normalisation and maximum length."""

import logging
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fastdistil import ops
from fastdistil._register import FORMS
from fastdistil.checkpoint import find, read_json, read_object
from fastdistil.engine.scheduler import TOKENIZE, WINDOW, Window, batches
from fastdistil.model import DistilBertModel, as_device
from fastdistil.tokenizer import DistilBertTokenizer

logger = logging.getLogger("fastdistil")

BUDGET = {"cpu": 2_048, "cuda": 16_896}  # tokens a batch
MOST_WORKERS = 16  # each holds the activations of a batch
WORTH_A_WORKER = 512  # fewer tokens a thread are quicker with all threads on one batch


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
        self.model, self.tokenizer = model.eval(), tokenizer
        self.pooling, self.normalize, self.max_length = pooling, normalize, max_length
        self.prompt, self.lower_case = prompt, lower_case

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

        device: by default cuda when there is one. dtype: "auto" is float32 on CPU and float16 on CUDA.
        Raises OSError for files, ValueError for what is in them.
        """
        directory = find(path_or_repo, revision=revision, local_files_only=local_files_only)
        settings = read_settings(directory)
        place = as_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if place.type not in BUDGET:
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
    ) -> np.ndarray:
        """Embeddings of texts, float32 [len(texts), dim] in their order; of one string, [dim].

        max_batch_tokens: by default 2,048 on CPU and 16,896 on CUDA. show_progress: texts/s and tokens/s on stderr;
        by default when that is a terminal. Memory beyond the output is bounded by the token budget and a look-ahead
        of 65,536 texts. Raises TypeError or ValueError naming the text.
        """
        if isinstance(texts, str):
            return self.encode([texts], max_batch_tokens, show_progress=False)[0]
        if isinstance(texts, (bytes, dict)) or not isinstance(texts, Iterable):
            raise TypeError(f"texts must be a string or an iterable of strings, got {type(texts).__name__}")
        if not isinstance(texts, (list, tuple)):
            texts = list(texts)
        budget = BUDGET[self.model.device.type] if max_batch_tokens is None else max_batch_tokens
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
            raise ValueError(f"max_batch_tokens is {budget!r}; it must be an integer of 1 or more")
        out = np.empty((len(texts), self.dim), np.float32)
        quiet = not sys.stderr.isatty() if show_progress is None else not show_progress
        with tqdm(total=len(texts), unit="text", unit_scale=True, disable=quiet, file=sys.stderr) as bar:
            tokens = 0
            for first in range(0, len(texts), WINDOW):
                window = self.tokenize(texts[first : first + WINDOW], first_row=first)
                for rows, embeddings in self._run(window, budget):
                    out[first + rows] = embeddings
                    tokens += int(window.lengths[rows].sum())
                    bar.update(len(rows))
                    if not quiet:
                        elapsed = bar.format_dict["elapsed"] or 1e-9
                        bar.set_postfix_str(f"{tokens / elapsed:,.0f} tokens/s", refresh=False)
        return out

    def _run(self, window: Window, budget: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(rows, embeddings) batch by batch."""

        def one(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            ids, positions, cu_seqlens = window.gather(rows)
            return rows, self.embed_packed(ids, cu_seqlens, positions)

        tokens, threads = len(window.ids), torch.get_num_threads()
        if self.model.device.type != "cpu" or threads == 1 or tokens < threads * WORTH_A_WORKER:
            yield from map(one, batches(window.lengths, budget))
            return
        # a batch a thread beats every thread on one batch, for no op waits for its slowest thread
        with cpu_workers(threads) as (pool, workers):
            rounds = -(-tokens // (budget * workers))
            yield from pool.map(one, batches(window.lengths, min(budget, -(-tokens // (rounds * workers)) + 1)))

    def tokenize(self, texts: Sequence[str], *, first_row: int = 0) -> Window:
        """Token ids of all texts, each tokenised once."""

        def chunks():
            for start in range(0, len(texts), TOKENIZE):
                chunk = texts[start : start + TOKENIZE]
                if self.prompt or self.lower_case:
                    chunk = [self._prepare(text) for text in chunk]
                yield self.tokenizer.encode_ids(chunk, self.max_length, first_row=first_row + start)

        return Window.of(chunks())

    def _prepare(self, text: Any) -> Any:
        if not isinstance(text, str):
            return text  # the tokenizer's error names the row
        text = self.prompt + text
        return text.lower() if self.lower_case else text

    @torch.inference_mode()
    def embed_packed(self, ids: np.ndarray, cu_seqlens: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
        """Embeddings of packed token ids: ids, positions int [tokens], cu_seqlens int32 [n + 1] -> float32 [n, dim]."""
        device = self.model.device
        longest = int(np.diff(cu_seqlens).max(initial=0))
        where = torch.from_numpy(cu_seqlens).to(device)
        hidden = self.model.forward_packed(
            torch.from_numpy(ids).to(device),
            where,
            longest,
            None if positions is None else torch.from_numpy(positions).to(device),
        )  # [tokens, dim]
        return ops.pool(hidden, where, self.pooling, self.normalize).float().cpu().numpy()


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
    return f"{device}{name}, {str(model.dtype).removeprefix('torch.')}, {runs}"


@contextmanager
def cpu_workers(threads: int) -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """Threads that share out torch's intra-op threads: (pool, how many). The caller's own number stays as it is."""
    workers = min(threads, MOST_WORKERS)

    def share_out() -> None:
        torch.get_num_threads()  # a thread's first look at the number would overwrite what is set before it
        torch.set_num_threads(threads // workers)
        ready.wait()

    ready = threading.Barrier(workers)
    pool = ThreadPoolExecutor(workers, initializer=share_out)
    try:
        # the barrier holds each worker in its start until all have started
        list(pool.map(lambda _: None, range(workers)))
        torch.set_num_threads(threads)  # set_num_threads also sets what threads made later start with
        yield pool, workers
    finally:
        pool.shutdown(cancel_futures=True)


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
