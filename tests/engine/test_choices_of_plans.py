"""A plan's choices: no file is opened and nothing looked up after its first run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from verdict_files import CPU, OTHER, put

from dit4dit import ops
from dit4dit.ops import verdicts
from dit4dit.ops.verdicts import Verdicts, call_text


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this CPU's verdicts, which is not there yet."""
    monkeypatch.setenv("DIT4DIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verdicts, "_said", set())
    return verdicts.folder(CPU)


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Files that are opened while `counting` has a list in it."""
    files: list[list[str]] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir") and files and files[0] is not None:
            files[0].append(str(args[0]))

    sys.addaudithook(hook)  # stays as long as the process
    found: list[str] = []
    files.append(found)
    yield found
    files.clear()


def test_after_a_plans_first_run_no_file_is_opened_and_nothing_looked_up(
    cache: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dit4dit.checkpoints.weights import random_model
    from dit4dit.engine import Engine, Plan, RequestShape
    from dit4dit.presets import preset

    engine = Engine(random_model(preset("tiny").model, 0))
    plan = Plan(engine, RequestShape(1, ((40, 40),), (32, 32), "cv2_area", True, 9), None)
    with ops.listing() as calls, torch.no_grad():
        plan.compute()
    op, args = next(call for call in calls if call[0] == "preprocess")
    put(cache, op=op, call=call_text(args)).rename(cache / verdicts.file_name(op, call_text(args)))

    plan = Plan(engine, RequestShape(1, ((40, 40),), (32, 32), "cv2_area", True, 9), None)
    opened.clear()
    with torch.no_grad():
        plan.rehearse()
    read = [name for name in opened if name.startswith(str(cache))]
    assert len(read) == len({(op, call_text(args)) for op, args in calls}), "once for each call"
    assert plan.ran["preprocess"] == {OTHER: 1}
    opened.clear()
    for name in ("choice", "_look", "_folder"):
        monkeypatch.setattr(Verdicts, name, None)
    monkeypatch.setattr(verdicts, "call_text", None)
    with torch.no_grad():
        for _ in range(3):
            plan.rehearse()
    assert opened == []
