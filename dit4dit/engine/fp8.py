"""The backbone's matrices in 8-bit floats (e4m3), an option of the engine that changes numbers.

Six matrices of every block: qkv, both attentions' outputs, the cross-attention's q, and the feed-forward pair. A weight has
one scale for each of its rows, an activation one for its matrix, from a `Calibration`. Norms, attention, the residual stream,
k and v of the text, VAE and action head stay as they are: the head is bound by launches and its weights' bytes, not by
products, and its error would go into the actions undamped.
"""

from __future__ import annotations

import math
from collections.abc import MutableSequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dit4dit import ops
from dit4dit.engine.calibration import Calibration, at
from dit4dit.engine.fold import MATRICES, BackboneBlock, Matrix
from dit4dit.errors import ConfigError, shown
from dit4dit.model.dit4dit import DiT4DiT
from dit4dit.model.video_dit import Block
from dit4dit.ops.linear_fp8 import FP8, LARGEST

Quantization = Literal["fp8"]


@dataclass(frozen=True)
class Fp8Matrix(Matrix):
    """A linear map of e4m3 values: weight e4m3 [N, K], weight_scale float32 [N], x_scale a power of two."""

    weight_scale: Tensor = field(kw_only=True)
    x_scale: float = field(kw_only=True)

    @classmethod
    def quantized(cls, matrix: Matrix, amax: float) -> Fp8Matrix:
        """amax: the largest absolute value of the inputs that the matrix is to be right for."""
        weight = matrix.weight.float()
        # a row of zeros has no largest value to scale by
        scale = (weight.abs().amax(dim=1) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        narrow = (weight / scale[:, None]).clamp(-LARGEST, LARGEST).to(FP8)
        return cls(narrow, matrix.bias, weight_scale=scale, x_scale=x_scale(amax))

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return self._product(x, "none", out)

    def gelu(self, x: Tensor) -> Tensor:
        return self._product(x, "gelu")

    def _product(self, x: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
        given = (x, self.x_scale, self.weight, self.weight_scale, self.bias, activation, x.dtype)
        return ops.linear_fp8(*given, out=out)

    def __getstate__(self) -> dict[str, Any]:
        """Bytes in the place of e4m3, which torch (2.13) pickles but cannot read back."""
        return {**self.__dict__, "weight": self.weight.view(torch.uint8)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "weight": state["weight"].view(FP8)})


def x_scale(amax: float) -> float:
    """The power of two at which `amax` and up to twice as much fits into e4m3.

    A float loses nothing by a scale that is no tighter, dividing by a power of two rounds nothing, and activations that are
    somewhat larger than any that was seen in calibration are not cut.
    """
    if amax < 2.0**-100:  # nothing, or as good as: 1 / scale must be a float32
        return 1.0
    fraction, exponent = math.frexp(amax / LARGEST)
    return math.ldexp(1.0, exponent - (fraction == 0.5))


def check_options(quantization: str | None, calibration: object | None) -> None:
    """ConfigError unless the two go together."""
    if quantization not in (None, "fp8"):
        raise ConfigError(f"quantization {shown(quantization)}: expected 'fp8', or None for none")
    if quantization is None and calibration is not None:
        raise ConfigError("calibration: is for quantization='fp8'; give both or neither")
    if quantization is not None and calibration is None:
        raise ConfigError(
            "quantization='fp8' needs the largest activations of this checkpoint: make a file of them with dit4dit calibrate "
            "(or Policy.calibrate), and give it as calibration"
        )


@torch.no_grad()
def quantize_blocks(
    model: DiT4DiT, blocks: MutableSequence[BackboneBlock], calibration: Calibration, *, release: bool
) -> None:
    """Put e4m3 matrices into `blocks`, one block after the other.

    They are copies, of half the originals' bytes in bfloat16. The model's layers keep the originals, unless `release`: then
    a block's are gone before the next one is quantised, and the model runs only through the engine. Either way the model
    keeps what is not quantised: norms, k and v of the text, the blocks behind the extract layer, VAE and head.

    Raises:
        CheckpointError: the calibration is not of this model's weights.
    """
    calibration.check(model)
    for i, source in enumerate(model.backbone.transformer.blocks[: len(blocks)]):
        largest = {name: calibration.amax[at(i, name)] for name in MATRICES}
        blocks[i] = blocks[i].with_matrices(lambda name, m, known=largest: Fp8Matrix.quantized(m, known[name]))  # type: ignore[misc]
        if release:
            _release(source)


def _release(block: Block) -> None:
    """Take away the weights that a quantised block replaces; calling the block says so."""
    attention, cross = block.attn1, block.attn2
    for layer in (
        attention.to_q,
        attention.to_k,
        attention.to_v,
        attention.out,
        cross.to_q,
        cross.out,
        *block.ff.linears,
    ):
        layer.weight = nn.Parameter(layer.weight.detach().to("meta"), requires_grad=False)
    block.register_forward_pre_hook(_released)


def _released(block: nn.Module, inputs: object) -> None:
    raise ConfigError(
        "this model's matrices are in fp8 and run through its engine only; load it again without quantization for the "
        "plain model"
    )
