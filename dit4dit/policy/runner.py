"""Checked requests of one shape -> actions: through the engine's plans, or through the plain model."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit4dit.engine import Engine, Plan, PromptPack, StepInputs
from dit4dit.model.dit4dit import DiT4DiT
from dit4dit.model.flow import GuidanceTensors, guidance_arrays
from dit4dit.ops import native, preprocess
from dit4dit.policy.recent import Recent, renew_after_fork
from dit4dit.policy.requests import Kind, Request, states
from dit4dit.robots.embodiment import Array
from dit4dit.robots.processor import Codec
from dit4dit.robots.transforms import inverse_table

log = logging.getLogger("dit4dit.policy")

PLAN_BUDGET = {"cpu": 256 * 2**20, "cuda": 2**30}
"""Bytes of plans that requests leave behind, by the kind of device (`Plan.bytes`): the last one, whatever it takes, and as many
others as there is room for beside it. Of two camera images of 480 x 640 that is about 110 single requests on a CPU and 220 on a
GPU. What `warm_up` has made stays beside them: a control loop relies on it, whatever others ask for."""
Results = tuple[Array, Array]
"""Normalised actions [B, K, A_model], and those in robot units [B, K, A]."""


class EngineRunner:
    """Passes through the engine, one at a time whatever the threads; each shape of request has its own plan."""

    def __init__(self, engine: Engine, codec: Codec) -> None:
        self.engine, self.codec = engine, codec
        self._start()

    def _start(self) -> None:
        budget = PLAN_BUDGET[self.engine.device.type]
        self._plans: Recent[Kind, Plan] = Recent(self._make_plan, budget, lambda plan: plan.bytes)
        self._turn = threading.Lock()  # the engine's buffers serve one request at a time
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Plans stay: each pass writes all that it reads."""
        self._plans.after_fork()
        self._turn = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Buffers and locks stay behind; a copy makes its own."""
        return {"engine": self.engine, "codec": self.codec}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    @property
    def plans(self) -> int:
        """How many shapes have a plan."""
        return len(self._plans)

    def warm_up(self, kind: Kind) -> None:
        """Make the plan for passes of this kind, with the batch of its shape, and run it once. It stays."""
        with self._turn:
            self._plans.keep(kind).rehearse()

    def run(self, requests: Sequence[Request], packs: Sequence[PromptPack]) -> Results:
        """One pass for requests of one kind, each with its pack."""
        alone, units = requests[0].kind
        shape = replace(alone, batch=len(requests))
        if self.engine.device.type == "cuda" and (shape, units) not in self._plans:
            log.warning("recording a CUDA graph for %s inside a request; call Policy.warm_up beforehand", shape)
        state = states(requests)
        with self._turn:
            plan = self._plan((shape, units))
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
        return normalized, self.codec.action.inverse(normalized) if actions is None else actions

    def _plan(self, kind: Kind) -> Plan:
        """By whoever has the turn: no plan is running, so that others can be freed, and no more than one is in anyone's hand."""
        new = kind not in self._plans
        plan = self._plans.get(kind)
        if new and self._plans.total_cost > self._plans.budget:
            self.engine.drop_graph_pool()  # its holes go with this plan, not with those to come
        return plan

    def _make_plan(self, kind: Kind) -> Plan:
        shape, units = kind
        table = torch.from_numpy(inverse_table(self.codec.action)) if units else None
        return Plan(self.engine, shape, table)


class ModelRunner:
    """Passes through the plain model."""

    def __init__(self, model: DiT4DiT, codec: Codec) -> None:
        self.model, self.codec = model, codec

    @torch.no_grad()
    def run(self, requests: Sequence[Request], contexts: Sequence[Tensor]) -> Results:
        """contexts: projected text [1, L, text_dim] per request; the rest as in `EngineRunner.run`."""
        frame, _, state, posterior, latent, action = step_inputs(self.model, requests, ())
        guidance, context = self._guidance(requests, frame.device), torch.cat(list(contexts))
        sampled = self.model.sample(frame, context, state, posterior, latent, action, guidance=guidance)
        normalized = sampled.cpu().numpy()
        return normalized, self.codec.action.inverse(normalized)

    def _guidance(self, requests: Sequence[Request], device: torch.device) -> GuidanceTensors | None:
        """What the requests of one pass keep to, all of them or none."""
        length, most = self.model.config.head.action_horizon, requests[0].kind[0].max_guidance
        if most is None:
            return None
        arrays = [guidance_arrays(r.guidance, length) for r in requests if r.guidance is not None]
        previous, weights = (torch.from_numpy(np.stack(part)).to(device) for part in zip(*arrays, strict=True))
        return GuidanceTensors(previous, weights, most)


def step_inputs(model: DiT4DiT, requests: Sequence[Request], packs: Sequence[PromptPack]) -> StepInputs:
    """What one step takes for these requests of one kind, on the model's device."""
    device = model.device

    def place(arrays: Sequence[Any]) -> Tensor:
        return torch.from_numpy(np.stack(arrays)).to(device)

    views = zip(*(request.pictures for request in requests), strict=True)
    frame = preprocess([place(view) for view in views], requests[0].size, requests[0].resize, model.dtype)
    shapes = model.config.noise_shapes(*frame.shape[2:])
    drawn = [request.noise.draw(shapes) for request in requests]
    noise = {name: place([draw[name] for draw in drawn]) for name in shapes}
    state = states(requests)
    return StepInputs(frame, packs, None if state is None else torch.from_numpy(state).to(device), **noise)
