"""What the Triton kernels share: products and casts that mean the same compiled and interpreted."""

import triton
import triton.language as tl
from triton import knobs

# Triton's interpreter (3.7) multiplies bfloat16 as the integers that hold it, and cuts where it should round to bfloat16.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32. Operands of 16 bits are widened for the interpreter, which leaves every product exact."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 x cast to `dtype`, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)
