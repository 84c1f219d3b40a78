"""Heads, devices and looks at a schedule, for the tests of action_ode's planner."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from head_case import SIZES, tiny

from dit4dit import presets
from dit4dit.config import HeadConfig
from dit4dit.engine.action_ode import Device, HeadShape, Schedule, head_shape
from dit4dit.engine.action_ode.schedule import Attend, MatrixPlan, Product

H200 = Device(132, 227 << 10, 90, (66, 30, 15))
DEVICES = {
    "h200": H200,
    "a100": Device(108, 163 << 10, 80),
    "ada": Device(142, 99 << 10, 89),
    "b200 without clusters": Device(148, 227 << 10, 100),
    "pairs": Device(132, 227 << 10, 90, (66,)),
    "3 SMs": Device(3, 99 << 10, 80),
    "one team of 8": Device(12, 227 << 10, 90, (6, 3, 1)),
}
PRESETS = {"libero": 784, "robocasa_gr1": 588, "unitree_g1": 392}
"""Released models and their feature tokens."""


def released(name: str, batch: int = 1, fp8: bool = False, steps: int = 4) -> HeadShape:
    config = getattr(presets, name)().model.head
    return head_shape(config, batch=batch, context=PRESETS[name], prefix=True, steps=steps, fp8=fp8)


def small(name: str) -> HeadShape:
    change, request = SIZES[name]
    return head_shape(tiny(**change), **{"batch": 1, "context": 40, "prefix": True, "steps": 2, **request})


def shapes() -> dict[str, HeadShape]:
    found = {name: released(name) for name in PRESETS} | {name: small(name) for name in SIZES}
    for batch, horizon in ((2, 8), (3, 16), (4, 16), (4, 50)):
        request: dict[str, Any] = dict(batch=batch, context=392, prefix=True, steps=2)
        b = HeadConfig.dit_b(action_horizon=horizon, num_layers=2)
        found[f"dit_b, {horizon} x {batch}, fp8"] = head_shape(b, fp8=True, **request)
        found[f"dit_l, {horizon} x {batch}"] = head_shape(
            HeadConfig.dit_l(action_horizon=horizon, num_layers=3), **request
        )
    found["dit_l, all attend, no state"] = head_shape(
        HeadConfig.dit_l(interleave_self_attention=False, num_layers=2, state_dim=None),
        batch=1,
        context=7,
        prefix=False,
        steps=1,
        fp8=True,
    )
    return found


SHAPES = shapes()


def stages(schedule: Schedule) -> dict[str, list[tuple[int, Product | Attend]]]:
    """The buffer that a stage writes -> (team, work)."""
    buffers = sorted((buffer.offset, name) for name, buffer in schedule.buffers.items())
    found: dict[str, list[tuple[int, Product | Attend]]] = defaultdict(list)
    for team in range(schedule.teams):
        for tile in schedule.decoded[schedule.first_tile[team] : schedule.first_tile[team + 1]]:
            name = [name for offset, name in buffers if offset <= tile.work.out][-1]
            found[name].append((team, tile.work))
    return found


def products(schedule: Schedule) -> Iterator[tuple[MatrixPlan, int, Product]]:
    """(matrix, team, work) of all products."""
    by_offset = sorted(schedule.matrices.values(), key=lambda m: m.offset)
    for team in range(schedule.teams):
        for tile in schedule.decoded[schedule.first_tile[team] : schedule.first_tile[team + 1]]:
            if isinstance(tile.work, Product):
                yield [m for m in by_offset if m.offset <= tile.work.weight][-1], team, tile.work
