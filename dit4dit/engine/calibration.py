"""Calibration: the largest activation that each of the backbone's matrices receives, seen while the exact engine runs.

What a static quantisation needs to know of the activations, kept as one small JSON file beside the key of the weights that
it was made with. And the measure of what an option costs: errors of an engine against the exact one, on the same requests.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dit4dit.engine.fold import MATRICES, BackboneBlock, Matrix
from dit4dit.engine.packs import PromptPack, stack, weights_key
from dit4dit.errors import CheckpointError, ConfigError, InputError, OutputError
from dit4dit.model.dit4dit import DiT4DiT
from dit4dit.model.keys import is_finite

if TYPE_CHECKING:
    from dit4dit.engine.engine import Engine

VERSION = 1


class StepInputs(NamedTuple):
    """One chunk's inputs on the device, in the order that `Engine.sample` takes them."""

    frame: Tensor
    packs: Sequence[PromptPack]
    state: Tensor | None
    posterior: Tensor
    latent: Tensor
    action: Tensor


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


@dataclass(frozen=True)
class Listener(Matrix):
    """A matrix that notes the largest absolute value of what it is given."""

    name: str = field(kw_only=True)
    seen: dict[str, float] = field(kw_only=True)

    def __call__(self, x: Tensor) -> Tensor:
        self._note(x)
        return super().__call__(x)

    def gelu(self, x: Tensor) -> Tensor:
        self._note(x)
        return super().gelu(x)

    def _note(self, x: Tensor) -> None:
        largest = float(x.abs().amax())
        if not math.isfinite(largest):
            raise OutputError(f"calibrate: {self.name} received NaN or infinite values; check the checkpoint's weights")
        self.seen[self.name] = max(self.seen.get(self.name, 0.0), largest)


@torch.no_grad()
def calibrate(engine: Engine, requests: Iterable[StepInputs]) -> Calibration:
    """Run the exact engine up to the features and note what its matrices receive.

    Raises:
        ConfigError: the engine is quantised. InputError: no requests. OutputError: NaN on the way.
    """
    if engine.quantization is not None:
        raise ConfigError("calibrate: this engine is quantised itself; use one with quantization=None")
    seen: dict[str, float] = {}
    listening = copy.copy(engine)
    listening.blocks = tuple(_listening(block, i, seen) for i, block in enumerate(engine.blocks))
    samples = 0
    for request in requests:
        listening.features(request.frame, stack(request.packs), request.posterior, request.latent)
        samples += request.frame.shape[0]
    if not samples:
        raise InputError("calibrate: expected at least one example, got none")
    return Calibration(backbone_key(engine.model), samples, seen)


def _listening(block: BackboneBlock, index: int, seen: dict[str, float]) -> BackboneBlock:
    return block.with_matrices(lambda name, m: Listener(m.weight, m.bias, name=at(index, name), seen=seen))


@torch.no_grad()
def errors(exact: Engine, other: Engine, requests: Iterable[StepInputs]) -> dict[str, dict[str, float]]:
    """How far `other` is from `exact`: {"features" | "actions": {"rms", "max"}}, the worst of the requests.

    rms is |got - want| / |want| in the Euclidean norm, max the same in the largest absolute value. Actions are normalised
    ones, each from its own engine's features.
    """
    worst = {what: {"rms": 0.0, "max": 0.0} for what in ("features", "actions")}
    for request in requests:
        both = [
            engine.features(request.frame, stack(request.packs), request.posterior, request.latent)
            for engine in (exact, other)
        ]
        wrote = [e.actions(f, request.state, request.action) for e, f in zip((exact, other), both, strict=True)]
        for what, (want, got) in {"features": both, "actions": wrote}.items():
            for norm, order in (("rms", 2), ("max", float("inf"))):
                worst[what][norm] = max(worst[what][norm], _relative(got, want, order))
    return worst


def _relative(got: Tensor, want: Tensor, order: float) -> float:
    got, want = got.double().flatten(), want.double().flatten()
    return float(torch.linalg.vector_norm(got - want, order) / torch.linalg.vector_norm(want, order))
