"""The video diffusion transformer (Cosmos-Predict2.5), in plain PyTorch, under diffusers' parameter names.

It differs from diffusers' module in three ways that users need: it stops after a given block, takes the projected text
context (a function of the instruction alone), and needs no torchvision.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit4dit.config import VideoDitConfig
from dit4dit.model.action_head import sinusoid


class RmsNorm(nn.Module):
    """Root-mean-square norm with weight, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


class TimeEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, width, bias=False)
        self.linear_2 = nn.Linear(width, 3 * width, bias=False)

    def forward(self, wave: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(wave)))


class TimeEmbedding(nn.Module):
    """Times -> (embedded_t, temb): what each AdaLN starts from, and what all of them add."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.t_embedder = TimeEmbedder(width)
        self.norm = RmsNorm(width, eps=1e-6)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t [N] in [0, 1] -> embedded_t [N, D], temb [N, 3 D]."""
        width = self.norm.weight.shape[0]
        wave = sinusoid(t, width, cos_first=True, denominator=width // 2).to(self.norm.weight.dtype)
        return self.norm(wave), self.t_embedder(wave)


class AdaNorm(nn.Module):
    """Low-rank AdaLN: `parts` vectors (shift, scale, and a gate where there are three) per time."""

    def __init__(self, width: int, rank: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear_1 = nn.Linear(width, rank, bias=False)
        self.linear_2 = nn.Linear(rank, parts * width, bias=False)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)

    def modulation(self, embedded_t: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
        """embedded_t [..., D], temb [..., 3 D] -> `parts` tensors [..., D]: shift, scale (, gate)."""
        out = self.linear_2(self.linear_1(F.silu(embedded_t)))
        return (out + temb[..., : out.shape[-1]]).chunk(self.parts, dim=-1)

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """x [B, T, N, D], shift and scale [B, T, 1, D] -> [B, T, N, D]."""
        return self.norm(x) * (1 + scale) + shift


class Attention(nn.Module):
    """Attention with per-head RMS norm on q and k, no biases; rotary positions where `rotary` is given."""

    def __init__(self, config: VideoDitConfig, context_dim: int) -> None:
        super().__init__()
        width = config.width
        self.heads = config.num_heads
        self.norm_q = RmsNorm(config.head_dim, eps=1e-5)
        self.norm_k = RmsNorm(config.head_dim, eps=1e-5)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])

    @property
    def out(self) -> nn.Linear:
        """The output matrix."""
        return cast(nn.Linear, self.to_out[0])

    def forward(self, x: Tensor, context: Tensor, rotary: Tensor | None) -> Tensor:
        """x [B, S, D], context [B, M, C], rotary [2, S, head_dim] (cos, sin) -> [B, S, D]."""
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        q, k = self.norm_q(q), self.norm_k(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.to_out[0](y)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Half-split rotary embedding in float32: x [B, heads, S, d], rotary [2, S, d] -> [B, heads, S, d]."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x.float() * rotary[0] + turned * rotary[1]).to(x.dtype)


def rotary_table(config: VideoDitConfig, frames: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """cos and sin of the 3-D rotary angles, float32 [2, frames * rows * columns, head_dim].

    The angles of one token are [t | h | w], repeated for the second half of the head; positions are plain indices.
    """
    spatial = 2 * (config.head_dim // 6)
    dims = (config.head_dim - 2 * spatial, spatial, spatial)
    grid = (frames, rows, columns)
    angles = []
    for axis, (dim, count, scale) in enumerate(zip(dims, grid, config.rope_scale, strict=True)):
        theta = 10000.0 * scale ** (dim / (dim - 2))
        # each power and product in float32, as the published code has it: float64 here would differ by more than rounding
        frequency = 1.0 / (theta ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim))
        angle = torch.outer(torch.arange(count, device=device, dtype=torch.float32), frequency)
        shape = [1, 1, 1, dim // 2]
        shape[axis] = count
        angles.append(angle.reshape(shape).expand(*grid, dim // 2))
    half = torch.cat(angles, dim=-1).flatten(0, 2)
    full = torch.cat([half, half], dim=-1)
    return torch.stack([full.cos(), full.sin()])


class GeluProjection(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        # index 1 is diffusers' dropout, always zero here
        self.net = nn.ModuleList([GeluProjection(width, hidden), nn.Identity(), nn.Linear(hidden, width, bias=False)])

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        """The matrices before and after the activation."""
        return cast(GeluProjection, self.net[0]).proj, cast(nn.Linear, self.net[2])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class Block(nn.Module):
    """Self-attention, cross-attention to the text, MLP; each behind an AdaLN and a gate."""

    def __init__(self, config: VideoDitConfig) -> None:
        super().__init__()
        width, rank = config.width, config.adaln_lora_dim
        self.norm1 = AdaNorm(width, rank, 3)
        self.attn1 = Attention(config, width)
        self.norm2 = AdaNorm(width, rank, 3)
        self.attn2 = Attention(config, config.text_dim)
        self.norm3 = AdaNorm(width, rank, 3)
        self.ff = FeedForward(width, int(width * config.mlp_ratio))

    def forward(self, x: Tensor, embedded_t: Tensor, temb: Tensor, context: Tensor, rotary: Tensor) -> Tensor:
        """x [B, T, N, D] (N tokens a latent frame), embedded_t [B, T, 1, D], context [B, L, C] -> [B, T, N, D]."""
        frames = x.shape[1]
        shift, scale, gate = self.norm1.modulation(embedded_t, temb)
        y = self.norm1.modulate(x, shift, scale).flatten(1, 2)
        x = x + gate * self.attn1(y, y, rotary).unflatten(1, (frames, -1))
        shift, scale, gate = self.norm2.modulation(embedded_t, temb)
        y = self.norm2.modulate(x, shift, scale).flatten(1, 2)
        x = x + gate * self.attn2(y, context, None).unflatten(1, (frames, -1))
        shift, scale, gate = self.norm3.modulation(embedded_t, temb)
        return x + gate * self.ff(self.norm3.modulate(x, shift, scale))


class PatchEmbed(nn.Module):
    def __init__(self, into: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(into, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class PositionEmbed(nn.Module):
    """Learned embeddings of a token's row and column, the same in every frame."""

    def __init__(self, rows: int, columns: int, width: int) -> None:
        super().__init__()
        self.pos_emb_h = nn.Parameter(0.2 * torch.randn(rows, width))
        self.pos_emb_w = nn.Parameter(0.2 * torch.randn(columns, width))

    def forward(self, rows: int, columns: int) -> Tensor:
        """-> [rows * columns, D]"""
        return (self.pos_emb_h[:rows, None] + self.pos_emb_w[None, :columns]).flatten(0, 1)


def patches(latents: Tensor, patch: int) -> Tensor:
    """[B, C, T, h, w] -> a view of it, [B, T, h/patch, w/patch, C, patch, patch]: a token's vector is (channel, row, column)."""
    batch, channels, frames, rows, columns = latents.shape
    x = latents.view(batch, channels, frames, rows // patch, patch, columns // patch, patch)
    return x.permute(0, 2, 3, 5, 1, 4, 6)


class VideoDiT(nn.Module):
    """Noisy latents, their times and the text context -> features after a block, or the velocity of the latents."""

    def __init__(self, config: VideoDitConfig) -> None:
        super().__init__()
        self.config = config
        patch = config.patch**2
        # the latents, one channel that marks the conditioning frame, one (always zero) that marks padded pixels
        self.patch_embed = PatchEmbed((config.latent_channels + 2) * patch, config.width)
        rows, columns = (side // config.patch for side in config.max_size[1:])
        self.learnable_pos_embed = PositionEmbed(rows, columns, config.width) if config.learned_positions else None
        self.time_embed = TimeEmbedding(config.width)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm_out = AdaNorm(config.width, config.adaln_lora_dim, 2)
        self.proj_out = nn.Linear(config.width, patch * config.latent_channels, bias=False)
        self.crossattn_proj = nn.ModuleList([nn.Linear(config.text_in, config.text_dim)])
        self.gradient_checkpointing = False

    @property
    def blocks(self) -> list[Block]:
        """The transformer blocks, in order."""
        return [cast(Block, block) for block in self.transformer_blocks]

    @property
    def device(self) -> torch.device:
        return self.proj_out.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.proj_out.weight.dtype

    @torch.no_grad()
    def open_gates(self) -> None:
        """For training from nothing: every AdaLN starts as a plain layer norm with a gate of one, whatever the time.

        A checkpoint's weights replace this. With a linear layer's usual weights the gates are random numbers around zero, of both
        signs, and the first thing that would have to be learned is to let anything through.
        """
        embedder = self.time_embed.t_embedder
        width = self.config.width
        for module in self.modules():
            if isinstance(module, AdaNorm):
                module.linear_2.weight.zero_()
        # the sinusoids hardly differ between times in [0, 1], so that one solution serves all
        wave = sinusoid(torch.tensor([0.0, 1.0]), width, cos_first=True, denominator=width // 2)
        hidden = F.silu(embedder.linear_1(wave)).mean(dim=0)
        embedder.linear_2.weight.zero_()
        embedder.linear_2.weight[2 * width :] = hidden / hidden.square().sum()

    def project_text(self, prompt_embeds: Tensor) -> Tensor:
        """Prompt embeddings [B, L, text_in] -> text context [B, L, text_dim], a function of the instruction alone."""
        return F.gelu(self.crossattn_proj[0](prompt_embeds.to(self.dtype)))

    def hidden_states(self, latents: Tensor, times: Tensor, context: Tensor, blocks: int) -> Tensor:
        """Tokens after the first `blocks` blocks.

        Args:
            latents: normalised latents [B, C, T, h, w]; frame 0 is the conditioning frame. Cast to the weights' dtype.
            times: one per latent frame [B, T], in [0, 1]. Cast to the weights' dtype (bfloat16 rounds them).
            context: projected text [B, L, text_dim].
            blocks: how many blocks to run.

        Returns:
            [B, T, (h/patch) * (w/patch), D]
        """
        x = self.embed_latents(latents)
        embedded_t, temb = self.embed_times(times)
        patch = self.config.patch
        grid = (latents.shape[2], latents.shape[3] // patch, latents.shape[4] // patch)
        rotary = rotary_table(self.config, *grid, device=x.device)
        for block in self.transformer_blocks[:blocks]:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, embedded_t, temb, context, rotary, use_reentrant=False)
            else:
                x = block(x, embedded_t, temb, context, rotary)
        return x

    def features(self, latents: Tensor, times: Tensor, context: Tensor, layer: int) -> Tensor:
        """Tokens after the zero-based block `layer`, [B, S, D]; later blocks are not run (paper, section 3.2)."""
        return self.hidden_states(latents, times, context, layer + 1).flatten(1, 2)

    def velocity(self, latents: Tensor, times: Tensor, context: Tensor) -> Tensor:
        """Velocity of the latents [B, C, T, h, w] through all blocks and the output head."""
        x = self.hidden_states(latents, times, context, len(self.transformer_blocks))
        shift, scale = self.norm_out.modulation(*self.embed_times(times))
        x = self.proj_out(self.norm_out.modulate(x, shift, scale))
        patch, (rows, columns) = self.config.patch, (latents.shape[3], latents.shape[4])
        # one token's vector is (row, column, channel): another order than patchify's (channel, row, column)
        x = x.unflatten(2, (rows // patch, columns // patch)).unflatten(-1, (patch, patch, -1))
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def embed_latents(self, latents: Tensor) -> Tensor:
        """Latents [B, C, T, h, w] -> tokens [B, T, N, D] before the first block; frame 0 is marked as conditioning."""
        x = self.patch_embed(self._patchify(latents.to(self.dtype)))
        if self.learnable_pos_embed is None:
            return x
        return x + self.learnable_pos_embed(
            latents.shape[3] // self.config.patch, latents.shape[4] // self.config.patch
        )

    def _patchify(self, latents: Tensor) -> Tensor:
        """[B, C, T, h, w] -> [B, T, N, (C + 2) * patch^2], with the two mask channels appended."""
        batch, _, frames, rows, columns = latents.shape
        masks = latents.new_zeros(batch, 2, frames, rows, columns)
        masks[:, 0, 0].fill_(1)
        x = patches(torch.cat([latents, masks], dim=1), self.config.patch)
        return x.flatten(4, 6).flatten(2, 3)

    def embed_times(self, times: Tensor) -> tuple[Tensor, ...]:
        """times [B, T] -> embedded_t [B, T, 1, D] and temb [B, T, 1, 3 D], what every AdaLN starts from."""
        embedded_t, temb = self.time_embed(times.to(self.dtype).flatten())
        return tuple(y.unflatten(0, times.shape)[:, :, None] for y in (embedded_t, temb))
