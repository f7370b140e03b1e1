"""The command line: fastdistil embed, predict, merge, search, fill-mask, verify, bench, doctor."""

import argparse
import importlib.metadata
import io
import json
import logging
import os
import platform
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import fastdistil
from fastdistil import cpu
from fastdistil._register import FORMS
from fastdistil.checkpoint import find
from fastdistil.engine import Embedder
from fastdistil.engine.embedder import describe
from fastdistil.engine.scheduler import TOKENIZE
from fastdistil.jobs.index import Index
from fastdistil.jobs.manifest import Manifest, apart, fingerprint_of_model
from fastdistil.jobs.merge import merge, shard_directory
from fastdistil.jobs.predict import A_TOKEN, A_TOKENS_CHARACTERS, Prediction
from fastdistil.jobs.processes import LIFELINE, REJECTED, Failed, end_with_parent, run_on, split_devices
from fastdistil.jobs.readers import KINDS, Columns, Row, checked, find_inputs, read_rows
from fastdistil.jobs.run import ON_ERROR, PART_CHARACTERS, Embedding, Job, Log, run_job
from fastdistil.jobs.writers import ANSWERS, EMBEDDINGS
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
DONE, FAILED, WRONG_USE = 0, 1, 2  # argparse itself exits with 2, too


class WrongUse(ValueError):
    """Arguments that do not go together."""


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    arguments.argv = sys.argv[1:] if argv is None else list(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an id may hold what cannot be encoded
    local = os.environ.get("LOCAL_RANK", "")  # torchrun's processes have a GPU each
    if getattr(arguments, "device", "") is None and local.isdecimal() and torch.cuda.device_count() > int(local):
        arguments.device = f"cuda:{local}"
    log, with_others = Log(as_json=getattr(arguments, "json_logs", False)), LIFELINE in os.environ
    try:
        end_with_parent()
        with log.warnings(), nullcontext() if with_others else _sigterm_as_interrupt():
            status = arguments.command(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (ValueError, TypeError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        log.fail(str(error))
        wrong_use = isinstance(error, WrongUse) or (isinstance(error, Failed) and error.status == WRONG_USE)
        return WRONG_USE if wrong_use else FAILED
    except Exception as error:  # a defect
        log.crash(error)
        return FAILED
    except KeyboardInterrupt as error:
        if not with_others:  # else the one that started this says so
            log.fail(f"{str(error) or 'interrupted'}{_what_stays(arguments)}")
        return FAILED
    return status or DONE


def _what_stays(arguments: argparse.Namespace) -> str:
    if getattr(arguments, "output", None) is None or not hasattr(arguments, "resume"):
        return ""
    return "; finished parts stay" + (", go on with --resume" if "-" not in arguments.input else "")


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """What schedulers send ends this as Ctrl-C does; a second one at once."""

    came = []

    def interrupt(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        came.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("ended by SIGTERM" if came else "") from None
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="fastdistil", description="DistilBERT encoders, exact and fast.")
    top.add_argument("--version", action="version", version=f"fastdistil {fastdistil.__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("embed", help="embed texts into a directory of numbered parts, which can be searched")
    one.set_defaults(command=embed)
    _job(one, EMBEDDINGS, "npy")
    one.add_argument("--output", required=True, type=to_directory, help="directory for the parts and their manifest")
    one.add_argument("--tokens-column", help="parquet column of token ids, special ones included, instead of texts")
    one.add_argument("--output-dtype", choices=("float32", "float16"), default="float32", help="of the embeddings")
    one.add_argument("--pooling", choices=fastdistil.ops.POOLING, help="default: the checkpoint's, else mean")
    one.add_argument("--normalize", action=argparse.BooleanOptionalAction, help="default: the checkpoint's, else no")
    one.add_argument("--max-length", type=positive, help="tokens a text is cut to (default: the checkpoint's)")
    one.add_argument("--truncate-dim", type=positive, help="so many numbers of each embedding are kept")
    _prompts(one)
    one.add_argument("--engine", choices=("local", "ray"), default="local", help="this machine, or a Ray cluster")
    one.add_argument("--ray-address", help="of a running cluster, or auto (default: one is started here)")
    one.add_argument("--ray-actors", type=positive, help="default: one a GPU of the cluster, or one a CPU")
    one.add_argument("--tokenizer-processes", type=natural, default=0, help="more processes that tokenise (default: 0)")
    _placement(one)

    two = commands.add_parser("search", help="find the texts of an index nearest to a query")
    two.set_defaults(command=search)
    two.add_argument("--index", required=True, type=to_directory, help="directory written by fastdistil embed")
    two.add_argument("--model", help="checkpoint (default: the one the index was made with)")
    two.add_argument("--top-k", type=positive, default=3)
    two.add_argument("--json", action="store_true", help="print a JSON object a query")
    two.add_argument("query", nargs="+")
    _prompts(two)
    _placement(two)

    four = commands.add_parser("predict", help="answer a task for every text, a JSON object a line or into a directory")
    four.set_defaults(command=predict)
    four.add_argument("--task", required=True, choices=[*TASKS, *ALIASES])
    _job(four, ANSWERS, "jsonl")
    four.add_argument(
        "--output", type=to_directory, help="directory for the parts (default: JSON lines on standard output)"
    )
    four.add_argument("--question", help="question-answering: what to ask of every text")
    four.add_argument("--question-column", help="question-answering: column of each text's question")
    four.add_argument("--top-k", type=positive, help="so many answers a text")
    four.add_argument("--aggregation-strategy", choices=TokenClassificationPipeline.strategies, default="simple")
    _placement(four)

    seven = commands.add_parser("merge", help="join the shards of a job")
    seven.set_defaults(command=join)
    seven.add_argument("shards", nargs="+", type=to_directory, help="their directories, or the one they lie in")
    seven.add_argument("--output", required=True, type=to_directory)
    seven.add_argument("--overwrite", action="store_true", help="replace what a job wrote there")
    seven.add_argument("--quiet", action="store_true", help="nothing on standard error but errors")

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

    eight = commands.add_parser(
        "bench", help="measure speed, from a clone of the repository; without a subject it lists them"
    )
    eight.set_defaults(command=bench)
    eight.add_argument("subject", nargs="?", help="kernels, encoder, engine and others; listed without one")
    eight.add_argument("rest", nargs=argparse.REMAINDER, help="the subject's own options")

    three = commands.add_parser("doctor", help="show what fastdistil runs on here, and why")
    three.set_defaults(command=doctor)
    return top


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def to_directory(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("it is empty; is a variable unset?")
    return Path(text)


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is not 0 or more")
    return value


def _job(command: argparse.ArgumentParser, formats: tuple[str, ...], default: str) -> None:
    command.add_argument("--model", required=True, help="checkpoint directory or hub id")
    command.add_argument(
        "--input",
        required=True,
        nargs="+",
        help="files (.txt, a text a line; .jsonl, .csv, .tsv, also .gz, .zst; .parquet), directories, patterns, or -",
    )
    command.add_argument("--input-format", choices=KINDS, help="of standard input and files of other names")
    command.add_argument("--text-column", default="text", help="column of the text (default: text)")
    command.add_argument("--id-column", help="column of the id (default: the row's number)")
    command.add_argument("--format", choices=formats, default=default, help=f"of the parts (default: {default})")
    command.add_argument("--truncate", action=argparse.BooleanOptionalAction, default=True, help="cut texts too long")
    command.add_argument("--max-batch-tokens", type=positive, help="default: 2048 on CPU, about 16896 on CUDA")
    command.add_argument(
        "--on-error",
        choices=ON_ERROR,
        default="fail",
        help="an unusable row ends the job (fail), is left out (skip), or has no answer (null)",
    )
    existing = command.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on behind the parts that are finished")
    existing.add_argument("--overwrite", action="store_true", help="replace what a job wrote there")
    command.add_argument(
        "--num-shards", type=positive, help="divide the input (default: WORLD_SIZE where RANK is set, else 1)"
    )
    command.add_argument(
        "--shard-index", type=natural, help="which of them this is (default: RANK where WORLD_SIZE is set)"
    )
    command.add_argument("--json-logs", action="store_true", help="JSON objects on standard error")


def _prompts(command: argparse.ArgumentParser) -> None:
    one = command.add_mutually_exclusive_group()
    one.add_argument("--prompt", help="put before every text (default: the checkpoint's default prompt, if any)")
    one.add_argument("--prompt-name", help="one of the checkpoint's prompts")


def _placement(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", help="cpu, cuda, cuda:N; cuda:0,1 for a process each (default: cuda if there)")
    command.add_argument("--dtype", choices=("auto", "float32", "float16", "bfloat16", "int8"), default="auto")
    command.add_argument("--quiet", action="store_true", help="nothing on standard error but errors")


def embed(arguments: argparse.Namespace) -> int | None:
    if arguments.engine != "ray" and (arguments.ray_address or arguments.ray_actors):
        raise WrongUse("--ray-address and --ray-actors go with --engine ray")
    if arguments.tokens_column is not None and not (arguments.prompt is arguments.prompt_name is None):
        raise WrongUse("--prompt and --prompt-name go with texts, not with --tokens-column")
    if several := _on_several_devices(arguments):
        return several.status
    log = Log(arguments.quiet, arguments.json_logs)
    embedder = Embedder.from_pretrained(
        arguments.model,
        arguments.device,
        arguments.dtype,
        arguments.pooling,
        arguments.normalize,
        arguments.max_length,
        prompt=arguments.prompt,
        prompt_name=arguments.prompt_name,
        truncate_dim=arguments.truncate_dim,
    )
    log.say(f"{arguments.model} on {embedder.describe()}")
    columns = _columns(arguments, tokens=arguments.tokens_column)
    work: Any
    if arguments.engine == "ray":
        from fastdistil.jobs.ray import RayEmbedding

        if not arguments.truncate or arguments.tokens_column is not None:
            raise WrongUse("--engine ray takes texts, and cuts them; leave --no-truncate and --tokens-column out")
        work = RayEmbedding(
            embedder,
            arguments.format,
            address=arguments.ray_address,
            actors=arguments.ray_actors,
            max_batch_tokens=arguments.max_batch_tokens,
            dtype=arguments.output_dtype,
            model_dtype=arguments.dtype,
        )
    else:
        work = Embedding(
            embedder,
            arguments.format,
            max_batch_tokens=arguments.max_batch_tokens,
            truncate=arguments.truncate,
            dtype=arguments.output_dtype,
            tokenizer_processes=arguments.tokenizer_processes,
            of_tokens=arguments.tokens_column is not None,
        )
    settings = {
        "pooling": embedder.pooling,
        # cut vectors are normalised by the checkpoint before, or as was asked after
        "normalize": embedder.normalize if embedder.truncate_dim is None else arguments.normalize,
        "max_length": embedder.max_length,
        "prompt": embedder.prompt,
        "truncate_dim": embedder.truncate_dim,
        "lower_case": embedder.lower_case,
        "output_dtype": arguments.output_dtype,
        "max_batch_tokens": work.engine.budget,
        "engine": arguments.engine,
    }
    return _run(arguments, "embed", columns, work, embedder.model, settings, log)


def _columns(arguments: argparse.Namespace, **more: str | None) -> Columns:
    return Columns(arguments.text_column, arguments.id_column, kind=arguments.input_format, **more)


def _run(
    arguments: argparse.Namespace, task: str, columns: Columns, work: Any, model: Any, settings: dict, log: Log
) -> int:
    directory = find(arguments.model)
    shard, shards = _shard(arguments)
    if shards > 1 and "-" in arguments.input:
        raise WrongUse("standard input cannot be split into shards; give files")
    device = model.device
    on_cpu = device.type == "cpu"
    fingerprint = settings | {
        "model_digest": fingerprint_of_model(directory, arguments.output),
        "fastdistil": fastdistil.__version__,
        "torch": torch.__version__,
        "tokenizers": importlib.metadata.version("tokenizers"),
        "dtype": model.precision,
        "device": "cpu" if on_cpu else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads() if on_cpu else None,
        "truncate": arguments.truncate,
        **getattr(work, "placed", {}),  # elsewhere, by actors
    }
    job = Job(
        inputs=arguments.input,
        output=arguments.output,
        task=task,
        model=str(directory.resolve()) if Path(arguments.model).is_dir() else arguments.model,
        format=arguments.format,
        fingerprint=fingerprint,
        columns=columns,
        on_error=arguments.on_error,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        shard=shard,
        shards=shards,
        part_characters=A_TOKENS_CHARACTERS if task in A_TOKEN else PART_CHARACTERS,
    )
    try:
        return _status(run_job(job, work, log))
    finally:
        log.close()


def _status(manifest: Manifest) -> int:
    """torchrun takes any status but 0 for a failure, and ends the other processes."""
    return REJECTED if manifest.rejected and "TORCHELASTIC_RUN_ID" not in os.environ else DONE


def _shard(arguments: argparse.Namespace) -> tuple[int, int]:
    """Which part of the input this process takes: (number, of how many). RANK and WORLD_SIZE stand in for the options;
    then each process has a directory of its own below the output."""
    shard, shards = arguments.shard_index, arguments.num_shards
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank and world and (shard is None or shards is None):
        try:
            own, processes = int(rank), int(world)
        except ValueError:
            raise WrongUse(f"RANK and WORLD_SIZE are {rank!r} and {world!r}, not integers") from None
        if shards not in (None, processes):
            raise WrongUse(f"--num-shards is {shards}, but WORLD_SIZE {processes}; give --shard-index, too")
        shards = processes
        if shard is None:
            shard = own
            arguments.output = shard_directory(arguments.output, shard, shards) if shards > 1 else arguments.output
    if shard is None and shards in (None, 1):
        return 0, 1
    if shard is None or shards is None:
        raise WrongUse("--num-shards and --shard-index go together, or RANK and WORLD_SIZE")
    if not 0 <= shard < shards:
        raise WrongUse(f"shard {shard} is none of {shards}; they are numbered from 0")
    return shard, shards


class _Several:
    def __init__(self, status: int):
        self.status = status


def _on_several_devices(arguments: argparse.Namespace) -> _Several | None:
    """Runs the command once a device, where several are named."""
    try:
        devices = split_devices(arguments.device)
    except ValueError as error:
        raise WrongUse(str(error)) from error
    if len(devices) == 1:
        return None
    if arguments.output is None:
        raise WrongUse("several devices need an --output directory")
    if "-" in arguments.input:
        raise WrongUse("standard input cannot be divided among devices; give files")
    shard, shards = _shard(arguments)
    apart(arguments.input, find_inputs(arguments.input), arguments.output)
    rejected = run_on(
        devices,
        arguments.argv,
        arguments.output,
        shard=shard,
        shards=shards,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
    )
    return _Several(REJECTED if rejected else DONE)


def join(arguments: argparse.Namespace) -> int:
    merged = merge(arguments.shards, arguments.output, overwrite=arguments.overwrite)
    say(arguments, f"{merged.rows:,} rows in {len(merged.parts)} parts, {merged.rejected:,} rejected")
    return _status(merged)


def search(arguments: argparse.Namespace) -> None:
    index = Index(arguments.index)
    made = index.manifest
    names = "pooling", "normalize", "max_length", "truncate_dim"
    settings: dict[str, Any] = {name: made.settings.get(name) for name in names}
    embedder = Embedder.from_pretrained(
        arguments.model or made.model,
        arguments.device,
        arguments.dtype,
        prompt=arguments.prompt,
        prompt_name=arguments.prompt_name,
        **settings,
    )
    if embedder.dim != made.dim:
        raise ValueError(f"{arguments.model or made.model} gives {embedder.dim} dimensions, the index has {made.dim}")
    say(arguments, f"{made.rows:,} texts, query on {embedder.describe()}")
    found = index.search(embedder.encode(arguments.query, show_progress=False), arguments.top_k)
    for query, hits in zip(arguments.query, found, strict=True):
        if arguments.json:
            print(_as_json({"query": query, "hits": [{"id": i, "score": s} for i, s in hits]}))
        else:
            print(query, *(f"  {score:.3f}  {identity}" for identity, score in hits), sep="\n")


def predict(arguments: argparse.Namespace) -> int | None:
    task = ALIASES.get(arguments.task, arguments.task)
    asked = [arguments.question, arguments.question_column]
    if len(asked) - asked.count(None) != (task == "question-answering"):
        raise WrongUse("--question or --question-column goes with --task question-answering, and only with it")
    if arguments.output is None:
        for name in ("resume", "overwrite", "num_shards", "shard_index"):
            if getattr(arguments, name):
                raise WrongUse(f"--{name.replace('_', '-')} goes with --output, a directory")
        if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
            raise WrongUse("several processes (WORLD_SIZE) need an --output directory; each would print every answer")
        if arguments.on_error != "fail":
            raise WrongUse("--on-error skip and null go with --output, a directory")
        if sys.stdout is None:
            raise WrongUse("standard output is closed; give --output, a directory")
    if several := _on_several_devices(arguments):
        return several.status
    options: dict[str, Any] = {}
    if arguments.top_k is not None:
        if task in ("token-classification", "feature-extraction"):
            raise WrongUse(f"--top-k is not for --task {task}")
        options["top_k"] = arguments.top_k
    if task == "token-classification":
        options["aggregation_strategy"] = arguments.aggregation_strategy
        if not arguments.truncate and arguments.aggregation_strategy == "none":
            raise WrongUse("--no-truncate needs an --aggregation-strategy other than none, for windows overlap")
    elif task != "question-answering":
        options["truncation"] = arguments.truncate
    answer = _pipeline(arguments, task)
    if task == "token-classification" and not arguments.truncate:
        options["stride"] = min(SHARED, answer._limit() // 4)
    columns = _columns(arguments, question=arguments.question_column)
    if arguments.output is not None:
        work = Prediction(answer, task, arguments.format, options, arguments.question)
        settings = {
            "options": options,
            "question": arguments.question,
            "max_batch_tokens": answer._engine().budget,
        }
        log = Log(arguments.quiet, arguments.json_logs)
        return _run(arguments, task, columns, work, answer.encoder, settings, log)
    for chunk in _chunks(checked(read_rows(arguments.input, columns))):
        _answer_until_wrong(answer, chunk, arguments.question, options)
    return None


def _answer_until_wrong(answer: Any, chunk: list[Row], question: str | None, options: dict[str, Any]) -> None:
    try:
        _print_answers(answer, chunk, question, options)
    except (ValueError, TypeError, MemoryError) as error:
        kind = type(error) if isinstance(error, (TypeError, MemoryError)) else ValueError
        named = re.search(r"\b(?:inputs|text)\[(\d+)\]", str(error))
        if named is None:
            raise kind(f"of the texts from {chunk[0].where} on, {error}") from error
        wrong = int(named[1])
        if wrong:  # what comes before it is answered, as far as nothing else is wrong there
            _answer_until_wrong(answer, chunk[:wrong], question, options)
        message = str(error).replace(named[0], chunk[wrong].where, 1)
        raise kind(message.replace("pass truncation=True", "leave --no-truncate out")) from error


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """TOKENIZE rows at a time; what comes before a row that cannot be read comes before its error."""
    chunk: list[Row] = []
    try:
        for row in rows:
            chunk.append(row)
            if len(chunk) == TOKENIZE:
                yield chunk
                chunk = []
    except (ValueError, TypeError, OSError):
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def _as_json(value: Any) -> str:
    """Letters as they are where the output can hold them."""
    encoding = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "")
    return json.dumps(value, ensure_ascii=encoding != "utf8", default=float)


def _print_answers(answer: Any, rows: list[Row], question: str | None, options: dict[str, Any]) -> None:
    texts: list[Any] = [row.text for row in rows]
    if isinstance(answer, QuestionAnsweringPipeline):
        texts = [{"question": row.question if question is None else question, "context": row.text} for row in rows]
    results = answer(texts, **options)
    if len(texts) == 1 and isinstance(answer, (FillMaskPipeline, QuestionAnsweringPipeline)):
        results = [results]  # which do not wrap a single answer
    for row, result in zip(rows, results, strict=True):
        print(_as_json({"id": row.id, "result": result}))


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
            print(_as_json({"text": text, "result": found}))
            continue
        print(text)
        for guesses in found if isinstance(found[0], list) else [found]:
            print(
                *(f"  {guess['score']:.4f}  {guess['token_str']:14} {guess['sequence']}" for guess in guesses), sep="\n"
            )


def check(arguments: argparse.Namespace) -> None:
    texts = None
    if arguments.input:
        texts = [row.text for row in islice(checked(read_rows(arguments.input, Columns(arguments.text_column))), 64)]
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
    Log(arguments.quiet, getattr(arguments, "json_logs", False)).say(f"{arguments.model} on {describe(found.encoder)}")
    return found


def say(arguments: argparse.Namespace, text: str) -> None:
    if not arguments.quiet and sys.stderr is not None:  # print would take standard output in its place
        print(text, file=sys.stderr)


def bench(arguments: argparse.Namespace) -> int:
    """`python -m benchmarks`, which is part of the repository but not of the package."""
    root = Path(fastdistil.__file__).resolve().parent.parent
    if not (root / "benchmarks" / "__main__.py").is_file():
        raise FileNotFoundError(f"the benchmarks are not in {root}; run this in a clone of the repository")
    command = [sys.executable, "-m", "benchmarks", *filter(None, [arguments.subject]), *arguments.rest]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=False).returncode


def doctor(arguments: argparse.Namespace) -> None:
    """Versions, devices, compiler, cache, and for each op what runs it on each device."""
    lines = [
        ("fastdistil", fastdistil.__version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", torch.__version__),
        ("triton", _target.triton_version() or "not installed"),
        ("cpu threads", str(torch.get_num_threads())),
        ("cpu products", f"by torch ({kept})" if (kept := cpu.why_not_onednn()) else "float32 by oneDNN"),
        (
            "cpu bfloat16",
            f"multiplied by the processor{' (AMX)' if cpu.has('amx_tile') else ''}"
            if cpu.has("avx512_bf16")
            else "not multiplied by this processor",
        ),
        ("cpu int8", "multiplied by the processor (VNNI)" if cpu.sums_int8() else "by float32 products: no VNNI"),
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
