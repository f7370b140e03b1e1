"""Answers of a pipeline as columns: labels and scores, entities, spans, guesses."""

import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from fastdistil.engine.tokens import ahead
from fastdistil.jobs.run import Rows
from fastdistil.jobs.writers import arrow_type, write_columns, write_lines

AT_ONCE = 4_096  # rows a call
A_TOKEN = ("token-classification", "fill-mask")  # tasks whose answers may be as many as the tokens
A_TOKENS_CHARACTERS = 2**24  # of a part's texts there, an eighth of others': the answers are longer than the texts
# what a pipeline's errors name, and what the caller of a job knows it as
OF_A_JOB = {
    "pass truncation=True": "leave --no-truncate out",
    "`context`": "the text",
    "`question`": "the question",
}

Asked = dict[tuple[str | None, Any], int]  # (question, text): the position of the first row that has them
Ready = Callable[[], Any]  # computes the answers of what is asked
Call = tuple[Rows, list[int], Asked, Ready]  # with the positions of the rows in the part

_ENTITY = {"score": "float", "word": "string", "start": "int", "end": "int"}
_SPAN = {"score": "float", "start": "int", "end": "int", "answer": "string"}
_GUESS = {"score": "float", "token": "int", "token_str": "string", "sequence": "string"}


def columns_of(task: str, options: dict[str, Any]) -> tuple[dict[str, Any], Callable[[Any], dict[str, Any]]]:
    """-> (kinds of the columns by name, what makes a row's values of an answer)"""
    many = options.get("top_k") is not None
    if task == "text-classification":
        if not many:
            return {"label": "string", "score": "float"}, dict
        return {"labels": ["string"], "scores": ["float"]}, lambda found: {
            "labels": [one["label"] for one in found],
            "scores": [one["score"] for one in found],
        }
    if task == "token-classification":
        grouped = options.get("aggregation_strategy", "none") != "none"
        entity = {"entity_group": "string"} | _ENTITY if grouped else {"entity": "string", "index": "int"} | _ENTITY
        return {"entities": [entity]}, lambda found: {"entities": [_floats(one) for one in found]}
    if task == "question-answering":
        if not many or options["top_k"] == 1:
            return _SPAN, dict
        return {"answers": [_SPAN]}, lambda found: {"answers": found if isinstance(found, list) else [found]}
    if task == "fill-mask":
        # a list of guesses for each mask
        return {"guesses": [[_GUESS]]}, lambda found: {
            "guesses": [found] if found and isinstance(found[0], dict) else found
        }
    raise ValueError(f"task {task!r} has no columns; print its answers, or use fastdistil embed")


def _floats(entity: dict[str, Any]) -> dict[str, Any]:
    return entity | {"score": float(entity["score"])}


def _of_a_job(message: str) -> str:
    """A pipeline's words about an input, as ones about a row."""
    reason = re.sub(r"\binputs\[\d+\]:? ?", "", message, count=1)
    for ours, theirs in OF_A_JOB.items():
        reason = reason.replace(ours, theirs)
    return reason.strip()


class Prediction:
    """Texts to what a pipeline says of them."""

    dim: int | None = None

    def __init__(self, answer: Any, task: str, form: str, options: dict[str, Any], question: str | None = None):
        self.answer, self.form, self.options, self.question = answer, form, options, question
        self.kinds, self.values = columns_of(task, options)
        self._rows = self._tokens = 0
        self.of_spans = task == "question-answering"
        self.alone = task in ("question-answering", "fill-mask")  # whose pipelines do not wrap a single answer

    def go_on(self, budget: int) -> None:
        """Each call has a budget of its own."""

    def answered(self) -> tuple[int, int | None]:
        return self._rows, self._tokens

    def bottleneck(self) -> str | None:
        return self.answer.stages.bottleneck()

    def run(self, parts: Iterable[Rows]) -> Iterator[Rows]:
        calls = self._calls(parts)
        if self.answer.device.type != "cpu":  # where the model has the cores that the tokenizer would need
            calls = ahead(calls)
        while True:
            with self.answer.stages.timed("tokenizer"):
                call = next(calls, None)
            if call is None:
                return
            part, positions, once, ready = call
            if positions:
                part.answers.append(self._packed(self._answers(part, positions, once, ready)))
                part.left -= len(positions)
                self._rows, self._tokens = self._rows + len(positions), self.answer.stages.tokens
            if not part.left:
                self._rows += len(part.rows) - len(part.usable)  # which needed no answer
                yield part

    def _calls(self, parts: Iterable[Rows]) -> Iterator[Call]:
        for part in parts:
            part.answers = []  # of each call, packed: as objects a whole part's would take far more memory
            part.left = len(part.usable)
            for first in range(0, max(1, part.left), AT_ONCE):  # one of no rows where none can be answered
                positions = part.usable[first : first + AT_ONCE]
                once: Asked = {}
                for position in positions:
                    once.setdefault((part.rows[position].question, part.rows[position].text), position)
                inputs = [self._input(part, p) for p in once.values()]
                try:
                    ready = self.answer.ready(inputs, **self.options)
                except (ValueError, TypeError) as error:  # which belongs to these rows
                    ready = _failing(error)
                except MemoryError:  # once more, when the model is not at work
                    ready = partial(self.answer, inputs, **self.options)
                yield part, positions, once, ready

    def _answers(self, part: Rows, positions: list[int], once: Asked, ready: Ready) -> list[Any]:
        """Answers of rows, None for those that have none; rows that ask for the same are answered once."""
        answers = dict(zip(once.values(), self._answered(part, [*once.values()], ready), strict=True))
        firsts = [once[part.rows[p].question, part.rows[p].text] for p in positions]
        part.errors |= {
            p: part.errors[first] for p, first in zip(positions, firsts, strict=True) if first in part.errors
        }
        return [answers[first] for first in firsts]

    def _answered(self, part: Rows, positions: list[int], ready: Ready | None = None) -> list[Any]:
        """`_answers` of rows that ask for something each. Where the pipeline names one row that it cannot answer both
        halves are tried, down to the row; mostly it names all."""
        if not positions:
            return []
        inputs = [self._input(part, p) for p in positions]
        try:
            results = self.answer(inputs, **self.options) if ready is None else ready()
        except (ValueError, TypeError, MemoryError) as error:
            named = re.search(r"\binputs\[(\d+)\]:?", str(error))
            if named is None:
                raise
            messages = {0: str(error)} if len(positions) == 1 else getattr(error, "messages", {})
            if not messages:
                half = len(positions) // 2
                return self._answered(part, positions[:half]) + self._answered(part, positions[half:])
            part.errors |= {positions[row]: _of_a_job(message) for row, message in messages.items()}
            left = deque(self._answered(part, [p for row, p in enumerate(positions) if row not in messages]))
            return [None if row in messages else left.popleft() for row in range(len(positions))]
        return [results] if self.alone and len(inputs) == 1 else results

    def _input(self, part: Rows, position: int) -> Any:
        row = part.rows[position]
        if not self.of_spans:
            return row.text
        return {"question": row.question if self.question is None else self.question, "context": row.text}

    def write(self, directory: Path, name: str, part: Rows, keep: list[int]) -> list[str]:
        ids = [part.rows[p].id for p in keep]
        place = {p: i for i, p in enumerate(part.usable)}
        at = [None if p in part.errors else place[p] for p in keep]
        if self.form != "parquet":
            lines = list(chain.from_iterable(part.answers))
            nothing = json.dumps(dict.fromkeys(self.kinds))
            return write_lines(directory, name, ids, (nothing if i is None else lines[i] for i in at))
        columns = {
            key: _placed([piece for call in part.answers for piece in call[key]], at, arrow_type(kind))
            for key, kind in self.kinds.items()
        }
        return write_columns(directory, name, self.form, ids, columns, part.named, self.kinds)

    def _packed(self, answers: list[Any]) -> Any:
        """JSON objects as text, or a dictionary of lists of Arrow arrays; null where there is no answer."""
        rows = [None if answer is None else self.values(answer) for answer in answers]
        if self.form != "parquet":
            return [json.dumps(row, default=float) for row in rows]
        import pyarrow

        columns = {}
        for key, kind in self.kinds.items():
            found = pyarrow.array([None if row is None else row[key] for row in rows], arrow_type(kind))
            # of more text than an array holds, Arrow makes several
            columns[key] = found.chunks if isinstance(found, pyarrow.ChunkedArray) else [found]
        return columns


def _failing(error: Exception) -> Ready:
    def answers() -> Any:
        raise error

    return answers


def _placed(pieces: list[Any], at: list[int | None], kind: Any) -> Any:
    """A chunked Arrow array of the values at rising places `at` of the pieces' together, null where that is None; piece
    by piece, for all of them may be more than one array holds."""
    import pyarrow

    made, first, row = [], 0, 0
    for piece in pieces:
        rows: list[int | None] = []
        while row < len(at) and ((place := at[row]) is None or place < first + len(piece)):
            rows.append(None if place is None else place - first)
            row += 1
        whole = rows == list(range(len(piece)))
        made.append(piece if whole else piece.take(pyarrow.array(rows, pyarrow.int64())))
        first += len(piece)
    return pyarrow.chunked_array([*made, pyarrow.nulls(len(at) - row, kind)], kind)
