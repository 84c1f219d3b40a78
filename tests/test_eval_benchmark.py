"""Several simulators with one policy: the same episodes, and nearly as many times faster as there are cores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dit4dit.benchmarks import rollout

from dit4dit.cli import main


@pytest.mark.slow
def test_two_workers_reach_their_share_and_the_same_records(tmp_path: Path) -> None:
    """One attempt more where the machine was busy with something else: the promise is about a machine that is not."""
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
    for _ in range(3):
        with pytest.raises(SystemExit) as end:
            main(["bench", "rollout", *words])
        result = json.loads(file.read_text())
        if end.value.code == 0:
            break
    one, two = result["runs"]
    assert (one["workers"], one["times_one"]) == (1, 1.0)
    assert two["efficiency"] == two["times_one"] / min(2, result["machine"]["cores"])
    assert two["efficiency"] >= rollout.ENOUGH


def test_nothing_is_timed_that_disagrees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def play(policy: Any, about: Any, workers: int, *others: Any) -> Any:
        return 1.0, [{"trial": 0, "success": workers == 1, "took": {}}]

    monkeypatch.setattr(rollout, "_play", play)
    monkeypatch.setattr(rollout.identity, "describe", lambda policy, path: {})
    with pytest.raises(AssertionError, match="2 workers: another episode; nothing is timed"):
        rollout.measure(None, tmp_path, workers=[2], batch=2, episodes=1, rounds=1)  # type: ignore[arg-type]
