"""Calls to tune, and `tune` on a CPU in a folder of the test's own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dit4dit.benchmarks.recording import Recording
from dit4dit.benchmarks.tuning import Limits, Todo, tune

from dit4dit.config import HeadConfig
from dit4dit.engine.action_ode.program import OneLaunchHead
from dit4dit.engine.fold import fold_head
from dit4dit.model.action_head import ActionHead
from dit4dit.model.flow import GuidanceTensors
from dit4dit.ops import verdicts
from dit4dit.ops.dispatch import find, names

CPU = torch.device("cpu")
QUICK = Limits(trial=3, timing=20, seconds=0.05)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def product(rows: int) -> Todo:
    return Todo("linear", (meta(1, 5, 64), meta(rows, 64), meta(rows)))


def units(actions: int) -> Todo:
    return Todo("unnormalize", (meta(1, 16, actions), meta(5, actions, dtype=torch.float64)))


STEP = Todo("euler_step", (meta(1, 8, 8), meta(1, 8, 8), 0.25, None, None, None, None), 4)
GELU = Todo("linear_gelu", (meta(1, 2, 8, 64), meta(96, 64), None, "none"))
NORM = Todo("adaln", (meta(1, 2, 8, 64), None, None, None, None, 1e-6, torch.float32))
HUGE = Todo("linear", (meta(1, 1 << 24), meta(1 << 24, 1 << 24), None))


def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Verdicts in a folder of the test's own, and no stand-in after it."""
    monkeypatch.setenv("DIT4DIT_CACHE", str(tmp_path / "cache"))
    before = {op: dict(find(op).implementations) for op in names()}
    yield
    for op, implementations in before.items():
        find(op).implementations.clear()
        find(op).implementations.update(implementations)
    for plugin in ("standins", "standins_gpu"):
        sys.modules.pop(plugin, None)


def tuned(todo: list[Todo], path: Path | None = None, **options: Any) -> dict[str, Any]:
    options = {"limits": QUICK, "plugins": ["standins"], **options}
    with Recording(path) as record:
        return tune(todo, CPU, record=record, **options)


def folder() -> Path:
    return verdicts.folder(CPU)


def head_call(fp8: bool = False, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    """Arguments of `action_ode`."""
    config = HeadConfig(num_layers=2, num_heads=1, hidden_size=64, output_dim=64, action_dim=8, context_dim=64)
    with torch.device("meta"):
        head = OneLaunchHead(fold_head(ActionHead(config).to(dtype), 2), config, 2, fp8=fp8)
        noise = torch.empty(1, config.action_horizon, 8)
        context = torch.empty(1, 16, 2 * 64, dtype=dtype)
        guidance = GuidanceTensors(torch.empty_like(noise), torch.empty(noise.shape[1]), 5.0)
        return head, noise, context, torch.empty(1, 64, dtype=dtype), guidance
