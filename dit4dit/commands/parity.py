"""`dit4dit parity`: does this package, on this machine, return what the published code returned?

A golden folder holds a checkpoint (or names one), one batch, every random draw, and the results of each stage. Errors are
max|got - want| / max|want| per tensor; each stage goes on from this package's own result of the stage before it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit4dit import ops
from dit4dit.commands.report import read_json_object, table
from dit4dit.embodiments import EMBODIMENTS
from dit4dit.errors import CheckpointError
from dit4dit.model.checkpoint import Checkpoint, open_checkpoint
from dit4dit.model.dit4dit import DiT4DiT, Draws
from dit4dit.model.flow import high_sigma
from dit4dit.model.text import tokenize
from dit4dit.model.weights import build
from dit4dit.policy import load_tokenizer
from dit4dit.types import Batch

# forward and gradient limits; float32 is the promise, the others bound a run whose dtype rounds by itself
LIMITS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-1, 5e-1)}
GRADIENTS = {
    "action_decoder": "head.action_decoder.layer2.weight",
    "block0_to_q": "backbone.transformer.transformer_blocks.0.attn1.to_q.weight",
}


@dataclass(frozen=True)
class Stage:
    """One line of the table."""

    name: str
    error: float
    limit: float
    implementations: str

    @property
    def ok(self) -> bool:
        return self.error <= self.limit


@dataclass
class Run:
    """A model, a golden batch on its device, and the results so far, under the golden file's names."""

    model: DiT4DiT
    golden: dict[str, Tensor]
    results: dict[str, Tensor]
    ran: dict[str, str]

    @contextlib.contextmanager
    def stage(self) -> Iterator[Callable[[str, Tensor], None]]:
        """Gives a function that keeps a result together with the implementations that ran for it."""
        kept: dict[str, Tensor] = {}
        with ops.trace() as used:
            yield lambda name, value: kept.update({name: value})
        label = ", ".join(f"{op}: {'/'.join(sorted(names))}" for op, names in used.items())
        for name, value in kept.items():
            self.results[name], self.ran[name] = value.detach(), "; ".join(filter(None, ["torch", label]))


def check(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    backend: str | None,
    backbone: Path | None = None,
    checkpoint: Path | None = None,
) -> list[Stage]:
    """Run a golden folder and compare; the stages in order.

    Raises:
        CheckpointError: no golden files in the folder, or a checkpoint that does not load.
    """
    golden_file = folder / "golden.safetensors"
    if not golden_file.is_file() or not (folder / "golden.json").is_file():
        raise CheckpointError(
            f"{folder}: no golden.safetensors and golden.json; make them with parity DIR --record CHECKPOINT"
        )
    facts = read_json_object(folder / "golden.json")
    opened = open_checkpoint(checkpoint or _checkpoint_of(folder, facts), backbone)
    golden = load_golden(golden_file, device)
    model = golden_model(opened, device, dtype)
    with ops.use_backend(backend) if backend else contextlib.nullcontext():
        run = execute(model, opened, golden, list(facts["prompts"]))
    return compare(run, dtype)


def _checkpoint_of(folder: Path, facts: dict[str, Any]) -> Path:
    named = facts.get("checkpoint")
    return folder if named is None else (folder / named).resolve()


def load_golden(file: Path, device: torch.device) -> dict[str, Tensor]:
    """The golden tensors; CheckpointError when the file is truncated."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {name: value.to(device) for name, value in load_file(file).items()}
    except SafetensorError as error:
        raise CheckpointError(f"{file}: not readable ({error}); copy it again") from None


def golden_model(opened: Checkpoint, device: torch.device, dtype: torch.dtype) -> DiT4DiT:
    """The model with every part that its golden stages need."""
    training = opened.model.flow.training
    return build(
        opened.model,
        opened.tensors,
        str(opened.path),
        device=device,
        dtype=dtype,
        head_dtype=torch.float32,
        with_video_vae=training != "action",
        with_head=training != "video",
    )


def execute(model: DiT4DiT, opened: Checkpoint, golden: dict[str, Tensor], prompts: list[str]) -> Run:
    """All stages on the golden inputs and draws."""
    run = Run(model, golden, {}, {})
    device = golden["in.images"].device
    with run.stage() as keep:
        tokens = tokenize(load_tokenizer(opened.tokenizer), prompts, model.config.text.max_length)
        embeds = model.embed(tokens.to(device))
        keep("infer.prompt_embeds", embeds)
    with run.stage() as keep, torch.no_grad():
        video = prepare_video(golden["in.images"], model.backbone.transformer.dtype)
        condition = model.backbone.condition(video[:, 0], golden["infer.posterior_noise"])
        keep("infer.condition_latent", condition)
    with run.stage() as keep, torch.no_grad():
        features = model.backbone.features(condition, golden["infer.latent_noise"], model.context(embeds))
        keep("infer.features", features)
    if model.head is not None:
        with run.stage() as keep, torch.no_grad():
            keep(
                "infer.normalized_actions",
                model.head.sample(golden["infer.action_noise"], features.float(), _state(golden)),
            )
    with run.stage() as keep:
        _train(run, video, embeds, keep)
    return run


def prepare_video(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [B, F, H, W, 3] -> [B, F, 3, H, W] in [-1, 1] through the preprocess op, without resizing."""
    flat = ops.preprocess([images.flatten(0, 1)], None, "bilinear", dtype)
    return flat.unflatten(0, images.shape[:2])


def _state(golden: dict[str, Tensor]) -> Tensor | None:
    return golden.get("in.state")


def _train(run: Run, video: Tensor, embeds: Tensor, keep: Callable[[str, Tensor], None]) -> None:
    """Both losses and their gradients, in evaluation mode (no dropout)."""
    model, golden = run.model, run.golden
    batch = Batch(
        video=video,
        prompt_embeds=embeds,
        actions=golden["in.actions"],
        action_mask=golden["in.action_mask"],
        state=_state(golden),
    )
    draws = Draws(
        posterior=golden["train.posterior_noise"],
        latent=golden["train.latent_noise"],
        video_time=golden_video_time(model, golden),
        video_noise=golden["train.video_noise_future"],
        action_time=golden["train.action_time"],
        action_noise=golden["train.action_noise"],
    )
    losses = model.loss(batch, draws)
    if losses.action is not None:
        keep("train.action_loss", losses.action)
    if losses.video is not None:
        keep("train.video_loss", losses.video)
    losses.total.backward()
    for name, parameter in GRADIENTS.items():
        with contextlib.suppress(AttributeError):
            gradient = model.get_parameter(parameter).grad
            if gradient is not None:
                keep(f"train.grad.{name}", gradient)
    for name, module in (("action_model", model.head), ("transformer", model.backbone.transformer)):
        if module is not None:
            keep(f"train.grad_norm.{name}", gradient_norm(module))


def gradient_norm(module: nn.Module) -> Tensor:
    """Euclidean norm over all gradients of a module."""
    norms = [p.grad.float().norm() for p in module.parameters() if p.grad is not None]
    return torch.stack(norms).norm() if norms else torch.zeros(())


def golden_video_time(model: DiT4DiT, golden: dict[str, Tensor]) -> Tensor:
    """The video loss's times from their stored draws."""
    flow = model.config.flow
    if "train.video_time_uniform" in golden:
        t = golden["train.video_time_uniform"]
    else:
        t = torch.sigmoid(golden["train.video_time_logit"])
    if flow.high_sigma_ratio is None or flow.high_sigma_min is None:
        return t
    high = high_sigma(golden["train.video_high_sigma_t"], flow.high_sigma_min)
    return torch.where(golden["train.video_high_sigma_u"] < flow.high_sigma_ratio, high, t)


def compare(run: Run, dtype: torch.dtype) -> list[Stage]:
    """One `Stage` per golden result; a golden result that this run did not produce is a breach."""
    forward, backward = LIMITS[dtype]
    inputs = ("in.", "infer.posterior_noise", "infer.latent_noise", "infer.action_noise")
    stages = []
    for name in STAGE_ORDER:
        if name not in run.golden or name.startswith(inputs):
            continue
        limit = backward if ".grad" in name else forward
        got = run.results.get(name)
        error = float("inf") if got is None else relative_error(got, run.golden[name])
        stages.append(Stage(name, error, limit, run.ran.get(name, "did not run")))
    return stages


STAGE_ORDER = (
    "infer.prompt_embeds",
    "infer.condition_latent",
    "infer.features",
    "infer.normalized_actions",
    "train.action_loss",
    "train.video_loss",
    *(f"train.grad.{name}" for name in GRADIENTS),
    "train.grad_norm.action_model",
    "train.grad_norm.transformer",
)


def relative_error(got: Tensor, want: Tensor) -> float:
    """max|got - want| / max|want|; infinite on another shape or a NaN, which would otherwise compare as small."""
    if got.shape != want.shape or not torch.isfinite(got).all():
        return float("inf")
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def show(stages: list[Stage]) -> str:
    """The table that the command prints."""
    rows = [[s.name, f"{s.error:.2e}", f"{s.limit:.0e}", "ok" if s.ok else "BREACH", s.implementations] for s in stages]
    return table(["stage", "max rel. error", "limit", "verdict", "ran"], rows, right=(1, 2))


def record(folder: Path, checkpoint: Path, *, backbone: Path | None, seed: int, device: torch.device) -> list[str]:
    """Write a golden folder of a checkpoint as this package computes it in float32; returns the stages recorded.

    The folder names the checkpoint (relative where it lies inside) and holds inputs, draws and results.
    """
    import diffusers
    import transformers
    from safetensors.torch import save_file

    import dit4dit
    from dit4dit.model.own_format import new_folder, write_json

    opened = open_checkpoint(checkpoint, backbone)
    model = golden_model(opened, device, torch.float32)
    prompts = ["pick up the red block and place it in the bowl", "open the drawer"]
    golden = random_golden(opened, seed, device)
    run = execute(model, opened, golden, prompts)
    facts = {
        "prompts": prompts,
        "seed": seed,
        "sigma": opened.model.sigma,
        "checkpoint": str(opened.path.resolve()),
        "dit4dit": dit4dit.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "device": str(device),
    }
    with new_folder(folder) as partial:
        tensors = {name: value.cpu().contiguous() for name, value in {**golden, **run.results}.items()}
        save_file(tensors, partial / "golden.safetensors")
        write_json(partial / "golden.json", facts)
    return sorted(run.results)


def random_golden(opened: Checkpoint, seed: int, device: torch.device) -> dict[str, Tensor]:
    """Inputs and draws for a golden batch of two, a function of the seed, under the golden file's names."""
    config = opened.model
    generator = torch.Generator(device="cpu").manual_seed(seed)
    robot = EMBODIMENTS.get(opened.embodiment or "")
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


def as_json(stages: list[Stage], *, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The table as data; an infinite error becomes null, which JSON can hold."""
    rows = [
        {
            "stage": s.name,
            "error": None if s.error == float("inf") else s.error,
            "limit": s.limit,
            "ok": s.ok,
            "ran": s.implementations,
        }
        for s in stages
    ]
    data = {"device": str(device), "dtype": str(dtype), "ok": all(s.ok for s in stages), "stages": rows}
    return dict(json.loads(json.dumps(data)))
