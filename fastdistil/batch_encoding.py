"""BatchEncoding: what the tokenizer returns, with transformers' questions about tokens, words and characters."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tokenizers import Encoding


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

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: str | torch.device) -> "BatchEncoding":
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.items()}
        return BatchEncoding(moved, self._encodings)

    @property
    def encodings(self) -> list[Encoding]:
        return [self._encoding(row) for row in range(len(self._encodings))]

    def _encoding(self, row: int) -> Encoding:
        if not self._encodings:
            raise ValueError("these ids come from no text: ask what the tokenizer itself returned")
        found = self._encodings[row]
        if found.n_sequences == 2:
            self._encodings[row] = found = _of_two_texts(found)
        return found

    def tokens(self, row: int = 0) -> list[str]:
        return self._encoding(row).tokens

    def word_ids(self, row: int = 0) -> list[int | None]:
        return self._encoding(row).word_ids

    def sequence_ids(self, row: int = 0) -> list[int | None]:
        return self._encoding(row).sequence_ids

    def _place(self, first: int, second: int | None) -> tuple[Encoding, int]:
        row, index = (0, first) if second is None else (first, second)
        return self._encoding(row), index

    def _token(self, first: int, second: int | None) -> tuple[Encoding, int]:
        encoding, token = self._place(first, second)
        return encoding, token + len(encoding) if token < 0 else token

    def token_to_sequence(self, row_or_token: int, token: int | None = None) -> int | None:
        encoding, token = self._token(row_or_token, token)
        return encoding.token_to_sequence(token)

    def token_to_word(self, row_or_token: int, token: int | None = None) -> int | None:
        encoding, token = self._token(row_or_token, token)
        return encoding.token_to_word(token)

    def token_to_chars(self, row_or_token: int, token: int | None = None) -> CharSpan | None:
        encoding, token = self._token(row_or_token, token)
        found = encoding.token_to_chars(token)
        return None if found is None else CharSpan(*found)

    def char_to_token(self, row_or_char: int, char: int | None = None, sequence_index: int = 0) -> int | None:
        encoding, char = self._place(row_or_char, char)
        return encoding.char_to_token(char, sequence_index)

    def char_to_word(self, row_or_char: int, char: int | None = None, sequence_index: int = 0) -> int | None:
        encoding, char = self._place(row_or_char, char)
        return encoding.char_to_word(char, sequence_index)

    def word_to_tokens(self, row_or_word: int, word: int | None = None, sequence_index: int = 0) -> TokenSpan | None:
        encoding, word = self._place(row_or_word, word)
        found = encoding.word_to_tokens(word, sequence_index)
        return None if found is None else TokenSpan(*found)

    def word_to_chars(self, row_or_word: int, word: int | None = None, sequence_index: int = 0) -> CharSpan | None:
        encoding, word = self._place(row_or_word, word)
        found = encoding.word_to_chars(word, sequence_index)
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
