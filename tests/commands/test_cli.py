"""The command line: results, files, and one clear line for each mistake."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from waiting import WAIT

from dit4dit import Noise, Policy
from dit4dit.cli import COMMANDS, main
from dit4dit.tables import table

STATE = {key: 0.1 * i for i, key in enumerate(("x", "y", "z", "roll", "pitch", "yaw", "pad", "gripper"))}


def run(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return int(end.value.code or 0)


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    files = {name: tmp_path / f"{name}.png" for name in ("primary", "wrist")}
    for file in files.values():
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
    files["state"] = tmp_path / "state.json"
    files["state"].write_text(json.dumps(STATE))
    return files


def predict_words(checkpoint: Path, files: dict[str, Path]) -> list[str | Path]:
    pictures: list[str | Path] = ["--image", files["primary"], "--image", files["wrist"]]
    return [
        "predict",
        "--checkpoint",
        checkpoint,
        *pictures,
        "--state",
        files["state"],
        "--instruction",
        "open it",
        "--device",
        "cpu",
    ]


def test_predict_writes_what_the_policy_says(
    small_libero: Path, inputs, libero_policy: Policy, tmp_path: Path, capsys
) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    words = predict_words(small_libero, inputs)
    assert run(*words, "--seed", "4", "--json", out, "--plot", plot) == 0
    data = json.loads(out.read_text())
    from dit4dit import Observation

    pictures = {f"{n}_image": np.asarray(Image.open(inputs[n])) for n in ("primary", "wrist")}
    chunk = libero_policy.infer(
        Observation(pictures, {k: np.float32([v]) for k, v in STATE.items()}), "open it", noise=Noise.from_seed(4)
    )
    assert np.allclose(data["actions"], chunk.actions, atol=1e-6)
    assert data["names"] == list(chunk.names)
    assert (data["control_hz"], data["seed"]) == (20.0, 4)
    assert "chunk" not in data
    assert Image.open(plot).size[0] > 400
    shown = capsys.readouterr().out
    assert f"{chunk.actions[3, 2]:+.4f}" in shown


def test_inspect_reports_sizes_and_conventions(golden_dir: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "inspect.json"
    assert run("inspect", golden_dir / "libero_tiny", "--json", out) == 0
    data = json.loads(out.read_text())
    parts = {p["part"]: p for p in data["parts"]}
    total = sum(
        t.numel() for t in torch.load(golden_dir / "libero_tiny/checkpoints/steps_10_pytorch_model.pt").values()
    )
    assert sum(p["parameters"] for p in parts.values()) == total
    assert parts["action head"]["dtypes"] == ["float32"]
    assert data["embodiment"] == "libero"
    assert data["shapes"]["features"] == [784, 64]
    text = capsys.readouterr().out
    for fact in (
        "primary_image | wrist_image",
        "224 x 448",
        "RGB",
        "sin(v), cos(v)",
        "min_max",
        "0 (close), else 1 (open)",
        "8 actions at 20 Hz",
        "'franka'",
    ):
        assert fact in text
    assert "wandb_project" in text


def test_json_goes_through_links_and_devices(golden_dir: Path, tmp_path: Path, capsys) -> None:
    target, link, pipe = tmp_path / "target.json", tmp_path / "link.json", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    words = ["inspect", golden_dir / "libero_tiny", "--json"]
    assert run(*words, link) == 0
    assert link.is_symlink()
    assert json.loads(target.read_text())["embodiment"] == "libero"
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    received: list[str] = []
    reader.start()
    assert run(*words, pipe) == 0
    reader.join(WAIT)
    assert json.loads(received[0])["embodiment"] == "libero"
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    capsys.readouterr()
    for bad, message in ((tmp_path, "is a folder"), (target / "below.json", "cannot be written (Not a directory)")):
        assert run(*words, bad) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
    assert {p.name for p in tmp_path.iterdir()} == {"target.json", "link.json", "pipe"}, "nothing half-written is left"


def test_inspect_refuses_a_robot_that_does_not_fit(golden_dir: Path, capsys) -> None:
    assert run("inspect", golden_dir / "libero_tiny", "--embodiment", "gr1") == 2
    assert "choose another embodiment" in capsys.readouterr().err


def test_inspect_without_a_known_robot_still_reports(libero_run: Path, capsys) -> None:
    config, file = libero_run / "config.yaml", libero_run / "dataset_statistics.json"
    config.write_text(config.read_text().replace("libero_all", "my_own_mix"))
    file.write_text(file.read_text().replace('"franka"', '"my_tag"'))
    assert run("inspect", libero_run) == 0
    assert "choose one with --embodiment" in capsys.readouterr().out
    assert run("inspect", libero_run, "--embodiment", "libero") == 0


def test_convert_there_and_back(golden_dir: Path, tmp_path: Path, capsys) -> None:
    own, back = tmp_path / "own", tmp_path / "back"
    assert run("convert", golden_dir / "gr1_tiny", own) == 0
    assert run("convert", own, back) == 0
    shown = capsys.readouterr().out
    assert "native format" in shown
    assert "published layout" in shown
    file = "checkpoints/steps_10_pytorch_model.pt"
    a, b = (torch.load(folder / file) for folder in (golden_dir / "gr1_tiny", back))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert run("convert", own, back) == 2
    assert "exists already" in capsys.readouterr().err


def test_doctor_is_healthy_here(tmp_path: Path, capsys) -> None:
    out = tmp_path / "doctor.json"
    assert run("doctor", "--json", out) == 0
    data = json.loads(out.read_text())
    assert data["healthy"] is True
    ops = {(o["op"], o["device"]): o for o in data["ops"]}
    assert ops["preprocess", "cpu"]["chosen"] == "cpp"
    assert any(f["what"] == "self test" and f["level"] == "ok" for f in data["findings"])
    assert "views[0] is on cpu" in ops["preprocess", "cpu"]["refused"]["cuda"]
    assert any("main memory" in f["what"] for f in data["findings"])
    assert "healthy" in capsys.readouterr().out


def test_doctor_tells_an_old_package_by_its_exit_code(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from dit4dit import doctor

    monkeypatch.setitem(doctor.PACKAGES, "numpy", "99")
    monkeypatch.setitem(doctor.PACKAGES, "no-such-package", "1")
    assert run("doctor") == 1
    shown = capsys.readouterr().out
    assert "at least 99 is needed" in shown
    assert "pip install no-such-package" in shown


@pytest.mark.parametrize(
    "size, wanted", [(4, "does not fit"), (10, "fits without its text encoder"), (25, "fits with its text encoder")]
)
def test_doctor_on_memory(size: int, wanted: str) -> None:
    from dit4dit import doctor

    (finding,) = doctor._fits("here", size * 2**30, 2)
    assert wanted in finding.detail


def float_picture(files: dict[str, Path]) -> list[str]:
    Image.fromarray(np.zeros((64, 64), np.float32)).save(files["primary"].with_suffix(".tiff"))
    files["primary"] = files["primary"].with_suffix(".tiff")
    return []


def grey_picture(files: dict[str, Path]) -> list[str]:
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(files["primary"])
    return []


def set_state(change):
    def apply(files: dict[str, Path]) -> list[str]:
        files["state"].write_text(json.dumps({**STATE, **change}))
        return []

    return apply


def text_state(files: dict[str, Path]) -> list[str]:
    files["state"].write_text("{not json")
    return []


def no_picture(files: dict[str, Path]) -> list[str]:
    files["wrist"] = files["wrist"].with_name("gone.png")
    return []


def not_a_picture(files: dict[str, Path]) -> list[str]:
    files["wrist"].write_text("hello")
    return []


MISTAKES = {
    "float picture": (float_picture, "expected an 8-bit RGB image, got mode F"),
    "grey picture": (grey_picture, "expected an 8-bit RGB image, got mode L"),
    "no picture": (no_picture, "gone.png: no such image"),
    "not a picture": (not_a_picture, "not a readable image"),
    "long state": (set_state({"x": [1.0, 2.0]}), "state 'x': expected 1 value, got 2"),
    "NaN in state": (set_state({"yaw": float("nan")}), "state 'yaw': has NaN"),
    "unknown state": (set_state({"yaww": 1}), "did you mean 'yaw'"),
    "state not JSON": (text_state, "not valid JSON"),
    "state is a folder": (lambda f: ["--state", str(f["state"].parent)], "is a folder; expected a file"),
    "plot of no kind": (lambda f: ["--plot", "out.xyz"], "expected a file ending in .png"),
    "words as numbers": (set_state({"x": "0.1"}), "state 'x': expected 1 numbers, got '0.1'"),
    "third picture": (
        lambda f: ["--image", str(f["primary"])],
        "expected 2 (primary_image, wrist_image, in this order)",
    ),
    "no such robot": (lambda f: ["--embodiment", "lebero"], "did you mean 'libero'"),
    "bad seed": (lambda f: ["--seed", "-1"], "expected an integer in 0..2^64-1, got -1"),
    "kernel on a CPU": (lambda f: ["--head", "one_launch"], "'one_launch' refused: it is on cpu"),
    "no such checkpoint": (lambda f: ["--checkpoint", "nowhere"], "no such file or folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_one_line_and_exit_code_2(golden_dir: Path, inputs, name: str, capsys) -> None:
    change, message = MISTAKES[name]
    extra = change(inputs)
    assert run(*predict_words(golden_dir / "libero_tiny", inputs), *extra) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert error.startswith("dit4dit: error: ")


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "doctor", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["doctor"])
    assert end.value.code == 130
    assert capsys.readouterr().err == "dit4dit: interrupted\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that must be absent")
def test_cuda_asked_for_and_absent(golden_dir: Path, inputs, capsys) -> None:
    words = predict_words(golden_dir / "libero_tiny", inputs)
    words[-1] = "cuda"
    assert run(*words) == 2
    assert "use --device cpu" in capsys.readouterr().err


def test_tables_are_as_wide_as_their_widest_cells() -> None:
    assert table(("name", "n", ""), [("a", 7, "x"), ("longest", 1234, "")], right=(1,)).splitlines() == [
        "name        n",
        "-------  ----  -",
        "a           7  x",
        "longest  1234",
    ]


def test_unknown_words(capsys) -> None:
    assert run("predct") == 2
    assert "did you mean 'predict'" in capsys.readouterr().err
    assert run("bench", "flop") == 2
    assert "did you mean 'flops'" in capsys.readouterr().err
    assert run("bench", "flops", "--preset", "libera") == 2
    assert "did you mean 'libero'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["bench", "--help"], ["predict", "--help"], [], ["train", "--help"]])
def test_help(words: list[str], capsys) -> None:
    assert run(*words) == 0
    assert "usage: dit4dit" in capsys.readouterr().out
