"""Constants of a trained model, computed once at load by calling the model's own modules.

The times of the feature pass and of the Euler steps are constants, so every AdaLN is a small table; two matrices with
nothing between them are one; q, k and v of a block are one matrix, as are the k and v that the head takes from the features.
Products of matrices are formed in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit4dit import ops
from dit4dit.model import flow
from dit4dit.model.action_head import ActionHead, Attention, Block, sinusoid
from dit4dit.model.video_backbone import VideoBackbone
from dit4dit.model.video_dit import AdaNorm, PositionEmbed


@dataclass(frozen=True)
class Matrix:
    """A linear map: weight [N, K], bias [N] or None."""

    weight: Tensor
    bias: Tensor | None = None

    @classmethod
    def of(cls, layer: nn.Linear) -> Matrix:
        """The layer's map, sharing its memory."""
        return cls(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())

    @classmethod
    def stacked(cls, *layers: nn.Linear) -> Matrix:
        """Several maps of one input as one, outputs in order.

        The layers' own weights become views of the joined matrix, so that there is one copy of them.
        """
        maps = [cls.of(layer) for layer in layers]
        biases = [m.bias for m in maps if m.bias is not None]
        assert len(biases) in (0, len(maps))
        joined = cls(torch.cat([m.weight for m in maps]), torch.cat(biases) if biases else None)
        begin = 0
        for layer in layers:
            end = begin + layer.out_features
            layer.weight.data = joined.weight[begin:end]
            begin = end
        return joined

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N], in `out` where that is given."""
        return ops.linear(x, self.weight, self.bias, out=out)

    def gelu(self, x: Tensor) -> Tensor:
        """The map and the exact GELU behind it, x [..., K] -> [..., N]."""
        return ops.linear_gelu(x, self.weight, self.bias, "none")


@dataclass(frozen=True)
class Modulation:
    """shift, scale and (in the backbone) gate of one norm: a row per latent frame, float32 [T, D]."""

    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None


@dataclass(frozen=True)
class Embedding:
    """The patch embedding. Its mask channels are the same in every chunk, so that the product does without them.

    Attributes:
        matrix: rows of the latents' channels alone [.., z * patch^2] -> tokens.
        masks: what the mask channels add to a latent frame's tokens, float32 [T, D].
        positions: the learned positions, or None.
    """

    matrix: Matrix
    masks: Tensor
    positions: PositionEmbed | None

    @torch.no_grad()
    def begin(self, rows: int, columns: int) -> Tensor:
        """What is added to the product for a grid of tokens: float32 [T, N, D], or [T, 1, D] without learned positions."""
        if self.positions is None:
            return self.masks[:, None]
        return self.masks[:, None] + self.positions(rows, columns).float()


MATRICES = ("qkv", "self_out", "cross_q", "cross_out", "mlp_in", "mlp_out")
"""The matrices of a `BackboneBlock`."""


@dataclass(frozen=True)
class BackboneBlock:
    """One block of the video transformer, folded."""

    self_norm: Modulation
    qkv: Matrix
    norm_q: Tensor
    norm_k: Tensor
    self_out: Matrix
    cross_norm: Modulation
    cross_q: Matrix
    cross_norm_q: Tensor
    cross_out: Matrix
    mlp_norm: Modulation
    mlp_in: Matrix
    mlp_out: Matrix

    def with_matrices(self, change: Callable[[str, Matrix], Matrix]) -> BackboneBlock:
        """The block with change(name, matrix) in the place of each of its matrices."""
        changed: dict[str, Any] = {name: change(name, getattr(self, name)) for name in MATRICES}
        return replace(self, **changed)


@dataclass(frozen=True)
class HeadBlock:
    """One block of the action head, folded; `norms` has one `Modulation` per Euler step."""

    norms: tuple[Modulation, ...]
    cross: bool
    project: Matrix
    """q where the block attends to the features, else q | k | v."""
    out: Matrix
    mlp_in: Matrix
    mlp_out: Matrix


@dataclass(frozen=True)
class Head:
    """The action head, folded for a fixed number of Euler steps.

    Attributes:
        heads: of each attention.
        encode: noisy actions [.., A] -> first token layer, W wide (two published matrices as one).
        time_bias: what the time adds there, one row per step [N, W].
        encode_out: the token layer after the swish.
        position: position embeddings [K, W], or None.
        context: features -> k | v of every block that attends to them, one matrix.
        blocks: in order.
        out_norms: the last norm, one per step.
        decode_in: last norm -> hidden layer of the action decoder (two published matrices as one).
        decode_out: hidden layer -> actions.
    """

    heads: int
    encode: Matrix
    time_bias: Tensor
    encode_out: Matrix
    position: Tensor | None
    context: Matrix
    blocks: tuple[HeadBlock, ...]
    out_norms: tuple[Modulation, ...]
    decode_in: Matrix
    decode_out: Matrix


@torch.no_grad()
def fold_embedding(backbone: VideoBackbone) -> Embedding:
    """The patch embedding; the conditioning frame's mask is one everywhere, all other masks are zero."""
    transformer, config = backbone.transformer, backbone.config.dit
    weight, patch = transformer.patch_embed.proj.weight.detach(), config.patch**2
    latents, conditioning, _ = weight.split((config.latent_channels * patch, patch, patch), dim=1)
    masks = torch.zeros(backbone.config.latent_frames, config.width, dtype=torch.float32, device=weight.device)
    masks[0] = conditioning.double().sum(dim=1)
    return Embedding(Matrix(latents.contiguous()), masks, transformer.learnable_pos_embed)


@torch.no_grad()
def fold_backbone(backbone: VideoBackbone) -> tuple[BackboneBlock, ...]:
    """The blocks up to the extract layer, with their AdaLN tables for the feature pass's constant times."""
    transformer, config = backbone.transformer, backbone.config
    times = torch.full((1, config.latent_frames), config.sigma, device=transformer.device)
    times[0, 0] = config.conditional_frame_timestep
    embedded_t, temb = (y[0, :, 0] for y in transformer.embed_times(times))

    def table(norm: AdaNorm) -> Modulation:
        return Modulation(*(y.float().contiguous() for y in norm.modulation(embedded_t, temb)))

    return tuple(
        BackboneBlock(
            self_norm=table(block.norm1),
            qkv=Matrix.stacked(block.attn1.to_q, block.attn1.to_k, block.attn1.to_v),
            norm_q=block.attn1.norm_q.weight.detach(),
            norm_k=block.attn1.norm_k.weight.detach(),
            self_out=Matrix.of(block.attn1.out),
            cross_norm=table(block.norm2),
            cross_q=Matrix.of(block.attn2.to_q),
            cross_norm_q=block.attn2.norm_q.weight.detach(),
            cross_out=Matrix.of(block.attn2.out),
            mlp_norm=table(block.norm3),
            mlp_in=Matrix.of(block.ff.linears[0]),
            mlp_out=Matrix.of(block.ff.linears[1]),
        )
        for block in transformer.blocks[: config.extract_layer + 1]
    )


@torch.no_grad()
def fold_head(head: ActionHead, steps: int) -> Head:
    """The head for `steps` Euler steps; its times, and all that depends on them alone, become constants."""
    config, device = head.config, head.action_decoder.layer2.weight.device
    times = [flow.bucket(1 - i / steps, config.num_timestep_buckets) for i in range(steps)]
    index = torch.tensor(times, device=device)
    temb = head.model.timestep_encoder(index)
    encoder, width = head.action_encoder, config.width
    first, second = encoder.layer1, encoder.layer2
    wave = sinusoid(index, width, cos_first=False, denominator=width // 2)
    of_action, of_time = second.weight.double().split(width, dim=1)
    dtype = second.weight.dtype
    time_bias = wave.double() @ of_time.T + of_action @ first.bias.double() + second.bias.double()
    context = [block.attn1 for block in head.model.blocks if block.cross]
    position = None
    if head.position_embedding is not None:
        position = head.position_embedding.weight[: config.action_horizon].detach()
    return Head(
        heads=config.num_heads,
        encode=Matrix((of_action @ first.weight.double()).to(dtype)),
        time_bias=time_bias.to(dtype),
        encode_out=Matrix.of(encoder.layer3),
        position=position,
        context=Matrix.stacked(*(layer for attention in context for layer in (attention.to_k, attention.to_v))),
        blocks=tuple(_head_block(block, temb) for block in head.model.blocks),
        out_norms=_modulations(head.model.proj_out_1(F.silu(temb)), shift_first=True),
        decode_in=_product(head.action_decoder.layer1, head.model.proj_out_2),
        decode_out=Matrix.of(head.action_decoder.layer2),
    )


def _head_block(block: Block, temb: Tensor) -> HeadBlock:
    attention: Attention = block.attn1
    project = (attention.to_q,) if block.cross else (attention.to_q, attention.to_k, attention.to_v)
    return HeadBlock(
        norms=_modulations(block.norm1.linear(F.silu(temb)), shift_first=False),
        cross=block.cross,
        project=Matrix.stacked(*project),
        out=Matrix.of(attention.out),
        mlp_in=Matrix.of(block.ff.linears[0]),
        mlp_out=Matrix.of(block.ff.linears[1]),
    )


def _modulations(rows: Tensor, *, shift_first: bool) -> tuple[Modulation, ...]:
    """One `Modulation` of one row per Euler step; the two published orders differ."""
    first, second = rows.float().chunk(2, dim=-1)
    shift, scale = (first, second) if shift_first else (second, first)
    return tuple(Modulation(shift[i : i + 1].contiguous(), scale[i : i + 1].contiguous()) for i in range(len(rows)))


def _product(after: nn.Linear, before: nn.Linear) -> Matrix:
    """after(before(x)) as one map."""
    weight = after.weight.double() @ before.weight.double()
    bias = after.weight.double() @ before.bias.double() + after.bias.double()
    return Matrix(weight.to(after.weight.dtype), bias.to(after.weight.dtype))
