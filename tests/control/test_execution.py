"""From chunks to executed rows. Row i of chunk c is the number 100 c + i, so that what is executed says where it is from."""

from __future__ import annotations

import numpy as np
import pytest

from dit4dit.control.execution import Execution, Executor, Latency, average
from dit4dit.control.seams import Ensemble
from dit4dit.errors import ConfigError

K = 8
HOLD = -1.0


def executed(execution: Execution, steps: int, seconds: list[float] | None = None, limit: int = 1000) -> list[float]:
    """The rows of the first steps, as (100 c + i), HOLD where held; `seconds` of each chunk's pass."""
    executor = Executor(execution, 10.0, lambda last: np.array([HOLD], np.float32))
    rows: list[float] = []
    while len(rows) < steps:
        if executor.due:
            number = len(executor.delays)
            executor.take(np.arange(K, dtype=np.float32)[:, None] + 100 * number, (seconds or [0.0] * 99)[number])
        upcoming = executor.upcoming(min(limit, steps - len(rows)))
        assert upcoming
        executor.advance(len(upcoming))
        rows += [float(row[0]) for row in upcoming]
    assert executor.steps == steps
    assert executor.held == rows.count(HOLD)
    return rows


@pytest.mark.parametrize("limit", [1, 3, 1000])
def test_without_latency_the_first_rows_of_each_chunk(limit: int) -> None:
    assert executed(Execution(), 10, limit=limit) == [0, 1, 2, 3, 4, 5, 6, 7, 100, 101]
    assert executed(Execution(execute=3), 7, limit=limit) == [0, 1, 2, 100, 101, 102, 200]
    assert executed(Execution(execute=3, latency=Latency(0.0)), 7, limit=limit) == [0, 1, 2, 100, 101, 102, 200]
    assert executed(Execution(execute=3, latency=Latency(0.0, "continue")), 7) == [0, 1, 2, 100, 101, 102, 200]


@pytest.mark.parametrize("limit", [1, 3, 1000])
def test_hold_stands_still_and_then_executes_the_chunk_from_its_beginning(limit: int) -> None:
    """150 ms at 10 Hz are two steps; the first chunk has no latency."""
    rows = executed(Execution(execute=3, latency=Latency(150.0)), 12, limit=limit)
    assert rows == [0, 1, 2, HOLD, HOLD, 100, 101, 102, HOLD, HOLD, 200, 201]


@pytest.mark.parametrize("limit", [1, 3, 1000])
def test_continue_goes_on_with_the_old_chunk_and_enters_the_new_one_at_its_time(limit: int) -> None:
    rows = executed(Execution(execute=3, latency=Latency(150.0, "continue")), 11, limit=limit)
    #           asked at 3, there at 5: its row 2          asked at 6, there at 8
    assert rows == [0, 1, 2, 3, 4, 102, 103, 104, 202, 203, 204]


def test_continue_holds_where_the_old_chunk_ends_before_the_new_one_is_there() -> None:
    rows = executed(Execution(latency=Latency(200.0, "continue")), 18)
    assert rows == [0, 1, 2, 3, 4, 5, 6, 7, HOLD, HOLD, 102, 103, 104, 105, 106, 107, HOLD, HOLD]


def test_continue_asks_again_only_when_the_last_chunk_is_there() -> None:
    """500 ms are five steps, longer than the three that are executed: chunks are asked for at 0, 3, 8, 13."""
    rows = executed(Execution(execute=3, latency=Latency(500.0, "continue")), 18)
    assert rows == [0, 1, 2, 3, 4, 5, 6, 7, 105, 106, 107, HOLD, HOLD, 205, 206, 207, HOLD, HOLD]


def test_measured_latency_is_each_chunks_own() -> None:
    rows = executed(Execution(execute=2, latency=Latency(None)), 9, seconds=[9.0, 0.05, 0.21, 0.0, 0.0])
    assert rows == [0, 1, HOLD, 100, 101, HOLD, HOLD, HOLD, 200]  # the first one's warm-up does not count


def test_rows_that_were_not_executed_count_for_nothing() -> None:
    """As where an episode ends, or is looked at, before the rows that were planned."""
    executor = Executor(Execution(execute=3, latency=Latency(150.0)), 10.0, lambda last: np.array([HOLD], np.float32))
    executor.take(np.arange(K, dtype=np.float32)[:, None], 0.0)
    executor.advance(len(executor.upcoming(3)))
    executor.take(100 + np.arange(K, dtype=np.float32)[:, None], 0.0)
    assert [float(row[0]) for row in executor.upcoming(1000)] == [HOLD, HOLD, 100, 101, 102]
    executor.advance(1)
    assert (executor.steps, executor.held) == (4, 1)
    assert [float(row[0]) for row in executor.upcoming(1000)] == [HOLD, 100, 101, 102]


@pytest.mark.parametrize("ms,steps", [(0.0, 0), (0.1, 1), (100.0, 1), (100.1, 2), (300.0, 3)])
def test_a_latency_of_whole_periods_is_as_many_steps(ms: float, steps: int) -> None:
    assert Latency(ms).steps(123.0, 10.0) == steps
    assert Latency(ms / 3).steps(123.0, 30.0) == steps


def test_average_is_the_published_formula() -> None:
    old, older, newest = ([0.5, 0.1, 0.0], [-1.0, 0.3, 1.0], [1.0, 0.0, 1.0])
    cosines = [np.dot(p, newest) / np.linalg.norm(p) / np.linalg.norm(newest) for p in (older, old, newest)]
    weights = np.exp(0.1 * np.array(cosines))
    wanted = (weights / weights.sum()) @ np.array([older, old, newest])
    got = average([np.float32(p) for p in (older, old, newest)], 0.1)
    assert got == pytest.approx(wanted, abs=1e-6)
    assert got.dtype == np.float32
    assert np.array_equal(average([np.zeros(3, np.float32)] * 2, 0.1), np.zeros(3))


def test_ensembling_takes_the_last_chunks_that_reach_so_far() -> None:
    """With alpha 0 it is the mean: at step 5 chunk 2 (row 1), chunk 1 (row 3) and chunk 0 (row 5)."""
    rows = executed(Execution(execute=2, ensemble=Ensemble(alpha=0.0, history=3)), 12)
    assert rows[:2] == [0, 1]
    assert rows[2:4] == pytest.approx([np.mean([2, 100]), np.mean([3, 101])])
    assert rows[5] == pytest.approx(np.mean([5, 103, 201]))
    assert rows[9] == pytest.approx(np.mean([205, 303, 401]))  # not chunk 1, which would reach that far, too
    assert executed(Execution(execute=K, ensemble=Ensemble()), 12) == executed(Execution(), 12)


def test_options_that_make_no_sense_are_refused() -> None:
    for execute in (0, K + 1):
        with pytest.raises(ConfigError, match="execute: expected 1 to 8"):
            Execution(execute=execute).check(K)
    with pytest.raises(ConfigError, match="latency"):
        Latency(-1.0)
    with pytest.raises(ConfigError, match="history"):
        Ensemble(history=0)
    for alpha in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="finite alpha"):
            Ensemble(alpha=alpha)
