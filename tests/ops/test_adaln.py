"""adaln: the Triton kernel against the reference, and the reference against the model's own layers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dit4dit.benchmarks.harness import assert_no_worse

from dit4dit.errors import InputError
from dit4dit.ops import adaln, stand_in
from dit4dit.ops.adaln import reference
from dit4dit.ops.dispatch import find

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def make(shape, x_dtype, y_dtype, out_dtype, *, y=True, gate=True, modulate=True):
    generator = torch.Generator().manual_seed(sum(shape))
    table = [torch.randn(shape[1], shape[3], generator=generator) for _ in range(3)]
    return (
        3 * torch.randn(shape, generator=generator).to(x_dtype) + 1,
        torch.randn(shape, generator=generator).to(y_dtype) if y else None,
        table[0] if gate and y else None,
        table[1] if modulate else None,
        table[2] if modulate else None,
        1e-6,
        out_dtype,
    )


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (F32, BF16, BF16), (BF16, BF16, BF16), (F16, F16, F16)])
@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((1, 1, 1, 64), {}),
        ((2, 3, 7, 96), {}),
        ((2, 1, 17, 768), dict(gate=False)),
        ((1, 2, 5, 2048), dict(y=False)),
        ((3, 2, 3, 33), dict(y=False, modulate=False)),
        ((2, 2, 3, 130), dict(modulate=False)),
    ],
)
def test_triton(triton_op, shape, parts, dtypes):
    args = make(shape, *dtypes, **parts)
    assert_no_worse(partial(triton_op, "adaln"), reference, args, float32_limit=1e-5)


@pytest.mark.parametrize("dtypes", [(F32, BF16, BF16), (F16, F16, F16)])
@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((2, 3, 4, 96), {}),
        ((3, 2, 6, 33), {}),
        ((2, 2, 128, 64), dict(gate=False)),
        ((1, 2, 12, 2048), dict(y=False)),
        ((1, 3, 2, 130), dict(modulate=False)),
    ],
)
def test_rows_of_one_frame_share_its_tables(triton_op, shape, parts, dtypes):
    """Tokens that 64 divides, or 4, or 2 alone: a block never crosses into the next frame."""
    args = make(shape, *dtypes, **parts)
    assert_no_worse(partial(triton_op, "adaln", backend="rows"), reference, args, float32_limit=1e-5)


def test_rows_take_no_odd_number_of_tokens():
    args = make((1, 2, 7, 64), F32, BF16, BF16)
    with stand_in.without_data():
        given = tuple(x.to("meta") if isinstance(x, torch.Tensor) else x for x in args)
        reason = find("adaln").implementations["rows"].refuse(*given)
    assert reason == "7 tokens in a frame, an odd number, which no two rows divide"


def test_without_a_branch_the_residual_is_itself():
    x = torch.randn(1, 2, 3, 8)
    assert adaln(x, None, None, None, None, 1e-6, F32)[0] is x


def test_gradients():
    x, y, gate, shift, scale, eps, _ = make((1, 2, 3, 5), *[torch.float64] * 3)
    tensors = [t.double().requires_grad_() for t in (x, y, gate, shift, scale)]
    assert torch.autograd.gradcheck(lambda *t: adaln(*t, eps, torch.float64), tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(y=torch.zeros(1, 2, 3, 9)), r"y: expected \[B, T, N, D\] = \[1, 2, 3, 8\], got \[1, 2, 3, 9\]"),
        (dict(gate=torch.zeros(3, 8)), r"gate: expected \[T, D\] = \[2, 8\], got \[3, 8\]"),
        (dict(scale=None), "shift and scale both or neither"),
        (dict(y=None), "gate: expected None where y is None"),
        (dict(x=torch.zeros(1, 2, 3, 8, dtype=torch.int32)), "x: expected a floating dtype, got torch.int32"),
        (dict(scale=torch.zeros(2, 8, device="meta")), "scale: expected device cpu as x, got meta"),
        (dict(x=torch.zeros(2, 3, 8)), r"x: expected \[B, T, N, D\] = .*got \[2, 3, 8\]"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    x, table = torch.zeros(1, 2, 3, 8), torch.zeros(2, 8)
    given = dict(x=x, y=x, gate=table, shift=table, scale=table, eps=1e-6, out_dtype=F32)
    with pytest.raises(InputError, match=message):
        adaln(**{**given, **change})


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_the_kernel_rounds_to_nearest_even(triton_op, dtype):
    """Twice PyTorch's error would let a cast pass that cuts."""
    x, y = torch.randn(2, 1, 1, 40, 64).to(dtype)
    x_new, _ = triton_op("adaln", x, y, None, None, None, 1e-6, dtype)
    assert torch.equal(x_new, (x.float() + y.float()).to(dtype))


@pytest.mark.parametrize("dtypes", [(F32, BF16, BF16), (F16, F16, F16)])
@pytest.mark.parametrize("shape", [(1, 2, 7, 96), (3, 2, 5, 33), (2, 1, 3, 64)])
@pytest.mark.parametrize("few", ["samples", "frames", "tokens", "samples and tokens"])
def test_triton_with_an_expanded_residual(triton_op, few, shape, dtypes):
    """A residual stream that begins with one row for several tokens, frames or samples."""
    x, y, _, *rest = make(shape, *dtypes)
    for axis, name in enumerate(("samples", "frames", "tokens")):
        x = x.narrow(axis, 0, 1).expand(shape) if name in few else x
    assert_no_worse(partial(triton_op, "adaln"), reference, (x, y, None, *rest), float32_limit=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_new_residual_goes_into_frames_of_a_larger_one(triton_op, batch):
    x, y, _, *rest = make((batch, 2, 5, 64), F32, BF16, BF16)
    wanted = reference(x, y, None, *rest)
    for run in (partial(adaln, backend="torch"), partial(triton_op, "adaln")):
        whole = torch.full((batch, 3, 5, 64), torch.nan)
        x_new, h = run(x, y, None, *rest, out=whole[:, 1:])
        assert torch.equal(x_new, wanted[0])
        torch.testing.assert_close(h, wanted[1], rtol=2**-7, atol=1e-3)
    with pytest.raises(InputError, match="adaln: out: expected y and a tensor like x"):
        adaln(x, None, None, *rest, out=x)
