"""Programmatic launches in plans: as asked for, or where a verdict of this machine names that very plan; never leaked."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda

from dit4dit import Noise, Policy, ops
from dit4dit.checkpoints.weights import random_model
from dit4dit.engine import Engine, Plan, RequestShape
from dit4dit.engine.programmatic import chosen, step_text
from dit4dit.errors import BackendError, ConfigError
from dit4dit.ops import dispatch, programmatic, verdicts
from dit4dit.ops.explanation import survey
from dit4dit.ops.verdicts import PROGRAMMATIC_LAUNCH, Verdict, call_text
from dit4dit.presets import preset

TINY = preset("tiny").model
CPU = torch.device("cpu")
SHAPE = RequestShape(1, ((40, 50), (30, 30)), (32, 32), "bilinear", True, 9)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIT4DIT_CACHE", str(tmp_path))
    return verdicts.folder(CPU)


def engine(**options: Any) -> Engine:
    return Engine(random_model(TINY, 1, with_text=False), **options)


def found(text: str, choice: str, cache: Path, **changes: Any) -> None:
    """A verdict as if it had been made here."""
    ms = {"off": 2.0, "on": 1.0}
    verdict = Verdict(PROGRAMMATIC_LAUNCH, call_text((text,)), verdicts.place(CPU), "off", choice, ms)
    verdicts.write(replace(verdict, **changes), cache)


def test_off_unless_asked_for_or_measured(cache: Path) -> None:
    assert not chosen(engine(), SHAPE.text)
    assert chosen(engine(programmatic_launch="on"), SHAPE.text)
    assert chosen(engine(programmatic_launch="on", tune="off"), SHAPE.text)
    found(step_text(engine(), SHAPE.text), "on", cache)
    assert chosen(engine(), SHAPE.text)
    assert not chosen(engine(programmatic_launch="off"), SHAPE.text)
    assert not chosen(engine(tune="off"), SHAPE.text)
    for other in (
        replace(SHAPE, batch=2),
        replace(SHAPE, views=((40, 50), (30, 31))),
        replace(SHAPE, size=None),
        replace(SHAPE, resize="cv2_area"),
        replace(SHAPE, state=False),
        replace(SHAPE, text_length=10),
        replace(SHAPE, max_guidance=5.0),
    ):
        assert not chosen(engine(), other.text), other
    assert not chosen(engine(steps=2), SHAPE.text)
    assert not chosen(engine(posterior="mean"), SHAPE.text)
    assert chosen(engine(), replace(SHAPE, max_guidance=None).text)


def test_another_model_and_other_numbers_are_other_steps() -> None:
    texts = {step_text(engine(), SHAPE.text)}
    texts.add(step_text(Engine(random_model(replace(TINY, extract_layer=0), 1, with_text=False)), SHAPE.text))
    texts.add(step_text(Engine(random_model(TINY, 1, with_text=False, dtype=torch.bfloat16)), SHAPE.text))
    texts.add(step_text(Engine(random_model(TINY, 1, with_text=False, head_dtype=torch.bfloat16)), SHAPE.text))
    assert len(texts) == 4
    assert step_text(Engine(random_model(TINY, 2, with_text=False)), SHAPE.text) in texts, (
        "other weights are no other step"
    )


def test_what_was_found_elsewhere_or_before_does_not_count(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = step_text(engine(), SHAPE.text)
    found(text, "on", cache, place={**verdicts.place(CPU), "kernels": "others"})
    assert not chosen(engine(), SHAPE.text)
    found(text, "off", cache)
    assert not chosen(engine(), SHAPE.text)
    found(text, "sideways", cache, ms={"sideways": 1.0})
    assert not chosen(engine(), SHAPE.text)
    (cache / verdicts.file_name(PROGRAMMATIC_LAUNCH, call_text((text,)))).unlink()
    row = {"chosen": "on", "ms": {"off": 2.0, "on": 1.0}}
    table = {"calls": {f"{PROGRAMMATIC_LAUNCH}: {call_text((text,))}": row}}
    monkeypatch.setattr(verdicts, "shipped_for", lambda device: table)
    assert not chosen(engine(), SHAPE.text), "another machine's"


def test_a_survey_counts_it(cache: Path) -> None:
    found("a step", "on", cache)
    seen = survey(CPU, dispatch.files())
    assert ([v.op for v in seen.counting], dict(seen.ignored)) == ([PROGRAMMATIC_LAUNCH], {})


def test_the_option_is_checked_and_kept(small_libero: Path) -> None:
    for wrong in (True, "always", None):
        with pytest.raises(ConfigError, match="programmatic_launch: expected"):
            engine(programmatic_launch=wrong)
        with pytest.raises(ConfigError, match="programmatic_launch: expected"):
            Policy.from_pretrained("/nowhere", programmatic_launch=wrong)
    with pytest.raises(ConfigError, match="programmatic_launch='on' are options of the engine"):
        Policy.from_pretrained("/nowhere", engine="off", programmatic_launch="on")
    policy = Policy.from_pretrained(small_libero, device="cpu", programmatic_launch="on")
    assert policy.engine is not None
    assert policy.engine.programmatic_launch == "on"
    assert pickle.loads(pickle.dumps(policy.engine)).programmatic_launch == "on"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


def recorded(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, fails: bool = False, **options: Any
) -> tuple[Any, set[bool]]:
    """A plan on a stand-in for a GPU, and how kernels would have been launched in all runs of its step, captures among them."""
    seen: set[bool] = set()
    actions = Engine.actions_behind

    def watched(self: Engine, *args: Any, **kwargs: Any) -> Any:
        seen.add(programmatic.triton_kernels("90"))
        if fails and torch.cuda.is_current_stream_capturing():
            raise ValueError("planted")
        return actions(self, *args, **kwargs)

    made = engine(**options)
    seen.clear()
    monkeypatch.setattr(Engine, "actions_behind", watched)
    made._stream = cuda.stream
    return Plan(made, SHAPE, None), seen


@pytest.mark.parametrize("on", [False, True])
def test_a_plan_records_all_of_its_runs_so_and_leaves_nothing_behind(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, on: bool
) -> None:
    plan, seen = recorded(cuda, monkeypatch, programmatic_launch="on" if on else "off")
    assert (plan.programmatic, seen) == (on, {on})
    inside: list[bool] = []
    plan.record(lambda: inside.append(programmatic.triton_kernels("90")))
    assert set(inside) == {on}, "stages too, which are timed beside the step"
    assert not programmatic.triton_kernels("90")


def test_a_capture_that_fails_leaves_nothing_behind(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="planted"):
        recorded(cuda, monkeypatch, fails=True, programmatic_launch="on")
    assert not programmatic.triton_kernels("90")


def test_a_verdict_turns_it_on_in_a_plan(cuda: FakeCuda, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found(step_text(engine(), SHAPE.text), "on", cache)
    plan, seen = recorded(cuda, monkeypatch)
    assert (plan.programmatic, seen) == (True, {True})


def test_on_a_processor_a_plan_has_none() -> None:
    plan = Plan(engine(programmatic_launch="on"), SHAPE, None)
    seen: list[bool] = []
    plan.record(lambda: seen.append(programmatic.triton_kernels("90")))()
    assert (plan.programmatic, seen) == (False, [False])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_the_same_bits_either_way(dtype: torch.dtype) -> None:
    """Again and again, as a kernel that does not wait is not always too early."""
    model = random_model(TINY, 1, device="cuda", with_text=False, dtype=dtype, head_dtype=dtype)
    results = []
    for choice in ("off", "on", "off"):
        made = Engine(model, programmatic_launch=choice, tune="off")
        plan = Plan(made, SHAPE, None)
        generator = torch.Generator().manual_seed(0)
        pack = made.pack(torch.randn(1, SHAPE.text_length, TINY.dit.text_in, generator=generator).cuda())
        pictures = [[torch.randint(0, 256, (*size, 3), generator=generator).byte().numpy() for size in SHAPE.views]]
        state = torch.randn(1, 1, TINY.head.state_dim, generator=generator).numpy()
        results += [plan.run(pictures, state, [Noise.from_seed(3, 0)], [pack])[0].tobytes() for _ in range(100)]
        results += [(plan.compute(), plan.outputs.device["normalized"].cpu().numpy().tobytes())[1] for _ in range(100)]
    assert len(set(results)) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("before", ["kernel", "copy", "memset", "fork and join", "ours"])
def test_a_gpu_waits_for_whatever_is_before(before: str, graph: bool) -> None:
    """A slow kernel, then what writes the input, then ours: it must not read what was there, nor may its result be overtaken."""
    device = torch.device("cuda", torch.cuda.current_device())
    source, x = torch.full((1, 1, 512, 256), 2.0, device=device), torch.empty(1, 1, 512, 256, device=device)
    out, stream, side = torch.empty_like(x), torch.cuda.Stream(device), torch.cuda.Stream(device)

    def add(x: torch.Tensor) -> torch.Tensor:
        return ops.adaln(x, x.bfloat16(), None, None, None, 1e-6, torch.bfloat16, backend="triton")[0]

    def step() -> None:
        x.fill_(7.0)
        torch.cuda._sleep(1_000_000)
        if before == "kernel":
            torch.mul(source, 1.0, out=x)
        elif before == "copy":
            x.copy_(source)
        elif before == "memset":
            x.zero_()
        elif before == "ours":
            torch.mul(source, 0.5, out=x)
            x.copy_(add(x))
        else:
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side), programmatic.plainly():
                torch.cuda._sleep(1_000_000)
                x.copy_(add(source) / 2)
            torch.cuda.current_stream(device).wait_stream(side)
            with programmatic.plainly():
                add(source)
        out.copy_(add(x))

    wanted = 0.0 if before == "memset" else 4.0
    with programmatic.launches(True), torch.no_grad(), torch.cuda.stream(stream):
        step()
        run: Any = step
        if graph:
            stream.synchronize()
            run = torch.cuda.CUDAGraph()
            with torch.cuda.graph(run, stream=stream):
                step()
        for _ in range(50):
            out.fill_(-1.0)
            run.replay() if graph else run()
            stream.synchronize()
            assert out.eq(wanted).all()
