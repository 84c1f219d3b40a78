"""Two simulators with one policy are nearly twice as fast as one, and play the same episodes."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest
from test_libero import play, small_plan, timeless

from dit4dit.evaluation.runs import Run

pytestmark = pytest.mark.sim


def spin(seconds: float) -> int:
    """How much work one process does in this time."""
    end, count = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        count += sum(range(2000)) > 0
    return count


def cores_to_spare(seconds: float = 1.0) -> float:
    """What two processes get done here just now, in units of what one does: 2 on a machine with two idle cores."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(spin, [0.01, 0.01])
        alone = pool.map(spin, [seconds])
        both = pool.map(spin, [seconds, seconds], chunksize=1)
    return sum(both) / sum(alone)


def episodes_per_second(policy, plan, folder, workers: int) -> float:
    """The rate once every worker has its environment: from the end of each worker's first episode on."""
    ends: list[float] = []
    play(policy, plan, folder, workers=workers, on_episode=lambda record: ends.append(time.monotonic()))
    counted = len(ends) - workers
    return counted / (ends[-1] - ends[workers - 1])


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_two_workers_reach_three_quarters_of_twice_the_rate(libero, libero_small, tmp_path) -> None:
    spare = cores_to_spare()
    if spare < 1.8:
        pytest.skip(f"other work runs here: two processes get {spare:.2f} times as much done as one")
    plan = small_plan(libero, tasks=[0], trials=8, max_steps=40)
    rates = {n: episodes_per_second(libero_small, plan, tmp_path / str(n), n) for n in (1, 2)}
    speedup = rates[2] / rates[1]
    assert speedup >= 0.75 * 2, f"{rates[1]:.3f} and {rates[2]:.3f} episodes a second: {speedup:.2f} times"
    serial, parallel = (Run.open(tmp_path / str(n)).records for n in (1, 2))
    assert [timeless(record) for record in serial] == [timeless(record) for record in parallel]
