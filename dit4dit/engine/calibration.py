"""Calibration: the largest activation that each of the backbone's matrices receives, seen while the exact engine runs.

What a static quantisation needs to know of the activations (`measuring` finds it), kept as one small JSON file beside the key of
the weights that it was made with.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dit4dit.engine.fold import MATRICES
from dit4dit.engine.packs import weights_key
from dit4dit.errors import CheckpointError, ConfigError, InputError
from dit4dit.files.keys import is_finite
from dit4dit.model.dit4dit import DiT4DiT

VERSION = 1


@dataclass(frozen=True)
class Calibration:
    """What the matrices of one backbone have received.

    Attributes:
        weights: `backbone_key` of the model; with other weights, or in another dtype, the calibration is refused.
        samples: how many requests were seen.
        amax: "blocks.3.mlp_in" -> the largest absolute value of that matrix's input.
    """

    weights: str
    samples: int
    amax: Mapping[str, float]

    def merged(self, other: Calibration) -> Calibration:
        """What both have seen; ConfigError when they are not of the same weights."""
        if self.weights != other.weights:
            raise ConfigError(
                "calibration: expected two of the same weights and dtype to merge, got two of different ones"
            )
        largest = {name: max(value, other.amax[name]) for name, value in self.amax.items()}
        return Calibration(self.weights, self.samples + other.samples, largest)

    def save(self, path: str | Path) -> None:
        """Write the file, aside and then renamed, so that no reader sees half of it; InputError when it cannot be."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n")
            partial.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise InputError(f"{path}: cannot be written ({error.strerror}); choose another file") from None

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """A file that `save` wrote; CheckpointError when it is missing or another one."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error.strerror}); make it with dit4dit calibrate --out {path}"
            ) from None
        except ValueError as error:
            raise CheckpointError(
                f"{path}: not a calibration ({error}); make it again with dit4dit calibrate"
            ) from None
        if not _sound(data):
            raise CheckpointError(
                f"{path}: not a calibration of version {VERSION}; make it again with dit4dit calibrate"
            )
        return cls(data["weights"], data["samples"], data["amax"])

    def check(self, model: DiT4DiT) -> None:
        """CheckpointError unless this was made with the model's weights."""
        if self.weights != backbone_key(model):
            raise CheckpointError(
                "calibration: made with other weights or in another dtype; make it again with dit4dit calibrate, with the "
                "checkpoint and the dtype that it is to be used with"
            )
        blocks = range(model.config.extract_layer + 1)
        missing = [at(i, name) for i in blocks for name in MATRICES if at(i, name) not in self.amax]
        if missing:
            raise CheckpointError(f"calibration: nothing for {missing[0]}; make it again with dit4dit calibrate")


def _sound(data: Any) -> bool:
    """Whether a file's content is what `Calibration.save` writes."""
    if not isinstance(data, dict) or data.get("version") != VERSION:
        return False
    weights, samples, amax = data.get("weights"), data.get("samples"), data.get("amax")
    if not isinstance(weights, str) or not isinstance(samples, int) or not isinstance(amax, dict):
        return False
    return all(is_finite(value) and value >= 0 for value in amax.values())


def at(block: int, matrix: str) -> str:
    """A matrix of a block as a `Calibration` names it."""
    return f"blocks.{block}.{matrix}"


def backbone_key(model: DiT4DiT) -> str:
    """A content hash of the backbone's weights up to the extract layer; it reads all of them."""
    transformer = model.backbone.transformer
    return weights_key([transformer.patch_embed, *transformer.blocks[: model.config.extract_layer + 1]])
