"""What tests and benchmarks share: the error law and inputs for packed ops."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistil import ops, reference


def error_law(
    result: Tensor,
    eager: Tensor,
    truth: Tensor,
    eps: float | None = None,
    largest: float = 2.0,
    mean: float = 1.5,
    factor: float | None = None,
) -> None:
    """Assert that `result` errs little more than eager torch in the same precision.

    truth is the float64 definition. max|result - truth| <= largest max|eager - truth| + eps max|truth|, and
    mean|result - truth| <= mean mean|eager - truth| + eps mean|truth|, where eps is the result dtype's machine epsilon.
    largest is 2, and 4 where only the order of a sum differs from eager's, as in oneDNN's products on CPU. What is
    off in one direction, as by a factor, is held closer than rounding, which goes both ways (`_bias`): to factor eps,
    by default a quarter, and all of float32's, by which libraries' exp and erf are off. In TF32 it is 2: tensor cores
    cut operands off, where a library may round them first.
    """
    assert truth.dtype is torch.float64 and result.shape == truth.shape == eager.shape
    assert result.dtype is eager.dtype, f"the result is {result.dtype}, eager's is {eager.dtype}"
    eps = torch.finfo(result.dtype).eps if eps is None else eps
    ours, theirs, scale = (result.double() - truth).abs(), (eager.double() - truth).abs(), truth.abs()
    assert torch.isfinite(ours).all(), "the result is not finite"
    if ours.numel() == 0:
        return
    for name, bound, of in (("max", largest, torch.max), ("mean", mean, torch.mean)):
        allowed = bound * of(theirs) + eps * of(scale)
        assert of(ours) <= allowed, f"{name} error {of(ours):.3e}, allowed {allowed:.3e} (eager {of(theirs):.3e})"
    off, plain, noise = _bias(result, truth), _bias(eager, truth), eps * 4 * _spread(truth)
    most = 2 * abs(plain) + eps * (FACTOR[eps < 1e-4] if factor is None else factor) + noise
    assert abs(off) <= most, f"as if multiplied by 1 + {off:.3e}, error allowed {most:.3e} (eager {plain:.3e})"


FACTOR = {False: 0.25, True: 1.0}  # by whether it is float32's eps


def _bias(result: Tensor, truth: Tensor) -> float:
    """By how much the multiple of truth that is nearest to the result differs from it."""
    power = float((truth * truth).sum())
    return float(((result.double() - truth) * truth).sum()) / power if power else 0.0


def _spread(truth: Tensor) -> float:
    """By how much less the bias of errors of one size varies than they do: one by the root of how many elements
    count."""
    squares = truth * truth
    power = float(squares.sum())
    return float((squares * squares).sum()) ** 0.5 / power if power else 0.0


def cu_seqlens(lengths: list[int], device: str = "cpu") -> Tensor:
    """int32 [len(lengths) + 1]: where each sequence starts, and the live count."""
    return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


def poison(rows: Tensor, dead: int) -> Tensor:
    """The rows with `dead` more behind them, of NaN, or for ids of nonsense."""
    value = float("nan") if rows.is_floating_point() else 2**30
    return torch.cat([rows, rows.new_full((dead, *rows.shape[1:]), value)])


def hold_to_definition(
    op: str,
    *args: Any,
    live: int | None = None,
    dead: int = 0,
    rows: Sequence[int] = (0,),
    form: Any = None,
    eps: float | None = None,
    **bounds: float,
) -> Tensor:
    """Assert that an op's result obeys the error law against its float64 definition, and return it.

    args: without dead rows; those at the places in `rows` get `dead` poisoned rows more before the op sees them.
    live: how many rows of the result to compare, by default all. form: what runs, by default `ops.<op>`. eps: the
    machine epsilon to allow for, by default the arguments' dtype's. bounds: of `error_law`.
    """
    eager = getattr(reference, op)(*args)[:live]
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    truth = getattr(reference, op)(*wide)[:live]
    given = [poison(a, dead) if i in rows and dead else a for i, a in enumerate(args)]
    result = (form or getattr(ops, op))(*given)
    dtype = next(a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point())
    error_law(result[:live], eager, truth, eps=torch.finfo(dtype).eps if eps is None else eps, **bounds)
    return result
