"""conv2d: every implementation against the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dit4dit.benchmarks.harness import assert_no_worse

from dit4dit import ops
from dit4dit.aot_build.compiler import compiled
from dit4dit.errors import BackendError, InputError
from dit4dit.ops import conv2d, launch, stand_in, tiles
from dit4dit.ops.aot.specialization import Specialization
from dit4dit.ops.conv2d import launches, reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def make(shape, out, side, dtype=F32, *, bias=True):
    generator = torch.Generator().manual_seed(out)
    x = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(out, shape[1], side, side, generator=generator) / (shape[1] * side * side) ** 0.5
    weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
    return x, weight, torch.randn(out, generator=generator).to(dtype) if bias else None


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", [n for n in ops.implementations("conv2d") if n != "triton"])
@pytest.mark.parametrize(
    ("shape", "out", "side", "stride", "padding", "bias"),
    [((1, 3, 8, 8), 8, 3, 1, 1, True), ((2, 5, 7, 9), 11, 1, 1, 0, False), ((1, 6, 9, 9), 4, 3, 2, 0, True)],
)
def test_no_worse_than_the_reference(name, shape, out, side, stride, padding, bias, dtype):
    args = (*make(shape, out, side, dtype, bias=bias), stride, padding)
    assert_no_worse(lambda *args: conv2d(*args, backend=name), reference, args, float32_limit=1e-5)


SHAPES = [
    # (x, channels out, side of the kernel, stride, padding, bias); what is odd about it
    ((1, 8, 12, 12), 96, 3, 1, 1, True),  # the first convolution: all positions in one or few blocks of the sum
    ((2, 5, 7, 9), 11, 3, 1, 1, True),  # nothing is a multiple of anything
    ((2, 33, 7, 9), 70, 3, 2, 1, False),
    ((1, 64, 9, 9), 100, 3, 2, 0, True),  # stride 2 on a padded buffer
    ((2, 96, 7, 9), 200, 1, 1, 0, True),  # a shortcut; two tiles across, the second one ragged
    ((1, 64, 7, 9), 32, 3, 1, 1, True),  # the last convolution: a sum of 576 in two parts, the second one shorter
    ((3, 128, 7, 9), 384, 3, 1, 1, False),  # 1152 in two parts of 576
    ((1, 192, 5, 5), 48, 3, 1, 1, True),  # 1728 in three
    ((1, 80, 5, 5), 40, 3, 1, 1, True),  # 720: two parts, blocks that belong to two positions
    ((1, 16, 1, 1), 16, 3, 1, 1, False),  # one pixel, zeros around
    ((1, 24, 6, 5), 16, 1, 2, 1, True),  # whole rows of the result that see nothing but zeros
]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("shape", "out", "side", "stride", "padding", "bias"), SHAPES)
def test_triton(triton_op, shape, out, side, stride, padding, bias, dtype):
    args = (*make(shape, out, side, dtype, bias=bias), stride, padding)
    assert_no_worse(partial(triton_op, "conv2d"), reference, args, float32_limit=1e-5)


LARGE = {  # an image and channels out whose sizes take each row of Hopper's table; tiles ragged in both directions
    0: ((1, 8, 17, 19), 100),
    1: ((1, 48, 17, 19), 20),
    2: ((1, 24, 41, 43), 20),
    3: ((2, 64, 11, 13), 200),
    4: ((1, 32, 41, 43), 90),
    5: ((1, 24, 113, 115), 90),
    6: ((1, 24, 41, 43), 130),
    7: ((1, 64, 41, 43), 200),
    8: ((1, 16, 57, 59), 200),
}


@pytest.mark.parametrize("row", LARGE)
def test_every_tile_of_hopper(triton_op, row):
    shape, out = LARGE[row]
    args = (*make(shape, out, 3, BF16), 1, 1)
    sizes = dict(rows=shape[0] * shape[2] * shape[3], columns=out, inner=9 * shape[1])
    assert tiles.row("conv2d", "90", sizes) == row
    assert_no_worse(partial(triton_op, "conv2d"), reference, args)


def test_the_table_of_tiles_is_tested_whole():
    assert len(tiles.committed()["conv2d"]["90"]) == len(LARGE)


def inside_of(buffer_shape, window, dtype=BF16):
    """x as a window of a buffer that is NaN everywhere else."""
    batch, channels, height, width = buffer_shape
    buffer = torch.full((batch, height, width, channels), float("nan"), dtype=dtype).permute(0, 3, 1, 2)
    x = buffer[window]
    generator = torch.Generator().manual_seed(1)
    x.copy_(torch.randn(x.shape, generator=generator))
    return x


@pytest.mark.parametrize(("stride", "padding", "side"), [(1, 1, 3), (2, 0, 3), (2, 1, 3), (1, 0, 1)])
@pytest.mark.parametrize("channels", [64, 24])
def test_triton_reads_out_of_a_larger_buffer_and_nothing_else_of_it(triton_op, channels, stride, padding, side):
    x = inside_of((3, 96, 12, 13), (slice(1, 3), slice(16, 16 + channels), slice(2, 10), slice(1, 12)))
    _, weight, bias = make((1, channels, 1, 1), 72, side, BF16)
    assert_no_worse(partial(triton_op, "conv2d"), reference, (x, weight, bias, stride, padding))


def test_triton_gives_the_same_bits_again(triton_op):
    args = (*make((1, 192, 9, 9), 40, 3, BF16), 1, 1)
    first, second = (triton_op("conv2d", *args) for _ in range(2))
    assert torch.equal(first, second)
    assert first.is_contiguous(memory_format=torch.channels_last)


def meta(shape, out, side, dtype=BF16):
    return [None if x is None else x.to("meta") for x in make(shape, out, side, dtype, bias=False)]


def test_small_images_split_the_sum():
    first, second = launches((*meta((1, 384, 28, 28), 384, 3), 1, 1), "90")[0]
    assert first.grid == (7 * 3, 6)
    assert second.kernel == "conv2d.combine"
    assert second.arguments["parts"] == 6
    (only,), result = launches((*meta((1, 192, 112, 112), 192, 3), 1, 1), "90")
    assert only.grid == (98, 1)
    assert only.tile["SPAN"] == 0
    assert result.shape == (1, 192, 112, 112)


def test_bias_is_added_once_where_the_sum_is_split():
    x, weight, _ = meta((1, 384, 28, 28), 32, 3)
    first, second = launches((x, weight, torch.empty(32, device="meta"), 1, 1), "90")[0]
    assert first.arguments["bias"] is None
    assert second.arguments["bias"] is not None


def test_what_triton_refuses(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, weight, bias = make((1, 4, 8, 8), 6, 3)
    for change, message in (
        (
            dict(x=x.contiguous()),
            "'triton' refused: x is not channels last in memory: its channels have stride 64, not 1",
        ),
        (dict(weight=weight.contiguous()), "weight is not channels last in memory: its channels have stride 9, not 1"),
        (dict(weight=weight[:, :, ::2, ::2]), "weight is not contiguous"),
        (dict(x=x[:, :, :1], padding=0), "the kernel is larger than the image"),
        (dict(x=x.double(), weight=weight.double(), bias=None), "x is torch.float64"),
        (dict(weight=weight.clone().requires_grad_()), "weight needs a gradient"),
        (dict(x=x[:, :, :1, :1].expand(1, 4, 1, 2**29)), "the result has 3221225472 elements"),
    ):
        given = {**dict(x=x, weight=weight, bias=bias, stride=1, padding=1), **change}
        with pytest.raises(BackendError, match=message):
            conv2d(**given, backend="triton")


def test_triton_takes_no_float32_on_a_gpu():
    with stand_in.without_data(), pytest.raises(BackendError, match="float32 products run without tensor cores"):
        conv2d(*meta((1, 16, 8, 8), 16, 3, F32), 1, 1, backend="triton")


def test_triton_takes_no_buffer_that_its_offsets_do_not_reach():
    x = torch.empty_strided((2, 16, 8, 8), (2**31, 1, 128, 16), dtype=BF16, device="meta")
    _, *rest = meta((1, 16, 8, 8), 16, 3)
    with stand_in.without_data(), pytest.raises(BackendError, match="more elements than offsets of 31 bits reach"):
        conv2d(x, *rest, 1, 1, backend="triton")


@pytest.mark.kernels
@pytest.mark.skipif(launch.interpreting(), reason="a process with TRITON_INTERPRET=1 cannot compile")
@pytest.mark.parametrize(("channels", "out", "side"), [(8, 96, 224), (96, 96, 224), (96, 192, 112), (384, 384, 28)])
def test_pixels_are_copied_ahead_and_16_bytes_at_a_time(channels, out, side):
    """Where the compiler loses sight of the alignment it reads two bytes at a time, and waits for each."""
    pytest.importorskip("triton")
    step = launches((*meta((1, channels, side, side), out, 3), 1, 1), "90")[0][0]
    ptx = compiled(Specialization.of(step), 90).asm["ptx"]
    assert "cp.async.cg.shared.global" in ptx
    assert "ld.global" not in ptx


def test_gradients():
    tensors = [x.double().requires_grad_() for x in make((2, 3, 4, 4), 5, 3)]
    assert torch.autograd.gradcheck(lambda *args: conv2d(*args, 1, 1), tensors)


def test_what_does_not_fit():
    x, weight, bias = make((1, 4, 8, 8), 6, 3)
    with pytest.raises(
        InputError, match=r"conv2d: weight: expected \[O, C, h, w\] = \[6, 4, 3, 3\], got \[6, 3, 3, 3\]"
    ):
        conv2d(x, weight[:, :3], bias, 1, 1)
    with pytest.raises(InputError, match=r"conv2d: bias: expected torch.float32 as x"):
        conv2d(x, weight, bias.double(), 1, 1)
    with pytest.raises(InputError, match="a stride of at least 1"):
        conv2d(x, weight, bias, 0, 1)
