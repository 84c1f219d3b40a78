"""The last part of `dit4dit tune`: whether a plan's whole step is faster with programmatic launches (`dit4dit.ops.programmatic`).

Each plan that a policy makes for the requests in question is recorded twice, without and with, on random weights of the model's
sizes and the same random inputs. Both must give the same bits, then and after each block of their replays, which are timed in
turns; the rule is that of implementations (`tuning_rounds`). A row of the result and a verdict are those of an op that is called
"programmatic_launch" and has the implementations "off", the default, and "on".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from dit4dit.benchmarks import tuning_rounds
from dit4dit.benchmarks.contenders import Inputs
from dit4dit.benchmarks.profiling import on_stream
from dit4dit.benchmarks.recording import Recording
from dit4dit.benchmarks.tuning_calls import Request, Subject
from dit4dit.benchmarks.tuning_journal import locked
from dit4dit.benchmarks.tuning_rounds import Round
from dit4dit.benchmarks.tuning_trial import bits_of, same
from torch import Tensor

from dit4dit import progress
from dit4dit.checkpoints.weights import random_model
from dit4dit.engine import Engine, Plan, RequestShape, StepInputs, calibrate
from dit4dit.engine.programmatic import step_text
from dit4dit.errors import BackendError, said
from dit4dit.noise import Noise
from dit4dit.ops import launch, programmatic, verdicts
from dit4dit.ops.verdicts import PROGRAMMATIC_LAUNCH, Verdict
from dit4dit.types import Guidance

SECONDS = 4.0
"""How long the replays of one plan are timed."""
ROUNDS, SAMPLES = 9, 100


class Step(Protocol):
    """A plan with its inputs in place. Calling it is one replay; `results` are what that has written."""

    def __call__(self) -> None: ...

    def results(self) -> Sequence[Tensor]: ...


class Replayed:
    """The step of a plan on random inputs, a function of the seed."""

    def __init__(self, engine: Engine, shape: RequestShape, action_dim: int | None, seed: int) -> None:
        generator, config = np.random.default_rng(seed), engine.config
        table = None
        if action_dim is not None:
            table = torch.tensor([[torch.nan, -1.0, 1.0, 1.0, 0.0]] * action_dim, dtype=torch.float64).T.contiguous()
        self.plan = Plan(engine, shape, table)
        batch, head = shape.batch, config.head
        images = [
            [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in shape.views] for _ in range(batch)
        ]
        state = None
        if shape.state:
            state = generator.normal(size=(batch, 1, head.state_dim or 0)).astype(np.float32)
        embeds = torch.from_numpy(generator.normal(size=(1, shape.text_length, config.dit.text_in)).astype(np.float32))
        pack = engine.pack(embeds.to(engine.device))
        guidance = []
        if shape.max_guidance is not None:
            before = generator.normal(size=(head.action_horizon, head.action_dim)).astype(np.float32)
            guidance = [Guidance(before, 1, max_guidance=shape.max_guidance)] * batch
        self.plan.run(images, state, [Noise.from_seed(seed, i) for i in range(batch)], [pack] * batch, guidance)

    def __call__(self) -> None:
        with torch.no_grad():
            self.plan.compute()

    def results(self) -> Sequence[Tensor]:
        return [self.plan.outputs.device[name].cpu() for name in sorted(self.plan.outputs.device)]


def applies(device: torch.device) -> bool:
    """Whether a device has such launches at all."""
    return device.type == "cuda" and int(launch.architecture(device)) >= programmatic.LEAST_CAPABILITY


def tune(
    subject: Subject,
    wanted: Sequence[Request],
    device: torch.device,
    *,
    record: Recording,
    dtype: torch.dtype,
    head_dtype: torch.dtype,
    fp8: bool = False,
    steps: int | None = None,
    seed: int = 0,
) -> None:
    """Rows for these requests' plans, added to record.result["calls"], and their verdicts.

    Errors are those of `Engine`; a plan that cannot be recorded keeps the default, and its row says why.
    """
    record.during("programmatic launches", [f"{PROGRAMMATIC_LAUNCH}: model"])
    engine, folder = make_engine(subject, device, dtype, head_dtype, fp8, steps, seed), verdicts.folder(device)
    names = [f"{PROGRAMMATIC_LAUNCH}: {step_text(engine, shape.text)}" for shape, _ in wanted]
    todo = list(dict(zip(names, wanted, strict=True)).items())
    with locked(folder), progress.bar("programmatic launches", len(todo), unit="plan") as bar, on_stream(engine):
        for i, (_, (shape, action_dim)) in enumerate(
            record.each(todo, "programmatic launches", name=lambda one: one[0])
        ):

            def build(on: bool, shape: RequestShape = shape, action_dim: int | None = action_dim) -> Step:
                engine.programmatic_launch = "on" if on else "off"
                return Replayed(engine, shape, action_dim, seed)

            row = judge(step_text(engine, shape.text), build, gpu=device.type == "cuda")
            row["count"] = int(i == 0)
            row["verdict"] = conclude(row, device, folder)
            record.result["calls"].append(row)
            bar.update()


def make_engine(
    subject: Subject,
    device: torch.device,
    dtype: torch.dtype,
    head_dtype: torch.dtype,
    fp8: bool,
    steps: int | None,
    seed: int,
) -> Engine:
    """An engine of random weights with a policy's options."""
    config = subject.config
    model = random_model(config, seed, device=device, dtype=dtype, head_dtype=head_dtype, with_text=False)
    calibration = None
    if fp8:
        exact = Engine(model, steps=steps, head="library", tune="off")
        given = Inputs.random(config, len(subject.robot.views), seed, device, text=False)
        frame, packs = given.frame.to(dtype), [exact.pack(given.embeds)]
        calibration = calibrate(
            exact, [StepInputs(frame, packs, given.state, given.posterior, given.latent, given.action)]
        )
    return Engine(model, steps=steps, quantization="fp8" if fp8 else None, calibration=calibration)


def judge(
    text: str,
    build: Callable[[bool], Step],
    *,
    gpu: bool,
    seconds: float = SECONDS,
    rounds: int = ROUNDS,
    samples: int = SAMPLES,
) -> dict[str, Any]:
    """The row of one plan, as `tuning.tune` has it for a call. build(on): the plan without or with programmatic launches."""
    refused: dict[str, str] = {}
    row: dict[str, Any] = {"op": PROGRAMMATIC_LAUNCH, "call": text, "count": 0, "default": "off", "chosen": None}
    row |= {"runner_up": None, "ms": {}, "ratio": None, "refused": refused, "failed": [], "why": "", "verdict": None}
    try:
        steps = {"off": build(False)}
    except (BackendError, torch.OutOfMemoryError) as error:
        refused["off"] = row["why"] = f"not measured: the plan cannot be recorded here: {said(error)}"
        return row
    first = _bits(steps["off"])
    _admit(steps, first, build, refused)

    def still(name: str, error: Exception | None) -> bool:
        """After a block: it is out where it raised, or its last replay has written other bits."""
        if error is not None:
            raise error
        if not same(bits_of(steps[name].results()), first):
            refused[name] = "its bits were others, while it was timed"
        return name not in refused

    found = tuning_rounds.timed(
        steps, gpu=gpu, seconds=seconds, rounds=rounds, samples=samples, before=lambda _: None, after=still
    )
    _decide(row, [{name: block[name] for name in block if name not in refused} for block in found])
    return row


def _bits(step: Step) -> list[Tensor]:
    """Of what a replay writes."""
    step()
    return bits_of(step.results())


def _admit(steps: dict[str, Step], first: list[Tensor], build: Callable[[bool], Step], refused: dict[str, str]) -> None:
    """Add "on" to the steps, or why not to `refused`. first: bits of the step without."""
    if not same(_bits(steps["off"]), first):
        refused["on"] = "without it the step gives other bits each time, so that nothing can be compared"
        return
    try:
        step = build(True)
    except (BackendError, torch.OutOfMemoryError) as error:
        refused["on"] = f"the plan cannot be recorded with it: {said(error)}"
        return
    if same(_bits(step), first) and same(_bits(step), first):
        steps["on"] = step
    else:
        refused["on"] = "gave other bits than without it"


def _decide(row: dict[str, Any], rounds: Sequence[Round]) -> None:
    """Into the row. Where "off" is out, nothing is chosen: the step itself is at fault."""
    timed = [block for block in rounds if "off" in block]
    if not timed or "off" in row["refused"]:
        row["why"] = "not decided: the step without it gave other bits while it was timed, and the default stays"
        return
    decision = tuning_rounds.decide(timed, "off")
    row |= {"chosen": decision.chosen, "ms": decision.ms, "runner_up": verdicts.runner_up(decision.ms, decision.chosen)}
    row["ratio"] = decision.ms["off"] / decision.ms[decision.chosen]
    row["failed"] = list(row["refused"])
    row["why"] = f"{decision.chosen!r}: {decision.why}"


def conclude(row: Mapping[str, Any], device: torch.device, folder: Path) -> str | None:
    """The name of the verdict's file; None, and no file any more, where nothing was chosen."""
    call = verdicts.call_text((row["call"],))
    if row["chosen"] is None:
        (folder / verdicts.file_name(PROGRAMMATIC_LAUNCH, call)).unlink(missing_ok=True)
        return None
    made = datetime.now(timezone.utc).isoformat(timespec="seconds")
    found = Verdict(
        op=PROGRAMMATIC_LAUNCH,
        call=call,
        place=verdicts.place(device),
        default="off",
        chosen=row["chosen"],
        ms=row["ms"],
        refused=row["refused"],
        made=made,
    )
    return verdicts.write(found, folder).name
