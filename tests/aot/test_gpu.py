"""On a GPU: what was compiled ahead of time gives the bits of what is compiled just in time, also inside a CUDA graph."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from dit4dit import ops
from dit4dit.ops.aot import loader
from dit4dit.ops.aot.specialization import Specialization

pytestmark = pytest.mark.gpu


def calls(device: str) -> list[tuple[str, tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    f32, k = torch.float32, normal(1, 2, 80, 64)
    row, norm = normal(2, 2048, dtype=f32), normal(128, dtype=f32)
    x, y = normal(1, 2, 294, 2048, dtype=f32), normal(1, 2, 294, 2048)
    return [
        ("adaln", (x, y, row, row, row, 1e-6, torch.bfloat16)),
        ("self_attention", (normal(1, 588, 3 * 2048), norm, norm, normal(2, 588, 128, dtype=f32), 16, 1e-5)),
        ("cross_attention", (normal(1, 9, 128), k, k, None, 2, 1e-5)),
        ("linear_gelu", (y, normal(8192, 2048), None, "none")),
        ("philox_normal", (torch.tensor([[3, 1, 0], [4, 1, 0]], device=device), ((2, (16, 3, 28, 28)), (1, (16, 29))))),
    ]


def run(op: str, args: tuple[Any, ...]) -> list[torch.Tensor]:
    with torch.no_grad():
        got = getattr(ops, op)(*args, backend="triton")
    return list(got) if isinstance(got, tuple) else [got]


@pytest.mark.capture
@pytest.mark.parametrize("n", range(5))
def test_same_bits(n, tmp_path, monkeypatch):
    from dit4dit.aot_build import compiler

    op, args = calls("cuda")[n]
    major, minor = torch.cuda.get_device_capability()
    chip = 10 * major + minor
    steps, _ = importlib.import_module(f"dit4dit.ops.{op}").launches(args, str(chip))
    monkeypatch.setenv(loader.VARIABLE, "off")
    wanted = run(op, args)
    build = compiler.build(tmp_path / "cubins", {chip: [Specialization.of(step) for step in steps]}, jobs=1)
    monkeypatch.delenv(loader.VARIABLE)
    monkeypatch.setattr(loader, "installed", lambda: build)
    monkeypatch.setattr(loader, "_loaded", {})
    got = run(op, args)
    assert len(loader._loaded) == len(build.kernels[f"sm_{chip}"]), "launched just in time"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(op, args)
    graph.replay()
    torch.cuda.synchronize()
    for a, b, c in zip(wanted, got, captured, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
