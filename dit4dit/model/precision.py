"""float32 that is float32: products and convolutions without the shorter formats that PyTorch's settings let in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_guard = threading.Lock()
_guarded: list[Settings] = []  # what to go back to, once for each guard that is open in any thread


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products and convolutions in float32: a GPU's convolutions are TF32 by default, whose 10 bits are float16's.

    The setting is the process's: products and convolutions of other threads are exact meanwhile too, and the last guard to
    close puts the caller's settings back. It holds however the caller has set them: by `cudnn.allow_tf32` and
    `set_float32_matmul_precision`, or by an `fp32_precision`.
    """
    with _guard:
        before = _guarded[0] if _guarded else Settings.now()
        Settings("highest", "ieee", "ieee", "ieee", "ieee", "ieee").apply()
        _guarded.append(before)
    try:
        yield
    finally:
        with _guard:
            before = _guarded.pop()
            if not _guarded:
                before.apply()


@dataclass(frozen=True)
class Settings:
    """PyTorch's settings of float32, the old name of products' with the new ones: PyTorch raises where it finds them at odds.

    Attributes:
        old: `torch.get_float32_matmul_precision()`.
        product, conv, rnn: a GPU's `fp32_precision`.
        cpu_product, cpu_conv: a CPU's (oneDNN's).
    """

    old: str
    product: str
    conv: str
    rnn: str
    cpu_product: str
    cpu_conv: str

    @classmethod
    def now(cls) -> Settings:
        """Those in force. Leaves products at "ieee": their old name cannot be read beside a new one that is at odds with it."""
        gpu, cudnn, cpu = _backends()
        product, conv, rnn = _own(gpu.matmul, cudnn), cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
        cpu_product, cpu_conv = _own(cpu.matmul, cpu), _own(cpu.conv, cpu)
        gpu.matmul.fp32_precision = cpu.matmul.fp32_precision = "ieee"
        return cls(torch.get_float32_matmul_precision(), product, conv, rnn, cpu_product, cpu_conv)

    def apply(self) -> None:
        gpu, cudnn, cpu = _backends()
        torch.set_float32_matmul_precision(self.old)  # sets the new names too, so it comes first
        gpu.matmul.fp32_precision, cpu.matmul.fp32_precision = self.product, self.cpu_product
        cudnn.allow_tf32 = "tf32" in (self.conv, self.rnn)  # as above
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = self.conv, self.rnn
        cpu.conv.fp32_precision = self.cpu_conv


def _backends() -> tuple[Any, Any, Any]:
    return torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn


def _own(setting: Any, above: Any) -> str:
    """Its own value; "none" where it is that of the setting above it, which it then follows again."""
    value: str = setting.fp32_precision
    return "none" if value == above.fp32_precision else value
