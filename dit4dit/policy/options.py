"""The options of `Policy.from_pretrained`: ConfigError for one that cannot be, before anything is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from dit4dit.engine import Calibration
from dit4dit.engine.engine import TUNE
from dit4dit.errors import ConfigError, shown
from dit4dit.files.folders import no_folder
from dit4dit.ops.programmatic import CHOICES
from dit4dit.robots.embodiment import Embodiment

ENGINES = ("auto", "off")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_engine(engine: str, with_options: bool) -> None:
    """with_options: whether one of the engine's own options is given."""
    if engine not in ENGINES:
        raise ConfigError(f"engine {shown(engine)}: expected {' or '.join(ENGINES)}")
    if engine == "off" and with_options:
        raise ConfigError(
            "steps, posterior, packs, quantization, calibration, head and programmatic_launch='on' are options of the engine: "
            "leave them out, or use engine='auto'"
        )


def check_tune(tune: object) -> None:
    if tune not in TUNE:
        raise ConfigError(f"tune: expected {' or '.join(map(repr, TUNE))}, got {shown(tune)}; dit4dit tune measures")


def check_programmatic(programmatic_launch: object) -> None:
    if programmatic_launch not in CHOICES:
        raise ConfigError(
            f"programmatic_launch: expected {', '.join(map(repr, CHOICES))}, got {shown(programmatic_launch)}; dit4dit "
            "tune measures"
        )


def check_dtypes(dtype: object, head_dtype: object) -> None:
    for name, kind in (("dtype", dtype), ("head_dtype", head_dtype)):
        if kind is not None and kind not in DTYPES:
            written = "; give the torch.dtype, not its name" if isinstance(kind, str) else ""
            raise ConfigError(f"{name}: expected torch.float32, bfloat16 or float16, got {shown(kind)}{written}")


def check_kinds(*, embodiment: object, calibration: object, packs: object, text_encoder: object) -> None:
    """ConfigError for an option of another type than `from_pretrained` takes, before anything is read."""
    place = (str, os.PathLike)
    for name, value, kinds, wanted in (
        ("embodiment", embodiment, (str, Embodiment), "an Embodiment, its name or a statistics tag"),
        ("calibration", calibration, (*place, Calibration), "a file of dit4dit calibrate, or what calibrate returned"),
        ("packs", packs, place, "a folder"),
    ):
        if value is not None and not isinstance(value, kinds):
            raise ConfigError(f"{name}: expected {wanted}, got {type(value).__name__}")
    if not isinstance(text_encoder, bool):
        raise ConfigError(f"text_encoder: expected True or False, got {shown(text_encoder)}")
    if packs is not None and (reason := no_folder(Path(os.fspath(packs)))):  # type: ignore[call-overload]
        raise ConfigError(f"packs {shown(os.fspath(packs), 200)}: {reason}; give a folder, or a new name for one")  # type: ignore[call-overload]


def check_prompts(packs: object, prompt_embeds: object, text_encoder: bool) -> None:
    if prompt_embeds is not None and not isinstance(prompt_embeds, Mapping):
        raise ConfigError(
            f"prompt_embeds: expected a dict, instruction -> embedding [L, text_in], got {type(prompt_embeds).__name__}; make it "
            "with Policy.embed_prompts"
        )
    if packs is not None and prompt_embeds is not None:
        raise ConfigError("packs and prompt_embeds: give one of them; packs on disk must come from the text encoder")
    if not text_encoder and packs is None and prompt_embeds is None:
        raise ConfigError(
            "text_encoder=False: give packs (dit4dit pack) or prompt_embeds, or no instruction can be used"
        )
