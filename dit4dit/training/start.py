"""What a run trains on, and a rehearsal of its start: whatever would stop it, and the memory that it needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from dit4dit.data.catalogue import catalogue
from dit4dit.data.fit import check_fit
from dit4dit.errors import ConfigError, Dit4DitError
from dit4dit.robots import EMBODIMENTS, embodiment
from dit4dit.training import checkpoint, memory, preflight, setup
from dit4dit.training.config import TrainConfig
from dit4dit.training.lerobot_data import LeRobotData
from dit4dit.training.loop import check_progress
from dit4dit.training.random_data import RandomData
from dit4dit.training.resume import resumed
from dit4dit.training.samples import TrainingData


def open_data(config: TrainConfig) -> TrainingData:
    """The mixture; "random" is data of the right sizes that mean nothing."""
    model = setup.sized(config).model
    if config.data.mixture != "random":
        return LeRobotData.open(config.data, model, config.run.seed, config.embodiment)
    if config.embodiment is None:
        raise ConfigError("data.mixture random: needs an embodiment with known sizes; choose one with --embodiment")
    check_fit(embodiment(config.embodiment), model)
    return RandomData(model, config.embodiment)


def dry_run(config: TrainConfig, processes: int | None, resume: str | None, say: Callable[[str], object]) -> None:
    """Say the memory plan, as far as there is one, and raise the first of what would stop the run; say the others.

    Args:
        processes: of the plan; one, or as many as the checkpoint's batch asks for, where None.
        resume: see `resume.find_resume`.
    """
    faults: dict[str, Dit4DitError] = {}
    sized, data, prompts = config, None, None
    saved = None
    with noted(faults):
        if (folder := resumed(config, resume, say)) is not None:
            saved = checkpoint.read(folder)
    with noted(faults):
        preflight.check_start(config)
    with noted(faults):
        sized = setup.sized(config)
    with noted(faults):
        data = open_data(config)
    with noted(faults):
        if saved is not None and data is not None:
            check_progress(saved, config, data, processes or preflight.ranks_of(saved, config))
    with noted(faults):
        if data is not None:
            preflight.check_first_batch(sized, data)
    with noted(faults):
        prompts = preflight.check_weights(config)
        if prompts is None:
            say(f"note: {config.weights.backbone} is not on this machine; the start will download it")
    if (
        data is not None
        and prompts is not None
        and (cut := preflight.cut_prompts(prompts[0], data.instructions, prompts[1]))
    ):
        say(f"note: {cut}")
    with noted(faults):
        size = picture_size(sized) if data is None else data.picture_size
        say(memory.show(memory.plan(sized, size, processes or 1), sized, processes or 1))
    found = list(faults.values())
    for fault in found[1:]:
        say(f"also: {fault}")
    if found:
        raise found[0]


@contextlib.contextmanager
def noted(faults: dict[str, Dit4DitError]) -> Iterator[None]:
    """Keep a user's error of the block under its words."""
    try:
        yield
    except Dit4DitError as error:
        faults.setdefault(str(error), error)


def picture_size(config: TrainConfig) -> tuple[int, int]:
    """Height and width of the joined views of the configuration's robot; one view where the robot is the data's own."""
    height, width = config.model.image_size
    name = config.embodiment or ""
    if name in EMBODIMENTS:
        return height, width * len(EMBODIMENTS[name].views)
    robots = catalogue(None if config.data.robots is None else Path(config.data.robots)).robots
    return height, width * (len(robots[name].video) if name in robots else 1)
