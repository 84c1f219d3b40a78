"""The op calls that `dit4dit tune` measures: those of the plans that a policy makes for the requests that it is asked for.

No weights are read: the engine's own plan is run and listed on tensors without data (`engine.listing`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from dit4dit.benchmarks.tuning import Todo

from dit4dit.checkpoints.checkpoint import open_checkpoint
from dit4dit.checkpoints.robot import for_checkpoint
from dit4dit.config import ModelConfig
from dit4dit.engine import RequestShape
from dit4dit.engine.listing import calls, distinct, engine_without_data
from dit4dit.errors import InputError, did_you_mean, shown
from dit4dit.ops import dispatch
from dit4dit.policy.requests import check_room, checked_batch, checked_size
from dit4dit.presets import preset
from dit4dit.robots import EMBODIMENTS
from dit4dit.robots.embodiment import Embodiment
from dit4dit.types import MAX_GUIDANCE

Size = tuple[int, int]
"""Height and width of an image."""
Request = tuple[RequestShape, int | None]
"""What decides a plan, and the robot's action dimensions; None where only normalised actions are wanted."""


@dataclass(frozen=True)
class Subject:
    """Whose calls: a model and its robot."""

    name: str
    config: ModelConfig
    robot: Embodiment


def of_preset(name: str) -> Subject:
    """ConfigError: no such preset."""
    found = preset(name)
    return Subject(f"preset {name}", found.model, EMBODIMENTS[found.embodiment])


def of_checkpoint(path: str, backbone: str | None, embodiment: str | None) -> Subject:
    """From a checkpoint's small files, checked as `Policy.from_pretrained` does; arguments and errors are its."""
    checkpoint = open_checkpoint(path, backbone)
    return Subject(f"checkpoint {path}", checkpoint.model, for_checkpoint(checkpoint, embodiment).embodiment)


def read_images(options: Sequence[str], robot: Embodiment) -> dict[str, Size]:
    """["VIEW=HxW", ...] -> view -> height and width. InputError: no such view, given twice, or no size."""
    found: dict[str, Size] = {}
    for option in options:
        view, _, size = option.partition("=")
        numbers = size.split("x")
        if not size or len(numbers) != 2 or not all(number.isascii() and number.isdigit() for number in numbers):
            raise InputError(
                f"--image {shown(option)}: expected VIEW=HEIGHTxWIDTH in pixels, {robot.views[0]}=480x640 say"
            )
        if view not in robot.views:
            known = ", ".join(robot.views)
            raise InputError(f"--image {shown(option)}: no such view{did_you_mean(view, robot.views)}; views: {known}")
        if view in found:
            raise InputError(f"--image {view}: given twice; give one size for a view")
        found[view] = checked_size(f"--image {view}", (int(numbers[0][:9]), int(numbers[1][:9])))
    return found


def requests(subject: Subject, batches: Sequence[int], images: Mapping[str, Size]) -> list[Request]:
    """What a robot and the published call ask of a policy, each batch in turn, the first batch first.

    For each batch: images of the sizes that are given, and of the model's own; both without guidance and with it; and what
    `predict_action` takes, joined images of the model's own size. With a state where the model has a state token: what goes
    without one, as a published example may, is not among them, nor are instructions of another length than the text encoder's.

    images: view -> height and width; a view that is not named has the model's own.
    InputError: a batch that no policy takes, or images that are too many or too large.
    """
    config, robot = subject.config, subject.robot
    own = checked_size("image_size", config.image_size)
    state, length, count = config.head.state_dim is not None, config.text.max_length, len(robot.views)
    kinds = [tuple(images.get(view, own) for view in robot.views)] if images else []
    kinds += [(own,) * count]
    found: list[Request] = []
    for batch in dict.fromkeys(map(checked_batch, batches)):
        for views in dict.fromkeys(kinds):
            check_room(batch, views)
            for most in (None, MAX_GUIDANCE):
                shape = RequestShape(batch, views, own, robot.resize, state, length, most)
                found.append((shape, robot.action_dim))
        joined = (own[0], own[1] * count)
        found.append((RequestShape(batch, (joined,), None, "bilinear", state, length), None))
    return found


def todo(
    subject: Subject,
    wanted: Sequence[Request],
    device: torch.device,
    *,
    dtype: torch.dtype,
    head_dtype: torch.dtype | None = None,
    fp8: bool = False,
    steps: int | None = None,
    only: Sequence[str] = (),
) -> list[Todo]:
    """Every distinct op call of the plans for these requests on a device, in the order in which they come.

    `count` is the number of such calls in one step for the first request, 0 for a call that only others make: times count,
    times can be added up to one step.

    dtype: of VAE and backbone. head_dtype: of the head; `dtype` when None. steps: as of `Engine`. only: these ops;
        all when empty.
    InputError: a name in `only` that is no op, or an op that is not called. ConfigError: as of `Engine`.
    """
    for name in only:
        if name not in dispatch.names():
            known = ", ".join(dispatch.names())
            raise InputError(f"--ops {shown(name)}: no such op{did_you_mean(name, dispatch.names())}; known: {known}")
    gpu = device.type == "cuda"
    engine = engine_without_data(subject.config, dtype=dtype, head_dtype=head_dtype, fp8=fp8, steps=steps, gpu=gpu)
    kernel = engine.one_launch if gpu else None
    found: dict[str, Todo] = {}
    for i, (shape, action_dim) in enumerate(wanted):
        # with head="library" guidance has a row of weights for each sample, with the kernel one for all
        for head in (kernel,) if kernel is None or shape.max_guidance is None else (kernel, None):
            engine.one_launch = head
            for key, ((op, args), count) in distinct(calls(engine, shape, action_dim)).items():
                found.setdefault(key, Todo(op, args, count if i == 0 else 0))
    ops = list(dict.fromkeys(one.op for one in found.values()))
    for name in only:
        if name not in ops:
            raise InputError(f"--ops {name}: {subject.name} does not call it; it calls: {', '.join(ops)}")
    return [one for one in found.values() if not only or one.op in only]


def counts(found: Sequence[Todo]) -> dict[str, int]:
    """op -> how many distinct calls of it there are."""
    ops: dict[str, int] = {}
    for one in found:
        ops[one.op] = ops.get(one.op, 0) + 1
    return ops
