"""Texts to windows of token ids: each distinct text tokenised once, ahead of the model, in other processes if asked."""

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import numpy as np

from fastdistil.engine.scheduler import TOKENIZE, Window, distinct, flatten
from fastdistil.tokenizer import DistilBertTokenizer

Item = TypeVar("Item")

LONGEST_END = 2.0  # seconds that `ahead` waits for its thread


def of_column(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """Lists of token ids, in an Arrow column or one by one, as (input_ids, cu_seqlens); an Arrow array's ids are not
    copied. Raises TypeError naming the text that is none."""
    if hasattr(column, "combine_chunks"):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if hasattr(column, "value_lengths") and hasattr(column, "flatten"):
        values, nulls = column.flatten(), column.is_null().to_numpy(zero_copy_only=False)
        lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        if values.null_count:
            at = int(values.is_null().to_numpy(zero_copy_only=False).argmax())
            raise TypeError(f"texts[{np.searchsorted(ends, at, side='right') - 1}] holds a null among its token ids")
        if nulls.any():
            raise TypeError(f"texts[{nulls.argmax()}] is null, not a list of token ids")
        return values.to_numpy(zero_copy_only=False), ends
    rows = []
    for i, given in enumerate(column):
        try:
            row = np.asarray(given)
        except ValueError as error:  # lists in it, of different lengths
            raise TypeError(f"texts[{i}] must be a list of token ids: {error}") from error
        if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
            raise TypeError(f"texts[{i}] must be a list of token ids, got {row.dtype} {list(row.shape)}")
        rows.append(np.minimum(row, 2**63 - 1).astype(np.int64) if row.dtype == np.uint64 else row)
    ends = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    return np.concatenate([np.empty(0, np.int32), *(row for row in rows if row.size)]), ends


class TextWindows:
    """Makes windows of texts. prepare: what is done to a text before. processes: how many tokenise beside this one,
    for machines where the tokenizer's threads do not keep up; close() ends them."""

    def __init__(
        self,
        tokenizer: DistilBertTokenizer,
        max_length: int | None,
        prepare: Callable[[str], str] | None = None,
        processes: int = 0,
    ):
        self.tokenizer, self.max_length, self.prepare = tokenizer, max_length, prepare
        self._pool: ProcessPoolExecutor | None = None
        if isinstance(processes, bool) or not isinstance(processes, int) or processes < 0:
            raise ValueError(f"tokenizer_processes is {processes!r}; it must be an integer of 0 or more")
        if processes:
            # a fork would copy the locks of the tokenizer's threads and of CUDA
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(processes, context, _start, (tokenizer,))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def window(self, texts: Sequence[Any], first_row: int = 0) -> Window:
        """Raises TypeError or ValueError naming the row, counted from first_row."""
        source = None
        if all(type(text) is str for text in texts):
            once, source = distinct(list(texts))
            if source is not None:
                try:
                    return Window.join(self._chunks(once, 0), source, first_row)
                except (ValueError, TypeError):
                    pass  # said again below, with the text's own row
        return Window.join(self._chunks(texts, first_row), first=first_row)

    def _chunks(self, texts: Sequence[Any], first_row: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        pieces: list[tuple[list[Any], int | None, int]] = []
        for start in range(0, len(texts), TOKENIZE):
            chunk = list(texts[start : start + TOKENIZE])
            if self.prepare is not None:  # the tokenizer's error names what is no text
                chunk = [self.prepare(text) if isinstance(text, str) else text for text in chunk]
            pieces.append((chunk, self.max_length, first_row + start))
        if self._pool is not None:
            try:
                yield from self._pool.map(_tokenize_there, pieces)
            except BrokenProcessPool as error:
                raise ChildProcessError(
                    "a tokenizer process ended: perhaps there was no memory for it, or the script that starts them "
                    "lacks `if __name__ == '__main__':` around its own lines, which each process runs again"
                ) from error
        else:
            for chunk, most, row in pieces:
                yield flatten(self.tokenizer.encode_ids(chunk, most, first_row=row))


def _start(tokenizer: DistilBertTokenizer) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process
    _tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _tokenize_there(piece: tuple[list[Any], int | None, int]) -> tuple[np.ndarray, np.ndarray]:
    chunk, most, row = piece
    return flatten(_tokenizer.encode_ids(chunk, most, first_row=row))


_tokenizer: DistilBertTokenizer


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The items, each made in another thread while the one before it is in use. A thread that still waits for its input
    when nobody wants more, as at the end of an idle pipe, is left to itself."""
    iterator, made, wanted, end = iter(items), queue.SimpleQueue[Any](), threading.Semaphore(), object()
    over = False

    def make() -> None:
        item: Any = None
        while item is not end:
            wanted.acquire()
            if over:
                return
            try:
                item = next(iterator, end)
            except BaseException as error:  # for the one who asks
                made.put((end, error))
                return
            made.put((item, None))

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is end:
                return
            wanted.release()
            yield item
    finally:
        over = True
        wanted.release()
        thread.join(LONGEST_END)
