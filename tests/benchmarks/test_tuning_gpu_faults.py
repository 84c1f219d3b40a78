"""`tune` on a GPU: one that loses it, or hangs on it, costs a process, and the others are measured all the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from dit4dit.benchmarks.recording import Recording
from dit4dit.benchmarks.tuning import Limits, Todo, tune
from tuning_calls import clean, head_call

from dit4dit.ops import verdicts


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from clean(tmp_path, monkeypatch)


@pytest.mark.gpu
@pytest.mark.slow
def test_faults_on_a_gpu_are_charged() -> None:
    x = torch.empty(1, 17, 64, dtype=torch.bfloat16, device="meta")
    todo = [Todo("linear", (x, torch.empty(n, 64, dtype=torch.bfloat16, device="meta"), None)) for n in (32, 48)]
    with Recording(None) as record:
        result = tune(todo, torch.device("cuda"), record=record, plugins=["standins_gpu"], limits=Limits(trial=8))
    for row in result["calls"]:
        refused = row["refused"]
        assert "then the GPU was lost" in refused["loses_the_gpu"]
        assert refused["hangs"] == "hung: it was not done after 8 s"
        assert refused["writes_behind"].startswith("call 1: 2 bytes behind a tensor (bfloat16 [1, 17,")
        assert refused["leaves_one_unwritten"].startswith("disagrees with the reference")
        assert refused["runs_on_another_stream"].startswith("disagrees with the reference")
        assert row["default"] == "torch"
        assert row["chosen"] in ("torch", "is_right")
        assert set(row["ms"]) == {"torch", "is_right"}
    assert result["children"] == 1 + 2 * 3
    assert {v.chosen for v in verdicts.known(torch.device(result["device"]))} <= {"torch", "is_right"}


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.capture
def test_a_head_on_a_gpu_is_timed_as_a_graph() -> None:
    with Recording(None) as record:
        (row,) = tune([Todo("action_ode", head_call())], torch.device("cuda"), record=record)["calls"]
    assert {"loop", "torch"} <= set(row["ms"]) <= {"cuda", "loop", "torch"}
    assert row["default"] == "loop"
