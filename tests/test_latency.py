"""The latency benchmark: what it compares, what it refuses, what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dit4dit.benchmarks import contenders, flops, latency, roofline
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from dit4dit.cli import main
from dit4dit.engine import Engine
from dit4dit.errors import OutputError
from dit4dit.model.weights import random_model
from dit4dit.presets import preset

CPU = torch.device("cpu")

pytestmark = pytest.mark.slow


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
        assert 0 < q["p50"] <= q["p95"] <= q["p99"] <= q["p999"] <= q["max"]
        assert q["jitter"] == pytest.approx(q["p999"] / q["p50"])
        assert len(data["samples_ms"][who]) == 3
        assert data["share_of_measured_rate"][who] > 0
    pairs = [b / e for b, e in zip(data["samples_ms"]["baseline"], data["samples_ms"]["engine"], strict=True)]
    assert data["ratio"]["total"] == pytest.approx(sorted(pairs)[1], rel=1e-3)  # the samples are rounded
    for name in ("histogram", "stages", "roofline"):
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
    options = dict(chunks=1, baseline=False, text=False, seed=0, engine_chunks=5)
    result = latency.measure(preset("tiny"), "tiny", device=CPU, dtype=torch.float32, **options)
    alone = result["engine_alone_ms"]
    assert len(alone) == 5
    assert result["engine"]["p50"] == pytest.approx(sorted(alone)[2], rel=1e-3)
    assert len(result["samples_ms"]["engine"]) == 1


def test_without_baseline(tmp_path: Path) -> None:
    result = latency.measure(
        preset("tiny"), "tiny", device=CPU, dtype=torch.float32, chunks=1, baseline=False, text=True, seed=0
    )
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


def test_a_mismatch_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders.Published, "sample", lambda self, inputs, clock: torch.ones_like(inputs.action))
    with pytest.raises(RuntimeError, match="not timed"):
        latency.measure(
            preset("tiny"), "tiny", device=CPU, dtype=torch.float32, chunks=1, baseline=True, text=False, seed=0
        )


def one_launch_head(choice, folded, config, steps, fp8=False):
    """A head in one launch whose op runs its reference, as no kernel runs here."""
    from dit4dit.action_ode.program import OneLaunchHead

    head = OneLaunchHead(folded, config, steps, fp8=fp8) if choice == "one_launch" else None
    if head is not None:
        head.backend = "torch"
    return head


def measure_one_launch(**changes):
    options = dict(chunks=1, baseline=False, text=False, seed=0, head="one_launch") | changes
    return latency.measure(preset("tiny"), "tiny", device=CPU, dtype=torch.float32, **options)


def test_one_launch_is_held_to_the_library_where_there_is_no_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit4dit.engine.engine.choose_head", one_launch_head)
    assert measure_one_launch()["head"] == "one_launch"
    right = Engine._one_launch
    monkeypatch.setattr(Engine, "_one_launch", lambda *given: right(*given) * 1.5)
    with pytest.raises(RuntimeError, match=r"engine and the engine with head='library' differ by .* not timed"):
        measure_one_launch()
    monkeypatch.setattr(Engine, "_one_launch", lambda *given: right(*given) * float("nan"))
    with pytest.raises(RuntimeError, match=r"expected finite numbers, got .* not timed"):
        measure_one_launch()


def test_no_times_where_a_launch_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a graph nobody reads the flag but the benchmark, after all launches."""
    monkeypatch.setattr("dit4dit.engine.engine.choose_head", one_launch_head)
    monkeypatch.setattr("dit4dit.action_ode.program.OneLaunchHead.capturing", True)

    def failed(_self):
        raise OutputError("action_ode: block 3 waited")

    monkeypatch.setattr("dit4dit.action_ode.program.OneLaunchHead.check", failed)
    with pytest.raises(OutputError, match="block 3 waited"):
        measure_one_launch()


def test_the_head_that_is_asked_for_runs_or_says_why_not(tmp_path: Path, capsys) -> None:
    out = tmp_path / "l.json"
    words = ["bench", "latency", "--preset", "tiny", "--device", "cpu", "--chunks", "1", "--json", str(out)]
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
        main(["bench", "latency", *words, "--json", str(out)])
    assert end.value.code == 0
    data = json.loads(out.read_text())
    assert data["quantization"] == "fp8"
    assert 0.005 < data["error"]["features"]["rms"] < 0.1
    assert "fp8 against the exact engine, rms: features" in capsys.readouterr().out


def test_fp8_that_is_far_off_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "QUANTISED", 1e-3)
    options = dict(chunks=1, baseline=False, text=False, seed=0, quantization="fp8")
    with pytest.raises(RuntimeError, match=r"quantised and exact features differ by .* not timed"):
        latency.measure(preset("tiny"), "tiny", device=CPU, dtype=torch.float32, **options)


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
