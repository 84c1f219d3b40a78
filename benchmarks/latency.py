"""Latency of one action chunk: the engine, and beside it the published schedule in the same process on the same weights.

The engine is timed as a policy runs it, from uint8 images on the host to actions on the host; the published schedule starts
with everything on the device. Random weights at true sizes need no download; before anything is timed the two must agree on
the very tensors that will be.

What matters most comes first, and is in the file first: set-up, agreement, the engine alone, the engine at a robot's rate, the
two in turns, the roofline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from dit4dit.benchmarks import flops, roofline
from dit4dit.benchmarks.agreement import (
    AGREE,
    WrongActions,
    against_published,
    check,
    check_quantised,
    distance,
    finite,
    known,
)
from dit4dit.benchmarks.budget_head import launch_facts
from dit4dit.benchmarks.contenders import Clock, Inputs, Planned, Published, random_images
from dit4dit.benchmarks.harness import clocks, machine
from dit4dit.benchmarks.recording import Recording, Terminated, left_out
from dit4dit.benchmarks.sampling import Sampler, Samples, rounded, slowest
from torch import Tensor

from dit4dit import progress
from dit4dit.checkpoints.weights import random_model
from dit4dit.engine import Engine, calibrate, errors
from dit4dit.engine.action_ode.program import HeadChoice
from dit4dit.engine.engine import Tune
from dit4dit.errors import OutputError
from dit4dit.model.dit4dit import DiT4DiT
from dit4dit.ops import onednn
from dit4dit.ops.programmatic import ProgrammaticLaunch
from dit4dit.presets import Preset
from dit4dit.robots import EMBODIMENTS
from dit4dit.tables import backed, number, quantiles, quantiles_ms, table

STAGES = ("text", "vae", "backbone", "action_head")
SETUP = ("machine", "model", "inputs", "exact engine", "engine", "plan", "first chunk", "check", "warm-up")
COLD = ("engine", "plan", "first chunk")
"""Steps whose seconds are a result: nothing else runs meanwhile, not even a clock on a terminal."""
PARTS = {"engine alone": 3, "spaced": 2, "pairs": 3}
"""What is timed, in this order, and its share of the time that is left for it and for those after it."""
WARM_UP = {"cuda": 0.5, "cpu": 0.0}
"""Seconds of chunks before the first one that is timed: a GPU's clocks rise with load."""
TIMES = (
    *("engine", "baseline", "ratio", "stages", "spaced", "slowest", "collections", "samples_ms", "engine_alone_ms"),
    *("roofline", "share_of_measured_rate"),
)
"""What a result loses that turns out to be wrong."""


@dataclass(frozen=True)
class Wanted:
    """What is measured; the counts are the most, `seconds` ends it earlier.

    Attributes:
        chunks: of engine and published schedule in turns, for the ratio and the stages.
        baseline, text: time the published schedule; with its text encoder.
        seed: of weights and inputs.
        head, quantization: of the engine. head_dtype: of the action head, on both sides; the model's dtype when None.
        engine_chunks: of the engine alone, for its percentiles.
        at_hz: also time the engine at this rate, as many chunks as of the engine alone.
        seconds: for all samples together; set-up and roofline are not counted.
        roofline: also count the operations and measure the device's own rates.
        tune, programmatic_launch: as of `Engine`.
    """

    chunks: int
    baseline: bool
    text: bool
    seed: int
    head: HeadChoice = "auto"
    head_dtype: torch.dtype | None = None
    quantization: Literal["fp8"] | None = None
    engine_chunks: int = 0
    at_hz: float | None = None
    seconds: float | None = None
    roofline: bool = True
    tune: Tune = "cached"
    programmatic_launch: ProgrammaticLaunch = "cached"

    def counts(self) -> dict[str, int]:
        """Chunks of each part that is timed, in order."""
        most = self.engine_chunks or self.chunks
        counts = {"engine alone": self.engine_chunks, "spaced": most if self.at_hz else 0, "pairs": self.chunks}
        return {part: count for part, count in counts.items() if count}


def measure(
    preset: Preset,
    name: str,
    wanted: Wanted,
    *,
    device: torch.device,
    dtype: torch.dtype,
    record: Recording | None = None,
) -> dict[str, Any]:
    """Time what is wanted; the result is ready for JSON, and in the record's file after each block.

    With `wanted.quantization` the exact engine is held to the published schedule and the quantised one, which is timed, to the
    exact one: "error" in the result. Without the published schedule, a head in one launch is held to the engine with the
    library's. "agreement" in the result says how far they are from each other, also where that ends the run.

    Raises:
        RuntimeError: these do not agree, or actions are not finite; no times are given.
        OutputError: a launch of the one-launch head failed while it was timed; no times are given.
    """
    run = Run(preset, wanted, device, dtype, Recording(None) if record is None else record)
    run.result |= {
        "preset": name,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "quantization": wanted.quantization,
        "head_dtype": str(wanted.head_dtype or dtype).removeprefix("torch."),
        "tune": wanted.tune,
        "error": None,
        "text_encoder_in_baseline": wanted.text and wanted.baseline,
        "wanted": {**wanted.counts(), "at_hz": wanted.at_hz, "seconds": wanted.seconds},
    }
    run.set_up()
    run.time()
    return run.result


class Run:
    """One benchmark: set-up, then the parts that are timed, each named in the file before it begins."""

    def __init__(
        self, preset: Preset, wanted: Wanted, device: torch.device, dtype: torch.dtype, record: Recording
    ) -> None:
        self.preset, self.wanted, self.device, self.dtype, self.record = preset, wanted, device, dtype, record
        self.robot = EMBODIMENTS[preset.embodiment]
        self.result = record.result
        self.result |= {"setup_seconds": {}, "clocks": {"before": None, "after": None}, "agreement": None}
        self.steps = [*SETUP, *wanted.counts(), *(["roofline"] if wanted.roofline else [])]
        if wanted.quantization is None:
            self.steps.remove("exact engine")

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A step of the set-up: its name is in the file and beside the bar while it runs, its seconds after it."""
        self._during(name)
        self.shown.say(name)
        with nullcontext() if name in COLD else self.shown.ticking():
            start = time.perf_counter()
            try:
                yield
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
            finally:
                self.result["setup_seconds"][name] = round(time.perf_counter() - start, 3)
        self.shown.update()

    def set_up(self) -> None:
        """Everything up to the first sample; RuntimeError where the engine is wrong."""
        count = sum(step in self.steps for step in SETUP)
        with progress.bar("set-up", count, unit="step", mininterval=0) as self.shown:
            self._set_up()

    def _set_up(self) -> None:
        wanted, device, robot = self.wanted, self.device, self.robot
        config, text = self.preset.model, wanted.text and wanted.baseline
        with self.step("machine"):
            self.result["machine"] = machine()
        with self.step("model"):
            model = random_model(
                config, wanted.seed, device=device, dtype=self.dtype, head_dtype=wanted.head_dtype, with_text=text
            )
        with self.step("inputs"):
            inputs = Inputs.random(config, len(robot.views), wanted.seed, device, text=text)
            if inputs.tokens is not None:
                inputs = replace(inputs, embeds=model.embed(inputs.tokens))
            images, frame = random_images(config, robot, wanted.seed, device, self.dtype)
            inputs = replace(inputs, frame=frame)
        exact, calibration = None, None
        if wanted.quantization is not None:
            with self.step("exact engine"):
                exact = Planned(Engine(model, head="library", tune="off"), inputs, images, robot)
                calibration = calibrate(exact.engine, [exact.step_inputs()])
        with self.step("engine"):
            engine = Engine(
                model,
                quantization=wanted.quantization,
                calibration=calibration,
                head=wanted.head,
                tune=wanted.tune,
                programmatic_launch=wanted.programmatic_launch,
            )
        with self.step("plan"):
            fast = Planned(engine, inputs, images, robot)
        with self.step("first chunk"):
            actions = fast.checked()
        self.result |= {"head": fast.plan.head, "implementations": fast.plan.ran}
        self.result["one_launch"] = launch_facts(engine, fast.plan.head)
        self.result["programmatic_launch"] = fast.plan.programmatic
        taken = self.result["setup_seconds"]
        cold = {"fold": taken["engine"], "plan": taken["plan"], "first_chunk": taken["first chunk"]}
        self.result["cold_start_seconds"] = cold
        self.sampler = Sampler(fast, wanted.seed, self.record, self._keep)
        with self.step("check"):
            self.published = Published(model) if wanted.baseline else None
            self._check(model, fast, exact, actions, images)
        with self.step("warm-up"):
            count = self.sampler.warm_up(WARM_UP[device.type])
            self.result["warm_up_chunks"] = count
            self.result["clocks"]["before"] = clocks(self.sampler.chunk)
        if device.type == "cuda":
            self.result["gpu_memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)

    def _check(self, model: DiT4DiT, fast: Planned, exact: Planned | None, actions: Tensor, images: list[Any]) -> None:
        """Nothing wrong is timed: RuntimeError, after how wrong it is stands in the result."""
        engine, inputs = fast.engine, fast.inputs
        if exact is not None:
            finite(actions)
            self.result["error"] = errors(exact.engine, engine, [exact.step_inputs()])
            check_quantised(self.result["error"], fast)
            engine, actions = exact.engine, exact.checked()
        limit = AGREE[min(self.dtype, self.wanted.head_dtype or self.dtype, key=lambda kind: kind.itemsize)]
        found: dict[str, Any] | None = None
        if self.published is not None:
            found = against_published(engine, exact or fast, actions, self.published)
        elif fast.plan.head == "one_launch":
            library = Planned(Engine(model, head="library", tune="off"), inputs, images, self.robot)
            found = {"with": "the engine with head='library'", "features": None}
            found["actions"] = distance(actions, library.checked())
        if found is not None:
            self.result["agreement"] = {**{k: known(v) for k, v in found.items()}, "limit": limit}
        finite(actions)
        if found is not None:
            check(found, limit)

    def time(self) -> None:
        """All parts, as far as the time goes, then the roofline."""
        wanted, sampler, counts = self.wanted, self.sampler, self.wanted.counts()
        parts: dict[str, Callable[[int, float | None], None]] = {
            "engine alone": sampler.alone,
            "spaced": lambda count, end: sampler.spaced(wanted.at_hz or 1.0, count, end),
            "pairs": lambda count, end: sampler.pairs(self.published, count, end),
        }
        self.record.limit(wanted.seconds)
        try:
            with sampler.samples.collections.watched():
                for part, count in counts.items():
                    self._during(part)
                    parts[part](count, self._end(part))
                    self._sound(whole=True)
                    self.result["clocks"]["after"] = clocks(sampler.chunk)
                    self._put()
        except (Terminated, KeyboardInterrupt):
            self._put()
            raise
        if wanted.roofline:
            self._during("roofline")
            with progress.bar("roofline", 4, unit="step", mininterval=0) as shown:
                self._roofline(shown)

    def _end(self, part: str) -> float | None:
        """When the part's share of what is left has passed; None without a limit."""
        remaining, parts = self.record.remaining(), list(self.wanted.counts())
        after = sum(PARTS[other] for other in parts[parts.index(part) :])
        return None if remaining is None else time.monotonic() + remaining * PARTS[part] / after

    def _during(self, name: str) -> None:
        self.record.during(name, self.steps[self.steps.index(name) + 1 :])

    def _keep(self) -> None:
        self._sound()
        self._put()
        self.record.keep()

    def _put(self) -> None:
        """The numbers of the samples so far."""
        self.result |= numbers(self.sampler.samples)

    def _sound(self, whole: bool = False) -> None:
        """What is wrong takes all times away. whole: look at the actions too, which is not for between two blocks."""
        fast = self.sampler.fast
        try:
            if fast.engine.one_launch is not None:
                fast.engine.one_launch.check()  # a launch that failed has ended early
            if whole:
                finite(fast.checked())
        except (OutputError, WrongActions):
            for key in TIMES:
                self.result.pop(key, None)
            raise

    def _roofline(self, shown: progress.Bar) -> None:
        """What the times are of the device's own rates; counting takes seconds on the host, so it comes last."""
        model, text = self.sampler.fast.engine.model, self.wanted.text and self.wanted.baseline
        assert model.head is not None
        shown.say("the device's rates")
        rates = [matrix_rate(self.device, self.dtype)]
        shown.update()
        memory = roofline.memory_rate(self.device)
        shown.update()
        shown.say("counting operations")
        with shown.ticking():
            counts = flops.count(self.preset)
        shown.update()
        rates.append(matrix_rate(self.device, self.dtype))
        shown.update()
        times = dict(self.result["samples_ms"])
        times["engine"] = self.result["engine_alone_ms"] or times["engine"]
        self.result["share_of_measured_rate"] = shares(times, counts, max(rates), text)
        self.result["roofline"] = roofline.points(
            self.preset,
            counts,
            self.result["stages"],
            matrix_gflops=max(rates),
            memory_gb_per_s=memory,
            dtype=self.dtype,
            head_dtype=model.head.dtype,
            text=text,
        )


def numbers(samples: Samples) -> dict[str, Any]:
    """What is known of the samples so far, ready for JSON; None where there are none yet."""
    n, alone = samples.pairs, list(samples.alone)
    totals = {who: times[:n] for who, times in samples.totals.items()} if n else {}
    stages = {w: {s: t[:n] for s, t in c.seconds.items()} for w, c in samples.stages.items()} if n else {}
    engine = alone or totals.get("engine")
    spaced = samples.spaced
    return {
        **({"engine": quantiles_ms(engine)} if engine else {}),
        **({"baseline": quantiles_ms(totals["baseline"])} if "baseline" in totals else {}),
        "ratio": ratios(totals, stages) if "baseline" in totals else None,
        "stages": {who: {s: median(t) * 1e3 for s, t in times.items()} for who, times in stages.items()},
        "spaced": spaced.result() if spaced is not None and spaced.seconds else None,
        "slowest": slowest(alone),
        "collections": samples.collections.result(),
        "roofline": None,
        "share_of_measured_rate": None,
        "samples_ms": {who: rounded(times) for who, times in totals.items()},
        "engine_alone_ms": rounded(alone) if alone else None,
    }


def median(values: Sequence[float]) -> float:
    """A value of them, as `tables.quantiles` has it."""
    return float(quantiles(values)["p50"])


def ratios(totals: dict[str, list[float]], stages: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """Published over engine: the median of the pairs' ratios, whole, per stage, and for backbone and head together."""

    def of(pick: Callable[[str], list[float]]) -> float:
        return median([slow / quick for slow, quick in zip(pick("baseline"), pick("engine"), strict=True)])

    def both(who: str) -> list[float]:
        seconds = stages[who]
        return [a + b for a, b in zip(seconds["backbone"], seconds["action_head"], strict=True)]

    shared = [stage for stage in STAGES if stage in stages["engine"]]
    each = {stage: of(lambda who, s=stage: stages[who][s]) for stage in shared}  # type: ignore[misc]
    return {"total": of(totals.__getitem__), "backbone_and_head": of(both), **each}


def shares(
    times_ms: dict[str, list[float]], counts: dict[str, dict[str, float]], rate: float, text: bool
) -> dict[str, float]:
    """GFLOP/s of each contender over `rate`, that of one large matrix product."""
    work = {"engine": counts["executed"]["total"]}
    if "baseline" in times_ms:
        published = counts["published"]
        work["baseline"] = published["total"] - (0.0 if text else published["text_encoder"])
    return {"matrix_gflops": rate, **{who: work[who] / median(times) * 1e3 / rate for who, times in times_ms.items()}}


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of the best of five products of two large square matrices, by the fastest library at hand."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    onednn.pack(b, size)
    clock = Clock(device)
    for _ in range(6):
        with clock.stage("plain"):
            a @ b
        if onednn.is_packed(b):
            with clock.stage("packed"):
                onednn.linear(a, b, None)
    return 2 * size**3 / min(min(seconds[1:]) for seconds in clock.seconds.values()) / 1e9


def rows(result: dict[str, Any]) -> list[list[str]]:
    """The table that the command prints: one row per number; "-" where something was not measured, or by too few samples."""
    spaced = result.get("spaced")
    found: dict[str, Any] = {who: result[who] for who in ("engine", "baseline") if who in result}
    if spaced:
        found[f"engine at {spaced['hz']:g} Hz"] = spaced
    out = []
    for who, q in found.items():
        q = backed(q, q["samples"])
        times = [number(q[k]) for k in ("p50", "p95", "p99", "p999", "max")]
        stages = "  ".join(f"{s} {ms:.2f}" for s, ms in (result.get("stages") or {}).get(who, {}).items())
        share = (result.get("share_of_measured_rate") or {}).get(who)
        out.append(
            [
                who,
                *times,
                number(q["jitter"]),
                str(q["samples"]),
                "-" if share is None else f"{100 * share:.0f} %",
                stages,
            ]
        )
    return out


def show(result: dict[str, Any]) -> str:
    """The table, the errors of quantisation, how much faster the engine is, and what `--seconds` left out."""
    header = ["", "p50 ms", "p95", "p99", "p99.9", "max", "jitter", "chunks", "of matrix rate", "stages, p50 ms"]
    lines = [table(header, rows(result), right=range(1, 9))]
    if result["error"]:
        of = "  ".join(f"{what} {e['rms']:.2e}" for what, e in result["error"].items())
        lines.append(f"{result['quantization']} against the exact engine, rms: {of}")
    if result["ratio"]:
        lines.append("published / engine: " + "  ".join(f"{k} {v:.2f}" for k, v in result["ratio"].items()))
    return "\n".join(lines) + left_out(result)
