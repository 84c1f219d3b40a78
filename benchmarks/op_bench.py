"""Benchmarks of single ops: each times the calls that one step of the released models makes of its op.

Contenders are the reference called as it is ("eager"), `torch.compile` of it ("compile"), and every other implementation
that takes the tensors. None is timed before it has agreed with the reference on the very tensors that will be timed.

Bytes are the least that must move: every tensor argument read once, every new result written once. FLOPs are those of the
reference's matrix products, attention included.
"""

from __future__ import annotations

import argparse
import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dit4dit.benchmarks.harness import assert_no_worse, machine, quantiles, time_cpu, time_gpu
from dit4dit.benchmarks.kernels import calls
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from dit4dit import ops
from dit4dit.commands.report import table, write_json
from dit4dit.errors import BackendError
from dit4dit.ops import onednn
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
    """Tensors without data -> random ones of the same shapes; bfloat16 becomes `dtype`. Matrices keep the size of rows."""

    def real(value: Any) -> Any:
        if isinstance(value, list):
            return [real(inner) for inner in value]
        if value is torch.bfloat16:
            return dtype
        if not isinstance(value, Tensor):
            return value
        if value.dtype == torch.uint8:
            return torch.randint(0, 256, value.shape, dtype=torch.uint8, generator=generator).to(device)
        x = torch.randn(value.shape, generator=generator)
        if value.dtype == FP8:
            return (64 * x).to(device, FP8)  # a row of a matrix that fills e4m3's range
        if x.ndim == 2 and x.shape[0] > 3:  # a weight, not a table of one row a latent frame
            x /= x.shape[1] ** 0.5
        return x.to(device, dtype if value.dtype == torch.bfloat16 else value.dtype)

    return tuple(map(real, args))


def contenders(op: str, args: tuple[Any, ...], compiling: bool) -> tuple[dict[str, Contender], dict[str, str]]:
    """name -> call of what takes these arguments, "eager" first; and why each other implementation does not."""
    if op == "linear_gelu":
        onednn.pack(args[1], args[0].numel() // args[0].shape[-1])  # as the engine does at warm-up
    reference = reference_of(op)
    found: dict[str, Contender] = {"eager": reference}
    out: dict[str, str] = {}
    for name in ops.implementations(op):
        if name == "torch":  # the reference again
            continue
        fn = positional(op, name)
        try:
            fn(*args)
        except BackendError as error:
            out[name] = str(error).partition("refused: ")[2] or str(error)
        else:
            found[name] = fn
    if compiling:
        fn = torch.compile(reference, dynamic=False)
        reason = uncompilable(fn, args)
        if reason is None:
            found["compile"] = fn
        else:
            out["compile"] = reason
    return found, out


def uncompilable(fn: Contender, args: tuple[Any, ...]) -> str | None:
    """Why torch.compile gives no code here (no C++ compiler, no Triton, an operation it does not know), or None."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        with warnings.catch_warnings():
            # it looks through our tables' cache, which is what is wanted
            warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
            fn(*args)
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


@torch.no_grad()
def measure(case: Case, args: tuple[Any, ...], samples: int, compiling: bool) -> list[dict[str, Any]]:
    """One row a contender: its times and rates, or "left_out" with the reason ("disagrees" says it was wrong)."""
    op, name, _ = case
    reference = reference_of(op)
    found, out = contenders(op, args, compiling)
    common = {"op": op, "case": name}
    rows: list[dict[str, Any]] = []
    for contender, fn in found.items():
        try:
            assert_no_worse(fn, reference, args, float32_limit=1e-5)
        except AssertionError as error:
            wrong = {"left_out": f"not timed, it disagrees with the reference: {error}", "disagrees": True}
            rows.append({**common, "implementation": contender, **wrong})
    wrong_ones = {row["implementation"] for row in rows}
    doing = work(reference, args)
    times = alternating({c: partial(fn, *args) for c, fn in found.items() if c not in wrong_ones}, args, samples)
    eager = times["eager"]["p50"]
    for contender, q in times.items():
        ms = {key: value * 1e3 for key, value in q.items() if key != "jitter"}
        rates = {"gb_per_s": doing["bytes"] / q["p50"] / 1e9, "gflop_per_s": doing["flops"] / q["p50"] / 1e9}
        row = {**common, "implementation": contender, "ms": ms, "jitter": q["jitter"], **doing, **rates}
        rows.append({**row, "ratio": eager / q["p50"]})
    return rows + [{**common, "implementation": other, "left_out": reason} for other, reason in out.items()]


def alternating(
    todo: dict[str, Callable[[], Any]], args: tuple[Any, ...], samples: int, rounds: int = 5
) -> dict[str, dict[str, float]]:
    """Quantiles of each contender's seconds, taken in turns, so that a machine that changes pace does so for all."""
    timer = time_gpu if next(_tensors(args)).device.type == "cuda" else time_cpu
    rounds = min(rounds, samples)
    seconds: dict[str, list[float]] = {contender: [] for contender in todo}
    for i in range(rounds):
        share = samples // rounds + (i < samples % rounds)
        for contender, fn in todo.items():
            seconds[contender] += timer(fn, samples=share, warmup=max(2, share // 10))
    return {contender: quantiles(taken) for contender, taken in seconds.items()}


def run(
    names: Sequence[str],
    *,
    device: str,
    dtype: torch.dtype,
    samples: int,
    batch: int = 1,
    gr1_only: bool = False,
    compiling: bool = True,
    seed: int = 0,
    keep: Path | None = None,
) -> dict[str, Any]:
    """Time these ops; ready for JSON. With `keep` the file is written after each case, so that an end by a time limit
    leaves what was measured ("complete": False).
    """
    generator = torch.Generator().manual_seed(seed)
    result: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "samples": samples,
        "machine": machine(),
        "complete": False,
        "rows": [],
    }
    todo = cases(names, batch=batch, gr1_only=gr1_only)
    with tqdm(todo, unit="case", disable=None) as bar:
        for case in bar:
            bar.set_description(f"{case[0]} {case[1]}")
            args = fill(case[2], device, dtype, generator)
            result["rows"] += measure(case, args, samples, compiling)
            # compiled code of other shapes is of no more use, and torch keeps eight a function
            torch.compiler.reset()
            if keep is not None:
                write_json(keep, result)
    result["complete"] = True
    return result


def show(result: dict[str, Any]) -> str:
    """The table that the command prints, and what was left out, each reason once."""
    here = result["machine"]
    timed = [row for row in result["rows"] if "ms" in row]
    rows = [
        [
            row["op"],
            row["case"],
            row["implementation"],
            f"{row['ms']['p50']:.4f}",
            f"{row['gb_per_s']:,.1f}",
            f"{row['gflop_per_s']:,.0f}" if row["flops"] else "",
            f"{row['ratio']:.2f}",
        ]
        for row in timed
    ]
    where = f"{here['gpu'] or here['cpu']}, torch {here['torch']}, {here['torch_threads']} threads, {result['dtype']}"
    header = ["op", "case", "by", "p50 ms", "GB/s", "GFLOP/s", "eager / it"]
    reasons: dict[str, list[str]] = {}
    for row in result["rows"]:
        if "left_out" in row:
            place = f"{row['op']} {row['case']}" if row.get("disagrees") else row["op"]
            reasons.setdefault(f"{row['implementation']}: {row['left_out']}", []).append(place)
    lines = [f"{reason} ({', '.join(dict.fromkeys(places))})" for reason, places in reasons.items()]
    return "\n".join([where, table(header, rows, right=range(3, 7)), *(["", "left out", *lines] if lines else [])])


def disagreements(result: dict[str, Any]) -> list[str]:
    """ "op case implementation" of everything that was not timed because it was wrong."""
    return [f"{r['op']} {r['case']} {r['implementation']}" for r in result["rows"] if r.get("disagrees")]


def bench(op: str, description: str | None) -> int:
    """The command line of one op's benchmark; exit code 1 where an implementation is wrong."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--compile", action="store_true", help="time torch.compile of the reference too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write machine and rows here")
    args = parser.parse_args()
    result = run(
        [op],
        device=args.device,
        dtype=getattr(torch, args.dtype),
        samples=args.samples,
        batch=args.batch,
        compiling=args.compile,
        seed=args.seed,
        keep=args.json,
    )
    if args.json:
        write_json(args.json, result)
    print(show(result))
    return 1 if disagreements(result) else 0
