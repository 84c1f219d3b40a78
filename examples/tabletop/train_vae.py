"""Train the small video autoencoder of the tabletop world: `python examples/tabletop/train_vae.py --out DIR --seed 0`.

The architecture is diffusers' AutoencoderKLWan (causal in time, 8 x smaller in space, 4 x in time, 16 channels) with few
channels, so that a model trained on the tabletop walks through the same code as one on the published autoencoder. Pictures
are drawn on the fly from seeds below `TEST_SEEDS_FROM`; the numbers in metrics.json are measured on seeds from there on,
with the weights as stored. The committed weights took two runs, both in metrics.json: from nothing, then with `--start` on
clips with motion. Their limit: what moves fast stays at its place but is soft (`changed_pixels` in metrics.json tells by how
much), and a carried block may take on another colour; a longer second run is the first thing to try.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from numpy.typing import NDArray
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from tqdm import tqdm

from dit4dit.envs import tabletop
from dit4dit.envs.tabletop import TEST_SEEDS_FROM, Goal, Scene, ScriptedExpert, TabletopEnv
from dit4dit.errors import ConfigError
from dit4dit.files.atomic import whole_file, write_text
from dit4dit.tables import machine

ARCHITECTURE: dict[str, Any] = {
    "base_dim": 8,
    "decoder_base_dim": 10,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}


@dataclass(frozen=True)
class Kind:
    """One kind of training batch: `side` < 64 cuts out the gripper's neighbourhood, `moving` asks for clips with motion."""

    batch: int
    frames: int
    side: int = 64
    moving: bool = False


KINDS = (Kind(16, 1), Kind(4, 5), Kind(2, 9), Kind(8, 5, 40, True), Kind(4, 9, 40, True), Kind(4, 5, 64, True))
PLAN_AFTER = 50  # steps whose speed tells how many fit into the minutes; until then the learning rate still rises
SNAPSHOT = 1000  # steps between writing what there is
FOREGROUND = 4.0  # extra weight of pixels that are not bare table: few, small, and all that matters


@dataclass(frozen=True)
class TrainConfig:
    """`out` the folder to write; `minutes` planned from the speed of the first steps unless `steps` says how many to do.

    A run is a function of (seed, steps), to the rounding of the machine; metrics.json keeps both, to repeat it elsewhere.
    """

    out: Path
    seed: int = 0
    minutes: float = 25.0
    steps: int | None = None
    threads: int = 1
    lr: float = 2e-3
    kl: float = 3e-4  # weight of the mean KL per latent number
    edges: float = 0.5  # weight of the difference of neighbouring pixels
    ema: float = 0.998
    shares: tuple[float, ...] = (0.55, 0.33, 0.12, 0.0, 0.0, 0.0)  # of each of `KINDS`; lone frames are cheap
    motion: float = 0.0  # extra weight of pixels that differ from the clip's first frame
    start: Path | None = None  # go on from this folder's weights instead of random ones
    decoder_only: bool = False  # the latents of `start` stay what they are, and with them what a policy has learned
    log: Path | None = None  # JSON lines; `<out>_train.jsonl` unless given

    def __post_init__(self) -> None:
        if self.minutes <= 0 or (self.steps is not None and self.steps < 1):
            raise ConfigError(f"TrainConfig: minutes and steps must be positive, got {self.minutes} and {self.steps}")
        if len(self.shares) != len(KINDS) or min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise ConfigError(f"TrainConfig.shares: expected {len(KINDS)} numbers that add up to 1, got {self.shares}")
        if self.decoder_only and self.start is None:
            raise ConfigError("TrainConfig.decoder_only: needs `start`, the weights whose latents are kept")


def episode(seed: int, rng: np.random.Generator) -> list[Scene]:
    """The scenes of one episode: the expert with more or less noise and any goal, at times idle or random afterwards."""
    env = TabletopEnv(seed)
    colours, plates = [block.colour for block in env.scene.blocks], [plate.colour for plate in env.scene.plates]
    goal = Goal(str(rng.choice(colours)), str(rng.choice(plates)))
    expert = ScriptedExpert(env, goal=goal, noise=float(rng.choice([0.0, 0.01, 0.03])), seed=int(rng.integers(2**31)))
    scenes = [env.scene]
    length = int(rng.integers(30, 50))
    wild_from = int(rng.choice([0, length // 2, length, length]))
    drift, grip = np.zeros(2), 0.0
    while len(scenes) < length:
        action = expert.act().astype(np.float64)
        if len(scenes) > wild_from:
            drift = 0.8 * drift + rng.normal(0.0, 0.04, 2)
            grip = float(rng.random() < 0.5) if rng.random() < 0.2 else grip
            action = np.array([env.scene.x + drift[0], env.scene.y + drift[1], grip])
        env.scene = tabletop.advance(env.scene, action)
        scenes.append(env.scene)
    return scenes


class Clips:
    """An endless source of clips from a rolling store of episodes of seeds first_seed, first_seed + 1, ..."""

    def __init__(self, first_seed: int, last_seed: int, seed: int, store: int) -> None:
        self._rng = np.random.default_rng([seed, first_seed])
        self._seeds = range(first_seed, last_seed)
        self._next = 0
        self._episodes: list[list[Scene]] = []
        for _ in range(store):
            self._episodes.append(self._draw())

    def _draw(self) -> list[Scene]:
        seed = self._seeds[self._next % len(self._seeds)]
        self._next += 1
        return episode(seed, self._rng)

    def batch(self, size: int, frames: int, moving: bool = False) -> NDArray[np.uint8]:
        """uint8 [size, frames, 64, 64, 3], each from another episode, every step or every other one."""
        return np.array([[tabletop.render(scene) for scene in clip] for clip in self.scenes(size, frames, moving)])

    def scenes(self, size: int, frames: int, moving: bool = False) -> list[list[Scene]]:
        """The same before it is drawn; `moving` prefers stretches in which the gripper goes somewhere."""
        rng = self._rng
        self._episodes[int(rng.integers(len(self._episodes)))] = self._draw()
        clips = []
        for which in rng.choice(len(self._episodes), size, replace=False):
            scenes = self._episodes[int(which)]
            stride = int(rng.integers(1, 3))
            for _ in range(8 if moving else 1):
                start = int(rng.integers(0, len(scenes) - stride * (frames - 1)))
                clip = scenes[start : start + stride * (frames - 1) + 1 : stride]
                if np.hypot(clip[-1].x - clip[0].x, clip[-1].y - clip[0].y) > 0.03:
                    break
            clips.append(clip)
        return clips

    def training(self, kind: Kind) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Pictures [batch, frames, side, side, 3] and the bare table [batch, 1, side, side, 3] behind them, both uint8."""
        table = tabletop.empty_table()
        pictures, tables = [], []
        for clip in self.scenes(kind.batch, kind.frames, kind.moving):
            row = column = 0
            if kind.side < len(table):
                x, y = (np.mean([getattr(scene, axis) for scene in clip]) for axis in "xy")
                wander = self._rng.integers(-6, 7, 2)
                middle = np.array([0.5 - y / tabletop.TABLE, 0.5 + x / tabletop.TABLE]) * len(table) + wander
                row, column = np.clip(middle - kind.side / 2, 0, len(table) - kind.side).astype(int).tolist()
            cut = slice(row, row + kind.side), slice(column, column + kind.side)
            pictures.append([tabletop.render(scene)[cut] for scene in clip])
            tables.append([table[cut]])
        return np.array(pictures), np.array(tables)


def to_video(pictures: NDArray[np.uint8]) -> torch.Tensor:
    """uint8 [B, T, H, W, 3] -> float32 [B, 3, T, H, W] in -1..1."""
    return torch.from_numpy(pictures).permute(0, 4, 1, 2, 3).to(torch.float32) / 127.5 - 1.0


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[B, 3, T, H, W] in -1..1 twice -> dB [B, T], of the 0..255 pictures."""
    return -10.0 * torch.log10(((a - b) / 2).square().mean(dim=(1, 3, 4)).clamp_min(1e-10))


def _causal_conv(module: WanCausalConv3d, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
    """The module's own function. A lone frame has only zeros before it, so that a 2-D convolution does: 0.4 of the time."""
    if cache_x is None and x.shape[2] == 1 and module.stride == (1, 1, 1):
        width, _, height = module._padding[:3]
        flat = x[:, :, 0].contiguous(memory_format=torch.channels_last)
        return F.conv2d(flat, module.weight[:, :, -1], module.bias, padding=(height, width))[:, :, None]
    return type(module).forward(module, x, cache_x)


def build(fast: bool) -> AutoencoderKLWan:
    """The untrained autoencoder; `fast` takes the 2-D short cut for lone frames (same function to rounding)."""
    model = AutoencoderKLWan.from_config(ARCHITECTURE)
    if fast:
        for module in model.modules():
            if isinstance(module, WanCausalConv3d):
                module.forward = partial(_causal_conv, module)
    return model


def objective(
    model: AutoencoderKLWan, video: torch.Tensor, table: torch.Tensor, config: TrainConfig, noise: torch.Generator
) -> tuple[torch.Tensor, float]:
    """Weighted L1 + L2 + edges + KL of video [B, 3, T, H, W] before the bare table [B, 3, 1, H, W].

    Second comes the PSNR [dB] seen on the way, of sampled latents.
    """
    posterior = model.encode(video).latent_dist
    latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=noise)
    decoded = model.decode(latents).sample
    weight = 1.0 + FOREGROUND * ((video - table).abs().amax(dim=1, keepdim=True) > 0.06)
    weight = weight + config.motion * ((video - video[:, :, :1]).abs().amax(dim=1, keepdim=True) > 0.06)
    error = decoded - video
    pixels = (weight * (error.abs() + 4.0 * error.square())).mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
    with torch.no_grad():
        seen = float(psnr(decoded, video).mean())
    return pixels + config.edges * edges + config.kl * kl, seen


def _schedule(step: int, steps: int) -> float:
    """The factor on the learning rate: 100 steps up, then half a cosine down to zero."""
    return min((step + 1) / 100, 0.5 * (1 + np.cos(np.pi * min(1.0, step / steps))))


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, store, measure; returns what metrics.json holds."""
    torch.set_num_threads(config.threads)
    began = time.monotonic()
    steps = fit(config)
    minutes = (time.monotonic() - began) / 60
    metrics = {**measure(config.out), **provenance(config, steps, minutes)}
    write_text(config.out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def provenance(config: TrainConfig, steps: int, minutes: float) -> dict[str, Any]:
    """How the weights came to be: the command that repeats it, and the same of the weights it started from."""
    words = [f"python examples/tabletop/train_vae.py --out DIR --seed {config.seed} --steps {steps}"]
    for name in ("lr", "kl", "edges", "ema", "motion"):
        if getattr(config, name) != getattr(TrainConfig, name):
            words.append(f"--{name} {getattr(config, name)}")
    if config.shares != TrainConfig.shares:
        words.append("--shares " + " ".join(map(str, config.shares)))
    before = None
    if config.decoder_only:
        words.append("--decoder-only")
    if config.start is not None:
        words.append("--start START")
        known = json.loads((config.start / "metrics.json").read_text())
        before = {key: known[key] for key in ("command", "seed", "steps", "minutes", "machine", "start")}
    return {
        "command": " ".join(words),
        "seed": config.seed,
        "steps": steps,
        "minutes": round(minutes, 1),
        "machine": f"{machine()['cpu']}, {config.threads} thread(s), torch {torch.__version__.split('+')[0]}",
        "start": before,
    }


def fit(config: TrainConfig) -> int:
    """Train and store the moving average of the weights under `config.out`; returns the number of steps."""
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    noise = torch.Generator().manual_seed(config.seed)
    model = build(fast=True)
    if config.start is not None:
        model.load_state_dict(load_file(config.start / "model.safetensors"))
    if config.decoder_only:
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    clips = Clips(0, TEST_SEEDS_FROM, config.seed, store=512)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=config.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    log_path = config.log or config.out.parent / f"{config.out.name}_train.jsonl"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    step, steps = 0, config.steps or 100 * PLAN_AFTER
    with log_path.open("w") as log, tqdm(total=config.steps, unit="step", mininterval=1.0) as bar:
        while step < steps:
            kind = KINDS[rng.choice(len(KINDS), p=config.shares)]
            pictures, tables = clips.training(kind)
            for group in optimiser.param_groups:
                group["lr"] = config.lr * _schedule(step, steps)
            loss, seen = objective(model, to_video(pictures), to_video(tables), config, noise)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            _follow(average, model, decay=min(config.ema, (step + 1) / (step + 10)))
            if step % 20 == 0:
                value, seconds = round(loss.item(), 5), round(time.monotonic() - began, 1)
                bar.set_postfix(loss=value, psnr=f"{seen:.1f} dB", refresh=False)
                line = {"step": step, "of": steps, "frames": kind.frames, "loss": value, "psnr": round(seen, 2)}
                log.write(json.dumps({**line, "seconds": seconds}) + "\n")
                log.flush()
            step += 1
            bar.update()
            if step == PLAN_AFTER and config.steps is None:
                steps = bar.total = max(step, int(step * config.minutes * 60 / (time.monotonic() - began)))
            if step % SNAPSHOT == 0:
                store(config.out, average, _scale(config, average, clips))
    store(config.out, average, _scale(config, average, clips))
    return steps


def _scale(config: TrainConfig, weights: dict[str, torch.Tensor], clips: Clips) -> dict[str, list[float]]:
    if config.decoder_only and config.start is not None:
        known = json.loads((config.start / "config.json").read_text())
        return {key: known[key] for key in ("latents_mean", "latents_std")}
    return latent_scale(weights, clips)


@torch.no_grad()
def _follow(average: dict[str, torch.Tensor], model: AutoencoderKLWan, decay: float) -> None:
    for name, value in model.state_dict().items():
        average[name].lerp_(value, 1 - decay)


def latent_scale(weights: dict[str, torch.Tensor], clips: Clips) -> dict[str, list[float]]:
    """Mean and standard deviation of each of the 16 latent channels over 5-frame clips, sampled posterior."""
    model = build(fast=False)
    model.load_state_dict(weights)
    with torch.no_grad():
        posteriors = [model.encode(to_video(clips.batch(16, 5))).latent_dist for _ in range(4)]
    mean = torch.cat([posterior.mean for posterior in posteriors]).transpose(0, 1).flatten(1)
    var = torch.cat([posterior.var for posterior in posteriors]).transpose(0, 1).flatten(1)
    std = (mean.var(dim=1) + var.mean(dim=1)).sqrt()
    return {
        "latents_mean": [round(v, 5) for v in mean.mean(dim=1).tolist()],
        "latents_std": [round(v, 5) for v in std.tolist()],
    }


def store(out: Path, weights: dict[str, torch.Tensor], scale: dict[str, list[float]]) -> None:
    """Write config.json and model.safetensors (float16, diffusers' names), each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "AutoencoderKLWan", **ARCHITECTURE, **scale}
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")
    with whole_file(out / "model.safetensors") as partial_file:
        partial_file.write_bytes(
            serialise({name: value.to(torch.float16).contiguous() for name, value in weights.items()})
        )


def load(folder: Path) -> AutoencoderKLWan:
    """The stored autoencoder in float32, ready to encode and decode."""
    model = AutoencoderKLWan.from_config(json.loads((folder / "config.json").read_text()))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.float().eval().requires_grad_(False)


def measure(folder: Path, batches: int = 8, seed: int = 0) -> dict[str, Any]:
    """PSNR [dB] of the stored weights on unseen seeds: single frames, clips of 5 and 9, and clips with motion only.

    Each with the posterior's mean and with a sample. `changed_pixels` counts only those that differ from the clip's first
    frame: standing objects and the bare table are easy, and most of the picture.
    """
    model = load(folder)
    clips = Clips(TEST_SEEDS_FROM, 2 * TEST_SEEDS_FROM, seed, store=64)
    noise = torch.Generator().manual_seed(seed)
    metrics: dict[str, Any] = {"test_seeds_from": TEST_SEEDS_FROM}
    shift, scale = (torch.tensor(model.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    for frames, moving in ((1, False), (5, False), (9, False), (5, True), (9, True)):
        by_mean, by_sample, latents, changed = [], [], [], []
        for _ in range(batches):
            video = to_video(clips.batch(16, frames, moving))
            posterior = model.encode(video).latent_dist
            decoded = model.decode(posterior.mean).sample
            by_mean.append(psnr(decoded, video))
            by_sample.append(psnr(model.decode(posterior.sample(noise)).sample, video))
            latents.append((posterior.mean - shift) / scale)
            where = (video - video[:, :, :1]).abs().amax(dim=1) > 0.06
            changed.append((decoded - video).square().mean(dim=1)[where])
        mean, sample, errors = torch.cat(by_mean), torch.cat(by_sample), torch.cat(changed)
        metrics[f"frames_{frames}" + ("_moving" if moving else "")] = {
            "psnr_db": round(float(mean.mean()), 2),
            "psnr_db_by_frame": [round(v, 2) for v in mean.mean(dim=0).tolist()],
            "psnr_db_worst_picture": round(float(mean.min()), 2),
            "psnr_db_sampled": round(float(sample.mean()), 2),
            "psnr_db_changed_pixels": round(float(-10 * torch.log10(errors.mean() / 4)), 2) if len(errors) else None,
            "latent_std": round(float(torch.cat(latents).std()), 3),
            "pictures": int(mean.numel()),
        }
    return metrics


if __name__ == "__main__":
    import tyro

    train(tyro.cli(TrainConfig))
