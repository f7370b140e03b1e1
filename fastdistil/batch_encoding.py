"""BatchEncoding: what the tokenizer returns, with transformers' questions about tokens, words and characters."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Encoding

PADDED = frozenset(("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask"))


class CharSpan(NamedTuple):
    """Characters start to end - 1 of a text, or of a word where the text was given as words."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """Tokens start to end - 1 of a row."""

    start: int
    end: int


class BatchEncoding(dict):
    """The tokenizer's result: a dictionary whose keys are attributes too. `encodings` are the library's objects, where
    the texts themselves were tokenised: what tools make of a result, and `pad` of several, has none.

    What is asked about a token, a word or a character is asked as `(row, index)`, or `(index)` of row 0, and answered
    with None where there is none. sequence_index: 0 or 1, the text of a pair. Source: transformers' `BatchEncoding`.
    """

    def __init__(self, data: Any = (), encodings: Sequence[Encoding] = ()):
        super().__init__(data)
        self._encodings = list(encodings)

    def __getitem__(self, name: Any) -> Any:
        """The field of that name; of a number or a slice, that row's `tokenizers.Encoding` or a list of them."""
        if isinstance(name, slice):
            return self.encodings[name]
        return self._whole(int(name)) if isinstance(name, (int, np.integer)) else super().__getitem__(name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getitem__(name)
        except KeyError:
            raise AttributeError(name) from None

    @property
    def data(self) -> dict[str, Any]:
        return self

    @property
    def is_fast(self) -> bool:
        """Whether it can be asked about tokens, words and characters."""
        return bool(self._encodings)

    def convert_to_tensors(self, tensor_type: str | None = None, prepend_batch_axis: bool = False) -> "BatchEncoding":
        """Make its lists tensors ("pt") or arrays ("np"), in place; returns itself. prepend_batch_axis: of one text's
        lists, rows. Raises ValueError naming the field."""
        made = {name: as_tensor(name, [v] if prepend_batch_axis else v, tensor_type) for name, v in self.items()}
        self.update(made)
        return self

    def to(self, device: str | torch.device, *, non_blocking: bool = False) -> "BatchEncoding":
        """Move the tensors to the device, in place; returns itself."""
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                self[name] = value.to(device, non_blocking=non_blocking)
        return self

    @property
    def encodings(self) -> list[Encoding]:
        return [self._whole(row) for row in range(len(self._encodings))]

    @property
    def n_sequences(self) -> int | None:
        """1, or 2 of pairs; None where no text was tokenised."""
        return self._encodings[0].n_sequences if self._encodings else None

    def _encoding(self, row: int) -> Encoding:
        if not self._encodings:
            raise ValueError("these ids come from no text: ask what the tokenizer itself returned")
        return self._encodings[row]

    def _whole(self, row: int) -> Encoding:
        """That knows the places of both texts of a pair."""
        found = self._encoding(row)
        if found.n_sequences == 2:
            self._encodings[row] = found = _of_two_texts(found)
        return found

    def tokens(self, batch_index: int = 0) -> list[str]:
        """Each token's string."""
        return self._encoding(batch_index).tokens

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """Each token's word, as a number within its text; None of special tokens."""
        return self._encoding(batch_index).word_ids

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """Each token's text, 0 or 1; None of special tokens."""
        found = self._encoding(batch_index)  # whose own may have forgotten the first text of a pair
        own = zip(found.special_tokens_mask, found.sequence_ids, strict=True)
        return [None if special else int(kind == 1) for special, kind in own]

    def _place(self, first: int, second: int | None) -> tuple[Encoding, int]:
        row, index = (0, first) if second is None else (first, second)
        return self._whole(row), index

    def _token(self, first: int, second: int | None) -> tuple[Encoding, int]:
        encoding, token = self._place(first, second)
        at = token + len(encoding) if token < 0 else token
        if not 0 <= at < len(encoding):
            raise IndexError(f"there is no token {token} in a row of {len(encoding)}")
        return encoding, at

    def token_to_sequence(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        encoding, token = self._token(batch_or_token_index, token_index)
        return encoding.token_to_sequence(token)

    def token_to_word(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        encoding, token = self._token(batch_or_token_index, token_index)
        return encoding.token_to_word(token)

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> CharSpan | None:
        encoding, token = self._token(batch_or_token_index, token_index)
        found = encoding.token_to_chars(token)
        return None if found is None else CharSpan(*found)

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        encoding, char = self._place(batch_or_char_index, char_index)
        return encoding.char_to_token(char, sequence_index) if char >= 0 else None

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        encoding, char = self._place(batch_or_char_index, char_index)
        return encoding.char_to_word(char, sequence_index) if char >= 0 else None

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        encoding, word = self._place(batch_or_word_index, word_index)
        found = encoding.word_to_tokens(word, sequence_index) if word >= 0 else None
        return None if found is None else TokenSpan(*found)

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> CharSpan | None:
        encoding, word = self._place(batch_or_word_index, word_index)
        found = encoding.word_to_chars(word, sequence_index) if word >= 0 else None
        return None if found is None else CharSpan(*found)


def _of_two_texts(encoding: Encoding) -> Encoding:
    """With the place of the first text too, which the library forgets of texts that were encoded one by one."""
    state = json.loads(encoding.__getstate__())
    first, second = state["sequence_ranges"]["0"], state["sequence_ranges"]["1"]
    if first != second:
        return encoding
    own = [i for i, special in enumerate(state["special_tokens_mask"][: second["start"]]) if not special]
    state["sequence_ranges"]["0"] = {"start": own[0], "end": own[-1] + 1} if own else {"start": 0, "end": 0}
    whole = Encoding()
    whole.__setstate__(json.dumps(state).encode())
    return whole


def as_tensor(name: str, values: Any, kind: str | None) -> Any:
    if kind not in (None, "pt", "np"):
        raise ValueError(f"return_tensors must be 'pt', 'np' or None, got {kind!r}")
    if kind is None:
        return values
    try:
        if name in PADDED:
            whole = np.array(values, np.int64)  # also of no tokens
            return torch.from_numpy(whole) if kind == "pt" else whole
        if kind == "np":
            return np.array(values)
        first = values[0] if isinstance(values, (list, tuple)) and values else values
        if isinstance(first, torch.Tensor):  # each keeps its type
            return values if first is values else torch.stack(list(values))
        return torch.from_numpy(np.array(values)) if hasattr(first, "dtype") else torch.tensor(values)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name} cannot be a tensor: its rows differ in length or are no numbers; use padding=True, and leave out "
            "what is for people to read"
        ) from error
