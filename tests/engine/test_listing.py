"""The calls that are listed without data are those of a real plan, and a verdict for one of them decides what the plan runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dit4dit import Noise, ops
from dit4dit.checkpoints.weights import random_model
from dit4dit.engine import Engine, Plan, RequestShape
from dit4dit.engine.fp8 import Fp8Matrix
from dit4dit.engine.listing import calls, distinct, engine_without_data
from dit4dit.ops import verdicts
from dit4dit.presets import preset

TINY = preset("tiny").model
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FP32 = torch.bfloat16, torch.float32

SHAPES = {
    "one": RequestShape(1, ((40, 50), (30, 30)), (32, 32), "cv2_area", True, 9),
    "three without a state": RequestShape(3, ((32, 32), (32, 32)), None, "cv2_area", False, 5),
    "guided": RequestShape(1, ((32, 32), (32, 32)), None, "cv2_area", True, 9, 5.0),
    "two guided": RequestShape(2, ((32, 32), (32, 32)), None, "cv2_area", True, 9, 5.0),
}
KINDS = {
    "float32 head": dict(head_dtype=FP32, fp8=False),
    "bfloat16 head": dict(head_dtype=BF16, fp8=False),
    "fp8": dict(head_dtype=FP32, fp8=True),
    "fp8, bfloat16 head": dict(head_dtype=BF16, fp8=True),
}


def real_engine(device: torch.device, *, head_dtype: torch.dtype, fp8: bool = False, **options: Any) -> Engine:
    """An engine in bfloat16 with random weights, the same ones each time."""
    model = random_model(TINY, 1, device=device, dtype=BF16, head_dtype=head_dtype, with_text=False)
    engine = Engine(model, **options)
    if fp8:
        narrow = [b.with_matrices(lambda _, matrix: Fp8Matrix.quantized(matrix, 1.0)) for b in engine.blocks]
        engine.blocks = tuple(narrow)
    return engine


def table() -> torch.Tensor:
    return torch.tensor([[torch.nan, -1, 1, 2, 0.5]] * 5, dtype=torch.float64).T.contiguous()


def made(engine: Engine, shape: RequestShape) -> tuple[Plan, list[ops.Call]]:
    """A plan that has run once on whatever its buffers hold, and the calls that this made."""
    with ops.listing() as found:
        plan = Plan(engine, shape, table())
        plan.rehearse()
    return plan, found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "device, head",
    [(CPU, "library"), *(pytest.param(CUDA, head, marks=pytest.mark.gpu) for head in ("auto", "library"))],
    ids=str,
)
def test_the_listed_calls_are_those_of_a_real_plan(device: torch.device, head: str, kind: str) -> None:
    options = KINDS[kind]
    real = real_engine(device, head=head, tune="off", **options)
    engine = engine_without_data(TINY, dtype=BF16, gpu=device.type == "cuda", **options)
    if head == "library":
        engine.one_launch = None
    for name, shape in SHAPES.items():
        found, listed = distinct(made(real, shape)[1]), distinct(calls(engine, shape, 5))
        assert sorted(listed) == sorted(found), name
        if device.type == "cpu":  # a plan on a GPU has run several times when its graph is there
            counts = [{key: count for key, (_, count) in some.items()} for some in (listed, found)]
            assert counts[0] == counts[1], name


@pytest.mark.parametrize("name, whole", [("one", 1), ("guided", 1), ("two guided", 0)])
def test_a_head_in_one_launch_is_listed_with_its_loop_where_it_takes_the_request(name: str, whole: int) -> None:
    """It has one row of weights for a pass; with more of them the loop alone runs."""
    found = calls(engine_without_data(TINY, head_dtype=BF16), SHAPES[name], 5)
    ran = [op for op, _ in found]
    assert ran.count("action_ode") == whole
    assert ran.count("euler_step") == TINY.head.num_inference_timesteps


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, so that there are no verdicts but a test's own."""
    monkeypatch.setenv("DIT4DIT_CACHE", str(tmp_path))
    monkeypatch.setattr(verdicts, "shipped", lambda *_: {})
    return tmp_path


def decide(device: torch.device, found: list[ops.Call], op: str, chosen: str, default: str) -> int:
    """A verdict for each call of an op that was made, as `dit4dit tune` writes it; how many there are."""
    keys = [key for key, ((name, _), _) in distinct(found).items() if name == op]
    for key in keys:
        call = key.removeprefix(f"{op}: ")
        verdict = verdicts.Verdict(op, call, verdicts.place(device), default, chosen, {chosen: 1.0, default: 2.0})
        verdicts.write(verdict, verdicts.folder(device))
    return len(keys)


def chunk(plan: Plan) -> np.ndarray[Any, Any]:
    """Normalised actions of a fixed request."""
    generator = np.random.default_rng(0)
    views = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in plan.shape.views]
    state = generator.normal(size=(1, 1, TINY.head.state_dim)).astype(np.float32)
    text = torch.from_numpy(generator.normal(size=(1, plan.shape.text_length, TINY.dit.text_in)).astype(np.float32))
    pack = plan.engine.pack(text.to(plan.engine.device))
    return plan.run([views], state, [Noise.from_seed(0, 0)], [pack])[0]


@pytest.mark.parametrize(
    "device, op, chosen, dtype, limit",
    [
        # oneDNN's products of float32 are packed; without a verdict they are taken
        (CPU, "linear", "torch", FP32, 1e-5),
        (CPU, "linear_gelu", "torch", FP32, 1e-5),
        pytest.param(CUDA, "linear_gelu", "triton", BF16, 0.05, marks=pytest.mark.gpu),
        pytest.param(CUDA, "action_ode", "cuda", BF16, 0.1, marks=[pytest.mark.gpu, pytest.mark.alone]),
    ],
    ids=str,
)
def test_a_verdict_decides_what_a_plan_runs(
    device: torch.device, op: str, chosen: str, dtype: torch.dtype, limit: float, cache: Path
) -> None:
    shape = SHAPES["one"]
    model = random_model(TINY, 1, device=device, dtype=dtype, head_dtype=dtype, with_text=False)
    plan, found = made(Engine(model), shape)
    before = plan.ran[op]
    assert chosen not in before, "it is no choice where it is the default"
    wanted = chunk(plan)
    (default,) = before
    assert decide(device, found, op, chosen, default) > 0
    # a call of one launch makes none of its loop's
    others = {name: count for name, count in plan.ran.items() if name != op} if op != "action_ode" else {}
    plans = [made(Engine(model), shape)[0] for _ in range(2)]
    got = [chunk(one) for one in plans]
    for one in plans:
        assert one.ran[op] == {chosen: sum(before.values())}
        assert {name: count for name, count in one.ran.items() if name in others} == others
        assert one.head == ("one_launch" if op == "action_ode" else "library")
    assert np.abs(got[0] - wanted).max() <= limit * np.abs(wanted).max()
    assert np.array_equal(*got)
    off = made(Engine(model, tune="off"), shape)[0]
    assert off.ran[op] == before
    assert np.array_equal(chunk(off), wanted)
