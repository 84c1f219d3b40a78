"""`dit4dit bench budget` as a command: what it prints and writes, and files of GPUs and of results that are wrong."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dit4dit.benchmarks import budget_gpu

from dit4dit.cli import main

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
H200 = RESULTS / "nvidia-h200.json"


def run(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as end:
        main(["bench", "budget", *map(str, words)])
    return int(end.value.code or 0)


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The one line that it ends with."""
    assert run("--preset", "tiny", *words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.slow
@pytest.mark.parametrize("name", ["libero", "robocasa_gr1", "unitree_g1"])
def test_every_released_model_without_a_gpu(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "budget.json"
    assert run("--preset", name, "--head", "one_launch", "--gpu", "h100", "--json", out) == 0
    result = json.loads(out.read_text())
    assert (result["preset"], result["gpu"]) == (name, "NVIDIA H100 80GB HBM3")
    printed = capsys.readouterr().out
    for stage in ("copies", "noise", "preprocess", "vae", "backbone", "action_head", "outputs"):
        assert f"\n{stage} " in printed
        assert result["stages"]["today"][stage]["launches"] > 0
    assert all(row["us"] > 0 and row["stage"] for rows in result["launches"].values() for row in rows)
    head = result["one_launch_head"]
    assert (head["gpu"], head["stages"], head["steps"]) == (result["gpu"], 76, 4)
    lines = [line.split() for line in printed.splitlines()]
    for part in ("synchronisation", "staging", "products", "epilogues", "attention", "chain", "weights"):
        assert [part, f"{head['per_step_us'][part]:,.1f}", f"{head['us'][part]:,.1f}"] in lines
    for kind in ("encode", "encode_out", "project", "out", "mlp_in", "mlp_out", "decode_in", "decode_out"):
        assert f"\n{kind} " in printed
    assert "\nattend, features " in printed
    assert "\nattend + out, tokens " in printed
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("name"), "expected an object with 'name' and 'constants'"),
        (lambda d: d["constants"]["clock"].update(value=-1.0), "clock: expected a number above 0, got -1.0"),
        (lambda d: d["constants"]["clock"].update(value="fast"), "clock: expected a number above 0, got 'fast'"),
        (lambda d: d["constants"]["sms"].update(value=1.5), "sms: expected a whole number"),
        (lambda d: d["constants"]["triton_product"].update(value=[1.0]), "triton_product: expected 2 numbers above 0"),
        (lambda d: d["constants"]["clusters"].update(value=[66, 30]), "clusters: expected 3 numbers above 0"),
        (lambda d: d["constants"]["clusters"].update(value=[66, 30, 1.5]), "clusters: expected 3 whole numbers"),
        (lambda d: d["constants"]["clusters"].update(value=[66, 30, 5000]), "clusters: expected 1 to 1,024"),
        (lambda d: d["constants"]["head_hop"].update(value=0), "head_hop: expected a number above 0, got 0"),
        (lambda d: d["constants"]["clock"].pop("source"), "clock: expected an object with value, unit and source"),
        (lambda d: d["constants"].pop("clock"), "clock is missing; give all constants, or 'like'"),
        (lambda d: d["constants"].update(clocks=1), "'clocks': no such constant; did you mean 'clock'?"),
        (lambda d: d.update(like="b200"), "like: expected one of h200, h100, got 'b200'"),
        (lambda d: d.update(colour="green"), "'colour': no such key"),
        (lambda d: d.update(like=["h200"]), "like: expected one of h200, h100, got ['h200']"),
        (lambda d: d.update(name=" "), "name: expected the GPU's name in printable characters, got ' '"),
        (lambda d: d.update(name="a\x1b[31m"), "name: expected the GPU's name in printable characters"),
        (lambda d: d["constants"]["clock"].update(value=1e-320), "clock: expected 1e-09 to 1e+15"),
        (lambda d: d["constants"]["clock"].update(source=None), "clock: expected unit and source in words"),
        (lambda d: d["constants"]["sms"].update(value=10**30), "sms: expected 1 to 1,024"),
        (lambda d: d["constants"]["architecture"].update(value=9), "architecture: expected 80 to 129, got 9"),
        (lambda d: d["constants"]["shared_memory"].update(value=1), "shared_memory: expected 49,152 to"),
    ],
)
def test_a_wrong_gpu_file_says_where(change: Callable[[Any], Any], said: str, tmp_path: Path, capsys: Any) -> None:
    data = json.loads(budget_gpu.BUILT_IN.read_text())["gpus"]["h200"]
    change(data)
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(data))
    line = refused(capsys, "--gpu", file)
    assert str(file) in line
    assert said in line


def test_no_such_gpu(tmp_path: Path, capsys: Any) -> None:
    assert "--gpu 'h20': no such GPU; did you mean 'h200'?" in refused(capsys, "--gpu", "h20")
    assert str(tmp_path / "x.json") in refused(capsys, "--gpu", tmp_path / "x.json")
    for name in ("", "x" * 5000):
        assert "no such GPU; known: h200, h100, or a JSON file" in refused(capsys, "--gpu", name)


def test_wrong_measured_files(tmp_path: Path, capsys: Any) -> None:
    assert "nothing of tiny in it, only of 'libero', 'robocasa_gr1'" in refused(capsys, "--measured", H200)
    other = tmp_path / "other.json"
    other.write_text('{"rows": []}')
    assert f"--measured {other}: no times of stages in it" in refused(capsys, "--measured", other)
    other.write_text("not JSON")
    assert str(other) in refused(capsys, "--measured", other)
    assert "results are of one request, got --batch 4" in refused(capsys, "--measured", H200, "--batch", "4")


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"stages": [1]}, "a: stages: expected an object, got [1]"),
        ({"stages": {"engine": [1]}}, "a: stages: engine: expected an object, got [1]"),
        ({"stages": {"engine": {"vae": "fast"}}}, "a: stages.engine.vae: expected a time of at least 0, got 'fast'"),
        ({"stages": {"engine": {"vae": -1.0}}}, "a: stages.engine.vae: expected a time of at least 0, got -1.0"),
        ({"stages": {}, "engine": {"p50": float("nan")}}, "a: engine.p50: expected a time of at least 0, got nan"),
        ({"stage_us": {}, "replay_us": [1]}, "a: replay_us: expected an object, got [1]"),
        ({"stage_us": {}, "stages": {"outputs": 5}}, "a: stages: outputs: expected a list, got 5"),
        ({"stage_us": {}, "stages": {"outputs": [5]}}, "a: stages.outputs.0: expected an object, got 5"),
        (
            {"stage_us": {}, "stages": {"outputs": [{"us": "x"}]}},
            "a: stages.outputs.0.us: expected a time of at least 0",
        ),
        ({"stages": {}, "device": "cpu"}, "what it has of tiny is of a CPU"),
        ({"stages": {}, "dtype": "float32"}, "what it has of tiny is of a CPU, of another dtype than bfloat16"),
    ],
)
def test_a_measured_file_that_is_no_result_says_where(part: Any, said: str, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "suite.json"
    file.write_text(json.dumps({"a": {"preset": "tiny", "head": "library", "head_dtype": "bfloat16", **part}}))
    line = refused(capsys, "--measured", file)
    assert f"--measured {file}" in line
    assert said in line


def test_measured_times_stand_beside(tmp_path: Path, capsys: Any) -> None:
    times = {"vae": 0.5, "backbone": 0.75, "action_head": 1.25}
    part = {
        "preset": "tiny",
        "head": "library",
        "head_dtype": "float32",
        "stages": {"engine": times},
        "engine": {"p50": 3.0},
    }
    slower = {**part, "stages": {"engine": {name: 2 * ms for name, ms in times.items()}}}
    profile = {**part, "head_dtype": "bfloat16", "stage_us": {}, "replay_us": {"action_head": 1.0}}
    profile["stages"] = {"preprocess": [{"kernel": "philox_normal", "us": 6.5}, {"kernel": "Memcpy HtoD", "us": 5.25}]}
    file = tmp_path / "suite.json"
    file.write_text(json.dumps({"machine": {"gpu": "NVIDIA A100"}, "a": slower, "b": part, "c": profile}))
    page = tmp_path / "page.html"
    assert (
        run("--preset", "tiny", "--head", "library", "--head-dtype", "float32", "--measured", file, "--report", page)
        == 0
    )
    printed = capsys.readouterr().out
    for stage, us in (
        ("vae", "500.0"),
        ("backbone", "750.0"),
        ("action_head", "1,250.0"),
        ("noise", "6.5"),
        ("copies", "5.2"),
    ):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{stage} ")]
        assert line.endswith(f" {us}"), line
    assert next(line for line in printed.splitlines() if line.startswith("total")).endswith("3,000.0")
    assert "measured: 1,250.0 us" in page.read_text()
    said = "measured on another GPU: 'NVIDIA A100'; the predictions are for 'NVIDIA H200'"
    assert said in printed
    assert html.escape(said) in page.read_text()


def test_times_of_the_kernel_before_stand_apart(tmp_path: Path, capsys: Any) -> None:
    """A head in one launch without the facts of its launch was another kernel: its time is said, and is no time of this one."""
    before = {"preset": "tiny", "head": "one_launch", "head_dtype": "bfloat16", "engine": {"p50": 9.0}}
    before["stages"] = {"engine": {"vae": 0.5, "action_head": 4.5}}
    since = {**before, "one_launch": [{"teams": 15}], "engine": {"p50": 5.0}}
    since["stages"] = {"engine": {"vae": 0.625, "action_head": 0.75}}
    file = tmp_path / "suite.json"
    said = "measured of the kernel before, with barriers over all SMs: action_head 4,500.0 us (a)"

    def shown(head: str, **parts: Any) -> dict[str, str]:
        file.write_text(json.dumps(parts))
        assert (
            run("--preset", "tiny", "--head", head, "--head-dtype", "bfloat16", "--gpu", "h200", "--measured", file)
            == 0
        )
        printed = capsys.readouterr().out
        assert (said in printed) == (head == "one_launch")
        stages = printed.split("\nas chosen today")[0].splitlines()
        return {words[0]: words[-1] for words in map(str.split, stages)}

    times = shown("one_launch", a=before)
    assert (times["vae"], times["action_head"], times["total"]) == ("500.0", "-", "-")
    times = shown("one_launch", a=before, b=since)
    assert (times["vae"], times["action_head"], times["total"]) == ("500.0", "750.0", "5,000.0")
    assert shown("auto", a=before)["action_head"] == "-"
