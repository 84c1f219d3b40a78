"""What one chunk is made of, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from dit4dit.engine.packs import PromptPack


class StepInputs(NamedTuple):
    """One chunk's inputs on the device, in the order that `Engine.sample` takes them."""

    frame: Tensor
    packs: Sequence[PromptPack]
    state: Tensor | None
    posterior: Tensor
    latent: Tensor
    action: Tensor
