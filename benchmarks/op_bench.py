"""What the benchmarks of single ops share: each times the calls that one step of the released models makes of its op.

The arguments are those of `kernels.calls`, filled with random numbers.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dit4dit.benchmarks.harness import assert_no_worse, quantiles, report, time_cpu, time_gpu
from dit4dit.benchmarks.kernels import calls
from torch import Tensor

from dit4dit import ops
from dit4dit.errors import BackendError
from dit4dit.ops.linear_fp8 import FP8


def fill(args: tuple[Any, ...], device: str, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    """Tensors without data -> random ones of the same shapes; bfloat16 becomes `dtype`. Matrices keep the size of rows."""

    def real(value: Any) -> Any:
        if value is torch.bfloat16:
            return dtype
        if not isinstance(value, Tensor):
            return value
        x = torch.randn(value.shape, generator=generator)
        if value.dtype == FP8:
            return (64 * x).to(device, FP8)  # a row of a matrix that fills e4m3's range
        if x.ndim == 2 and x.shape[0] > 3:  # a weight, not a table of one row a latent frame
            x /= x.shape[1] ** 0.5
        return x.to(device, dtype if value.dtype == torch.bfloat16 else value.dtype)

    return tuple(map(real, args))


def runnable(op: str, args: tuple[Any, ...]) -> dict[str, Callable[..., Any]]:
    """name -> call of each implementation that takes these arguments, "torch" among them."""
    found = {}
    for name in ops.implementations(op):
        fn = positional(op, name)
        try:
            fn(*args)
        except BackendError:
            continue
        found[name] = fn
    return found


def reference_of(op: str, name: str = "reference") -> Callable[..., Any]:
    """The reference of an op, or another function of its file."""
    found: Callable[..., Any] = getattr(importlib.import_module(f"dit4dit.ops.{op}"), name)
    return found


def positional(op: str, backend: str) -> Callable[..., Any]:
    """An implementation of an op that takes the arguments of its reference."""
    public = getattr(ops, op)
    if op != "euler_step":
        return partial(public, backend=backend)

    def run(x: Tensor, v: Tensor, dt: float, t: Any, previous: Any, weights: Any, most: Any) -> Tensor:
        got: Tensor = public(x, v, dt, t=t, previous=previous, weights=weights, max_guidance=most, backend=backend)
        return got

    return run


def bench(op: str, description: str | None) -> None:
    """The command line of one op's benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads on the CPU")
    parser.add_argument("--compile", action="store_true", help="time torch.compile of the reference too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write machine and rows here")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(args.seed)
    reference = reference_of(op)
    timer = time_gpu if args.device.startswith("cuda") else time_cpu
    rows: list[dict[str, Any]] = []
    for case, name, meta in calls(args.batch):
        if name != op:
            continue
        given = fill(meta, args.device, getattr(torch, args.dtype), generator)
        candidates = runnable(op, given)
        if args.compile:
            candidates["compile"] = torch.compile(reference, dynamic=False)
        found = {}
        with torch.no_grad():
            for candidate, fn in candidates.items():
                assert_no_worse(fn, reference, given, float32_limit=1e-5)
                found[candidate] = quantiles(timer(partial(fn, *given), samples=args.samples))
        for candidate, times in found.items():
            ratio = found["torch"]["p50"] / times["p50"]
            rows.append({"case": case, "implementation": candidate, "ratio": ratio, **times})
    report(f"{op} {args.dtype}", rows, args.json)
