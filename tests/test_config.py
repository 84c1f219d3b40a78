"""Configurations: round trips, refusals, and that every field is read by somebody."""

from __future__ import annotations

import ast
import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest

from dit4dit import config as module
from dit4dit.config import ModelConfig
from dit4dit.errors import ConfigError
from dit4dit.presets import PRESETS, preset

SOURCE = Path(__file__).parents[1]
CONFIGS = [c for c in vars(module).values() if dataclasses.is_dataclass(c) and isinstance(c, type)]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_round_trip_through_json(name: str) -> None:
    model = preset(name).model
    assert ModelConfig.from_dict(json.loads(json.dumps(model.to_dict()))) == model


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("head", "num_layer"), 3, "config.head: unknown key 'num_layer'; did you mean 'num_layers'"),
        (("head", "num_layers"), "3", "config.head.num_layers: expected int, got '3'"),
        (("head", "num_layers"), True, "config.head.num_layers: expected int, got True"),
        (("dit", "rope_scale"), [1, 2], "config.dit.rope_scale: expected 3 values, got 2"),
        (("flow", "training"), "both", "config.flow.training: expected one of joint, action, video, got 'both'"),
        (("frames",), 6, "frames: expected 1 + a multiple of 4"),
        (("extract_layer",), 99, "extract_layer: expected 0 to 4, got 99"),
        (("image_size",), [30, 32], "image_size: expected multiples of 16"),
        (("head", "context_dim"), 7, "head.context_dim: expected the backbone's 64"),
        (("text", "num_layers"), 3, "dit.text_in: expected the text encoder's 96, got 64"),
        (("vae", "latents_std"), [1.0], "vae.latents_std: expected z_dim = 16 values, got 1"),
        (("flow", "high_sigma_ratio"), 0.5, "set both or neither"),
    ],
)
def test_bad_values_say_where_wanted_and_got(path, value, message: str) -> None:
    data = json.loads(json.dumps(preset("tiny").model.to_dict()))
    node = data
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(data)
    assert message in str(caught.value)


def test_unknown_preset_suggests() -> None:
    with pytest.raises(ConfigError, match="did you mean 'libero'"):
        preset("libera")


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("tiny").model.frames = 9  # type: ignore[misc]
    assert replace(preset("tiny").model, frames=9).latent_frames == 3


def test_every_field_is_read_by_the_package() -> None:
    """A key that nobody reads is a defect. Writing it out again (export) does not count as reading."""
    read: set[str] = set()
    for file in (SOURCE / "dit4dit").rglob("*.py"):
        if file.name == "export.py":
            continue
        tree = ast.parse(file.read_text())
        read |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    fields = {f"{c.__name__}.{f.name}": f.name for c in CONFIGS for f in dataclasses.fields(c)}
    assert len(fields) > 40
    assert [name for name, attribute in fields.items() if attribute not in read] == []
