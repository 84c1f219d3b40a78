"""Shapes checked once, at the door of an op."""

from __future__ import annotations

from functools import lru_cache

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
        words, got = _words(shape), tensor.shape
        fits = len(got) == len(words)
        if fits and 0 not in got:
            known = self.sizes
            for (word, number), size in zip(words, got, strict=True):
                if known.setdefault(word, size if number is None else number) != size:
                    fits = False
        if not fits or 0 in got:
            letters = [word for word, _ in words]
            want = [self.sizes.get(word, word) for word in letters]
            if want != list(got):
                shown = ", ".join(map(str, want))
                raise InputError(f"{self.op}: {name}: expected [{', '.join(letters)}] = [{shown}], got {list(got)}")
        return self

    def __getitem__(self, letter: str) -> int:
        return self.sizes[letter]


def floating(op: str, **tensors: Tensor | None) -> None:
    """InputError unless each tensor that is given is of a floating dtype, and all are on one device."""
    first, device = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise InputError(f"{op}: {name}: expected a floating dtype, got {tensor.dtype}")
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise InputError(f"{op}: {name}: expected device {device} as {first}, got {tensor.device}")


@lru_cache(maxsize=256)  # words may be sizes, of which there is no end
def _words(shape: str) -> tuple[tuple[str, int | None], ...]:
    """The letters of a shape, each with its size where it is a number: split once, not in every call of a chunk."""
    return tuple((word, int(word) if word.isdigit() else None) for word in shape.split())


def product(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """InputError unless x [..., K] has elements, weight is [N, K] and bias [N] or None, all of one dtype and on one device."""
    if x.ndim < 1 or x.numel() == 0:
        raise InputError(f"{op}: x: expected [..., K] with elements, got {list(x.shape)}")
    Shapes(op, K=x.shape[-1]).of("weight", weight, "N K").of("bias", bias, "N")
    floating(op, x=x, weight=weight, bias=bias)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise InputError(f"{op}: {name}: expected {x.dtype} as x, got {tensor.dtype}")
