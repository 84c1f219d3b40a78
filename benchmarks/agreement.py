"""What is wrong is not timed: how far the engine is from the published schedule, and from where on it is too far."""

from __future__ import annotations

import math
from typing import Any

import torch
from dit4dit.benchmarks.contenders import Clock, Planned, Published
from torch import Tensor

from dit4dit.engine import Engine, stack

AGREE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
"""Largest relative difference between the two at which they are still timed."""
QUANTISED = 2e-1
"""Likewise, relative rms difference of the features of a quantised and the exact engine; of the actions too where the head is one
launch, whose weights are quantised as well."""


class WrongActions(RuntimeError):
    """The engine wrote what no times are given for."""


def against_published(engine: Engine, planned: Planned, actions: Tensor, published: Published) -> dict[str, Any]:
    """How far the engine is from the published schedule, stage by stage, each from the same inputs.

    "actions" are those of the plan, which are timed; "action_head" is the head by itself on the published features, and
    "plan" is how far the plan is from the same functions called one by one.
    """
    inputs, head = planned.inputs, published.model.head
    wanted = published.sample(inputs, Clock(inputs.frame.device))
    seen = published.seen[0].float()
    features = engine.features(inputs.frame, stack([planned.pack]), inputs.posterior, inputs.latent)
    assert head is not None
    return {
        "with": "published schedule",
        "features": distance(features, seen),
        "actions": distance(actions, wanted),
        "action_head": distance(engine.actions(seen, inputs.state, inputs.action), wanted),
        "plan": distance(actions, engine.actions(features, inputs.state, inputs.action)),
    }


def distance(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value."""
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def known(value: Any) -> Any:
    """JSON has no NaN and no infinity: None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check(found: dict[str, Any], limit: float) -> None:
    """RuntimeError unless both wrote the same actions, to rounding."""
    if not found["actions"] <= limit:
        parts = [f"{k} {found[k]:.2e}" for k in ("features", "action_head", "plan") if found.get(k) is not None]
        where = f" ({', '.join(parts)})" if parts else ""
        raise WrongActions(
            f"engine and {found['with']} differ by {found['actions']:.2e}{where} (at most {limit:.0e}): not timed"
        )


def finite(actions: Tensor) -> Tensor:
    """The actions; RuntimeError where some are not finite."""
    wrong = int((~torch.isfinite(actions)).sum())
    if wrong:
        raise WrongActions(f"actions: expected finite numbers, got {wrong} of {actions.numel()} others: not timed")
    return actions


def check_quantised(found: dict[str, dict[str, float]], other: Planned) -> None:
    """RuntimeError where the errors are those of something broken."""
    for part in ("features",) if other.plan.head == "library" else ("features", "actions"):
        rms = found[part]["rms"]
        if not rms <= QUANTISED:
            raise WrongActions(f"quantised and exact {part} differ by {rms:.2e} (at most {QUANTISED:.0e}): not timed")
