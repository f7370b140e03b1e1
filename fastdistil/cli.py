"""The command line: fastdistil embed, search, doctor."""

import argparse
import json
import logging
import platform
import sys
import time
from pathlib import Path

import torch

import fastdistil
from fastdistil._register import FORMS
from fastdistil.engine import Embedder
from fastdistil.jobs.embed import embed_rows, report
from fastdistil.jobs.index import FORMATS, Index
from fastdistil.jobs.readers import read_rows
from fastdistil.kernels import _target

DONE, FAILED = 0, 1  # argparse itself exits with 2 on wrong use


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        arguments.command(arguments)
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
