"""What `benchmarks.tuning.tune` leaves, made up: for tests of what is shown and written of it."""

from __future__ import annotations

from typing import Any


def call(op: str, text: str, count: int, ms: dict[str, float], refused: dict[str, str] | None = None) -> dict[str, Any]:
    """One call with the default "torch"; chosen is the fastest that is timed, None where none is."""
    order = sorted(ms, key=ms.__getitem__)
    chosen = order[0] if order else None
    return {
        "op": op,
        "call": text,
        "count": count,
        "default": "torch",
        "chosen": chosen,
        "runner_up": order[1] if len(order) > 1 else None,
        "ms": ms,
        "ratio": ms["torch"] / ms[order[0]] if "torch" in ms else None,
        "refused": refused or {},
        "why": f"{chosen} <is> the fastest" if chosen else "nothing is right",
        "verdict": f"{op}-0.json" if chosen else None,
    }


CALLS = [
    call("linear", "float32[1x17x64], float32[64x64], None", 54, {"onednn": 0.25, "torch": 0.5}),
    call(
        "adaln",
        "float32[1x3x4x64] strides 768x1x192x64, None, None, float32[3x64], float32[3x64], float, bfloat16",
        3,
        {"torch": 0.125},
        {"triton": "x is on cpu <&>", "cuda": "x is on cpu <&>"},
    ),
    call("adaln", "float32[2x3x4x64], None, float, bfloat16", 0, {"torch": 0.5}, {"triton": "x is on cpu <&>"}),
    call("action_ode", "head", 1, {"torch": 90.0}, {"cuda": "crashed: signal 11"}),
]


def result(calls: list[dict[str, Any]] = CALLS, **changed: Any) -> dict[str, Any]:
    return {
        "complete": True,
        "cut": None,
        "subject": "preset tiny",
        "dtype": "float32",
        "head_dtype": "float32",
        "quantization": None,
        "steps": None,
        "batch": [1, 2],
        "images": [],
        "distinct": {"linear": 1, "adaln": 2, "action_ode": 1},
        "machine": {"cpu": "A <CPU>", "gpu": None, "torch": "2.13.0", "dit4dit": "0.1", "torch_threads": 2},
        "device": "cpu",
        "place": {"device": "A <CPU>, 2 threads", "capability": "AVX2"},
        "folder": "/cache/verdicts/a-cpu",
        "children": 2,
        "seconds": 12.5,
        "calls": calls,
        **changed,
    }
