"""Real-time chunking in the rollout: what each chunk is asked to keep to, and what it does to the seams."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_standin import StandIn, make_plan, play, untimed

from dit4dit import Guidance, Noise, Policy
from dit4dit.commands.eval_run import RunOptions
from dit4dit.control.execution import Execution, Executor, Latency, RealTime
from dit4dit.control.seams import Ensemble
from dit4dit.envs import tabletop_policy_dir
from dit4dit.envs.tabletop import TEST_SEEDS_FROM, TabletopEnv
from dit4dit.errors import ConfigError, InputError
from dit4dit.model.flow import guidance_arrays

K = 8


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return tabletop_policy_dir()


def asked(execution: Execution, chunks: int, seconds: list[float] | None = None) -> tuple[list[Guidance | None], list]:
    """What the first chunks are asked to keep to, and the rows in between. The model writes row i of chunk c as 100 c + i, of
    which the robot's unit is the tenth."""
    executor = Executor(execution, 10.0, lambda last: np.array([-1.0], np.float32))
    found: list[Guidance | None] = []
    rows: list[float] = []
    while len(found) < chunks:
        if executor.due:
            normalized = np.arange(K, dtype=np.float32)[:, None] + 100 * len(found)
            found.append(executor.guidance())
            executor.take(normalized / 10, (seconds or [0.0] * 99)[len(found) - 1], normalized)
        upcoming = executor.upcoming(1000)
        executor.advance(len(upcoming))
        rows += [round(10 * float(row[0])) for row in upcoming]
    return found, rows


def told(guidance: Guidance | None) -> tuple[list[float], int] | None:
    return None if guidance is None else (guidance.previous[:, 0].tolist(), guidance.delay)


def test_without_latency_the_left_over_begins_where_the_new_chunk_does() -> None:
    found, rows = asked(Execution(execute=3, rtc=RealTime()), 3)
    assert [told(g) for g in found] == [None, ([3, 4, 5, 6, 7], 0), ([103, 104, 105, 106, 107], 0)]
    assert rows == [0, 1, 2, 100, 101, 102, 200, 201, 202]


def test_with_a_latency_the_rows_of_the_delay_have_the_full_weight() -> None:
    """150 ms at 10 Hz: two rows (3 and 4) are executed while chunk 1 is computed; its own row 2 takes over, for step 5."""
    rtc = RealTime(horizon=4, schedule="ones", max_guidance=3.0)
    found, rows = asked(Execution(execute=3, latency=Latency(150.0, "continue"), rtc=rtc), 3)
    assert [told(g) for g in found] == [None, ([3, 4, 5, 6, 7], 2), ([103, 104, 105, 106, 107], 2)]
    assert rows[:8] == [0, 1, 2, 3, 4, 102, 103, 104]
    second = found[1]
    assert second is not None
    assert (second.horizon, second.schedule, second.max_guidance) == (4, "ones", 3.0)
    assert guidance_arrays(second, K)[1].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_the_first_chunks_warm_up_is_not_in_the_delay() -> None:
    """Nine seconds of warm-up would be ninety rows. The most that the others took: 1 row, then 3, which stays."""
    execution = Execution(execute=3, latency=Latency(None, "continue"), rtc=RealTime())
    found, _ = asked(execution, 5, [9.0, 0.05, 0.25, 0.05, 0.05])
    assert [g and g.delay for g in found] == [None, 0, 1, 3, 3]


def test_a_delay_longer_than_what_is_left_is_all_of_it() -> None:
    found, _ = asked(Execution(execute=6, latency=Latency(500.0, "continue"), rtc=RealTime()), 2)
    assert told(found[1]) == ([6, 7], 2)
    none_left, _ = asked(Execution(execute=3, latency=Latency(900.0, "continue"), rtc=RealTime()), 3)
    assert [told(g) for g in none_left] == [None, ([3, 4, 5, 6, 7], 5), None]  # chunk 2 is asked for when 1 has ended


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ConfigError, match="rtc and ensemble"):
        Execution(execute=3, ensemble=Ensemble(), rtc=RealTime())
    with pytest.raises(ConfigError, match="--while-waiting continue"):
        Execution(execute=3, latency=Latency(100.0), rtc=RealTime())
    for execute in (None, K):
        with pytest.raises(ConfigError, match="--execute below 8"):
            Execution(execute=execute, rtc=RealTime()).check(K)
    with pytest.raises(ConfigError, match="horizon: expected 1 to 8"):
        Execution(execute=3, rtc=RealTime(9)).check(K)
    with pytest.raises(ConfigError, match="horizon"):
        RealTime(0)
    with pytest.raises(ConfigError, match="did you mean 'linear'"):
        RealTime(schedule="liner")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="--rtc-horizon, --rtc-max-guidance: goes with --rtc"):
        RunOptions(Path("x"), rtc_horizon=3, rtc_max_guidance=1.0).options()
    options = RunOptions(Path("x"), rtc=True, rtc_schedule="exp", execute=3).options()
    assert options.execution.rtc == RealTime(None, "exp")
    assert RunOptions(Path("x")).options().execution.rtc is None


def test_a_run_is_the_same_with_any_number_of_workers_and_says_what_it_did(tmp_path: Path) -> None:
    execution = Execution(execute=2, latency=Latency(100.0, "continue"), rtc=RealTime(3))
    policy = StandIn()
    plan = make_plan(4, goal=1e9, max_steps=9)
    first = play(tmp_path / "a", plan, policy=policy, workers=1, execution=execution)
    second = play(tmp_path / "b", plan, workers=3, execution=execution)
    assert untimed(first) == untimed(second)
    guided = [g for g in policy.guidances if g is not None]
    assert {(len(g.previous), g.delay, g.horizon) for g in guided} == {(2, 1, 2)}
    assert None in policy.guidances  # the first chunk of each episode
    wanted = {"horizon": 3, "schedule": "linear", "max_guidance": 10.0}
    assert json.loads((tmp_path / "a/run.json").read_text())["execution"]["rtc"] == wanted


class Apart(StandIn):
    """Refuses a pass in which some are guided and others not."""

    def run(self, requests: Any) -> Any:
        assert len({r.guidance is None for r in requests}) == 1
        return super().run(requests)


def test_guided_requests_are_passes_of_their_own_and_full_ones(tmp_path: Path) -> None:
    policy = Apart()
    play(tmp_path, make_plan(6, max_steps=7), policy=policy, workers=3, execution=Execution(execute=2, rtc=RealTime()))
    assert {guidance is None for guidance in policy.guidances} == {True, False}
    assert set(policy.sizes) == {2}


def seams(policy: Policy, execution: Execution) -> tuple[float, float]:
    """Where a chunk takes over from the one before, over 4 tabletop episodes of 32 steps, in normalised units: how far its row is
    from the old chunk's row for the same step, and from the row executed before it. Means over what is executed."""
    apart, jumps = [], []
    for episode in range(4):
        env = TabletopEnv(TEST_SEEDS_FROM + episode)
        frame = env.reset()
        seen = policy.embodiment.observe(env.observation())
        executor = Executor(execution, policy.embodiment.control_hz, lambda last: last)
        rows: list[np.ndarray] = []
        chunks: list[tuple[int, np.ndarray]] = []
        takes_over = []
        for step in range(32):
            if executor.due:
                noise = Noise.from_seed(episode, len(chunks))
                chunk = policy.infer(seen, frame.instruction, noise=noise, guidance=executor.guidance())
                executor.take(chunk.normalized, 0.0, chunk.normalized)
                chunks.append((step, chunk.normalized))
                takes_over.append(step + executor.delays[-1])
            rows.append(executor.upcoming(1)[0])
            env.step(policy.codec.action.inverse(rows[-1][None])[0])
            seen = policy.embodiment.observe(env.observation())
            executor.advance(1)
        assert executor.held == 0
        for (start, old), t in zip(chunks, takes_over[1:], strict=False):
            if t < len(rows):
                apart.append(np.abs(rows[t] - old[t - start])[:3].mean())
                jumps.append(np.abs(rows[t] - rows[t - 1])[:3].mean())
    return float(np.mean(apart)), float(np.mean(jumps))


@pytest.mark.parametrize("ms", [0.0, 100.0, 200.0])
def test_a_chunk_takes_over_where_the_one_before_would_have_gone(checkpoint: Path, ms: float) -> None:
    """Random weights, whose rows jump within a chunk too: the seam is measured against the old chunk's row for the step."""
    policy = Policy.from_pretrained(checkpoint, device="cpu")
    latency = Latency(ms, "continue") if ms else None
    without, guided = (seams(policy, Execution(3, latency=latency, rtc=rtc))[0] for rtc in (None, RealTime()))
    assert guided < 0.6 * without, f"{guided:.3f} with, {without:.3f} without"
