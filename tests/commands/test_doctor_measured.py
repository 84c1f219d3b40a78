"""What `dit4dit doctor` says of measured kernels: how many, which files do not count and why, and the table of calls."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dit4dit import doctor
from dit4dit.cli import main
from dit4dit.ops import sources, verdicts
from dit4dit.ops.verdicts import Verdict

CPU = torch.device("cpu")
NAME = "kernels measured here"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIT4DIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return verdicts.folder(CPU)


def verdict(call: str = "a call", **changes: Any) -> Verdict:
    ms = {"torch": 0.25, "cpp": 0.5}
    found = Verdict("preprocess", call, verdicts.place(CPU), "cpp", "torch", ms, made="2026-05-01T10:00:00")
    return replace(found, **changes)


def finding() -> doctor.Finding:
    (found,) = doctor._measured()
    assert found.what == NAME
    return found


def test_nothing_measured() -> None:
    assert (finding().level, finding().detail) == (
        "note",
        f"{verdicts.device_name(CPU)}: not yet measured here: run dit4dit tune",
    )


def test_no_place_for_a_cache_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(cls: Any) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DIT4DIT_CACHE")
    monkeypatch.setattr(Path, "home", classmethod(nowhere))
    assert "not yet measured" in finding().detail


def test_what_counts_and_what_does_not(cache: Path) -> None:
    verdicts.write(verdict(), cache)
    verdicts.write(verdict("another", made="2026-05-03T10:00:00"), cache)
    verdicts.write(verdict("a product", op="linear", chosen="torch"), cache)
    name = verdicts.device_name(CPU)
    assert finding().detail == f"3 calls of 2 ops on {name}, made 2026-05-01 to 2026-05-03"
    assert finding().level == "ok"

    for call, chosen in (("a plan", "on"), ("another", "off")):
        ms = {"on": 1.0, "off": 2.0}
        verdicts.write(verdict(call, op="programmatic_launch", default="off", chosen=chosen, ms=ms), cache)
    made = "made 2026-05-01 to 2026-05-03"
    assert finding().detail == f"3 calls of 2 ops on {name}, {made}; programmatic launches in 1 of 2 plans"
    for file in cache.glob("programmatic_launch-*.json"):
        file.unlink()

    (cache / "a.json").write_text("{")
    (cache / "b.json").mkdir()
    (cache / ".c.json.1234").write_text("half of one that was being written")
    for i in range(3):
        verdicts.write(verdict(f"elsewhere {i}", place={**verdicts.place(CPU), "torch": "1.0"}), cache)
    verdicts.write(verdict("gone", chosen="gone", ms={"gone": 1.0}), cache)
    verdicts.write(verdict("an old op", op="linear_gated"), cache)
    found = finding()
    assert found.level == "note"
    assert found.detail.startswith(
        f"3 calls of 2 ops on {name}, made 2026-05-01 to 2026-05-03; 7 files in {cache} are ignored: made with"
    )
    assert found.detail.endswith("; run dit4dit tune")
    for reason in (
        "'1.0', here it is",
        "a file is not a verdict (2)",
        "no implementation 'gone'",
        "no op 'linear_gated'",
    ):
        assert reason in found.detail


def test_many_reasons_stay_one_line(cache: Path) -> None:
    for i in range(20):
        verdicts.write(verdict(f"call {i}", place={"device": f"GPU {i}"}), cache)
    assert "20 files in" in finding().detail
    assert finding().detail.endswith("(1); and 14 other reasons; run dit4dit tune")


def test_the_command_shows_the_table_and_has_it_in_its_json(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "SHOWN", 3)
    monkeypatch.setattr(doctor, "_self_test", lambda: doctor.Finding("self test", "ok", "left out here"))
    for call in ("a", "b", "c", "d"):
        verdicts.write(verdict(f"call {call}"), cache)
    verdicts.write(verdict("alone", op="linear", ms={"torch": 0.125}), cache)
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--json", str(tmp_path / "doctor.json")])
    assert end.value.code in (0, None)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    header = lines.index(["op", "device", "call", "chosen", "ms", "runner-up", "ms", "measured"])
    assert lines[header + 2] == ["preprocess", "cpu", "call", "a", "torch", "0.2500", "cpp", "0.5000", "here"]
    assert ["and", "2", "more", "calls:", "--json", "FILE", "has", "them", "all"] in lines
    data = json.loads((tmp_path / "doctor.json").read_text())
    by_op = {o["op"]: o for o in data["ops"]}
    assert [one["call"] for one in by_op["preprocess"]["measured"]] == ["call a", "call b", "call c", "call d"]
    (alone,) = by_op["linear"]["measured"]
    assert (alone["chosen"], alone["runner_up"], alone["ms"], alone["shipped"]) == (
        "torch",
        None,
        {"torch": 0.125},
        None,
    )
    assert (by_op["linear"]["note"], by_op["linear_gelu"]["note"]) == (None, verdicts.NOT_YET)
    assert NAME in [f["what"] for f in data["findings"]]


def test_what_came_from_another_machine_is_marked(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"preprocess: a call": {"chosen": "cuda", "ms": {"cuda": 0.01, "torch": 0.2}}}
    shipped = {"device": "NVIDIA H200", "source": "nvidia-h200.json", "calls": calls}
    monkeypatch.setattr(verdicts, "shipped_for", lambda device: shipped)
    assert finding().detail.endswith("run dit4dit tune; until then 1 calls as on NVIDIA H200")
    (explained,) = [o for o in doctor._ops() if o["op"] == "preprocess"]
    result = {"findings": [], "ops": [explained], "healthy": True, "python": "3", "platform": "Linux"}
    assert ["0.0100", "torch", "0.2000", "nvidia-h200.json"] in [
        line.split()[-4:] for line in doctor.show(result).splitlines()
    ]


@pytest.mark.serial
def test_five_hundred_files_cost_less_than_a_second(cache: Path) -> None:
    def taken(examine: Callable[[], Any]) -> float:
        begin = time.thread_time()
        examine()
        return time.thread_time() - begin

    def examine() -> None:
        doctor._measured()
        doctor._ops()

    examine()
    for i in range(500):
        verdicts.write(verdict(f"bfloat16[1x{i}x2048], bfloat16[6144x2048], None"), cache)
    assert taken(examine) < 1
    assert finding().detail.startswith("500 calls of 1 ops")


def test_each_kind_of_gpu_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stub of what torch says of GPUs: two of one kind, and one of another."""
    gpus = ["NVIDIA H200", "NVIDIA H200", "NVIDIA GeForce RTX 5090"]

    def properties(device: torch.device) -> SimpleNamespace:
        capability = (9, 0) if "H200" in gpus[device.index] else (12, 0)
        return SimpleNamespace(
            name=gpus[device.index], major=capability[0], minor=capability[1], multi_processor_count=132
        )

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpus[device.index])
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (properties(d).major, properties(d).minor))
    monkeypatch.setattr(sources, "driver", lambda: "580.82.07")
    place = verdicts.place(torch.device("cuda", 2))
    verdicts.write(verdict(place=place), verdicts.folder(torch.device("cuda", 2)))
    first, second = doctor._measured()
    count = len(verdicts.shipped("nvidia-h200", "9.0")["calls"])
    assert first.detail == f"NVIDIA H200: {verdicts.NOT_YET}; until then {count} calls as on NVIDIA H200"
    assert second.detail == "1 calls of 1 ops on NVIDIA GeForce RTX 5090, made 2026-05-01"
