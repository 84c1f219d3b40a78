"""One camera frame and a text context -> backbone features: encode the frame, add noise for the future, run the blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dit4dit.config import ModelConfig
from dit4dit.model import flow
from dit4dit.model.vae import FrameEncoder, LatentScale
from dit4dit.model.video_dit import VideoDiT


class VideoBackbone(nn.Module):
    """The video diffusion transformer with the frame encoder in front of it (paper, section 3.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.frame_encoder = FrameEncoder(config.vae)
        self.scale = LatentScale(config.vae)
        self.transformer = VideoDiT(config.dit)

    def condition(self, frame: Tensor, posterior_noise: Tensor) -> Tensor:
        """A sample of the frame's latent, normalised.

        frame [B, 3, H, W] in [-1, 1], posterior_noise [B, z, 1, h, w] standard normal -> float32 [B, z, 1, h, w].
        """
        with torch.no_grad():
            mean, std = self.frame_encoder(frame)
        return self.posterior(mean, std, posterior_noise)

    def posterior(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """Posterior mean and deviation [B, z, h, w], noise [B, z, 1, h, w] -> normalised sample [B, z, 1, h, w]."""
        return self.scale.normalize(mean[:, :, None] + std[:, :, None] * noise)

    def features(self, condition: Tensor, latent_noise: Tensor, context: Tensor) -> Tensor:
        """Features of the inference-style pass: one clean frame, the others pure noise at time sigma.

        condition [B, z, 1, h, w], latent_noise [B, z, T, h, w], context [B, L, text_dim] -> [B, S, D].
        """
        latents = torch.cat([condition, latent_noise[:, :, 1:]], dim=2)
        times = self._times(latents, torch.full((len(latents),), self.config.sigma, device=latents.device))
        return self.transformer.features(latents, times, context, self.config.extract_layer)

    def video_loss(self, clean: Tensor, condition: Tensor, context: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Flow-matching loss on the future latent frames.

        Args:
            clean: normalised latents of the whole clip (posterior means) [B, z, T, h, w].
            condition: the sampled latent that frame 0 is pinned to [B, z, 1, h, w].
            context: projected text [B, L, text_dim].
            t: times of the future frames [B] in [0, 1].
            noise: standard normal [B, z, T - 1, h, w].
        """
        x_t, target = flow.bridge(clean[:, :, 1:], noise, t)
        return (self.future_velocity(x_t, condition, context, t) - target).square().mean()

    def future_velocity(self, future: Tensor, condition: Tensor, context: Tensor, t: Tensor) -> Tensor:
        """Velocity of noisy future latents [B, z, T - 1, h, w] at times t [B], behind the conditioning latent; float32."""
        latents = torch.cat([condition, future], dim=2)
        return self.transformer.velocity(latents, self._times(latents, t), context)[:, :, 1:].float()

    def _times(self, latents: Tensor, t: Tensor) -> Tensor:
        """One time per latent frame [B, T]: the conditioning frame's constant, then t [B]."""
        times = t[:, None].expand(-1, latents.shape[2]).clone()
        times[:, 0] = self.config.conditional_frame_timestep
        return times
