"""What goes into a policy, what comes out, and what training feeds the model. NumPy only; tensors appear in `Batch`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dit4dit.errors import InputError, did_you_mean, shown
from dit4dit.noise import Noise

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "MAX_GUIDANCE",
    "ActionChunk",
    "Batch",
    "ClipLatents",
    "Guidance",
    "Noise",
    "Observation",
    "Schedule",
    "check_strength",
]

Schedule = Literal["linear", "exp", "ones", "zeros"]
MAX_GUIDANCE = 10.0
"""Bound of the guidance's strength where none is given, LeRobot's."""
_LARGEST = float(np.finfo(np.float32).max)


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
        control_hz: how many of them the robot executes per second.
        normalized: float32 [K, A_model], what the model wrote, before un-normalisation.
        noise: the noise that led to them; give it again to get the same bits.
        observed_at_ns: when what they follow from was seen, ns of CLOCK_MONOTONIC on this machine (`time.monotonic_ns`); row i is
            meant for i / control_hz seconds later. None where nobody stamped it.
        computed_at_ns: when the chunk was there, on the same clock; None where nobody stamped it.
    """

    actions: NDArray[np.float32]
    names: tuple[str, ...]
    control_hz: float
    normalized: NDArray[np.float32]
    noise: Noise
    observed_at_ns: int | None = None
    computed_at_ns: int | None = None


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


def check_strength(where: str, schedule: str, max_guidance: float) -> None:
    """InputError unless it is a schedule and a finite bound above 0."""
    if not isinstance(schedule, str) or schedule not in get_args(Schedule):
        near = did_you_mean(schedule, get_args(Schedule))
        raise InputError(
            f"{where}: schedule: expected one of {', '.join(get_args(Schedule))}, got {shown(schedule)}{near}"
        )
    number = isinstance(max_guidance, (int, float, np.integer, np.floating)) and not isinstance(max_guidance, bool)
    if not number or not 0.0 < max_guidance <= _LARGEST:
        raise InputError(f"{where}: max_guidance: expected a finite number above 0, got {shown(max_guidance)}")


@dataclass(frozen=True, eq=False)
class Guidance:
    """What one request is to keep to: real-time chunking, where the next chunk goes on from what the robot is still carrying out
    of the chunk before.

    The method is arXiv 2506.07339, in the guided form without a gradient that LeRobot has; its formulas are in `model.flow`.

    Attributes:
        previous: left-over of the chunk before, NORMALISED as the model writes it: `chunk.normalized[executed:]`, [n, A_model],
            1 <= n <= K. Its row i is meant for the same control step as row i of the new chunk. Actions in robot units have
            another width or range, and only the width can be told. A left-over shorter than a chunk guides its own rows and no
            others.
        delay: rows of it that will have been executed when the new chunk is there, 0 to n: they have the full weight.
        horizon: rows from here on are free; the weight falls from the delay to here. n where None, and at most n; at least
            the delay.
        schedule: how it falls: "linear", "exp", "ones" (not at all) or "zeros" (at once).
        max_guidance: bound of the strength, above 0.
    """

    previous: NDArray[np.float32]
    delay: int = 0
    horizon: int | None = None
    schedule: Schedule = "linear"
    max_guidance: float = MAX_GUIDANCE

    def __post_init__(self) -> None:
        previous = _array(self.previous)
        if previous.ndim != 2 or 0 in previous.shape or not np.issubdtype(previous.dtype, np.floating):
            raise InputError(
                "guidance: previous: expected chunk.normalized[executed:], floats [n, A] with n >= 1, got "
                f"{previous.dtype} {list(previous.shape)}; give guidance=None where nothing is left"
            )
        with np.errstate(over="ignore"):
            kept = np.array(previous, np.float32)  # a copy: the caller's buffer may change
        if not np.isfinite(kept).all():
            raise InputError(
                "guidance: previous: expected finite numbers, got NaN, infinite ones or ones beyond float32; give what the model "
                "wrote, chunk.normalized[executed:]"
            )
        check_strength("guidance", self.schedule, self.max_guidance)
        self._check_whole("delay", self.delay, 0, len(previous), "the rows of previous")
        if self.horizon is not None:
            self._check_whole("horizon", self.horizon, self.delay, None, "at least the delay")
        kept.flags.writeable = False
        object.__setattr__(self, "previous", kept)
        object.__setattr__(self, "max_guidance", float(self.max_guidance))

    @staticmethod
    def _check_whole(name: str, value: object, low: int, high: int | None, what: str) -> None:
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or value < low or (high is not None and value > high):  # type: ignore[operator]
            wanted = f">= {low}" if high is None else f"{low} to {high}"
            raise InputError(f"guidance: {name}: expected a whole number {wanted} ({what}), got {shown(value)}")

    def check(self, length: int, width: int) -> None:
        """InputError unless it fits chunks of `length` rows and `width` model dimensions."""
        rows, found = self.previous.shape
        if rows > length or found != width:
            raise InputError(
                f"guidance: previous: expected [n, A] = [1 to {length}, {width}], as ActionChunk.normalized[executed:] is, got "
                f"{[rows, found]}"
            )
        if self.horizon is not None and self.horizon > length:
            raise InputError(f"guidance: horizon: expected at most {length}, the rows of a chunk, got {self.horizon}")


def _array(value: object) -> NDArray[Any]:
    """The value as an array; what makes none, such as rows of unequal lengths or a tensor on a GPU, as one object."""
    try:
        return np.asarray(value)
    except (TypeError, ValueError):
        return np.array(None)
