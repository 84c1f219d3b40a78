"""Several simulators with one policy: the same episodes, and nearly as many times faster as there are cores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dit4dit.benchmarks import rollout
from dit4dit.benchmarks.recording import Recording
from spare_cores import TWO_IDLE_CORES, cores_to_spare

from dit4dit.cli import main


@pytest.mark.slow
@pytest.mark.serial
def test_two_workers_reach_their_share_and_the_same_records(tmp_path: Path) -> None:
    """The promised share, or at least clearly more than one worker's rate; skipped where other work takes the cores."""
    file = tmp_path / "result.json"
    words = [
        "--workers",
        "2",
        "--batch",
        "2",
        "--episodes",
        "6",
        "--rounds",
        "3",
        "--device",
        "cpu",
        "--json",
        str(file),
    ]
    found: list[float] = []
    for _ in range(3):
        with pytest.raises(SystemExit) as end:
            main(["bench", "rollout", *words])
        result = json.loads(file.read_text())
        one, two = result["runs"]
        assert (one["workers"], one["times_one"]) == (1, 1.0)
        assert two["efficiency"] == two["times_one"] / min(2, result["machine"]["cores"])
        assert (end.value.code == 0) == (two["efficiency"] >= rollout.ENOUGH)
        if end.value.code == 0:
            return
        found.append(two["efficiency"])
        spare = cores_to_spare()
        if spare < TWO_IDLE_CORES:
            pytest.skip(f"other work runs here: two processes get {spare:.2f} times as much done as one")
    assert max(found) >= 0.8 * rollout.ENOUGH, found


def test_nothing_is_timed_that_disagrees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def play(policy: Any, about: Any, workers: int, *others: Any) -> Any:
        return 1.0, [{"trial": 0, "success": workers == 1, "took": {}}]

    monkeypatch.setattr(rollout, "_play", play)
    monkeypatch.setattr(rollout.identity, "describe", lambda policy, path: {})
    with pytest.raises(AssertionError, match="2 workers: another episode; nothing is timed"):
        rollout.measure(None, tmp_path, workers=[2], batch=2, episodes=1, rounds=1, record=Recording(None))  # type: ignore[arg-type]


def test_the_rates_so_far_are_in_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    turns = iter([1.0, 2.0, 3.0])

    def play(*_: Any) -> Any:
        rate = next(turns, None)
        if rate is None:
            raise KeyboardInterrupt
        return rate, [{"trial": 0, "success": True, "took": {}}]

    monkeypatch.setattr(rollout, "_play", play)
    monkeypatch.setattr(rollout.identity, "describe", lambda policy, path: {})
    path = tmp_path / "result.json"
    with pytest.raises(KeyboardInterrupt), Recording(path) as record:
        rollout.measure(None, tmp_path, workers=[2, 4], batch=2, episodes=1, rounds=2, record=record)  # type: ignore[arg-type]
    data = json.loads(path.read_text())
    assert [(run["workers"], run["episodes_per_second"]) for run in data["runs"]] == [(1, 1.0), (2, 2.0), (4, 3.0)]
    assert data["cut"]["left"] == ["round 2, 1 workers", "round 2, 2 workers", "round 2, 4 workers"]
