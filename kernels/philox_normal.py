"""Standard normal numbers from a counter: one Philox 4x32-10 block and two Box-Muller pairs a lane, in float64."""

import triton
import triton.language as tl
from dit4dit.kernels.common import wait_for_inputs

TWO_PI = tl.constexpr(6.283185307179586)


@triton.jit
def philox_normal(
    requests,  # int64 [batch, 3]: seed, chunk, whether the sample is given and stays as it is
    first,  # float32 [batch, first_count]
    first_count,
    first_draw,  # which of a request's draws
    first_end,  # thread blocks of this draw and of those before it
    second,  # likewise, or None
    second_count,
    second_draw,
    second_end,
    third,
    third_count,
    third_draw,
    BLOCK: tl.constexpr,
):
    wait_for_inputs()
    block = tl.program_id(0)
    out, count, draw, begin = first, first_count, first_draw, 0
    if second is not None:
        here = block >= first_end
        out, count = tl.where(here, second, out), tl.where(here, second_count, count)
        draw, begin = tl.where(here, second_draw, draw), tl.where(here, first_end, begin)
    if third is not None:
        here = block >= second_end
        out, count = tl.where(here, third, out), tl.where(here, third_count, count)
        draw, begin = tl.where(here, third_draw, draw), tl.where(here, second_end, begin)

    sample = tl.program_id(1)
    seed = tl.load(requests + 3 * sample)
    chunk = tl.load(requests + 3 * sample + 1)
    # of a given sample nothing is inside
    inside = tl.where(tl.load(requests + 3 * sample + 2) == 0, count, 0)
    position = (block - begin) * BLOCK + tl.arange(0, BLOCK)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0 = position.to(tl.uint32)
    c1 = (tl.zeros([BLOCK], tl.int32) + draw).to(tl.uint32)
    c2 = tl.zeros([BLOCK], tl.uint32) + chunk.to(tl.uint32)
    c3 = tl.zeros([BLOCK], tl.uint32) + (chunk >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        low = c0.to(tl.uint64) * 0xD2511F53
        high = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (high >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = high.to(tl.uint32)
        c2 = (low >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = low.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    to = out + sample * count + 4 * position
    _pair(c0, c1, to, 4 * position, inside)
    _pair(c2, c3, to + 2, 4 * position + 2, inside)


@triton.jit
def _pair(first, second, to, index, count):
    """Two words a lane -> two normal numbers, written side by side."""
    scale: tl.constexpr = 2.0**-32
    radius = tl.sqrt(-2.0 * tl.log((first.to(tl.float64) + 1.0) * scale))
    angle = second.to(tl.float64) * (TWO_PI * scale)
    tl.store(to, (radius * tl.cos(angle)).to(tl.float32), mask=index < count)
    tl.store(to + 1, (radius * tl.sin(angle)).to(tl.float32), mask=index + 1 < count)
