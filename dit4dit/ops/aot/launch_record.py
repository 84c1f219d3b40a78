"""One launch of a Triton kernel as data, so that it can also be looked up or compiled without a GPU."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One kernel with its arguments. Tensors may be on the meta device where it is only compiled.

    `arguments` are passed at run time (None: absent), `constants` and the tile's block sizes are compiled in.
    """

    kernel: str  # "adaln" or "file.function", in dit4dit/kernels
    grid: tuple[int, ...]
    arguments: Mapping[str, Tensor | int | float | None]
    constants: Mapping[str, Any]
    tile: Mapping[str, int]  # block sizes in capitals, num_warps, num_stages

    def __call__(self, programmatic: bool = False) -> None:
        """Launch it through Triton; programmatic: as in `ops.programmatic`. The code is the same, Triton compiles it anew."""
        options = {"launch_pdl": True} if programmatic else {}
        function(self.kernel)[self.grid](**self.arguments, **self.constants, **self.tile, **options)


Launches = Callable[..., tuple[list[Launch], Any]]
"""(an op's arguments, an architecture) -> the kernels to run, and what they will have written; where the op's Triton
implementation is `into`, `out=` too."""


@functools.cache
def function(kernel: str) -> Any:
    """Triton's function behind `Launch.kernel`."""
    file, _, name = kernel.partition(".")
    return getattr(importlib.import_module(f"dit4dit.kernels.{file}"), name or file)
