"""The one-launch head's own table: what its schedule counts, and what each part of it is predicted to take on a GPU.

All of it is `engine.action_ode.cost` with the constants of `gpus.json`: the planner weighs its plans by the same sums with its
own defaults, so that constants which are measured on a GPU say here what its schedules would take, and change no schedule.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dit4dit.benchmarks.budget_gpu import Gpu

from dit4dit.engine import Engine
from dit4dit.engine.action_ode import Schedule
from dit4dit.engine.action_ode.cost import PARTS, Costs, blocks_of, fetched_bytes, head_us, stage_us, tile_us
from dit4dit.engine.action_ode.schedule import NONE, Attend, Operands, Product
from dit4dit.tables import table

SHARED = ("memory", "flat_rate")
"""Constants of `Costs` that other predictions take too; all others are "head_" and their name in `gpus.json`."""
RATES = ("memory", "flat_rate", "sm_stream")
"""Those of which more is faster; each limits weights, as `LIMITS` says."""
LIMITS = {
    "memory": "each once from memory",
    "flat_rate": "all reads from L2",
    "sm_stream": "reads of the SM with most of them",
}


def constant(field: str) -> str:
    """The name in `gpus.json` of a field of `Costs`."""
    return field if field in SHARED else f"head_{field}"


def costs_of(gpu: Gpu) -> Costs:
    """A GPU's constants as `head_us` takes them."""
    return Costs(**{one.name: float(gpu[constant(one.name)]) for one in dataclasses.fields(Costs)})


def facts(schedule: Schedule) -> dict[str, int]:
    """What says in a result which kernel and cut ran."""
    return {
        "teams": schedule.teams,
        "ranks": schedule.ranks,
        "stages": schedule.stages,
        "fused": schedule.fused,
        "steps": schedule.shape.steps,
        "padded_tokens": schedule.padded_tokens,
        "slots": schedule.slots,
    }


def launch_facts(engine: Engine, head: str) -> list[dict[str, int]] | None:
    """`facts` of the launches that an engine has made ready, for a result; None where another head runs.

    head: what runs it (`Plan.head`).
    """
    if head != "one_launch" or engine.one_launch is None:
        return None
    return [facts(schedule) for schedule in engine.one_launch.schedules]


def table_of(schedule: Schedule, gpu: Gpu) -> dict[str, Any]:
    """The head's table, ready for JSON.

    "us": of all steps (`head_us`). "per_step_us": of one step, "total" without the start. "weights_us": rate of `LIMITS` ->
    microseconds of weights if it were the only limit. "weight_mb", "features_mb": megabytes that come to the slots of all blocks
    in all steps, of weights, and of keys and values of the features. "kinds": matrices and attention; those of equal cut are
    one: `_row`, their "count", and "us" of the team that takes longest with its parts, "us_of". "if_twice": constant that is a
    guess -> microseconds that the total grows by if it costs twice as much, or is half of a rate.
    """
    costs, steps = costs_of(gpu), schedule.shape.steps
    us = head_us(schedule, costs)
    found: dict[str, Any] = {
        "gpu": gpu.name,
        **facts(schedule),
        "blocks": schedule.blocks,
        "sms": schedule.device.sms,
    }
    found |= {"shared_bytes": schedule.shared_bytes}
    found |= {"weight_mb": _fetched_mb(schedule, Product), "features_mb": _fetched_mb(schedule, Attend)}
    per_step = {name: us[name] / steps for name in (*PARTS, "chain", "weights")}
    found |= {"us": us, "per_step_us": per_step | {"total": (us["total"] - costs.start) / steps}}
    alone = {name: dict.fromkeys(set(RATES) - {name}, math.inf) for name in LIMITS}
    found["weights_us"] = {
        name: head_us(schedule, dataclasses.replace(costs, **others))["weights"] for name, others in alone.items()
    }
    found["kinds"] = list(_kinds(schedule, costs))
    found["if_twice"] = {
        constant(one.name): head_us(schedule, _twice(costs, one.name))["total"] - us["total"]
        for one in dataclasses.fields(Costs)
        if constant(one.name) in gpu.guesses
    }
    return found


def _fetched_mb(schedule: Schedule, kind: type[Operands]) -> float:
    """Megabytes that come to the slots of all blocks in all steps, for tiles of this kind."""
    works = (tile.work for tile in schedule.decoded if isinstance(tile.work, kind))
    sizes = (fetched_bytes(schedule, work) * blocks_of(work, schedule.ranks) for work in works)
    return schedule.shape.steps * sum(sizes) / 1e6


def _twice(costs: Costs, field: str) -> Costs:
    value = getattr(costs, field)
    return dataclasses.replace(costs, **{field: value / 2 if field in RATES else 2 * value})


def _kinds(schedule: Schedule, costs: Costs) -> Iterator[dict[str, Any]]:
    """A row for each kind of stage; stages with equal rows are one with their "count"."""
    same: dict[str, dict[str, Any]] = {}
    work = work_of(schedule)
    for buffer, parts in stage_us(schedule, costs):
        row = _row(schedule, buffer, work[buffer]) | {"us": sum(parts.values()), "us_of": parts}
        same.setdefault(repr(row), row | {"count": 0})["count"] += 1
    yield from same.values()


def work_of(schedule: Schedule) -> dict[str, list[tuple[int, Operands]]]:
    """Buffer -> (team, work of a tile that writes it), of one step."""
    begins = sorted((buffer.offset, name) for name, buffer in schedule.buffers.items())
    offsets = [offset for offset, _ in begins]
    found: dict[str, list[tuple[int, Operands]]] = {}
    for team in range(schedule.teams):
        for tile in schedule.decoded[schedule.first_tile[team] : schedule.first_tile[team + 1]]:
            written = begins[bisect_right(offsets, tile.work.out) - 1][1]
            found.setdefault(written, []).append((team, tile.work))
    return found


_ENDS = {"embedded": "encode", "tokens": "encode_out", "decoded": "decode_in", "noisy": "decode_out"}
_OF_BLOCK = {"attended": "attend", "hidden": "mlp_in"}


def matrix_of(buffer: str) -> str:
    """Whose result a buffer has: the name of a matrix, or "{block}.attend"."""
    block, _, part = buffer.rpartition(".")
    return f"{block}.{_OF_BLOCK.get(part, part)}" if block else _ENDS[buffer]


def _row(schedule: Schedule, buffer: str, work: Sequence[tuple[int, Operands]]) -> dict[str, Any]:
    """One stage. "teams" have work, the one with most of it "each" tiles; KB are those of one block of that team, as predictions
    count them: what it stages that other teams wrote, and sums that it receives from its team's others. "split": blocks that
    share the columns of a tile, of attention a head.
    """
    name, each, one = matrix_of(buffer), Counter(team for team, _ in work), work[0][1]
    found: dict[str, Any] = {"kind": name.rpartition(".")[2], "tiles": len(work), "teams": len(each)}
    if isinstance(one, Product):
        matrix = schedule.matrices[name]
        found |= {"rows": matrix.rows, "columns": matrix.columns, "tile_rows": matrix.tile_rows}
        found |= {"split": matrix.split, "parts": matrix.parts}
        if one.attend:
            found["kind"] = f"attend + {found['kind']}, tokens"
    else:
        found["kind"] += ", tokens" if one.context == NONE else ", features"
        found |= {"rows": one.tokens, "columns": one.keys, "tile_rows": None, "split": one.share, "parts": None}
    most = max(each, key=lambda team: each[team])
    found["each"] = each[most]
    for unit, costs in PER_KB.items():
        found[unit] = sum(sum(tile_us(schedule, of, 1, costs).values()) for team, of in work if team == most)
    return found


NOTHING = Costs(**{field.name: math.inf if field.name in RATES else 0.0 for field in dataclasses.fields(Costs)})
PER_KB = {"staged_kb": dataclasses.replace(NOTHING, read=1.0), "exchanged_kb": dataclasses.replace(NOTHING, inbox=1.0)}
"""What a tile is predicted to take if nothing but a KB costs anything, and that one microsecond, is how many there are."""


# -- what is printed ---------------------------------------------------------------------------------------------------


def said(head: Mapping[str, Any]) -> str:
    """The launch in a sentence."""
    return (
        f"{head['teams']} teams x {head['ranks']} blocks on {head['sms']} SMs of {head['gpu']}, {head['stages']} stages a step, "
        f"{head['steps']} steps, {head['padded_tokens']} padded tokens, {head['slots']} slots for weights, "
        f"{head['shared_bytes'] / 1024:,.0f} KB of shared memory a block; it reads {head['weight_mb']:,.0f} MB of weights and "
        f"{head['features_mb']:,.0f} MB of the features' keys and values"
    )


def tables(head: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """(header, rows): the parts of the time, and the stages by kind."""
    us, step = head["us"], head["per_step_us"]
    parts = [[name, f"{step[name]:,.1f}", f"{us[name]:,.1f}"] for name in (*PARTS, "chain", "weights", "total")]
    header = ["kind", "count", "rows", "columns", "tile rows", "split", "parts", "tiles", "teams", "tiles a team"]
    header += ["KB staged", "KB exchanged", "us", "us a step"]
    rows = []
    for kind in head["kinds"]:
        names = ("kind", "count", "rows", "columns", "tile_rows", "split", "parts", "tiles", "teams", "each")
        cells = ["-" if kind[name] is None else str(kind[name]) for name in names]
        cells += [f"{kind['staged_kb']:,.1f}", f"{kind['exchanged_kb']:,.1f}"]
        rows.append([*cells, f"{kind['us']:,.2f}", f"{kind['count'] * kind['us']:,.1f}"])
    return [(["of the head", "us a step", "us"], parts), (header, rows)]


def notes(head: Mapping[str, Any]) -> list[str]:
    """How the parts come to the total, what the columns are, and what hangs on guesses."""
    start = head["us"]["total"] - max(head["us"]["chain"], head["us"]["weights"])
    limits = ", ".join(f"{what} {head['weights_us'][name]:,.1f}" for name, what in LIMITS.items())
    lines = [
        f"chain is the sum of the parts above it, weights run beside it: the total is the longer of the two and {start:,.1f} us; "
        "KB and us of a kind are of the team that has most of it",
        f"weights take as long as the longest of, in us: {limits}",
        "split, parts: how many blocks of a team, and groups of a block's warps, share the columns of a tile",
        "attend: rows are queries, columns keys, and split is how many blocks share a head; the features' keys and values come "
        "with the weights",
    ]
    if head["fused"]:
        lines.append(
            "attend + out: each block works out the attention of the columns that it multiplies; the KB staged are q, k and v of "
            "those heads"
        )
    slower = sorted(head["if_twice"].items(), key=lambda item: -item[1])
    if slower:
        each = ", ".join(f"{name} {us:+,.1f}" for name, us in slower)
        lines.append(f"guesses; if one costs twice as much, or a rate is half of it, the head takes, in us: {each}")
    return lines


def show(head: Mapping[str, Any]) -> str:
    """The launch, both tables, and the notes."""
    lines = [f"the head in one launch, predicted: {said(head)}"]
    for header, rows in tables(head):
        lines.append(table(header, rows, right=range(1, len(header))))
    return "\n".join([*lines, *notes(head)])
