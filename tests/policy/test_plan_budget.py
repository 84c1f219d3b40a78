"""What request shapes leave behind: plans within a budget of bytes, and with a plan all that was there because of it."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda
from waiting import WAIT

from dit4dit import Observation, Policy
from dit4dit.checkpoints.weights import random_model
from dit4dit.commands.serving import _prepare
from dit4dit.engine import Engine, Plan, RequestShape
from dit4dit.engine import plan as plan_module
from dit4dit.engine.engine import GRIDS
from dit4dit.engine.graph_pool import GraphPool
from dit4dit.engine.staging import Staging
from dit4dit.policy import garbage
from dit4dit.policy import runner as runners
from dit4dit.policy.runner import EngineRunner
from dit4dit.presets import preset
from dit4dit.serving.settings import Settings

TINY = preset("tiny").model
MiB = 2**20

SCRIPT = """
import json, sys, threading
import numpy as np, torch
from dit4dit import Observation, Policy

torch.set_num_threads(1)
policy = Policy.from_pretrained(sys.argv[1], device="cpu")
big = np.full((2344, 3840, 3), 7, np.uint8)  # 27 MB, of which every client's image is a part: they bring no memory of their own
state = {key.name: np.zeros(key.dim, np.float32) for key in policy.embodiment.state}

def ask(number):
    images = {view: big[: 2344 - number, : 3840 - number] for view in policy.embodiment.views}
    policy.infer(Observation(images, state), "go", seed=0)

def together(numbers):
    threads = [threading.Thread(target=ask, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with open("/proc/self/status") as facts:
        return next(int(line.split()[1]) * 1024 for line in facts if line.startswith("VmRSS"))

policy.warm_up()  # which also lets the C library keep what is freed
ask(2000)
rounds = [together([])] + [together(range(8)) for _ in range(2)] + [together(range(n, n + 8)) for n in range(8, 40, 8)]
print(json.dumps([rounds, policy._runner.plans]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory from /proc")
def test_large_images_of_many_sizes_leave_no_more_than_the_budget(small_libero: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, small_libero],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        timeout=WAIT,
    )
    rounds, plans = json.loads(done.stdout)
    before, first, second, *more = rounds
    one_pass = 2 * 27 * MiB + 32 * MiB  # its plan, which is made before another goes, and what it computes with
    assert second - first <= 0.1 * first
    assert max(first, second, *more) - before < runners.PLAN_BUDGET["cpu"] + one_pass
    assert more[-1] - before > 4 * 54 * MiB, "plans are kept where there is room"
    assert plans in (1 + 4, 1 + 5), "what was warmed up, and those of clients"


def observation(seed: int, side: int) -> Observation:
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for name in ("primary_image", "wrist_image")}
    names = ("x", "y", "z", "roll", "pitch", "yaw", "pad", "gripper")
    return Observation(images, {name: np.zeros(1, np.float32) for name in names})


@pytest.fixture
def policy(small_libero: Path) -> Policy:
    return Policy.from_pretrained(small_libero, device="cpu")


def budget(policy: Policy, count: int) -> int:
    """Let the policy keep `count` plans of the sizes below, and say so many bytes."""
    one = next(iter(policy._runner._plans._values.values())).bytes
    policy._runner._plans.budget = count * one + one // 2
    return policy._runner._plans.budget


def test_plans_are_kept_by_their_bytes_and_go_by_themselves(policy: Policy) -> None:
    """Without the garbage collector: `warm_up(freeze_gc=True)` keeps it away from plans."""
    runner = policy._runner
    policy.infer(observation(0, 200), "go", seed=0)
    most = budget(policy, 3)
    seen: list[weakref.ref[Plan]] = []
    gc.collect()
    gc.disable()
    try:
        for side in (200, 199, 198, 200, 197):  # 200 is asked for again, so that 199 goes
            policy.infer(observation(0, side), "go", seed=0)
            seen.append(weakref.ref(list(runner._plans._values.values())[-1]))
            assert runner._plans.total_cost <= most
        assert [ref() is None for ref in seen] == [False, True, False, False, False]
        assert runner.plans == 3
        policy.infer(observation(0, 1000), "go", seed=0)
        assert runner.plans == 1, "one that is larger than the budget stays alone"
        assert all(ref() is None for ref in seen)
    finally:
        gc.enable()
    again = policy.infer(observation(0, 199), "go", seed=0).normalized
    assert np.array_equal(again, policy.infer(observation(0, 199), "go", seed=0).normalized)


def test_a_plan_knows_what_it_takes() -> None:
    engine = Engine(random_model(TINY, 1, with_text=False))
    shape = RequestShape(2, ((40, 50), (30, 30)), (32, 32), "cv2_area", True, 9)
    plan = Plan(engine, shape, None)
    larger = Plan(engine, replace(shape, views=((1040, 50), (30, 30))), None)
    assert larger.bytes - plan.bytes == pytest.approx(2 * 1000 * 50 * 3, abs=512)
    blocks = {
        part.device[name].untyped_storage() for part in (plan.inputs, plan.noise, plan.outputs) for name in part.device
    }
    assert sum({block.data_ptr(): block.nbytes() for block in blocks}.values()) == plan.bytes


def test_a_plan_in_somebodys_hand_outlives_its_place(policy: Policy) -> None:
    runner = policy._runner
    wanted = policy.infer(observation(0, 200), "go", seed=0).normalized
    budget(policy, 1)
    (kind, plan), *_ = runner._plans._values.items()
    policy.infer(observation(1, 199), "go", seed=0)
    assert kind not in runner._plans
    request = policy.request(observation(0, 200), "go", noise=policy.infer(observation(1, 199), "go", seed=0).noise)
    got, _ = plan.run([request.pictures], request.state[None], [request.noise], [policy._texts.get("go")])
    assert np.array_equal(got[0], wanted)


def test_no_plan_goes_while_one_is_running(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = policy._runner
    wanted = policy.infer(observation(0, 200), "go", seed=0).normalized
    budget(policy, 1)
    running, go_on, made = threading.Event(), threading.Event(), []
    compute, make = Plan.compute, runner._plans._make

    def slow(self: Plan) -> None:
        if not running.is_set():
            running.set()
            made.append(go_on.wait(WAIT))
        compute(self)

    def making(kind: Any) -> Plan:
        assert made == [True], "another plan, for which this one would go, was made beside it"
        return make(kind)

    monkeypatch.setattr(Plan, "compute", slow)
    monkeypatch.setattr(runner._plans, "_make", making)
    found: dict[int, np.ndarray] = {}

    def ask(side: int) -> None:
        found[side] = policy.infer(observation(0, side), "go", seed=0).normalized

    threads = [threading.Thread(target=ask, args=(side,)) for side in (200, 199)]
    threads[0].start()
    assert running.wait(WAIT)
    threads[1].start()
    threads[1].join(0.2)  # where it does not wait for its turn it fails now; where it does nothing is to be seen
    assert runner.plans == 1
    go_on.set()
    for thread in threads:
        thread.join(WAIT)
    assert np.array_equal(found[200], wanted)
    assert set(found) == {200, 199}


def test_slots_go_with_the_last_plan_that_has_them(small_libero: Path) -> None:
    texts = {"go": torch.zeros(4, 64), "turn around": torch.zeros(9, 64)}
    policy = Policy.from_pretrained(small_libero, device="cpu", prompt_embeds=texts)
    engine = policy.engine
    policy.infer(observation(0, 200), "go", seed=0)
    budget(policy, 2)
    policy.infer(observation(0, 200), "turn around", seed=0)
    assert sorted(engine._slots) == [(1, 4), (1, 9)]
    for side in (198, 199):
        policy.infer(observation(0, side), "turn around", seed=0)
    assert sorted(engine._slots) == [(1, 9)]


def test_rotary_tables_are_kept_for_a_few_grids() -> None:
    engine = Engine(random_model(TINY, 1, with_text=False))
    tables = []
    for n in range(1, GRIDS + 3):
        latents = torch.zeros(1, 16, TINY.latent_frames, 2 * n, 2)
        tables.append(weakref.ref(engine._rotary_for(latents)))
        assert engine._rotary_for(latents) is tables[-1]()
    assert [ref() is not None for ref in tables] == [False] * 2 + [True] * GRIDS


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


def test_the_pool_of_graphs_is_charged_for_its_holes_alone(cuda: FakeCuda) -> None:
    pool, owners = GraphPool(), [type("Plan", (), {})() for _ in range(3)]
    for owner, segments in zip(owners, ([100], [100, 400], [100, 400, 50]), strict=True):
        cuda.segments[pool.handle] = segments
        with pool.growing(owner):
            pass
    assert pool.bytes == 550
    assert pool.share == 150 // 3, "the pass that needs most would need 400 without the others"
    del owner, owners[1:]
    assert pool.share == 150, "what they have left stays"
    other = GraphPool()
    cuda.segments[other.handle] = [100]
    for _ in range(2):  # of one plan, for which more than its step may be recorded
        with other.growing(owners[0]):
            pass
    assert other.share == 0


def test_graphs_whose_pool_has_too_many_holes_go_and_the_next_have_a_pool_of_their_own(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(random_model(TINY, 1, with_text=False))
    engine._stream = cuda.stream
    monkeypatch.setitem(runners.PLAN_BUDGET, "cpu", 10 * MiB)
    runner = EngineRunner(engine, codec=None)  # type: ignore[arg-type]
    shape = RequestShape(1, ((40, 50), (30, 30)), (32, 32), "bilinear", True, 9)

    def warm(batch: int, *segments: int) -> Any:
        """What the allocator has for the current pool when this is captured."""
        pool = engine.graph_pool
        cuda.segments[pool.handle] = [size * MiB for size in segments]
        runner._plan((replace(shape, batch=batch), False))
        return pool

    first = warm(16, 20)
    assert [warm(batch, 20) for batch in (8, 1)] == [first, first]
    assert runner.plans == 3, "the largest first: the others need no more"
    assert warm(4, 20, 4) is first
    assert runner.plans == 4
    assert warm(2, 20, 4, 7) is first
    assert runner.plans == 1, "11 MiB of holes, which are there for as long as one of them is"
    second = warm(1, 3)
    assert second is not first
    assert runner.plans == 1, "the last plan of the first pool had its holes to answer for"
    assert [warm(batch, 3) for batch in (2, 4)] == [second, second]
    assert runner.plans == 3
    assert engine._pool is second


def test_what_a_server_has_warmed_up_stays_whatever_strangers_ask_for(
    small_libero: Path,
    cuda: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With two cameras of 1080 x 1920, and the graph memory of GR1 on an H100: 410 MiB for a pass of 8, here in one piece."""
    budget = runners.PLAN_BUDGET["cuda"] // 2  # here plans have no second side on a device
    monkeypatch.setitem(runners.PLAN_BUDGET, "cpu", budget)
    monkeypatch.setattr(plan_module, "_WARM_UPS", 0)
    policy = Policy.from_pretrained(small_libero, device="cpu")
    engine, runner = policy.engine, policy._runner
    engine._stream, record = cuda.stream, Plan.record

    def recording(plan: Plan, *args: Any) -> Any:
        segments, needed = cuda.segments.setdefault(engine.graph_pool.handle, []), plan.shape.batch * 410 * MiB // 8
        if max(segments, default=0) < needed:
            segments.append(needed)
        return record(plan, *args)

    monkeypatch.setattr(Plan, "record", recording)
    monkeypatch.setattr(garbage, "freeze", lambda: None)
    cameras = dict.fromkeys(policy.embodiment.views, (1080, 1920))
    _prepare(policy, ["go"], Settings().max_batch, cameras)
    assert runner.plans == 2 * 8
    assert engine.graph_pool.bytes == 410 * MiB
    assert runner._plans.total_cost == 0, "the budget is for what comes"
    one = np.zeros((1080, 1920, 3), np.uint8)
    state = {key.name: np.zeros(key.dim, np.float32) for key in policy.embodiment.state}

    def asked(batch: int, height: int, width: int) -> int:
        """Graphs that are recorded for it."""
        before = cuda.log.count("begin")
        seen = Observation(dict.fromkeys(policy.embodiment.views, one[:height, :width]), state)
        policy.infer_batch([seen] * batch, ["go"] * batch)
        return cuda.log.count("begin") - before

    for number in range(6):
        assert asked(8, 1079 - number, 1920) == 1, "a stranger's"
    assert runner._plans.total_cost <= budget
    assert runner.plans < 2 * 8 + 6
    caplog.clear()
    for batch in range(1, 9):
        assert asked(batch, 1080, 1920) == 0
        joined = np.zeros((32, 64, 3), np.uint8)
        before = len(cuda.log)
        policy.predict_action([{"image": joined, "lang": "go", "state": np.zeros((1, 16), np.float32)}] * batch)
        assert "begin" not in cuda.log[before:]
    assert not caplog.records


def test_what_is_staged_for_a_cpu_is_each_process_its_own_and_zero() -> None:
    staged = Staging({"a": ((3,), torch.uint8), "b": ((2, 5), torch.float32)}, torch.device("cpu"))
    assert staged.bytes == 512
    assert staged.device["b"].data_ptr() % 64 == 0
    assert not staged.device["a"].any()
    alive = staged.host["b"]
    del staged
    alive[:] = 1.5  # a view keeps the pages
    assert (alive == 1.5).all()
