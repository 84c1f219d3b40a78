"""What the Triton kernels share: products and casts that mean the same compiled and interpreted."""

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Triton's interpreter (3.7) multiplies bfloat16 as the integers that hold it, cuts where it should round to bfloat16, and
# rounds to e4m3 without carrying into the exponent; it knows no NaN there.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@tl.core.builtin
def _wait(_semantic=None):
    """Nothing where the architecture has no such instructions. Known at compile time, without a GPU."""
    if int("".join(filter(str.isdigit, _semantic.builder.options.arch))) >= 90:
        gdc_launch_dependents(_semantic=_semantic)
        gdc_wait(_semantic=_semantic)


@triton.jit
def wait_for_inputs():
    """The first line of every kernel: nothing before it may read or write memory.

    On Hopper and later a kernel may be started while the one before it still runs (programmatic dependent launch); here it
    waits for that one's results, and lets the next one be started. Without such a launch it does nothing.
    """
    if not INTERPRETED:
        _wait()


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32. Narrow operands are widened for the interpreter, which leaves every product exact."""
    if INTERPRETED:
        if a.dtype == tl.float8e4nv:
            return tl.dot(_from_e4m3(a), _from_e4m3(b), acc, input_precision="ieee")
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    if a.dtype == tl.float8e4nv:
        # Hopper adds e4m3 products in fewer bits than float32 has: after 128 of them the sum goes on in registers
        return tl.dot(a, b, acc, max_num_imprecise_acc=a.shape[1] if a.shape[1] < 128 else 128)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 x cast to `dtype`, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def to_e4m3(x):
    """float32 x as e4m3, to nearest even, at most its 448; NaN stays NaN."""
    x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        sign = (bits >> 24) & 0x80
        bits = bits & 0x7FFFFFFF
        size = bits.to(tl.float32, bitcast=True)
        # rounded to three bits of significand, then the exponent's bias changed from 127 to 7
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        # below 2^-6 steps of 2^-9; adding 1.5 * 2^14 rounds to them
        small = (((size + 24576.0) - 24576.0) * 512.0).to(tl.uint32)
        code = tl.where(size < 0.015625, small, normal)
        code = tl.where(bits > 0x7F800000, 0x7F, code)
        return (code | sign).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return x.to(tl.float8e4nv)


@triton.jit
def _from_e4m3(x):
    """e4m3 -> float32, for the interpreter."""
    code = x.to(tl.uint8, bitcast=True)
    return tl.where((code & 0x7F) == 0x7F, float("nan"), x.to(tl.float32))
