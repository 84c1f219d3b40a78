"""Work per stage of one action chunk, counted over the real modules on meta tensors: GFLOP by torch's FlopCounterMode, or
the numbers that the matrix products move (`operands`).

"published" is the schedule of the published code: text encoder with its output matrix every call, diffusers' VAE on the
padded clip, diffusers' transformer with all blocks, four head steps. "executed" is what this package runs for a chunk of
an instruction it has seen; "first_chunk" adds what a new instruction costs once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from dit4dit.checkpoints.export import transformer_arguments
from dit4dit.config import ModelConfig, TextConfig
from dit4dit.engine import Engine, PromptPack, stack
from dit4dit.engine.packs import make_pack
from dit4dit.model.dit4dit import DiT4DiT
from dit4dit.model.text import qwen_config, qwen_text_arguments
from dit4dit.model.vae import build_wan
from dit4dit.presets import Preset
from dit4dit.robots import EMBODIMENTS

STAGES = ("text_encoder", "text_projection", "vae", "backbone", "action_head")


Counter = Callable[[Callable[[], Any]], dict[str, float]]
"""What a call does, by module path; "Global" is all of it."""


def schedules(preset: Preset) -> dict[str, Callable[[], dict[str, float]]]:
    """{"published" | "executed" | "first_chunk": what counts it, as {stage: GFLOP, "total": GFLOP}} for batch 1.

    Without "published" for a model that the published code has no layers for (learned positions).
    """
    views = len(EMBODIMENTS[preset.embodiment].views)

    def total(count: Callable[[ModelConfig, int], dict[str, float]]) -> dict[str, float]:
        stages = count(preset.model, views)
        return {**stages, "total": sum(stages.values())}

    counted = (executed, first_chunk) if preset.model.dit.learned_positions else (published, executed, first_chunk)
    return {f.__name__: partial(total, f) for f in counted}


def count(preset: Preset) -> dict[str, dict[str, float]]:
    """All of `schedules`, counted."""
    return {name: counted() for name, counted in schedules(preset).items()}


def moved(preset: Preset) -> dict[str, dict[str, float]]:
    """{"published" | "executed": {stage: numbers moved, in 1e9}} for batch 1, see `operands`; as `schedules`, without
    "published" for a model that the published code has no layers for.

    The published text projection is part of its backbone here.
    """
    views = len(EMBODIMENTS[preset.embodiment].views)
    functions = {f.__name__: f for f in (published, executed) if f.__name__ in schedules(preset)}
    return {name: function(preset.model, views, operands) for name, function in functions.items()}


class Operands(TorchFunctionMode):
    """Adds up the operands and results of every matrix product, convolution and attention."""

    linear = ("linear", "matmul", "__matmul__", "bmm", "mm", "addmm", "baddbmm")
    products = frozenset((*linear, "conv1d", "conv2d", "conv3d", "scaled_dot_product_attention"))

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in self.products:
            given = [*args, *(kwargs or {}).values(), result]
            # a result that was written to `out` is there twice
            self.numbers += sum(x.numel() for x in {id(x): x for x in given}.values() if isinstance(x, Tensor))
        return result


def operands(run: Callable[[], Any]) -> dict[str, float]:
    """{"Global": numbers moved, in 1e9}: each operand of each product read once, each result written once.

    Everything between two products counts as fused into them, and attention as one product, so this is the least that a
    schedule of these products moves.
    """
    with torch.device("meta"), torch.no_grad(), Operands() as counter:
        run()
    return {"Global": counter.numbers / 1e9}


def measure(run: Callable[[], Any]) -> dict[str, float]:
    """GFLOP per module path of everything `run` does; "Global" is all of it."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    counts = {path: sum(kinds.values()) / 1e9 for path, kinds in counter.get_flop_counts().items()}
    return {"Global": 0.0, **counts}


def frame_of(config: ModelConfig, views: int) -> tuple[int, int]:
    return config.image_size[0], config.image_size[1] * views


def published(config: ModelConfig, views: int, measure: Counter = measure) -> dict[str, float]:
    """Every stage as the published code runs it; the text side of the backbone is a stage of its own."""
    with torch.device("meta"):
        return {
            "text_encoder": published_text(config, measure),
            "vae": published_vae(config, views, measure),
            **published_backbone(config, views, measure),
            "action_head": head_steps(DiT4DiT(config, with_text=False), config, views, measure),
        }


class CpuRotary(nn.Module):
    """transformers' own rotary table, computed on the CPU: it asks for autocast, which the meta device does not have."""

    def __init__(self, config: TextConfig, like: nn.Module) -> None:
        super().__init__()
        with torch.device("cpu"):
            self.table = type(like)(qwen_config(config))

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        with torch.device("cpu"):
            positions = torch.zeros(position_ids.shape, dtype=torch.long)
            return tuple(y.to("meta") for y in self.table(torch.zeros(1, dtype=x.dtype), positions))


def published_text(config: ModelConfig, measure: Counter = measure) -> float:
    """Qwen2.5-VL with its output matrix, one padded prompt."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=qwen_text_arguments(config.text)))
    language = model.model.language_model
    language.rotary_emb = CpuRotary(config.text, language.rotary_emb)
    length = config.text.max_length
    tokens = torch.zeros(1, length, dtype=torch.long)
    positions = torch.zeros(3, 1, length, dtype=torch.long)
    return measure(lambda: model(input_ids=tokens, position_ids=positions, use_cache=False))["Global"]


def published_vae(config: ModelConfig, views: int, measure: Counter = measure) -> float:
    """diffusers' encoder on the frame padded to a whole clip."""
    model = build_wan(config.vae)
    clip = torch.zeros(1, 3, config.frames, *frame_of(config, views))
    return measure(lambda: model.encode(clip))["Global"]


def published_backbone(config: ModelConfig, views: int, measure: Counter = measure) -> dict[str, float]:
    """diffusers' transformer, all blocks and its output head."""
    from diffusers import CosmosTransformer3DModel

    # the padding-mask channel goes in with the latents: diffusers would add it with torchvision, at no FLOPs
    channels = config.dit.latent_channels + 2
    arguments = {**transformer_arguments(config), "in_channels": channels, "concat_padding_mask": False}
    model = CosmosTransformer3DModel(**arguments)
    rows, columns = config.latent_size(*frame_of(config, views))
    latents = torch.zeros(1, channels, config.latent_frames, rows, columns)
    times = torch.zeros(1, 1, config.latent_frames, 1, 1)
    text = torch.zeros(1, config.text.max_length, config.dit.text_in)
    counts = measure(lambda: model(latents, times, text))
    return split_text(counts)


def split_text(counts: dict[str, float]) -> dict[str, float]:
    """The backbone without, and what depends on the instruction alone: the projection, k and v of the cross-attentions."""
    ends = (".attn2.to_k", ".attn2.to_v", ".crossattn_proj.0")
    text_side = sum(value for path, value in counts.items() if path.endswith(ends))
    return {"text_projection": text_side, "backbone": counts["Global"] - text_side}


def head_steps(model: DiT4DiT, config: ModelConfig, views: int, measure: Counter = measure) -> float:
    """The action head's whole ODE."""
    assert model.head is not None
    head, tokens = model.head, config.tokens(views)
    state = None if config.head.state_dim is None else torch.zeros(1, 1, config.head.state_dim)
    noise = torch.zeros(1, config.head.action_horizon, config.head.action_dim)
    context = torch.zeros(1, tokens, config.dit.width)
    return measure(lambda: head.sample(noise, context, state))["Global"]


def executed(config: ModelConfig, views: int, measure: Counter = measure) -> dict[str, float]:
    """One chunk of a known instruction, counted while the engine's own step runs on its reference ops."""
    with torch.device("meta"):
        model = DiT4DiT(config, with_text=False)
        model.backbone.scale.to("meta")
        engine = Engine(model)
        head, dit = config.head, config.dit
        rows, columns = config.latent_size(*frame_of(config, views))
        frame = torch.zeros(1, 3, *frame_of(config, views))
        posterior = torch.zeros(1, config.vae.z_dim, 1, rows, columns)
        latents = torch.zeros(1, config.vae.z_dim, config.latent_frames, rows, columns)
        kept = torch.zeros(len(engine.blocks), dit.num_heads, config.text.max_length, dit.head_dim)
        pack = PromptPack(kept, kept)
        features = torch.zeros(1, config.tokens(views), dit.width)
        state = None if head.state_dim is None else torch.zeros(1, 1, head.state_dim)
        noise = torch.zeros(1, head.action_horizon, head.action_dim)
        return {
            "text_encoder": 0.0,
            "text_projection": 0.0,
            "vae": measure(lambda: engine.condition(frame, posterior))["Global"],
            "backbone": measure(lambda: engine.backbone(latents, stack([pack])))["Global"],
            "action_head": measure(lambda: engine.actions(features, state, noise))["Global"],
        }


def first_chunk(config: ModelConfig, views: int) -> dict[str, float]:
    """A chunk of a new instruction: its text is encoded and projected once."""
    stages = executed(config, views)
    with torch.device("meta"):
        model = DiT4DiT(config)
        assert model.text is not None
        text = model.text
        text.language_model.rotary_emb = CpuRotary(config.text, text.language_model.rotary_emb)
        tokens = torch.zeros(1, config.text.max_length, dtype=torch.long)
        encoder = measure(lambda: text(tokens))["Global"]
        embeds = torch.zeros(1, config.text.max_length, config.dit.text_in)
        blocks = config.extract_layer + 1
        projection = measure(lambda: make_pack(model.backbone.transformer, embeds, blocks))["Global"]
    return {**stages, "text_encoder": encoder, "text_projection": projection}
