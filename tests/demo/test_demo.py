"""`dit4dit demo` plays the package's own policy; `demo-train` makes one, and says before and after."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dit4dit.benchmarks import demo_seeds
from example_scripts import load

from dit4dit import Policy
from dit4dit.cli import main
from dit4dit.commands.shell import progress
from dit4dit.demo.play import play, rate
from dit4dit.demo.train import Settings, configure, demo_train
from dit4dit.envs import tabletop_policy_dir
from dit4dit.errors import CheckpointError, InputError
from dit4dit.evaluation.statistics import wilson
from dit4dit.robots import TABLETOP

pytest.importorskip("pyarrow")


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole demo-train that is far too short to learn anything."""
    out = tmp_path_factory.mktemp("made") / "run"
    words = ["--demonstrations", "12", "--steps", "4", "--episodes", "2", "--processes", "2"]
    assert run("demo-train", "--out", str(out), *words) == 0
    return out


@pytest.mark.slow
def test_demo_train_leaves_everything(made: Path) -> None:
    data = json.loads((made / "demo-train.json").read_text())
    assert set(data["success"]) == {"before", "after", "told_other_words"}
    assert all(one["episodes"] == 2 and one["errors"] == 0 for one in data["success"].values())
    assert data["recipe"]["action loss reaches the backbone"] is True
    assert data["total_seconds"] == pytest.approx(sum(data["seconds"].values()))
    page = (made / "report.html").read_text()
    for words in ("before training (random weights)", "told another goal", "The action loss reaches the backbone"):
        assert words in page
    # success, losses, and at least one strip of futures
    assert page.count("data:image/png;base64,") >= 3
    assert (made / "evaluation" / "report.html").is_file()
    assert len(list((made / "episodes" / "after" / "videos").glob("*.mp4"))) == 2
    log = [json.loads(line) for line in (made / "run" / "log.jsonl").read_text().splitlines()]
    assert any("eval/video_loss" in line for line in log)
    policy = Policy.from_pretrained(data["policy"], device="cpu")
    assert policy.embodiment is TABLETOP


@pytest.mark.slow
def test_the_control_is_told_something_else(made: Path) -> None:
    lines = {}
    for name in ("after", "other-words"):
        file = made / "episodes" / name / "episodes.jsonl"
        lines[name] = {one["seed"]: one["instruction"] for one in map(json.loads, file.read_text().splitlines())}
    assert set(lines["after"]) == set(lines["other-words"])
    assert len(lines["after"]) == 2
    assert all(lines["after"][seed] != lines["other-words"][seed] for seed in lines["after"])


@pytest.mark.slow
def test_demo_plays_a_checkpoint_of_ones_own(made: Path, tmp_path: Path, capsys) -> None:
    checkpoint = json.loads((made / "demo-train.json").read_text())["policy"]
    words = ("demo", "--out", str(tmp_path), "--episodes", "2", "--device", "cpu", "--checkpoint", checkpoint)
    assert run(*words) == 0
    played = (tmp_path / "run" / "episodes.jsonl").read_bytes()
    assert run(*words) == 0, "a run that is there goes on"
    assert (tmp_path / "run" / "episodes.jsonl").read_bytes() == played
    assert "of 2" in capsys.readouterr().out
    data = json.loads((tmp_path / "demo.json").read_text())
    assert data["success"]["episodes"] == 2
    assert 0 < data["chunk_ms"]["p50"] <= data["chunk_ms"]["max"]
    assert (tmp_path / "report.html").is_file()


@pytest.mark.slow
def test_a_run_is_never_mixed_with_another(made: Path, capsys) -> None:
    assert run("demo-train", "--out", str(made)) == 2
    assert "has a run already" in capsys.readouterr().err


def test_what_cannot_be_run_is_said_before_anything_is_recorded(tmp_path: Path, capsys) -> None:
    for name in ("demonstrations", "steps", "episodes", "processes"):
        assert run("demo-train", "--out", str(tmp_path / "run"), f"--{name}", "0") == 2
        assert f"--{name}: expected at least 1, got 0" in capsys.readouterr().err
    (tmp_path / "run" / "data").mkdir(parents=True)  # of a run that was interrupted
    assert run("demo-train", "--out", str(tmp_path / "run")) == 2
    assert "has a run already, or part of one" in capsys.readouterr().err
    assert [each.name for each in (tmp_path / "run").rglob("*")] == ["data"]


def test_the_global_batch_does_not_depend_on_the_processes(tmp_path: Path) -> None:
    one, two = (configure(tmp_path, Settings(processes=n)) for n in (1, 2))
    assert one.data.batch_size == 2 * two.data.batch_size
    with pytest.raises(InputError, match="--processes 3: expected a divisor of the global batch"):
        configure(tmp_path, Settings(processes=3))
    assert one.model.flow.action_grad_to_backbone


@pytest.mark.slow
def test_several_runs_are_one_result(made: Path, tmp_path: Path) -> None:
    run = json.loads((made / "demo-train.json").read_text())
    seeds = []
    for seed, (rate_after, minutes) in enumerate([(0.9, 18.0), (0.8, 20.0)]):
        one = {**run, "seed": seed, "total_seconds": 60 * minutes}
        one["success"] = {**run["success"], "after": {**run["success"]["after"], "rate": rate_after}}
        seeds.append(one)
    result = demo_seeds.merged(seeds[::-1])
    assert list(result["seeds"]) == ["0", "1"]
    assert result["met"]
    assert (result["success"]["lowest"], result["minutes"]["longest"]) == (0.8, 20.0)
    assert not demo_seeds.merged([{**seeds[0], "total_seconds": 1201.0}])["met"]
    with pytest.raises(SystemExit, match="different seeds"):
        demo_seeds.merged([run, run])
    demo_seeds.main([made], tmp_path / "all.json")
    assert json.loads((tmp_path / "all.json").read_text())["seeds"] == {"0": run}
    assert (tmp_path / "all.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="no such file"):
        demo_seeds.main([tmp_path], tmp_path / "none.json")


def test_what_no_commit_made_is_not_shipped(tmp_path: Path) -> None:
    (tmp_path / "demo-train.json").write_text(json.dumps({"seed": 0, "commit": None, "policy": "nowhere"}))
    with pytest.raises(CheckpointError, match="names no commit; run make demo-train in a clone"):
        load("ship_policy").ship(tmp_path, tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()


def test_the_packages_policy_is_small_and_says_where_it_is_from() -> None:
    folder = tabletop_policy_dir()
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 5_000_000
    facts = json.loads((folder / "metrics.json").read_text())
    assert facts["command"].startswith("make demo-train SEED=")
    assert len(facts["commit"]) >= 40
    policy = Policy.from_pretrained(folder, device="cpu")
    assert all(p.dtype == torch.float32 for p in policy.model.parameters())


def test_the_packages_policy_does_what_it_is_said_to_do(tmp_path: Path) -> None:
    """A few layouts, so the interval is wide; what its record says must lie in it."""
    said = json.loads((tabletop_policy_dir() / "metrics.json").read_text())["success"]["after"]["rate"]
    found = rate(play(tabletop_policy_dir(), tmp_path / "run", 12, bar=progress))
    low, high = wilson(found["successes"], found["episodes"], 0.999).low, wilson(found["successes"], 12, 0.999).high
    assert low <= said <= high


@pytest.mark.long
def test_a_short_training_is_better_than_chance(tmp_path: Path) -> None:
    """Random weights succeed in hardly one of a hundred episodes; what was trained for a few minutes must be clearly above."""
    settings = Settings(seed=5, demonstrations=4200, steps=1800)
    result = demo_train(tmp_path / "run", settings, bar=progress)
    before, after = result["success"]["before"], result["success"]["after"]
    assert after["interval_95"][0] > before["interval_95"][1], (before, after)
