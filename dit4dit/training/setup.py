"""Before the first step: weights from where the configuration says, caches, and the parts that the model then lives without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dit4dit.checkpoints import checkpoint, checksums, native, weights
from dit4dit.checkpoints.checkpoint import FROZEN, TEXT
from dit4dit.config import ModelConfig
from dit4dit.envs import tabletop_tokenizer, tabletop_vae_dir
from dit4dit.model.action_head import ActionHead
from dit4dit.model.dit4dit import DiT4DiT
from dit4dit.model.text import TextEncoder, byte_tokenizer
from dit4dit.policy.prompts import load_tokenizer
from dit4dit.training.config import TrainConfig
from dit4dit.training.fresh import rescale

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Start:
    """A run's first weights.

    Attributes:
        config: the configuration with the sizes that the weights have.
        model: without a text encoder, float32, in evaluation mode, on the device.
        text: builds the text encoder; called only where an embedding is missing.
        tokenizer: its tokenizer.
    """

    config: TrainConfig
    model: DiT4DiT
    text: Callable[[], TextEncoder]
    tokenizer: PreTrainedTokenizerBase


def load(config: TrainConfig, device: torch.device) -> Start:
    """Weights from a checkpoint, from a Cosmos folder with a fresh head, or fresh ones."""
    if config.weights.checkpoint is not None:
        return _from_checkpoint(config, device)
    if config.weights.backbone is not None:
        return _from_cosmos(config, device)
    return _fresh(config, device)


def sized(config: TrainConfig) -> TrainConfig:
    """The configuration with the sizes of the weights that it starts from; reads small files only."""
    if config.weights.checkpoint is not None:
        opened = checkpoint.open_checkpoint(config.weights.checkpoint, config.weights.backbone)
        return replace(config, model=_model_of(config, opened.model))
    if config.weights.backbone is not None and (folder := local_backbone(config.weights.backbone)) is not None:
        return replace(config, model=weights.cosmos_sizes(folder, config.model))
    return config


def local_backbone(backbone: str) -> Path | None:
    """A Cosmos folder, or a hub id's files where they are on this machine already; None for an id whose files are not.

    Raises:
        CheckpointError: neither a folder nor an id.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder = Path(backbone).expanduser()
    if folder.exists() or not checkpoint.is_hub_id(backbone):
        return checkpoint.find_backbone(backbone, None, weights=False)
    revision = checkpoint.HUB_REVISION if backbone == checkpoint.HUB_BACKBONE else None
    try:
        return Path(snapshot_download(backbone, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _model_of(config: TrainConfig, found: ModelConfig) -> ModelConfig:
    """A checkpoint's sizes with the configuration's losses and dropout; with `fresh_head`, its head, frames and pictures too."""
    wanted = config.model
    if config.weights.fresh_head:
        head, frames, size = replace(wanted.head, context_dim=found.dit.width), wanted.frames, wanted.image_size
    else:
        head, frames, size = replace(found.head, dropout=wanted.head.dropout), found.frames, found.image_size
    return replace(found, head=head, flow=wanted.flow, frames=frames, image_size=size)


def _from_checkpoint(config: TrainConfig, device: torch.device) -> Start:
    opened = checkpoint.open_checkpoint(str(config.weights.checkpoint), config.weights.backbone)
    fresh, model_config = config.weights.fresh_head, _model_of(config, opened.model)
    with_head = model_config.flow.training != "video"
    model = weights.build(
        model_config,
        opened.tensors,
        str(opened.path),
        device=device,
        dtype=torch.float32,
        head_dtype=torch.float32,
        with_text=False,
        with_video_vae=True,
        with_head=with_head and not fresh,
    )
    if with_head and fresh:
        model.head = _fresh_head(model_config, config.run.seed).to(device)

    def text() -> TextEncoder:
        return _text_encoder(model_config, opened.tensors, str(opened.path), device)

    return Start(replace(config, model=model_config), model, text, load_tokenizer(opened.tokenizer))


def _from_cosmos(config: TrainConfig, device: torch.device) -> Start:
    folder = checkpoint.find_backbone(config.weights.backbone, None, weights=True)
    model = weights.from_cosmos(folder, config.model, config.run.seed, device=device, with_text=False)
    if config.model.flow.training == "video":
        model.head = None

    def text() -> TextEncoder:
        return _text_encoder(model.config, checkpoint.cosmos_tensors(folder, ("text_encoder",)), str(folder), device)

    return Start(replace(config, model=model.config), model, text, load_tokenizer(folder / "tokenizer"))


def _fresh(config: TrainConfig, device: torch.device) -> Start:
    """Everything from the seed; the tabletop world has a trained VAE and a tokenizer of its own."""
    from safetensors.torch import load_file

    vae, world = None, config.embodiment == "tabletop"
    if world:
        vae = {n: t.float() for n, t in load_file(tabletop_vae_dir() / "model.safetensors").items()}
    model = weights.random_model(config.model, config.run.seed, with_text=False, vae_weights=vae)
    if config.model.flow.action_grad_to_backbone:
        rescale(model)
    else:  # a head alone learns faster from the usual weights
        model.backbone.transformer.open_gates()
    model.to(device)
    if config.model.flow.training == "video":
        model.head = None

    def text() -> TextEncoder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            encoder = TextEncoder(config.model.text)
        return encoder.to(device).eval().requires_grad_(False)

    return Start(config, model, text, fresh_tokenizer(config))


def fresh_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a run whose weights are all fresh."""
    return tabletop_tokenizer() if config.embodiment == "tabletop" else byte_tokenizer()


def _fresh_head(config: ModelConfig, seed: int) -> ActionHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ActionHead(config.head)


def _text_encoder(config: ModelConfig, tensors: Any, where: str, device: torch.device) -> TextEncoder:
    """The text encoder alone; in bfloat16 on a GPU, where it is 16 GB instead of 32."""
    with torch.device("meta"):
        encoder = TextEncoder(config.text)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    part = weights.Part("text encoder", encoder.language_model, TEXT, dtype, weights.language_weights)
    weights.fill(part, tensors, where, device)
    encoder.restore_buffers(device)
    return encoder.eval().requires_grad_(False)


def save_frozen(folder: Path, model: DiT4DiT, text: TextEncoder) -> None:
    """text_encoder/ and vae/ as the native format has them, once per run; checkpoints link to these files."""
    if folder.is_dir():
        return
    model.text = text
    tensors = native.named_tensors(model)
    model.text = None
    with native.new_folder(folder) as partial:
        for part, prefix in FROZEN.items():
            native.write_shards(partial / part, {n: t for n, t in tensors.items() if n.startswith(prefix)})
        checksums.write(partial)
