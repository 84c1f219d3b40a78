"""Checked requests of one shape -> actions: through the engine's plans, or through the plain model."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit4dit.engine import Engine, Plan, PromptPack, RequestShape, StepInputs
from dit4dit.model.dit4dit import DiT4DiT
from dit4dit.model.flow import GuidanceTensors, guidance_arrays
from dit4dit.ops import native, preprocess
from dit4dit.policy.prompts import Recent
from dit4dit.policy.requests import Request, states
from dit4dit.robots.embodiment import Array, Resize
from dit4dit.robots.processor import Codec
from dit4dit.robots.transforms import inverse_table

log = logging.getLogger("dit4dit.policy.runner")

PLANS = 32
"""Request shapes whose buffers (and on a GPU graphs) are kept."""
Size = tuple[int, int] | None
"""What each view is brought to; None leaves the pictures as they are."""
Results = tuple[Array, Sequence[Array | None]]
"""Normalised actions [B, K, A_model], and per request its actions in robot units [K, A], or None where not wanted."""


class EngineRunner:
    """Passes through the engine, one at a time whatever the threads; each shape of request has its own plan."""

    def __init__(self, engine: Engine, codec: Codec) -> None:
        self.engine, self.codec = engine, codec
        self._start()

    def _start(self) -> None:
        self._plans: Recent[tuple[RequestShape, bool], Plan] = Recent(self._make_plan, PLANS, lambda _: 1)
        self._turn = threading.Lock()  # the engine's buffers serve one request at a time

    def __getstate__(self) -> dict[str, Any]:
        """Buffers and locks stay behind; a copy makes its own."""
        return {"engine": self.engine, "codec": self.codec}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    @property
    def plans(self) -> int:
        """How many shapes have a plan."""
        return self._plans.total_cost

    def warm_up(self, shape: RequestShape, units: bool) -> None:
        """Make the plan for requests of this shape and run it once."""
        plan = self._plans.get((shape, units))
        with self._turn:
            plan.rehearse()

    def run(
        self, requests: Sequence[Request], packs: Sequence[PromptPack], size: Size, resize: Resize, units: bool
    ) -> Results:
        """units: whether actions in robot units are wanted too."""
        shape = RequestShape(
            batch=len(requests),
            views=tuple((int(p.shape[0]), int(p.shape[1])) for p in requests[0].pictures),
            size=size,
            resize=resize,
            state=requests[0].state is not None,
            text_length=packs[0].length,
            max_guidance=requests[0].max_guidance,
        )
        if self.engine.device.type == "cuda" and (shape, units) not in self._plans:
            log.warning("recording a CUDA graph for %s inside a request; call Policy.warm_up beforehand", shape)
        state = states(requests)
        plan = self._plans.get((shape, units))
        with self._turn:
            try:
                normalized, actions = plan.run(
                    [r.pictures for r in requests],
                    state,
                    [r.noise for r in requests],
                    packs,
                    [r.guidance for r in requests if r.guidance is not None],
                )
            except torch.AcceleratorError as error:
                native.check_device(self.engine.device, error)
                raise
            if self.engine.one_launch is not None and not np.isfinite(normalized).all():
                self.engine.one_launch.check()  # what a launch that gave up leaves behind is NaN
        return normalized, [None] * len(requests) if actions is None else list(actions)

    def _make_plan(self, key: tuple[RequestShape, bool]) -> Plan:
        shape, units = key
        table = torch.from_numpy(inverse_table(self.codec.action)) if units else None
        with self._turn:
            return Plan(self.engine, shape, table)


class ModelRunner:
    """Passes through the plain model."""

    def __init__(self, model: DiT4DiT, codec: Codec) -> None:
        self.model, self.codec = model, codec

    @torch.no_grad()
    def run(
        self, requests: Sequence[Request], contexts: Sequence[Tensor], size: Size, resize: Resize, units: bool
    ) -> Results:
        """contexts: projected text [1, L, text_dim] per request; the rest as in `EngineRunner.run`."""
        inputs = step_inputs(self.model, requests, (), size, resize)._asdict()
        del inputs["packs"]
        inputs["guidance"] = self._guidance(requests, inputs["action"].device)
        normalized = self.model.sample(context=torch.cat(list(contexts)), **inputs).cpu().numpy()
        return normalized, list(self.codec.action.inverse(normalized)) if units else [None] * len(requests)

    def _guidance(self, requests: Sequence[Request], device: torch.device) -> GuidanceTensors | None:
        """What the requests of one pass keep to, all of them or none."""
        length, most = self.model.config.head.action_horizon, requests[0].max_guidance
        if most is None:
            return None
        arrays = [guidance_arrays(r.guidance, length) for r in requests if r.guidance is not None]
        previous, weights = (torch.from_numpy(np.stack(part)).to(device) for part in zip(*arrays, strict=True))
        return GuidanceTensors(previous, weights, most)


def step_inputs(
    model: DiT4DiT, requests: Sequence[Request], packs: Sequence[PromptPack], size: Size, resize: Resize
) -> StepInputs:
    """What one step takes for these requests, on the model's device."""
    transformer = model.backbone.transformer
    device = transformer.proj_out.weight.device

    def place(arrays: Sequence[Any]) -> Tensor:
        return torch.from_numpy(np.stack(arrays)).to(device)

    views = zip(*(request.pictures for request in requests), strict=True)
    frame = preprocess([place(view) for view in views], size, resize, transformer.dtype)
    shapes = model.config.noise_shapes(*frame.shape[2:])
    drawn = [request.noise.draw(shapes) for request in requests]
    noise = {name: place([draw[name] for draw in drawn]) for name in shapes}
    state = states(requests)
    return StepInputs(frame, packs, None if state is None else torch.from_numpy(state).to(device), **noise)
