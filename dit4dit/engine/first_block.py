"""Latents to tokens and block 0 up to its self-attention: future frames are noise, and their part needs no image.

The patch embedding's mask channels are constants, and so is what they add: a row for each latent frame, with which the float32
residual stream begins. The product takes the latents' channels alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit4dit import ops
from dit4dit.engine.fold import BackboneBlock, Embedding


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

    def add_noise(self, patches: Tensor) -> None:
        """Patches of all latent frames but the first, [B, T - 1, r, c, z, p, p] (`video_dit.patches`)."""
        if self._apart:
            self._put(1, patches)
        else:
            self._noise = patches

    def add_condition(self, patches: Tensor) -> None:
        """Those of the conditioning frame [B, 1, r, c, z, p, p]."""
        if self._apart:
            self._put(0, patches)
        else:
            every = patches if self._noise is None else torch.cat([patches, self._noise.to(patches.dtype)], dim=1)
            self.x, self.qkv = self._part(0, every)

    def _put(self, first: int, patches: Tensor) -> None:
        """Write the part of latent frames `first` and after to where it belongs."""
        frames, tokens = patches.shape[1], patches.shape[2] * patches.shape[3]
        here = slice(first * tokens, (first + frames) * tokens)
        self._part(first, patches, self.x[:, first : first + frames], self.qkv[:, here])

    def _part(
        self, first: int, patches: Tensor, x: Tensor | None = None, qkv: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x and qkv of latent frames `first` and after, in the tensors that are given."""
        here, norm = slice(first, first + patches.shape[1]), self._block.self_norm
        weight = self._embedding.matrix.weight
        x, h = ops.patch_tokens(patches, weight, self._begin[:, here], norm.shift[here], norm.scale[here], 1e-6, out=x)
        return x, self._block.qkv(h.flatten(1, 2), out=qkv)
