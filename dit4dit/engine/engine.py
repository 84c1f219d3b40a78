"""The engine: one chunk from folded constants and a prompt pack.

It is built from a model and shares its weights; what the model computes anew in every chunk and is constant, the engine
looked up once (`fold`), and every operation goes through `dit4dit.ops`, whose references are the model's own maths.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dit4dit import ops
from dit4dit.config import VideoDitConfig
from dit4dit.engine.action_ode.program import HeadChoice, OneLaunchHead, choose_head
from dit4dit.engine.branch import beside
from dit4dit.engine.calibration import Calibration
from dit4dit.engine.encoder import fold_encoder
from dit4dit.engine.first_block import FirstBlock
from dit4dit.engine.fold import BackboneBlock, Embedding, Head, fold_backbone, fold_embedding, fold_head
from dit4dit.engine.fp8 import Quantization, check_options, quantize_blocks
from dit4dit.engine.graph_pool import GraphPool
from dit4dit.engine.packs import PromptPack, make_pack, stack
from dit4dit.engine.slots import Slots
from dit4dit.errors import BackendError, ConfigError, InputError, shown
from dit4dit.model import video_dit
from dit4dit.model.dit4dit import DiT4DiT
from dit4dit.model.flow import GuidanceTensors
from dit4dit.model.video_dit import rotary_table
from dit4dit.ops import programmatic
from dit4dit.ops.action_ode import loop
from dit4dit.ops.device_tables import DeviceTable
from dit4dit.ops.programmatic import CHOICES, ProgrammaticLaunch
from dit4dit.ops.verdicts import Verdicts

Posterior = Literal["sample", "mean"]
Tune = Literal["cached", "off"]
TUNE = ("cached", "off")
STEPS = (1, 2, 4, 8)
MAX_BATCH = 16
"""Requests in one pass."""
GRIDS = 4
"""Sizes of a joined image whose rotary tables are kept, at most 22 MB each; a CUDA graph keeps its own."""
FOLDING_LIMIT, FOLDING_LIMIT_16_BIT = 1e-4, 0.2
"""Largest relative error of the folded model. In 16 bits, where rounding alone is percents, it only finds what is broken."""

log = logging.getLogger("dit4dit.engine")


class Engine:
    """The same function as `DiT4DiT.sample`, made fast for inference; not differentiable."""

    def __init__(
        self,
        model: DiT4DiT,
        *,
        steps: int | None = None,
        posterior: Posterior = "sample",
        quantization: Quantization | None = None,
        calibration: Calibration | None = None,
        release: bool = False,
        head: HeadChoice = "auto",
        tune: Tune = "cached",
        programmatic_launch: ProgrammaticLaunch = "cached",
    ) -> None:
        """Fold `model`, which must have an action head; its weights are shared, not copied, where nothing changes.

        Args:
            steps: Euler steps (1, 2, 4 or 8); the model's own number when None. Other numbers change the result.
            posterior: "mean" takes the conditioning latent's mean instead of a sample; changes the result.
            quantization: "fp8" multiplies the backbone's matrices in e4m3 (`fp8`), and with head="one_launch" keeps the head's
                weights in e4m3, one scale a row; changes the result.
            calibration: the largest activations of this model (`calibrate`), for and only for fp8.
            release: with fp8, take the matrices that it replaces away from `model`, which then runs only through this
                engine; without, both stay in memory.
            head: "library" runs the action head as a loop over library calls, "one_launch" as one CUDA kernel (bfloat16;
                on an H200 slower than the library), "auto" takes the kernel in the plans whose shape a verdict chooses it for.
            tune: "cached" takes, for each call of a plan, the implementation that was the fastest here (`ops.verdicts`);
                "off" the default of its op. Nothing is measured by an engine: `dit4dit tune` does.
            programmatic_launch: on Hopper and later, whether the kernels of a plan are launched while the ones before them still
                run (`ops.programmatic`); the same bits. "cached": where a verdict has found a plan of that shape faster so, with
                tune="cached".

        Raises:
            ConfigError: an option has another value. CheckpointError: the calibration is another model's. BackendError: the
                folded model is not the plain one (`check_folding`), or "one_launch" where the kernel cannot run.
        """
        check_options(quantization, calibration)
        if model.head is None:
            raise ConfigError("engine: this model has no action head")
        if steps is not None and (type(steps) is not int or steps not in STEPS):
            raise ConfigError(f"engine steps: expected one of {STEPS}, got {shown(steps)}")
        if posterior not in ("sample", "mean"):
            raise ConfigError(f"engine posterior: expected sample or mean, got {shown(posterior)}")
        if tune not in TUNE:
            raise ConfigError(f"engine tune: expected cached or off, got {shown(tune)}")
        if programmatic_launch not in CHOICES:
            raise ConfigError(
                f"engine programmatic_launch: expected cached, on or off, got {shown(programmatic_launch)}"
            )
        self.model, self.config, self.posterior = model, model.config, posterior
        self.tune, self.programmatic_launch = tune, programmatic_launch
        self.steps = model.config.head.num_inference_timesteps if steps is None else steps
        if self.steps > model.config.head.num_timestep_buckets:
            raise ConfigError(
                f"engine steps: at most the model's num_timestep_buckets = {model.config.head.num_timestep_buckets}, got {steps}"
            )
        self.quantization = quantization
        blocks = list(fold_backbone(model.backbone))
        self.blocks: tuple[BackboneBlock, ...] = tuple(blocks)
        self.embedding: Embedding = fold_embedding(model.backbone)
        scale = model.backbone.scale
        self.latent_scale = scale.mean.flatten().float(), scale.std.flatten().float()
        self.head: Head = fold_head(model.head, self.steps)
        self.one_launch: OneLaunchHead | None = None
        self._start()
        self.encoder = fold_encoder(model.backbone)
        if self.device.type != "meta":  # where operations are only counted
            self.check_folding()
        self.one_launch = choose_head(head, self.head, model.config.head, self.steps, fp8=quantization == "fp8")
        if calibration is not None:
            self.blocks = ()  # each matrix goes as soon as its quantised one is there
            quantize_blocks(model, blocks, calibration, release=release)
            self.blocks = tuple(blocks)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def _start(self) -> None:
        """What belongs to a process, and what all plans of this engine share, as they never run side by side."""
        self._slots: WeakValueDictionary[tuple[int, int], Slots] = WeakValueDictionary()
        make_tables = partial(_tables, self.config.dit, self.config.latent_frames, self.embedding)
        self._tables = DeviceTable(make_tables, kept=GRIDS)
        # without data the tensors are a GPU's, unless whoever lists a CPU's calls says otherwise
        self.branches = self.device.type != "cpu"
        self._stream: torch.cuda.Stream | None = None
        self._branch: torch.cuda.Stream | None = None
        self._pool: GraphPool | None = None
        # tensors without data have no device to measure on
        self._verdicts = Verdicts(self.device) if self.tune == "cached" and self.device.type != "meta" else None

    def choices(self) -> ops.Choices:
        """New choices for one function of this engine: inside, each op call is run as a plan would run it."""
        return ops.Choices(self._verdicts)

    @property
    def verdicts(self) -> Verdicts | None:
        """Of this engine's device; None where none are to be followed."""
        return self._verdicts

    @property
    def graph_pool(self) -> GraphPool:
        """The memory of the CUDA graphs of this engine."""
        if self._pool is None or self._pool.over:
            self._pool = GraphPool()
        return self._pool

    def drop_graph_pool(self) -> None:
        """After a failed capture, or where it has grown too large: graphs to come share another one.

        This one goes with the last graph that is in it.
        """
        self._pool = None

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """The stream of all plans, before others on a GPU; None on a CPU."""
        if self._stream is None and self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device, priority=-1)
        return self._stream

    @property
    def branch(self) -> torch.cuda.Stream | None:
        """The stream of what runs beside other work in a step (`beside`); None on a CPU."""
        if self._branch is None and self.device.type == "cuda":
            self._branch = torch.cuda.Stream(self.device, priority=-1)
        return self._branch

    def slots(self, batch: int, text_length: int) -> Slots:
        """Where plans find the packs of `batch` requests: one slot for single requests, MAX_BATCH for all others.

        Plans share them, and they are there for as long as a plan has them.
        """
        key = (1 if batch == 1 else MAX_BATCH, text_length)
        slots = self._slots.get(key)
        if slots is None:
            dit = self.config.dit
            shape = (key[0], len(self.blocks), dit.num_heads, text_length, dit.head_dim)
            slots = self._slots[key] = Slots(shape, self.model.dtype, self.device)
        return slots

    def __getstate__(self) -> dict[str, Any]:
        """Slots, tables, graph memory and verdicts belong to a process; a copy makes its own."""
        own = ("_slots", "_tables", "_stream", "_branch", "_pool", "_verdicts")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def pack(self, prompt_embeds: Tensor) -> PromptPack:
        """prompt_embeds [1, L, text_in] -> the instruction's pack."""
        return make_pack(self.model.backbone.transformer, prompt_embeds, len(self.blocks))

    @torch.no_grad()
    def folding_error(self, seed: int = 0) -> dict[str, float]:
        """How far the folded model is from the plain one on one small random input, relative to the largest value.

        "moments", "features" and "actions" each from the same inputs, so that one's error does not show in another. By the ops'
        references: it is the constants that are looked at, and no kernel is compiled for a size that is never used again.
        """
        dit, head, model = self.config.dit, self.config.head, self.model
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device)

        latents = normal(1, self.config.vae.z_dim, self.config.latent_frames, 2 * dit.patch, 2 * dit.patch)
        embeds = normal(1, 4, dit.text_in)
        context = model.context(embeds)
        features = model.backbone.features(latents[:, :, :1], latents, context).float()
        side = 4 << (len(self.config.vae.dim_mult) - 1)
        frame = normal(1, 3, side, side).to(model.dtype)
        moments = model.backbone.frame_encoder.moments(frame).float()
        with ops.use_backend("torch"):
            folded = {"features": self.backbone(latents, stack([self.pack(embeds)]))}
            folded["moments"] = self.moments(frame).float()
            if self.encoder.bias is not None:
                folded["moments"] += self.encoder.bias.float()[:, None, None]
        assert model.head is not None
        noise = normal(1, head.action_horizon, head.action_dim)
        dtype = model.head.dtype
        plain = {"moments": moments, "features": features}
        plain["actions"] = model.head.sample(noise.to(dtype), features.to(dtype), None, self.steps).float()
        with ops.use_backend("torch"):
            folded["actions"] = self.actions(features, None, noise)
        return {name: ((folded[name] - y).abs().max() / y.abs().max()).item() for name, y in plain.items()}

    def check_folding(self) -> None:
        """BackendError when the folded model is not the plain one: a bug, found before the robot moves."""
        errors = self.folding_error()
        low = min(self.model.dtype.itemsize, self.head.decode_out.weight.dtype.itemsize) < 4
        limit = FOLDING_LIMIT_16_BIT if low else FOLDING_LIMIT
        log.info("folded model against the plain one: %s", ", ".join(f"{k} {v:.1e}" for k, v in errors.items()))
        # NaN is the weights' own: it is reported with the chunk it spoils
        if any(error > limit for error in errors.values()):
            found = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
            raise BackendError(
                f"engine: the folded model differs from the plain one by {found} (at most {limit:.0e}); "
                "load with engine='off' and report this checkpoint's configuration"
            )

    @torch.no_grad()
    def sample(
        self,
        frame: Tensor,
        packs: Sequence[PromptPack],
        state: Tensor | None,
        posterior: Tensor,
        latent: Tensor,
        action: Tensor,
        guidance: GuidanceTensors | None = None,
    ) -> Tensor:
        """Normalised actions, float32 [B, K, A_model].

        Args:
            frame: joined views [B, 3, H, W] in [-1, 1].
            packs: one per sample.
            state: encoded, padded state [B, 1, state_dim], or None for a request without a state token.
            posterior, latent, action: standard normal [B, z, 1, h, w], [B, z, T, h, w], [B, K, A_model].
            guidance: as in `actions`.
        """
        with self.choices():
            features = self.features(frame, stack(packs), posterior, latent)
            return self.actions(features, state, action, guidance)

    @torch.no_grad()
    def features(
        self,
        frame: Tensor,
        pack: PromptPack,
        posterior: Tensor,
        latent: Tensor,
        draw: Callable[[], None] | None = None,
    ) -> Tensor:
        """Backbone features in the head's dtype, [B, S, D]; the pack is a batch's (`stack`).

        draw: what fills `posterior`, `latent` and other noise in place, before any of it is read, and what else needs no image.
            On a GPU it runs beside the VAE, as does all that needs the noise alone.
        """

        def noisy() -> None:
            with ops.stage("noise", beside="vae"):
                if draw is not None:
                    draw()
                self.add_noise(first, latent)

        def encoded() -> Tensor:
            with ops.stage("vae"):
                return self.moments(frame)

        first = self.first_block(latent)  # here, as its memory must be of the stream that has it for longest
        _, moments = beside(self.branch, noisy, encoded)
        return self.from_moments(first, moments, pack, posterior)

    def moments(self, frame: Tensor) -> Tensor:
        """The joined views [B, 3, H, W] in [-1, 1] -> the VAE's posterior, `ops.posterior_patches`' moments [B, 2 z, h, w].

        What they lack is `Encoder.bias`.
        """
        return self.encoder(frame)

    def condition(self, frame: Tensor, posterior: Tensor) -> Tensor:
        """The frame's normalised latent, float32 [B, z, 1, h, w]. frame: as `Encoder` takes it."""
        pixels = self._sample(self.moments(frame), posterior, 1, torch.float32)
        return pixels.transpose(1, 2).view(posterior.shape)

    def _sample(self, moments: Tensor, posterior: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
        noise = None if self.posterior == "mean" else posterior
        return ops.posterior_patches(moments, self.encoder.bias, noise, *self.latent_scale, patch, dtype)

    def first_block(self, latent: Tensor) -> FirstBlock:
        """Buffers for block 0's input, for latents [B, z, T, h, w]. InputError: they are not as many frames as the model's."""
        if latent.shape[2] != self.config.latent_frames:
            expected = self.config.latent_frames
            raise InputError(f"engine: latents: expected {expected} latent frames, got {latent.shape[2]}")
        patch = self.config.dit.patch
        rows, columns = latent.shape[3] // patch, latent.shape[4] // patch
        _, begin = self._tables(rows, columns, latent.device)
        batch, tokens = latent.shape[0], rows * columns
        return FirstBlock(self.embedding, self.blocks[0], begin, batch, tokens, apart=self.branches)

    def add_noise(self, first: FirstBlock, latent: Tensor) -> None:
        """The part of all frames of the latents [B, z, T, h, w] but the conditioning one."""
        if latent.shape[2] > 1:
            first.add_noise(video_dit.patches(latent[:, :, 1:], self.config.dit.patch))

    def from_moments(self, first: FirstBlock, moments: Tensor, pack: PromptPack, posterior: Tensor) -> Tensor:
        """Features as of `features`, from block 0's input with the noise in it (`add_noise`) and the VAE's posterior."""
        with ops.stage("latents"), programmatic.plainly():  # the first kernel behind the join
            tokens = self._sample(moments, posterior, self.config.dit.patch, self.model.dtype)
        with ops.stage("backbone"):
            patch = self.config.dit.patch
            rows, columns = posterior.shape[3] // patch, posterior.shape[4] // patch
            first.add_condition(tokens.view(len(tokens), 1, rows, columns, -1, patch, patch))
            return self._blocks(first, pack, self._rotary_for(posterior))

    @torch.no_grad()
    def backbone(self, latents: Tensor, pack: PromptPack) -> Tensor:
        """Latents [B, z, T, h, w], frame 0 conditioning, and a batch's pack -> features in the head's dtype, [B, S, D]."""
        first = self.first_block(latents)
        self.add_noise(first, latents)
        first.add_condition(video_dit.patches(latents[:, :, :1].to(self.model.dtype), self.config.dit.patch))
        return self._blocks(first, pack, self._rotary_for(latents))

    def _blocks(self, first: FirstBlock, pack: PromptPack, rotary: Tensor) -> Tensor:
        heads, dtype = self.config.dit.num_heads, self.model.dtype
        # the residual stream is float32 whatever the weights are: it is small, and it is where rounding adds up
        x, qkv = first.x, first.qkv
        branch: Tensor | None = None
        gate: Tensor | None = None
        for i, block in enumerate(self.blocks):
            norm = block.self_norm
            if i:
                x, h = ops.adaln(x, branch, gate, norm.shift, norm.scale, 1e-6, dtype)
                qkv = block.qkv(h.flatten(1, 2))
            a = ops.self_attention(qkv, block.norm_q, block.norm_k, rotary, heads, 1e-5)
            branch, gate, norm = block.self_out(a).view_as(x), norm.gate, block.cross_norm
            x, h = ops.adaln(x, branch, gate, norm.shift, norm.scale, 1e-6, dtype)
            q = block.cross_q(h.flatten(1, 2))
            a = ops.cross_attention(q, pack.keys[:, i], pack.values[:, i], block.cross_norm_q, heads, 1e-5)
            branch, gate, norm = block.cross_out(a).view_as(x), norm.gate, block.mlp_norm
            x, h = ops.adaln(x, branch, gate, norm.shift, norm.scale, 1e-6, dtype)
            branch, gate = block.mlp_out(block.mlp_in.gelu(h)), norm.gate
        assert branch is not None
        assert gate is not None
        features = torch.empty(x.shape, dtype=self.head.context.weight.dtype, device=x.device)
        # the sum alone, in float32 whatever its parts are, and rounded once
        torch.addcmul(x, gate[:, None], branch, out=features)
        return features.flatten(1, 2)

    def _rotary_for(self, latents: Tensor) -> Tensor:
        patch = self.config.dit.patch
        return self._tables(latents.shape[3] // patch, latents.shape[4] // patch, latents.device)[0]

    @torch.no_grad()
    def actions(
        self, features: Tensor, state: Tensor | None, noise: Tensor, guidance: GuidanceTensors | None = None
    ) -> Tensor:
        """Features [B, S, D], state and noise [B, K, A] -> normalised actions, float32 [B, K, A].

        state: as in `sample`.
        guidance: keep to the left-over of the chunk before; weights [K] or [B, K]. BackendError: weights for each sample of a
        batch with head="one_launch", whose kernel has one row of them.
        """
        return self.actions_behind(features, self.token(state), noise, guidance)

    @torch.no_grad()
    def token(self, state: Tensor | None) -> Tensor | None:
        """The state token [B, W] of a state [B, 1, state_dim]; None without one."""
        assert self.model.head is not None
        encoder = self.model.head.state_encoder
        if encoder is None or state is None:
            return None
        first, last = encoder.layer1, encoder.layer2
        # the head in one launch reads it in float32, whatever its values were rounded to
        dtype = last.weight.dtype if self.one_launch is None else torch.float32
        return ops.state_token(state[:, 0], first.weight, first.bias, last.weight, last.bias, dtype)

    @torch.no_grad()
    def actions_behind(
        self, features: Tensor, prefix: Tensor | None, noise: Tensor, guidance: GuidanceTensors | None = None
    ) -> Tensor:
        """`actions` with the state's token in the place of the state."""
        head = self.head
        context = head.context(features.to(head.decode_out.weight.dtype))
        if self.one_launch is not None:
            return self._one_launch(self.one_launch, noise, context, prefix, guidance)
        return loop(head, noise, context, prefix, guidance)

    def _one_launch(
        self,
        head: OneLaunchHead,
        noise: Tensor,
        context: Tensor,
        prefix: Tensor | None,
        guidance: GuidanceTensors | None,
    ) -> Tensor:
        backend = head.backend
        if guidance is not None and guidance.weights.dim() == 2:
            if len(guidance.weights) > 1 and backend is None:
                return loop(self.head, noise, context, prefix, guidance)
            if len(guidance.weights) > 1:
                raise BackendError(
                    "guidance: head='one_launch' has one row of weights for a pass, got "
                    f"{len(guidance.weights)}; give such requests one at a time, or use head='library'"
                )
            guidance = replace(guidance, weights=guidance.weights[0])
        actions = ops.action_ode(head, noise.float(), context, prefix, guidance=guidance, backend=backend)
        if not head.capturing:  # whoever replays a graph reads the flag with the actions
            head.check()
        return actions


def _tables(
    dit: VideoDitConfig, frames: int, embedding: Embedding, rows: int, columns: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """For a grid of tokens: the table of `ops.self_attention`, and what the residual stream begins with."""
    rotary = rotary_table(dit, frames, rows, columns, device=device)
    # both halves turn by the same
    return rotary[..., : rotary.shape[-1] // 2].contiguous(), embedding.begin(rows, columns)
