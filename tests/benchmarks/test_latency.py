"""The latency benchmark: what it compares, what it refuses, what it writes."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dit4dit.benchmarks import agreement, budget_head, contenders, flops, latency, latency_report, roofline, sampling
from dit4dit.benchmarks.recording import Recording
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from dit4dit.checkpoints.weights import random_model
from dit4dit.cli import main
from dit4dit.engine import Engine
from dit4dit.engine.action_ode import Device, head_shape, plan
from dit4dit.errors import OutputError
from dit4dit.ops.action_ode import reference
from dit4dit.ops.dispatch import find
from dit4dit.presets import preset

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def measure(record: Recording | None = None, **wanted: object) -> dict:
    options = latency.Wanted(**wanted)
    return latency.measure(preset("tiny"), "tiny", options, device=CPU, dtype=torch.float32, record=record)


def test_command_writes_numbers_and_pictures(tmp_path: Path, capsys) -> None:
    out, report = tmp_path / "l.json", tmp_path / "report"
    words = ["--preset", "tiny", "--device", "cpu", "--baseline", "--chunks", "3", "--json", str(out)]
    with pytest.raises(SystemExit) as end:
        main(["bench", "latency", *words, "--report", str(report)])
    assert end.value.code == 0
    data = json.loads(out.read_text())
    assert {"ratio", "stages", "baseline", "engine", "machine"} <= set(data)
    assert set(data["stages"]["baseline"]) == set(latency.STAGES)
    assert set(data["stages"]["engine"]) == {"vae", "backbone", "action_head"}
    for who in ("engine", "baseline"):
        q = data[who]
        assert 0 < q["p50"] <= q["max"]
        assert q["samples"] == 3
        assert [q[name] for name in ("p95", "p99", "p999", "jitter")] == [None] * 4, "three samples show none of them"
        assert len(data["samples_ms"][who]) == 3
        assert data["share_of_measured_rate"][who] > 0
    pairs = [b / e for b, e in zip(data["samples_ms"]["baseline"], data["samples_ms"]["engine"], strict=True)]
    assert data["ratio"]["total"] == pytest.approx(sorted(pairs)[1], rel=1e-3)  # the samples are rounded
    assert data["complete"] is True
    assert data["cut"] is None
    assert data["agreement"]["actions"] <= data["agreement"]["limit"]
    assert set(data["setup_seconds"]) == set(latency.SETUP) - {"exact engine"}
    for name in ("histogram", "in_time", "stages", "roofline"):
        assert Image.open(report / f"{name}.png").size[0] > 500
    roof = data["roofline"]
    assert {(p["who"], p["stage"]) for p in roof["points"]} == {
        (who, stage) for who, stages in data["stages"].items() for stage in stages
    }
    for p in roof["points"]:
        assert p["gflop_per_s"] == pytest.approx(p["gflop"] / data["stages"][p["who"]][p["stage"]] * 1e3)
        assert p["intensity"] == pytest.approx(p["gflop"] / p["gbytes"])
        assert p["roof_gflop_per_s"] == pytest.approx(
            min(roof["matrix_gflops"], roof["memory_gb_per_s"] * p["intensity"])
        )
        assert p["share_of_roof"] == pytest.approx(p["gflop_per_s"] / p["roof_gflop_per_s"])
    work = {who: sum(p["gflop"] for p in roof["points"] if p["who"] == who) for who in ("engine", "baseline")}
    counts = flops.count(preset("tiny"))
    assert work["engine"] == pytest.approx(counts["executed"]["total"])
    assert work["baseline"] == pytest.approx(counts["published"]["total"])
    page = (report / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "published / engine" in capsys.readouterr().out


def test_the_engine_alone_gives_its_percentiles() -> None:
    options = dict(chunks=1, baseline=False, text=False, seed=0, engine_chunks=5, roofline=False)
    result = measure(**options)
    assert result["roofline"] is None
    alone = result["engine_alone_ms"]
    assert len(alone) == 5
    assert result["engine"]["p50"] == pytest.approx(sorted(alone)[2], rel=1e-3)
    assert len(result["samples_ms"]["engine"]) == 1


def test_without_baseline(tmp_path: Path) -> None:
    result = measure(chunks=1, baseline=False, text=True, seed=0)
    assert result["ratio"] is None
    assert "baseline" not in result
    assert {p["who"] for p in result["roofline"]["points"]} == {"engine"}


def test_the_head_is_counted_in_its_own_dtype() -> None:
    tiny = preset("tiny")
    shared = {"matrix_gflops": 100.0, "memory_gb_per_s": 10.0, "head_dtype": torch.float32, "text": False}
    stages = {"engine": {"vae": 1.0, "backbone": 1.0, "action_head": 1.0}}
    wide, narrow = (
        {p["stage"]: p for p in roofline.points(tiny, flops.count(tiny), stages, dtype=dtype, **shared)["points"]}
        for dtype in (torch.float32, torch.bfloat16)
    )
    for stage, factor in (("vae", 2), ("backbone", 2), ("action_head", 1)):
        assert wide[stage]["gbytes"] == pytest.approx(factor * narrow[stage]["gbytes"])
    assert narrow["action_head"]["dtype"] == "float32"


def against_baseline(record: Recording) -> None:
    measure(record, chunks=1, baseline=True, text=False, seed=0)


def test_a_mismatch_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = contenders.Published.sample
    monkeypatch.setattr(contenders.Published, "sample", lambda *given: torch.ones_like(right(*given)))
    record = Recording(None)
    with pytest.raises(RuntimeError, match="not timed"), record:
        against_baseline(record)
    assert not set(latency.TIMES) & set(record.result)
    assert record.result["cut"]["during"] == "check"


def test_a_mismatch_says_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The plan's actions, the features, and the head by itself, each against the published schedule."""
    out = tmp_path / "l.json"
    right = Engine.actions_behind
    for broken, good in (("action_head", ("features", "plan")), ("features", ("action_head", "plan"))):
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "check_folding", lambda self: None)
            if broken == "features":
                whole = Engine.from_moments
                patch.setattr(Engine, "from_moments", lambda *given, whole=whole: whole(*given) * 1.5)
            else:
                patch.setattr(Engine, "actions_behind", lambda *given: right(*given) * 1.5)
            with pytest.raises(RuntimeError, match="not timed"), Recording(out) as record:
                against_baseline(record)
        found = json.loads(out.read_text())["agreement"]
        assert found[broken] > 0.1, broken
        assert max(found[name] for name in good) < found["limit"], broken
        assert found["actions"] > found["limit"]


def test_actions_that_are_no_numbers_are_written_as_such(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "l.json"
    monkeypatch.setattr(Engine, "check_folding", lambda self: None)
    right = Engine.actions_behind
    monkeypatch.setattr(Engine, "actions_behind", lambda *given: right(*given) * float("nan"))
    with pytest.raises(RuntimeError, match="expected finite numbers"), Recording(out) as record:
        against_baseline(record)
    data = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert data["agreement"]["actions"] is None
    assert data["agreement"]["features"] < 1e-4
    assert data["cut"]["by"].startswith("WrongActions: actions: expected finite numbers")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference in the place of the kernel of a head in one launch, which needs a GPU."""
    known = find("action_ode").implementations
    stand_in = replace(known["cuda"], refuse=lambda *_: None, run=reference)
    monkeypatch.setitem(known, "cuda", stand_in)
    monkeypatch.setattr("dit4dit.engine.action_ode.program.OneLaunchHead.refuse_any", lambda _: None)


def measure_one_launch(**changes):
    options = dict(chunks=1, baseline=False, text=False, seed=0, head="one_launch", roofline=False) | changes
    return measure(**options)


def test_one_launch_is_held_to_the_library_where_there_is_no_baseline(
    kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = plan(
        head_shape(preset("tiny").model.head, batch=1, context=4, prefix=True, steps=4), Device(9, 99 << 10, 80)
    )
    monkeypatch.setattr("dit4dit.engine.action_ode.program.OneLaunchHead.schedules", [schedule])
    result = measure_one_launch()
    assert (result["head"], result["one_launch"]) == ("one_launch", [budget_head.facts(schedule)])
    assert result["one_launch"][0]["teams"] == schedule.teams > 1
    assert measure_one_launch(head="library")["one_launch"] is None
    right = Engine._one_launch
    monkeypatch.setattr(Engine, "_one_launch", lambda *given: right(*given) * 1.5)
    with pytest.raises(RuntimeError, match=r"engine and the engine with head='library' differ by .* not timed"):
        measure_one_launch()
    monkeypatch.setattr(Engine, "_one_launch", lambda *given: right(*given) * float("nan"))
    with pytest.raises(RuntimeError, match=r"expected finite numbers, got .* not timed"):
        measure_one_launch()


def test_no_times_where_a_launch_failed(kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a graph nobody reads the flag but the benchmark, after all launches."""
    monkeypatch.setattr("dit4dit.engine.action_ode.program.OneLaunchHead.capturing", True)

    def failed(_self):
        raise OutputError("action_ode: block 3 waited")

    monkeypatch.setattr("dit4dit.engine.action_ode.program.OneLaunchHead.check", failed)
    with pytest.raises(OutputError, match="block 3 waited"):
        measure_one_launch()


def test_the_head_that_is_asked_for_runs_or_says_why_not(tmp_path: Path, capsys) -> None:
    out = tmp_path / "l.json"
    words = [
        "bench",
        "latency",
        "--preset",
        "tiny",
        "--device",
        "cpu",
        "--chunks",
        "1",
        "--no-roofline",
        "--json",
        str(out),
    ]
    with pytest.raises(SystemExit) as end:
        main([*words, "--head", "one_launch"])
    assert end.value.code == 2
    assert "engine head: 'one_launch' refused: it is on cpu" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main([*words, "--head", "library", "--head-dtype", "bfloat16", "--baseline", "--no-text"])
    assert end.value.code == 0
    data = json.loads(out.read_text())
    assert (data["head"], data["head_dtype"], data["dtype"]) == ("library", "bfloat16", "float32")


def test_fp8_is_timed_with_its_error_beside_it(tmp_path: Path, capsys) -> None:
    out = tmp_path / "l.json"
    words = ["--preset", "tiny", "--device", "cpu", "--chunks", "1", "--baseline", "--no-text", "--quantization", "fp8"]
    with pytest.raises(SystemExit) as end:
        main(["bench", "latency", *words, "--no-roofline", "--json", str(out)])
    assert end.value.code == 0
    data = json.loads(out.read_text())
    assert data["quantization"] == "fp8"
    assert 0.005 < data["error"]["features"]["rms"] < 0.1
    assert "fp8 against the exact engine, rms: features" in capsys.readouterr().out


def test_fp8_that_is_far_off_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "QUANTISED", 1e-3)
    options = dict(chunks=1, baseline=False, text=False, seed=0, quantization="fp8")
    with pytest.raises(RuntimeError, match=r"quantised and exact features differ by .* not timed"):
        measure(**options)


@pytest.mark.parametrize("text", [True, False])
def test_the_baseline_does_all_the_published_work(text: bool) -> None:
    """Counted while it runs, the text encoder's output matrix for logits that nobody reads included."""
    config = preset("tiny").model
    model = random_model(config, 0, with_text=text)
    inputs = contenders.Inputs.random(config, 2, 0, CPU, text=text)
    published = contenders.Published(model)
    clock = contenders.Clock(CPU)
    published.sample(inputs, clock)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        published.sample(inputs, clock)
    counts = flops.count(preset("tiny"))["published"]
    want = counts["total"] - (0.0 if text else counts["text_encoder"])
    assert counter.get_total_flops() / 1e9 == pytest.approx(want, rel=0.01)


def test_a_result_from_before_the_rule_shows_no_quantile_that_it_cannot_know(tmp_path: Path) -> None:
    """Committed results hold a p99 of 20 samples."""
    data = json.loads((ROOT / "benchmarks" / "results" / "nvidia-h200.json").read_text())["ratio_libero"]
    few = data["baseline"]
    assert (few["samples"], few["p99"] is None) == (20, False)
    shown = latency.rows(data)[1]
    assert shown[1:8] == ["140.15", "223.85", "-", "-", "238.58", "-", "20"]
    page = latency_report.write(tmp_path / "a.html", data).read_text()
    assert "<td>140.15</td><td>223.85</td><td>-</td><td>-</td><td>238.58</td><td>-</td><td>20</td>" in page


def finished_blocks(data: dict, out: Path) -> None:
    """What any file of a run holds that was ended after its first block."""
    for who, key in (("engine", "engine_alone_ms"),):
        assert data[who]["samples"] == len(data[key])
        assert data[who]["max"] == pytest.approx(max(data[key]), abs=1e-3)
    assert data["slowest"][0]["ms"] == pytest.approx(max(data["engine_alone_ms"]))
    assert data["machine"]["torch"]
    assert {"fold", "plan", "first_chunk"} <= set(data["cold_start_seconds"])
    page = latency_report.write(out, data).read_text()
    assert "Cut short" in page


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_leaves_what_it_has(how: int, tmp_path: Path) -> None:
    """At moments of the set-up and of the samples; the file is whole JSON each time."""
    out = tmp_path / "l.json"
    words = ["--preset", "tiny", "--device", "cpu", "--engine-chunks", "100000", "--baseline", "--json", str(out)]
    command = [sys.executable, "-m", "dit4dit", "bench", "latency", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for blocks, wait in ((0, 0.0), (1, 0.0), (2, 0.27)):
        out.unlink(missing_ok=True)
        seen, data = 0, {}
        # away from here, where the source tree would be taken for the package
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, cwd=tmp_path)
        end = time.monotonic() + 120
        while time.monotonic() < end and process.poll() is None:
            if out.exists():
                data = json.loads(out.read_text())  # never half of it
                seen = len(data.get("engine_alone_ms") or [])
                if data["cut"]["during"] == "model" if blocks == 0 else seen >= blocks:
                    break
            time.sleep(0.02)
        time.sleep(wait)
        process.send_signal(how)
        code = process.wait(timeout=60)
        assert code == (143 if how == signal.SIGTERM else -signal.SIGKILL)
        after = json.loads(out.read_text())
        assert after["complete"] is False
        assert after["cut"]["by"] == ("SIGTERM" if how == signal.SIGTERM else "killed")
        assert after["cut"]["left"][-2:] == ["pairs", "roofline"]
        if blocks == 0:
            assert after["cut"]["during"] in latency.SETUP
            assert "engine" not in after
        else:
            assert after["cut"]["during"] == "engine alone"
            assert len(after["engine_alone_ms"]) >= seen
            finished_blocks(after, tmp_path / "page.html")


def test_the_time_ends_it_and_each_part_has_its_share(tmp_path: Path, capsys) -> None:
    out, page = tmp_path / "l.json", tmp_path / "page.html"
    words = ["--preset", "tiny", "--device", "cpu", "--engine-chunks", "100000", "--chunks", "1000", "--no-text"]
    words += ["--baseline", "--at-hz", "5", "--seconds", "4", "--json", str(out), "--report", str(page)]
    with pytest.raises(SystemExit) as end:
        main(["bench", "latency", *words])
    assert end.value.code == 0
    data = json.loads(out.read_text())
    assert data["complete"] is False
    assert data["cut"]["by"] == "seconds"
    assert [left.partition(":")[0] for left in data["cut"]["left"]] == ["engine alone", "at 5 Hz", "chunks"]
    finished_blocks(data, page)
    assert data["ratio"]["total"] > 0
    assert data["roofline"]["points"]
    spaced = data["spaced"]
    assert len(spaced["samples_ms"]) == len(spaced["starts_s"]) == spaced["samples"]
    for start in spaced["starts_s"]:  # on the schedule, whatever was missed
        assert start * 5 - int(start * 5 + 1e-3) < 0.9
    assert all(b - a > 0.1 for a, b in zip(spaced["starts_s"], spaced["starts_s"][1:], strict=False))
    assert spaced["late_ms"]["p50"] < 50
    said = capsys.readouterr().out
    assert "engine at 5 Hz" in said
    assert "--seconds left out: engine alone" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["l.json", "page.html"]
    assert page.read_text().count("data:image/png;base64,") == 4


class FakeTime:
    """A clock that only sleeping and chunks move on."""

    def __init__(self, chunks: list[float]) -> None:
        self.now, self.chunks = 100.0, chunks

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def chunk(self, i: int = 0) -> None:
        self.now += self.chunks[i]


@pytest.mark.parametrize(
    ("chunks", "starts", "missed"),
    [
        ([0.04] * 4, [0.0, 0.1, 0.2, 0.3], 0),
        ([0.04, 0.13, 0.04, 0.04], [0.0, 0.1, 0.3, 0.4], 1),  # the slot at 0.2 is missed; no burst after it
        ([0.35, 0.04, 0.04], [0.0, 0.4, 0.5], 3),
        ([0.15] * 3, [0.0, 0.2, 0.4], 3),
    ],
)
def test_a_late_chunk_does_not_shift_those_after_it(
    monkeypatch: pytest.MonkeyPatch, chunks: list[float], starts: list[float], missed: int
) -> None:
    fake = FakeTime(chunks)
    monkeypatch.setattr(sampling, "time", fake)
    monkeypatch.setattr(sampling, "clocks", lambda work: None)
    sampler = sampling.Sampler(None, 0, Recording(None), lambda: None)  # type: ignore[arg-type]
    monkeypatch.setattr(sampler, "chunk", fake.chunk)
    sampler.spaced(10.0, len(chunks), None)
    spaced = sampler.samples.spaced
    assert spaced is not None
    assert spaced.starts == pytest.approx(starts)
    assert spaced.seconds == pytest.approx(chunks)
    assert spaced.missed == missed


def test_collections_are_counted_while_a_sample_is_taken() -> None:
    found = sampling.Collections()
    with found.watched():
        gc.collect()
        found.sample = ("engine_alone", 7)
        gc.collect()
        gc.collect(0)
        found.sample = None
        gc.collect()
    gc.collect()
    result = found.result()
    assert {g: c["count"] for g, c in result["by_generation"].items()} == {"0": 1, "2": 1}
    assert [(f["part"], f["sample"]) for f in result["full"]] == [("engine_alone", 7)]


def test_the_slowest_samples_keep_their_places() -> None:
    found = sampling.slowest([float(i) for i in range(30)])
    assert [f["sample"] for f in found] == list(range(29, 9, -1))


def test_a_report_that_cannot_be_drawn_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(latency, "measure", lambda *given, **options: pytest.fail("measured"))
    with pytest.raises(SystemExit) as end:
        main(["bench", "latency", "--preset", "tiny", "--device", "cpu", "--report", str(tmp_path / "a.html")])
    assert end.value.code == 2
    assert "matplotlib cannot be imported" in capsys.readouterr().err


def test_without_turns_there_are_the_percentiles_alone(tmp_path: Path) -> None:
    options = dict(chunks=0, baseline=True, text=False, seed=0, engine_chunks=3)
    result = measure(**options)
    assert result["engine"]["samples"] == 3
    assert (result["ratio"], result["stages"], result["samples_ms"]) == (None, {}, {})
    assert result["agreement"]["actions"] < 1e-4
    assert result["share_of_measured_rate"]["engine"] > 0
    assert latency.rows(result)[0][0] == "engine"
    assert latency_report.write(tmp_path / "a.html", result).is_file()


def test_a_page_of_next_to_nothing(tmp_path: Path) -> None:
    """A run that was killed in its set-up."""
    start = {"preset": "tiny", "dtype": "float32", "cut": {"by": "killed", "during": "model", "left": ["engine"]}}
    page = latency_report.write(tmp_path / "a.html", start).read_text()
    assert "killed" in page
    assert "<p>milliseconds per chunk" in page
    # what is not known of a machine is left out
    start["machine"] = {
        "cpu": "x",
        "torch": "2.13",
        "torch_threads": 2,
        "dit4dit": "0.1",
        "commit": None,
        "gpu_driver": None,
    }
    page = latency_report.write(tmp_path / "a.html", start).read_text()
    assert "<p>torch 2.13, threads 2, dit4dit 0.1; milliseconds" in page
    assert "None" not in page
    assert latency.rows(start) == []
