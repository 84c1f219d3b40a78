"""Whether a plan launches its kernels programmatically (`ops.programmatic`): as asked for, or as `dit4dit tune` has found."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal

from dit4dit.ops.verdicts import PROGRAMMATIC_LAUNCH, SWITCHES

if TYPE_CHECKING:
    from dit4dit.engine.engine import Engine
    from dit4dit.engine.plan import RequestShape

ProgrammaticLaunch = Literal["cached", "on", "off"]
PROGRAMMATIC = ("cached", "on", "off")


def step_text(engine: Engine, shape: RequestShape) -> str:
    """What tells the step of one plan from that of another: the model, its kinds of numbers, and the requests."""
    head, kernel = engine.head.decode_out.weight.dtype, engine.one_launch
    runs = "library" if kernel is None else "auto" if kernel.backend is None else "one launch"
    views = " ".join(f"{height}x{width}" for height, width in shape.views)
    to = "" if shape.size is None else f" by {shape.resize} to {shape.size[0]}x{shape.size[1]}"
    model = hashlib.blake2b(repr(engine.config).encode(), digest_size=6).hexdigest()
    parts = [f"model {model} {_name(engine.model.dtype)}", f"head {_name(head)} {runs}, {engine.steps} steps"]
    parts += ["fp8"] if engine.quantization == "fp8" else []
    parts += [
        f"posterior {engine.posterior}",
        f"batch {shape.batch}",
        f"views {views}{to}",
        f"text {shape.text_length}",
    ]
    parts += ["state"] if shape.state else []
    parts += ["guided"] if shape.max_guidance is not None else []
    return ", ".join(parts)


def chosen(engine: Engine, shape: RequestShape) -> bool:
    """Whether a plan of the engine, on a GPU, launches its kernels so. "cached" reads a verdict, of this very machine."""
    if engine.programmatic_launch != "cached":
        return engine.programmatic_launch == "on"
    if engine.verdicts is None:
        return False
    text = step_text(engine, shape)
    return engine.verdicts.choice(PROGRAMMATIC_LAUNCH, (text,), lambda: SWITCHES[PROGRAMMATIC_LAUNCH]) == "on"


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
