"""The command line: fastdistil embed, search, predict, fill-mask, verify, doctor."""

import argparse
import io
import json
import logging
import os
import platform
import re
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import fastdistil
from fastdistil._register import FORMS
from fastdistil.engine import Embedder
from fastdistil.engine.embedder import describe
from fastdistil.engine.scheduler import TOKENIZE
from fastdistil.jobs.embed import embed_rows, report
from fastdistil.jobs.index import FORMATS, Index
from fastdistil.jobs.readers import Row, read_rows
from fastdistil.kernels import _target
from fastdistil.pipelines import (
    ALIASES,
    TASKS,
    FillMaskPipeline,
    QuestionAnsweringPipeline,
    TokenClassificationPipeline,
)
from fastdistil.verify import verify

SHARED = 64  # tokens that two windows of a long text share
DONE, FAILED = 0, 1  # argparse itself exits with 2 on wrong use


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an id may hold what cannot be encoded
    try:
        arguments.command(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (ValueError, TypeError, OSError) as error:
        print(f"fastdistil: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("fastdistil: interrupted; finished parts stay", file=sys.stderr)
        return FAILED
    return DONE


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="fastdistil", description="DistilBERT encoders, exact and fast.")
    top.add_argument("--version", action="version", version=f"fastdistil {fastdistil.__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("embed", help="embed texts into an index directory")
    one.set_defaults(command=embed)
    one.add_argument("--model", required=True, help="checkpoint directory or hub id")
    one.add_argument("--input", required=True, nargs="+", help=".txt (a text a line), .jsonl, or - for standard input")
    one.add_argument("--output", required=True, type=Path, help="directory for the index")
    one.add_argument("--text-column", default="text", help="jsonl column of the text (default: text)")
    one.add_argument("--id-column", help="jsonl column of the id (default: the row's number)")
    one.add_argument("--format", choices=FORMATS, default="npy", help="file format of the embeddings")
    one.add_argument("--pooling", choices=fastdistil.ops.POOLING, help="default: the checkpoint's, else mean")
    one.add_argument("--normalize", action=argparse.BooleanOptionalAction, help="default: the checkpoint's, else no")
    one.add_argument("--max-length", type=positive, help="tokens a text is cut to (default: the checkpoint's)")
    one.add_argument("--max-batch-tokens", type=positive, help="default: 2048 on CPU, 16896 on CUDA")
    one.add_argument("--overwrite", action="store_true", help="replace the index in the output directory")
    _placement(one)

    two = commands.add_parser("search", help="find the texts of an index nearest to a query")
    two.set_defaults(command=search)
    two.add_argument("--index", required=True, type=Path, help="directory written by fastdistil embed")
    two.add_argument("--model", help="checkpoint (default: the one the index was made with)")
    two.add_argument("--top-k", type=positive, default=3)
    two.add_argument("--json", action="store_true", help="print a JSON object a query")
    two.add_argument("query", nargs="+")
    _placement(two)

    four = commands.add_parser("predict", help="answer a task for every text, a JSON object a line")
    four.set_defaults(command=predict)
    four.add_argument("--task", required=True, choices=[*TASKS, *ALIASES])
    four.add_argument("--model", required=True, help="checkpoint directory or hub id")
    four.add_argument("--input", required=True, nargs="+", help=".txt (a text a line), .jsonl, or - for standard input")
    four.add_argument("--text-column", default="text", help="jsonl column of the text (default: text)")
    four.add_argument("--id-column", help="jsonl column of the id (default: the row's number)")
    four.add_argument("--question", help="question-answering: what to ask of every text")
    four.add_argument("--top-k", type=positive, help="so many answers a text")
    four.add_argument("--aggregation-strategy", choices=TokenClassificationPipeline.strategies, default="simple")
    four.add_argument("--truncate", action=argparse.BooleanOptionalAction, default=True, help="cut texts too long")
    four.add_argument("--max-batch-tokens", type=positive, help="default: 2048 on CPU, 16896 on CUDA")
    _placement(four)

    five = commands.add_parser("fill-mask", help="the likeliest words for [MASK]")
    five.set_defaults(command=fill_mask)
    five.add_argument("--model", required=True, help="checkpoint directory or hub id")
    five.add_argument("--top-k", type=positive, default=5)
    five.add_argument("--json", action="store_true", help="print a JSON object a text")
    five.add_argument("--truncate", action="store_true", help="cut texts that are too long")
    five.add_argument("text", nargs="+")
    _placement(five)

    six = commands.add_parser("verify", help="check a checkpoint layer by layer; exit status 1 when over the bound")
    six.set_defaults(command=check)
    six.add_argument("model", help="checkpoint directory or hub id")
    six.add_argument("--input", nargs="+", help="texts to check with (.txt, .jsonl, or -; the first 64)")
    six.add_argument("--text-column", default="text", help="jsonl column of the text (default: text)")
    _placement(six)

    three = commands.add_parser("doctor", help="show what fastdistil runs on here, and why")
    three.set_defaults(command=doctor)
    return top


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def _placement(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda when there is one)")
    command.add_argument("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto")
    command.add_argument("--quiet", action="store_true", help="nothing on standard error but errors")


def embed(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    embedder = Embedder.from_pretrained(
        arguments.model,
        arguments.device,
        arguments.dtype,
        arguments.pooling,
        arguments.normalize,
        arguments.max_length,
    )
    say(arguments, f"{arguments.model} on {embedder.describe()}")
    model = Path(arguments.model)
    manifest = embed_rows(
        embedder,
        read_rows(arguments.input, text_column=arguments.text_column, id_column=arguments.id_column),
        arguments.output,
        model=str(model.resolve()) if model.is_dir() else arguments.model,
        file_format=arguments.format,
        max_batch_tokens=arguments.max_batch_tokens,
        overwrite=arguments.overwrite,
        show_progress=False if arguments.quiet else None,
    )
    if not arguments.quiet:
        report(manifest, started)


def search(arguments: argparse.Namespace) -> None:
    index = Index(arguments.index)
    made = index.manifest
    embedder = Embedder.from_pretrained(
        arguments.model or made.model, arguments.device, arguments.dtype, made.pooling, made.normalize, made.max_length
    )
    if embedder.dim != made.dim:
        raise ValueError(f"{arguments.model or made.model} gives {embedder.dim} dimensions, the index has {made.dim}")
    say(arguments, f"{made.rows:,} texts, query on {embedder.describe()}")
    found = index.search(embedder.encode(arguments.query, show_progress=False), arguments.top_k)
    for query, hits in zip(arguments.query, found, strict=True):
        if arguments.json:
            print(json.dumps({"query": query, "hits": [{"id": i, "score": s} for i, s in hits]}, ensure_ascii=False))
        else:
            print(query, *(f"  {score:.3f}  {identity}" for identity, score in hits), sep="\n")


def predict(arguments: argparse.Namespace) -> None:
    task = ALIASES.get(arguments.task, arguments.task)
    if (arguments.question is None) is (task == "question-answering"):
        raise ValueError("--question goes with --task question-answering, and only with it")
    options: dict[str, Any] = {}
    if arguments.top_k is not None:
        if task in ("token-classification", "feature-extraction"):
            raise ValueError(f"--top-k is not for --task {task}")
        options["top_k"] = arguments.top_k
    if task == "token-classification":
        options["aggregation_strategy"] = arguments.aggregation_strategy
        if not arguments.truncate and arguments.aggregation_strategy == "none":
            raise ValueError("--no-truncate needs an --aggregation-strategy other than none, for windows overlap")
    elif task != "question-answering":
        options["truncation"] = arguments.truncate
    answer = _pipeline(arguments, task)
    if task == "token-classification" and not arguments.truncate:
        options["stride"] = min(SHARED, answer._limit() // 4)
    rows = read_rows(arguments.input, text_column=arguments.text_column, id_column=arguments.id_column)
    while chunk := list(islice(rows, TOKENIZE)):
        try:
            _print_answers(answer, chunk, arguments.question, options)
        except (ValueError, TypeError) as error:
            named = re.search(r"\b(?:inputs|text)\[(\d+)\]", str(error))
            if named is None:
                raise type(error)(f"of the texts from {chunk[0].where} on, {error}") from error
            wrong = int(named[1])
            if wrong:  # what comes before it is answered
                _print_answers(answer, chunk[:wrong], arguments.question, options)
            message = str(error).replace(named[0], chunk[wrong].where, 1)
            raise type(error)(message.replace("pass truncation=True", "leave --no-truncate out")) from error


def _print_answers(answer: Any, rows: list[Row], question: str | None, options: dict[str, Any]) -> None:
    texts = [row.text if question is None else {"question": question, "context": row.text} for row in rows]
    results = answer(texts, **options)
    if len(texts) == 1 and isinstance(answer, (FillMaskPipeline, QuestionAnsweringPipeline)):
        results = [results]  # which do not wrap a single answer
    for row, result in zip(rows, results, strict=True):
        print(json.dumps({"id": row.id, "result": result}, ensure_ascii=False, default=float))


def fill_mask(arguments: argparse.Namespace) -> None:
    answer = _pipeline(arguments, "fill-mask")
    for text in arguments.text:
        try:
            found = answer(text, top_k=arguments.top_k, truncation=arguments.truncate)
        except ValueError as error:
            message = (
                str(error).replace("inputs[0]", repr(text[:60])).replace("pass truncation=True", "pass --truncate")
            )
            raise ValueError(message) from error
        if arguments.json:
            print(json.dumps({"text": text, "result": found}, ensure_ascii=False))
            continue
        print(text)
        for guesses in found if isinstance(found[0], list) else [found]:
            print(
                *(f"  {guess['score']:.4f}  {guess['token_str']:14} {guess['sequence']}" for guess in guesses), sep="\n"
            )


def check(arguments: argparse.Namespace) -> None:
    texts = None
    if arguments.input:
        texts = [row.text for row in islice(read_rows(arguments.input, text_column=arguments.text_column), 64)]
        if not texts:
            raise ValueError(f"{', '.join(arguments.input)} holds no text")
    report = verify(arguments.model, texts, device=arguments.device, dtype=arguments.dtype)
    print(report)
    if not report.holds:
        raise ValueError(f"{arguments.model} is not computed within bounds")


def _pipeline(arguments: argparse.Namespace, task: str) -> Any:
    found = fastdistil.pipeline(
        task,
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        max_batch_tokens=getattr(arguments, "max_batch_tokens", None),
    )
    say(arguments, f"{arguments.model} on {describe(found.encoder)}")
    return found


def say(arguments: argparse.Namespace, text: str) -> None:
    if not arguments.quiet:
        print(text, file=sys.stderr)


def doctor(arguments: argparse.Namespace) -> None:
    """Versions, devices, compiler, cache, and for each op what runs it on each device."""
    lines = [
        ("fastdistil", fastdistil.__version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", torch.__version__),
        ("triton", _target.triton_version() or "not installed"),
        ("cpu threads", str(torch.get_num_threads())),
        ("cuda", str(torch.version.cuda or "this torch is built without it")),
        ("C compiler", _target.missing_compiler() or "found, with Python's headers"),
        ("kernel cache", str(_target.cache_directory())),
    ]
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        lines.append((f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}"))
    reason = _target.why_not(torch.device("cpu") if _target.interpreted() else torch.device("cuda", 0))
    lines.append(("Triton kernels", reason or "can run"))
    for i in range(1, torch.cuda.device_count()):
        if why := _target.why_not(torch.device("cuda", i)):
            lines.append((f"  not on cuda:{i}", why))
    for name, value in lines:
        print(f"{name + ':':16}{value}")
    print("\nop                cpu                       cuda")
    for op, forms in FORMS.items():
        cuda = _source("fastdistil.reference" if reason else forms["cuda"].__module__)
        print(f"{op:18}{_source(forms['cpu'].__module__):26}{cuda if torch.cuda.is_available() else 'no device'}")


def _source(module: str) -> str:
    name = module.removeprefix("fastdistil.")
    return f"{name} (eager torch)" if name in ("reference", "cpu") else f"{name} (Triton)"


if __name__ == "__main__":
    sys.exit(main())
