"""The budget of one chunk: every launch of the plan's own step, counted, and predicted for a GPU that need not be here.

The engine and its plan run on tensors without data that stand for that GPU's, once with what a plan would choose there ("today":
the verdicts that the package ships for it, else each op's default), and once with, for each call, the implementation whose
prediction is the smallest among all that can run there ("as if chosen"), as `dit4dit tune` would find if predictions were right.
Constants and their sources: `gpus.json`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from dit4dit.benchmarks import budget_head, tuning_calls
from dit4dit.benchmarks.budget_gpu import Gpu, Noting
from dit4dit.benchmarks.budget_model import gap_us, time_us
from dit4dit.benchmarks.budget_trace import Step, Trace, recording
from dit4dit.benchmarks.tuning_rounds import FASTER

from dit4dit import ops
from dit4dit.config import ModelConfig
from dit4dit.engine import Engine
from dit4dit.engine.action_ode.program import HeadChoice, OneLaunchHead
from dit4dit.engine.listing import engine_without_data
from dit4dit.engine.plan import Plan
from dit4dit.errors import said
from dit4dit.ops import dispatch
from dit4dit.ops.verdicts import Verdicts, call_text, shipped, slug
from dit4dit.tables import number, table

PROGRAMMATIC = True
"""Whether our kernels are launched before the one in front of them has ended, in "as if chosen"."""
TOTALS = ("today", "as_if_chosen")
Total = Literal["today", "as_if_chosen"]
NAMES = {"today": "as chosen today", "as_if_chosen": "as if chosen"}


class Shipped(Verdicts):
    """What a plan chooses where nothing was measured: the table of a GPU that came with the package."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__(torch.device("meta"))
        self.calls: Mapping[str, Any] = shipped(slug(gpu.name), gpu.capability).get("calls", {})

    def choice(self, op: str, args: Sequence[Any], files: Any = None) -> str | None:
        row = self.calls.get(f"{op}: {call_text(args)}")
        return None if row is None else str(row["chosen"])


class Cheapest(Verdicts):
    """The implementation whose prediction is the smallest, of all that can run on a GPU."""

    def __init__(self, gpu: Gpu, programmatic: bool) -> None:
        super().__init__(torch.device("meta"))
        self.gpu, self.programmatic = gpu, programmatic
        self.found: dict[str, dict[str, float]] = {}
        """ "op: call" -> implementation -> predicted microseconds."""
        self.failed: dict[str, str] = {}
        """ "op: implementation" -> why it cannot be run on tensors without data."""

    def choice(self, op: str, args: Sequence[Any], files: Any = None) -> str | None:
        key = f"{op}: {call_text(args)}"
        if key not in self.found:
            self.found[key] = dict(self._predicted(dispatch.find(op), tuple(args)))
        times, known = self.found[key], dispatch.find(op).implementations
        best = min(times, key=lambda name: times[name], default=None)
        default = next((name for name in times if not known[name].measured_only), best)
        # another than the default must be as much faster as `dit4dit tune` asks for
        return default if best is None or default is None or times[default] < FASTER * times[best] else best

    def _predicted(self, op: dispatch.Op, args: tuple[Any, ...]) -> Iterable[tuple[str, float]]:
        for implementation in op.implementations.values():
            if dispatch.foreign(implementation) is not None or implementation.refuse(*args) is not None:
                continue
            try:
                for _ in range(2):  # tables that are made once are there the second time
                    with recording(self.gpu.stand_in, (op.name, args)) as trace, ops.Choices(self):
                        implementation.run(*args)
            except Exception as error:  # one that needs its tensors' data must not cost all others their prediction
                self.failed[f"{op.name}: {implementation.name}"] = f"{type(error).__name__}: {said(error)}"
                continue
            yield implementation.name, sum(launch_us(step, self.gpu, self.programmatic) for step in trace.steps)


def launch_us(step: Step, gpu: Gpu, programmatic: bool) -> float:
    """Microseconds of a launch with the gap behind it."""
    return time_us(step, gpu) + gap_us(step, gpu, programmatic)


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Attributes:
        preset: whose plan for one request of its robot.
        head, head_dtype: as of `Engine`; "auto" leaves the choice to each total.
        gpu: which one.
        batch: requests in one pass.
        programmatic: see `PROGRAMMATIC`.
    """

    preset: str
    head: HeadChoice
    head_dtype: torch.dtype
    gpu: Gpu
    batch: int = 1
    programmatic: bool = PROGRAMMATIC


def measure(wanted: Wanted) -> dict[str, Any]:
    """Both totals, ready for JSON, and `budget_head.table_of` where the head runs in one launch in either of them.

    BackendError: the GPU cannot run what is asked for; ConfigError: no such preset.
    """
    gpu = wanted.gpu
    result: dict[str, Any] = {"preset": wanted.preset, "gpu": gpu.name, "head": wanted.head, "batch": wanted.batch}
    result |= {"head_dtype": str(wanted.head_dtype).removeprefix("torch."), "programmatic": wanted.programmatic}
    result |= {
        "constants": dict(gpu.constants),
        "launches": {},
        "stages": {},
        "totals": {},
        "chosen": {},
        "guessed": {},
        "one_launch_head": None,
    }
    cheapest = Cheapest(gpu, wanted.programmatic)
    subject = tuning_calls.of_preset(wanted.preset)
    engine = engine_of(wanted, subject.config)
    for total, verdicts in (("today", Shipped(gpu)), ("as_if_chosen", cheapest)):
        trace, ran = steps_of(wanted, subject, engine, verdicts)
        programmatic = wanted.programmatic and total == "as_if_chosen"
        rows = [row(step, gpu, programmatic) for step in trace.steps]
        result["launches"][total] = rows
        result["stages"][total] = stages_of(rows)
        result["totals"][total] = total_of(result["stages"][total])
        result["chosen"][total] = ran
        result["guessed"][total] = guessed(rows)
        for schedule in (step.facts["schedule"] for step in trace.steps if "schedule" in step.facts):
            result["one_launch_head"] = budget_head.table_of(schedule, gpu)
    result |= {"candidates": cheapest.found, "failed": cheapest.failed}
    return result


def steps_of(
    wanted: Wanted, subject: tuning_calls.Subject, engine: Engine, verdicts: Verdicts
) -> tuple[Trace, dict[str, dict[str, int]]]:
    """The launches for one request as a plan makes them, and op -> implementation -> calls.

    engine: of `engine_of`. verdicts: by which the plan chooses.
    """
    shape, action_dim = tuning_calls.requests(subject, [wanted.batch], {})[0]
    engine._verdicts = verdicts
    units = None if action_dim is None else torch.zeros(5, action_dim, dtype=torch.float64)
    with recording(wanted.gpu.stand_in):
        plan = Plan(engine, shape, units)
        plan.compute()  # what a plan makes once, before it records its graphs
    with recording(wanted.gpu.stand_in) as trace:
        with ops.stage("copies"):
            trace.add("host_copy", "copy in", 0.0, plan.inputs.bytes)
            trace.add("graph", "graph launch", 0.0, 0)
        plan.compute()
        with ops.stage("copies"):
            trace.add("host_copy", "copy out", 0.0, plan.outputs.bytes, to_host=True)
    return trace, plan.ran


def engine_of(wanted: Wanted, config: ModelConfig) -> Engine:
    """The engine on tensors without data, with the head that is asked for."""
    engine = engine_without_data(config, head_dtype=wanted.head_dtype)
    if wanted.head == "library":
        engine.one_launch = None
    elif wanted.head == "one_launch":
        engine.one_launch = OneLaunchHead(engine.head, config.head, engine.steps)
        engine.one_launch.backend = "cuda"
    return engine


def row(step: Step, gpu: Gpu, programmatic: bool) -> dict[str, Any]:
    """One launch, ready for JSON. "guesses": constants that its time was predicted from and that nobody measured."""
    facts = {name: value for name, value in step.facts.items() if name not in ("lengths", "schedule")}
    if "schedule" in step.facts:
        facts["constants"] = budget_head.facts(step.facts["schedule"])
    noting = Noting(gpu.name, gpu.constants, gpu.guesses)
    us, gap = time_us(step, noting), gap_us(step, gpu, programmatic)
    facts["guesses"] = noting.guessed()
    found = {"stage": step.stage, "beside": step.beside, "kind": step.kind, "name": step.name}
    return found | {"gflop": step.flops / 1e9, "mb": step.bytes / 1e6, "us": us, "gap_us": gap, **facts}


def stages_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Stage -> launches (graph launches are none of the GPU's own), gflop, mb, us with gaps, and what it runs beside."""
    found: dict[str, dict[str, Any]] = {}
    for one in rows:
        of = found.setdefault(
            one["stage"], {"launches": 0, "gflop": 0.0, "mb": 0.0, "us": 0.0, "beside": one["beside"]}
        )
        of["launches"] += one["kind"] != "graph"
        for name in ("gflop", "mb"):
            of[name] += one[name]
        of["us"] += one["us"] + one["gap_us"]
    return found


def total_of(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Launches, gflop, mb of all, and us of the critical path: a branch costs what it takes longer than the stage beside it.

    That is the least it can be: the two share the GPU's SMs and memory.
    """
    found = {name: sum(of[name] for of in stages.values()) for name in ("launches", "gflop", "mb")}
    us = sum(of["us"] for of in stages.values() if of["beside"] not in stages)
    for main, of in stages.items():
        beside = sum(other["us"] for other in stages.values() if other["beside"] == main)
        us += max(0.0, beside - of["us"])
    return found | {"us": us}


def guessed(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Constant that is a guess -> microseconds of the launches that were predicted from it; "any": of those with at least one."""
    found = {"any": sum(one["us"] for one in rows if one["guesses"])}
    for one in rows:
        for name in one["guesses"]:
            found[name] = found.get(name, 0.0) + one["us"]
    return found


def said_of_guesses(result: Mapping[str, Any]) -> list[str]:
    """A line for each total that has launches whose times are predicted from a guess: which, and how much."""
    lines = []
    for total, of in result["guessed"].items():
        names = sorted((name for name in of if name != "any"), key=lambda name: -of[name])
        if names:
            each = ", ".join(f"{name} {of[name]:,.1f}" for name in names)
            lines.append(
                f"{NAMES[total]}: {of['any']:,.1f} us are launches predicted from constants that are guesses: {each}"
            )
    return lines


def show(result: Mapping[str, Any]) -> str:
    """The table of stages, and both totals."""
    lines = [
        f"{result['preset']} on {result['gpu']}, head {result['head']} {result['head_dtype']}, batch {result['batch']}; predicted"
    ]
    measured = result.get("measured") or {}
    header = [
        "stage",
        "launches",
        "as if chosen",
        "GFLOP",
        "MB",
        "us",
        "as if chosen",
        *(["measured us"] if measured else []),
    ]
    rows = []
    today, chosen = (result["stages"][total] for total in TOTALS)
    names = list(dict.fromkeys([*today, *chosen]))
    nothing = {"launches": 0, "gflop": 0.0, "mb": 0.0, "us": 0.0, "beside": None}
    for name in names:
        a, b = today.get(name, nothing), chosen.get(name, nothing)
        beside = a["beside"] or b["beside"]
        rows.append([f"{name} (beside {beside})" if beside else name, *_cells(a, b)])
        rows[-1] += [number(measured.get("stages", {}).get(name), ",.1f")] if measured else []
    rows.append(["total", *_cells(*(result["totals"][total] for total in TOTALS))])
    rows[-1] += [number(measured.get("total"), ",.1f")] if measured else []
    lines.append(table(header, rows, right=range(1, len(header))))
    lines += [f"not predicted: {name}: {why}" for name, why in result["failed"].items()]
    lines += said_of_guesses(result)
    if result["one_launch_head"] is not None:
        lines += ["", budget_head.show(result["one_launch_head"])]
    if measured:
        lines.append(f"measured: {measured['source']}; its total has the host's time in it")
        lines += measured["notes"]
    return "\n".join(lines)


def _cells(today: Mapping[str, Any], chosen: Mapping[str, Any]) -> list[str]:
    numbers = [f"{today['gflop']:,.1f}", f"{today['mb']:,.1f}", f"{today['us']:,.1f}", f"{chosen['us']:,.1f}"]
    return [f"{today['launches']:,}", f"{chosen['launches']:,}", *numbers]
