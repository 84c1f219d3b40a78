"""action_ode: the whole head in one launch against its reference and, where there is a GPU, a CUDA graph of the reference.

python -m dit4dit.benchmarks.ops.bench_action_ode --device cuda --json result.json

The yardstick is "eager graph": the reference's library kernels as one CUDA graph. Bytes are the blocks' weights, read once a
step, GB/s those bytes over the time that was reached, and operations their products. "cuda fp8" keeps these weights in e4m3 and
is held to the head with weights so rounded.

Below the table stands the kernel's own for each number of tokens (`budget_head`): what its schedule counts and is predicted to
take, for the GPU that is here where its constants are known, else for an H200. Where the kernel runs, parts of its time are
measured beside it by leaving work out (`head_parts` says which can be told apart so, and which cannot).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dit4dit.benchmarks import budget_gpu, budget_head, failures, head_parts, op_report
from dit4dit.benchmarks.budget_gpu import Gpu
from dit4dit.benchmarks.harness import machine, time_cpu, time_gpu
from dit4dit.benchmarks.recording import Recording
from torch import Tensor

from dit4dit import ops
from dit4dit.config import HeadConfig
from dit4dit.engine.action_ode import Device, HeadShape, Schedule, head_shape, plan
from dit4dit.engine.action_ode.cost import head_us
from dit4dit.engine.action_ode.program import OneLaunchHead, device_of
from dit4dit.engine.action_ode.weights import FP8, row_scale
from dit4dit.engine.fold import Head, HeadBlock, Matrix, fold_head
from dit4dit.errors import InputError, OutputError
from dit4dit.model.action_head import ActionHead

TOKENS = {9: (8, 784), 17: (16, 588), 51: (50, 392)}
"""Tokens with the state's -> action horizon and feature tokens of the released models."""
H200 = Device(sms=132, shared_memory=227 << 10, capability=90, clusters=(66, 30, 15))


def config(horizon: int) -> HeadConfig:
    """The released heads."""
    return HeadConfig.dit_b(action_horizon=horizon)


def graph_of(fn: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`fn` as a CUDA graph, which its first call captures: what cannot be captured costs no other contender."""
    captured: list[Callable[[], Tensor]] = []

    def run() -> Tensor:
        if not captured:
            captured.append(_capture(fn))
        return captured[0]()

    return run


def _capture(fn: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """After a few runs that let the libraries choose."""
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
    """name -> call: the reference, the engine's loop, and the kernel where it takes the arguments; on a GPU their graphs too."""
    eager, loop = (partial(ops.action_ode, head, *args, backend=name) for name in ("torch", "loop"))
    found: dict[str, Callable[[], Tensor]] = {"eager": eager, "loop": loop}
    if args[0].device.type != "cuda":
        return found
    found |= {"eager graph": graph_of(eager), "loop graph": graph_of(loop)}
    if head.refuse(*args[:3]) is None:
        kernel = partial(ops.action_ode, head, *args, backend="cuda")
        found |= {"cuda": kernel, "cuda graph": graph_of(kernel)}
    return found


def schedule_of(
    config: HeadConfig, steps: int, *, device: str, batch: int, context: int, like: Schedule | None = None
) -> Schedule:
    """The kernel's schedule, on this GPU or, where there is none, on an H200. like: as `planned_like`.

    ConfigError: no tiles for this head, or no such plan.
    """
    here = device_of(torch.device(device)) if device.startswith("cuda") and torch.cuda.is_available() else H200
    prefix = config.state_dim is not None
    shape = head_shape(config, batch=batch, context=context, prefix=prefix, steps=steps)
    return plan(shape, here) if like is None else planned_like(like, shape, here)


def planned_like(like: Schedule, shape: HeadShape, device: Device) -> Schedule:
    """Of teams with as many blocks as `like` has, and with attention of tokens to each other in the same place, whatever would be
    predicted to take least. ConfigError: no such plan.
    """
    return plan(shape, device, ranks=like.ranks, fused=like.fused and not all(shape.blocks))


def constants() -> Gpu:
    """Of the GPU that is here; an H200's where there is none, or none of which constants are known."""
    try:
        return budget_gpu.read("auto")
    except InputError:
        return budget_gpu.read("h200")


def in_fp8(head: Head) -> Head:
    """The head with its blocks' weights rounded to e4m3, as the kernel keeps them, in float32."""

    def rounded(matrix: Matrix) -> Matrix:
        weight = matrix.weight.bfloat16().float()
        scale = row_scale(weight)[:, None]
        return Matrix((weight / scale).to(FP8).float() * scale, matrix.bias)

    def block(b: HeadBlock) -> HeadBlock:
        changed = {part: rounded(getattr(b, part)) for part in ("project", "out", "mlp_in", "mlp_out")}
        return HeadBlock(b.norms, b.cross, **changed)

    return replace(head, blocks=tuple(map(block, head.blocks)))


def random_head(config: HeadConfig, seed: int) -> ActionHead:
    """With weights that are large enough for the velocity to matter, in float32."""
    torch.manual_seed(seed)
    head = ActionHead(config).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return head


def inputs(config: HeadConfig, features: int, batch: int) -> tuple[Tensor, ...]:
    """noise, context and prefix of `ops.action_ode`, random, in float32 on the CPU."""
    crossing = sum(not (i % 2 and config.interleave_self_attention) for i in range(config.num_layers))
    noise = torch.randn(batch, config.action_horizon, config.action_dim)
    context = torch.randn(batch, features, 2 * crossing * config.width)
    return noise, context, torch.randn(batch, config.width)


def on_device(exact: tuple[Tensor, ...], device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The same as they are timed: noise stays in float32."""
    return (exact[0].to(device), *(t.to(device, dtype) for t in exact[1:]))


def tolerance(plain: Tensor, want: Tensor) -> float:
    """Twice as far from the truth as PyTorch in the dtype that is timed."""
    return max(2 * (plain - want).abs().max().item(), 1e-5 * want.abs().max().item())


@dataclass(frozen=True)
class Contender:
    """Something to time: `head` it runs, what it must be near to, and bytes of one of its weights."""

    run: Callable[[], Tensor]
    head: OneLaunchHead
    want: Tensor
    weight_bytes: int


def contenders(
    head: ActionHead, truth: Head, exact: tuple[Tensor, ...], given: tuple[Tensor, ...], steps: int
) -> dict[str, Contender]:
    """What can be timed on `given`. truth, exact: head and arguments in float32 on the CPU; moves `head`."""
    dtype = given[1].dtype

    def result(folded: Head) -> Tensor:
        return ops.action_ode(OneLaunchHead(folded, head.config, steps), *exact, backend="torch")

    want, want_fp8 = result(truth), result(in_fp8(truth))
    moved = fold_head(head.to(given[0].device, dtype), steps)
    plain, small = (OneLaunchHead(moved, head.config, steps, fp8=fp8) for fp8 in (False, True))
    found = {n: Contender(fn, plain, want, dtype.itemsize) for n, fn in candidates(plain, given).items()}
    if "cuda" in found:
        fp8 = {name: fn for name, fn in candidates(small, given).items() if "cuda" in name}
        found |= {n.replace("cuda", "cuda fp8"): Contender(fn, small, want_fp8, 1) for n, fn in fp8.items()}
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
    record: Recording,
) -> None:
    """Rows of one number of tokens, as op_bench's: each contender, once it agrees with the reference in float32."""
    horizon, features = TOKENS[tokens]
    head = random_head(config(horizon), seed)
    truth, width = fold_head(head, steps), head.config.width
    exact = inputs(head.config, features, batch)
    given = on_device(exact, device, dtype)
    entered = contenders(head, truth, exact, given, steps)

    eager, timer = entered["eager"], time_gpu if device.startswith("cuda") else time_cpu
    plain = ops.action_ode(eager.head, *given, backend="torch").cpu()
    allowed = tolerance(plain, eager.want)
    rows = failures.Rows(record, "action_ode", f"{tokens}")
    schedule, gpu = schedule_of(head.config, steps, device=device, batch=batch, context=features), constants()
    on_kernel = {"one_launch": [budget_head.facts(schedule)]}
    weights = width**2 * sum(2 + 8 if block.cross else 4 + 8 for block in truth.blocks)
    flops = 2 * steps * weights * batch * tokens
    first: float | None = None
    reason = eager.head.refuse(*given)
    if reason is not None:
        rows.add("cuda", {"left_out": reason, **on_kernel})
    for name, entry in entered.items():
        times = failures.NO_TIME if record.over() else timed(entry, allowed, timer, samples, record.remaining())
        if "left_out" in times:
            rows.add(name, times)
            continue
        p50 = times["ms"]["p50"]
        first = p50 if name == "eager" else first
        read = steps * weights * entry.weight_bytes
        row = {**times, "bytes": read, "flops": flops, "gb_per_s": read / p50 / 1e6, "gflop_per_s": flops / p50 / 1e6}
        row["ratio"] = first / p50 if first else None
        rows.add(name, row | (on_kernel if "cuda" in name else {}))
    table: dict[str, Any] = {"predicted": budget_head.table_of(schedule, gpu), "parts": None}
    record.result.setdefault("heads", {})[f"{tokens}"] = table
    if "cuda" in entered:
        settings = {"device": device, "dtype": dtype, "samples": samples, "batch": batch}
        table["parts"] = parts(head.config, features, steps, gpu, rows, **settings)


def parts(
    config: HeadConfig, context: int, steps: int, gpu: Gpu, rows: failures.Rows, **settings: Any
) -> dict[str, Any]:
    """`head_parts.measure` on this GPU. rows: of the request's case; what is wrong or failed has a row there, too.

    settings: device, dtype, samples, batch.
    """
    record, place = rows.record, {name: settings[name] for name in ("device", "batch")}
    like = schedule_of(config, steps, context=context, **place)

    def time(name: str, variant: head_parts.Variant) -> Mapping[str, Any]:
        if record.remaining() == 0.0:  # the rows are whole without: no record is cut by what is left out here
            return failures.NO_TIME
        row = time_variant(variant, like, remaining=record.remaining(), **settings)
        if "left_out" in row:
            rows.add(f"cuda, {name}", row)
        return row

    return head_parts.measure(
        config,
        context,
        steps,
        plan=lambda v: schedule_of(v.config, v.steps, context=v.context, like=like, **place),
        predict=lambda schedule: head_us(schedule, budget_head.costs_of(gpu))["total"],
        time=time,
    )


class HeldPlan(OneLaunchHead):
    """A head that is planned like another one: `planned_like`."""

    like: Schedule

    def schedule(self, device: torch.device, batch: int, context: int, prefix: bool) -> Schedule:
        shape = head_shape(self.config, batch=batch, context=context, prefix=prefix, steps=self.steps)
        return planned_like(self.like, shape, device_of(device))


def time_variant(
    variant: head_parts.Variant,
    like: Schedule,
    *,
    device: str,
    dtype: torch.dtype,
    samples: int,
    batch: int,
    remaining: float | None = None,
    backend: str = "cuda",
) -> dict[str, Any]:
    """`timed` of the kernel's graph with a head and a request of this kind, held to the head in float32 on the CPU.

    like: the plan of the request that it is a variant of.
    """
    head, steps = random_head(variant.config, 0), variant.steps
    exact = inputs(head.config, variant.context, batch)
    given = on_device(exact, device, dtype)
    want = ops.action_ode(OneLaunchHead(fold_head(head, steps), head.config, steps), *exact, backend="torch")
    small = HeldPlan(fold_head(head.to(device, dtype), steps), head.config, steps)
    small.like = like
    plain = ops.action_ode(small, *given, backend="torch").cpu()
    kernel, cuda = partial(ops.action_ode, small, *given, backend=backend), device.startswith("cuda")
    entry = Contender(graph_of(kernel) if cuda else kernel, small, want, dtype.itemsize)
    return timed(entry, tolerance(plain, want), time_gpu if cuda else time_cpu, samples, remaining)


def timed(
    entry: Contender, allowed: float, timer: Callable[..., list[float]], samples: int, remaining: float | None
) -> dict[str, Any]:
    """What its row says of its times, or the row that says why there are none: too far from the truth, or a launch failed, also
    while timed. remaining: seconds that may be measured, for which fewer samples are taken.
    """
    try:
        entry.run()
        begin = time.perf_counter()
        result = entry.run().cpu()
        if remaining is not None:
            samples = max(1, min(samples, int(remaining / (time.perf_counter() - begin))))
        entry.head.check()
        distance = (result - entry.want).abs().max().item()
        if not distance <= allowed:  # a NaN is not near
            far = f"expected at most {allowed:.3g} from the truth, got {distance:.3g}"
            return {"left_out": f"not timed, it disagrees with the reference: {far}", "disagrees": True}
        times = timer(entry.run, samples=samples, warmup=max(2, samples // 10))
        entry.head.check()  # a launch that failed has ended early
    except OutputError as error:
        return {"left_out": f"not timed: {error}", "disagrees": True}
    except Exception as error:  # what CUDA raises has no common base
        return failures.failure(error)
    return op_report.of_times(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, action="append", choices=list(TOKENS), help="default: all")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="end after about this long")
    parser.add_argument("--json", type=Path, help="write machine and rows here, as they come")
    args = vars(parser.parse_args())
    path, chosen, dtype = args.pop("json"), args.pop("tokens"), getattr(torch, args.pop("dtype"))
    recording = Recording(path, args.pop("seconds"))
    try:
        with recording as record:
            record.result |= {"dtype": str(dtype).removeprefix("torch."), "machine": machine(), "rows": []}
            for tokens in record.each(chosen or TOKENS, "tokens"):
                case(tokens, dtype=dtype, **args, record=record)
    except failures.GpuLost as lost:
        sys.stderr.write(f"{lost.args[0]}\n")
        failures.leave(failures.GPU_LOST)
    print(op_report.show(recording.result))
    for tokens, found in recording.result.get("heads", {}).items():
        print(f"\n{tokens} tokens, {budget_head.show(found['predicted'])}")
        print(*([] if found["parts"] is None else ["", head_parts.show(found["parts"])]), sep="\n")
    return 1 if op_report.bad(recording.result) else 0


if __name__ == "__main__":
    raise SystemExit(main())
