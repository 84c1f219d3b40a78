"""Who is timed: the published schedule at its best, and the engine as a policy runs it, on one model's weights.

The published one does all of the published code's work: diffusers' unmodified VAE on the padded clip, diffusers' transformer
with all blocks, PyTorch's fused attention, k and v of the action head in each step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dit4dit import ops
from dit4dit.checkpoints.export import transformer_arguments
from dit4dit.config import ModelConfig
from dit4dit.engine import Engine, Plan, PromptPack, RequestShape, StepInputs
from dit4dit.model.dit4dit import DiT4DiT
from dit4dit.model.text import byte_tokenizer, standardize, tokenize
from dit4dit.noise import Noise
from dit4dit.robots.embodiment import Embodiment


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
        text = self.config.text
        self.output_matrix = torch.zeros(text.vocab_size, text.hidden_size, dtype=model.dtype, device=model.device)
        self.seen: list[Tensor] = []
        layer = self.transformer.transformer_blocks[self.config.extract_layer]
        layer.register_forward_hook(lambda *call: self.seen.append(call[2]))

    @torch.no_grad()
    def sample(self, inputs: Inputs, clock: Clock) -> Tensor:
        """Normalised actions, float32 [1, K, A_model]."""
        model, dtype = self.model, self.model.dtype
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
            head_dtype = model.head.dtype
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


class Planned:
    """The engine's plan for one request: uint8 images and a seed in, actions in robot units out, on the host.

    The instruction's pack is at hand, as in a control loop.
    """

    def __init__(self, engine: Engine, inputs: Inputs, images: list[NDArray[np.uint8]], robot: Embodiment) -> None:
        """images: one uint8 [h, w, 3] per view of the robot; `inputs.frame` is what they become."""
        self.engine, self.config, self.inputs, self.images = engine, engine.config, inputs, images
        self.pack: PromptPack = engine.pack(inputs.embeds)
        self.state = None if inputs.state is None else inputs.state.cpu().numpy()
        sizes = tuple((int(p.shape[0]), int(p.shape[1])) for p in images)
        shape = RequestShape(1, sizes, self.config.image_size, robot.resize, self.state is not None, self.pack.length)
        table = torch.tensor([[torch.nan, -1.0, 1.0, 1.0, 0.0]] * robot.action_dim, dtype=torch.float64)
        self.table = table.T.contiguous().to(engine.device)
        self.plan = Plan(engine, shape, self.table)
        self._kept: dict[str, Tensor] = {}
        self._stages = {name: self.plan.record(stage) for name, stage in self._functions(self._kept).items()}

    def chunk(self, noise: Noise) -> NDArray[np.float32]:
        """Normalised actions [1, K, A_model] of one request."""
        return self.plan.run([self.images], self.state, [noise], [self.pack])[0]

    def checked(self) -> Tensor:
        """The same with the noise of `inputs`, for comparing."""
        given = {name: getattr(self.inputs, name)[0].cpu().numpy() for name in self.plan.draws}
        return torch.from_numpy(self.chunk(Noise(**given))).to(self.inputs.frame.device)

    def stages(self, clock: Clock) -> None:
        """The last request again, stage by stage; on a GPU each is a graph of its own."""
        for name, run in self._stages.items():
            with clock.stage(name), torch.no_grad():
                run()

    def step_inputs(self) -> StepInputs:
        """The inputs as the engine's own functions take them."""
        given = self.inputs
        return StepInputs(given.frame, [self.pack], given.state, given.posterior, given.latent, given.action)

    def eager(self) -> dict[str, Callable[[], None]]:
        """One step in five stages with the kernels of the plan, called one by one: no graph. Copies to and from the GPU count."""
        plan, shape, stages = self.plan, self.plan.shape, self._functions({})
        given, results = plan.inputs.device, plan.outputs.device
        dtype, channels = self.engine.model.dtype, self.engine.encoder.channels
        views = [given[f"view{i}"] for i in range(len(shape.views))]

        def preprocess() -> None:
            plan.inputs.upload()
            plan.draw_noise()
            ops.preprocess(views, shape.size, shape.resize, dtype, channels=channels)

        def outputs() -> None:
            if "actions" in results:
                ops.unnormalize(results["normalized"], self.table, out=results["actions"], copy=results["normalized"])
            plan.outputs.download()

        called = {"preprocess": preprocess, **stages, "outputs": outputs}
        return {name: self.engine.choices().around(stage) for name, stage in called.items()}

    def replays(self) -> dict[str, Callable[[], None]]:
        """Likewise as they are replayed: "step" the whole, and the stages that have a graph of their own."""
        return {"step": self.plan.compute, **self._stages}

    def _functions(self, kept: dict[str, Tensor]) -> dict[str, Callable[[], None]]:
        """The stages of `Engine.features` and the head, to be run in this order; the backbone's has the part of the noise.

        kept: where each leaves its result for the next. A recorded stage reads it where it was when that one was recorded, so
        `kept` must live as long.
        """
        inputs, engine, batch = self.inputs, self.engine, PromptPack(self.pack.keys[None], self.pack.values[None])
        # as a plan's preprocessing leaves it
        wide = F.pad(inputs.frame, (0, 0, 0, 0, 0, engine.encoder.channels - inputs.frame.shape[1]))
        frame = wide.to(engine.model.dtype).contiguous(memory_format=torch.channels_last)

        def vae() -> None:
            kept["moments"] = engine.moments(frame)

        def backbone() -> None:
            first = engine.first_block(inputs.latent)
            engine.add_noise(first, inputs.latent)
            kept["features"] = engine.from_moments(first, kept["moments"], batch, inputs.posterior)

        def action_head() -> None:
            engine.actions(kept["features"], inputs.state, inputs.action)

        return {"vae": vae, "backbone": backbone, "action_head": action_head}


def random_images(
    config: ModelConfig, robot: Embodiment, seed: int, device: torch.device, dtype: torch.dtype
) -> tuple[list[NDArray[np.uint8]], Tensor]:
    """One image of the model's size per view of the robot, and the frame that they become on the device."""
    generator = np.random.default_rng(seed)
    images = [generator.integers(0, 256, (*config.image_size, 3), dtype=np.uint8) for _ in robot.views]
    placed = [torch.from_numpy(image)[None].to(device) for image in images]
    return images, ops.preprocess(placed, config.image_size, robot.resize, dtype)
