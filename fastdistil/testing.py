"""What tests and benchmarks share: the error law and inputs for packed ops."""

import torch
from torch import Tensor


def error_law(result: Tensor, eager: Tensor, truth: Tensor, eps: float | None = None) -> None:
    """Assert that `result` errs little more than eager torch in the same precision.

    truth is the float64 definition. max|result - truth| <= 2 max|eager - truth| + eps max|truth|, and
    mean|result - truth| <= 1.5 mean|eager - truth| + eps mean|truth|, where eps is the result dtype's machine epsilon.
    """
    assert truth.dtype is torch.float64 and result.shape == truth.shape == eager.shape
    eps = torch.finfo(result.dtype).eps if eps is None else eps
    ours, theirs, scale = (result.double() - truth).abs(), (eager.double() - truth).abs(), truth.abs()
    assert torch.isfinite(ours).all(), "the result is not finite"
    if ours.numel() == 0:
        return
    for name, bound, of in (("max", 2.0, torch.max), ("mean", 1.5, torch.mean)):
        allowed = bound * of(theirs) + eps * of(scale)
        assert of(ours) <= allowed, f"{name} error {of(ours):.3e}, allowed {allowed:.3e} (eager {of(theirs):.3e})"


def cu_seqlens(lengths: list[int], device: str = "cpu") -> Tensor:
    """int32 [len(lengths) + 1]: where each sequence starts, and the live count."""
    return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
