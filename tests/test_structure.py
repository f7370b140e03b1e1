"""Imports point one way, and the package works installed, editable and uninstalled."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# module (or package) -> what it may import of the project
ALLOWED = {
    "kernels": {"kernels"},
    "reference": set(),
    "_register": set(),
    "outputs": set(),
    "batch_encoding": set(),
    "config": set(),
    "packing": {"_register", "ops"},
    "graphs": set(),
    "testing": {"ops", "reference"},
    "cpu": {"reference"},
    "int8": {"cpu", "reference"},
    "ops": {"_register", "kernels", "cpu", "reference"},
    "checkpoint": {"config", "cpu"},
    "adapters": {"checkpoint", "ops"},
    "plain": {"int8"},
    "side_by_side": {"cpu", "plain"},
    "layers": {"adapters", "config", "cpu", "int8", "ops", "outputs", "packing", "plain", "side_by_side"},
    "pretrained": {"adapters", "checkpoint", "config", "int8", "layers"},
    "inputs": {"_register", "ops"},
    "model": {
        *("_register", "config", "cpu", "graphs", "inputs", "layers", "ops", "outputs", "packing", "plain"),
        "pretrained",
    },
    "heads": {
        *("_register", "adapters", "checkpoint", "config", "inputs", "layers", "model", "outputs", "plain"),
        "pretrained",
    },
    "flexible_heads": {
        *("adapters", "checkpoint", "config", "heads", "inputs", "model", "outputs", "pretrained"),
    },
    "integrations": {"_register", "config", "integrations", "layers", "ops", "packing", "plain"},
    "verify": {"checkpoint", "flexible_heads", "model", "pretrained", "tokenizer"},
    "tokenizer": {"batch_encoding", "checkpoint"},
    "pipelines": {"checkpoint", "engine", "flexible_heads", "heads", "model", "plain", "pretrained", "tokenizer"},
    "engine": {
        *("_register", "checkpoint", "cpu", "engine", "graphs", "model", "ops", "plain", "pretrained", "tokenizer"),
    },
    "jobs": {"jobs", "engine", ""},
    "cli": {"jobs", "engine", "cpu", "checkpoint", "kernels", "pipelines", "verify", "_register", "ops", ""},
    "__main__": {"cli"},
    "__init__": {
        *("config", "engine", "flexible_heads", "heads", "integrations", "model", "ops", "pipelines", "tokenizer"),
    },
}


def sources():
    yield from ((path.relative_to(ROOT / "fastdistil"), path) for path in (ROOT / "fastdistil").glob("*.py"))
    for package in ("engine", "jobs", "integrations"):
        yield from (
            (path.relative_to(ROOT / "fastdistil"), path) for path in (ROOT / "fastdistil" / package).glob("*.py")
        )
    yield from ((Path("kernels") / path.name, path) for path in (ROOT / "kernels").glob("*.py"))


def imported(path):
    """Project modules a file imports anywhere, in functions too: "" is the package itself."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "fastdistil":
                yield ([*name.split("."), ""])[1]


def test_imports_point_one_way():
    seen = set()
    for relative, path in sources():
        module = relative.parts[0].removesuffix(".py")
        seen.add(module)
        for name in imported(path):
            allowed = ALLOWED[module] | ({module} if len(relative.parts) > 1 else set())
            assert name in allowed, f"{relative} imports fastdistil.{name}"
    assert seen == set(ALLOWED)
    assert not (ROOT / "kernels" / "__init__.py").exists()


def python(code, cwd, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


WHERE = "import fastdistil, fastdistil.kernels._target as k; print(fastdistil.__file__); k.missing_compiler()"


def test_wheel(tmp_path):
    pytest.importorskip("build")
    tree = tmp_path / "tree"
    shutil.copytree(
        ROOT,
        tree,
        symlinks=True,
        ignore=lambda d, names: {n for n in names if n in {".venv", ".git", "build", ".demo"}},
    )
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, tree],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("fastdistil/kernels/_target.py", "fastdistil/py.typed", "fastdistil/jobs/run.py"):
        assert name in names
    assert not any(n.startswith(("kernels/", "tests/", "benchmarks/")) for n in names)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert str(tmp_path / "site") in python(WHERE, tmp_path, PYTHONPATH=str(tmp_path / "site"))


def test_uninstalled_from_the_root_beside_the_kernels_package(tmp_path):
    """PyPI's `kernels`, which transformers imports, must win over this tree's kernels/ directory."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("HERE = 'the other package'")
    path = f"{ROOT}{os.pathsep}{tmp_path}"
    assert python("import kernels; print(kernels.HERE)", ROOT, PYTHONPATH=path) == "the other package"
    assert str(ROOT) in python(WHERE, ROOT, PYTHONPATH=".")
    pytest.importorskip("transformers")
    python("from transformers import DistilBertModel", ROOT, PYTHONPATH=".")


def test_importing_is_light():
    loaded = python("import sys, fastdistil; print(*sys.modules)", ROOT, PYTHONPATH=".").split()
    assert not {"transformers", "torch._dynamo", "pandas", "pyarrow", "triton"} & set(loaded)
