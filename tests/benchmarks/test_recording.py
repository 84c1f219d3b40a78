"""A benchmark's file: strict JSON that says what ended it, what is missing, and for how long it may measure."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dit4dit.benchmarks import (
    recording,
)
from dit4dit.benchmarks.contenders import Clock
from dit4dit.benchmarks.recording import TERMINATED, Recording, Terminated
from dit4dit.benchmarks.sampling import Sampler

from dit4dit.cli import main
from dit4dit.errors import InputError

COMMANDS = {
    "ops": ["--ops", "unnormalize", "--no-compile", "--samples", "1"],
    "options": ["--preset", "tiny", "--seeds", "1"],
    "profile": ["--preset", "tiny"],
    "latency": ["--preset", "tiny", "--chunks", "1"],
    "training": ["--steps", "1", "--batch-size", "1"],
    "rollout": [],
    "loader": [],
}


def terminate(number: signal.Signals = signal.SIGTERM) -> None:
    assert signal.getsignal(number) is not signal.SIG_DFL, "it would end the tests"
    os.kill(os.getpid(), number)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("seconds", [-1.0, 0.0, math.nan, math.inf])
def test_seconds_are_above_0(seconds: float) -> None:
    with pytest.raises(InputError, match=f"--seconds: expected seconds above 0, got {seconds}"):
        Recording(None, seconds)
    with pytest.raises(InputError, match=f"--seconds: expected seconds above 0, got {seconds}"):
        Recording(None).limit(seconds)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_seconds_that_are_none(command: str, tmp_path: Path, capsys) -> None:
    words = ["bench", command, *COMMANDS[command], "--seconds", "-1", "--json", str(tmp_path / "r.json")]
    assert "--seconds: expected seconds above 0, got -1" in refused(capsys, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command, words, left",
    [("options", ["--preset", "tiny"], "preset tiny: steps=8"), ("profile", ["--preset", "tiny"], "action_head")],
)  # fmt: skip
def test_every_command_says_what_its_seconds_left_out(
    command: str, words: list[str], left: str, tmp_path: Path, capsys
) -> None:
    path = tmp_path / "r.json"
    with pytest.raises(SystemExit) as end:
        main(["bench", command, *words, "--seconds", "0.001", "--json", str(path)])
    assert end.value.code == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("--seconds left out: ")
    assert left in line
    assert line.endswith(", ".join(json.loads(path.read_text())["cut"]["left"]))


@pytest.mark.parametrize("seed", [-1, 2**63])
@pytest.mark.parametrize("command", ["ops", "options", "profile", "latency", "training"])
def test_every_command_refuses_seeds_that_are_none(command: str, seed: int, capsys) -> None:
    words = ["bench", command, *COMMANDS[command], "--seed", str(seed)]
    assert f"--seed: expected an integer in 0..2^63-1, got {seed}" in refused(capsys, *words)


def test_tune_refuses_such_a_seed_and_such_counts(capsys) -> None:
    assert "--seed: expected an integer in 0..2^63-1, got -1" in refused(capsys, "tune", "--seed", "-1")
    assert "--samples: expected at least 1, got 0" in refused(capsys, "tune", "--tiles", "1", "--samples", "0")
    assert "--tiles: expected seconds above 0, got -1" in refused(capsys, "tune", "--tiles", "-1")
    assert "--seconds: expected seconds above 0, got nan" in refused(
        capsys, "tune", "--preset", "tiny", "--device", "cpu", "--seconds", "nan"
    )
    assert "--batch: expected at least 1, got -2" in refused(capsys, "tune", "--batch", "1", "-2")


def test_a_batch_of_nothing_is_refused(capsys) -> None:
    assert "--batch: expected at least 1, got 0" in refused(capsys, "bench", "rollout", "--batch", "0")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, TERMINATED), (signal.SIGHUP, 129)])
def test_one_recording_within_another_says_what_ended_both(tmp_path: Path, number: signal.Signals, code: int) -> None:
    outer, inner = tmp_path / "outer.json", tmp_path / "inner.json"
    before = signal.signal(number, signal.SIG_DFL)  # of a test that runs with nohup
    try:
        with pytest.raises(Terminated) as end, Recording(outer), Recording(inner):
            terminate(number)
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert end.value.code == code
    assert [json.loads(path.read_text())["cut"]["by"] for path in (outer, inner)] == [number.name] * 2


def test_a_closed_terminal_does_not_end_what_runs_with_nohup(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Recording(tmp_path / "r.json"):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert json.loads((tmp_path / "r.json").read_text())["complete"]


def test_a_file_that_cannot_be_written_does_not_hide_what_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def full(path: Path, data: dict) -> None:
        raise InputError(f"{path}: cannot be written (no space left on device)")

    path = tmp_path / "r.json"
    monkeypatch.setattr(recording, "write_json", full)
    with pytest.raises(RuntimeError, match="the actions differ"), Recording(path):
        raise RuntimeError("the actions differ")
    assert capsys.readouterr().err == f"not written: {path}: cannot be written (no space left on device)\n"
    with pytest.raises(Terminated), Recording(path):
        terminate()
    with pytest.raises(InputError, match="no space left"), Recording(path):
        pass
    capsys.readouterr()
    with pytest.raises(InputError, match="no space left"), Recording(path) as record:
        record.keep()
    assert capsys.readouterr().err == "", "said once"


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    with Recording(path) as record:
        record.result["numbers"] = {"a": [math.nan, 1.5], "b": (math.inf, -math.inf), 3: {"c": math.nan}}
    data = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert data["numbers"] == {"a": [None, 1.5], "b": [None, None], "3": {"c": None}}
    assert math.isnan(record.result["numbers"]["a"][0]), "only the file's"


@pytest.mark.parametrize("published", [False, True])
def test_chunks_that_a_signal_left_out_are_named(published: bool, tmp_path: Path, monkeypatch) -> None:
    """In turns with the published schedule, as --seconds names them; a turn that is not whole is missing."""
    path, kept = tmp_path / "r.json", []

    def stages(clock: Clock) -> None:
        with clock.stage("vae"):
            pass
        if len(kept) == 3:
            terminate()
        kept.append(1)

    def sample(inputs: object, clock: Clock) -> None:
        with clock.stage("vae"):
            pass

    fast = SimpleNamespace(inputs=SimpleNamespace(frame=torch.zeros(1)), stages=stages)
    baseline = SimpleNamespace(sample=sample) if published else None
    record = Recording(path)
    record.during("pairs", ["roofline"])
    sampler = Sampler(fast, 0, record, record.keep)  # type: ignore[arg-type]
    monkeypatch.setattr(sampler, "chunk", lambda i: None)
    monkeypatch.setattr(sampler, "_block_over", record.keep)
    with pytest.raises(Terminated), record:
        sampler.pairs(baseline, 40, None)  # type: ignore[arg-type]
    cut = json.loads(path.read_text())["cut"]
    left = 37 if published else 36
    assert cut == {"by": "SIGTERM", "during": "pairs", "left": [f"chunks: {left} of 40", "roofline"]}


def test_a_kill_names_them_too_and_a_part_that_is_done_is_not_missing(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "r.json"
    record = Recording(path)
    sampler = Sampler(None, 0, record, record.keep)  # type: ignore[arg-type]
    monkeypatch.setattr(sampler, "chunk", lambda i: None)
    record.during("engine alone", ["pairs"])
    seen: list[list[str]] = []

    def block() -> None:
        record.keep()
        seen.append(json.loads(path.read_text())["cut"]["left"])

    monkeypatch.setattr(sampler, "_block_over", block)
    sampler.alone(3, None)
    assert seen == [["engine alone: 2 of 3", "pairs"], ["engine alone: 1 of 3", "pairs"], ["pairs"]]


def test_what_the_time_left_out_is_missing_once(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "r.json"
    with Recording(path) as record:
        sampler = Sampler(None, 0, record, record.keep)  # type: ignore[arg-type]
        monkeypatch.setattr(sampler, "chunk", lambda i: None)
        record.during("engine alone")
        sampler.alone(9, 0.0)  # its time has passed; one is taken all the same
        record.keep()
        assert json.loads(path.read_text())["cut"]["left"] == ["engine alone: 8 of 9"]
    assert json.loads(path.read_text())["cut"]["left"] == ["engine alone: 8 of 9"]


def test_a_second_sigterm_does_not_end_the_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dit4dit.benchmarks import recording

    out, write = tmp_path / "r.json", recording.write_json

    def slow(path: Path, data: dict) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write(path, data)

    monkeypatch.setattr(recording, "write_json", slow)
    record = Recording(out)
    record.result["block"] = 1
    with pytest.raises(Terminated), record:
        record.during("samples", ["roofline"])  # the signal comes while the file is written
    data = json.loads(out.read_text())
    assert data["block"] == 1
    assert data["cut"] == {"by": "SIGTERM", "during": "samples", "left": ["roofline"]}
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_a_sigterm_breaks_is_still_its_doing(tmp_path: Path) -> None:
    """Interrupted, the capture of a CUDA graph ends with an error of its own."""

    def interrupted() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Terminated:
            raise RuntimeError("capture failed") from None

    with pytest.raises(Terminated) as end, Recording(tmp_path / "r.json"):
        interrupted()
    assert end.value.code == 143
    assert json.loads((tmp_path / "r.json").read_text())["cut"]["by"] == "SIGTERM"
