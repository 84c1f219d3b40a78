"""Where the time of one engine step goes: each stage's kernels, how often they run, and their microseconds.

The plan's own functions run without a graph, stage by stage under torch.profiler, so that every kernel has a name; numbers are
per step, the mean of five. A GPU's are CUPTI's kernel times, with caches as the step before left them; a CPU's are operators'
own times. Beside them stands the same step as it is replayed: what that takes beyond the kernels is gaps between them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any, Literal

import torch
from dit4dit.benchmarks.budget_head import launch_facts
from dit4dit.benchmarks.contenders import Inputs, Planned, random_images
from dit4dit.benchmarks.harness import machine
from dit4dit.benchmarks.recording import Recording
from torch.profiler import ProfilerActivity, profile

from dit4dit import progress
from dit4dit.checkpoints.weights import random_model
from dit4dit.engine import Engine, StepInputs, calibrate
from dit4dit.engine.action_ode.program import HeadChoice
from dit4dit.noise import Noise
from dit4dit.presets import Preset
from dit4dit.robots import EMBODIMENTS
from dit4dit.tables import table

WARM_UP, STEPS, REPLAYS = 3, 5, 20
NAME, SHOWN = 300, 72
"""Longest kernel name in the result, and in the table."""

Function = Callable[[], None]
Kernel = dict[str, Any]
"""{"kernel": name, "count": calls a step, "us": microseconds a step}."""


@torch.no_grad()
def measure(
    preset: Preset,
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    record: Recording,
    head: HeadChoice = "auto",
    head_dtype: torch.dtype | None = None,
    quantization: Literal["fp8"] | None = None,
) -> None:
    """The profile of one step on random weights into `record`, stage after stage."""
    result = record.result
    head_dtype = dtype if head_dtype is None else head_dtype
    result |= {"preset": name, "device": str(device), "dtype": str(dtype).removeprefix("torch."), "head": head}
    result |= {"head_dtype": str(head_dtype).removeprefix("torch."), "quantization": quantization, "machine": machine()}
    result |= {"unit": "us per step", "steps": STEPS, "profiler": None, "stages": {}, "stage_us": {}, "replay_us": {}}
    with progress.bar("profile", leave=False) as shown:
        record.during("weights")
        shown.say("weights")
        step = planned(preset, device, dtype, seed, head, head_dtype, quantization)
        step.chunk(Noise.from_seed(seed, 0))
        result |= {"head": step.plan.head, "implementations": step.plan.ran}
        result["one_launch"] = launch_facts(step.engine, step.plan.head)
        with on_stream(step.engine):
            _stages(step, device, record, shown)
    if step.engine.one_launch is not None:
        step.engine.one_launch.check()  # a launch that failed has ended early


def _stages(step: Planned, device: torch.device, record: Recording, shown: progress.Bar) -> None:
    """Each stage as it is replayed, then its kernels."""
    result = record.result
    replays, stages = step.replays(), step.eager()
    shown.of(1 + len(replays) + len(stages))
    for stage, function in replays.items():
        record.during(f"replay of {stage}")
        shown.update()
        shown.say(f"replay of {stage}")
        result["replay_us"][stage] = event_us(function, device, REPLAYS)
    result["profiler"] = profiler(device)
    for stage, function in record.each(stages.items(), "stages", name=lambda item: item[0]):
        shown.update()
        shown.say(f"kernels of {stage}")
        _stage(result, stage, function, device)


def planned(
    preset: Preset,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    head: HeadChoice,
    head_dtype: torch.dtype,
    quantization: Literal["fp8"] | None,
) -> Planned:
    """The engine's plan on random weights and inputs, as `bench latency` times it."""
    config, robot = preset.model, EMBODIMENTS[preset.embodiment]
    model = random_model(config, seed, device=device, dtype=dtype, head_dtype=head_dtype, with_text=False)
    inputs = Inputs.random(config, len(robot.views), seed, device, text=False)
    images, frame = random_images(config, robot, seed, device, dtype)
    inputs = Inputs(**{**vars(inputs), "frame": frame})
    calibration = None
    if quantization is not None:
        exact = Engine(model, head="library")
        packs = [exact.pack(inputs.embeds)]
        given = StepInputs(frame, packs, inputs.state, inputs.posterior, inputs.latent, inputs.action)
        calibration = calibrate(exact, [given])
        del exact
    engine = Engine(model, quantization=quantization, calibration=calibration, head=head)
    return Planned(engine, inputs, images, robot)


def _stage(result: dict[str, Any], stage: str, function: Function, device: torch.device) -> None:
    """One stage's kernels and sums; the events' time alone where the profiler has no kernels."""
    kernels: list[Kernel] = []
    try:
        if result["profiler"]["activities"]:
            kernels = kernels_of(function, result["profiler"]["activities"])
    except RuntimeError as error:
        result["profiler"]["reason"] = f"{stage} has its times alone: {type(error).__name__}: {error}"[:NAME]
    result["stages"][stage] = kernels
    sums = {"kernels": sum(k["us"] for k in kernels), "launches": sum(k["count"] for k in kernels)}
    result["stage_us"][stage] = {**sums, "eager": event_us(function, device, STEPS)}
    result["total_us"] = sum(s["kernels"] for s in result["stage_us"].values())
    result["launches"] = sum(s["launches"] for s in result["stage_us"].values())
    step = result["replay_us"]["step"]
    result["share_of_replay"] = result["total_us"] / step if step and result["total_us"] else None


@contextlib.contextmanager
def on_stream(engine: Engine) -> Iterator[None]:
    """The engine's own stream, where it has one."""
    if engine.stream is None:
        yield
        return
    torch.cuda.synchronize(engine.device)
    with torch.cuda.stream(engine.stream):
        yield
    torch.cuda.synchronize(engine.device)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def event_us(function: Function, device: torch.device, count: int) -> float:
    """Median microseconds of a call: between two events on a GPU, by the clock on a CPU."""
    function()
    wait(device)
    found = []
    for _ in range(count):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            wait(device)
            found.append(start.elapsed_time(end) * 1e3)
        else:
            begin = time.perf_counter()
            function()
            found.append((time.perf_counter() - begin) * 1e6)
    return median(found)


def profiler(device: torch.device) -> dict[str, Any]:
    """The activities that show kernels here, or none and why; the first session also loads CUPTI."""
    x = torch.ones(8, device=device)
    reason = "torch.profiler saw no kernels: CUPTI is missing, or another profiler has it"
    for names in (["CUDA"], ["CPU", "CUDA"]) if device.type == "cuda" else (["CPU"],):
        try:
            if kernels_of(lambda: x.add_(1), names):
                return {"activities": names, "reason": None}
        except Exception as error:  # what kineto and CUPTI raise has no common base; the events' times remain
            reason = f"{type(error).__name__}: {error}"[:NAME]
    return {"activities": [], "reason": f"{reason}; stages have their times alone"}


def kernels_of(function: Callable[[], object], activities: Sequence[str]) -> list[Kernel]:
    """What one call runs, longest first, the mean of five calls after three that are not counted."""
    on_gpu = "CUDA" in activities
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    for _ in range(WARM_UP):
        function()
    wait()
    with profile(activities=[getattr(ProfilerActivity, name) for name in activities]) as seen:
        for _ in range(STEPS):
            function()
        wait()
    sums: dict[str, list[float]] = {}
    for event in seen.events() or ():
        if (event.device_type.name == "CUDA") != on_gpu or getattr(event, "is_user_annotation", False):
            continue
        entry = sums.setdefault(event.name[:NAME], [0.0, 0.0])
        entry[0] += 1 / STEPS
        entry[1] += (event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total) / STEPS
    rows = [{"kernel": name, "count": round(count, 2), "us": round(us, 3)} for name, (count, us) in sums.items()]
    return sorted(rows, key=lambda row: -float(row["us"]))


def short(name: str) -> str:
    """A kernel's name without what all of them have: return type, namespaces' noise, arguments."""
    for noise in ("void ", "at::native::", "(anonymous namespace)::", "at_cuda_detail::", "std::", "cutlass::"):
        name = name.replace(noise, "")
    return name if len(name) <= SHOWN else f"{name[: SHOWN - 3]}..."


def show(result: dict[str, Any], most: int = 12) -> str:
    """One table of stages, one of each stage's longest kernels."""
    here = result["machine"]
    lines = [
        f"{result['preset']} on {here['gpu'] or here['cpu']}, torch {here['torch']}, {result['dtype']}, head "
        f"{result['head']} {result['head_dtype']}, quantization {result['quantization']}; us per step",
    ]
    if result["profiler"] and result["profiler"]["reason"]:
        lines.append(result["profiler"]["reason"])
    replay = result["replay_us"]
    rows = [
        [stage, f"{of['kernels']:,.1f}", f"{of['launches']:,.0f}", f"{replay[stage]:,.1f}" if stage in replay else ""]
        for stage, of in result["stage_us"].items()
    ]
    if "step" in replay and rows:
        rows.append(["step", f"{result['total_us']:,.1f}", f"{result['launches']:,.0f}", f"{replay['step']:,.1f}"])
    lines.append(table(["stage", "kernels us", "launches", "replayed us"], rows, right=range(1, 4)))
    every = [[s, k["kernel"], k["count"], k["us"]] for s, found in result["stages"].items() for k in found[:most]]
    kernels = [[s, short(name), f"{n:g}", f"{us:,.1f}", f"{us / n:,.2f}"] for s, name, n, us in every]
    left = sum(max(len(found) - most, 0) for found in result["stages"].values())
    lines += ["", table(["stage", "kernel", "count", "us", "us each"], kernels, right=range(2, 5))]
    return "\n".join(lines + ([f"{left} more kernels are in the JSON file"] if left else []))
