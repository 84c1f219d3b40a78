"""action_ode: the whole head in one launch against its reference and, where there is a GPU, a CUDA graph of the reference.

python -m dit4dit.benchmarks.ops.bench_action_ode --device cuda --json result.json

Bytes are the blocks' weights, read once a step, and operations their products.
The kernel has not run on a chip yet: there is no result so far.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dit4dit.benchmarks import op_bench
from dit4dit.benchmarks.harness import machine, quantiles, time_cpu, time_gpu
from torch import Tensor

from dit4dit import ops
from dit4dit.action_ode.program import OneLaunchHead
from dit4dit.commands.report import write_json
from dit4dit.config import HeadConfig
from dit4dit.engine.fold import fold_head
from dit4dit.model.action_head import ActionHead

TOKENS = {9: (8, 784), 17: (16, 588), 51: (50, 392)}
"""Tokens with the state's -> action horizon and feature tokens of the released models."""


def config(horizon: int) -> HeadConfig:
    """The released heads."""
    return HeadConfig.dit_b(action_horizon=horizon)


def graph_of(fn: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`fn` captured in a CUDA graph, after a few runs that let the libraries choose."""
    for _ in range(3):
        fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fn()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def candidates(head: OneLaunchHead, args: tuple[Tensor, ...]) -> dict[str, Callable[[], Tensor]]:
    """name -> call: the reference, its graph, and the kernel and its graph where it takes the arguments."""
    eager = partial(ops.action_ode, head, *args, backend="torch")
    if args[0].device.type != "cuda":
        return {"eager": eager}
    found: dict[str, Callable[[], Tensor]] = {"eager": eager, "eager graph": graph_of(eager)}
    if head.refuse(*args[:3]) is None:
        kernel = partial(ops.action_ode, head, *args, backend="cuda")
        found |= {"cuda": kernel, "cuda graph": graph_of(kernel)}
    return found


@torch.no_grad()
def case(
    tokens: int,
    *,
    device: str,
    dtype: torch.dtype,
    samples: int,
    batch: int = 1,
    steps: int = 4,
    seed: int = 0,
    fp8: bool = False,
) -> list[dict[str, Any]]:
    """Rows of one number of tokens, as op_bench's: each candidate, once it agrees with the reference in float32."""
    horizon, features = TOKENS[tokens]
    torch.manual_seed(seed)
    head = ActionHead(config(horizon)).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    truth = OneLaunchHead(fold_head(head, steps), head.config, steps)
    columns = 2 * sum(block.cross for block in truth.folded.blocks) * head.config.width
    noise = torch.randn(batch, horizon, head.config.action_dim)
    exact = (noise, torch.randn(batch, features, columns), torch.randn(batch, head.config.width))
    want = ops.action_ode(truth, *exact, backend="torch")
    moved = OneLaunchHead(fold_head(head.to(device, dtype), steps), head.config, steps, fp8=fp8)
    given = (noise.to(device), *(t.to(device, dtype) for t in exact[1:]))
    plain = ops.action_ode(moved, *given, backend="torch")

    timer = time_gpu if device.startswith("cuda") else time_cpu
    found: dict[str, dict[str, float]] = {}
    wrong = {}
    for name, fn in candidates(moved, given).items():
        try:
            assert_near(name, fn(), plain, want, 4 if fp8 else 2)
        except AssertionError as error:
            wrong[name] = str(error)
            continue
        moved.check()
        found[name] = quantiles(timer(fn, samples=samples))
    count = head.config.width**2 * sum(2 + 8 if part.cross else 4 + 8 for part in moved.folded.blocks)
    common = {"op": "action_ode", "case": f"{tokens}"}
    rows: list[dict[str, Any]] = []
    for name, times in found.items():
        weights = steps * count * (1 if fp8 and "cuda" in name else dtype.itemsize)
        work = {"bytes": weights, "flops": 2 * steps * count * batch * tokens}
        rates = {"gb_per_s": weights / times["p50"] / 1e9, "gflop_per_s": work["flops"] / times["p50"] / 1e9}
        ms = {key: value * 1e3 for key, value in times.items() if key != "jitter"}
        ratio = found["eager"]["p50"] / times["p50"] if "eager" in found else None
        rows.append(
            {**common, "implementation": name, "ms": ms, "jitter": times["jitter"], **work, **rates, "ratio": ratio}
        )
    reason = moved.refuse(*given)
    if reason is not None:
        rows.append({**common, "implementation": "cuda", "left_out": reason})
    return rows + [
        {
            **common,
            "implementation": n,
            "left_out": f"not timed, it disagrees with the reference: {e}",
            "disagrees": True,
        }
        for n, e in wrong.items()
    ]


def assert_near(name: str, got: Tensor, plain: Tensor, want: Tensor, factor: float) -> None:
    """AssertionError unless `got` is at most `factor` times as far from the float32 truth as the reference in this dtype."""
    distance, allowed = (got.cpu() - want).abs().max().item(), (plain.cpu() - want).abs().max().item() * factor
    allowed = max(allowed, 1e-5 * want.abs().max().item())
    if not distance <= allowed:  # a NaN is not near
        raise AssertionError(f"{name}: expected at most {allowed:.3g} from the truth, got {distance:.3g}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, action="append", choices=list(TOKENS), help="default: all")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write machine and rows here")
    args = vars(parser.parse_args())
    path, chosen, dtype = args.pop("json"), args.pop("tokens"), getattr(torch, args.pop("dtype"))
    rows = [row for tokens in chosen or TOKENS for row in case(tokens, dtype=dtype, **args)]
    result = {"dtype": str(dtype).removeprefix("torch."), "machine": machine(), "rows": rows}
    if path:
        write_json(path, result)
    print(op_bench.show(result))
    return 1 if op_bench.disagreements(result) else 0


if __name__ == "__main__":
    raise SystemExit(main())
