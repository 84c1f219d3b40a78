"""The built-in world (`tabletop`) and the small video autoencoder that was trained on its pictures. Imports no torch."""

from __future__ import annotations

from pathlib import Path


def tabletop_vae_dir() -> Path:
    """The folder of the tabletop autoencoder that ships with the package: config.json, model.safetensors, metrics.json."""
    return Path(__file__).parent / "tabletop_vae"
