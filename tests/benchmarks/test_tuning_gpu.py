"""Tuning on a GPU: every call of a small model ends with a verdict, and plans run what the verdicts name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dit4dit.benchmarks import tuning
from dit4dit.benchmarks.compile_ahead import compile_ahead
from dit4dit.benchmarks.recording import Recording

from dit4dit import Noise
from dit4dit.checkpoints.weights import random_model
from dit4dit.engine import Engine, Plan, RequestShape
from dit4dit.engine.listing import calls, distinct, engine_without_data
from dit4dit.ops import launch, verdicts
from dit4dit.presets import preset

TINY = preset("tiny").model
SHAPE = RequestShape(1, ((40, 50), (30, 30)), (32, 32), "cv2_area", True, 9)


def chunk(engine: Engine) -> tuple[Plan, np.ndarray[Any, Any]]:
    """A plan, and its normalised actions of a fixed request."""
    plan = Plan(engine, SHAPE, torch.zeros(5, 5, dtype=torch.float64))
    generator = np.random.default_rng(0)
    views = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SHAPE.views]
    state = generator.normal(size=(1, 1, TINY.head.state_dim)).astype(np.float32)
    text = torch.from_numpy(generator.normal(size=(1, SHAPE.text_length, TINY.dit.text_in)).astype(np.float32))
    pack = engine.pack(text.to(engine.device))
    return plan, plan.run([views], state, [Noise.from_seed(0, 0)], [pack])[0]


@pytest.mark.gpu
def test_a_small_model_is_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a float32 head, which is never run in one launch: others use the GPU at the same time."""
    device = torch.device("cuda", 0)
    monkeypatch.setenv("DIT4DIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.delenv("TRITON_DISABLE_LINE_INFO", raising=False)
    listed = distinct(calls(engine_without_data(TINY, dtype=torch.bfloat16, head_dtype=torch.float32), SHAPE, 5))
    compiled = compile_ahead([call for call, _ in listed.values()], launch.architecture(device))
    assert compiled.refused == {}
    before = {path.parent.name for path in (tmp_path / "triton").glob("*/*.cubin")}

    todo = [tuning.Todo(op, args, count) for (op, args), count in listed.values()]
    with Recording(tmp_path / "tune.json") as record:
        result = tuning.tune(todo, device, record=record, limits=tuning.Limits(seconds=0.02))
    assert json.loads((tmp_path / "tune.json").read_text())["complete"] is True
    assert result["place"] == verdicts.place(device)
    found = {f"{one['op']}: {one['call']}": one for one in result["calls"]}
    assert found.keys() == listed.keys()
    for key, one in found.items():
        assert one["chosen"] in one["ms"], (key, one)
        assert one["why"]
        file = verdicts.read(Path(result["folder"]) / one["verdict"])
        assert isinstance(file, verdicts.Verdict), file
        assert (f"{file.op}: {file.call}", file.chosen) == (key, one["chosen"])
    # what ran there had been compiled: the kernels that were tried are those that were foreseen
    assert {path.parent.name for path in (tmp_path / "triton").glob("*/*.cubin")} == before

    model = random_model(TINY, 1, device=device, dtype=torch.bfloat16, head_dtype=torch.float32, with_text=False)
    _, wanted = chunk(Engine(model, tune="off", head="library"))
    plan, tuned = chunk(Engine(model))
    chosen: dict[str, set[str]] = {}
    for one in result["calls"]:
        chosen.setdefault(one["op"], set()).add(one["chosen"])
    assert all(set(ran) <= chosen[op] for op, ran in plan.ran.items()), plan.ran
    assert np.abs(tuned - wanted).max() <= 0.1 * np.abs(wanted).max()
    assert np.array_equal(chunk(Engine(model))[1], tuned)
