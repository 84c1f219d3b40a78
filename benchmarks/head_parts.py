"""Parts of the one-launch head's time, measured by leaving work out: the same kernel with schedules of smaller requests.

A launch cannot skip its weights or its waiting, but it takes any schedule: of fewer steps, blocks, keys or tokens, or of a narrow
head. `variants` differ by one thing from one to the next, so that the differences of their times sum up to the request's:

    start    what a narrow head takes besides its steps: launch, first weights, end. Its time is straight in its steps.
    stages   the steps of the narrow head (NARROW columns, FEW_TOKENS tokens, FEW_KEYS keys): all stages with next to no work. The
             way of words between teams, exchange within them, barriers and epilogues; a launch cannot tell these apart.
    width    the head's own width: its weights, and with them their products and the staging of few tokens.
    tokens   the request's tokens: what they add to staging, products, exchange and epilogues.
    keys     the request's feature tokens, which attention alone reads; with them, more blocks may share a head.

A second way to cut the same time is by place: one block that attends to the features, one that attends to the tokens, by leaving
the last one or two blocks out, and "ends", what is left: start, encoder and decoder.

In all of them teams have as many blocks as in the request's schedule, and tokens attend to each other where they do there: inside
the product that follows, or in a stage of its own. Where the planner cuts matrices or heads otherwise than there, a difference
is one between two plans: "same_cut" says whether it is. Beside each difference stands that of the predictions for the same
schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dit4dit.config import HeadConfig
from dit4dit.engine.action_ode import Schedule
from dit4dit.engine.action_ode.schedule import NONE, Attend
from dit4dit.tables import number, table

NARROW = 64
FEW_TOKENS = 8
FEW_KEYS = 16
ORDER = ("narrow, one step", "narrow", "few tokens", "few keys", "request")
"""Variants of which each has one thing more than the one before."""


@dataclass(frozen=True)
class Variant:
    """A head and a request of it: feature tokens, Euler steps."""

    config: HeadConfig
    context: int
    steps: int


def variants(config: HeadConfig, context: int, steps: int) -> dict[str, Variant]:
    """name -> what is launched; those of fewer blocks only where enough are left, all by one step only where there are more."""
    few = replace(
        config, action_horizon=max(1, min(config.action_horizon, FEW_TOKENS - (config.state_dim is not None)))
    )
    narrow = replace(few, num_heads=1, head_dim=NARROW, hidden_size=NARROW)
    keys = min(context, FEW_KEYS)
    found = {"narrow, one step": Variant(narrow, keys, 1), "narrow": Variant(narrow, keys, steps)}
    found |= {"few tokens": Variant(few, keys, steps), "few keys": Variant(config, keys, steps)}
    found["request"] = Variant(config, context, steps)
    if config.interleave_self_attention and config.num_layers > 2:
        for left, name in ((1, "one block less"), (2, "two blocks less")):
            found[name] = Variant(replace(config, num_layers=config.num_layers - left), context, steps)
    return found


def solve(us: Mapping[str, float], config: HeadConfig, steps: int) -> dict[str, dict[str, float]]:
    """Variant -> microseconds, to {"by_work", "by_place"}: part -> microseconds. Either has only what was timed.

    The parts of one of the two sum up to the request's time, "by_place" those of a block times the number of such blocks.
    """
    found: dict[str, dict[str, float]] = {"by_work": {}, "by_place": {}}
    if steps > 1 and all(name in us for name in ORDER):
        start = (steps * us["narrow, one step"] - us["narrow"]) / (steps - 1)
        wider = {
            part: us[name] - us[before]
            for part, before, name in zip(("width", "tokens", "keys"), ORDER[1:], ORDER[2:], strict=False)
        }
        found["by_work"] = {"start": start, "stages": us["narrow"] - start, **wider}
    if all(name in us for name in ("request", "one block less", "two blocks less")):
        last, before = us["request"] - us["one block less"], us["one block less"] - us["two blocks less"]
        # even blocks attend to the features
        features, tokens = (before, last) if config.num_layers % 2 == 0 else (last, before)
        crossing = -(-config.num_layers // 2)
        ends = us["request"] - crossing * features - (config.num_layers - crossing) * tokens
        found["by_place"] = {"ends": ends, "a block on features": features, "a block on tokens": tokens}
    return found


def cut(schedule: Schedule) -> set[tuple[object, ...]]:
    """What two schedules have in common that are the same plan: of each kind of matrix how it is cut, how many blocks share a
    head of attention, and whether attention of tokens to each other is inside the product that follows.
    """
    found: set[tuple[object, ...]] = {
        (name.rpartition(".")[2], m.ranks, m.tile_rows, m.split, m.parts) for name, m in schedule.matrices.items()
    }
    attends = (tile.work for tile in schedule.decoded if isinstance(tile.work, Attend))
    found |= {("tokens" if work.context == NONE else "features", work.share) for work in attends}
    return found | {("fused", schedule.fused)}


def measure(
    config: HeadConfig,
    context: int,
    steps: int,
    *,
    plan: Callable[[Variant], Schedule],
    predict: Callable[[Schedule], float],
    time: Callable[[str, Variant], Mapping[str, Any]],
) -> dict[str, Any]:
    """Each variant timed and predicted, and the parts solved for from both.

    Args:
        plan: the schedule that is launched.
        predict: microseconds of it.
        time: of a variant and its name, a row of `bench_action_ode.timed`: "ms", or "left_out" and why; of what is left out no
            part is given.
    """
    rows: dict[str, dict[str, Any]] = {}
    every = variants(config, context, steps)
    wanted = cut(plan(every["request"]))
    for name, variant in every.items():
        row, schedule = time(name, variant), plan(variant)
        found = {"us": 1e3 * row["ms"]["p50"] if "ms" in row else None, "left_out": row.get("left_out")}
        found |= {"predicted_us": predict(schedule), "same_cut": cut(schedule) == wanted}
        rows[name] = found | {"teams": schedule.teams, "ranks": schedule.ranks}
    timed = {name: row["us"] for name, row in rows.items() if row["us"] is not None}
    predicted = {name: row["predicted_us"] for name, row in rows.items()}
    return {"variants": rows, "measured": solve(timed, config, steps), "predicted": solve(predicted, config, steps)}


def show(found: Mapping[str, Any]) -> str:
    """Two tables: the variants, and the parts."""
    lines = []
    rows = [
        [
            name,
            f"{row['teams']} x {row['ranks']}",
            "yes" if row["same_cut"] else "no",
            *_pair(row["us"], row["predicted_us"]),
        ]
        for name, row in found["variants"].items()
    ]
    header = ["launched", "teams x ranks", "same cut", "measured us", "predicted us"]
    lines.append(table(header, rows, right=(3, 4)))
    parts = [
        [part, *_pair(found["measured"][way].get(part), us)]
        for way in found["predicted"]
        for part, us in found["predicted"][way].items()
    ]
    lines.append(table(["part", "measured us", "predicted us"], parts, right=(1, 2)))
    lines += [f"{name}: {row['left_out']}" for name, row in found["variants"].items() if row["left_out"]]
    return "\n".join(lines)


def _pair(measured: float | None, predicted: float) -> list[str]:
    return [number(measured, ",.1f"), f"{predicted:,.1f}"]
