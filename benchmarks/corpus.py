"""The docstring corpus: every documented module, class and function of the running Python's standard library.

python -m benchmarks.corpus FILE.jsonl    writes {"name": ..., "text": "name: docstring"} a line
"""

import ast
import json
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdistil import DistilBertTokenizer

NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "_pyrepl"}
VOCABULARY = 30_522
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def stdlib_docstrings() -> list[tuple[str, str]]:
    """(qualified name, "qualified name: docstring") of all definitions, found by reading the sources."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if NOT_LIBRARY.intersection(parts):
            continue
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates and deliberately broken sources
            continue
        found += [(name, f"{name}: {text}") for name, text in _documented(tree, module)]
    return found


def _documented(node: Documented, name: str) -> Iterator[tuple[str, str]]:
    if text := ast.get_docstring(node):
        yield name, text
    for child in _definitions(node):
        yield from _documented(child, f"{name}.{child.name}")


def _definitions(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """The classes and functions in a body, also under its conditions and in its try and with blocks."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from _definitions(child)


def tokenizer_for(texts: list[str], size: int = VOCABULARY) -> "DistilBertTokenizer":
    """WordPiece trained on the texts, lower case."""
    from tokenizers.implementations import BertWordPieceTokenizer

    from fastdistil import DistilBertTokenizer

    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(iter(texts), vocab_size=size, special_tokens=list(SPECIAL), show_progress=False)
    with tempfile.TemporaryDirectory() as directory:
        trained.save_model(directory)
        return DistilBertTokenizer.from_pretrained(directory)


@cache
def docstring_lengths(texts: int, longest: int, vocabulary: int = VOCABULARY) -> tuple[int, ...]:
    """Tokens of so many docstrings from all over the corpus, cut at `longest`."""
    corpus = [text for _, text in stdlib_docstrings()]
    chosen = [corpus[i * len(corpus) // texts] for i in range(texts)]
    ids = tokenizer_for(corpus, vocabulary)(chosen, truncation=True, max_length=longest)["input_ids"]
    return tuple(map(len, ids))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    rows = stdlib_docstrings()
    lines = (json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n" for name, text in rows)
    target.write_text("".join(lines), encoding="utf-8")
    print(f"{len(rows)} docstrings of the standard library of Python {sys.version.split()[0]} in {target}")
