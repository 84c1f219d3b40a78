"""Held-out samples: both losses, the open-loop error of sampled actions, and strips of predicted against true futures.

All draws follow from the sample's index, so two evaluations differ by the weights alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dit4dit.data.samples import Sample
from dit4dit.errors import DataError
from dit4dit.model import flow
from dit4dit.model.dit4dit import DiT4DiT, Draws
from dit4dit.robots.action_error import ActionError, ActionUnits
from dit4dit.training.caches import PromptCache
from dit4dit.training.feed import to_batch
from dit4dit.training.parallel import Processes, Root
from dit4dit.training.randomness import draws
from dit4dit.training.samples import MOST_ATTEMPTS, Raw, TrainingData, collate
from dit4dit.types import Batch

FUTURE_STEPS = 8
SUMS = ("action_loss", "action_mae", "entries", "video_loss", "samples", "skipped")


def chosen(data: TrainingData, count: int, ranks: int) -> list[int]:
    """About `count` held-out samples, evenly spread, and a multiple of `ranks` of them (the first ones come twice)."""
    everything = list(data.held_out())
    if not everything:
        return []
    some = everything[:: max(1, len(everything) // count)][:count]
    return [some[i % len(some)] for i in range(-(-len(some) // ranks) * ranks)]


def read(data: TrainingData, indices: Sequence[int]) -> Raw:
    """One batch of held-out samples. With `skip_bad` another one stands for each that cannot be read, so that every rank has as
    many passes as it would have.

    Raises:
        DataError: a sample that cannot be read, or too many of them in a row.
    """
    samples: list[Sample] = []
    used, skipped = list(indices), list[str]()
    everything: Sequence[int] = ()
    for row, index in enumerate(indices):
        for attempt in range(MOST_ATTEMPTS):
            try:
                samples.append(data.sample(used[row]))
                break
            except DataError as error:
                if not data.skip_bad or attempt == MOST_ATTEMPTS - 1:
                    raise
                skipped.append(str(error))
                everything = everything or data.held_out()
                place = everything.index(index) + (attempt + 1) * stride(len(everything))
                used[row] = everything[place % len(everything)]
    return collate(used, used, samples, skipped)


def stride(count: int) -> int:
    """Steps of this size visit each of `count` places, near ones late: what is damaged often is so for a stretch."""
    return next(size for size in range(round(0.618 * count) or 1, 2 * count + 1) if math.gcd(size, count) == 1)


@torch.no_grad()
def evaluate(
    root: Root,
    module: nn.Module,
    processes: Processes,
    data: TrainingData,
    prompts: PromptCache,
    *,
    samples: int,
    batch_size: int,
    seed: int,
) -> dict[str, float]:
    """Means over the held-out samples, those that the mode has.

    Returns:
        {"eval/action_loss", "eval/video_loss", "eval/action_mae" (mean |error| in normalised units)}, and per dimension in
        robot units {"action_mae/<dimension>", "action_mse/<dimension>"}; with several robots "action_mae/<robot>.<dimension>".
        With `skip_bad` "eval/skipped": how many samples could not be read, and others stood for them.
    """
    mine = chosen(data, samples, processes.ranks)[processes.rank :: processes.ranks]
    sums = {name: torch.zeros((), dtype=torch.float64, device=processes.device) for name in SUMS}
    robots = data.robots
    errors = [ActionError(len(robot.names)) for robot in robots]
    training = root.training
    root.eval()
    for start in range(0, len(mine), batch_size):
        indices = mine[start : start + batch_size]
        raw = read(data, indices)
        batch = to_batch(raw, root.model.config, processes.device, prompts, None)
        drawn = draws_for(root.model, batch, seed, raw.indices)
        sums["skipped"] += len(raw.skipped)
        found = module(partial(held_out_step, batch=batch, drawn=drawn))
        if (actions := found.pop("actions", None)) is not None:
            for row, index in enumerate(raw.indices):
                robot = data.robot(index)
                add_robot_error(errors[robot], robots[robot], actions[row], raw.actions[row], raw.action_mask[row])
        for name, value in found.items():
            sums[name] += value
    root.train(training)
    for error in errors:
        error.sums = processes.sum(torch.from_numpy(error.sums).to(processes.device)).cpu().numpy()
    totals = dict(zip(SUMS, processes.sum(torch.stack(list(sums.values()))).tolist(), strict=True))
    out = {}
    for name, per in (("action_loss", "entries"), ("action_mae", "entries"), ("video_loss", "samples")):
        if totals[per]:
            out[f"eval/{name}"] = totals[name] / totals[per]
    if data.skip_bad and mine:
        out["eval/skipped"] = totals["skipped"]
    return out | robot_errors(robots, errors)


def robot_errors(robots: Sequence[ActionUnits], errors: Sequence[ActionError]) -> dict[str, float]:
    """{"action_mae/<dimension>": ..., "action_mse/<dimension>": ...}; dimensions are named with their robot where there are
    several.
    """
    out: dict[str, float] = {}
    for robot, error in zip(robots, errors, strict=True):
        which = f"{robot.embodiment.name}." if len(robots) > 1 else ""
        for kind, values in (("mae", error.mae), ("mse", error.mse)):
            counted = {n: float(v) for n, v in zip(robot.names, values, strict=True) if not np.isnan(v)}
            out |= {f"action_{kind}/{which}{dimension}": value for dimension, value in counted.items()}
    return out


def add_robot_error(error: ActionError, robot: ActionUnits, predicted: Tensor, recorded: Tensor, mask: Tensor) -> None:
    """Add one chunk in robot units: predicted, recorded (normalised) and mask [K, A_model]."""
    both = [robot.robot(chunk.float().cpu().numpy()) for chunk in (predicted, recorded)]
    error.add(both[0], both[1], mask.cpu().numpy()[:, : len(robot.names)])


def draws_for(model: DiT4DiT, batch: Batch, seed: int, indices: Sequence[int]) -> Draws:
    """Draws of held-out samples, on the batch's device."""
    assert batch.video is not None
    size = model.config.latent_size(batch.video.shape[3], batch.video.shape[4])
    drawn = draws(model.config, size, seed, "evaluation", indices)
    return Draws(**{name: value.to(batch.actions.device) for name, value in vars(drawn).items()})


def held_out_step(model: DiT4DiT, batch: Batch, drawn: Draws) -> dict[str, Tensor]:
    """Sums over one batch of its losses and of the error of the actions that the policy would have sent, and their counts;
    under "actions" those actions themselves, normalised [B, K, A_model].
    """
    losses = model.loss(batch, drawn)
    out: dict[str, Tensor] = {}
    if losses.video is not None:
        count = torch.tensor(len(batch.actions), device=batch.actions.device)
        out |= {"video_loss": losses.video * count, "samples": count}
    if losses.action is not None:
        assert batch.video is not None
        noise, mask = drawn.action_noise[: len(batch.actions)], batch.action_mask
        context = model.context(batch.prompt_embeds)
        actions = model.sample(batch.video[:, 0], context, batch.state, drawn.posterior, drawn.latent, noise)
        error = (actions - batch.actions).abs() * mask
        out |= {"action_loss": losses.action * mask.sum(), "action_mae": error.sum(), "entries": mask.sum()}
        out["actions"] = actions
    return out


def predict_future(model: DiT4DiT, batch: Batch, drawn: Draws) -> dict[str, Tensor]:
    """The video that the backbone expects after frame 0, float32 [B, F, 3, H, W] in [-1, 1] under "video"."""
    assert batch.video is not None
    assert model.video_vae is not None
    backbone, context = model.backbone, model.context(batch.prompt_embeds)
    condition = backbone.condition(batch.video[:, 0], drawn.posterior)

    def velocity(x: Tensor, t: float) -> Tensor:
        return backbone.future_velocity(x, condition, context, torch.full((len(x),), t, device=x.device))

    future = flow.integrate(velocity, drawn.latent[:, :, 1:], FUTURE_STEPS)
    video = model.video_vae.decode(torch.cat([condition, future], dim=2))
    return {"video": video.transpose(1, 2)}


@torch.no_grad()
def draw_strips(
    root: Root,
    module: nn.Module,
    processes: Processes,
    data: TrainingData,
    prompts: PromptCache,
    folder: Path,
    *,
    count: int,
    seed: int,
) -> list[Path]:
    """One PNG per held-out clip: the true frames above, the predicted ones below. All ranks must call; the first writes."""
    from PIL import Image

    training = root.training
    root.eval()
    written = []
    for index in chosen(data, count, 1):
        raw = read(data, [index])
        batch = to_batch(raw, root.model.config, processes.device, prompts, None)
        predicted = module(partial(predict_future, batch=batch, drawn=draws_for(root.model, batch, seed, raw.indices)))
        assert batch.video is not None
        rows = [torch.cat(list(video[0]), dim=2) for video in (batch.video, predicted["video"])]
        picture = torch.cat(rows, dim=1).add(1).mul(127.5).round().clamp(0, 255).byte()
        if processes.first:
            folder.mkdir(parents=True, exist_ok=True)
            written.append(folder / f"clip_{raw.indices[0]:06d}.png")
            Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).cpu().numpy())).save(written[-1])
    root.train(training)
    return written
