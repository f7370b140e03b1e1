"""What is measured: DistilBERT-base unless told otherwise, the most telling shapes first, and a toy of each for CPU."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.record import WrongUse
from benchmarks.roofline import BASE, Shape

LENGTHS = (128, 512, 64, 32, 256, 16)
FORMS = ("fixed", "uniform", "long-tailed")
ATTENDED = 16_896  # rows of attention and of the row kernels


@dataclass(frozen=True)
class Matrix:
    """The sizes of one run."""

    shape: Shape
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    attended: int
    batches: tuple[int, ...]
    fills: tuple[float, ...]
    dtypes: tuple[torch.dtype, ...]
    docstrings: int = 0  # texts in a batch of real lengths
    seconds: float = 0.1  # that a timing takes


FULL = Matrix(
    BASE,
    rows=(16_896, 5_632, 8_192, 32_768, 1_024, 4_096, 11_264, 256, 64, 32, 16, 512, 128),
    lengths=LENGTHS,
    attended=ATTENDED,
    batches=(256, 1, 32, 8),
    fills=(1.0, 0.5, 0.25),
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    docstrings=256,
)
TOY = Matrix(
    Shape(32, 64, 2, 2),
    rows=(16, 40),
    lengths=(16, 8),
    attended=48,
    batches=(2, 1),
    fills=(1.0, 0.5),
    dtypes=(torch.float32,),
    seconds=0.005,
)

# what a CPU does in minutes; the op's shapes of a batch, not of a GPU's waves
ON_CPU = Matrix(
    BASE,
    rows=(2_048, 256, 16),
    lengths=(128, 32, 256, 16),
    attended=2_048,
    batches=(16, 1, 4),
    fills=(1.0, 0.75, 0.5, 0.25),
    dtypes=(torch.float32,),
    docstrings=32,
)


def lengths(form: str, longest: int, tokens: int, seed: int = 0) -> list[int]:
    """Lengths of sequences of at most `longest` that add up to `tokens`, or to a little less where none other fits.

    fixed: all alike. uniform: 1 to `longest`. long-tailed: many short, few long, as texts are (log-normal).
    """
    if form == "fixed":
        return [longest] * max(1, tokens // longest)
    g = torch.Generator().manual_seed(seed)
    found: list[int] = []
    left = tokens
    for n in _draws(form, longest, g):
        n = min(n, left)
        if n == 0:
            return found
        found.append(n)
        left -= n
    raise AssertionError("draws do not end")


def _draws(form: str, longest: int, g: torch.Generator) -> Iterator[int]:
    while True:
        if form == "uniform":
            yield int(torch.randint(1, longest + 1, (), generator=g))
        elif form == "long-tailed":
            yield max(1, min(longest, int(longest / 6 * torch.randn((), generator=g).exp())))
        else:
            raise ValueError(f"{form!r} is none of {', '.join(FORMS)}")


def with_dtypes(matrix: Matrix, names: list[str]) -> Matrix:
    """The matrix in the precisions named; raises WrongUse for what is none."""
    known = {str(dtype).removeprefix("torch."): dtype for dtype in FULL.dtypes}
    if unknown := [name for name in names if name not in known]:
        raise WrongUse(f"--dtypes: {unknown[0]!r} is none of {', '.join(known)}")
    return replace(matrix, dtypes=tuple(known[name] for name in names))
