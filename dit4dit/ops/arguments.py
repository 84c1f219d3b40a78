"""Shapes checked once, at the door of an op."""

from __future__ import annotations

from torch import Tensor

from dit4dit.errors import InputError


class Shapes:
    """Checks tensors against shapes written in letters: the first tensor with a letter decides its size.

    Shapes("adaln").of("x", x, "B T N D").of("gate", gate, "T D")
    """

    def __init__(self, op: str, **sizes: int) -> None:
        self.op = op
        self.sizes = dict(sizes)

    def of(self, name: str, tensor: Tensor | None, shape: str) -> Shapes:
        """InputError unless `tensor` has this shape; None is left alone. A word of digits is a size of its own."""
        if tensor is None:
            return self
        words = shape.split()
        got = list(tensor.shape)
        if len(got) == len(words) and 0 not in got:
            for word, size in zip(words, got, strict=True):
                self.sizes.setdefault(word, int(word) if word.isdigit() else size)
        want = [self.sizes.get(word, word) for word in words]
        if got != want:
            shown = ", ".join(map(str, want))
            raise InputError(f"{self.op}: {name}: expected [{', '.join(words)}] = [{shown}], got {got}")
        return self

    def __getitem__(self, letter: str) -> int:
        return self.sizes[letter]


def floating(op: str, **tensors: Tensor | None) -> None:
    """InputError unless each tensor that is given is of a floating dtype, and all are on one device."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, leader = next(iter(given.items()))
    for name, tensor in given.items():
        if not tensor.is_floating_point():
            raise InputError(f"{op}: {name}: expected a floating dtype, got {tensor.dtype}")
        if tensor.device != leader.device:
            raise InputError(f"{op}: {name}: expected device {leader.device} as {first}, got {tensor.device}")


def product(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """InputError unless x [..., K] has elements, weight is [N, K] and bias [N] or None, all of one dtype and on one device."""
    if x.ndim < 1 or x.numel() == 0:
        raise InputError(f"{op}: x: expected [..., K] with elements, got {list(x.shape)}")
    Shapes(op, K=x.shape[-1]).of("weight", weight, "N K").of("bias", bias, "N")
    floating(op, x=x, weight=weight, bias=bias)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise InputError(f"{op}: {name}: expected {x.dtype} as x, got {tensor.dtype}")
