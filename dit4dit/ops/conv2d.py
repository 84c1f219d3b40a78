"""A two-dimensional convolution: the VAE's, on images whose channels are last in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit4dit.errors import InputError
from dit4dit.ops.arguments import Shapes, floating
from dit4dit.ops.dispatch import Implementation, Op

_Args = tuple[Tensor, Tensor, Tensor | None, int, int]


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """The definition: see `conv2d` for the arguments and the result."""
    return F.conv2d(x, weight, bias, stride, padding)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, *, backend: str | None = None
) -> Tensor:
    """The convolution of x with weight, plus bias.

    x: [B, C, H, W]. weight: [O, C, h, w]. bias: [O], or None. All of one dtype; sums in float32. On a GPU x and weight are
        channels last in memory, and so is the result.
    stride, padding: of both sides, zeros around.
    backend: "torch" (the library that PyTorch calls: cuDNN on a GPU, which adds a bias in a kernel of its own); None chooses.

    Returns [B, O, (H + 2 padding - h) // stride + 1, (W + 2 padding - w) // stride + 1].
    InputError: arguments that do not fit; BackendError: a backend that cannot run them.
    """
    Shapes("conv2d").of("x", x, "B C H W").of("weight", weight, "O C h w").of("bias", bias, "O")
    floating("conv2d", x=x, weight=weight, bias=bias)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise InputError(f"conv2d: {name}: expected {x.dtype} as x, got {tensor.dtype}")
    if stride < 1 or padding < 0:
        raise InputError(f"conv2d: expected a stride of at least 1 and no negative padding, got {stride} and {padding}")
    result: Tensor = _op(x, weight, bias, stride, padding, backend=backend)
    return result


def _example(device: torch.device) -> _Args:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x = torch.zeros(1, 16, 8, 8, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(32, 16, 3, 3, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
    return x, weight, None, 1, 1


_op = Op("conv2d", [Implementation("torch", lambda *_: None, reference)], _example)
