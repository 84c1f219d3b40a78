"""`dit4dit calibrate` and the commands that use what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit4dit.cli import main
from dit4dit.engine import Calibration

STATE = {key: 0.1 * i for i, key in enumerate(("x", "y", "z", "roll", "pitch", "yaw", "pad", "gripper"))}


def run(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return int(end.value.code or 0)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with two pictures, a state, and two examples made of them."""
    rng = np.random.default_rng(0)
    for name in ("primary", "wrist"):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "state.json").write_text(json.dumps(STATE))
    lines = [
        {"images": ["primary.png", "wrist.png"], "state": "state.json", "instruction": "open it"},
        {"images": ["wrist.png", "primary.png"], "state": STATE, "instruction": "close it"},
    ]
    (tmp_path / "examples.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return tmp_path


def single(files: Path) -> list[str | Path]:
    pictures: list[str | Path] = ["--image", files / "primary.png", "--image", files / "wrist.png"]
    return [*pictures, "--state", files / "state.json", "--instruction", "open it"]


def test_calibrate_then_predict(small_libero: Path, files: Path, capsys) -> None:
    one, two, errors = files / "one.json", files / "two.json", files / "errors.json"
    words = ["calibrate", "--checkpoint", small_libero, "--device", "cpu", "--seed", "4"]
    assert run(*words, "--out", one, *single(files)) == 0
    assert run(*words, "--out", two, "--examples", files / "examples.jsonl", "--json", errors) == 0
    shown = capsys.readouterr().out
    assert "2 examples" in shown
    assert f"wrote {two}" in shown
    first, both = Calibration.load(one), Calibration.load(two)
    assert (first.samples, both.samples) == (1, 2)
    assert all(both.amax[name] >= value for name, value in first.amax.items()), "the first example is in both"
    assert any(both.amax[name] > value for name, value in first.amax.items())
    found = json.loads(errors.read_text())
    assert 0.01 < found["features"]["rms"] < 0.15
    assert f"{found['features']['rms']:.2e}" in shown

    predict = ["predict", "--checkpoint", small_libero, "--device", "cpu", *single(files), "--json"]
    exact, narrow = files / "exact_chunk.json", files / "fp8_chunk.json"
    assert run(*predict, exact) == 0
    assert run(*predict, narrow, "--quantization", "fp8", "--calibration", two) == 0
    want, got = (np.array(json.loads(f.read_text())["normalized"]) for f in (exact, narrow))
    assert 0.001 < np.linalg.norm(got - want) / np.linalg.norm(want) < 0.15


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "examples.jsonl:1: not valid JSON"),
        ("[]", r"examples.jsonl:1: expected {"),
        ('{"images": [], "words": "x"}', "got ['images', 'words']"),
        ('{"images": "a.png", "instruction": "x"}', "images: expected a list of file names"),
        ('{"images": [], "state": 3, "instruction": "x"}', "state: expected an object or a file name, got 3"),
        ('{"images": []}', "instruction: expected words, got None"),
        ('{"images": ["primary.png"], "instruction": "x"}', "expected 2 (primary_image, wrist_image, in this order)"),
        ("", "empty; expected one JSON object a line"),
    ],
)
def test_bad_examples(small_libero: Path, files: Path, capsys, line: str, message: str) -> None:
    (files / "examples.jsonl").write_text(line + "\n")
    words = ["calibrate", "--checkpoint", small_libero, "--device", "cpu", "--out", files / "o.json"]
    assert run(*words, "--examples", files / "examples.jsonl") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (files / "o.json").exists()


def test_bad_options(small_libero: Path, files: Path, capsys) -> None:
    words = ["calibrate", "--checkpoint", small_libero, "--device", "cpu", "--out", files / "o.json"]
    for more, message in (
        ([], "expected either --examples FILE, or --image"),
        (["--examples", files / "examples.jsonl", *single(files)], "expected either --examples FILE, or --image"),
        (["--examples", files / "gone.jsonl"], "gone.jsonl: no such file; give another"),
        (["--image", files / "primary.png"], "--instruction: expected what to do"),
    ):
        assert run(*words, *more) == 2
        assert message in capsys.readouterr().err
    assert run("predict", "--checkpoint", small_libero, *single(files), "--quantization", "fp8") == 2
    assert "make a file of them with dit4dit calibrate" in capsys.readouterr().err
