"""Latency of one action chunk: the engine, and beside it the published schedule in the same process on the same weights.

The engine is timed as a policy runs it, from uint8 pictures on the host to actions on the host; the published schedule starts
with everything on the device. Random weights at true sizes need no download; before anything is timed the two must agree on
the very tensors that will be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from dit4dit.benchmarks import flops, roofline
from dit4dit.benchmarks.contenders import Clock, Inputs, Planned, Published, random_pictures
from dit4dit.benchmarks.harness import machine, quantiles
from torch import Tensor
from tqdm import tqdm

from dit4dit.action_ode.program import HeadChoice
from dit4dit.embodiments import EMBODIMENTS
from dit4dit.engine import Engine, calibrate, errors
from dit4dit.model.weights import random_model
from dit4dit.noise import Noise
from dit4dit.ops import onednn
from dit4dit.presets import Preset

STAGES = ("text", "vae", "backbone", "action_head")
AGREE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
"""Largest relative difference between the two at which they are still timed."""
QUANTISED = 2e-1
"""Likewise, relative rms difference of the features of a quantised and the exact engine; of the actions too where the head is one
launch, whose weights are quantised as well."""


def measure(
    preset: Preset,
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    chunks: int,
    baseline: bool,
    text: bool,
    seed: int,
    head: HeadChoice = "auto",
    head_dtype: torch.dtype = torch.float32,
    quantization: Literal["fp8"] | None = None,
    engine_chunks: int = 0,
) -> dict[str, Any]:
    """Time `chunks` chunks, alternating with the published schedule where `baseline`; the result is ready for JSON.

    With `quantization` the exact engine is held to the published schedule and the quantised one, which is timed, to the
    exact one: "error" in the result. After that `engine_chunks` chunks of the engine alone, if any, give its percentiles.

    Without the published schedule, a head in one launch is held to the engine with the library's.

    Raises:
        RuntimeError: these do not agree, or actions are not finite; no times are given.
        OutputError: a launch of the one-launch head failed while it was timed; no times are given.
    """
    config = preset.model
    views = len(EMBODIMENTS[preset.embodiment].views)
    model = random_model(config, seed, device=device, dtype=dtype, head_dtype=head_dtype, with_text=text and baseline)
    inputs = Inputs.random(config, views, seed, device, text=text and baseline)
    if inputs.tokens is not None:
        inputs = Inputs(**{**vars(inputs), "embeds": model.embed(inputs.tokens)})
    pictures, frame = random_pictures(config, views, seed, device, dtype)
    inputs = replace(inputs, frame=frame)
    exact = None if quantization is None else Planned(Engine(model, head="library"), inputs, pictures)
    calibration = None if exact is None else calibrate(exact.engine, [exact.step_inputs()])
    start = time.perf_counter()
    engine = Engine(model, quantization=quantization, calibration=calibration, head=head)
    folded = time.perf_counter()
    fast = Planned(engine, inputs, pictures)
    planned = time.perf_counter()
    result = finite(fast.checked())
    first = time.perf_counter()
    error = None
    if exact is not None:
        error = quantisation_error(exact, fast)
        result = exact.checked()
    published = Published(model) if baseline else None
    coarsest = min(dtype, head_dtype, key=lambda kind: kind.itemsize)
    if published is not None:
        check(result, published.sample(inputs, Clock(device)), coarsest, "published schedule")
    elif engine.one_launch is not None and exact is None:
        library = Planned(Engine(model, head="library"), inputs, pictures)
        check(result, library.checked(), coarsest, "the engine with head='library'")
    rates = [matrix_rate(device, dtype)]
    clocks, totals = timed(fast, published, chunks, seed)
    alone = engine_alone(fast, engine_chunks, seed) or totals["engine"]
    if engine.one_launch is not None:
        engine.one_launch.check()  # a launch that failed has ended early
    finite(fast.checked())
    rates.append(matrix_rate(device, dtype))
    counts = flops.count(preset)
    stages = {who: {s: median(c.seconds[s]) * 1e3 for s in c.seconds} for who, c in clocks.items()}
    assert model.head is not None
    return {
        "preset": name,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "quantization": quantization,
        "head": "library" if engine.one_launch is None else "one_launch",
        "head_dtype": str(head_dtype).removeprefix("torch."),
        "error": error,
        "text_encoder_in_baseline": inputs.tokens is not None,
        "machine": machine(),
        "cold_start_seconds": {"fold": folded - start, "plan": planned - folded, "first_chunk": first - planned},
        "ratio": ratios(totals, clocks) if baseline else None,
        "stages": stages,
        "roofline": roofline.points(
            preset,
            counts,
            stages,
            matrix_gflops=max(rates),
            memory_gb_per_s=roofline.memory_rate(device),
            dtype=dtype,
            head_dtype=model.head.action_decoder.layer2.weight.dtype,
            text=inputs.tokens is not None,
        ),
        "share_of_measured_rate": shares(totals, counts, max(rates), inputs.tokens is not None),
        "samples_ms": {who: [round(t * 1e3, 4) for t in times] for who, times in totals.items()},
        "engine_alone_ms": [round(t * 1e3, 4) for t in alone] if engine_chunks else None,
        **{
            who: {k: v if k == "jitter" else v * 1e3 for k, v in quantiles(alone if who == "engine" else t).items()}
            for who, t in totals.items()
        },
    }


def timed(
    fast: Planned, published: Published | None, chunks: int, seed: int
) -> tuple[dict[str, Clock], dict[str, list[float]]]:
    """Each contender's stages, and its seconds per chunk; they take turns."""
    device = fast.inputs.frame.device
    clocks, wholes = ({who: Clock(device) for who in ("engine", "baseline")} for _ in range(2))
    for i in tqdm(range(chunks), desc="chunks", disable=None):
        with wholes["engine"].stage("total"):
            fast.chunk(Noise.from_seed(seed, i))
        fast.stages(clocks["engine"])
        if published is not None:
            with wholes["baseline"].stage("total"):
                published.sample(fast.inputs, clocks["baseline"])
    who_ran = [who for who, whole in wholes.items() if whole.seconds]
    return {who: clocks[who] for who in who_ran}, {who: wholes[who].seconds["total"] for who in who_ran}


def engine_alone(fast: Planned, chunks: int, seed: int) -> list[float]:
    """Seconds per chunk of the engine by itself, as in a control loop: for the tail."""
    seconds = []
    for i in tqdm(range(chunks), desc="engine alone", disable=None):
        start = time.perf_counter()
        fast.chunk(Noise.from_seed(seed, i))
        seconds.append(time.perf_counter() - start)
    return seconds


def check(engine: Tensor, wanted: Tensor, dtype: torch.dtype, whose: str) -> None:
    """RuntimeError unless both wrote the same actions, to rounding; `whose`: the wanted ones."""
    error = ((engine - wanted).abs().max() / wanted.abs().max()).item()
    if not error <= AGREE[dtype]:
        raise RuntimeError(f"engine and {whose} differ by {error:.2e} (at most {AGREE[dtype]:.0e}): not timed")


def finite(actions: Tensor) -> Tensor:
    """The actions; RuntimeError where some are not finite."""
    wrong = int((~torch.isfinite(actions)).sum())
    if wrong:
        raise RuntimeError(f"actions: expected finite numbers, got {wrong} of {actions.numel()} others: not timed")
    return actions


def quantisation_error(exact: Planned, other: Planned) -> dict[str, dict[str, float]]:
    """`errors` on the inputs that will be timed; RuntimeError where they are those of something broken."""
    found = errors(exact.engine, other.engine, [exact.step_inputs()])
    for part in ("features",) if other.engine.one_launch is None else ("features", "actions"):
        rms = found[part]["rms"]
        if not rms <= QUANTISED:
            raise RuntimeError(f"quantised and exact {part} differ by {rms:.2e} (at most {QUANTISED:.0e}): not timed")
    return found


def median(values: Sequence[float]) -> float:
    return quantiles(values)["p50"]


def ratios(totals: dict[str, list[float]], clocks: dict[str, Clock]) -> dict[str, float]:
    """Published over engine: the median of the pairs' ratios, whole, per stage, and for backbone and head together."""

    def of(pick: Callable[[str], list[float]]) -> float:
        return median([slow / quick for slow, quick in zip(pick("baseline"), pick("engine"), strict=True)])

    def both(who: str) -> list[float]:
        seconds = clocks[who].seconds
        return [a + b for a, b in zip(seconds["backbone"], seconds["action_head"], strict=True)]

    shared = [stage for stage in STAGES if stage in clocks["engine"].seconds]
    stages = {stage: of(lambda who, s=stage: clocks[who].seconds[s]) for stage in shared}  # type: ignore[misc]
    return {"total": of(totals.__getitem__), "backbone_and_head": of(both), **stages}


def shares(
    totals: dict[str, list[float]], counts: dict[str, dict[str, float]], rate: float, text: bool
) -> dict[str, float]:
    """GFLOP/s of each contender over `rate`, that of one large matrix product measured before and after."""
    work = {"engine": counts["executed"]["total"], "baseline": counts["published"]["total"]}
    work["baseline"] -= 0.0 if text else counts["published"]["text_encoder"]
    return {"matrix_gflops": rate, **{who: work[who] / median(times) / rate for who, times in totals.items()}}


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of the best of five products of two large square matrices, by the fastest library at hand."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    onednn.pack(b, size)
    clock = Clock(device)
    for _ in range(6):
        with clock.stage("plain"):
            a @ b
        if onednn.is_packed(b):
            with clock.stage("packed"):
                onednn.linear(a, b, None)
    return 2 * size**3 / min(min(seconds[1:]) for seconds in clock.seconds.values()) / 1e9


def rows(result: dict[str, Any]) -> list[list[str]]:
    """The table that the command prints: one row per number."""
    out = []
    for who in ("engine", "baseline"):
        if who not in result:
            continue
        q = result[who]
        numbers = [f"{q[k]:.2f}" for k in ("p50", "p95", "p99", "p999", "max")]
        stages = "  ".join(f"{s} {ms:.2f}" for s, ms in result["stages"][who].items())
        share = result["share_of_measured_rate"][who]
        out.append([who, *numbers, f"{q['jitter']:.2f}", f"{100 * share:.0f} %", stages])
    return out
