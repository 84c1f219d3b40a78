"""Schedules of one small head of the one-launch kernel, cut in all ways that its attention can be, for the tests of its twin."""

from __future__ import annotations

from dataclasses import replace

from head_case import CLUSTERS, DEAR, SMALL, Case
from head_faults import least_inbox, plan_with

from dit4dit.engine.action_ode import Device, Schedule, plan
from dit4dit.engine.action_ode.cost import Costs
from dit4dit.engine.action_ode.cuts import AttendCut
from dit4dit.engine.action_ode.validate import validate


def sound(
    case: Case, device: Device, ranks: int | None = None, costs: Costs = DEAR, fused: bool | None = None
) -> Schedule:
    schedule = plan(case.shape, device, costs, ranks=ranks, fused=fused)
    validate(schedule)
    return schedule


def all_ways(case: Case, ranks: int = 8) -> list[Schedule]:
    """On blocks alone; in teams whose ranks share heads as far as they can; and with heads inside products, if there are such."""
    ways = [sound(case, SMALL), shared(case, ranks, fused=False)]
    return ways if all(case.shape.blocks) else [*ways, shared(case, ranks, fused=True)]


def shared(case: Case, ranks: int, fused: bool) -> Schedule:
    """All ranks of a team share each head, of the features half of them where attention is not part of products. There are few
    keys for so many ranks: some have none.
    """
    shape = case.shape
    shares = ranks, ranks if fused else max(1, ranks // 2)
    attention = tuple(
        AttendCut(share, -(-keys // (share // 2 + 1)))
        for share, keys in zip(shares, (shape.tokens, shape.context), strict=True)
    )
    schedule = plan_with(
        lambda cuts: replace(cuts, attention=attention), shape, CLUSTERS, DEAR, ranks=ranks, fused=fused
    )
    schedule = replace(schedule, inbox=max(schedule.inbox, least_inbox(schedule)))
    validate(schedule)
    return schedule
