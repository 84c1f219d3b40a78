"""The paper on a page: features from a video model's first look, a velocity field over actions, two losses.

Everything here is the definition of the function that the package serves: plain PyTorch, differentiable, any device.
All randomness comes in as tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dit4dit.config import ModelConfig
from dit4dit.model import flow
from dit4dit.model.action_head import ActionHead
from dit4dit.model.text import TextEncoder
from dit4dit.model.vae import VideoVae
from dit4dit.model.video_backbone import VideoBackbone
from dit4dit.types import Batch


@dataclass(frozen=True)
class Draws:
    """All random draws of one training step, so that a step can be repeated.

    Attributes:
        posterior: standard normal [B, z, 1, h, w], for the conditioning latent.
        latent: standard normal [B, z, T, h, w], initial latents of the feature pass.
        video_time: [B] in [0, 1].
        video_noise: standard normal [B, z, T - 1, h, w].
        action_time: [R * B] in (0, 1.002].
        action_noise: standard normal [R * B, K, A].
    """

    posterior: Tensor
    latent: Tensor
    video_time: Tensor
    video_noise: Tensor
    action_time: Tensor
    action_noise: Tensor

    @classmethod
    def random(cls, config: ModelConfig, batch: Batch, generator: torch.Generator | None) -> Draws:
        """Fresh draws for `batch` from `generator` (on the batch's device)."""
        if batch.latents is not None:
            rows, columns = batch.latents.mean.shape[-2:]
        else:
            assert batch.video is not None
            rows, columns = config.latent_size(batch.video.shape[3], batch.video.shape[4])
        return cls.draw(config, batch.actions.shape[0], (rows, columns), generator, batch.actions.device)

    @classmethod
    def draw(
        cls,
        config: ModelConfig,
        count: int,
        size: tuple[int, int],
        generator: torch.Generator | None,
        device: torch.device,
    ) -> Draws:
        """Fresh draws for `count` samples whose latents have `size` rows and columns."""
        repeated = count * config.flow.repeated_diffusion_steps

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        z, frames = config.vae.z_dim, config.latent_frames
        return cls(
            posterior=normal(count, z, 1, *size),
            latent=normal(count, z, frames, *size),
            video_time=flow.video_times(count, config.flow, generator, device),
            video_noise=normal(count, z, frames - 1, *size),
            action_time=flow.action_times(repeated, config.flow, generator, device),
            action_noise=normal(repeated, config.head.action_horizon, config.head.action_dim),
        )


@dataclass(frozen=True)
class Losses:
    """What one training step minimises; a term that the mode leaves out is None."""

    total: Tensor
    action: Tensor | None
    video: Tensor | None


class DiT4DiT(nn.Module):
    """Observation and instruction in, action chunk out.

    Parts that a use does not need are None: no text encoder where prompt embeddings are given, no clip VAE where only
    one frame is seen, no head in a video-only model.
    """

    def __init__(
        self, config: ModelConfig, *, with_text: bool = True, with_head: bool = True, with_video_vae: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.text = TextEncoder(config.text) if with_text else None
        self.backbone = VideoBackbone(config)
        self.video_vae = VideoVae(config.vae) if with_video_vae else None
        self.head = ActionHead(config.head) if with_head else None
        for frozen in (self.text, self.backbone.frame_encoder, self.video_vae):
            if frozen is not None:
                frozen.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.backbone.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the backbone; the head has its own."""
        return self.backbone.transformer.dtype

    def train(self, mode: bool = True) -> DiT4DiT:
        """Training mode for what is trained; the frozen parts always stay in evaluation mode."""
        super().train(mode)
        for frozen in (self.text, self.backbone.frame_encoder, self.video_vae):
            if frozen is not None:
                frozen.eval()
        return self

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [B, L] -> prompt embeddings [B, L, text_in]; a function of the instruction alone."""
        if self.text is None:
            raise RuntimeError("this model was built without its text encoder: give prompt embeddings instead")
        with torch.no_grad():
            return self.text(tokens)

    def context(self, prompt_embeds: Tensor) -> Tensor:
        """Prompt embeddings [B, L, text_in] -> projected text [B, L, text_dim]."""
        return self.backbone.transformer.project_text(prompt_embeds)

    def features(self, frame: Tensor, context: Tensor, posterior: Tensor, latent: Tensor) -> Tensor:
        """frame [B, 3, H, W] in [-1, 1], context [B, L, text_dim], noise as in `Draws` -> features [B, S, D]."""
        return self.backbone.features(self.backbone.condition(frame, posterior), latent, context)

    @torch.no_grad()
    def sample(
        self,
        frame: Tensor,
        context: Tensor,
        state: Tensor | None,
        posterior: Tensor,
        latent: Tensor,
        action: Tensor,
        steps: int | None = None,
        guidance: flow.GuidanceTensors | None = None,
    ) -> Tensor:
        """Normalised actions, float32 [B, K, A_model], from the head's dtype up (paper, algorithm 1).

        Args:
            frame: joined views [B, 3, H, W] in [-1, 1].
            context: projected text [B, L, text_dim].
            state: encoded, padded state [B, 1, state_dim], or None for a model without a state token.
            posterior, latent, action: standard normal [B, z, 1, h, w], [B, z, T, h, w], [B, K, A_model].
            steps: Euler steps; the configuration's number when None.
            guidance: keep to the left-over of the chunk before; weights [K] or [B, K].
        """
        head = self._head()
        dtype = head.dtype
        features = self.features(frame, context, posterior, latent).to(dtype)
        state = None if state is None else state.to(dtype)
        return head.sample(action.to(dtype), features, state, steps, guidance).float()

    def loss(self, batch: Batch, draws: Draws) -> Losses:
        """The training loss of `batch` with the given random draws (paper, section 3.3).

        Raises:
            RuntimeError: the video loss is wanted and the model was built without its clip VAE.
        """
        mode = self.config.flow.training
        context = self.context(batch.prompt_embeds)
        condition = self._condition(batch, draws.posterior)
        action = self._action_loss(batch, draws, condition, context) if mode != "video" else None
        video = self._video_loss(batch, draws, condition, context) if mode != "action" else None
        weighted = 0.0 if video is None else self.config.flow.future_video_weight * video
        total = weighted if action is None else action + weighted
        assert isinstance(total, Tensor)
        return Losses(total=total, action=action, video=video)

    def _action_loss(self, batch: Batch, draws: Draws, condition: Tensor, context: Tensor) -> Tensor:
        head = self._head()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.flow.action_grad_to_backbone):
            features = self.backbone.features(condition, draws.latent, context)
        features = features.to(head.dtype)
        return head.loss(batch.actions, batch.action_mask, features, batch.state, draws.action_time, draws.action_noise)

    def _condition(self, batch: Batch, noise: Tensor) -> Tensor:
        if batch.latents is not None:
            return self.backbone.posterior(batch.latents.mean, batch.latents.std, noise)
        assert batch.video is not None, "a batch has a video or its latents"
        return self.backbone.condition(batch.video[:, 0], noise)

    def _video_loss(self, batch: Batch, draws: Draws, condition: Tensor, context: Tensor) -> Tensor:
        some = slice(None, None, self.config.flow.video_every)
        video = None if batch.video is None else batch.video[some]
        clean = batch.latents.clip[some] if batch.latents is not None else self.encode_clip(video)
        given = (condition[some], context[some], draws.video_time[some], draws.video_noise[some])
        return self.backbone.video_loss(clean, *given)

    def encode_clip(self, video: Tensor | None) -> Tensor:
        """Clip [B, F, 3, H, W] in [-1, 1] -> normalised posterior means, float32 [B, z, T, h, w]."""
        if self.video_vae is None:
            raise RuntimeError("the video loss needs the clip VAE: build the model with with_video_vae=True")
        assert video is not None, "a batch has a video or its latents"
        with torch.no_grad():
            return self.video_vae.encode(video.transpose(1, 2))

    def _head(self) -> ActionHead:
        if self.head is None:
            raise RuntimeError("this model has no action head: it was trained on video alone")
        return self.head
