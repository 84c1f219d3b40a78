"""The flow-matching action head: a small diffusion transformer that reads backbone features and writes velocities.

Parameter names follow the published checkpoints below `action_model.` (paper, section 3.2).
"""

from __future__ import annotations

import math
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit4dit.config import HeadConfig
from dit4dit.model import flow


def sinusoid(t: Tensor, width: int, *, cos_first: bool, denominator: float) -> Tensor:
    """Sinusoids of t [B] with frequencies 10000^(-i / denominator), float32 [B, width]."""
    half = width // 2
    exponent = -math.log(10000.0) * torch.arange(half, device=t.device, dtype=torch.float32) / denominator
    angle = t.float()[:, None] * exponent.exp()[None]
    parts = (angle.cos(), angle.sin()) if cos_first else (angle.sin(), angle.cos())
    return torch.cat(parts, dim=-1)


class Attention(nn.Module):
    """Multi-head attention with biases, to itself or to a context."""

    def __init__(self, config: HeadConfig, context_dim: int | None) -> None:
        super().__init__()
        width = config.width
        source = width if context_dim is None else context_dim
        self.heads = config.num_heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(source, width)
        self.to_v = nn.Linear(source, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(config.dropout)])

    @property
    def out(self) -> nn.Linear:
        """The output matrix."""
        return cast(nn.Linear, self.to_out[0])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [B, N, W], context [B, M, C] -> [B, N, W]."""
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        for layer in self.to_out:
            y = layer(y)
        return y


class AdaLayerNorm(nn.Module):
    """Layer norm without weights, then scale and shift from the time embedding (scale comes first in the matrix)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width, eps=1e-5, elementwise_affine=False)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x [B, N, W], temb [B, W] -> [B, N, W]."""
        scale, shift = self.linear(F.silu(temb)).chunk(2, dim=-1)
        return self.norm(x) * (1 + scale[:, None]) + shift[:, None]


class GeluProjection(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        width = config.width
        last = [nn.Dropout(config.dropout)] if config.final_dropout else []
        self.net = nn.ModuleList(
            [GeluProjection(width, 4 * width), nn.Dropout(config.dropout), nn.Linear(4 * width, width), *last]
        )

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        """The matrices before and after the activation."""
        return cast(GeluProjection, self.net[0]).proj, cast(nn.Linear, self.net[2])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class Block(nn.Module):
    """x += Drop(Attn(AdaLN(x))); x += FF(LayerNorm(x))."""

    def __init__(self, config: HeadConfig, context_dim: int | None) -> None:
        super().__init__()
        self.cross = context_dim is not None
        self.norm1 = AdaLayerNorm(config.width)
        self.attn1 = Attention(config, context_dim)
        self.norm3 = nn.LayerNorm(config.width, eps=1e-5, elementwise_affine=False)
        self.ff = FeedForward(config)
        self.final_dropout = nn.Dropout(config.dropout) if config.final_dropout else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor, context: Tensor) -> Tensor:
        """x [B, N, W], temb [B, W], context [B, S, D] -> [B, N, W]."""
        y = self.norm1(x, temb)
        x = x + self.final_dropout(self.attn1(y, context if self.cross else y))
        return x + self.ff(self.norm3(x))


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(256, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        wave = sinusoid(t, 256, cos_first=True, denominator=127).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(wave)))


class TimestepEncoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(width)

    def forward(self, t: Tensor) -> Tensor:
        """Integer timesteps [B] -> temb [B, W]."""
        return self.timestep_embedder(t)


class HeadTransformer(nn.Module):
    """The blocks: even ones attend to the features, odd ones to the tokens themselves."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.timestep_encoder = TimestepEncoder(config.width)
        self.transformer_blocks = nn.ModuleList(
            Block(config, None if i % 2 and config.interleave_self_attention else config.context_dim)
            for i in range(config.num_layers)
        )
        self.norm_out = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        self.proj_out_1 = nn.Linear(config.width, 2 * config.width)
        self.proj_out_2 = nn.Linear(config.width, config.output_dim)
        self.gradient_checkpointing = False

    @property
    def blocks(self) -> list[Block]:
        """The transformer blocks, in order."""
        return [cast(Block, block) for block in self.transformer_blocks]

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """x [B, N, W], t [B] integer, context [B, S, D] -> [B, N, output_dim]."""
        temb = self.timestep_encoder(t)
        for block in self.transformer_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, temb, context, use_reentrant=False)
            else:
                x = block(x, temb, context)
        shift, scale = self.proj_out_1(F.silu(temb)).chunk(2, dim=-1)
        return self.proj_out_2(self.norm_out(x) * (1 + scale[:, None]) + shift[:, None])


class TwoLayer(nn.Module):
    """Linear, ReLU, Linear: the state encoder and the action decoder."""

    def __init__(self, into: int, hidden: int, out: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(into, hidden)
        self.layer2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(F.relu(self.layer1(x)))


class ActionEncoder(nn.Module):
    """Noisy actions and their time -> tokens."""

    def __init__(self, action_dim: int, width: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(action_dim, width)
        self.layer2 = nn.Linear(2 * width, width)
        self.layer3 = nn.Linear(width, width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x [B, K, A], t [B] integer -> [B, K, W]."""
        y = self.layer1(x)
        wave = sinusoid(t, y.shape[-1], cos_first=False, denominator=y.shape[-1] // 2).to(y.dtype)
        y = torch.cat([y, wave[:, None].expand_as(y)], dim=-1)
        return self.layer3(F.silu(self.layer2(y)))


class ActionHead(nn.Module):
    """Velocity of noisy actions, given backbone features and, where the model has one, the state."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.model = HeadTransformer(config)
        self.state_encoder = TwoLayer(config.state_dim, config.hidden_size, config.width) if config.state_dim else None
        self.action_encoder = ActionEncoder(config.action_dim, config.width)
        self.action_decoder = TwoLayer(config.output_dim, config.hidden_size, config.action_dim)
        self.position_embedding = nn.Embedding(config.max_seq_len, config.width) if config.add_pos_embed else None

    @property
    def dtype(self) -> torch.dtype:
        return self.action_decoder.layer2.weight.dtype

    def velocity(self, x: Tensor, t: Tensor, context: Tensor, state: Tensor | None) -> Tensor:
        """Velocity v = noise - data at the noisy actions x (paper, section 3.2).

        Args:
            x: noisy normalised actions [B, K, A].
            t: integer timestep bucket per sample [B], 0 to num_timestep_buckets (a little above in training).
            context: backbone features [B, S, D].
            state: encoded state [B, 1, state_dim]; None where the model has no state token, and where a request has no
                state, which then goes without the token, as in the published code.

        Returns:
            [B, K, A]
        """
        tokens = self.action_encoder(x, t)
        if self.position_embedding is not None:
            tokens = tokens + self.position_embedding.weight[: tokens.shape[1]]
        if self.state_encoder is not None and state is not None:
            tokens = torch.cat([self.state_encoder(state), tokens], dim=1)
        out = self.model(tokens, t, context)[:, -x.shape[1] :]
        return self.action_decoder(out)

    def sample(
        self,
        noise: Tensor,
        context: Tensor,
        state: Tensor | None,
        steps: int | None = None,
        guidance: flow.GuidanceTensors | None = None,
    ) -> Tensor:
        """Noise [B, K, A] -> normalised actions [B, K, A] in `steps` Euler steps (default: the configuration's).

        guidance: keep to the left-over of the chunk before; weights [K] or [B, K].
        """
        count = self.config.num_inference_timesteps if steps is None else steps
        velocity = partial(self._velocity_at, context=context, state=state)
        if guidance is None:
            return flow.integrate(velocity, noise, count)

        def pulled(x: Tensor, t: float) -> Tensor:
            v = flow.guided(
                x.float(), velocity(x, t).float(), t, guidance.previous, guidance.weights, guidance.max_guidance
            )
            return v.to(x.dtype)

        return flow.integrate(pulled, noise, count)

    def _velocity_at(self, x: Tensor, t: float, *, context: Tensor, state: Tensor | None) -> Tensor:
        index = flow.bucket(t, self.config.num_timestep_buckets)
        return self.velocity(x, torch.full((x.shape[0],), index, device=x.device), context, state)

    def loss(
        self, actions: Tensor, mask: Tensor, context: Tensor, state: Tensor | None, t: Tensor, noise: Tensor
    ) -> Tensor:
        """Flow-matching loss; the batch is tiled so that it matches the number of (t, noise) draws.

        Args:
            actions: normalised, zero-padded actions [B, K, A].
            mask: True on real entries [B, K, A].
            context: backbone features [B, S, D].
            state: [B, 1, state_dim] or None.
            t: times [R * B] in (0, 1.002).
            noise: standard normal [R * B, K, A]; not masked, padded dimensions carry noise too.
        """
        repeats = t.shape[0] // actions.shape[0]
        actions, mask, context = (y.repeat(repeats, 1, 1) for y in (actions, mask, context))
        if state is not None:
            state = state.repeat(repeats, 1, 1)
        x_t, target = flow.bridge(actions, noise, t)
        index = (t * self.config.num_timestep_buckets).long()
        return flow.masked_mse(self.velocity(x_t, index, context, state), target, mask)
