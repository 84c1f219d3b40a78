"""Models that are told no state."""

from __future__ import annotations

from dataclasses import replace

from dit4dit.config import ModelConfig


def without_state(model: ModelConfig) -> ModelConfig:
    """The same model with no state token."""
    return replace(model, head=replace(model.head, state_dim=None))
