"""`dit4dit bench profile`: kernels of each stage, and what is left of it without a profiler or without time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dit4dit.benchmarks import profiling

from dit4dit.cli import main

STAGES = ["preprocess", "vae", "backbone", "action_head", "outputs"]


def run(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as end:
        main(["bench", "profile", "--preset", "tiny", "--device", "cpu", *map(str, words)])
    return int(end.value.code or 0)


@pytest.mark.slow
def test_each_stage_has_its_kernels(tmp_path: Path, capsys) -> None:
    out = tmp_path / "profile.json"
    assert run("--json", out) == 0
    data = json.loads(out.read_text())
    assert (data["complete"], data["cut"], data["profiler"]["activities"]) == (True, None, ["CPU"])
    assert list(data["stages"]) == list(data["stage_us"]) == STAGES
    (convolutions,) = [k for k in data["stages"]["vae"] if k["kernel"] == "aten::convolution"]
    assert convolutions["count"] == 27, "those of one pixel in the attention are products, and one is folded away"
    for stage, kernels in data["stages"].items():
        assert kernels == sorted(kernels, key=lambda k: -k["us"])
        assert data["stage_us"][stage]["kernels"] == pytest.approx(sum(k["us"] for k in kernels))
    assert data["total_us"] == pytest.approx(sum(s["kernels"] for s in data["stage_us"].values()))
    assert data["launches"] == pytest.approx(sum(s["launches"] for s in data["stage_us"].values()))
    assert (data["head"], data["one_launch"]) == ("library", None)
    assert data["share_of_replay"] == pytest.approx(data["total_us"] / data["replay_us"]["step"])
    largest = max((k for kernels in data["stages"].values() for k in kernels), key=lambda k: k["us"])
    assert largest["kernel"] in capsys.readouterr().out, "which kernels are printed depends on their times"


def test_without_a_profiler_stages_have_their_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def broken(**_):
        raise RuntimeError("CUPTI is not there")

    monkeypatch.setattr(profiling, "profile", broken)
    out = tmp_path / "profile.json"
    assert run("--json", out) == 0
    data = json.loads(out.read_text())
    assert data["profiler"]["activities"] == []
    assert "CUPTI is not there; stages have their times alone" in capsys.readouterr().out
    assert data["stages"] == {stage: [] for stage in STAGES}
    assert all(times["eager"] > 0 for times in data["stage_us"].values())
    assert data["share_of_replay"] is None


def test_no_time_names_what_was_not_reached(tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    assert run("--json", out, "--seconds", "0.01") == 0
    data = json.loads(out.read_text())
    assert not data["complete"]
    assert (data["cut"]["by"], data["cut"]["left"]) == ("seconds", STAGES)


def test_names_are_shortened_in_the_table_alone() -> None:
    assert profiling.short("void at::native::vectorized_kernel<4>(int)") == "vectorized_kernel<4>(int)"
    assert len(profiling.short("x" * 500)) == profiling.SHOWN
    (first, *_) = profiling.kernels_of(lambda: torch.ones(8) + 1, ["CPU"])
    assert first["count"] == 1
