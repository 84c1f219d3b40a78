"""One Euler step of the actions, with the guidance of real-time chunking where there is a left-over to keep to."""

import triton
import triton.language as tl
from dit4dit.kernels.common import wait_for_inputs


@triton.jit
def euler_step(
    x,  # float32 [batch, horizon, actions]
    velocity,
    previous,  # likewise, or None
    weights,  # float32 [rows], or None: [horizon], or [batch, horizon]
    out,
    count,  # batch * horizon * actions
    rows,
    actions,
    dt,
    t,
    strength,
    BLOCK: tl.constexpr,
):
    wait_for_inputs()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    here = tl.load(x + i, mask=inside, other=0.0)
    v = tl.load(velocity + i, mask=inside, other=0.0)
    if previous is not None:
        weight = tl.load(weights + (i // actions) % rows, mask=inside, other=0.0)
        left_over = tl.load(previous + i, mask=inside, other=0.0)
        v -= strength * weight * (left_over - (here - t * v))
    tl.store(out + i, here - dt * v, mask=inside)
