"""Benchmarks of single ops: each times the calls that one step of the released models makes of its op.

Contenders are the reference called as it is ("eager"), `torch.compile` of it ("compile"), and every other implementation
that takes the tensors. None is timed before it has agreed with the reference on the very tensors that will be timed. One that
raises costs its own row.

Bytes are the least that must move: every tensor argument read once, every new result written once. FLOPs are those of the
reference's matrix products, attention included.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dit4dit.benchmarks.failures import GPU_LOST, NO_TIME, GpuLost, Rows, failure, leave, settle
from dit4dit.benchmarks.harness import assert_no_worse, machine, time_cpu, time_gpu
from dit4dit.benchmarks.kernels import calls
from dit4dit.benchmarks.op_report import bad, of_times, show
from dit4dit.benchmarks.ops import bench_action_ode
from dit4dit.benchmarks.recording import Recording
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit4dit import ops, progress
from dit4dit.errors import BackendError
from dit4dit.model.precision import full_precision
from dit4dit.ops.dispatch import find
from dit4dit.ops.linear_fp8 import FP8

Contender = Callable[..., Any]
Case = tuple[str, str, tuple[Any, ...]]  # op, name, arguments without data

# (sizes of the views, size of each in the result, filter): the cameras of the three robots
PICTURES = {
    "1 x 800x1280 cv2_area": ([(800, 1280)], (224, 224), "cv2_area"),
    "2 x 256x256 cv2_area": ([(256, 256)] * 2, (224, 224), "cv2_area"),
    "2 x 256x256 bilinear": ([(256, 256)] * 2, (224, 224), "bilinear"),
    "1 x 480x640 cv2_area": ([(480, 640)], (224, 224), "cv2_area"),
    "2 x 224x224 as it is": ([(224, 224)] * 2, None, "cv2_area"),
}
GR1 = ("gr1", "588", "17", "plain", "guided", "1")
"""First words of the cases that a step of RoboCasa-GR1 has."""


def cases(names: Sequence[str], *, batch: int = 1, gr1_only: bool = False) -> list[Case]:
    """The calls of these ops; with `gr1_only` those of one released model, which a CPU times in minutes."""
    found: list[Case] = []
    for case, (sizes, size, resize) in PICTURES.items():
        views = [torch.empty(batch, h, w, 3, dtype=torch.uint8, device="meta") for h, w in sizes]
        found.append(("preprocess", case, (views, size, resize, torch.bfloat16)))
    found += [(op, case, args) for case, op, args in calls(batch)]
    wanted = [case for case in found if case[0] in names and not (gr1_only and case[1].split()[0] not in GR1)]
    return sorted(wanted, key=lambda case: names.index(case[0]))


def fill(args: tuple[Any, ...], device: str, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    """Tensors without data -> random ones of the same shapes and strides; bfloat16 becomes `dtype`. Matrices keep the size of
    rows. They are drawn on the generator's device."""

    def real(value: Any) -> Any:
        if isinstance(value, list):
            return [real(inner) for inner in value]
        if value is torch.bfloat16:
            return dtype
        if not isinstance(value, Tensor):
            return value
        kind = dtype if value.dtype == torch.bfloat16 else value.dtype
        if kind == torch.uint8:
            x = torch.randint(0, 256, value.shape, dtype=torch.uint8, generator=generator, device=generator.device)
        else:
            x = torch.randn(value.shape, generator=generator, device=generator.device)
        if kind == FP8:
            x *= 64  # a row of a matrix that fills e4m3's range
        elif x.ndim == 2 and x.shape[0] > 3 and kind != torch.uint8:  # a weight, not a table of one row a latent frame
            x /= x.shape[1] ** 0.5
        if kind == torch.int64:
            x[..., -1] = 0  # requests: of one whose noise is given nothing would be drawn
        # not to(): of rows with gaps between them it makes a dense tensor
        few = unexpanded(x, value)
        made = torch.empty_strided(few.shape, value.stride(), dtype=kind, device=device).copy_(few)
        return made.expand(value.shape)

    return tuple(map(real, args))


def unexpanded(x: Tensor, like: Tensor) -> Tensor:
    """One of each in the dimensions in which all elements of `like` are the same memory: what can be written."""
    return x[tuple(slice(0, 1 if step == 0 else None) for step in like.stride())]


def contenders(
    op: str, args: tuple[Any, ...], compiling: bool, over: Callable[[], bool]
) -> tuple[dict[str, Contender], dict[str, dict[str, Any]]]:
    """name -> call of what takes these arguments, "eager" first; and the row of each other implementation."""
    reference = reference_of(op)
    found: dict[str, Contender] = {"eager": reference}
    out: dict[str, dict[str, Any]] = {}
    for name in ops.implementations(op):
        if name == "torch":  # the reference again
            continue
        fn, prepare = positional(op, name), find(op).implementations[name].prepare
        try:
            if prepare is not None:
                prepare(*args)
            fn(*args)
            settle()
        except BackendError as error:
            out[name] = {"left_out": str(error).partition("refused: ")[2] or str(error)}
        except Exception as error:  # what Triton and CUDA raise has no common base
            out[name] = failure(error)
        else:
            found[name] = fn
    if compiling and over():
        out["compile"] = NO_TIME
    elif compiling:
        fn = torch.compile(reference, dynamic=False)
        try:
            reason = uncompilable(fn, args)
        except Exception as error:
            out["compile"] = failure(error)
        else:
            if reason is None:
                found["compile"] = fn
            else:
                out["compile"] = {"left_out": reason}
    return found, out


def uncompilable(fn: Contender, args: tuple[Any, ...]) -> str | None:
    """Why torch.compile gives no code here (no C++ compiler, no Triton, an operation it does not know), or None."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        with warnings.catch_warnings():
            # it looks through our tables' cache, which is what is wanted
            warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
            fn(*args)
            settle()
    except TorchDynamoException as error:
        told = str(error).partition("Set TORCHDYNAMO_VERBOSE")[0]
        lines = [line.strip() for line in told.splitlines() if line.strip()]
        return f"{' '.join(lines[:2]) or type(error).__name__:.300}"
    return None


def reference_of(op: str, name: str = "reference") -> Contender:
    """The reference of an op, or another function of its file."""
    found: Contender = getattr(importlib.import_module(f"dit4dit.ops.{op}"), name)
    return found


def positional(op: str, backend: str) -> Contender:
    """An implementation of an op that takes the arguments of its reference."""
    public = getattr(ops, op)
    if op != "euler_step":
        return partial(public, backend=backend)

    def run(x: Tensor, v: Tensor, dt: float, t: Any, previous: Any, weights: Any, most: Any) -> Tensor:
        got: Tensor = public(x, v, dt, t=t, previous=previous, weights=weights, max_guidance=most, backend=backend)
        return got

    return run


def work(reference: Contender, args: tuple[Any, ...]) -> dict[str, int]:
    """ "flops" and "bytes" of one call, as the head of this file says."""
    # attention as its two products: the counter does not know every fused one
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        results = reference(*args)
    given = list(_tensors(args))
    known = {x.untyped_storage().data_ptr() for x in given}
    new = [x for x in _tensors(results) if x.untyped_storage().data_ptr() not in known]
    return {"flops": counter.get_total_flops(), "bytes": sum(x.numel() * x.element_size() for x in given + new)}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)


def exact(reference: Contender) -> Contender:
    """The reference without TF32: what the truth is made with."""

    def run(*args: Any) -> Any:
        with full_precision():
            return reference(*args)

    return run


@torch.no_grad()
def measure(case: Case, args: tuple[Any, ...], samples: int, compiling: bool, record: Recording) -> None:
    """One row a contender: its times and rates, or "left_out" with the reason ("disagrees" says it was wrong, "failed" that
    it raised, "cut" that its time was over).
    """
    op, name, _ = case
    rows = Rows(record, op, name)
    reference = reference_of(op)
    found, out = contenders(op, args, compiling, record.over)
    for contender, row in out.items():
        rows.add(contender, row)
    todo: dict[str, Callable[[], Any]] = {}
    for contender, fn in found.items():
        if record.over():
            rows.add(contender, NO_TIME)
            continue
        try:
            assert_no_worse(fn, exact(reference), args, float32_limit=1e-5)
        except AssertionError as error:
            wrong = {"left_out": f"not timed, it disagrees with the reference: {error}", "disagrees": True}
            rows.add(contender, wrong)
        except Exception as error:
            rows.add(contender, failure(error))
        else:
            todo[contender] = partial(fn, *args)
    if not todo:
        return
    doing = work(reference, args)
    eager: float | None = None
    for contender, times in alternating(todo, args, samples, over=record.over).items():
        if isinstance(times, Exception):
            rows.add(contender, failure(times))
            continue
        if not times:
            rows.add(contender, NO_TIME)
            continue
        row = of_times(times)
        p50 = row["ms"]["p50"]
        eager = p50 if contender == "eager" else eager
        rates = {"gb_per_s": doing["bytes"] / p50 / 1e6, "gflop_per_s": doing["flops"] / p50 / 1e6}
        rows.add(contender, {**row, **doing, **rates, "ratio": eager / p50 if eager else None})


def alternating(
    todo: dict[str, Callable[[], Any]],
    args: tuple[Any, ...],
    samples: int,
    rounds: int = 5,
    over: Callable[[], bool] = lambda: False,
) -> dict[str, list[float] | Exception]:
    """Seconds of each contender's calls, taken in turns, so that a machine that changes pace does so for all; what one that
    raised has raised. Fewer, or none, once it is over.
    """
    timer = time_gpu if next(_tensors(args)).device.type == "cuda" else time_cpu
    rounds = min(rounds, samples)
    found: dict[str, list[float] | Exception] = {contender: [] for contender in todo}
    for i in range(rounds):
        share = samples // rounds + (i < samples % rounds)
        for contender, fn in todo.items():
            taken = found[contender]
            if isinstance(taken, Exception) or over():
                continue
            try:
                taken += timer(fn, samples=share, warmup=max(2, share // 10))
            except Exception as error:
                found[contender] = error.with_traceback(None)  # its frames hold tensors
    return found


def run(
    names: Sequence[str],
    *,
    device: str,
    dtype: torch.dtype,
    samples: int,
    record: Recording,
    batch: int = 1,
    gr1_only: bool = False,
    compiling: bool = True,
    seed: int = 0,
) -> None:
    """Time these ops, in this order, into `record`. GpuLost: the rest needs another process."""
    generator = torch.Generator().manual_seed(seed)
    result = record.result
    result |= {"dtype": str(dtype).removeprefix("torch."), "device": device, "samples": samples}
    result |= {"machine": machine(), "rows": []}
    todo: list[Case] = []
    for op in dict.fromkeys(names):
        if op == "action_ode":  # its arguments are a head and not only tensors
            todo += [(op, f"{tokens}", (tokens,)) for tokens in ([17] if gr1_only else bench_action_ode.TOKENS)]
        else:
            todo += cases([op], batch=batch, gr1_only=gr1_only)
    with progress.bar("ops", len(todo), unit="case") as shown:
        for case in record.each(todo, "ops", name=lambda case: f"{case[0]} {case[1]}"):
            shown.say(f"{case[0]} {case[1]}")
            try:
                if case[0] == "action_ode":
                    kind, few = torch.bfloat16 if dtype == torch.float16 else dtype, min(batch, 4)
                    bench_action_ode.case(
                        *case[2], device=device, dtype=kind, samples=samples, batch=few, record=record
                    )
                else:
                    measure(case, fill(case[2], device, dtype, generator), samples, compiling, record)
            except Exception as error:
                row = failure(error)
                del error
                Rows(record, case[0], case[1]).add("all", row)
            # compiled code of other shapes is of no more use, and torch keeps eight a function
            torch.compiler.reset()
            shown.update()


def command(names: Sequence[str], path: Path | None, seconds: float | None, **options: Any) -> int:
    """`run` into a file, and the table; exit code 1 where an implementation is wrong or failed, GPU_LOST after GpuLost."""
    recording = Recording(path, seconds)
    code = 0
    try:
        with recording as record:
            run(names, record=record, **options)
    except GpuLost as lost:
        sys.stderr.write(f"bench ops: {lost.args[0]}\n")
        code = GPU_LOST
    sys.stdout.write(show(recording.result) + "\n")
    if code == GPU_LOST:
        leave(code)
    return 1 if bad(recording.result) else 0


def bench(op: str, description: str | None) -> int:
    """The command line of one op's benchmark; exit code 1 where an implementation is wrong."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--compile", action="store_true", help="time torch.compile of the reference too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="end after about this long")
    parser.add_argument("--json", type=Path, help="write machine and rows here, as they come")
    args = parser.parse_args()
    return command(
        [op],
        args.json,
        args.seconds,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        samples=args.samples,
        batch=args.batch,
        compiling=args.compile,
        seed=args.seed,
    )
