"""Latency of one action chunk: the engine, and beside it the published schedule in the same process on the same weights.

The baseline does all of the published code's work at its best: diffusers' unmodified VAE on the padded clip, diffusers'
transformer with all blocks, PyTorch's fused attention, k and v of the action head in each step. Random weights at true
sizes need no download; before anything is timed the two must agree on the very tensors that will be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from dit4dit.benchmarks import flops, roofline
from dit4dit.benchmarks.harness import machine, quantiles
from torch import Tensor
from tqdm import tqdm

from dit4dit.config import ModelConfig
from dit4dit.embodiments import EMBODIMENTS
from dit4dit.engine import Engine, PromptPack
from dit4dit.model.dit4dit import DiT4DiT
from dit4dit.model.export import transformer_arguments
from dit4dit.model.text import byte_tokenizer, standardize, tokenize
from dit4dit.model.weights import random_model
from dit4dit.ops import onednn
from dit4dit.presets import Preset

STAGES = ("text", "vae", "backbone", "action_head")
AGREE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
"""Largest relative difference between the two at which they are still timed."""


@dataclass
class Clock:
    """Seconds per stage of the calls made so far; waits for the device at each boundary."""

    device: torch.device
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Inputs:
    """One request on the device, as `DiT4DiT.sample` takes it; `tokens` is None where the text encoder is left out."""

    frame: Tensor
    embeds: Tensor
    tokens: Tensor | None
    state: Tensor | None
    posterior: Tensor
    latent: Tensor
    action: Tensor

    @classmethod
    def random(cls, config: ModelConfig, views: int, seed: int, device: torch.device, *, text: bool) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        height, width = config.image_size[0], config.image_size[1] * views
        rows, columns = config.latent_size(height, width)
        head, z = config.head, config.vae.z_dim
        tokens = tokenize(byte_tokenizer(), ["put the cup in the drawer"], config.text.max_length) if text else None
        return cls(
            frame=normal(1, 3, height, width).clamp(-1, 1),
            embeds=normal(1, config.text.max_length, config.dit.text_in),
            tokens=None if tokens is None else tokens.to(device),
            state=None if head.state_dim is None else normal(1, 1, head.state_dim),
            posterior=normal(1, z, 1, rows, columns),
            latent=normal(1, z, config.latent_frames, rows, columns),
            action=normal(1, head.action_horizon, head.action_dim),
        )


class Published:
    """The published schedule on a model's own weights."""

    def __init__(self, model: DiT4DiT) -> None:
        from diffusers import CosmosTransformer3DModel

        assert model.video_vae is not None
        self.model, self.config = model, model.config
        channels = self.config.dit.latent_channels + 2
        # the padding-mask channel goes in with the latents: diffusers would add it with torchvision, at no cost either way
        arguments = {**transformer_arguments(self.config), "in_channels": channels, "concat_padding_mask": False}
        with torch.device("meta"):
            self.transformer = CosmosTransformer3DModel(**arguments).eval()
        self.transformer.load_state_dict(model.backbone.transformer.state_dict(), assign=True)
        text, like = self.config.text, model.backbone.transformer.proj_out.weight
        self.output_matrix = torch.zeros(text.vocab_size, text.hidden_size, dtype=like.dtype, device=like.device)
        self.seen: list[Tensor] = []
        layer = self.transformer.transformer_blocks[self.config.extract_layer]
        layer.register_forward_hook(lambda *call: self.seen.append(call[2]))

    @torch.no_grad()
    def sample(self, inputs: Inputs, clock: Clock) -> Tensor:
        """Normalised actions, float32 [1, K, A_model]."""
        model, dtype = self.model, self.model.backbone.transformer.dtype
        embeds = inputs.embeds
        with clock.stage("text"):
            if inputs.tokens is not None:
                embeds = self._embed(inputs.tokens)
        with clock.stage("vae"):
            condition = self._condition(inputs)
        with clock.stage("backbone"):
            latents = torch.cat([condition, inputs.latent[:, :, 1:]], dim=2)
            masks = torch.zeros_like(latents[:, :2])
            masks[:, 0, 0] = 1
            times = torch.full((1, 1, latents.shape[2], 1, 1), self.config.sigma, device=latents.device)
            times[:, :, 0] = self.config.conditional_frame_timestep
            self.seen.clear()
            self.transformer(torch.cat([latents, masks], dim=1).to(dtype), times.to(dtype), embeds.to(dtype))
            features = self.seen[0]
        with clock.stage("action_head"):
            assert model.head is not None
            head_dtype = model.head.action_decoder.layer2.weight.dtype
            state = None if inputs.state is None else inputs.state.to(head_dtype)
            return model.head.sample(inputs.action.to(head_dtype), features.to(head_dtype), state).float()

    def _embed(self, tokens: Tensor) -> Tensor:
        """Prompt embeddings; the published call also multiplies by the output matrix, for logits that nothing reads."""
        assert self.model.text is not None
        states = self.model.text.hidden_states(tokens)
        torch.nn.functional.linear(states[-1], self.output_matrix)
        return torch.cat([standardize(h) for h in states], dim=-1)

    def _condition(self, inputs: Inputs) -> Tensor:
        vae = self.model.video_vae
        assert vae is not None
        dtype = vae.wan.quant_conv.weight.dtype
        clip = inputs.frame.new_zeros(1, 3, self.config.frames, *inputs.frame.shape[2:])
        clip[:, :, 0] = inputs.frame
        posterior = vae.wan.encode(clip.to(dtype)).latent_dist
        z = posterior.mean[:, :, :1].float() + posterior.std[:, :, :1].float() * inputs.posterior
        return vae.scale.normalize(z)


class Fast:
    """The engine with its stages timed."""

    def __init__(self, engine: Engine, inputs: Inputs) -> None:
        self.engine = engine
        engine.warm_up()
        self.pack: PromptPack = engine.pack(inputs.embeds)

    @torch.no_grad()
    def sample(self, inputs: Inputs, clock: Clock) -> Tensor:
        """Normalised actions, float32 [1, K, A_model]; the instruction's pack is at hand, as in a control loop."""
        with clock.stage("vae"):
            condition = self.engine.condition(inputs.frame, inputs.posterior)
        with clock.stage("backbone"):
            features = self.engine.backbone(torch.cat([condition, inputs.latent[:, :, 1:]], dim=2), [self.pack])
        with clock.stage("action_head"):
            return self.engine.actions(features, inputs.state, inputs.action)


def measure(
    preset: Preset,
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    chunks: int,
    baseline: bool,
    text: bool,
    seed: int,
) -> dict[str, Any]:
    """Time `chunks` chunks, alternating with the published schedule where `baseline`; the result is ready for JSON.

    Raises:
        RuntimeError: engine and published schedule do not agree; nothing has been timed.
    """
    config = preset.model
    views = len(EMBODIMENTS[preset.embodiment].views)
    model = random_model(config, seed, device=device, dtype=dtype, with_text=text and baseline)
    inputs = Inputs.random(config, views, seed, device, text=text and baseline)
    if inputs.tokens is not None:
        inputs = Inputs(**{**vars(inputs), "embeds": model.embed(inputs.tokens)})
    start = time.perf_counter()
    fast = Fast(Engine(model), inputs)
    folded = time.perf_counter()
    result = fast.sample(inputs, Clock(device))
    first = time.perf_counter()
    contenders: dict[str, Callable[[Inputs, Clock], Tensor]] = {"engine": fast.sample}
    if baseline:
        published = Published(model)
        check(result, published.sample(inputs, Clock(device)), dtype)
        contenders["baseline"] = published.sample
    rates = [matrix_rate(device, dtype)]
    clocks, totals = timed(contenders, inputs, chunks)
    rates.append(matrix_rate(device, dtype))
    counts = flops.count(preset)
    stages = {who: {s: median(c.seconds[s]) * 1e3 for s in c.seconds} for who, c in clocks.items()}
    assert model.head is not None
    return {
        "preset": name,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "text_encoder_in_baseline": inputs.tokens is not None,
        "machine": machine(),
        "cold_start_seconds": {"fold_pack_and_warm_up": folded - start, "first_chunk": first - folded},
        "ratio": ratios(totals, clocks) if baseline else None,
        "stages": stages,
        "roofline": roofline.points(
            preset,
            counts,
            stages,
            matrix_gflops=max(rates),
            memory_gb_per_s=roofline.memory_rate(device),
            dtype=dtype,
            head_dtype=model.head.action_decoder.layer2.weight.dtype,
            text=inputs.tokens is not None,
        ),
        "share_of_measured_rate": shares(totals, counts, max(rates), inputs.tokens is not None),
        "samples_ms": {who: [t * 1e3 for t in times] for who, times in totals.items()},
        **{who: {k: v if k == "jitter" else v * 1e3 for k, v in quantiles(t).items()} for who, t in totals.items()},
    }


def timed(
    contenders: dict[str, Callable[[Inputs, Clock], Tensor]], inputs: Inputs, chunks: int
) -> tuple[dict[str, Clock], dict[str, list[float]]]:
    """Each contender's stages, and its seconds per chunk; they take turns."""
    device = inputs.frame.device
    clocks = {who: Clock(device) for who in contenders}
    totals: dict[str, list[float]] = {who: [] for who in contenders}
    for _ in tqdm(range(chunks), desc="chunks", disable=None):
        for who, run in contenders.items():
            whole = Clock(device)
            with whole.stage("total"):
                run(inputs, clocks[who])
            totals[who] += whole.seconds["total"]
    return clocks, totals


def check(engine: Tensor, published: Tensor, dtype: torch.dtype) -> None:
    """RuntimeError unless both wrote the same actions, to rounding."""
    error = ((engine - published).abs().max() / published.abs().max()).item()
    if not error <= AGREE[dtype]:
        raise RuntimeError(
            f"engine and published schedule differ by {error:.2e} (at most {AGREE[dtype]:.0e}): not timed"
        )


def median(values: Sequence[float]) -> float:
    return quantiles(values)["p50"]


def ratios(totals: dict[str, list[float]], clocks: dict[str, Clock]) -> dict[str, float]:
    """Published over engine: the median of the pairs' ratios, whole, per stage, and for backbone and head together."""

    def of(pick: Callable[[str], list[float]]) -> float:
        return median([slow / quick for slow, quick in zip(pick("baseline"), pick("engine"), strict=True)])

    def both(who: str) -> list[float]:
        seconds = clocks[who].seconds
        return [a + b for a, b in zip(seconds["backbone"], seconds["action_head"], strict=True)]

    shared = [stage for stage in STAGES if stage in clocks["engine"].seconds]
    stages = {stage: of(lambda who, s=stage: clocks[who].seconds[s]) for stage in shared}  # type: ignore[misc]
    return {"total": of(totals.__getitem__), "backbone_and_head": of(both), **stages}


def shares(
    totals: dict[str, list[float]], counts: dict[str, dict[str, float]], rate: float, text: bool
) -> dict[str, float]:
    """GFLOP/s of each contender over `rate`, that of one large matrix product measured before and after."""
    work = {"engine": counts["executed"]["total"], "baseline": counts["published"]["total"]}
    work["baseline"] -= 0.0 if text else counts["published"]["text_encoder"]
    return {"matrix_gflops": rate, **{who: work[who] / median(times) / rate for who, times in totals.items()}}


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of the best of five products of two large square matrices, by the fastest library at hand."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    onednn.pack(b, size)
    clock = Clock(device)
    for _ in range(6):
        with clock.stage("plain"):
            a @ b
        if onednn.is_packed(b):
            with clock.stage("packed"):
                onednn.linear(a, b, None)
    return 2 * size**3 / min(min(seconds[1:]) for seconds in clock.seconds.values()) / 1e9


def rows(result: dict[str, Any]) -> list[list[str]]:
    """The table that the command prints: one row per number."""
    out = []
    for who in ("engine", "baseline"):
        if who not in result:
            continue
        q = result[who]
        numbers = [f"{q[k]:.2f}" for k in ("p50", "p95", "p99", "p999", "max")]
        stages = "  ".join(f"{s} {ms:.2f}" for s, ms in result["stages"][who].items())
        share = result["share_of_measured_rate"][who]
        out.append([who, *numbers, f"{q['jitter']:.2f}", f"{100 * share:.0f} %", stages])
    return out
