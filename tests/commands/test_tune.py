"""`dit4dit tune`: what is asked of the measuring, what is printed and written of its result, and mistakes before any work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dit4dit.benchmarks import programmatic, tiles_search, tuning
from dit4dit.benchmarks.recording import Recording
from tuning_results import CALLS, call, result

from dit4dit.cli import main
from dit4dit.ops import dispatch, launch
from dit4dit.ops.verdicts import call_text


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the measuring is asked; it finds what "calls" holds."""
    seen: dict[str, Any] = {"calls": CALLS}

    def measure(todo: list[tuning.Todo], device: torch.device, *, record: Recording, **options: Any) -> dict[str, Any]:
        seen.update(todo=todo, device=device, **options)
        own = (
            "subject",
            "dtype",
            "head_dtype",
            "quantization",
            "steps",
            "batch",
            "images",
            "distinct",
            "complete",
            "cut",
        )
        found = result(seen["calls"])
        record.result |= {name: value for name, value in found.items() if name not in own}
        for _ in record.each(todo, "calls", name=lambda one: one.op):
            pass
        return record.result

    monkeypatch.setattr(tuning, "tune", measure)
    return seen


def run(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as end:
        main(["tune", *map(str, words)])
    return int(end.value.code or 0)


TINY = ("--preset", "tiny", "--device", "cpu")


def test_everything_is_printed_and_written(asked: dict[str, Any], tmp_path: Path, capsys) -> None:
    out, page = tmp_path / "r.json", tmp_path / "p.html"
    assert run(*TINY, "--batch", "1", "3", "--seed", "7", "--json", out, "--report", page) == 0
    assert (asked["device"], asked["seed"], tuple(asked["plugins"])) == (torch.device("cpu"), 7, ())
    texts = [f"{one.op}: {call_text(one.args)}" for one in asked["todo"]]
    assert len(set(texts)) == len(texts) > 60
    assert any("uint8[3x32x32x3]" in text for text in texts)
    assert all("bfloat16" not in text for text in texts), "float32 on a CPU"
    data = json.loads(out.read_text())
    assert data["complete"]
    assert data["calls"] == CALLS
    assert (data["subject"], data["dtype"], data["head_dtype"], data["batch"]) == (
        "preset tiny",
        "float32",
        "float32",
        [1, 3],
    )
    assert sum(data["distinct"].values()) == len(texts)
    assert CALLS[0]["call"] in page.read_text()
    shown = capsys.readouterr().out
    assert shown.startswith("preset tiny, float32, head float32, batch 1 3; ")
    assert f"{len(texts)} distinct op calls: " in shown
    assert f"wrote {page}" in shown
    assert "Triton kernels" not in shown, "there are none on a CPU"
    assert shown.splitlines()[-2:] == [
        "4 verdicts in /cache/verdicts/a-cpu",
        "Policy.from_pretrained, serve and bench latency use them: tune='cached' is the default (--tune off runs without)",
    ]


def test_on_a_gpu_kernels_are_compiled_first(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    """With a stand-in for the GPU: what is compiled is what is tried then."""
    compiled: list[Any] = []

    def compile_ahead(calls: list[Any], capability: str) -> SimpleNamespace:
        assert "todo" not in asked
        compiled.append((calls, capability))
        facts = {
            "kernels": 9,
            "shipped": 5,
            "compiled": 3,
            "refused": {"k": "too slow"},
            "processes": 2,
            "seconds": 4.2,
        }
        return SimpleNamespace(data=lambda: facts)

    monkeypatch.setitem(sys.modules, "dit4dit.benchmarks.compile_ahead", SimpleNamespace(compile_ahead=compile_ahead))
    monkeypatch.setattr("dit4dit.policy.device.pick_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(launch, "architecture", lambda device: "90")
    launched: list[dict[str, Any]] = []

    def whole_steps(subject: Any, wanted: Any, device: torch.device, **options: Any) -> None:
        assert options["record"].result["calls"] == CALLS, "after the ops, whose verdicts the steps follow"
        launched.append({"device": device, "requests": len(wanted), **options})

    monkeypatch.setattr(programmatic, "tune", whole_steps)
    page = tmp_path / "p.html"
    assert run("--preset", "tiny", "--head-dtype", "bfloat16", "--seed", "5", "--report", page) == 0
    (one,) = launched
    assert (one["device"], one["requests"], one["seed"], one["fp8"]) == (torch.device("cuda", 0), 3, 5, False)
    assert (one["dtype"], one["head_dtype"]) == (torch.bfloat16, torch.bfloat16)
    ((calls, capability),) = compiled
    assert capability == "90"
    assert calls == [(one.op, one.args) for one in asked["todo"]]
    assert {"philox_normal", "action_ode"} <= {op for op, _ in calls}
    said = "9 Triton kernels: 5 came with the package, 3 were compiled beforehand in 4 s, 1 do not compile"
    assert said in page.read_text()
    assert said in capsys.readouterr().out
    for unasked, other in ((("--ops", "adaln"), "90"), ((), "89")):
        asked.pop("todo")
        monkeypatch.setattr(launch, "architecture", lambda device, other=other: other)
        assert run("--preset", "tiny", *unasked) == 0
    assert launched == [one], "where all is asked for, on a GPU that has such launches"


def test_what_is_asked_for_is_listed(asked: dict[str, Any], small_libero: Path) -> None:
    words = ["--checkpoint", small_libero, "--device", "cpu", "--dtype", "bfloat16", "--head-dtype", "bfloat16"]
    words += ["--quantization", "fp8", "--steps", "2", "--image", "wrist_image=48x40", "--image", "primary_image=33x44"]
    assert run(*words) == 0
    texts = [f"{one.op}: {call_text(one.args)}" for one in asked["todo"]]
    assert texts[0].startswith("preprocess: (uint8[1x33x44x3], uint8[1x48x40x3]), (32, 32), 'cv2_area', bfloat16")
    assert any(text.startswith("linear_fp8: bfloat16") for text in texts)
    assert not any(text.startswith("linear: float32") for text in texts), "the head is in bfloat16"
    assert [one.count for one in asked["todo"] if one.op == "euler_step"] == [2, 0]
    assert run(*words, "--ops", "euler_step", "unnormalize") == 0
    assert [one.op for one in asked["todo"]] == ["euler_step", "unnormalize", "euler_step"]


def test_a_call_without_a_right_implementation_is_exit_code_1(asked: dict[str, Any], capsys) -> None:
    asked["calls"] = [*CALLS, call("linear", "float32[3]", 1, {}, {"torch": "differs between two runs"})]
    assert run(*TINY) == 1
    assert "linear: float32[3]: nothing is right" in capsys.readouterr().out


def test_seconds_that_are_over_are_said(asked: dict[str, Any], capsys) -> None:
    asked["calls"] = []
    assert run(*TINY, "--seconds", "1e-9", "--ops", "unnormalize") == 0
    shown = capsys.readouterr().out
    assert "\nCut short by --seconds; calls left out, which keep what they have: 1 unnormalize\n" in shown
    assert shown.endswith("no verdicts were written: policies run what earlier ones name, else the defaults\n")


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where Python finds modules; what they register is gone afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)
    monkeypatch.setattr(dispatch.find("linear"), "implementations", dict(dispatch.find("linear").implementations))
    yield tmp_path
    for name in set(sys.modules) - known:
        if name.startswith("plugin_"):
            del sys.modules[name]


PLUGIN = """
from dit4dit import ops
ops.register("linear", ops.Implementation("{name}", lambda *_: None, lambda x, w, b: x @ w.T))
"""


def test_plugins_are_imported_and_handed_on(asked: dict[str, Any], plugins: Path) -> None:
    (plugins / "plugin_a.py").write_text(PLUGIN.format(name="a"))
    (plugins / "plugin_b.py").write_text(PLUGIN.format(name="b"))
    assert run(*TINY, "--plugin", "plugin_a", "--plugin", "plugin_b") == 0
    assert tuple(asked["plugins"]) == ("plugin_a", "plugin_b")
    assert {"a", "b"} <= set(dispatch.implementations("linear"))
    assert run(*TINY, "--plugin", "plugin_a") == 0, "imported before"


@pytest.mark.parametrize(
    "text,message",
    [
        (
            None,
            "--plugin 'plugin_c': cannot be imported (ModuleNotFoundError: No module named 'plugin_c'); give a module that",
        ),
        ("1 / 0", "--plugin 'plugin_c': cannot be imported (ZeroDivisionError: division by zero)"),
        ("raise SystemExit('no GPU')", "--plugin 'plugin_c': cannot be imported (SystemExit: no GPU)"),
        (
            PLUGIN.format(name="torch"),
            "--plugin 'plugin_c': cannot be imported (BackendError: linear: an implementation is called",
        ),
        ("", "--plugin plugin_c: registers no implementation; call dit4dit.ops.register in it"),
    ],
)
def test_plugins_that_are_none(asked: dict[str, Any], plugins: Path, text: str | None, message: str, capsys) -> None:
    (plugins / "plugin_a.py").write_text(PLUGIN.format(name="a"))
    if text is not None:
        (plugins / "plugin_c.py").write_text(text)
    assert run(*TINY, "--plugin", "plugin_a", "--plugin", "plugin_c") == 2
    assert message in capsys.readouterr().err
    assert "todo" not in asked


def test_a_module_that_is_there_already_and_registers_nothing(asked: dict[str, Any], plugins: Path, capsys) -> None:
    assert run(*TINY, "--plugin", "json") == 2
    assert "--plugin json: registers no implementation" in capsys.readouterr().err


GONE = "/proc/no-such-folder/x"  # no user, root neither, can make it
MISTAKES = {
    "": "tune: expected --preset or --checkpoint, got neither; give one of them",
    "--preset tiny --checkpoint x": "tune: expected --preset or --checkpoint, got both; give one of them",
    "--preset tini": "preset 'tini': unknown; did you mean 'tiny'",
    "--checkpoint none": "checkpoint 'none': no such file or folder",
    "--preset tiny --backbone x": "--backbone: is of a checkpoint, and --preset is given; leave it out",
    "--preset tiny --embodiment gr1": "--embodiment: is of a checkpoint, and --preset is given",
    "--preset tiny --device tpu": "device 'tpu': expected auto, cpu, cuda or cuda:N",
    "--preset tiny --ops adalm": "--ops 'adalm': no such op; did you mean 'adaln'?",
    "--preset tiny --ops linear_fp8": "--ops linear_fp8: preset tiny does not call it",
    "--preset tiny --steps 3": "engine steps: expected one of (1, 2, 4, 8), got 3",
    "--preset tiny --batch 1 17": "batch: expected 1 to 16, got 17",
    "--preset tiny --batch 0": "--batch: expected at least 1, got 0",
    "--preset tiny --seed -1": "--seed: expected an integer in 0..2^63-1, got -1",
    "--preset tiny --seconds 0": "--seconds: expected seconds above 0, got 0.0",
    "--preset tiny --image wrist=3x4": "--image 'wrist=3x4': no such view; did you mean 'wrist_image'?",
    f"--preset tiny --json {GONE}": f"--json {GONE}: cannot be written",
    f"--preset tiny --report {GONE}.html": "--report /proc/no-such-folder: ",
    "--preset tiny --out x.json": "--out: is for the search for block sizes; give --tiles SECONDS too, or leave it out",
    "--preset tiny --whole": "--whole: is for the search for block sizes",
    "--preset tiny --samples 3": "--samples: is for the search for block sizes",
    "--preset tiny --tiles 3": "--preset and --tiles: expected one of them; search block sizes first, then",
    "--head-dtype bfloat16 --tiles 3": "--head-dtype and --tiles: expected one of them",
    "--seconds 3 --tiles 3": "--seconds and --tiles: expected one of them; --tiles says for how long it searches",
    "--tiles 0": "--tiles: expected seconds above 0, got 0",
    "--tiles 3 --device cpu": "--tiles: tiles are measured on the GPU that they are for, and ",
    "--tiles 3 --ops preproces": "--ops 'preproces': no op with tiles",
    f"--tiles 3 --json {GONE}": f"--json {GONE}: cannot be written",
}


@pytest.mark.parametrize("words", MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_found_before_any_work(
    words: str, asked: dict[str, Any], capsys, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*words.split()) == 2
    found = capsys.readouterr()
    assert MISTAKES[words] in found.err
    assert found.err.count("\n") == 1
    assert found.out == ""
    assert "todo" not in asked
    assert not list(tmp_path.iterdir())


def test_the_search_for_tiles_takes_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    seen: dict[str, Any] = {}

    def on_gpu(names: list[str], device: torch.device, batches: tuple[int, ...], seed: int) -> list[Any]:
        seen.update(names=names, batches=batches, seed=seed)
        return []

    def search(
        architecture: str, found: list[Any], measure: Any, *, record: Recording, write: Any
    ) -> tiles_search.Search:
        seen.update(samples=measure.keywords["samples"], seconds=record.remaining())
        return tiles_search.Search(architecture)

    monkeypatch.setattr(tiles_search, "check", lambda names, device: list(names))
    monkeypatch.setattr(tiles_search, "on_gpu", on_gpu)
    monkeypatch.setattr(tiles_search, "search_tiles", search)
    out = tmp_path / "own.json"
    words = ["--tiles", "50", "--device", "cpu", "--ops", "adaln", "--out", out, "--samples", "5", "--seed", "3"]
    assert run(*words) == 0
    assert 0 < seen.pop("seconds") <= 50
    assert seen == {"names": ["adaln"], "batches": (1, 16), "seed": 3, "samples": 5}
    assert f"to use it: export DIT4DIT_TILES={out}" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"own.json", "own.timings.json"}
    assert run(*words, "--batch", "2", "--whole", "--json", tmp_path / "t.json") == 0
    assert seen["batches"] == (2,)
    assert (tmp_path / "t.json").is_file()
    assert "replace dit4dit/ops/tiles.json with it" in capsys.readouterr().out
