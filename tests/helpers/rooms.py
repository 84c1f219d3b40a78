"""The rooms of the package, from the ground up."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
ORDER = (
    ("kernels",),  # device code imports device code alone
    ("errors",),
    ("noise", "config", "files", "tables", "progress"),
    ("types",),
    ("model", "robots"),
    ("ops", "checkpoints"),
    ("engine", "envs"),
    ("presets",),
    ("policy", "data", "aot_build"),
    ("control",),
    ("training", "evaluation", "serving"),
    ("demo",),
    ("benchmarks",),
    ("cli",),
)
"""From the ground up. Rooms of one row do not import each other."""
