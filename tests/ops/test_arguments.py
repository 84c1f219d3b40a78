"""The doors of the ops: what fits passes them quickly, what does not is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dit4dit import ops
from dit4dit.errors import InputError
from dit4dit.ops.arguments import Shapes, floating


@pytest.mark.parametrize(
    ("shape", "given", "message"),
    [
        ("A B", (2, 3), None),
        ("A 3", (2, 3), None),
        ("A A", (2, 2), None),
        ("A 4", (2, 3), r"t: expected \[A, 4\] = \[2, 4\], got \[2, 3\]"),
        ("A A", (2, 3), r"t: expected \[A, A\] = \[2, 2\], got \[2, 3\]"),
        ("K B", (2, 3), r"t: expected \[K, B\] = \[7, 3\], got \[2, 3\]"),
        ("A B", (2, 3, 1), r"t: expected \[A, B\] = \[A, B\], got \[2, 3, 1\]"),
        ("A B", (2, 0), r"t: expected \[A, B\] = \[A, B\], got \[2, 0\]"),
        ("A 0", (2, 0), r"t: expected \[A, 0\] = \[A, 0\], got \[2, 0\]"),
    ],
)
def test_shapes_are_compared_letter_by_letter(shape: str, given: tuple[int, ...], message: str | None) -> None:
    for _ in range(2):  # the second time from what is remembered of the words
        if message is None:
            Shapes("op", K=7).of("t", torch.zeros(given), shape)
        else:
            with pytest.raises(InputError, match=f"^op: {message}$"):
                Shapes("op", K=7).of("t", torch.zeros(given), shape)


def test_a_letter_keeps_the_size_of_the_first_tensor_that_has_it() -> None:
    shapes = Shapes("op").of("x", torch.zeros(2, 3), "A B").of("y", None, "A A A")
    assert (shapes["A"], shapes["B"]) == (2, 3)
    with pytest.raises(InputError, match=r"op: z: expected \[B, C\] = \[3, 5\], got \[4, 5\]"):
        shapes.of("z", torch.zeros(4, 5), "B C")


def test_integers_and_other_devices_are_named() -> None:
    floating("op", x=None, y=torch.zeros(1))
    with pytest.raises(InputError, match=r"op: y: expected a floating dtype, got torch\.int64"):
        floating("op", x=torch.zeros(1), y=torch.zeros(1, dtype=torch.int64))
    with pytest.raises(InputError, match="op: z: expected device cpu as y, got meta"):
        floating("op", x=None, y=torch.zeros(1), z=torch.zeros(1, device="meta"))


IMAGE, WEIGHT, CHANNELS = torch.zeros(1, 4, 3, 3), torch.zeros(5, 4, 3, 3), torch.zeros(4)
REQUESTS = torch.zeros(2, 3, dtype=torch.int64)
GAMMA = torch.ones(4, 1, 1)
F32, ROWS, FP8 = torch.float32, torch.ones(2, 4), torch.ones(3, 4).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        (lambda: ops.conv2d(IMAGE[0], WEIGHT, None, 1, 1), "conv2d: x: expected"),
        (lambda: ops.conv2d(IMAGE[:0], WEIGHT, None, 1, 1), "conv2d: x: expected"),
        (lambda: ops.conv2d(IMAGE.int(), WEIGHT.int(), None, 1, 1), "conv2d: x: expected a floating dtype"),
        (lambda: ops.conv2d(IMAGE, WEIGHT[:, :3], None, 1, 1), "conv2d: weight: expected"),
        (lambda: ops.conv2d(IMAGE, WEIGHT[:0], None, 1, 1), "conv2d: weight: expected"),
        (lambda: ops.conv2d(IMAGE, WEIGHT.half(), None, 1, 1), "conv2d: weight: expected torch.float32"),
        (lambda: ops.conv2d(IMAGE, WEIGHT.to("meta"), None, 1, 1), "conv2d: weight: expected device cpu"),
        (lambda: ops.conv2d(IMAGE, WEIGHT, CHANNELS, 1, 1), "conv2d: bias: expected"),
        (lambda: ops.conv2d(IMAGE, WEIGHT, torch.zeros(5).half(), 1, 1), "conv2d: bias: expected torch.float32"),
        (lambda: ops.conv2d(IMAGE, WEIGHT, torch.zeros(5, device="meta"), 1, 1), "conv2d: bias: expected device"),
        (lambda: ops.conv2d(IMAGE, WEIGHT, None, 0, 1), "conv2d: expected a stride"),
        (lambda: ops.conv2d(IMAGE, WEIGHT, None, 1, -1), "conv2d: expected a stride"),
        (lambda: ops.add_pad(IMAGE[0], None, None), "add_pad: x: expected"),
        (lambda: ops.add_pad(IMAGE[:0], None, None), "add_pad: x: expected"),
        (lambda: ops.add_pad(IMAGE.int(), None, None), "add_pad: x: expected a floating dtype"),
        (lambda: ops.add_pad(IMAGE, CHANNELS[:3], None), "add_pad: bias: expected"),
        (lambda: ops.add_pad(IMAGE, CHANNELS.half(), None), "add_pad: bias: expected torch.float32"),
        (lambda: ops.add_pad(IMAGE, CHANNELS.to("meta"), None), "add_pad: bias: expected device"),
        (lambda: ops.add_pad(IMAGE, None, IMAGE[:, :3]), "add_pad: residual: expected"),
        (lambda: ops.add_pad(IMAGE, None, IMAGE.half()), "add_pad: residual: expected torch.float32"),
        (lambda: ops.add_pad(IMAGE, None, IMAGE.to("meta")), "add_pad: residual: expected device"),
        (lambda: ops.rms_norm_silu(IMAGE, None, None, GAMMA[:3], True, False), "rms_norm_silu: gamma: expected"),
        (lambda: ops.rms_norm_silu(IMAGE, None, None, CHANNELS, True, False), "rms_norm_silu: gamma: expected"),
        (lambda: ops.rms_norm_silu(IMAGE, None, None, GAMMA.half(), True, False), "gamma: expected torch.float32"),
        (lambda: ops.rms_norm_silu(IMAGE, None, None, GAMMA.to("meta"), True, False), "gamma: expected device"),
        (lambda: ops.rms_norm_silu(IMAGE, CHANNELS[:3], None, GAMMA, True, False), "rms_norm_silu: bias: expected"),
    ],
)
def test_what_does_not_fit_is_named(call: Callable[[], Tensor], fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        call()


@pytest.mark.parametrize(
    ("call", "op"),
    [
        (lambda out: ops.linear(torch.ones(2, 4), torch.ones(3, 4), None, out=out), "linear"),
        (lambda out: ops.philox_normal(REQUESTS, ((0, (3,)),), out=(out,))[0], "philox_normal"),
        (
            lambda out: ops.unnormalize(torch.ones(2, 1, 3), torch.ones(5, 3).double(), out=out[:, None])[0],
            "unnormalize",
        ),
        (lambda out: ops.adaln(*2 * [torch.ones(1, 1, 2, 3)], *3 * [None], 1e-6, F32, out=out[None, None]), "adaln"),
        (lambda out: ops.linear_fp8(ROWS, 1.0, FP8, torch.ones(3), None, "none", F32, out=out), "linear_fp8"),
    ],
)
def test_a_place_on_another_device_is_named(call: Callable[[Tensor], Tensor], op: str) -> None:
    """Before a kernel is given its address."""
    call(torch.zeros(2, 3))
    with pytest.raises(InputError, match=f"{op}: out: expected"):
        call(torch.zeros(2, 3, device="meta"))
