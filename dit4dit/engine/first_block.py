"""Latents to tokens and block 0 up to its self-attention: future frames are noise, and their part needs no image.

The patch embedding's mask channels are constants, and so is what they add: a row for each latent frame, with which the float32
residual stream begins. The product takes the latents' channels alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit4dit import ops
from dit4dit.engine.fold import BackboneBlock, Embedding
from dit4dit.model import video_dit


def patch_rows(latents: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    """Latents [B, z, T, h, w] -> rows of the patch embedding [B, T, N, z * patch^2] in `dtype`, by one copy."""
    view = video_dit.patches(latents, patch)
    batch, frames, rows, columns, *token = view.shape
    out = torch.empty(view.shape, dtype=dtype, device=view.device).copy_(view)
    return out.view(batch, frames, rows * columns, token[0] * token[1] * token[2])


class FirstBlock:
    """Block 0's input for one pass: the noise first, then the conditioning frame."""

    x: Tensor
    """The residual stream, float32 [B, T, N, D]; it and `qkv` are there when both have been added."""
    qkv: Tensor
    """Of the self-attention, [B, T * N, 3 D]."""

    def __init__(
        self, embedding: Embedding, block: BackboneBlock, begin: Tensor, batch: int, tokens: int, *, apart: bool
    ) -> None:
        """For `batch` samples of `tokens` tokens a frame. begin: float32 [T, 1 or N, D], `Embedding.begin`.

        apart: the noise is worked on as soon as it is there, which pays where that is beside other work; else in one go with
            the conditioning frame.
        """
        self._embedding, self._block, self._apart = embedding, block, apart
        frames, _, width = begin.shape
        self._begin = begin.expand(batch, frames, tokens, width)
        self._noise: Tensor | None = None
        if apart:
            dtype, device = embedding.matrix.weight.dtype, begin.device
            self.x = torch.empty(batch, frames, tokens, width, dtype=torch.float32, device=device)
            self.qkv = torch.empty(batch, frames * tokens, block.qkv.weight.shape[0], dtype=dtype, device=device)

    def add_noise(self, rows: Tensor) -> None:
        """Rows of the patch embedding of all latent frames but the first, [B, T - 1, N, z * patch^2] in the model's dtype."""
        if self._apart:
            self._put(1, rows)
        else:
            self._noise = rows

    def add_condition(self, rows: Tensor) -> None:
        """Those of the conditioning frame [B, N, z * patch^2]."""
        frame = rows[:, None]
        if self._apart:
            self._put(0, frame)
        else:
            every = frame if self._noise is None else torch.cat([frame, self._noise], dim=1)
            self.x, self.qkv = self._part(0, every)

    def _put(self, first: int, rows: Tensor) -> None:
        """Write the part of latent frames `first` and after to where it belongs."""
        _, frames, tokens, _ = rows.shape
        here = slice(first * tokens, (first + frames) * tokens)
        self._part(first, rows, self.x[:, first : first + frames], self.qkv[:, here])

    def _part(
        self, first: int, rows: Tensor, x: Tensor | None = None, qkv: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x and qkv of latent frames `first` and after, in the tensors that are given."""
        here, norm = slice(first, first + rows.shape[1]), self._block.self_norm
        y = self._embedding.matrix(rows)
        x, h = ops.adaln(self._begin[:, here], y, None, norm.shift[here], norm.scale[here], 1e-6, y.dtype, out=x)
        return x, self._block.qkv(h.flatten(1, 2), out=qkv)
