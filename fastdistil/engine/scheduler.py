"""Token-budget batches: which texts go together. Decided by token counts alone, so the same input gives the same
batches."""

import functools
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

WINDOW = 65_536  # texts tokenised ahead and sorted together; the bound on what is held beside the output
HEAD = 4_096  # texts of a first window, so that the model need not wait for a whole one
TOKENIZE = 1_024  # texts tokenised in one call, before their ids are flattened into an array
CPU_BUDGET = 2_048  # tokens a batch
GEMM_TILE = 128, 256  # rows and columns of the tile that large GEMMs run in


class Batch(NamedTuple):
    """Packed sequences: ids, positions int32 [tokens]; cu_seqlens int32 [len(rows) + 1]; rows: their numbers."""

    rows: np.ndarray
    ids: np.ndarray
    positions: np.ndarray
    cu_seqlens: np.ndarray
    longest: int


class Window:
    """Token ids of consecutive texts as one flat int32 array, texts that are equal only once.

    source: the number of each text's sequence, None where every text has its own. first: the first text's number.
    owner: whatever the window was made for.
    """

    owner: Any = None

    def __init__(self, ids: np.ndarray, lengths: np.ndarray, source: np.ndarray | None = None, first: int = 0):
        self.ids, self.lengths, self.source, self.first = ids, lengths, source, first
        self.starts = np.concatenate([[0], np.cumsum(lengths)])

    def __len__(self) -> int:
        return len(self.lengths if self.source is None else self.source)

    @classmethod
    def join(
        cls, chunks: Iterable[tuple[np.ndarray, np.ndarray]], source: np.ndarray | None = None, first: int = 0
    ) -> "Window":
        """From (ids, lengths) of one chunk of texts after another."""
        flat, lengths = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
        for ids, sizes in chunks:
            flat.append(ids)
            lengths.append(sizes)
        return cls(np.concatenate(flat), np.concatenate(lengths), source, first)

    def emptied(self, wrong: np.ndarray) -> "Window":
        """The same window, with nothing left of some sequences: bool [sequences]"""
        ids = self.ids[np.repeat(~wrong, self.lengths)]
        return Window(ids, np.where(wrong, 0, self.lengths), self.source, self.first)

    def gather(self, rows: np.ndarray) -> Batch:
        if len(rows) == 1:  # a query waits for this
            start, tokens = int(self.starts[rows[0]]), int(self.lengths[rows[0]])
            ids = self.ids[start : start + tokens].astype(np.int32)
            return Batch(rows, ids, np.arange(tokens, dtype=np.int32), np.array([0, tokens], np.int32), tokens)
        lengths = self.lengths[rows]
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
        ids = self.ids[np.repeat(self.starts[rows], lengths) + positions].astype(np.int32, copy=False)
        return Batch(rows, ids, positions.astype(np.int32), cu_seqlens.astype(np.int32), int(lengths.max(initial=0)))

    def texts(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """-> (the numbers of the texts that have these sequences, for each of them which of `rows` it has)"""
        if self.source is None:
            return self.first + rows, np.arange(len(rows))
        by_sequence, begin, count = self._inverse
        which = np.repeat(np.arange(len(rows)), count[rows])
        before = np.cumsum(count[rows]) - count[rows]
        at = np.repeat(begin[rows] - before, count[rows]) + np.arange(len(which))
        return self.first + by_sequence[at], which

    @functools.cached_property
    def _inverse(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> (texts in order of their sequences, where each sequence's begin there, how many they are)"""
        assert self.source is not None
        count = np.bincount(self.source, minlength=len(self.lengths))
        return np.argsort(self.source, kind="stable"), np.cumsum(count) - count, count


def flatten(sequences: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """-> (ids int32 [tokens], lengths int64 [len(sequences)])"""
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
    return np.fromiter((i for ids in sequences for i in ids), np.int32, int(lengths.sum())), lengths


def distinct(texts: list[str]) -> tuple[list[str], np.ndarray | None]:
    """-> (the texts without repetitions, for each text which of them it is; None where none is repeated)"""
    first = dict.fromkeys(texts)
    if len(first) == len(texts):
        return texts, None
    number = {text: i for i, text in enumerate(first)}
    return list(first), np.fromiter(map(number.__getitem__, texts), np.int64, len(texts))


def batches(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Row numbers in batches of at most `budget` tokens and rows; a longer text is a batch of its own.

    The longest texts left go first, and the room that they leave takes the longest that fit into it: nearly equal
    lengths, and batches that are full.
    """
    if len(lengths) == 1:
        yield np.zeros(1, np.int64)
        return
    order = np.argsort(-lengths, kind="stable")
    sizes, at = np.unique(-lengths[order], return_index=True)  # falling lengths, and where each begins in `order`
    falling, at = sizes.tolist(), at.tolist()
    ends = [*at[1:], len(order)]
    longest = 0
    while longest < len(falling):
        room, rows, i = budget, budget, longest
        picked: list[np.ndarray] = []
        while i < len(falling):
            size, left = -falling[i], ends[i] - at[i]
            take = min(left, rows, room // size if size else rows)
            if i == longest and not picked:
                take = max(take, 1)
            if take > 0:
                picked.append(order[at[i] : at[i] + take])
                at[i] += take
                room, rows = room - take * size, rows - take
            if rows <= 0 or room < 0:
                break
            i = max(i + 1, bisect_left(falling, -room))
        while longest < len(falling) and at[longest] == ends[longest]:
            longest += 1
        yield np.concatenate(picked)


def cuts(rows: int) -> Iterator[tuple[int, int]]:
    """Where windows begin and end, the first of them small."""
    first = 0
    while first < rows:
        last = min(first + (WINDOW if first else HEAD), rows)
        yield first, last
        first = last


def cuda_budget(multiprocessors: int, dim: int) -> int:
    """About 16,896 tokens, in whole waves.

    A wave is full when a GEMM `dim` wide, the narrowest of a block, has a multiple of as many tiles as there are
    multiprocessors: 5,632 tokens on the 132 of an H200 at dim 768.
    """
    tile_rows, tile_columns = GEMM_TILE
    columns = -(-dim // tile_columns)
    wave = tile_rows * multiprocessors // math.gcd(multiprocessors, columns)
    return wave * max(1, round(16_896 / wave))
