"""Token-budget batches: which texts go together. Decided by token counts alone, so the same input gives the same
batches."""

from collections.abc import Iterator

import numpy as np

WINDOW = 65_536  # texts tokenised ahead and sorted together; the bound on what is held beside the output
TOKENIZE = 1_024  # texts tokenised in one call, before their ids are flattened into an array


class Window:
    """Token ids of consecutive texts as one flat int32 array."""

    def __init__(self, ids: np.ndarray, lengths: np.ndarray):
        self.ids, self.lengths = ids, lengths
        self.starts = np.concatenate([[0], np.cumsum(lengths)])

    @classmethod
    def of(cls, chunks: Iterator[list[list[int]]]) -> "Window":
        """From lists of ids, a chunk of texts at a time so that few Python integers are alive at once."""
        flat, lengths = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
        for chunk in chunks:
            lengths.append(np.fromiter(map(len, chunk), np.int64, len(chunk)))
            flat.append(np.fromiter((i for ids in chunk for i in ids), np.int32, int(lengths[-1].sum())))
        return cls(np.concatenate(flat), np.concatenate(lengths))

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> (ids [tokens], position_ids [tokens], cu_seqlens [len(rows) + 1]), all int32"""
        lengths = self.lengths[rows]
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
        ids = self.ids[np.repeat(self.starts[rows], lengths) + positions]
        return ids, positions.astype(np.int32), cu_seqlens.astype(np.int32)


def batches(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Row numbers in batches of at most `budget` tokens, longest first; a longer text is a batch of its own."""
    order = np.argsort(-lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    first = 0
    while first < len(order):
        before = ends[first - 1] if first else 0
        last = max(int(np.searchsorted(ends, before + budget, side="right")), first + 1)
        yield order[first:last]
        first = last
