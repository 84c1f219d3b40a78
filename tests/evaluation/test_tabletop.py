"""`dit4dit eval tabletop` with the package's policy, and what makes a policy the same one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from dit4dit.benchmarks import late_chunks
from eval_standin import untimed

from dit4dit import Policy
from dit4dit.checkpoints.native import to_own
from dit4dit.cli import main
from dit4dit.envs import tabletop_policy_dir
from dit4dit.envs.tabletop import TEST_SEEDS_FROM, layout
from dit4dit.errors import ConfigError
from dit4dit.evaluation import identity, tabletop
from dit4dit.evaluation.rollout import Options, evaluate
from dit4dit.evaluation.runs import Run


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return tabletop_policy_dir()


def command(*words: Path | str | int) -> int:
    with pytest.raises(SystemExit) as end:
        main(["eval", "tabletop", "--device", "cpu", *map(str, words)])
    return int(end.value.code or 0)


def test_one_worker_and_three_execute_the_same_bits(checkpoint: Path, tmp_path: Path) -> None:
    policy = Policy.from_pretrained(checkpoint, device="cpu")
    about = identity.describe(policy, checkpoint)
    found = {}
    for workers in (1, 3):
        options = Options(batch=3, workers=workers, videos="none")
        plan = tabletop.plan(5, max_steps=17)
        records = evaluate(policy, plan, options, tmp_path / str(workers), horizon=8, about_policy=about)
        found[workers] = [{k: v for k, v in r.items() if k != "took"} for r in records]
    assert found[1] == found[3]
    assert len({r["actions_hash"] for r in found[1]}) == 5
    assert Run.open(tmp_path / "3").config["row_independent"] is True


def test_the_command_makes_a_run_and_goes_on_with_it(checkpoint: Path, tmp_path: Path, capsys) -> None:
    words = ["--checkpoint", checkpoint, "--out", tmp_path / "run", "--episodes", 3, "--max-steps", 10, "--workers", 2]
    assert command(*words) == 0
    assert "0.0 % [0.0, 56.1], 0 of 3" in capsys.readouterr().out
    run = Run.open(tmp_path / "run")
    assert [r["seed"] for r in run.records] == [TEST_SEEDS_FROM + i for i in range(3)]
    assert [r["instruction"] for r in run.records] == [layout(TEST_SEEDS_FROM + i)[1].instruction() for i in range(3)]
    assert run.config["policy"]["checkpoint"] == identity.checkpoint_hash(checkpoint)
    assert run.config["policy"]["engine"] == {"steps": 4, "posterior": "sample", "quantization": None}
    assert len(list((tmp_path / "run/videos").iterdir())) == 3
    lines = (tmp_path / "run/episodes.jsonl").read_bytes()
    assert command(*words) == 2
    assert "has a run already; continue it with --resume" in capsys.readouterr().err
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    assert command(*words, "--checkpoint", moved, "--resume") == 0
    assert (tmp_path / "run/episodes.jsonl").read_bytes() == lines
    assert command(*words, "--resume", "--seed", 1_000_001) == 2
    assert "started with plan.seed = 1000000, now it is 1000001" in capsys.readouterr().err
    assert command(*words, "--resume", "--steps", 2) == 2
    assert "policy.engine.steps = 4, now it is 2" in capsys.readouterr().err


def test_options_reach_the_episodes(checkpoint: Path, tmp_path: Path) -> None:
    words = ["--checkpoint", checkpoint, "--episodes", 2, "--max-steps", 10, "--batch", 2, "--videos", "none"]
    more = ["--execute", 3, "--ensemble", 2, "--ensemble-alpha", 0.5, "--latency", 150, "--while-waiting", "continue"]
    assert command(*words, *more, "--out", tmp_path / "a", "--shard", "2/2") == 0
    record = Run.open(tmp_path / "a").records[0]
    assert (record["trial"], record["delays"], record["chunks"]) == (1, [0, 2, 2, 2], 4)
    assert record["options"]["execution"] == {
        "execute": 3,
        "ensemble": {"alpha": 0.5, "history": 2},
        "latency": {"ms": 150.0, "waiting": "continue"},
        "rtc": None,
    }
    assert command(*words, "--out", tmp_path / "b", "--latency", "measured", "--paraphrase", "None") == 0
    assert Run.open(tmp_path / "b").config["execution"]["latency"]["ms"] is None
    assert Run.open(tmp_path / "b").config["plan"]["paraphrase"] is None


@pytest.mark.long
def test_ten_killed_runs_of_the_command_end_as_a_whole_one(checkpoint: Path, tmp_path: Path) -> None:
    """kill -9 of the evaluator, and in every second run of a worker before, at random moments; then --resume."""
    words = ["--checkpoint", str(checkpoint), "--episodes", "6", "--max-steps", "40", "--workers", "2", "--batch", "2"]
    assert command(*words, "--out", tmp_path / "whole") == 0
    wanted = untimed(Run.open(tmp_path / "whole").records)
    start = [
        sys.executable,
        "-c",
        "from dit4dit.cli import main; main()",
        "eval",
        "tabletop",
        "--device",
        "cpu",
        *words,
    ]
    chance, caught = random.Random(2), 0
    for repetition in range(10):
        folder = tmp_path / str(repetition)
        book = folder / "episodes.jsonl"
        process = subprocess.Popen([*start, "--out", folder], cwd=tmp_path, stderr=subprocess.DEVNULL)
        enough = chance.randint(0, 4)
        while process.poll() is None and (book.read_bytes().count(b"\n") if book.exists() else -1) < enough:
            time.sleep(0.01)
        if repetition % 2:
            workers: list[str] = []
            while not workers and process.poll() is None:  # they start a moment after the run's folder is there
                words_of = ["pgrep", "-f", "-P", str(process.pid), "sim_worker"]
                workers = subprocess.run(words_of, capture_output=True, text=True).stdout.split()
            if workers:
                os.kill(int(chance.choice(workers)), signal.SIGKILL)
        time.sleep(chance.uniform(0, 0.6))
        process.kill()
        process.wait()
        before = book.read_bytes().split(b"\n")[:-1]
        caught += 0 < len(before) < 6
        assert command(*words, "--out", folder, "--resume") == 0
        assert book.read_bytes().split(b"\n")[: len(before)] == before
        assert untimed(Run.open(folder).records) == wanted
    assert caught >= 5


@pytest.mark.parametrize(
    "words,message",
    [
        (["--execute", "0"], "execute: expected 1 to 8"),
        (["--execute", "9"], "execute: expected 1 to 8"),
        (["--latency", "soon"], "--latency: expected milliseconds or 'measured', got 'soon'"),
        (["--latency", "-3"], "latency: expected milliseconds >= 0"),
        (["--while-waiting", "continue"], "--while-waiting: goes with --latency"),
        (["--batch", "17"], "batch: expected 1 to 16"),
        (["--workers", "0"], "expected workers >= 1"),
        (["--ensemble", "0"], "history: expected a whole number of chunks, 1 or more, got 0"),
        (["--shard", "3/2"], "--shard '3/2'"),
        (["--episodes", "0"], "episodes >= 1"),
        (["--picture", "65"], "picture: expected one of"),
    ],
)
def test_options_that_make_no_sense_are_one_line(
    checkpoint: Path, tmp_path: Path, words: list[str], message: str, capsys
) -> None:
    assert command("--checkpoint", checkpoint, "--out", tmp_path / "run", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run/run.json").exists()


def test_a_policy_for_another_robot_is_refused(golden_dir: Path, tmp_path: Path, capsys) -> None:
    assert command("--checkpoint", golden_dir / "libero_tiny", "--out", tmp_path / "run") == 2
    assert "needs a policy for embodiment 'tabletop', got one for 'libero'" in capsys.readouterr().err


def test_a_checkpoint_has_one_hash_in_any_layout_and_another_after_any_change(golden_dir: Path, tmp_path: Path) -> None:
    published = golden_dir / "libero_tiny"
    to_own(published, tmp_path / "own", None, lambda name, size: None)
    known = identity.checkpoint_hash(published)
    assert identity.checkpoint_hash(tmp_path / "own") == known
    config = tmp_path / "own" / "config.json"
    written = config.read_text()
    config.write_text(json.dumps({**json.loads(written), "embodiment": "tabletop"}))
    assert identity.checkpoint_hash(tmp_path / "own") != known, "of another robot"
    config.write_text(written)
    changed = Path(shutil.copytree(published, tmp_path / "changed"))
    file = next((changed / "checkpoints").glob("*.pt"))
    tensors = torch.load(file, weights_only=True)
    name = next(n for n in tensors if n.startswith("action_model."))
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[-1] += 1e-3
    torch.save(tensors, file)
    assert identity.checkpoint_hash(changed) != known
    statistics = changed / "dataset_statistics.json"
    shutil.copy(published / "checkpoints" / file.name, file)
    assert identity.checkpoint_hash(changed) == known
    facts = json.loads(statistics.read_text())
    next(iter(facts.values()))["action"]["max"][0] += 0.5
    statistics.write_text(json.dumps(facts))
    assert identity.checkpoint_hash(changed) != known
    with pytest.raises(ConfigError, match="max_steps >= 1"):
        tabletop.plan(max_steps=0)


@pytest.mark.slow
def test_a_robot_that_waits_for_late_chunks_still_succeeds(checkpoint: Path, tmp_path: Path) -> None:
    """Told to stand still as its world does not take it, it succeeds in 14 of these 30 episodes."""
    for ms in (150, 300):
        words = ["--checkpoint", checkpoint, "--episodes", 30, "--execute", 4, "--latency", ms, "--videos", "none"]
        assert command(*words, "--out", tmp_path / str(ms)) == 0
    late_chunks.main([tmp_path / "300", tmp_path / "150"], tmp_path / "late.json")
    found = json.loads((tmp_path / "late.json").read_text())
    assert [run["latency_ms"] for run in found["runs"]] == [150.0, 300.0]
    for run, delay in zip(found["runs"], (2, 3), strict=True):
        records = Run.open(tmp_path / f"{run['latency_ms']:g}").records
        assert (run["while_waiting"], run["execute"], run["errors"], run["first_seed"]) == (
            "hold",
            4,
            0,
            TEST_SEEDS_FROM,
        )
        assert run["outcomes"] == "".join(str(int(r["success"])) for r in sorted(records, key=lambda r: r["seed"]))
        assert run["success"]["successes"] == run["outcomes"].count("1") >= 23
        # 4 steps of the first chunk, then again and again as many as a chunk is late, and 4
        assert all(r["held"] == sum((step - 4) % (delay + 4) < delay for step in range(4, r["steps"])) for r in records)
        assert run["steps_held"] == sum(r["held"] for r in records) > 0
    assert found["met"]
    assert found["machine"]["cores"] >= 1
    run = json.loads((tmp_path / "150" / "run.json").read_text())
    (tmp_path / "150" / "run.json").write_text(json.dumps({**run, "benchmark": "libero"}))
    with pytest.raises(SystemExit, match="expected a run of `dit4dit eval tabletop`"):
        late_chunks.main([tmp_path / "150"], tmp_path / "none.json")
