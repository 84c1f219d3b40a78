"""Runs of an engine that are looked at: what the backbone's matrices receive, and how far an option is from the exact engine."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dit4dit.engine.calibration import Calibration, at, backbone_key
from dit4dit.engine.engine import Engine
from dit4dit.engine.fold import BackboneBlock, Matrix
from dit4dit.engine.packs import stack
from dit4dit.engine.step_inputs import StepInputs
from dit4dit.errors import ConfigError, InputError, OutputError


@dataclass(frozen=True)
class Listener(Matrix):
    """A matrix that notes the largest absolute value of what it is given."""

    name: str = field(kw_only=True)
    seen: dict[str, float] = field(kw_only=True)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        self._note(x)
        return super().__call__(x, out)

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
