"""Whether programmatic launches are worth it: by the clock, among steps with the same bits, and written where plans look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dit4dit.benchmarks import harness, latency, programmatic, tuning_calls, tuning_report, tuning_rounds
from dit4dit.benchmarks.recording import Recording

from dit4dit.cli import main
from dit4dit.engine import Engine
from dit4dit.engine.programmatic import chosen
from dit4dit.errors import BackendError, DeviceError
from dit4dit.ops import launch, verdicts
from dit4dit.ops.verdicts import PROGRAMMATIC_LAUNCH, Verdict, call_text

CPU = torch.device("cpu")


class Clock:
    """The time of the measuring, which passes while steps run."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (harness, tuning_rounds):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIT4DIT_CACHE", str(tmp_path))
    return verdicts.folder(CPU)


class Step:
    """Takes `ms` of the clock's time; the replays from number `wrong` on give other bits."""

    def __init__(self, clock: Clock, ms: float | Callable[[int], float], wrong: int | None = None) -> None:
        self.clock, self.wrong, self.replays = clock, wrong, 0
        self.ms = ms if callable(ms) else lambda _: float(ms)

    def __call__(self) -> None:
        self.replays += 1
        self.clock.now += self.ms(self.replays) / 1e3

    def results(self) -> Sequence[torch.Tensor]:
        changed = self.wrong is not None and self.replays >= self.wrong
        return [torch.tensor([1.0, float("nan"), -0.0 if changed else 0.0])]


def judged(off: Step, on: Step | Exception) -> dict[str, Any]:
    def build(early: bool) -> Step:
        if early and isinstance(on, Exception):
            raise on
        return on if early else off  # type: ignore[return-value]

    return programmatic.judge("a step", build, gpu=False)


@pytest.mark.parametrize(
    ("off", "on", "choice", "why"),
    [
        (5.0, 4.5, "on", "'on': 1.11 times as fast as 'off', ahead in 9 of 9 rounds"),
        (5.0, 4.95, "off", "'off': the default stays: 'on' is 1.010 times as fast, ahead in 9 of 9 rounds, and 1.02"),
        (5.0, 6.0, "off", "'off': the fastest; 'on' takes 1.20 times as long"),
        (5.0, 5.0, "off", "'off': the default stays"),
    ],
)
def test_it_is_chosen_by_the_rule_of_implementations(clock: Clock, off, on, choice, why) -> None:
    row = judged(Step(clock, off), Step(clock, on))
    assert row["chosen"] == choice
    assert row["why"].startswith(why)
    assert row["ms"] == {"off": pytest.approx(off), "on": pytest.approx(on)}
    assert (row["default"], row["runner_up"]) == ("off", "off" if choice == "on" else "on")
    assert row["ratio"] == pytest.approx(off / on if choice == "on" else 1.0)
    assert not row["refused"]


def test_both_are_replayed_in_turns(clock: Clock) -> None:
    """So that a GPU that slows down meanwhile slows both: one after the other, the second would be found 2 % slower."""
    off, on = (Step(clock, lambda _: 5.0 + clock.now / 5, None) for _ in range(2))
    row = judged(off, on)
    assert row["chosen"] == "off"
    assert row["ms"]["on"] == pytest.approx(row["ms"]["off"], rel=0.02)
    assert max(row["ms"].values()) > 5.3, "it did slow down"


@pytest.mark.parametrize("wrong", [1, 2, 30, 300])
def test_other_bits_are_never_chosen_however_fast(clock: Clock, wrong: int) -> None:
    """From the first replay on, or only while it is timed; -0 for 0 counts, and NaN is no difference."""
    row = judged(Step(clock, 5.0), Step(clock, 1.0, wrong))
    assert row["chosen"] == "off"
    before = "gave other bits than without it"
    assert row["refused"] == {"on": before if wrong <= 2 else "its bits were others, while it was timed"}
    assert (list(row["ms"]), row["failed"]) == (["off"], ["on"])


def test_a_capture_that_fails_keeps_the_default(clock: Clock) -> None:
    row = judged(Step(clock, 5.0), BackendError("the step cannot be captured"))
    assert (row["chosen"], row["ms"]) == ("off", {"off": pytest.approx(5.0)})
    assert row["refused"] == {"on": "the plan cannot be recorded with it: the step cannot be captured"}
    with pytest.raises(DeviceError):
        judged(Step(clock, 5.0), DeviceError("gone"))


def test_a_step_without_bits_of_its_own_cannot_be_compared(clock: Clock) -> None:
    row = judged(Step(clock, 5.0, 2), Step(clock, 1.0))
    assert (row["chosen"], list(row["ms"])) == (None, [])
    assert "other bits each time" in row["refused"]["on"]
    later = judged(Step(clock, 5.0, 40), Step(clock, 1.0))
    assert later["chosen"] is None
    assert "other bits while it was timed" in later["why"]
    assert not tuning_report.hopeless([row, later]), "each op call has an implementation all the same"


def test_what_cannot_be_recorded_at_all_says_so(clock: Clock) -> None:
    def build(on: bool) -> Step:
        raise torch.OutOfMemoryError("CUDA out of memory")

    row = programmatic.judge("a step", build, gpu=False)
    assert row["chosen"] is None
    assert "cannot be recorded here: CUDA out of memory" in row["why"]


def test_a_verdict_is_written_replaced_and_taken_away(clock: Clock, folder: Path) -> None:
    folder.mkdir(parents=True)
    for choice, on in (("on", 4.0), ("off", 6.0)):
        name = programmatic.conclude(judged(Step(clock, 5.0), Step(clock, on)), CPU, folder)
        assert name is not None
        found = verdicts.read(folder / name)
        assert isinstance(found, Verdict)
        assert (found.op, found.call, found.default, found.chosen) == (
            PROGRAMMATIC_LAUNCH,
            call_text(("a step",)),
            "off",
            choice,
        )
    assert programmatic.conclude(judged(Step(clock, 5.0, 2), Step(clock, 4.0)), CPU, folder) is None
    assert not list(folder.glob("*.json"))


def test_the_plans_of_a_model_and_the_verdicts_that_they_find(
    clock: Clock, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The whole part on a processor, where launches do not differ: real plans and bits, and a clock that says who is faster."""
    subject = tuning_calls.of_preset("tiny")
    wanted = tuning_calls.requests(subject, (1, 2), {})
    replay = programmatic.Replayed.__call__

    def timed(self: programmatic.Replayed) -> None:
        replay(self)
        early = self.early and self.plan.shape.max_guidance is None  # type: ignore[attr-defined]
        clock.now += 0.5 if early else 0.6

    make = programmatic.Replayed.__init__

    def marked(self: programmatic.Replayed, engine: Engine, *args: Any) -> None:
        self.early = engine.programmatic_launch == "on"  # type: ignore[attr-defined]
        make(self, engine, *args)

    monkeypatch.setattr(programmatic.Replayed, "__call__", timed)
    monkeypatch.setattr(programmatic.Replayed, "__init__", marked)
    with Recording(tmp_path / "r.json") as record:
        record.result["calls"] = []
        programmatic.tune(subject, wanted, CPU, record=record, dtype=torch.float32, head_dtype=torch.float32, seed=3)
    rows = record.result["calls"]
    assert len(rows) == len(wanted) == 6
    assert [row["count"] for row in rows] == [1, 0, 0, 0, 0, 0]
    for row, (shape, _) in zip(rows, wanted, strict=True):
        assert not row["refused"]
        assert row["chosen"] == ("on" if shape.max_guidance is None else "off"), row["why"]
    args = (CPU, torch.float32, torch.float32, False, None, 4)
    engine = programmatic.make_engine(subject, *args)
    assert [chosen(engine, shape.text) for shape, _ in wanted] == [row["chosen"] == "on" for row in rows]
    text = tuning_report.show({**record.result, "distinct": {}})
    assert "programmatic_launch" in text
    assert tuning_report.step_ms(rows) is None


def test_without_time_what_is_left_is_named(folder: Path) -> None:
    subject = tuning_calls.of_preset("tiny")
    wanted = tuning_calls.requests(subject, (1,), {})
    with Recording(None, 1e-9) as record:
        record.result["calls"] = []
        programmatic.tune(subject, wanted, CPU, record=record, dtype=torch.float32, head_dtype=torch.float32)
    assert record.result["calls"] == []
    assert len(record.result["cut"]["left"]) == 3
    assert all(name.startswith("programmatic_launch: model ") for name in record.result["cut"]["left"])


@pytest.mark.parametrize("choice", ["cached", "on", "off"])
def test_bench_latency_hands_it_to_the_engine(monkeypatch: pytest.MonkeyPatch, choice: str) -> None:
    made: list[str] = []

    def engine(model: Any, *, programmatic_launch: str = "cached", **options: Any) -> Engine:
        made.append(programmatic_launch)
        raise BackendError("far enough")

    monkeypatch.setattr(latency, "Engine", engine)
    words = () if choice == "cached" else ("--programmatic-launch", choice)
    with pytest.raises(SystemExit):
        main(["bench", "latency", "--preset", "tiny", "--device", "cpu", "--no-roofline", *words])
    assert made == [choice]


@pytest.mark.parametrize(("architecture", "has"), [("80", False), ("89", False), ("90", True), ("120", True)])
def test_where_there_is_something_to_measure(monkeypatch: pytest.MonkeyPatch, architecture: str, has: bool) -> None:
    monkeypatch.setattr(launch, "architecture", lambda device: architecture)
    assert programmatic.applies(torch.device("cuda", 0)) == has
    assert not programmatic.applies(CPU)


def test_fp8_is_measured_as_fp8(folder: Path) -> None:
    subject = tuning_calls.of_preset("tiny")
    engine = programmatic.make_engine(subject, CPU, torch.float32, torch.float32, True, None, 0)
    assert engine.quantization == "fp8"
    step = programmatic.Replayed(engine, tuning_calls.requests(subject, (1,), {})[0][0], subject.robot.action_dim, 0)
    step()
    assert all(result.isfinite().all() for result in step.results())
