"""The loop: same seeds, same lines; what goes wrong in a simulator is told from a failure of the policy."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import select
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from eval_standin import ABOUT, LAUNCH, StandIn, evaluator, kill_plan, make_plan, play, untimed

from dit4dit.control.execution import Execution, Latency
from dit4dit.control.seams import Ensemble
from dit4dit.errors import ConfigError, InputError, SimulatorError
from dit4dit.evaluation import tabletop
from dit4dit.evaluation.plan import Episode
from dit4dit.evaluation.rollout import Desk, Options
from dit4dit.evaluation.runs import Run
from dit4dit.evaluation.summary import rows, summarise
from dit4dit.evaluation.workers import SCRIPT, Worker
from dit4dit.robots import LIBERO


def children() -> list[int]:
    """This process's simulator workers."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                words, stat = (process / "cmdline").read_bytes(), (process / "stat").read_text()
            except OSError:
                continue
            if str(SCRIPT).encode() in words and int(stat.rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(process.name))
    return found


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    "execution",
    [
        Execution(),
        Execution(execute=2, ensemble=Ensemble()),
        Execution(execute=2, latency=Latency(150.0, "continue")),
    ],
)
def test_same_seeds_same_lines_whatever_the_number_of_workers(
    tmp_path: Path, workers: int, execution: Execution
) -> None:
    plan = tabletop.plan(4, max_steps=14)
    first = play(tmp_path / "a", plan, workers=1, batch=3, execution=execution)
    policy = StandIn()
    second = play(tmp_path / "b", plan, policy=policy, workers=workers, batch=3, execution=execution)
    assert untimed(first) == untimed(second)
    assert set(policy.sizes) == {3}
    assert first[0]["steps"] == 14
    late = 0 if execution.latency is None else 2
    assert first[0]["delays"] == [0] + [late] * (3 if execution.execute is None else 6)
    assert len({r["instruction"] for r in first}) > 1
    assert [r["trial"] for r in first] == [0, 1, 2, 3]


def test_a_record_says_what_happened(tmp_path: Path) -> None:
    policy = StandIn()
    options = {"workers": 2, "execution": Execution(execute=3, latency=Latency(120.0))}
    records = play(tmp_path, make_plan(4, goal=1e9, max_steps=11), policy=policy, **options)
    one = records[2]
    assert (one["suite"], one["task"], one["trial"], one["seed"], one["noise_seed"]) == ("suite", "task 0", 1, 2, 102)
    # 3 rows, then 2 held and 3 rows, then 2 held and 1 row
    assert (one["steps"], one["chunks"], one["held"], one["delays"]) == (11, 3, 4, [0, 2, 2])
    assert one["success"] is one["success_at_end"] is one["success_at_chunk_ends"] is False
    assert one["checkpoint"] == ABOUT["checkpoint"]
    assert one["options"]["execution"]["latency"] == {"ms": 120.0, "waiting": "hold"}
    assert one["versions"]["simulator"]["numpy"] == np.__version__
    assert len(one["took"]["chunk_ms"]) == len(one["took"]["answer_ms"]) == 3
    assert len({r["actions_hash"] for r in records}) == 4
    asked = {(seed, chunk) for seed, chunk in policy.noises if seed == 102}
    assert asked == {(102, 0), (102, 1), (102, 2)}
    config = json.loads((tmp_path / "run.json").read_text())
    assert config["plan"]["count"] == config["episodes"] == 4
    assert config["row_independent"] is True


class Flickers(StandIn):
    """Succeeds in step 2 alone (the sum of the commands passes the goal and falls below it again)."""

    def chunk(self, *args: Any) -> Any:
        return replace(super().chunk(*args), actions=np.float32([[0, 0, 0], [1, 0, 0], [-1, 0, 0], [0, 0, 0]]))


def test_success_at_any_step_and_the_published_count(tmp_path: Path) -> None:
    plan = make_plan(1, max_steps=8, goal=0.9, lasting=True)
    missed = play(tmp_path / "a", plan, policy=Flickers())[0]
    assert (missed["success"], missed["success_at_chunk_ends"], missed["success_at_end"]) == (True, False, False)
    seen = play(tmp_path / "b", plan, policy=Flickers(), execution=Execution(execute=2))[0]
    assert (seen["success"], seen["success_at_chunk_ends"], seen["success_at_end"]) == (True, True, True)
    last = play(tmp_path / "c", make_plan(1, max_steps=2, goal=0.9, lasting=True), policy=Flickers())[0]
    assert (last["success"], last["success_at_chunk_ends"]) == (True, False)  # lost to the automatic reset


def test_a_crash_is_no_failure(tmp_path: Path) -> None:
    records = play(tmp_path, make_plan(4, trouble="raise"), workers=2, videos="all")
    first = records[0]
    assert first["success"] is None
    assert first["error"]["type"] == "SimulatorError"
    assert "ZeroDivisionError: the world is flat" in first["error"]["message"]
    assert "in break_down" in first["error"]["traceback"]
    assert first["took"]["attempts"] == 1
    assert first["video"].endswith("-error.mp4")
    assert all(r["error"] is None for r in records[1:])
    summary = summarise(records)
    assert summary.overall.episodes == 3
    assert (summary.all_errors, summary.errors["suite", "task 0"], summary.errors["suite", "task 1"]) == (1, 1, 0)
    assert rows(summary)[0][3] == "1"


@pytest.mark.parametrize("workers", [1, 3])
def test_a_simulator_that_never_starts_ends_the_run(tmp_path: Path, workers: int) -> None:
    plan = make_plan(6)
    broken = replace(plan, episodes=tuple(replace(e, environment="eval_worlds:no_such_world") for e in plan.episodes))
    with pytest.raises(SimulatorError, match=r"no environment could be made .*no_such_world.*; mend the simulator"):
        play(tmp_path, broken, workers=workers)
    assert len(Run.open(tmp_path).records) < max(2, workers)
    assert len(play(tmp_path, plan, workers=workers, resume=True)) == 6


@pytest.mark.parametrize("trouble", ["die", "hang"])
def test_a_lost_simulator_is_replaced_and_the_episode_begun_again(
    tmp_path: Path, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, receive = replace(LAUNCH, variables={**LAUNCH.variables, "HANGING": str(tmp_path)}), Worker._receive

    def sooner(self: Worker, request: str, seconds: float) -> dict[str, Any]:
        """The limit is short for a simulator that hangs, and for no other: a busy machine can hold one up for as long."""
        while not select.select([self._connection], [], [], 0.02)[0]:
            if (tmp_path / str(self.pid)).exists():
                return receive(self, request, 0.3)
        return receive(self, request, seconds)

    monkeypatch.setattr(Worker, "_receive", sooner)
    wanted = play(tmp_path / "a", make_plan(3))
    again = play(tmp_path / "b", make_plan(3, launch, trouble=trouble, once=str(tmp_path / "once")), videos="all")
    assert [{**r, "video": None} for r in untimed(again)] == untimed(wanted)
    assert again[0]["took"]["attempts"] == 2
    assert len(list((tmp_path / "b/videos").iterdir())) == 3
    always = play(tmp_path / "c", make_plan(3, launch, trouble=trouble), retries=1)
    assert always[0]["error"]["type"] == "WorkerLost"
    assert always[0]["took"]["attempts"] == 2
    assert untimed(always)[1:] == untimed(wanted)[1:]
    assert children() == []


def test_resume_keeps_what_is_finished_and_tries_errors_again(tmp_path: Path) -> None:
    once = tmp_path / "once"
    plan = make_plan(5, trouble="raise", once=str(once))
    policy = StandIn(broken=(102,))
    before = play(tmp_path / "run", plan, policy=policy, videos="all")
    assert [r["error"] and r["error"]["type"] for r in before] == ["SimulatorError", None, "OutputError", None, None]
    mended = StandIn()
    after = play(tmp_path / "run", plan, policy=mended, resume=True, workers=2, videos="all")
    assert {seed for seed, _ in mended.noises} == {100, 102}
    assert untimed(after) == untimed(play(tmp_path / "fresh", plan, videos="all"))
    assert after[1] == before[1]
    assert {f.name for f in (tmp_path / "run/videos").iterdir()} == {Path(r["video"]).name for r in after}
    with pytest.raises(ConfigError, match="has a run already"):
        play(tmp_path / "run", plan)


def test_videos_show_the_episode_and_say_how_it_ended(tmp_path: Path) -> None:
    plan = make_plan(4, goal=0.5)
    records = play(tmp_path / "all", plan, videos="all")
    assert {r["success"] for r in records} == {True, False}
    for one in records:
        ending = "success" if one["success"] else "failure"
        assert one["video"] == f"videos/suite-{one['task'].replace(' ', '_')}-{one['trial']:03d}-{ending}.mp4"
        with av.open(str(tmp_path / "all" / one["video"])) as video:
            stream = video.streams.video[0]
            assert (stream.codec_context.name, stream.average_rate) == ("h264", 10)
            frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert len(frames) == one["steps"] + 1 + 10
        assert frames[0].shape == (256 + 16, 256 + 16, 3)
        assert abs(int(frames[1][136, 136, 0]) - (5 + one["seed"])) <= 4
        red, green, _ = frames[-1][3, 100].astype(int)
        assert (green > red + 50) if one["success"] else (red > green + 50)
        assert np.ptp(frames[0][3, 100].astype(int)) < 12  # grey
    kept = play(tmp_path / "failures", plan, videos="failures")
    assert [r["video"] is None for r in kept] == [r["success"] for r in kept]
    assert len(list((tmp_path / "failures/videos").iterdir())) == sum(not r["success"] for r in kept)
    assert [r["video"] for r in play(tmp_path / "none", plan)] == [None] * 4


def test_what_does_not_fit_is_refused_before_anything_runs(tmp_path: Path) -> None:
    plan = make_plan(1)
    with pytest.raises(ConfigError, match="needs a policy for embodiment 'libero'"):
        play(tmp_path, replace(plan, embodiment=LIBERO.name))
    with pytest.raises(ConfigError, match="execute: expected 1 to 4"):
        play(tmp_path, plan, execution=Execution(execute=5))
    with pytest.raises(ConfigError, match="workers >= 1"):
        Options(workers=0)
    assert list(tmp_path.iterdir()) == []
    for bad in ({"episodes": 0}, {"picture": 65}, {"max_steps": 0}):
        with pytest.raises(ConfigError, match="tabletop"):
            tabletop.plan(**bad)


def test_a_mistake_ends_the_run_and_its_workers(tmp_path: Path) -> None:
    class Refuses(StandIn):
        def run(self, requests: Any) -> Any:
            raise InputError("image 'top': missing")

    with pytest.raises(InputError, match="top"):
        play(tmp_path / "a", make_plan(4), policy=Refuses(), workers=2)
    with pytest.raises(ConfigError, match="cannot be started"):
        play(tmp_path / "b", make_plan(4, replace(LAUNCH, python="/no/python")), workers=2)
    assert children() == []


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as in a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_a_run_that_goes_on(ctrl_c: None, tmp_path: Path) -> None:
    plan = make_plan(6, max_steps=10, seconds=0.01)
    seen: list[Any] = []

    def interrupt(record: Any) -> None:
        seen.append(record)
        if len(seen) == 2:
            signal.raise_signal(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        play(tmp_path / "run", plan, workers=2, on_episode=interrupt, videos="all")
    assert children() == []
    done = Run.open(tmp_path / "run").records
    assert 2 <= len(done) < 6
    assert len(list((tmp_path / "run/videos").iterdir())) == len(done)
    after = play(tmp_path / "run", plan, workers=2, resume=True, videos="all")
    assert untimed(after) == untimed(play(tmp_path / "fresh", plan, videos="all"))


@pytest.mark.slow
def test_killing_the_evaluator_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten runs, each killed twice at random moments; its workers go with it, and the third start completes it."""
    wanted = untimed(play(tmp_path / "whole", kill_plan()))
    monkeypatch.chdir(tmp_path)  # where no source tree is taken for the package
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch", "dit4dit.evaluation.rollout", "dit4dit.evaluation.tabletop"])
    chance = random.Random(0)
    caught = 0

    def lines(folder: Path) -> list[bytes]:
        file = folder / "episodes.jsonl"
        return file.read_bytes().split(b"\n")[:-1] if file.exists() else []

    for repetition in range(10):
        folder = tmp_path / f"run{repetition}"
        for most in (3, 6):
            process = processes.Process(target=evaluator, args=(folder,))
            process.start()
            enough = chance.randint(0, most)
            while process.is_alive() and len(lines(folder)) < enough:
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.05))
            process.kill()
            process.join()
            before = lines(folder)
            told = folder.with_suffix(".told")
            heard = told.read_text().split() if told.exists() else []
            assert set(heard) <= {str(json.loads(line)["seed"]) for line in before}  # what ended is on disk
            caught += 0 < len(before) < len(wanted)
        records = play(folder, kill_plan(), workers=2, resume=True)
        assert lines(folder)[: len(before)] == before
        assert untimed(records) == wanted
    assert caught >= 5  # some of the moments were in the middle of a run


@pytest.mark.slow
def test_killing_workers_loses_nothing(tmp_path: Path) -> None:
    """Ten runs in which a random worker is killed at two random moments, no oftener than an episode may be begun again."""
    wanted = untimed(play(tmp_path / "whole", kill_plan()))
    chance = random.Random(1)
    attempts = 0
    for repetition in range(10):
        kills, ended = chance.sample(range(1, 8), 2), []

        def murder(record: Any, kills: list[int] = kills, ended: list[Any] = ended) -> None:
            """One kill each when so many episodes have ended, while the next ones run; their player waits for it."""
            ended.append(record)
            if len(ended) in kills:
                time.sleep(chance.uniform(0, 0.05))
                alive = children()
                if alive:
                    os.kill(chance.choice(alive), signal.SIGKILL)

        options = {"policy": StandIn(seconds=0.004), "workers": 2, "retries": 2, "on_episode": murder}
        records = play(tmp_path / f"run{repetition}", kill_plan(), **options)
        assert untimed(records) == wanted
        attempts += sum(r["took"]["attempts"] for r in records)
    assert attempts >= 10 * len(wanted) + 10


def test_a_player_stays_with_its_environment_and_others_begin_where_fewest_are() -> None:
    episodes = [Episode("suite", task, trial, 0, 0, "world", {"task": task}) for task in "abc" for trial in range(3)]
    desk = Desk(episodes)
    first, second = desk.take(None), desk.take(None)
    assert first is not None
    assert second is not None
    assert (first.task, second.task) == ("a", "b")
    mine = [desk.take(first.world), desk.take(first.world)]
    assert [e.task for e in mine if e] == ["a", "a"]
    after = desk.take(first.world)  # no more of a: c, where nobody is
    assert after is not None
    assert after.task == "c"
    left = [desk.take(after.world) for _ in range(5)]
    assert sorted(e.task for e in left[:4] if e) == ["b", "b", "c", "c"]
    assert left[4] is None


def test_simulators_run_while_others_do(tmp_path: Path) -> None:
    """Four workers are in a step at the same time: each waits there for three others, and none would come if they took turns."""
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    plan = make_plan(8, max_steps=8, tasks=1, meet=[str(meeting), 4])
    records = play(tmp_path / "run", plan, workers=4, batch=4)
    assert [r["error"] for r in records] == [None] * 8
    assert len(list(meeting.iterdir())) == 8
