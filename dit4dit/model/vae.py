"""The VAE. Latent frame 0 of the causal Wan VAE depends on pixel frame 0 alone, so a policy needs only 2-D convolutions.

`FrameEncoder` is that: each causal 3-D convolution reduced to its last temporal slice (the others meet zero padding),
the temporal down-samplings skipped. It agrees with `AutoencoderKLWan` on the padded clip and costs a twentieth.
`VideoVae` is diffusers' own module, for several frames: the video loss in training, pictures of predicted futures.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit4dit.config import VaeConfig
from dit4dit.model.precision import full_precision

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

SMALLEST_NORM = 1e-12
"""A pixel's channel vector is divided by no less."""
LOGVAR_BOUNDS = (-30.0, 20.0)
"""The logarithm of a posterior's variance is taken for no less and no more."""


def rms_norm_silu(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    """x [B, C, H, W] / |x| * sqrt(C) * gamma [C, 1, 1] over the channels of each pixel; then y * sigmoid(y) where `silu`."""
    # spelled out: torch's own normalize over channels is several times slower on a CPU; wide: the square of 256 is more than
    # float16 holds
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = x.to(wide).square().sum(dim=1, keepdim=True).sqrt().clamp_min(SMALLEST_NORM)
    y = x.to(wide) / norm
    y = y * (x.shape[1] ** 0.5 * gamma.to(wide))
    return (F.silu(y, inplace=not y.requires_grad) if silu else y).to(x.dtype)


def mean_and_std(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Means and logarithms of variances [B, 2 z, ...] -> posterior mean and standard deviation, float32 [B, z, ...]."""
    mean, logvar = moments.float().chunk(2, dim=1)
    return mean, torch.exp(0.5 * logvar.clamp(*LOGVAR_BOUNDS))


class ChannelRmsNorm(nn.Module):
    """Root-mean-square norm over the channels of [B, C, H, W], with a swish behind it where `silu`."""

    def __init__(self, channels: int, *, silu: bool = True) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm_silu(x, self.gamma, self.silu)


class ResidualBlock(nn.Module):
    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.norm1 = ChannelRmsNorm(into)
        self.conv1 = nn.Conv2d(into, out, 3, padding=1)
        self.norm2 = ChannelRmsNorm(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(into, out, 1) if into != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.norm2(self.conv1(self.norm1(x)))) + self.conv_shortcut(x)


class AttentionBlock(nn.Module):
    """Single-head attention over the pixels of one frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelRmsNorm(channels, silu=False)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.proj(y)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resample = nn.ModuleList([nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.resample:
            x = layer(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(channels)])
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels), ResidualBlock(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class FrameEncoder(nn.Module):
    """One picture -> the posterior of its latent, with two-dimensional convolutions only."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        layers: list[nn.Module] = []
        for level, (into, out) in enumerate(pairwise(widths)):
            layers += [ResidualBlock(into if i == 0 else out, out) for i in range(config.num_res_blocks)]
            if level < len(config.dim_mult) - 1:
                layers.append(Downsample(out))
        self.down_blocks = nn.ModuleList(layers)
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = ChannelRmsNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_dim, 3, padding=1)
        self.quant_conv = nn.Conv2d(2 * config.z_dim, 2 * config.z_dim, 1)

    def forward(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        """frame [B, 3, H, W] in [-1, 1] -> posterior mean and standard deviation, float32 [B, z, H/8, W/8]."""
        return mean_and_std(self.moments(frame))

    def moments(self, frame: Tensor) -> Tensor:
        """frame [B, 3, H, W] in [-1, 1] -> mean and logarithm of the variance, one after the other, [B, 2 z, H/8, W/8]."""
        with full_precision():
            x = self.conv_in(frame.to(self.conv_in.weight.dtype))
            for layer in self.down_blocks:
                x = layer(x)
            x = self.conv_out(self.norm_out(self.mid_block(x)))
            moments: Tensor = self.quant_conv(x)
        return moments

    @staticmethod
    def convert(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This module's weights from those of an `AutoencoderKLWan` (views of them, no copies)."""
        out: dict[str, Tensor] = {}
        for name, value in weights.items():
            if not name.startswith(("encoder.", "quant_conv.")) or ".time_conv." in name:
                continue
            if name.endswith("gamma"):
                value = value.reshape(-1, 1, 1)
            elif value.dim() == 5:
                value = value[:, :, -1]
            out[name.removeprefix("encoder.")] = value
        return out


class LatentScale(nn.Module):
    """Latents <-> normalised latents, (z - mean) / std per channel, with the VAE configuration's own numbers.

    diffusers' pipelines keep 1/std under the name latents_std; here mean and std only ever come from the configuration.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", self._column(config.latents_mean), persistent=False)
        self.register_buffer("std", self._column(config.latents_std), persistent=False)

    @staticmethod
    def _column(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device="cpu").reshape(1, -1, 1, 1, 1)

    def normalize(self, z: Tensor) -> Tensor:
        """[B, z, T, h, w] float32 -> the same shape, about unit variance."""
        return (z - self.mean) / self.std

    def denormalize(self, z: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        return z * self.std + self.mean


class VideoVae(nn.Module):
    """diffusers' `AutoencoderKLWan` for clips: deterministic encoding and decoding, in normalised latents."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.wan = build_wan(config)
        self.scale = LatentScale(config)

    def channels_last(self) -> None:
        """Lay the convolutions' weights out with the channels last, which takes a quarter less time on a CPU; in place."""
        for weight in self.wan.parameters():
            if weight.dim() == 5:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)

    def encode(self, video: Tensor) -> Tensor:
        """video [B, 3, F, H, W] in [-1, 1] -> normalised posterior means, float32 [B, z, T, H/8, W/8]."""
        return self.scale.normalize(self.posterior(video).mean.float())

    def posterior(self, video: Tensor) -> Any:
        """video [B, 3, F, H, W] in [-1, 1] -> diffusers' distribution; its `mean` and `std` are [B, z, T, H/8, W/8]."""
        with full_precision():
            return self.wan.encode(video.to(self.wan.quant_conv.weight.dtype)).latent_dist

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, z, T, h, w] -> video [B, 3, F, H, W], float32 in [-1, 1]."""
        dtype = self.wan.quant_conv.weight.dtype
        with full_precision():
            video = self.wan.decode(self.scale.denormalize(latents.float()).to(dtype)).sample
        return video.float().clamp(-1, 1)


def wan_arguments(config: VaeConfig) -> dict[str, Any]:
    """The keyword arguments (and JSON keys) that diffusers' `AutoencoderKLWan` takes for `config`."""
    return {
        "base_dim": config.base_dim,
        "decoder_base_dim": config.decoder_base_dim,
        "z_dim": config.z_dim,
        "dim_mult": list(config.dim_mult),
        "num_res_blocks": config.num_res_blocks,
        "attn_scales": [],
        "temperal_downsample": list(config.temperal_downsample),
        "dropout": 0.0,
        "latents_mean": list(config.latents_mean),
        "latents_std": list(config.latents_std),
    }


def build_wan(config: VaeConfig) -> AutoencoderKLWan:
    """diffusers' module for `config`, with fresh weights on the current default device."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(**wan_arguments(config))
