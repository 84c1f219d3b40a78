"""What can be told of simulators' environments and plans without a simulator."""

from __future__ import annotations

import re
import subprocess

import pytest
from sim_environment import libero_environment

from dit4dit import cli
from dit4dit.cli import main
from dit4dit.errors import ConfigError, SimulatorError
from dit4dit.evaluation import gr1, libero, simulator_setup, simulators
from dit4dit.evaluation.simulators import LOCKS, STAMP, Simulator
from dit4dit.evaluation.workers import Launch


def test_plan_of_libero_is_the_published_protocol() -> None:
    plan = libero.plan(Launch())
    assert len(plan.episodes) == 4 * 10 * 50
    assert len({episode.key for episode in plan.episodes}) == len(plan.episodes)
    assert len({episode.noise_seed for episode in plan.episodes}) == len(plan.episodes)
    steps = {episode.suite: episode.options["max_steps"] for episode in plan.episodes}
    assert steps == {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520}
    first = plan.episodes[0]
    assert (first.seed, first.trial) == (7, 0)
    assert first.options["settle_steps"] == 10
    assert first.options["camera"] == 256
    assert libero.EXECUTE == 8
    large = libero.plan(Launch(), ["libero_90"])
    assert len(large.episodes) == 90 * 50
    assert large.episodes[0].options["max_steps"] == 400
    assert plan.embodiment == "libero"


def test_plan_of_gr1_is_the_published_protocol() -> None:
    plan = gr1.plan(Launch())
    assert len(gr1.TASKS) == len(set(gr1.TASKS)) == 24
    assert len(plan.episodes) == 24 * 50
    assert {episode.options["max_steps"] for episode in plan.episodes} == {720}
    assert gr1.EXECUTE == 12
    assert {e.seed for e in plan.episodes if e.task == "PnPCanToDrawerClose"} == set(range(7, 57))
    name = "PosttrainPnPNovelFromTrayToTieredbasketSplitA"
    assert name in gr1.TASKS
    end = f":gr1_unified/{name}_GR1ArmsAndWaistFourierHands_Env"
    assert gr1.environment_id(name).endswith(end)
    assert gr1.environment_id("mine:Mine/World-v0") == "mine:Mine/World-v0"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: libero.plan(Launch(), ["libero_spatal"]), "unknown; did you mean 'libero_spatial'"),
        (lambda: libero.plan(Launch(), ["libero_goal"], [10]), "libero_goal has tasks 0 to 9"),
        (lambda: libero.plan(Launch(), trials=51), "--trials: expected 1 to 50"),
        (lambda: libero.plan(Launch(), ["libero_goal"], [1, 1]), "expected each once"),
        (lambda: libero.plan(Launch(), max_steps=0), "--max-steps >= 1"),
        (lambda: gr1.plan(Launch(), ["PnPCupToDrawer"]), "unknown; did you mean 'PnPCupToDrawerClose'"),
        (lambda: gr1.plan(Launch(), []), "expected each once, got none"),
        (lambda: gr1.plan(Launch(), trials=0), "--trials >= 1"),
    ],
)
def test_plans_say_what_they_cannot_be(make, message) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("name", ["libero", "gr1"])
def test_lock_files_pin_every_package(name) -> None:
    lines = [line for line in (LOCKS / f"{name}.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 20
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    names = [line.split("==")[0].lower() for line in lines]
    assert len(set(names)) == len(names)
    assert "torch" not in names, "which build of it is right depends on the machine"


def test_an_environment_that_is_not_set_up_says_how(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DIT4DIT_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no libero environment; run dit4dit eval setup libero$"):
        Simulator.at("libero", None).launch("egl")
    with pytest.raises(ConfigError, match=r"run dit4dit eval setup gr1 --path .*/elsewhere$"):
        Simulator.at("gr1", tmp_path / "elsewhere").launch("egl")
    launch = libero_environment(tmp_path / "there").launch("osmesa", {"A": "b"})
    assert launch.variables["MUJOCO_GL"] == launch.variables["PYOPENGL_PLATFORM"] == "osmesa"
    assert launch.variables["LIBERO_CONFIG_PATH"] == str(tmp_path / "there" / "libero")
    assert launch.variables["A"] == "b"
    (tmp_path / "there" / STAMP).write_text("{")
    with pytest.raises(ConfigError, match="no libero environment"):
        Simulator.at("libero", tmp_path / "there").launch("egl")


def test_graphics_are_chosen_or_taken_from_the_environment(monkeypatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    assert simulators.graphics_of(None) == "egl"
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert simulators.graphics_of(None) == "osmesa"
    assert simulators.graphics_of("egl") == "egl"
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(ConfigError, match="MUJOCO_GL=glfw: expected egl or osmesa"):
        simulators.graphics_of(None)


def test_setup_is_not_done_twice_and_begins_again_after_a_failure(tmp_path, monkeypatch) -> None:
    simulator, ran, said = libero_environment(tmp_path / "sim"), [], []
    monkeypatch.setattr(simulators, "run", lambda words, what, **_: ran.append(words[-1]))
    simulators.install(simulator, said.append, first="torch==1")
    assert ran == ["torch==1", str(LOCKS / "libero.txt")]
    simulators.install(simulator, said.append, first="torch==1")
    assert len(ran) == 2
    assert said[-1] == "packages: as libero.txt says"

    def fail(*_, **__):
        raise SimulatorError("pip install: failed")

    monkeypatch.setattr(simulators, "run", fail)
    with pytest.raises(SimulatorError):
        simulators.install(simulator, said.append, first="torch==2")
    assert simulator.installed == {}, "half an installation is none"


def test_a_folder_with_something_else_is_left_alone(tmp_path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is there and is no Python environment"):
        simulators.make_environment(Simulator.at("libero", tmp_path), None)
    with pytest.raises(ConfigError, match=r"expected Python 3.11 or 3.12, got nothing that runs"):
        simulators.interpreter("libero", "/nowhere/python")


def test_checkout_brings_the_very_commit(tmp_path) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", str(source), *who, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    source = tmp_path / "source"
    source.mkdir()
    git("init", "--quiet")
    git("config", "uploadpack.allowAnySHA1InWant", "true")
    commits = []
    for text in ("first", "second"):
        (source / "file").write_text(text)
        git("add", "file")
        git("commit", "--quiet", "-m", text)
        commits.append(git("rev-parse", "HEAD"))
    target = tmp_path / "a" / "target"
    for commit, text in zip([*commits, commits[0]], ("first", "second", "first"), strict=True):
        simulator_setup.checkout(str(source), commit, target)
        assert (target / "file").read_text() == text
        assert simulator_setup.git_head(target) == commit
    simulator_setup.checkout("/nowhere", commits[0], target)  # there already: nothing is fetched
    with pytest.raises(SimulatorError, match=r"git fetch .*failed with exit code"):
        simulator_setup.checkout(str(source), "0" * 40, target)


def test_commands_refuse_what_does_not_go_together(tmp_path, capsys) -> None:
    common = ["--checkpoint", "c", "--out", str(tmp_path / "out")]
    cases = [
        (["setup", "gr1", "--assets", "x"], "--assets, --torch: are for libero"),
        (
            ["libero", *common, "--path", str(tmp_path / "none")],
            "no libero environment; run dit4dit eval setup libero --path",
        ),
        (["gr1", *common, "--path", str(tmp_path / "none")], "no gr1 environment; run dit4dit eval setup gr1 --path"),
    ]
    libero_environment(tmp_path / "sim")
    off = ["--check-only", "--conventions", "off"]
    cases.append((["libero", *common, "--path", str(tmp_path / "sim"), *off], "--check-only: there is nothing to do"))
    for words, message in cases:
        with pytest.raises(SystemExit) as caught:
            cli.main(["eval", *words])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_a_simulator_that_does_not_start_says_why_and_where(tmp_path, golden_dir, capsys) -> None:
    python = libero_environment(tmp_path / "sim").python
    python.unlink()
    python.write_text("#!/bin/sh\necho no driver\nexit 3\n")
    python.chmod(0o755)
    words = ["eval", "libero", "--checkpoint", str(golden_dir / "libero_tiny"), "--path", str(tmp_path / "sim")]
    words += ["--suite", "libero_goal", "--tasks", "0", "--trials", "1", "--retries", "0", "--device", "cpu"]
    for more, code in ((["--check-only"], 2), (["--conventions", "off"], 1)):
        with pytest.raises(SystemExit) as end:
            main([*words, "--out", str(tmp_path / "run"), *more])
        assert end.value.code == code
    found = capsys.readouterr()
    log = tmp_path / "run" / "logs"
    why = "start: the simulator's process ended (exit code 3)"
    assert f"{why}; what the simulator printed is in {log / 'conventions.log'}" in found.err
    assert f"1 of them: {why}" in found.out
    assert str(log) in found.out
    assert (log / "conventions.log").read_text() == (log / "worker-0.log").read_text() == "no driver\n"
