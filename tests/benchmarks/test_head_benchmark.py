"""The benchmark of the whole action head: nothing wrong is timed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from dit4dit.benchmarks import budget_head, head_parts
from dit4dit.benchmarks.ops import bench_action_ode
from head_case import SMALL, Case, small_head, tiny

from dit4dit import ops
from dit4dit.engine.action_ode import head_shape, plan
from dit4dit.engine.action_ode.program import OneLaunchHead
from dit4dit.engine.fold import fold_head
from dit4dit.errors import OutputError
from dit4dit.model.action_head import ActionHead
from dit4dit.ops import stand_in
from dit4dit.ops.dispatch import find


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_is_benchmarked(tmp_path, monkeypatch, capsys, dtype):
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
    assert [row["one_launch"][0]["stages"] for row in left_out] == [4 + 5 + 4] * 3, "of a step of two blocks"
    heads = json.loads(path.read_text())["heads"]
    assert list(heads) == ["9", "17", "51"]
    printed = capsys.readouterr().out
    for tokens, found in heads.items():
        assert found["parts"] is None, "nothing is measured without the kernel"
        assert (found["predicted"]["stages"], found["predicted"]["fused"]) == (13, True)
        assert f"\n{tokens} tokens, {budget_head.show(found['predicted'])}\n" in printed


@pytest.mark.parametrize("wrong", [0.0, 0.5])
def test_parts_of_the_kernels_time_are_measured_where_it_runs(tmp_path, monkeypatch, capsys, wrong):
    """With PyTorch's loop in the kernel's place: each variant is compared and timed, and what disagrees has a row."""
    head = partial(replace, num_layers=3)
    monkeypatch.setattr(bench_action_ode, "config", lambda horizon: head(small_head(horizon)))
    right = bench_action_ode.schedule_of
    # the planner would take teams of one, and attention inside products
    otherwise = SimpleNamespace(ranks=2, fused=False)
    in_twos = lambda *args, like=None, **rest: right(*args, like=like or otherwise, **rest)  # noqa: E731
    monkeypatch.setattr(bench_action_ode, "schedule_of", in_twos)
    everyone, loop = bench_action_ode.candidates, find("action_ode").implementations["loop"]

    def candidates(of, args):
        return {**everyone(of, args), **({} if of.fp8 else {"cuda": everyone(of, args)["loop"]})}

    monkeypatch.setattr(bench_action_ode, "candidates", candidates)

    seen = set()

    def run(of, noise, context, *rest):
        seen.update({(of.like.ranks, of.like.fused)} if isinstance(of, bench_action_ode.HeldPlan) else ())
        few = isinstance(of, bench_action_ode.HeldPlan) and context.shape[1] == head_parts.FEW_KEYS
        return loop.run(of, noise, context, *rest) + wrong * few

    kernel = replace(find("action_ode").implementations["cuda"], refuse=lambda *_: None, run=run, device=None)
    monkeypatch.setitem(find("action_ode").implementations, "cuda", kernel)
    path = tmp_path / "result.json"
    words = ["bench", "--device", "cpu", "--dtype", "float32", "--samples", "2", "--tokens", "17", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", words)
    assert bench_action_ode.main() == (1 if wrong else 0)
    result = json.loads(path.read_text())
    found, printed = result["heads"]["17"]["parts"], capsys.readouterr().out
    assert set(found["measured"]["by_place"]) == {"ends", "a block on features", "a block on tokens"}
    assert head_parts.show(found) in printed
    predicted = result["heads"]["17"]["predicted"]
    assert seen == {(predicted["ranks"], predicted["fused"])} == {(2, False)}
    assert {row["ranks"] for row in found["variants"].values()} == {2}
    few = {"narrow, one step", "narrow", "few tokens", "few keys"}
    assert set(found["variants"]) - few == {"request", "one block less", "two blocks less"}
    assert {name for name, row in found["variants"].items() if row["us"] is None} == (few if wrong else set())
    rows = {row["implementation"]: row for row in result["rows"] if row["implementation"].startswith("cuda, ")}
    assert set(rows) == ({f"cuda, {name}" for name in few} if wrong else set())
    assert all(row["disagrees"] for row in rows.values())
    if not wrong:
        assert sum(found["measured"]["by_work"].values()) == pytest.approx(found["variants"]["request"]["us"])


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


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_variant_is_planned_like_its_request(ranks):
    config, meta = small_head(16), torch.device("meta")
    for fused in (False, True):
        shape = head_shape(config, batch=1, context=588, prefix=True, steps=4)
        like = plan(shape, bench_action_ode.H200, ranks=ranks, fused=fused)
        for blocks in (2, 1):  # one attends to the features, and nothing is fused
            variant = replace(config, num_layers=blocks)
            head = bench_action_ode.HeldPlan(fold_head(ActionHead(variant), 4), variant, 4)
            head.like = like
            with stand_in.without_data():
                schedule = head.schedule(meta, 1, 588, True)
            given = bench_action_ode.schedule_of(variant, 4, device="cpu", batch=1, context=588, like=like)
            assert (schedule.ranks, schedule.fused) == (ranks, fused and blocks == 2)
            assert (schedule.tiles == given.tiles).all(), "what is launched is what is predicted"
