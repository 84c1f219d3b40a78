"""`dit4dit calibrate`: the largest activations of a checkpoint on examples, for quantization="fp8", and what fp8 costs there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit4dit.commands.predict import check_views, observe, read
from dit4dit.commands.shell import check_inputs
from dit4dit.engine import Calibration, Engine, errors
from dit4dit.errors import InputError, shown
from dit4dit.policy.policy import Policy
from dit4dit.robots.embodiment import Embodiment
from dit4dit.tables import table
from dit4dit.types import Noise


@dataclass(frozen=True)
class Example:
    """One request as files: an image per view, a state (JSON file, or what would be in it), an instruction."""

    images: list[Path]
    state: Path | dict[str, Any] | None
    instruction: str


def choose_examples(
    file: Path | None, images: list[Path], state: Path | None, instruction: str | None
) -> list[Example]:
    """The file's examples, or the single one given by options; InputError where it is neither or both."""
    single = bool(images) or state is not None or instruction is not None
    if (file is not None) == single:
        raise InputError("expected either --examples FILE, or --image (one per view), --state and --instruction")
    if file is None and instruction is None:
        raise InputError("--instruction: expected what to do, in words")
    found = [Example(images, state, str(instruction))] if file is None else read_examples(file)
    for example in found:  # a file that is not there is found before the policy is loaded
        for path in (*example.images, *([example.state] if isinstance(example.state, Path) else [])):
            if not path.is_file():
                raise InputError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; an example names it")
    return found


def read_examples(path: Path) -> list[Example]:
    """A JSON lines file: {"images": [one per view], "state": object or file, "instruction": words}, paths relative to it.

    InputError: no such file, or a line that is none of these.
    """
    check_inputs(examples=path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--examples {path}: cannot be read ({error})") from None
    found = [_example(f"{path}:{i}", line, path.parent) for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"--examples {path}: empty; expected one JSON object a line")
    return found


def _example(where: str, line: str, folder: Path) -> Example:
    wanted = '{"images": ["a.png", ...], "state": {...} or "state.json", "instruction": "..."}'
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON ({error}); expected {wanted}") from None
    if not isinstance(data, dict) or not data.keys() <= {"images", "state", "instruction"}:
        got = list(data) if isinstance(data, dict) else type(data).__name__
        raise InputError(f"{where}: expected {wanted}, got {got}")
    images, state, words = data.get("images"), data.get("state"), data.get("instruction")
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise InputError(f"{where}: images: expected a list of file names, got {shown(images)}")
    if state is not None and not isinstance(state, (str, dict)):
        raise InputError(f"{where}: state: expected an object or a file name, got {shown(state)}")
    if not isinstance(words, str):
        raise InputError(f"{where}: instruction: expected words, got {shown(words)}")
    return Example([folder / name for name in images], folder / state if isinstance(state, str) else state, words)


def check_fit(examples: Sequence[Example], robot: Embodiment) -> None:
    """InputError unless each example has an image for each view of the robot."""
    for example in examples:
        check_views(robot, len(example.images))


def calibrate(policy: Policy, examples: Sequence[Example], seed: int) -> tuple[Calibration, dict[str, Any]]:
    """The calibration on these examples, with noise (seed, number of the example), and the errors of fp8 on them."""
    observations = [observe(policy, *read(e.images, e.state)) for e in examples]
    instructions = [example.instruction for example in examples]
    noise = [Noise.from_seed(seed, i) for i in range(len(examples))]
    calibration = policy.calibrate(observations, instructions, noise=noise)
    exact = policy.engine
    assert exact is not None
    quantised = Engine(policy.model, steps=exact.steps, quantization="fp8", calibration=calibration)
    return calibration, errors(exact, quantised, policy.step_inputs(observations, instructions, noise=noise))


def show(calibration: Calibration, found: dict[str, Any]) -> str:
    """What fp8 costs on the examples, as a table."""
    rows = [[what, *(f"{found[what][norm]:.2e}" for norm in ("rms", "max"))] for what in found]
    head = f"{calibration.samples} examples, {len(calibration.amax)} matrices; fp8 against the exact engine, worst example:"
    return head + "\n" + table(["", "rms error", "max error"], rows, right=(1, 2))
