"""Calibration: the largest activation that each of the backbone's matrices receives, seen while the exact engine runs.

What a static quantisation needs to know of the activations (`measuring` finds it), kept as one small JSON file beside the key of
the weights that it was made with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dit4dit.engine.fold import MATRICES
from dit4dit.engine.packs import weights_key
from dit4dit.errors import CheckpointError, ConfigError
from dit4dit.files.json_files import write_json
from dit4dit.files.keys import is_finite, read_json
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
        """Write the file, whole or not at all; InputError when it cannot be written."""
        write_json(Path(path), {"version": VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """A file that `save` wrote; CheckpointError when it is missing or another one."""
        again = "make it again with dit4dit calibrate"
        data = read_json(Path(path), f"make it with dit4dit calibrate --out {path}", again=again)
        if not _sound(data):
            raise CheckpointError(f"{path}: not a calibration of version {VERSION}; {again}")
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


def _sound(data: Mapping[str, Any]) -> bool:
    """Whether a file's content is what `Calibration.save` writes."""
    weights, samples, amax = data.get("weights"), data.get("samples"), data.get("amax")
    if not isinstance(weights, str) or not isinstance(samples, int) or not isinstance(amax, dict):
        return False
    return data.get("version") == VERSION and all(is_finite(value) and value >= 0 for value in amax.values())


def at(block: int, matrix: str) -> str:
    """A matrix of a block as a `Calibration` names it."""
    return f"blocks.{block}.{matrix}"


def backbone_key(model: DiT4DiT) -> str:
    """A content hash of the backbone's weights up to the extract layer; it reads all of them."""
    transformer = model.backbone.transformer
    return weights_key([transformer.patch_embed, *transformer.blocks[: model.config.extract_layer + 1]])
