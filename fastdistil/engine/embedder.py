"""Embedder: texts in, one vector each out, with the checkpoint's own pooling, normalisation and maximum length."""

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastdistil import ops
from fastdistil._register import FORMS
from fastdistil.checkpoint import find
from fastdistil.engine.runner import Done, Engine, GraphCache, budget_for
from fastdistil.engine.scheduler import Window, cuts
from fastdistil.engine.sentence import SIMILARITIES, Normalize, read_settings
from fastdistil.engine.tokens import TextWindows, ahead, of_column
from fastdistil.model import DistilBertModel
from fastdistil.plain import to_eval
from fastdistil.pretrained import as_device, one_device
from fastdistil.tokenizer import DistilBertTokenizer

logger = logging.getLogger("fastdistil")


class Embedder:
    """Sentence embeddings from a DistilBERT or BERT encoder.

    model, tokenizer: loaded objects. pooling: "mean" or "cls". normalize: divide by the L2 norm. max_length: tokens
    with the special ones, at most the model's positions; longer texts are cut. prompt is put before every text, unless
    `encode` is given another or one of the named prompts; lower_case lowers it first. layers: what the pooled vectors
    go through, float32 [rows, dim] -> [rows, out], such as sentence-transformers' Dense. truncate_dim: so many of the
    numbers are kept (Matryoshka embeddings, Kusupati et al., 2022), before normalize divides. similarity_fn_name:
    cosine, dot, euclidean or manhattan, what `similarity` computes. Source: Sentence-BERT (Reimers and Gurevych, 2019).
    """

    # into which sentence-transformers' evaluators write their figures
    model_card_data = SimpleNamespace(set_evaluation_metrics=lambda *args, **kwargs: None)

    def __init__(
        self,
        model: DistilBertModel,
        tokenizer: DistilBertTokenizer,
        *,
        pooling: str = "mean",
        normalize: bool = False,
        max_length: int | None = None,
        prompt: str = "",
        prompts: Mapping[str, str] | None = None,
        lower_case: bool = False,
        layers: Iterable[nn.Module] = (),
        truncate_dim: int | None = None,
        similarity_fn_name: str = "cosine",
    ):
        if not isinstance(model, DistilBertModel) or not isinstance(tokenizer, DistilBertTokenizer):
            given = f"{type(model).__name__} and {type(tokenizer).__name__}"
            raise TypeError(f"an Embedder is made of a DistilBertModel and a DistilBertTokenizer, got {given}")
        positions = model.config.max_position_embeddings
        if pooling not in ops.POOLING:
            raise ValueError(f"pooling {pooling!r} is not one of {', '.join(ops.POOLING)}")
        if max_length is None:
            max_length = min(positions, tokenizer.model_max_length)
        max_length = _checked_length(max_length, positions)
        largest = max(tokenizer.get_vocab().values())
        if largest >= model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has ids up to {largest}, the model {model.config.vocab_size} embeddings: they do not "
                "belong together (or call model.resize_token_embeddings)"
            )
        if not isinstance(normalize, bool):
            raise TypeError(f"normalize must be true or false, got {normalize!r}")
        self.layers = nn.Sequential(*layers)
        self._dim = _out_features(self.layers, model.config.dim)
        if truncate_dim is not None:
            _check_dim(truncate_dim, self._dim)
        self.truncate_dim = truncate_dim
        self.model, self.tokenizer = model.eval(), tokenizer.lowered() if lower_case else tokenizer
        self.pooling, self.normalize, self.max_length = pooling, normalize, max_length
        self.prompts = dict(prompts or {})
        for text in (prompt, *self.prompts.values()):
            if not isinstance(text, str):
                raise TypeError(f"a prompt must be a string, got {text!r}")
        self.prompt, self.lower_case = prompt, lower_case
        if similarity_fn_name not in SIMILARITIES:
            raise ValueError(f"similarity_fn_name {similarity_fn_name!r} is not one of {', '.join(SIMILARITIES)}")
        self.similarity_fn_name = similarity_fn_name
        self._graphs = GraphCache()

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: Any,
        device: str | int | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        pooling: str | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        truncate_dim: int | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
    ) -> "Embedder":
        """From a directory or a hub id. What sentence-transformers' files say (modules.json, the pooling and sentence
        configurations, dense layers) holds unless given here; without them: mean pooling, no normalisation.

        prompt is put before every text; prompt_name is one of the checkpoint's own, by default its default one, if any.
        truncate_dim: as in sentence-transformers, vectors that the checkpoint normalises are cut after that, and
        have a norm of 1 again with normalize=True.

        revision, local_files_only, cache_dir and token are the hub's.
        device: by default cuda when there is one. dtype: "auto" is float32 on CPU and float16 on CUDA; "int8"
        is for CPU, see DistilBertModel.from_pretrained. Raises OSError for files, ValueError for what is in them.
        """
        directory = find(
            path_or_repo, revision=revision, local_files_only=local_files_only, cache_dir=cache_dir, token=token
        )
        settings = read_settings(directory)
        place = as_device(one_device("auto") if device is None else device)
        if dtype == "auto":
            dtype = torch.float32 if place.type == "cpu" else torch.float16
        given = {"pooling": pooling, "normalize": normalize, "max_length": max_length, "truncate_dim": truncate_dim}
        settings |= {k: v for k, v in given.items() if v is not None}
        layers = settings["layers"]
        if layers and isinstance(layers[-1], Normalize) and (normalize is not None or not settings.get("truncate_dim")):
            layers.pop()
            settings.setdefault("normalize", True)
        model = DistilBertModel.from_pretrained(directory, dtype=dtype, device=place)
        embedder = cls(model, DistilBertTokenizer.from_pretrained(directory), **settings)
        embedder.prompt = embedder._prompt(prompt, prompt_name)
        logger.info("%s", embedder.describe())
        return embedder

    @property
    def dim(self) -> int:
        return self._dim if self.truncate_dim is None else self.truncate_dim

    def describe(self) -> str:
        """Device, dtype and where the ops' code comes from, in words."""
        return describe(self.model)

    def encode(
        self,
        texts: str | Iterable[str],
        max_batch_tokens: int | None = None,
        show_progress: bool | None = None,
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        tokenizer_processes: int = 0,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        convert_to_tensor: bool = False,
        convert_to_numpy: bool = True,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        **others: Any,
    ) -> Any:
        """Embeddings of texts, a float32 array [len(texts), dim] in their order; of one string, [dim].

        max_batch_tokens: by default 2,048 on CPU and about 16,896 on CUDA. show_progress: texts/s and tokens/s on
        stderr; by default when that is a terminal. prompt, prompt_name: what is put before these texts, instead of the
        embedder's own. tokenizer_processes: how many more processes tokenise, for a GPU
        that waits for this one's threads. Memory beyond the output is bounded by the token budget and a look-ahead of
        65,536 texts. Equal texts are computed once. Raises TypeError or ValueError naming the text, MemoryError for a
        text that does not fit alone.

        The rest is sentence-transformers': batch_size means nothing here, show_progress_bar is show_progress,
        convert_to_tensor gives a tensor on the model's device, convert_to_numpy=False without it a list of tensors,
        truncate_dim keeps so many numbers, and normalize_embeddings then divides by the L2 norm. Its other keywords may
        be given if they ask for nothing.
        """
        _check_theirs(others, self.device)
        if batch_size is not None and (
            isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)) or batch_size < 1
        ):
            raise ValueError(f"batch_size is {batch_size!r}; it must be an integer of 1 or more")
        if truncate_dim is not None:
            _check_dim(truncate_dim, self.dim)
        show_progress = show_progress_bar if show_progress is None else show_progress
        if isinstance(texts, str):
            vectors = self._encode([texts], max_batch_tokens, False, prompt, prompt_name, tokenizer_processes)
        else:
            vectors = self._encode(texts, max_batch_tokens, show_progress, prompt, prompt_name, tokenizer_processes)
        if truncate_dim is not None:
            vectors = np.ascontiguousarray(vectors[:, :truncate_dim])
        if normalize_embeddings:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        found: Any = vectors
        if convert_to_tensor or not convert_to_numpy:
            found = torch.from_numpy(vectors).to(self.device)
            found = found if convert_to_tensor else list(found)
        return found[0] if isinstance(texts, str) else found

    def encode_query(self, texts: str | Iterable[str], max_batch_tokens: int | None = None, **options: Any) -> Any:
        """`encode` with the checkpoint's prompt for queries, unless another is given."""
        return self.encode(texts, max_batch_tokens, **self._with_prompt(("query",), options))

    def encode_document(self, texts: str | Iterable[str], max_batch_tokens: int | None = None, **options: Any) -> Any:
        """`encode` with the checkpoint's prompt for documents, unless another is given."""
        return self.encode(texts, max_batch_tokens, **self._with_prompt(("document", "passage", "corpus"), options))

    def _with_prompt(self, names: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
        if options.get("prompt") is not None or options.get("prompt_name") is not None:
            return options
        return options | {"prompt_name": next((name for name in names if name in self.prompts), None)}

    def similarity(self, one: Any, other: Any) -> Tensor:
        """Cosine similarity of every pair, or what the checkpoint says: float32 [n, m] of [n, dim] and [m, dim], arrays
        or tensors (or [dim] for one)."""
        a, b = (self._as_rows(vectors) for vectors in (one, other))
        if self.similarity_fn_name == "cosine":
            a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
        if self.similarity_fn_name in ("cosine", "dot"):
            return a @ b.T
        return -torch.cdist(a, b, p=1.0 if self.similarity_fn_name == "manhattan" else 2.0)

    @staticmethod
    def _as_rows(vectors: Any) -> Tensor:
        if isinstance(vectors, (list, tuple)):
            vectors = torch.stack([torch.as_tensor(vector) for vector in vectors])
        return torch.atleast_2d(torch.as_tensor(vectors)).float()

    def get_sentence_embedding_dimension(self) -> int:
        return self.dim

    @property
    def max_seq_length(self) -> int:
        return self.max_length

    @max_seq_length.setter
    def max_seq_length(self, most: int) -> None:
        self.max_length = _checked_length(most, self.model.config.max_position_embeddings)

    def get_max_seq_length(self) -> int:
        return self.max_length

    @property
    def device(self) -> torch.device:
        return self.model.device

    def _encode(
        self,
        texts: Iterable[str],
        max_batch_tokens: int | None,
        show_progress: bool | None,
        prompt: str | None,
        prompt_name: str | None,
        tokenizer_processes: int,
        errors: dict[int, str] | None = None,
    ) -> np.ndarray:
        """errors: gets what there is no memory for, by row; else that is an error of the call."""
        if isinstance(texts, (bytes, dict)) or not isinstance(texts, Iterable):
            raise TypeError(f"texts must be a string or an iterable of strings, got {type(texts).__name__}")
        if isinstance(dimensions := getattr(texts, "ndim", 1), (int, np.integer)) and dimensions != 1:
            raise TypeError(
                f"texts must be one column of strings, got {dimensions} dimensions in a {type(texts).__name__}"
            )
        if not isinstance(texts, (list, tuple)):  # an Arrow column and an array know how
            as_list = getattr(texts, "to_pylist", None) or getattr(texts, "tolist", None)
            texts = list(texts) if as_list is None else as_list()
        engine = self.engine(max_batch_tokens)
        source = self.text_windows(tokenizer_processes, self._prompt(prompt, prompt_name))
        try:
            windows = (source.window(texts[a:b], a) for a, b in cuts(len(texts)))
            return self._collect(engine, windows, len(texts), show_progress, errors)
        finally:
            source.close()

    def encode_tokens(
        self,
        input_ids: Any,
        cu_seqlens: Any = None,
        max_batch_tokens: int | None = None,
        show_progress: bool | None = None,
    ) -> np.ndarray:
        """Embeddings of texts that are token ids already, special tokens included: float32 [n, dim].

        input_ids: integers [tokens], one text after another. cu_seqlens: integers [n + 1], where each begins, from 0 to
        [tokens]; arrays or CPU tensors. Without cu_seqlens input_ids holds a list of integers a text: an Arrow column
        of lists, or arrays. Raises TypeError or ValueError naming the text.
        """
        given = of_column(input_ids) if cu_seqlens is None else (input_ids, cu_seqlens)
        ids, ends = (np.asarray(array) for array in given)
        if not ids.size:
            ids = ids.astype(np.int32)  # numpy's empty list is of floats
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
        """Raise ValueError naming the first text with an id outside the vocabulary, more tokens than max_length, or
        none."""
        if len(none := np.flatnonzero(lengths == 0)):
            raise ValueError(f"texts[{none[0]}] holds no token ids; an empty text has those of [CLS] and [SEP]")
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
            return budget_for(self.model.device, self.model.config.dim)  # not self.dim, which is a vector's
        whole = isinstance(max_batch_tokens, (int, np.integer)) and not isinstance(max_batch_tokens, bool)
        if not whole or max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens is {max_batch_tokens!r}; it must be an integer of 1 or more")
        return int(max_batch_tokens)

    def text_windows(self, processes: int = 0, prompt: str | None = None) -> TextWindows:
        prompt = self.prompt if prompt is None else prompt
        return TextWindows(self.tokenizer, self.max_length, prompt.__add__ if prompt else None, processes)

    def _prompt(self, prompt: str | None, name: str | None) -> str:
        """The prompt that is meant, the embedder's own by default."""
        if name is not None:
            if prompt is not None:
                raise ValueError("give prompt or prompt_name, not both")
            if name not in self.prompts:
                there = ", ".join(map(repr, self.prompts)) or "none"
                raise ValueError(f"there is no prompt {name!r}; the checkpoint has {there}")
            prompt = self.prompts[name]
        if prompt is not None and not isinstance(prompt, str):
            raise TypeError(f"a prompt must be a string, got {prompt!r}")
        prompt = self.prompt if prompt is None else prompt
        if prompt and any("\ud800" <= c <= "\udfff" for c in prompt):
            raise ValueError(f"the prompt {prompt!r} holds a lone surrogate, which is not text")
        return prompt

    def run(self, engine: Engine, windows: Iterable[Window]) -> Iterator[Done]:
        """Embeddings of windows, batch by batch: float32 [sequences, dim], one of equal texts."""
        key = None
        if engine.device.type != "cpu":  # where the model has the cores that the tokenizer would need
            windows = ahead(windows)
            if (state := self._graphs.state_of(self.model, self.layers)) is not None:
                key = state, *self.model.active_adapters, self.pooling, self.normalize, self.truncate_dim
        return engine.run(windows, self._compute, key=key, prepare=self.model.prepare)

    def engine(self, max_batch_tokens: int | None = None) -> Engine:
        for part in (self.model, self.layers.to(self.model.device)):
            to_eval(part)  # training, of adapters too, leaves the other mode on
        return Engine(self.model.device, self.budget(max_batch_tokens), self._graphs)

    def _collect(
        self,
        engine: Engine,
        windows: Iterable[Window],
        rows: int,
        show_progress: bool | None,
        errors: dict[int, str] | None = None,
    ) -> np.ndarray:
        out = np.empty((rows, self.dim), np.float32)
        seen = sys.stderr is not None and (is_terminal(sys.stderr) if show_progress is None else show_progress)
        shown = tqdm(total=rows, unit="text", unit_scale=True, file=sys.stderr) if seen else nullcontext()
        tokens = 0
        with shown as bar:
            for done in self.run(engine, windows):
                at, which = done.window.texts(done.rows)
                if done.error is not None:
                    if errors is None:
                        raise MemoryError(f"texts[{at[0]}]: {done.error}")
                    errors |= dict.fromkeys(at.tolist(), done.error)
                    out[at] = 0
                    continue
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

    @torch.inference_mode()
    def _compute(
        self, ids: Tensor, cu_seqlens: Tensor, longest: int, positions: Tensor, rows: np.ndarray, full: bool
    ) -> Tensor:
        longest, first = min(longest, self.model.config.max_position_embeddings), None
        if self.pooling == "cls" and len(ids):  # the last block answers for these rows alone; an empty text for any
            first = cu_seqlens[:-1].long().clamp(max=len(ids) - 1)
        hidden = self.model.forward_packed(ids, cu_seqlens, longest, positions, first, all_live=full)
        if first is not None:
            hidden = hidden.masked_fill((cu_seqlens.diff() == 0)[:, None], 0)
            cu_seqlens = torch.arange(len(cu_seqlens), dtype=torch.int32, device=ids.device)
        # hidden: [tokens, dim], or of the first tokens [batch, dim]
        if not len(self.layers) and self.truncate_dim is None:
            return ops.pool(hidden, cu_seqlens, self.pooling, self.normalize).float()  # [batch, dim]
        out = self.layers(ops.pool(hidden, cu_seqlens, self.pooling).float())[:, : self.truncate_dim]
        return F.normalize(out, dim=-1) if self.normalize else out


def _checked_length(most: Any, positions: int) -> int:
    if isinstance(most, bool) or not isinstance(most, int):
        raise TypeError(f"max_length must be an integer, got {most!r}")
    if not 2 < most <= positions:
        raise ValueError(f"max_length is {most}; it must be from 3 to the model's {positions} positions")
    return most


def _check_dim(truncate_dim: Any, dim: int) -> None:
    if isinstance(truncate_dim, bool) or not isinstance(truncate_dim, int):
        raise TypeError(f"truncate_dim must be an integer, got {truncate_dim!r}")
    if not 0 < truncate_dim <= dim:
        raise ValueError(f"truncate_dim is {truncate_dim}; it must be from 1 to {dim}")


def _check_theirs(given: dict[str, Any], device: torch.device) -> None:
    """Keywords of SentenceTransformer.encode that are not ours: TypeError for a name that it does not have, ValueError
    for what asks for something else than `encode` gives."""
    nothing = {"output_value": "sentence_embedding", "precision": "float32", "device": None, "pool": None}
    for name, value in given.items():
        if name not in (*nothing, "chunk_size"):
            raise TypeError(f"encode() has no argument {name!r}")
        same = (value is None and name != "output_value") or (name == "device" and _is_at(as_device(value), device))
        if name in nothing and value != nothing[name] and not same:
            raise ValueError(f"{name}={value!r} is not supported; leave it out")


def _is_at(asked: torch.device, device: torch.device) -> bool:
    return asked.type == device.type and asked.index in (None, device.index)


def _out_features(layers: nn.Sequential, dim: int) -> int:
    """The width of what layers make of [rows, dim]."""
    for layer in layers.modules():
        if isinstance(layer, nn.Linear):
            if layer.in_features != dim:
                raise ValueError(f"a dense layer takes {layer.in_features} numbers, and is given {dim}")
            dim = layer.out_features
    return dim


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
