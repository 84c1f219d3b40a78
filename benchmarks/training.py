"""Samples per second of a joint training step against the published schedule, in the same process on the same weights.

The published step, per batch: the text encoder with its output matrix; the VAE on the frame padded to a whole clip, then on the
clip, its weights laid out as they are stored; all backbone blocks with gradients kept, for features that are then detached; the
action loss; all blocks again for the video loss; backward and AdamW. Ours takes embeddings (and, with the latent cache, latents)
from files that were made before, lays the VAE's weights out as training does on a CPU, and stops the feature pass, without
gradients, at the extract layer. Both must give the same losses before either is timed.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from dit4dit.benchmarks.harness import machine
from dit4dit.benchmarks.recording import Recording
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit4dit import progress
from dit4dit.checkpoints.weights import random_model
from dit4dit.config import HeadConfig, ModelConfig, TextConfig, VaeConfig, VideoDitConfig
from dit4dit.model.dit4dit import DiT4DiT, Draws
from dit4dit.model.text import byte_tokenizer, standardize, tokenize
from dit4dit.tables import table
from dit4dit.training import caches, optim
from dit4dit.training.config import OptimConfig
from dit4dit.training.feed import Share, to_batch
from dit4dit.training.random_data import RandomData
from dit4dit.training.randomness import draws
from dit4dit.training.samples import collate
from dit4dit.types import Batch

SETUP = ("weights, data and caches", "losses", "work")
AGREE = 1e-4
"""Largest relative difference of the losses at which the schedules are still timed."""
EMBODIMENT = "gr1"


def model_config() -> ModelConfig:
    """A narrow model whose parts have about the released models' shares of the published step's FLOPs."""
    text = TextConfig(
        hidden_size=448,
        num_layers=8,
        num_heads=7,
        num_kv_heads=1,
        intermediate_size=2432,
        vocab_size=4096,
        mrope_section=(8, 12, 12),
        max_position_embeddings=2048,
        max_length=256,
    )
    dit = VideoDitConfig(
        num_layers=14, num_heads=8, head_dim=32, adaln_lora_dim=32, text_in=text.embed_width, text_dim=128
    )
    head = HeadConfig(
        num_layers=8,
        num_heads=4,
        head_dim=32,
        hidden_size=320,
        output_dim=320,
        action_dim=32,
        action_horizon=16,
        state_dim=64,
        context_dim=dit.width,
        dropout=0.0,  # so that both schedules have the same losses
    )
    vae = VaeConfig(base_dim=8)
    return ModelConfig(text=text, vae=vae, dit=dit, head=head, frames=9, image_size=(128, 128), extract_layer=8)


class Published(nn.Module):
    """The published schedule over the model's own weights."""

    def __init__(self, model: DiT4DiT) -> None:
        super().__init__()
        self.model, self.vae = model, copy.deepcopy(model.video_vae)
        text = model.config.text
        self.output_matrix = torch.zeros(text.vocab_size, text.hidden_size)
        self._features: list[Tensor] = []
        layer = model.backbone.transformer.blocks[model.config.extract_layer]
        layer.register_forward_hook(lambda *call: self._features.append(call[2].flatten(1, 2)))

    def embed(self, tokens: Tensor) -> Tensor:
        """Prompt embeddings; the published call also multiplies by the output matrix, for logits that nothing reads."""
        assert self.model.text is not None
        with torch.no_grad():
            states = self.model.text.hidden_states(tokens)
            torch.nn.functional.linear(states[-1], self.output_matrix)
            return torch.cat([standardize(h) for h in states], dim=-1)

    def loss(self, batch: Batch, tokens: Tensor, drawn: Draws) -> Tensor:
        """action_loss + future_video_weight * video_loss of one batch."""
        model, backbone, head = self.model, self.model.backbone, self.model.head
        assert batch.video is not None
        assert head is not None
        context = model.context(self.embed(tokens))
        condition = self._condition(batch.video, drawn.posterior)
        self._features.clear()
        times = torch.full((len(condition),), model.config.sigma)
        backbone.future_velocity(drawn.latent[:, :, 1:], condition, context, times)
        features = self._features[0].detach()
        action = head.loss(
            batch.actions, batch.action_mask, features, batch.state, drawn.action_time, drawn.action_noise
        )
        assert self.vae is not None
        with torch.no_grad():
            clean = self.vae.encode(batch.video.transpose(1, 2))
        video = backbone.video_loss(clean, condition, context, drawn.video_time, drawn.video_noise)
        return action + model.config.flow.future_video_weight * video

    @torch.no_grad()
    def _condition(self, video: Tensor, noise: Tensor) -> Tensor:
        assert self.vae is not None
        clip = torch.zeros_like(video)
        clip[:, 0] = video[:, 0]
        posterior = self.vae.wan.encode(clip.transpose(1, 2)).latent_dist
        return self.model.backbone.posterior(posterior.mean[:, :, 0], posterior.std[:, :, 0], noise)


def flops(run: Callable[[], object]) -> float:
    """GFLOP of `run`, with attention counted as its two products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def measure(*, steps: int, batch_size: int, seed: int, record: Recording) -> None:
    """Samples per second of the published schedule, of ours, and of ours with cached latents, in alternation, into `record`."""
    with progress.bar("training", len(SETUP) + steps + 1, unit="step") as shown:
        _measure(steps, batch_size, seed, record, shown)


def _measure(steps: int, batch_size: int, seed: int, record: Recording, shown: progress.Bar) -> None:
    def during(step: int) -> None:
        record.during(SETUP[step])
        shown.reach(step)
        shown.say(SETUP[step])

    result = record.result
    result |= {"benchmark": "training", "machine": machine(), "batch_size": batch_size, "steps": steps}
    result |= {"losses": {}, "gflop_per_sample": {}, "samples_per_s": {}, "seconds": {}, "ratio": {}}
    during(0)
    config = model_config()
    data = RandomData(config, EMBODIMENT, clips=batch_size + 8, seed=seed)
    tokenizer = byte_tokenizer()
    model = random_model(config, seed)
    assert model.text is not None
    published = Published(model)
    optimizer = optim.make_optimizer(optim.trainable(model), OptimConfig(warmup_steps=0))
    share = Share(0, 1, batch_size, 1)
    indices = [data.index(position) for position in share.positions(0, 0)]
    raw = collate(share.positions(0, 0), indices, [data.sample(index) for index in indices])
    drawn = draws(config, config.latent_size(*data.picture_size), seed, "training", raw.positions)
    tokens = tokenize(tokenizer, list(raw.instructions), config.text.max_length)
    with tempfile.TemporaryDirectory() as folder:
        prompts = caches.PromptCache(Path(folder), caches.prompt_key(model.text, tokenizer))
        latents = caches.LatentCache(Path(folder), caches.latent_key(model, data), data.clips)
        start = time.perf_counter()
        caches.fill_prompts(prompts, model.text, tokenizer, data.instructions)
        caches.fill_latents(latents, model, data)
        filling = time.perf_counter() - start

        def ours(kept: caches.LatentCache | None) -> Callable[[], Tensor]:
            return lambda: model.loss(to_batch(raw, config, torch.device("cpu"), prompts, kept), drawn).total

        def theirs() -> Tensor:
            return published.loss(to_batch(raw, config, torch.device("cpu"), prompts, None), tokens, drawn)

        schedules = {"published": theirs, "ours": ours(None), "ours, cached latents": ours(latents)}
        model.train()
        during(1)
        losses = result["losses"]
        losses |= {name: loss().item() for name, loss in schedules.items()}
        for name, loss in losses.items():
            if abs(loss - losses["published"]) > AGREE * abs(losses["published"]):
                raise AssertionError(
                    f"{name}: expected the published loss {losses['published']}, got {loss}; nothing is timed"
                )
        during(2)
        counted = {name: flops(lambda loss=loss: loss().backward()) for name, loss in schedules.items()}  # type: ignore[misc]
        text = flops(lambda: published.embed(tokens))
        result["parameters"] = sum(p.numel() for p in optim.trainable(model).values())
        result["gflop_per_sample"] = {name: value / batch_size for name, value in counted.items()}
        result |= {"text_share_of_published": text / counted["published"], "filling_caches_s": filling}
        shown.reach(len(SETUP))
        alternate(schedules, optimizer, steps, record, shown)


def alternate(
    schedules: dict[str, Callable[[], Tensor]],
    optimizer: torch.optim.Optimizer,
    steps: int,
    record: Recording,
    shown: progress.Bar,
) -> None:
    """Seconds of each whole step, one of each schedule in turn, after one round that is not counted, and their rates."""
    result = record.result
    seconds: dict[str, list[float]] = {name: [] for name in schedules}
    result["seconds"] = seconds
    shown.say("steps")
    for turn in record.each(range(steps + 1), "steps", name=lambda turn: f"step {turn}"):
        for name, loss in schedules.items():
            start = time.perf_counter()
            loss().backward()
            torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if turn:
                seconds[name].append(time.perf_counter() - start)
        shown.update()
        if turn:
            medians = {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}
            result["samples_per_s"] = {name: result["batch_size"] / middle for name, middle in medians.items()}
            result["ratio"] = {n: _ratio(seconds["published"], seconds[n]) for n in list(seconds)[1:]}


def _ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median of the ratios of neighbouring steps: what else the machine does hits both."""
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    return ratios[len(ratios) // 2]


def show(result: dict[str, Any]) -> str:
    """A table, and what the published step spends on text."""
    rows = [
        [name, f"{result['gflop_per_sample'][name]:.2f}", f"{value:.2f}", f"{result['ratio'].get(name, 1.0):.2f}"]
        for name, value in result["samples_per_s"].items()
    ]
    here = result["machine"]
    lines = [
        f"{here['cpu']}, {here['torch_threads']} threads, torch {here['torch']}, batch {result['batch_size']}, float32",
        table(["schedule", "GFLOP per sample", "samples/s", "ratio"], rows, right=(1, 2, 3)),
    ]
    if "text_share_of_published" in result:
        lines.append(f"the text encoder is {result['text_share_of_published']:.1%} of the published schedule's FLOPs")
    return "\n".join(lines)
