"""Text in, dictionaries out: transformers' pipelines for the tasks DistilBERT has heads for.

A list of texts is tokenised once, packed into batches by token budget and answered in its own order; only the first
token, or the masked ones, go through the last block's feed-forward network where the task reads no others.
Source: transformers' pipelines, version 5 (question answering: version 4.57, which was the last to have it).
"""

import inspect
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Encoding, decoders
from torch import Tensor

from fastdistil.checkpoint import find, read_config
from fastdistil.engine.runner import Engine, Stages, budget_for
from fastdistil.engine.scheduler import Window, flatten
from fastdistil.flexible_heads import DistilBertModelWithHeads
from fastdistil.flexible_heads import model_class as class_named_in
from fastdistil.heads import (
    HEADS,
    DistilBertForMaskedLM,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    is_row_wise,
    score,
)
from fastdistil.model import DistilBertModel
from fastdistil.plain import to_eval
from fastdistil.pretrained import as_device, one_device
from fastdistil.tokenizer import DistilBertTokenizer

logger = logging.getLogger("fastdistil")


class BadInputs(ValueError):
    """Inputs that cannot be answered: what is wrong with each, by its row. The first is the error's own message."""

    def __init__(self, messages: dict[int, str]):
        super().__init__(messages[min(messages)])
        self.messages = messages


class Pipeline:
    """A model and its tokenizer for one task; call it with a text or a list of texts.

    max_batch_tokens: tokens that go through the model together, by default 2,048 on CPU and about 16,896 on CUDA.
    options: of `prepare`, for every call that does not give them. transformers' batch_size, num_workers and padding are
    taken and change nothing; its tokenizer_kwargs and tokenize_kwargs are options by another way.
    """

    kinds: tuple[str, ...] = ()  # of heads
    # inputs and options -> what computes their answers; it reads, checks and tokenises before the model is asked
    prepare: Callable[..., Callable[[], Any]]

    def __init__(self, model: Any, tokenizer: DistilBertTokenizer, max_batch_tokens: int | None = None, **options: Any):
        self.task = ""
        self.options = _ours(options)
        inspect.signature(self.prepare).bind_partial(**self.options)  # TypeError for what it does not take
        self.model, self.tokenizer = model.eval(), tokenizer
        self.encoder: DistilBertModel = model if isinstance(model, DistilBertModel) else model.distilbert
        if self.kinds:
            kind = None if isinstance(model, DistilBertModel) else model.task()[0]
            if kind not in self.kinds:
                raise ValueError(
                    f"{type(self).__name__} needs a {' or '.join(self.kinds)} head, {type(model).__name__} has {kind}"
                )
        if max_batch_tokens is not None:
            _check_count("max_batch_tokens", max_batch_tokens)
        self.max_batch_tokens = max_batch_tokens
        self.stages = Stages()  # where the time of all calls went

    def __call__(self, inputs: Any = None, *args: Any, **options: Any) -> Any:
        """The inputs' answers, with the pipeline's own options where the call gives none."""
        with self.stages.timed("tokenizer"):
            answers = self.ready(inputs, *args, **options)
        return answers()

    def ready(self, inputs: Any = None, *args: Any, **options: Any) -> Callable[[], Any]:
        """What computes a call's answers, once its inputs are token ids: in another thread while the model is busy."""
        to_eval(self.model)  # it may have been trained meanwhile
        return self.prepare(inputs, *args, **(self.options | _ours(options)))

    # looked up at every call, for the model may change: its place, its active head, its labels

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def kind(self) -> str:
        return self.model.task()[0] if self.kinds else ""

    @property
    def layers(self) -> list[torch.nn.Module]:
        return self.model.task()[1] if self.kinds else []

    @property
    def labels(self) -> dict[int, str]:
        labels = self.model.task()[2] if self.kinds else {}
        if labels.keys() != set(range(len(labels))):
            raise ValueError(f"the model's id2label names {sorted(labels)}; number its labels from 0 on")
        return {i: str(label) for i, label in labels.items()}

    def run(
        self,
        sequences: list[list[int]],
        only: list[list[int]] | None = None,
        finish: Callable[[Tensor], Tensor] = Tensor.float,
        owners: list[int] | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(row, logits [its tokens, out]) of each sequence, as batches are done; without a head, hidden states.

        only: the tokens to answer for. finish: what is made of logits [n, out] on the device, [n, ...]. Raises
        BadInputs, after all others, for rows whose logits are not finite. owners: which input each sequence is of."""
        limit = self.encoder.config.max_position_embeddings
        owner = range(len(sequences)) if owners is None else owners
        long = {
            row: f"inputs[{row}] is {len(one)} tokens long, the model has {limit} positions; pass truncation=True"
            for row, one in zip(owner, sequences, strict=True)
            if len(one) > limit
        }
        if long:
            raise BadInputs(long)
        device, layers = self.encoder.device, self.layers
        # a head of somebody's own may look along the text: it gets one at a time, whole
        along = bool(self.kinds) and not HEADS[self.kind].first and not is_row_wise(layers)
        window = Window.join([flatten(sequences)])
        sizes = window.lengths if only is None else np.array([len(places) for places in only])

        @torch.inference_mode()
        def compute(
            ids: Tensor, cu_seqlens: Tensor, longest: int, positions: Tensor, rows: np.ndarray, full: bool
        ) -> Tensor:
            lengths, chosen = window.lengths[rows].tolist(), None
            if only is not None and not along:
                starts = itertools.accumulate(lengths, initial=0)
                places = [start + i for start, row in zip(starts, rows, strict=False) for i in only[row]]
                chosen = _there(places, device)
            # -> [tokens or chosen, dim]
            x = self.encoder.forward_packed(ids, cu_seqlens, longest, positions, chosen, all_live=full)
            if not along:
                return finish(score(layers, x))
            pieces = [score(layers, one[None])[0] for one in x.split(lengths)]
            if only is not None:
                pieces = [piece[only[row]] for piece, row in zip(pieces, rows, strict=True)]
            return finish(torch.cat(pieces))

        wrong: dict[int, str] = {}
        for done in self._engine().run([window], compute, prepare=self.encoder.prepare):
            if done.error is not None:
                raise MemoryError(f"inputs[{owner[done.rows[0]]}]: {done.error}")
            if done.result is None:
                continue  # of no sequences
            result = done.result.numpy()
            whole = not self.kinds or _is_answer(result)
            ends = np.cumsum(sizes[done.rows]).tolist()
            for row, (start, end) in zip(done.rows.tolist(), itertools.pairwise([0, *ends]), strict=True):
                one = result[start:end]
                if whole or _is_answer(one):
                    yield row, one
                else:
                    what = "the model's answer is not finite; its weights, or its dtype, may be why"
                    wrong[owner[row]] = f"inputs[{owner[row]}]: {what}"
        if wrong:
            raise BadInputs(wrong)

    def _engine(self) -> Engine:
        device = self.encoder.device
        budget = self.max_batch_tokens or budget_for(device, self.encoder.config.dim)
        return Engine(device, budget, stages=self.stages)

    def tokenize(self, texts: Sequence[Any], truncation: bool | None, max_length: int | None) -> list[list[int]]:
        """The ids of texts, or of dictionaries of text and text_pair. They are cut to max_length, by default the most
        there is room for, with truncation, which max_length alone implies."""
        for row, text in enumerate(texts):
            if not (isinstance(text, str) or (isinstance(text, dict) and {"text"} <= text.keys() <= _PAIR)):
                raise TypeError(
                    f"inputs[{row}] must be a string, or a dictionary of text and text_pair, got {text!r:.80}"
                )
        truncation = max_length is not None if truncation is None else truncation
        max_length = self._limit() if max_length is None else max_length
        found: list[list[int]] = [[]] * len(texts)
        both = [_pair_of(text) for text in texts]
        for paired in (False, True):
            rows = [row for row, (_, second) in enumerate(both) if (second is not None) is paired]
            if paired and rows:
                self._check_two_segments()
            if not rows:
                continue
            firsts, seconds = map(list, zip(*(both[row] for row in rows), strict=True))
            try:
                if isinstance(truncation, bool) and not paired:
                    ids = self.tokenizer.encode_ids(firsts, max_length if truncation else None)
                else:  # also by transformers' names for ways to cut a pair
                    how: Any = {"truncation": truncation, "max_length": max_length}
                    ids = self.tokenizer(firsts, seconds if paired else None, **how)["input_ids"]
            except (ValueError, TypeError) as error:
                raise type(error)(_with_rows(str(error), rows)) from error
            for row, one in zip(rows, ids, strict=True):
                found[row] = one
        return found

    def _encodings(self, texts: list[str], **options: Any) -> list[Encoding]:
        try:
            return list(self.tokenizer(texts, **options).encodings)
        except (ValueError, TypeError) as error:
            raise type(error)(_with_rows(str(error), range(len(texts)))) from error

    def _check_two_segments(self) -> None:
        if getattr(self.encoder.config, "token_types_folded", False):
            raise ValueError(
                "a BERT checkpoint is converted for one segment, and a pair of texts has two; load it with "
                "transformers, make it fast with fastdistil.accelerate, and use transformers' own pipeline"
            )

    def _limit(self) -> int:
        """The most tokens of a text."""
        return min(self.tokenizer.model_max_length, self.encoder.config.max_position_embeddings)


_PAIR = {"text", "text_pair"}


def _pair_of(text: Any) -> tuple[Any, Any]:
    """A text, or a dictionary of text and text_pair or of both as text -> (the first, the second or None)"""
    if isinstance(text, str):
        return text, None
    first, second = text["text"], text.get("text_pair") or None
    if second is None and isinstance(first, (list, tuple)) and len(first) == 2:
        first, second = first
    return first, second


def _there(values: list[int], device: torch.device) -> Tensor:
    """int64 on the device, without waiting for what it has still to do."""
    here = torch.tensor(values, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return here.to(device, non_blocking=True)


def _with_rows(message: str, rows: Sequence[int]) -> str:
    """A tokenizer's message about text[i] as one about inputs[rows[i]]."""
    return re.sub(r"\btext(s|_pair)?\[(\d+)\]", lambda m: f"inputs[{rows[int(m[2])]}]", message, count=1)


def _surrogate(texts: Sequence[Sequence[str]]) -> str:
    """Where a lone surrogate is among lists of words."""
    for row, words in enumerate(texts):
        for i, word in enumerate(words):
            if any("\ud800" <= c <= "\udfff" for c in word):
                return f"inputs[{row}][{i}] {word!r}"
    return "which could not be found"


def _is_answer(logits: np.ndarray) -> bool:
    """Whether something can be read off: a label may be forbidden by -inf, but not all of a token's."""
    if np.isfinite(logits).all():
        return True
    bad = np.isnan(logits).any() or (logits == np.inf).any() or (logits == -np.inf).all(-1).any()
    return not bool(bad)


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} parameter should be >= 1 (got {value})")


def _ours(options: dict[str, Any]) -> dict[str, Any]:
    """transformers' options as `prepare` has them."""
    given: dict[str, Any] = {}
    for name in ("tokenizer_kwargs", "tokenize_kwargs"):
        inner = options.get(name) or {}
        if not isinstance(inner, dict):
            raise TypeError(f"{name} must be a dictionary, got {inner!r}")
        given |= inner
    skipped = {"batch_size", "num_workers", "padding", "tokenizer_kwargs", "tokenize_kwargs"}
    return {name: value for name, value in (given | options).items() if name not in skipped}


def _as_list(inputs: Any) -> tuple[list[Any], bool]:
    """-> (a list of inputs, whether it was a single one)"""
    if isinstance(inputs, (str, dict)):
        return [inputs], True
    if hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__") and not hasattr(inputs, "__iter__"):
        return [inputs[i] for i in range(len(inputs))], False  # a torch Dataset
    if isinstance(inputs, bytes) or not isinstance(inputs, Iterable):
        raise TypeError(f"inputs must be a text or a list of texts, got {type(inputs).__name__}")
    return list(inputs), False


class FillMaskPipeline(Pipeline):
    """The likeliest words for each [MASK].

    Of one text with one mask a list of {score, token, token_str, sequence}, likeliest first; with several masks a list
    of such lists; of a list of texts a list of these (of a list of one, its only member). top_k: how many. targets:
    only these words; their scores are not made to sum to 1. truncation, max_length: as the tokenizer's.
    """

    kinds = ("masked_lm",)

    def prepare(
        self,
        inputs: str | Iterable[str],
        top_k: int | None = 5,
        targets: str | list[str] | None = None,
        truncation: bool | None = None,
        max_length: int | None = None,
    ) -> Callable[[], Any]:
        texts, single = _as_list(inputs)
        size = self.model.get_output_embeddings().out_features
        top_k = 5 if top_k is None else top_k
        if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= size:
            raise ValueError(f"top_k is {top_k!r}; it must be from 1 to the vocabulary's {size}")
        wanted = None if targets is None else self._targets([targets] if isinstance(targets, str) else targets)
        chosen = None if wanted is None else _there(wanted, self.model.device)
        mask = self.tokenizer.mask_token_id
        rows = self.tokenize(texts, truncation, max_length)
        places = [[i for i, token in enumerate(ids) if token == mask] for ids in rows]
        none = [row for row, found in enumerate(places) if not found]
        if none:
            missing = f"No mask_token ({self.tokenizer.mask_token}) found on the input"
            raise BadInputs({row: f"inputs[{row}]: {missing}" for row in none})

        def best_of(logits: Tensor) -> Tensor:
            """Scores and tokens, [n, 2 * top_k]: on the device, for logits are as wide as the vocabulary."""
            probabilities = logits.float().softmax(-1)
            if chosen is not None:
                probabilities = probabilities[:, chosen]
            values, tokens = probabilities.topk(min(top_k, probabilities.shape[1]))
            # a float32 holds every token's number: vocabularies end at 2**24
            return torch.cat([values, (tokens if chosen is None else chosen[tokens]).float()], 1)

        def answers() -> Any:
            out: list[Any] = [None] * len(rows)
            for row, both in self.run(rows, places, best_of):
                values, tokens = np.split(both, 2, axis=1)
                best = zip(places[row], values.tolist(), tokens.astype(np.int64).tolist(), strict=True)
                filled = [self._filled(rows[row], *one) for one in best]
                out[row] = filled[0] if len(filled) == 1 else filled
            return out[0] if single or len(out) == 1 else out

        return answers

    def _filled(self, ids: list[int], place: int, scores: list[float], tokens: list[int]) -> list[dict[str, Any]]:
        alone = ids.count(self.tokenizer.mask_token_id) == 1
        results = []
        for value, token in zip(scores, tokens, strict=True):
            filled = [*ids[:place], token, *ids[place + 1 :]]
            left_out = {*self.tokenizer.all_special_ids} if alone else {self.tokenizer.pad_token_id}
            results.append(
                {
                    "score": value,
                    "token": token,
                    "token_str": self._text([token]),
                    "sequence": self._text([i for i in filled if i not in left_out]),
                }
            )
        return results

    def _text(self, ids: list[int]) -> str:
        text = _joined([str(token) for token in self.tokenizer.convert_ids_to_tokens(ids)])  # type: ignore[union-attr]
        return self.tokenizer.cleaned(text) if self.tokenizer.says_to_clean_up else text

    def _targets(self, targets: list[str]) -> list[int]:
        vocabulary, ids = self.tokenizer.get_vocab(), []
        for target in targets:
            if not isinstance(target, str):
                raise TypeError(f"targets must be words, got {target!r}")
            if target in vocabulary:
                ids.append(vocabulary[target])
                continue
            pieces = self.tokenizer(target, add_special_tokens=False)["input_ids"]
            if not pieces:
                logger.warning("The target %r is not in the vocabulary and is left out", target)
                continue
            instead = self.tokenizer.convert_ids_to_tokens(pieces[0])
            logger.warning("The target %r is not in the vocabulary; %r is scored instead", target, instead)
            ids.append(pieces[0])
        if not ids:
            raise ValueError("At least one target must be provided when passed.")
        return sorted(set(ids))


class FeatureExtractionPipeline(Pipeline):
    """The last hidden states: nested lists [1][length][dim] of a text, or with return_tensors tensors [1, length, dim];
    of a list of texts a list of these."""

    def prepare(
        self,
        inputs: str | Iterable[str],
        return_tensors: bool = False,
        truncation: bool | None = None,
        max_length: int | None = None,
    ) -> Callable[[], Any]:
        texts, single = _as_list(inputs)
        rows = self.tokenize(texts, truncation, max_length)

        def answers() -> Any:
            out: list[Any] = [None] * len(rows)
            for row, hidden in self.run(rows):
                # a copy: a view would hold the page-locked memory of a whole batch
                out[row] = torch.tensor(hidden)[None] if return_tensors else hidden[None].tolist()
            return out[0] if single else out

        return answers


class TextClassificationPipeline(Pipeline):
    """The label of a text, or of a pair {text, text_pair}.

    A text gives [{label, score}], a pair {label, score}, a list a list of {label, score}. With top_k (None: all labels)
    each gives a list of its likeliest. function_to_apply: softmax, sigmoid or none; by default none for a regression,
    sigmoid for multi-label classification and for a single label, else softmax.
    """

    kinds = ("classification", "multilabel_classification")

    def ready(self, inputs: Any = None, *args: Any, **options: Any) -> Callable[[], Any]:
        answers = super().ready(inputs, *args, **options)
        # transformers wraps one text's answer, unless the call itself names top_k
        of_pipeline = "top_k" in self.options and not args and "top_k" not in options
        if of_pipeline and isinstance(inputs, str) and self.options["top_k"] != "":
            return lambda: [answers()]
        return answers

    def prepare(
        self,
        inputs: Any,
        top_k: int | str | None = "",
        function_to_apply: str | None = None,
        truncation: bool | None = None,
        max_length: int | None = None,
    ) -> Callable[[], Any]:
        texts, single = _as_list(inputs)
        best_only = top_k == ""
        if not best_only and top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"top_k is {top_k!r}; it must be 1 or more, or None for every label")
        apply, labels = self._function(function_to_apply), self.labels
        rows = self.tokenize(texts, truncation, max_length)

        def answers() -> Any:
            out: list[Any] = [None] * len(rows)
            answered = list(self.run(rows, [[0]] * len(rows)))
            scores = apply(np.concatenate([logits for _, logits in answered])).tolist() if answered else []
            most: Any = 1 if best_only else top_k
            for (row, _), values in zip(answered, scores, strict=True):  # of each label
                likeliest = sorted(range(len(values)), key=values.__getitem__, reverse=True)[:most]
                found = [{"label": labels[i], "score": values[i]} for i in likeliest]
                out[row] = found[0] if best_only else found
            if not single:
                return out
            return out if best_only and isinstance(inputs, str) else out[0]

        return answers

    def _function(self, name: str | None) -> Callable[[np.ndarray], np.ndarray]:
        if name is None:
            problem = getattr(self.model.config, "problem_type", None)
            if isinstance(self.model, DistilBertModelWithHeads):
                problem = self.model.heads_config[str(self.model.active_head)].get("problem_type")
            if self.kind == "multilabel_classification":
                name = "sigmoid"
            elif problem == "regression":
                name = "none"
            elif problem == "multi_label_classification":
                name = "sigmoid"
            else:
                name = "sigmoid" if len(self.labels) == 1 else "softmax"
        name = getattr(name, "value", name)  # transformers' ClassificationFunction
        functions = {"softmax": _softmax, "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "none": lambda x: x}
        if str(name).lower() not in functions:
            raise ValueError(f"function_to_apply {name!r} is not one of {', '.join(functions)}")
        return functions[str(name).lower()]


def _softmax(x: np.ndarray) -> np.ndarray:
    shifted = np.exp(x - x.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


class TokenClassificationPipeline(Pipeline):
    """Labels of tokens, or of the words and names they form.

    aggregation_strategy: "none" gives {entity, score, index, word, start, end} of each token; the others {entity_group,
    score, word, start, end} of neighbours of one label, where B- begins anew: "simple" takes every token's own label,
    "first", "average" and "max" one label a word, its first token's, that of the mean scores, or its surest token's.
    ignore_labels are left out. stride: tokens that two windows of a longer text share; without it a text is cut.
    is_split_into_words: each input is a list of words; start and end are places in the words joined by `delimiter`.
    """

    kinds = ("tagging",)
    strategies = ("none", "simple", "first", "average", "max")

    def prepare(
        self,
        inputs: str | Iterable[str],
        aggregation_strategy: Any = "none",
        ignore_labels: Sequence[str] | None = ("O",),
        stride: int | None = None,
        is_split_into_words: bool = False,
        delimiter: str = " ",
    ) -> Callable[[], Any]:
        texts, single = _as_list(inputs)
        if is_split_into_words and texts and all(isinstance(word, str) for word in texts):
            texts = [texts]
        # None is the usual one, and transformers' AggregationStrategy has values
        aggregation_strategy = str(getattr(aggregation_strategy, "value", aggregation_strategy or "none")).lower()
        if aggregation_strategy not in self.strategies:
            raise ValueError(
                f"aggregation_strategy {aggregation_strategy!r} is not one of {', '.join(self.strategies)}"
            )
        for row, text in enumerate(texts):
            words = text if is_split_into_words and isinstance(text, (list, tuple)) else [text]
            if (is_split_into_words and words is not text) or not all(isinstance(word, str) for word in words):
                wanted = "a list of words" if is_split_into_words else "a string"
                raise TypeError(f"inputs[{row}] must be {wanted}, got {text!r:.80}")
        limit, unknown, ignored = self._limit(), self.tokenizer.unk_token_id, {"O"}
        ignored = ignored if ignore_labels is None else set(ignore_labels)
        kinds = {i: _Kind.of(label, ignored) for i, label in self.labels.items()}
        starts: list[list[int] | None] = [None] * len(texts)  # of words, where they are given
        windows: list[tuple[int, Encoding]] = []
        if stride is not None and aggregation_strategy == "none":
            raise ValueError("stride needs an aggregation_strategy other than none, for windows overlap")
        if is_split_into_words:
            try:
                plain = self.tokenizer.backend.encode_batch(texts, is_pretokenized=True, add_special_tokens=False)
            except TypeError as error:
                raise ValueError(f"one of the inputs holds a word that is not text, {_surrogate(texts)}") from error
            for row, words in enumerate(texts):
                lengths = [len(word) + len(delimiter) for word in words]
                starts[row], texts[row] = [0, *itertools.accumulate(lengths)], delimiter.join(words)
                windows += [(row, window) for window in cut(self.tokenizer, plain[row], None, limit, stride or 0, row)]
            if stride is None:  # the first window of each
                windows = [window for i, window in enumerate(windows) if i == 0 or windows[i - 1][0] != window[0]]
        elif stride is None:
            windows = list(enumerate(self._encodings(texts, truncation=True, max_length=limit)))
        else:
            plain = self._encodings(texts, add_special_tokens=False)
            for row, encoding in enumerate(plain):
                windows += [(row, window) for window in cut(self.tokenizer, encoding, None, limit, stride, row)]

        def answers() -> Any:
            found: list[list[list[dict[str, Any]]]] = [[] for _ in texts]
            parts: list[list[dict[str, Any]]] = [[] for _ in windows]
            for i, logits in self.run([encoding.ids for _, encoding in windows], owners=[row for row, _ in windows]):
                row, encoding = windows[i]
                tokens = _tokens(texts[row], encoding, unknown, starts[row])
                parts[i] = self._entities(tokens, _softmax(logits)[tokens[0]], aggregation_strategy, kinds)
            for (row, _), part in zip(windows, parts, strict=True):
                found[row].append(part)
            out = [part[0] if len(part) == 1 else _without_overlaps([e for p in part for e in p]) for part in found]
            return out[0] if single else out

        return answers

    @staticmethod
    def _words(scores: np.ndarray, units: list[tuple[int, int]], strategy: str) -> np.ndarray:
        """The scores of tokens [tokens, labels] -> those of the words that they form, [words, labels]"""
        found = scores[[first for first, _ in units]]
        for i, (first, end) in enumerate(units):
            of_tokens = scores[first:end]
            if strategy == "max":
                found[i] = of_tokens[of_tokens.max(-1).argmax()]
            elif strategy == "average" and end - first > 1:
                found[i] = of_tokens.sum(0) / np.float32(end - first)
        return found

    def _entities(
        self,
        tokens: tuple[list[int], list[str], list[tuple[int, int]]],
        scores: np.ndarray,
        strategy: str,
        kinds: dict[int, "_Kind"],
    ) -> list[dict[str, Any]]:
        """tokens: see `_tokens`. scores: [tokens, labels]. What is ignored, as most tokens are, is not made."""
        index, words, spans = tokens
        units = [(i, i + 1) for i in range(len(words))]
        whole = strategy not in ("none", "simple")
        if whole and words:  # a token that goes on with a word has "##" in front, which is not in the text
            goes_on = [len(word) != end - start for word, (start, end) in zip(words, spans, strict=True)]
            begins = [i for i, inside in enumerate(goes_on) if not (i and inside)]
            units = list(itertools.pairwise([*begins, len(words)]))
            scores = self._words(scores, units, strategy)
        best, values = scores.argmax(-1).tolist(), scores.max(-1)
        if strategy == "none":
            return [
                {
                    "entity": kinds[label].label,
                    "score": values[i],
                    "index": index[i],
                    "word": words[i],
                    "start": spans[i][0],
                    "end": spans[i][1],
                }
                for i, label in enumerate(best)
                if not kinds[label].ignored
            ]
        entities, first = [], 0
        for i, label in enumerate(best):
            kind, after = kinds[label], kinds[best[i + 1]] if i + 1 < len(best) else None
            if after is not None and not after.begins and after.tag == kind.tag:
                continue
            group, (opens, first) = units[first : i + 1], (first, i + 1)
            if kinds[best[opens]].group_ignored:
                continue
            texts = [_joined(words[a:b]) for a, b in group] if whole else words[opens:first]
            entities.append(
                {
                    "entity_group": kinds[best[opens]].group,
                    "score": values[opens:first].sum() / np.float32(first - opens),
                    "word": _joined(texts),
                    "start": spans[group[0][0]][0],
                    "end": spans[group[-1][1] - 1][1],
                }
            )
        return entities


class _Kind(NamedTuple):
    """What a label says of a token."""

    label: str
    begins: bool  # a name
    tag: str  # the name's kind
    group: str
    ignored: bool
    group_ignored: bool

    @classmethod
    def of(cls, label: str, ignored: set[str]) -> "_Kind":
        group, tag = label.split("-", 1)[-1], label[2:] if label.startswith(("B-", "I-")) else label
        return cls(label, label.startswith("B-"), tag, group, label in ignored, group in ignored)


def _tokens(
    text: str, encoding: Encoding, unknown: int | None, starts: list[int] | None
) -> tuple[list[int], list[str], list[tuple[int, int]]]:
    """The tokens that are not special: (places among all, what they are written as, characters from and to). starts: of
    the text's words, where they are given."""
    ids, tokens, spans = encoding.ids, encoding.tokens, encoding.offsets
    if starts is not None:  # offsets are within the word
        at = [0 if word is None else starts[word] for word in encoding.word_ids]
        spans = [(a + first, b + first) for (a, b), first in zip(spans, at, strict=True)]
    if unknown in ids:
        found = zip(ids, tokens, spans, strict=True)
        tokens = [text[a:b] if i == unknown else token for i, token, (a, b) in found]
    index = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
    return index, [tokens[i] for i in index], [spans[i] for i in index]


_WORDPIECE = decoders.WordPiece(prefix="##")


def _joined(tokens: list[str]) -> str:
    return _WORDPIECE.decode(tokens)


def _without_overlaps(entities: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of entities that overlap, the longest, and of equally long ones the surest."""
    kept: list[dict[str, Any]] = []
    for entity in sorted(entities, key=lambda e: e["start"]):
        if kept and kept[-1]["start"] <= entity["start"] < kept[-1]["end"]:
            kept[-1] = max(kept[-1], entity, key=lambda e: (e["end"] - e["start"], e["score"]))
        else:
            kept.append(entity)
    return kept


def cut(
    tokenizer: DistilBertTokenizer, text: Encoding, question: Encoding | None, most: int, stride: int, row: int
) -> list[Encoding]:
    """Windows of a text's tokens that share `stride` of them, each behind the question, with special tokens, at most
    `most` tokens long."""
    backend = tokenizer._tokenizer
    room = most - backend.num_special_tokens_to_add(question is not None) - (len(question) if question else 0)
    if len(text) > room:
        if not 0 <= stride < room:
            what = f" beside a question of {len(question)}" if question else ""
            raise ValueError(
                f"inputs[{row}]: windows of {most} tokens hold {room} of the text{what}, too few to share {stride}"
            )
        text.truncate(room, stride=stride)
    windows = [text, *text.overflowing]
    return [
        backend.post_process(window, None, True) if question is None else backend.post_process(question, window, True)
        for window in windows
    ]


class QuestionAnsweringPipeline(Pipeline):
    """Where a text answers a question: {score, start, end, answer}, with characters start to end of the context.

    question, context: strings or lists of them (or a dictionary, or a list of such, with these keys). A list gives a
    list. top_k above 1 gives lists, likeliest first, shorter where there are not so many answers, and a single answer
    alone. A long context is cut into windows of max_seq_len tokens (by default 384, question included) that share
    doc_stride tokens (128, or half a window); the same answer found twice has its scores added. max_answer_len: in
    tokens. handle_impossible_answer: "" is an answer, too. align_to_words: answers are whole words. max_question_len
    and padding change nothing, as with transformers' fast tokenizers.
    """

    kinds = ("question_answering",)

    def prepare(
        self,
        inputs: Any = None,
        *,
        question: str | Sequence[str] | None = None,
        context: str | Sequence[str] | None = None,
        top_k: int = 1,
        doc_stride: int | None = None,
        max_answer_len: int = 15,
        max_seq_len: int | None = None,
        handle_impossible_answer: bool = False,
        align_to_words: bool = True,
        max_question_len: int = 64,
        padding: bool | str = "do_not_pad",
    ) -> Callable[[], Any]:
        self._check_two_segments()
        samples = _samples(inputs, question, context)
        for name, number in (("top_k", top_k), ("max_answer_len", max_answer_len)):
            _check_count(name, number)
        if max_seq_len is not None:
            _check_count("max_seq_len", max_seq_len)
        most = min(self.tokenizer.model_max_length, 384) if max_seq_len is None else max_seq_len
        most = min(most, self.encoder.config.max_position_embeddings)
        stride = min(most // 2, 128) if doc_stride is None else doc_stride
        if stride > most:
            raise ValueError(f"`doc_stride` ({stride}) is larger than `max_seq_len` ({most})")
        questions, contexts = ([sample[k] for sample in samples] for k in ("question", "context"))
        asked = self._encodings(questions, add_special_tokens=False)
        told = self._encodings(contexts, add_special_tokens=False)
        windows: list[tuple[int, Encoding]] = []
        bad: dict[int, str] = {}
        for row in range(len(samples)):
            try:
                windows += [(row, window) for window in cut(self.tokenizer, told[row], asked[row], most, stride, row)]
            except ValueError as error:
                bad[row] = str(error)
        if bad:
            raise BadInputs(bad)

        def answers() -> Any:
            candidates = 2 * top_k + 10 if align_to_words else top_k  # aligning makes some the same
            spans: list[Any] = [None] * len(windows)
            for i, both in self.run([window.ids for _, window in windows], owners=[row for row, _ in windows]):
                spans[i] = self._spans(windows[i][1], both, candidates, max_answer_len)
            by_words: list[dict[str, dict[str, Any]]] = [{} for _ in samples]  # in lower case
            nulls: list[float] = [1e6] * len(samples)  # above any probability
            for (row, window), (null, likeliest) in zip(windows, spans, strict=True):
                nulls[row] = min(nulls[row], null)
                for value, first, last in likeliest:
                    start, end = self._characters(window, first, last, align_to_words)
                    text = contexts[row][start:end]
                    if (same := by_words[row].get(text.lower())) is not None:
                        same["score"] += value
                    else:
                        by_words[row][text.lower()] = {"score": value, "start": start, "end": end, "answer": text}
            out: list[Any] = []
            for row, told in enumerate(by_words):
                found = list(told.values())
                if handle_impossible_answer:
                    found.append({"score": nulls[row], "start": 0, "end": 0, "answer": ""})
                if not found:  # nothing but spaces
                    found.append({"score": 0.0, "start": 0, "end": 0, "answer": ""})
                found = sorted(found, key=lambda answer: answer["score"], reverse=True)[:top_k]
                out.append(found[0] if len(found) == 1 else found)
            return out[0] if len(out) == 1 else out

        return answers

    def _spans(
        self, window: Encoding, logits: np.ndarray, candidates: int, longest: int
    ) -> tuple[float, list[tuple[float, int, int]]]:
        """-> (the probability of no answer, the likeliest (probability, first token, last token))"""
        cls = np.array(window.ids) == self.tokenizer.cls_token_id
        allowed = (np.array([i == 1 for i in window.sequence_ids])) | cls
        start, end = _softmax(np.where(allowed, np.ascontiguousarray(logits.T), np.float32(-10000)))
        null = float(start[0] * end[0])
        start[0] = end[0] = 0.0
        # [tokens, longest]: from each as many tokens on, behind the last of them nothing
        longest = min(longest, len(end))
        ends = np.concatenate([end, np.zeros(longest - 1, end.dtype)])
        scores = start[:, None] * np.lib.stride_tricks.sliding_window_view(ends, longest)
        at = np.flatnonzero(scores)
        if len(at) > candidates:  # a partition of many that are equal would take long
            values = scores.flat[at]
            at = at[values >= np.partition(values, -candidates)[-candidates]]
        at = at[np.argsort(-scores.flat[at], kind="stable")][:candidates]
        spans = [(i, i + more) for i, more in zip(*(np.unravel_index(at, scores.shape)), strict=True)]
        # among pairs of no probability, in their order, the first token's come first, and are no answers
        if (left := candidates - len(at)) > len(start):
            zeros = np.tril(np.triu(np.outer(start, end)), longest - 1) == 0
            some = np.flatnonzero(zeros)[:left]
            spans += [(i, j) for i, j in zip(*np.unravel_index(some, zeros.shape), strict=True) if i <= j < i + longest]
        return null, [
            (float(start[i] * end[j]), int(i), int(j)) for i, j in spans if i > 0 and allowed[i] and allowed[j]
        ]

    @staticmethod
    def _characters(window: Encoding, first: int, last: int, align: bool) -> tuple[int, int]:
        if align:
            words = window.token_to_word(first), window.token_to_word(last)
            spans = [None if word is None else window.word_to_chars(word, 1) for word in words]
            if spans[0] is not None and spans[1] is not None:
                return spans[0][0], spans[1][1]
        return window.offsets[first][0], window.offsets[last][1]


def _samples(inputs: Any, question: Any, context: Any) -> list[dict[str, str]]:
    if inputs is not None:
        samples = _as_list(inputs)[0]
    elif question is None or context is None:
        raise ValueError("a question and a context are needed: pipeline(question=..., context=...)")
    else:
        questions = [question] if isinstance(question, str) else list(question)
        contexts = [context] * len(questions) if isinstance(context, str) else list(context)
        if len(questions) != len(contexts):
            raise ValueError(f"{len(questions)} questions, but {len(contexts)} contexts")
        samples = [{"question": q, "context": c} for q, c in zip(questions, contexts, strict=True)]
    bad: dict[int, str] = {}
    for row, sample in enumerate(samples):
        if not isinstance(sample, dict):
            if bad:  # whose turn is first
                break
            raise TypeError(f"inputs[{row}] must be a dictionary of question and context, got {type(sample).__name__}")
        for name in ("question", "context"):
            if not isinstance(sample.get(name), str):
                bad.setdefault(row, f"inputs[{row}]: `{name}` must be a string, got {sample.get(name)!r:.80}")
            elif not sample[name]:
                bad.setdefault(row, f"inputs[{row}]: `{name}` cannot be empty")
    if bad:
        raise BadInputs(bad)
    return samples


TASKS: dict[str, tuple[type[Pipeline], type]] = {
    "fill-mask": (FillMaskPipeline, DistilBertForMaskedLM),
    "feature-extraction": (FeatureExtractionPipeline, DistilBertModel),
    "text-classification": (TextClassificationPipeline, DistilBertForSequenceClassification),
    "token-classification": (TokenClassificationPipeline, DistilBertForTokenClassification),
    "question-answering": (QuestionAnsweringPipeline, DistilBertForQuestionAnswering),
}
# heads whose last layer has one name, so that one's would load into another
ONE_CLASSIFIER = {"ForSequenceClassification", "ForTokenClassification", "ForMultipleChoice"}
ALIASES = {"sentiment-analysis": "text-classification", "ner": "token-classification"}


def pipeline(
    task: str,
    model: Any,
    tokenizer: Any = None,
    *,
    device: str | int | torch.device | None = None,
    device_map: Any = None,
    dtype: str | torch.dtype | None = None,
    torch_dtype: str | torch.dtype | None = None,
    max_batch_tokens: int | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    config: Any = None,
    model_kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A pipeline for a task: fill-mask, feature-extraction, text-classification (sentiment-analysis),
    token-classification (ner) or question-answering.

    model: a directory, a hub id or a loaded model, with flexible heads the active one; tokenizer: likewise, by default
    the model's directory, or (directory, its loader's keywords). config, model_kwargs: of the model's loader. device
    (or device_map): by default cuda when there is one; numbers as transformers has them.
    dtype (or torch_dtype): "auto" is float32 on CPU and float16 on CUDA; "int8" is for CPU. A loaded model stays where
    and as it is. revision, local_files_only, cache_dir and token are the hub's. options: top_k and the like, for every
    call; transformers' framework, use_fast, trust_remote_code and feature_extractor change nothing. Raises OSError for
    files, ValueError for what is in them.
    """
    for name in ("framework", "use_fast", "trust_remote_code", "feature_extractor", "image_processor", "processor"):
        options.pop(name, None)
    more = dict(model_kwargs or {})
    dtype, torch_dtype = more.pop("dtype", dtype), more.pop("torch_dtype", torch_dtype)
    task = ALIASES.get(task, task)
    if task not in TASKS:
        raise ValueError(f"task {task!r} is not one of {', '.join([*TASKS, *ALIASES])}")
    kind, model_class = TASKS[task]
    loaded = isinstance(model, torch.nn.Module)
    if loaded and not isinstance(model, (DistilBertModel, DistilBertModelWithHeads)) and not hasattr(model, "task"):
        raise TypeError(f"the model must be one of fastdistil's, got {type(model).__name__}")
    if loaded and tokenizer is None:
        raise ValueError("a loaded model comes without a tokenizer; pass tokenizer=")
    hub: dict[str, Any] = dict(revision=revision, local_files_only=local_files_only, cache_dir=cache_dir, token=token)
    if not loaded:
        directory = find(model, **hub)
        if device is None:
            device = one_device("auto" if device_map is None else device_map)
        place = as_device(device)
        dtype = dtype or torch_dtype or "auto"
        if dtype == "auto":
            dtype = torch.float32 if place.type == "cpu" else torch.float16
        if kind.kinds and class_named_in(read_config(directory)) is DistilBertModelWithHeads:
            model_class = DistilBertModelWithHeads
        model, report = model_class.from_pretrained(  # type: ignore[attr-defined]
            directory, dtype=dtype, device=place, output_loading_info=True, config=config, **more
        )
        if missing := sorted(report["missing_keys"]):
            raise ValueError(
                f"{directory} is no checkpoint for {task}: it lacks {', '.join(missing[:4])}"
                f"{' and more' if len(missing) > 4 else ''}, which would be random"
            )
        named = (read_config(directory).architectures or [""])[0]
        heads = [re.sub(r".*(?=For)", "", name) for name in (model_class.__name__, named)]
        if heads[0] != heads[1] and set(heads) <= ONE_CLASSIFIER:
            raise ValueError(f"{directory} is no checkpoint for {task}: its configuration names {named}")
        tokenizer = directory if tokenizer is None else tokenizer
    if not isinstance(tokenizer, DistilBertTokenizer):
        tokenizer, given = tokenizer if isinstance(tokenizer, tuple) else (tokenizer, {})
        tokenizer = DistilBertTokenizer.from_pretrained(tokenizer, **(hub | given))
    made = kind(model, tokenizer, max_batch_tokens, **options)
    made.task = task
    return made
