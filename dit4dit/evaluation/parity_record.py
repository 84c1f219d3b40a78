"""A golden folder of what this package computes, to compare other machines with (`dit4dit parity NEW --record CHECKPOINT`)."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dit4dit import __version__
from dit4dit.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dit4dit.checkpoints.native import new_folder, write_json
from dit4dit.checkpoints.robot import robot_of
from dit4dit.evaluation.parity import execute, expected_stages, golden_model
from dit4dit.model.dit4dit import Draws
from dit4dit.types import Batch


def record(folder: Path, checkpoint: Path, *, backbone: Path | None, seed: int, device: torch.device) -> list[str]:
    """Write a golden folder of a checkpoint as this package computes it in float32; returns the stages recorded.

    The folder names the checkpoint (relative where it lies inside) and holds inputs, draws and results.
    """
    with new_folder(folder) as partial:  # first of all: where it cannot be made, nothing is computed
        import diffusers
        import transformers

        opened = open_checkpoint(checkpoint, backbone)
        model = golden_model(opened, device, torch.float32)
        prompts = ["pick up the red block and place it in the bowl", "open the drawer"]
        golden = random_golden(opened, seed, device)
        run = execute(model, opened, golden, prompts)
        facts = {
            "prompts": prompts,
            "seed": seed,
            "sigma": opened.model.sigma,
            # relative, so that folder and checkpoint can move together
            "checkpoint": os.path.relpath(opened.path.resolve(), folder.resolve()),
            "dit4dit": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "device": str(device),
        }
        kept = {name: run.results[name] for name in expected_stages(opened.model.flow.training, engine=False)}
        tensors = {name: value.cpu().contiguous() for name, value in {**golden, **kept}.items()}
        save_file(tensors, partial / "golden.safetensors")
        write_json(partial / "golden.json", facts)
    return list(kept)


def random_golden(opened: Checkpoint, seed: int, device: torch.device) -> dict[str, Tensor]:
    """Inputs and draws for a golden batch of two, a function of the seed, under the golden file's names."""
    config = opened.model
    generator = torch.Generator(device="cpu").manual_seed(seed)
    robot = robot_of(opened)
    views = 1 if robot is None else len(robot.views)
    height, width = config.image_size[0], config.image_size[1] * views
    head, flow, batch = config.head, config.flow, 2
    pixels = torch.randint(0, 256, (batch, config.frames, height, width, 3), generator=generator, dtype=torch.uint8)
    actions = torch.rand(batch, head.action_horizon, head.action_dim, generator=generator) * 2 - 1
    mask = torch.zeros_like(actions, dtype=torch.bool)
    mask[:, :, : max(1, head.action_dim - 1)] = True
    golden = {"in.images": pixels, "in.actions": actions * mask, "in.action_mask": mask}
    if head.state_dim is not None:
        golden["in.state"] = torch.rand(batch, 1, head.state_dim, generator=generator) * 2 - 1
    blank = Batch(pixels.permute(0, 1, 4, 2, 3), actions, actions, mask)
    plain = replace(config, flow=replace(flow, time_distribution="uniform", high_sigma_ratio=None, high_sigma_min=None))
    for part in ("infer", "train"):
        draws = Draws.random(plain, blank, generator)
        golden |= {f"{part}.posterior_noise": draws.posterior, f"{part}.latent_noise": draws.latent}
    golden["infer.action_noise"] = torch.randn(actions.shape, generator=generator)
    golden |= {
        "train.video_noise_future": draws.video_noise,
        "train.action_time": draws.action_time,
        "train.action_noise": draws.action_noise,
    }
    if flow.time_distribution == "uniform":
        golden["train.video_time_uniform"] = draws.video_time
    else:
        golden["train.video_time_logit"] = torch.randn(batch, generator=generator)
    if flow.high_sigma_ratio is not None:
        # one sample on either side of the ratio, so that both branches are held
        golden["train.video_high_sigma_u"] = torch.tensor([flow.high_sigma_ratio / 2, (1 + flow.high_sigma_ratio) / 2])
        golden["train.video_high_sigma_t"] = torch.rand(batch, generator=generator)
    return {name: value.to(device) for name, value in golden.items()}
