"""Mistakes that are found before the minutes of work: nothing is loaded, measured or installed, and one line says what to do."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
from dit4dit.benchmarks import op_bench
from PIL import Image

from dit4dit import Policy, cli, doctor
from dit4dit.cli import main
from dit4dit.evaluation import parity_record

GONE = "/proc/no-such-folder/x"  # no user, root neither, can make it
STATE = dict.fromkeys(("x", "y", "z", "roll", "pitch", "yaw", "pad", "gripper"), 0.0)


@pytest.fixture
def place(tmp_path: Path, golden_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what commands are given; what takes long is not to be reached."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(name)
    Path("state.json").write_text(json.dumps(STATE))
    example = {"images": ["a.png", "b.png"], "state": "state.json", "instruction": "open it"}
    Path("examples.jsonl").write_text(json.dumps(example))
    Path("gone.jsonl").write_text(json.dumps({**example, "images": ["a.png", "gone.png"]}))
    Path("words.txt").write_text("open it")
    Path("file").touch()
    Path("folder").mkdir()
    Path("run").mkdir()
    Path("run", "run.json").touch()
    for name in ("libero_tiny", "lerobot_v3"):
        Path(name).symlink_to(golden_dir / name)

    def long(*words: object, **options: object) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(Policy, "from_pretrained", long)
    monkeypatch.setattr(doctor, "examine", long)
    monkeypatch.setattr(op_bench, "run", long)
    monkeypatch.setattr(parity_record, "execute", long)
    monkeypatch.setattr("dit4dit.evaluation.parity.check", long)
    monkeypatch.setattr("dit4dit.data.check.check", long)
    return tmp_path


POLICY = "--checkpoint libero_tiny --device cpu"
ASK = f"predict {POLICY} --image a.png --image b.png --state state.json --instruction open"
CALIBRATE = f"calibrate {POLICY} --examples examples.jsonl --out new.json"
OPENLOOP = f"eval openloop lerobot_v3 {POLICY} --out new"
TABLETOP = f"eval tabletop {POLICY} --out new"
MISTAKES = {
    f"{ASK} --json folder": "--json folder: is a folder; give a file to write",
    f"{ASK} --json {GONE}": f"--json {GONE}: cannot be written (No such file or directory); give another file",
    f"{ASK} --json file/x": "--json file/x: cannot be written (Not a directory); give another file",
    f"{ASK} --plot {GONE}.png": f"--plot {GONE}.png: cannot be written",
    f"{ASK} --seed -1": "--seed: expected an integer in 0..2^64-1, got -1",
    f"{ASK} --image a.png": "--image: expected 2 (primary_image, wrist_image, in this order)",
    f"{ASK} --image folder": "folder: is a folder; give an image",
    f"{ASK} --state none.json": "none.json: no such file",
    f"{ASK} --embodiment lebero": "did you mean 'libero'?",
    f"{ASK} --checkpoint none": "checkpoint 'none': no such file or folder",
    f"{CALIBRATE} --out folder": "--out folder: is a folder; give a file to write",
    f"{CALIBRATE} --json {GONE}": f"--json {GONE}: cannot be written",
    f"{CALIBRATE} --examples gone.jsonl": "gone.png: no such file; an example names it",
    f"{CALIBRATE} --examples folder": "--examples folder: is a folder; give a file",
    f"{CALIBRATE} --seed -1": "--seed: expected an integer",
    f"pack {POLICY} --instructions folder --out new": "folder: is a folder; expected a file with one instruction a line",
    f"pack {POLICY} --instructions words.txt --out file": "--out file: is a file; give a folder",
    f"eval tabletop {POLICY} --embodiment tabletop --out file": "--out file: is a file; give a folder",
    f"{OPENLOOP} --episodes 99": "--episodes 99: lerobot_v3 has no such episode; it has 0 to 2",
    f"{OPENLOOP} --seed -1": "--seed: expected an integer",
    f"{OPENLOOP} --modality none.json": "--modality none.json: no such file; give another",
    f"{OPENLOOP} --robots folder": "--robots folder: is a folder; give a file",
    f"{TABLETOP}": "needs a policy for embodiment 'tabletop', got one for 'libero'",
    f"{TABLETOP} --embodiment tabletop --execute 9": "execute: expected 1 to 8",
    f"{TABLETOP} --batch 0": "batch: expected 1 to 16, got 0",
    f"{TABLETOP} --retries -1": "expected workers >= 1 and retries >= 0, got 4 and -1",
    f"eval tabletop {POLICY} --out run": "run: has a run already; continue it with --resume, or give another folder",
    f"data check lerobot_v3 --out {GONE}": f"--out {GONE}: cannot be written",
    "data check lerobot_v3 --modality folder": "--modality folder: is a folder; give a file",
    "stats lerobot_v3 --robot libero_franka --out folder": "--out folder: is a folder; give a file to write",
    "parity libero_tiny --json folder": "--json folder: is a folder; give a file to write",
    "parity libero_tiny --backend tritn": "did you mean 'triton'?",
    "parity run --record libero_tiny": "run: exists already; choose another folder or remove it first",
    f"parity {GONE} --record libero_tiny": f"{GONE}: not written",
    "parity new --record libero_tiny --seed -1": "--seed: expected an integer",
    f"bench ops --json {GONE}": f"--json {GONE}: cannot be written",
    "bench flops --json folder": "--json folder: is a folder; give a file to write",
    "bench rollout --json folder": "--json folder: is a folder; give a file to write",
    "bench stream --json folder": "--json folder: is a folder; give a file to write",
    "bench stream --report file": "--report file: is a file; give a folder",
    "bench stream --samples 1": "--samples: expected at least 2, got 1",
    "control watch --json folder": "--json folder: is a folder; give a file to write",
    "doctor --json folder": "--json folder: is a folder; give a file to write",
    "inspect libero_tiny --json folder": "--json folder: is a folder; give a file to write",
    f"serve {POLICY} --json folder": "--json folder: is a folder; give a file to write",
    "eval setup libero --json folder": "--json folder: is a folder; give a file to write",
    "eval compare run run --json folder": "--json folder: is a folder; give a file to write",
}


@pytest.mark.parametrize("words", MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_found_before_the_work(words: str, place: Path, capsys) -> None:
    before = {path.name for path in place.iterdir()}
    with pytest.raises(SystemExit) as end:
        main(words.split())
    found = capsys.readouterr()
    assert end.value.code == 2
    assert MISTAKES[words] in found.err
    assert found.err.count("\n") == 1
    assert found.out == ""
    assert {path.name for path in place.iterdir()} - before <= {"new", "data_check"}
    for made in {"new", "data_check"} - before:
        assert not Path(made).exists() or not any(Path(made).iterdir())


def test_every_command_with_a_json_file_looks_at_it_first() -> None:
    """By its source: a command that writes JSON at its end calls check_outputs, or has a Recording, which does."""
    commands = {**cli.COMMANDS, **cli.DATA, **cli.BENCHMARKS, **cli.evaluating.EVALUATIONS, **cli.controlling.CONTROL}
    late = []
    for name, command in commands.items():
        source = inspect.getsource(command)
        if "json" in inspect.signature(command).parameters and not (
            "check_outputs(" in source or "Recording(" in source
        ):
            late.append(name)
    assert not late
