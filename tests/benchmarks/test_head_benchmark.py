"""The benchmark of the whole action head: nothing wrong is timed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from dit4dit.benchmarks.ops import bench_action_ode
from head_case import SMALL, Case, small_head, tiny

from dit4dit import ops
from dit4dit.engine.action_ode import plan
from dit4dit.engine.action_ode.program import OneLaunchHead
from dit4dit.engine.fold import fold_head
from dit4dit.errors import OutputError


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_is_benchmarked(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(bench_action_ode, "config", small_head)
    path = tmp_path / "result.json"
    words = ["bench", "--device", "cpu", "--dtype", dtype, "--samples", "2", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", words)
    assert bench_action_ode.main() == 0
    every = json.loads(path.read_text())["rows"]
    rows = [row for row in every if "ms" in row]
    wanted = [(tokens, name) for tokens in ("9", "17", "51") for name in ("eager", "loop")]
    assert [(row["case"], row["implementation"]) for row in rows] == wanted
    assert all(row["gb_per_s"] > 0 for row in rows)
    left_out = [row for row in every if "left_out" in row]
    assert [row["stages"] for row in left_out] == [1 + 4 * (4 + 5 * 2)] * 3, "two blocks, four steps"


@torch.no_grad()
def test_the_fp8_kernel_is_held_to_its_own_weights():
    """The schedule with fp8 weights, run without rounding, is the head whose weights are rounded so, and no other."""
    case = Case(tiny())
    case.folded = fold_head(case.head.bfloat16().float(), case.steps)
    schedule = plan(replace(case.shape, fp8=True), SMALL)
    got = case.twin(schedule).run()
    want, exact = (
        ops.action_ode(OneLaunchHead(folded, case.config, case.steps), *case.given(), backend="torch")
        for folded in (bench_action_ode.in_fp8(case.folded), case.folded)
    )
    assert case.error(got, want) < 1e-5
    assert case.error(got, exact) > 1e-3


@pytest.mark.parametrize("wrong", [0.5, float("nan")])
def test_a_wrong_head_is_not_timed(monkeypatch, wrong, capsys):
    monkeypatch.setattr(bench_action_ode, "config", small_head)
    right = bench_action_ode.candidates
    monkeypatch.setattr(
        bench_action_ode, "candidates", lambda *args: {"eager": lambda: right(*args)["eager"]() + wrong}
    )
    monkeypatch.setattr(bench_action_ode, "time_cpu", lambda *_, **__: pytest.fail("timed"))
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--tokens", "9"])
    assert bench_action_ode.main() == 1
    assert "eager: not timed, it disagrees with the reference: expected at most" in capsys.readouterr().out


def test_times_of_a_launch_that_failed_are_not_given(monkeypatch, capsys):
    """It ends early, and would be the fastest of all."""
    monkeypatch.setattr(bench_action_ode, "config", small_head)
    calls = iter([None, OutputError("action_ode: block 3 waited")])  # sound when compared, not when timed

    def check(_self):
        found = next(calls)
        if found is not None:
            raise found

    monkeypatch.setattr(OneLaunchHead, "check", check)
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--tokens", "9", "--samples", "2"])
    assert bench_action_ode.main() == 1
    assert "eager: not timed: action_ode: block 3 waited" in capsys.readouterr().out
