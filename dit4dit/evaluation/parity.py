"""Does this package, on this machine, return what the published code returned?

A golden folder holds a checkpoint (or names one), one batch, every random draw, and the results of each stage. Errors are
max|got - want| / max|want| per tensor; each stage goes on from this package's own result of the stage before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dit4dit import ops
from dit4dit.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dit4dit.checkpoints.weights import build
from dit4dit.engine import Engine, stack
from dit4dit.errors import CheckpointError, shown
from dit4dit.files.keys import read_json
from dit4dit.model.dit4dit import DiT4DiT, Draws
from dit4dit.model.flow import high_sigma
from dit4dit.model.text import tokenize
from dit4dit.policy.prompts import load_tokenizer
from dit4dit.tables import table
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
    engine: bool = False,
    head: Literal["auto", "library", "one_launch"] = "auto",
    head_dtype: torch.dtype = torch.float32,
) -> list[Stage]:
    """Run a golden folder and compare; the stages in order. `head`: of the engine (`Engine`), as is `head_dtype`.

    Raises:
        CheckpointError: no golden files in the folder, or a checkpoint that does not load.
    """
    golden_file = folder / "golden.safetensors"
    if not golden_file.is_file() or not (folder / "golden.json").is_file():
        raise CheckpointError(
            f"{folder}: no golden.safetensors and golden.json; make them with parity DIR --record CHECKPOINT"
        )
    facts = read_json(folder / "golden.json", again="make it again with parity DIR --record CHECKPOINT")
    prompts = facts.get("prompts")
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise CheckpointError(
            f"{folder / 'golden.json'}: expected 'prompts', a list of instructions, got {shown(prompts)}"
        )
    opened = open_checkpoint(checkpoint or _checkpoint_of(folder, facts), backbone)
    golden = load_golden(golden_file, device)
    check_inputs(golden, opened, len(prompts), str(golden_file))
    model = golden_model(opened, device, dtype, head_dtype)
    with wish(backend):
        through = Engine(model, head=head) if engine else None
        run = (
            execute(model, opened, golden, prompts)
            if through is None
            else execute_engine(through, opened, golden, prompts)
        )
    return compare(run, dtype, expected_stages(opened.model.flow.training, engine=engine))


def _checkpoint_of(folder: Path, facts: dict[str, Any]) -> Path:
    """The checkpoint that a recorded folder names, or the folder itself, as in the fixtures."""
    named = facts.get("checkpoint")
    if named is None:
        return folder
    path = (folder / str(named)).resolve()
    if not path.exists():
        raise CheckpointError(f"{folder}: recorded from {path}, which is not there; name it with --checkpoint")
    return path


def wish(backend: str | None) -> contextlib.AbstractContextManager[None]:
    """Every op that has an implementation of this name must run it; the others choose for themselves, and the table says
    what ran. BackendError where no op has one.
    """
    if backend is None:
        return contextlib.nullcontext()
    having = {op: backend for op in ops.names() if backend in ops.implementations(op)}
    return ops.use_backend(**having) if having else ops.use_backend(backend)


def check_inputs(golden: dict[str, Tensor], opened: Checkpoint, batch: int, where: str) -> None:
    """CheckpointError unless the golden inputs and draws are there and of the checkpoint's sizes."""
    config = opened.model
    images = golden.get("in.images")
    if images is None or images.dim() != 5 or images.dtype != torch.uint8 or images.shape[1] != config.frames:
        got = "none" if images is None else f"{images.dtype} {list(images.shape)}"
        raise CheckpointError(
            f"{where}: in.images: expected uint8 [B, {config.frames}, H, W, 3], got {got}; another checkpoint's?"
        )
    rows, columns = config.latent_size(int(images.shape[2]), int(images.shape[3]))
    head, z, frames = config.head, config.vae.z_dim, config.latent_frames
    wanted: dict[str, tuple[int, ...]] = {}
    for part in ("infer", "train"):
        wanted[f"{part}.posterior_noise"] = (batch, z, 1, rows, columns)
        wanted[f"{part}.latent_noise"] = (batch, z, frames, rows, columns)
    for name in ("infer.action_noise", "in.actions", "in.action_mask"):
        wanted[name] = (batch, head.action_horizon, head.action_dim)
    if head.state_dim is not None:
        wanted["in.state"] = (batch, 1, head.state_dim)
    wanted["train.video_noise_future"] = (batch, z, frames - 1, rows, columns)
    for name, shape in wanted.items():
        found = None if name not in golden else tuple(golden[name].shape)
        if found != shape:
            raise CheckpointError(f"{where}: {name}: expected shape {list(shape)} for this checkpoint, got {found}")
    missing = [name for name in ("train.action_time", "train.action_noise") if name not in golden]
    if missing:
        raise CheckpointError(f"{where}: {missing[0]}: missing")


def load_golden(file: Path, device: torch.device) -> dict[str, Tensor]:
    """The golden tensors; CheckpointError when the file is truncated."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {name: value.to(device) for name, value in load_file(file).items()}
    except SafetensorError as error:
        raise CheckpointError(f"{file}: not readable ({error}); copy it again") from None


def golden_model(
    opened: Checkpoint, device: torch.device, dtype: torch.dtype, head_dtype: torch.dtype = torch.float32
) -> DiT4DiT:
    """The model with every part that its golden stages need."""
    training = opened.model.flow.training
    return build(
        opened.model,
        opened.tensors,
        str(opened.path),
        device=device,
        dtype=dtype,
        head_dtype=head_dtype,
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
        video = prepare_video(golden["in.images"], model.dtype)
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


def execute_engine(engine: Engine, opened: Checkpoint, golden: dict[str, Tensor], prompts: list[str]) -> Run:
    """The inference stages through the engine, each call as a plan would run it; training has no engine."""
    with engine.choices():
        return _execute_engine(engine, opened, golden, prompts)


def _execute_engine(engine: Engine, opened: Checkpoint, golden: dict[str, Tensor], prompts: list[str]) -> Run:
    model, device = engine.model, golden["in.images"].device
    run = Run(model, golden, {}, {})
    with run.stage() as keep:
        tokens = tokenize(load_tokenizer(opened.tokenizer), prompts, model.config.text.max_length)
        embeds = model.embed(tokens.to(device))
        packs = [engine.pack(embeds[i : i + 1]) for i in range(len(prompts))]
        keep("infer.prompt_embeds", embeds)
    with run.stage() as keep:
        frame = prepare_video(golden["in.images"][:, :1], model.dtype)[:, 0]
        condition = engine.condition(frame, golden["infer.posterior_noise"])
        keep("infer.condition_latent", condition)
    with run.stage() as keep:
        latents = torch.cat([condition, golden["infer.latent_noise"][:, :, 1:]], dim=2)
        with torch.no_grad():
            features = engine.backbone(latents, stack(packs))
        keep("infer.features", features)
    with run.stage() as keep:
        keep("infer.normalized_actions", engine.actions(features, _state(golden), golden["infer.action_noise"]))
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


def compare(run: Run, dtype: torch.dtype, names: Sequence[str]) -> list[Stage]:
    """One `Stage` per name; a result that the golden file or this run lacks is a breach."""
    forward, backward = LIMITS[dtype]
    stages = []
    for name in names:
        limit = backward if ".grad" in name else forward
        if name not in run.golden:
            stages.append(Stage(name, float("inf"), limit, "not in the golden file"))
            continue
        got = run.results.get(name)
        error = float("inf") if got is None else relative_error(got, run.golden[name])
        stages.append(Stage(name, error, limit, run.ran.get(name, "did not run")))
    return stages


def expected_stages(training: str, *, engine: bool) -> list[str]:
    """What a golden folder of a model trained in this mode must hold, in order."""
    if engine:
        return list(ENGINE_STAGES)
    absent = {
        "joint": (),
        "action": ("train.video_loss", "train.grad.block0_to_q", "train.grad_norm.transformer"),
        "video": (
            "infer.normalized_actions",
            "train.action_loss",
            "train.grad.action_decoder",
            "train.grad_norm.action_model",
        ),
    }[training]
    return [name for name in STAGE_ORDER if name not in absent]


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
ENGINE_STAGES = STAGE_ORDER[:4]


def relative_error(got: Tensor, want: Tensor) -> float:
    """max|got - want| / max|want|; infinite on another shape or a NaN, which would otherwise compare as small."""
    if got.shape != want.shape or not torch.isfinite(got).all():
        return float("inf")
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def show(stages: list[Stage]) -> str:
    """The stages as a table."""
    rows = [[s.name, f"{s.error:.2e}", f"{s.limit:.0e}", "ok" if s.ok else "BREACH", s.implementations] for s in stages]
    return table(["stage", "max rel. error", "limit", "verdict", "ran"], rows, right=(1, 2))


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
    return {"device": str(device), "dtype": str(dtype), "ok": all(s.ok for s in stages), "stages": rows}
