"""Latents to tokens and block 0 up to its self-attention, frame by frame: future frames are noise and need no image.

The patch embedding's mask channels are constants, and so is what they add: a row for each latent frame, with which the float32
residual stream begins. The product takes the latents' channels alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit4dit import ops
from dit4dit.engine.fold import BackboneBlock, Embedding
from dit4dit.model import video_dit


def patch_rows(latents: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    """Latents [B, z, T, h, w] -> rows of the patch embedding [B, T, N, z * patch^2] in `dtype`, by one copy."""
    view = video_dit.patches(latents, patch)
    return torch.empty(view.shape, dtype=dtype, device=view.device).copy_(view).flatten(4, 6).flatten(2, 3)


@dataclass(frozen=True)
class FirstBlock:
    """Buffers of block 0's input, which `put` fills frame by frame.

    Attributes:
        x: residual stream, float32 [B, T, N, D].
        qkv: of the self-attention, [B, T * N, 3 D].
    """

    embedding: Embedding
    block: BackboneBlock
    begin: Tensor
    """What x begins with, float32 [T, N, D]: `Embedding.begin`, perhaps expanded."""
    x: Tensor
    qkv: Tensor

    @classmethod
    def empty(cls, embedding: Embedding, block: BackboneBlock, begin: Tensor, batch: int, tokens: int) -> FirstBlock:
        """For `batch` samples of `tokens` tokens a frame. begin: float32 [T, 1 or N, D]."""
        frames, _, width = begin.shape
        x = torch.empty(batch, frames, tokens, width, dtype=torch.float32, device=begin.device)
        dtype = embedding.matrix.weight.dtype
        qkv = torch.empty(batch, frames * tokens, block.qkv.weight.shape[0], dtype=dtype, device=begin.device)
        return cls(embedding, block, begin.expand(-1, tokens, -1), x, qkv)

    def put(self, first: int, rows: Tensor) -> None:
        """Latent frames `first` and after: rows [B, T', N, z * patch^2] of the patch embedding, in the model's dtype."""
        _, frames, tokens, _ = rows.shape
        here = slice(first, first + frames)
        norm, x = self.block.self_norm, self.x[:, here]
        y = self.embedding.matrix(rows)
        begin = self.begin[here].expand_as(x)
        _, h = ops.adaln(begin, y, None, _rows(norm.shift, here), _rows(norm.scale, here), 1e-6, y.dtype, out=x)
        self.block.qkv(h.flatten(1, 2), out=self.qkv[:, first * tokens : (first + frames) * tokens])


def _rows(table: Tensor | None, here: slice) -> Tensor | None:
    return None if table is None else table[here]
