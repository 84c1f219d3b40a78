"""`dit4dit bench training`."""

from __future__ import annotations

import sys
from pathlib import Path

from dit4dit.errors import InputError


def bench_training(steps: int = 7, batch_size: int = 4, seed: int = 0, json: Path | None = None) -> int:
    """Samples per second of a training step on this CPU against the published schedule, with and without cached latents.

    Args:
        steps: timed steps of each schedule, in alternation.
        batch_size: samples of a step.
        seed: of weights, data and draws.
        json: also write every number to this file.
    """
    from dit4dit.benchmarks import training  # type: ignore[import-not-found, unused-ignore]
    from dit4dit.commands.report import write_json

    for name, value in (("steps", steps), ("batch-size", batch_size)):
        if value < 1:
            raise InputError(f"--{name}: expected at least 1, got {value}")
    result = training.measure(steps=steps, batch_size=batch_size, seed=seed)
    if json is not None:
        write_json(json, result)
    sys.stdout.write(training.show(result) + "\n")
    return 0
