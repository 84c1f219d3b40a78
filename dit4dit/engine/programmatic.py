"""Whether a plan launches its kernels programmatically (`ops.programmatic`): as asked for, or as `dit4dit tune` has found."""

from __future__ import annotations

import hashlib

from dit4dit.engine.engine import Engine
from dit4dit.ops.verdicts import PROGRAMMATIC_LAUNCH, SWITCHES


def step_text(engine: Engine, requests: str) -> str:
    """What tells the step of one plan from that of another: the model, its kinds of numbers, and the requests.

    requests: `RequestShape.text`.
    """
    head, kernel = engine.head.decode_out.weight.dtype, engine.one_launch
    runs = "library" if kernel is None else "auto" if kernel.backend is None else "one launch"
    model = hashlib.blake2b(repr(engine.config).encode(), digest_size=6).hexdigest()
    parts = [f"model {model} {_name(engine.model.dtype)}", f"head {_name(head)} {runs}", f"{engine.steps} steps"]
    parts += ["fp8"] if engine.quantization == "fp8" else []
    return ", ".join([*parts, f"posterior {engine.posterior}", requests])


def chosen(engine: Engine, requests: str) -> bool:
    """Whether a plan of the engine, on a GPU, launches its kernels so. "cached" reads a verdict, of this very machine."""
    if engine.programmatic_launch != "cached":
        return engine.programmatic_launch == "on"
    if engine.verdicts is None:
        return False
    call = (step_text(engine, requests),)
    return engine.verdicts.choice(PROGRAMMATIC_LAUNCH, call, lambda: SWITCHES[PROGRAMMATIC_LAUNCH]) == "on"


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
