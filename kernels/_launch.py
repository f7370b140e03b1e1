"""How a kernel begins where its launch may overlap the kernel before it."""

import triton
import triton.language as tl


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """Waits for the kernel before and all that it wrote, then lets the next one be launched. In this order none begins
    before the last but one has ended, so that whatever memory is taken again is free."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
