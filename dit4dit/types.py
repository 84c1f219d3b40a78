"""What goes into a policy, what comes out, and what training feeds the model. NumPy only; tensors appear in `Batch`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dit4dit.noise import Noise

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ActionChunk", "Batch", "ClipLatents", "Noise", "Observation"]


@dataclass(frozen=True, eq=False)
class Observation:
    """What the robot sees and feels at one time step.

    Attributes:
        images: view name -> uint8 [H, W, 3], RGB, 0..255, upright. Names as the embodiment lists them.
        state: key -> float32 [d] in robot units (metres, radians). Names and sizes as the embodiment lists them.
    """

    images: Mapping[str, NDArray[np.uint8]]
    state: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ActionChunk:
    """The next K actions.

    Attributes:
        actions: float32 [K, A] in robot units.
        names: A names, one per column of `actions`, such as "x" or "left_arm.3".
        rate_hz: how many of them the robot executes per second.
        normalized: float32 [K, A_model], what the model wrote, before un-normalisation.
        noise: the noise that led to them; give it again to get the same bits.
    """

    actions: NDArray[np.float32]
    names: tuple[str, ...]
    rate_hz: float
    normalized: NDArray[np.float32]
    noise: Noise


@dataclass(frozen=True, eq=False)
class ClipLatents:
    """What the frozen VAE makes of a batch's clips, on the model's device.

    Attributes:
        mean, std: posterior of the first frame, float32 [B, z, h, w], not normalised.
        clip: normalised posterior means of the whole clip, float32 [B, z, T, h, w].
    """

    mean: Tensor
    std: Tensor
    clip: Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """One training batch, on the model's device.

    Attributes:
        video: joined views, float [B, F, 3, H, W] in [-1, 1]; frame 0 is the one that a policy sees. None where `latents`
            stand for it.
        prompt_embeds: embedded instructions [B, L, text_in].
        actions: normalised, zero-padded actions [B, K, A_model].
        action_mask: True on real entries [B, K, A_model].
        state: encoded, padded state [B, 1, state_dim]; None for a model without a state token.
        latents: the clips as the VAE encodes them, computed beforehand; None where the model encodes `video` itself.
    """

    video: Tensor | None
    prompt_embeds: Tensor
    actions: Tensor
    action_mask: Tensor
    state: Tensor | None = None
    latents: ClipLatents | None = None
