"""Tensors -> modules. A model is built on the meta device and each weight is brought to its device and dtype once, so
that peak memory is one copy of what is kept; parts that are not wanted are never read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dit4dit.checkpoints.checkpoint import HEAD, TEXT, TRANSFORMER, VAE, cosmos_tensors
from dit4dit.checkpoints.published import read_cosmos
from dit4dit.config import ModelConfig
from dit4dit.errors import CheckpointError
from dit4dit.model.action_head import ActionHead
from dit4dit.model.dit4dit import DiT4DiT
from dit4dit.model.vae import FrameEncoder


@dataclass(frozen=True)
class Part:
    """One module and where its weights stand in a checkpoint."""

    name: str
    module: nn.Module
    prefix: str
    dtype: torch.dtype
    select: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    """From the part's tensors (prefix removed) to the module's own names; drops what is not kept."""


def language_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The language layers of Qwen2.5-VL; the vision tower and the output matrix are not touched by a prompt."""
    prefix = "model.language_model."
    return {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}


def parts_of(model: DiT4DiT, dtype: torch.dtype, head_dtype: torch.dtype) -> list[Part]:
    """The model's parts in loading order."""
    parts = [
        Part("frame encoder", model.backbone.frame_encoder, VAE, dtype, FrameEncoder.convert),
        Part("backbone", model.backbone.transformer, TRANSFORMER, dtype, dict),
    ]
    if model.text is not None:
        parts.append(Part("text encoder", model.text.language_model, TEXT, dtype, language_weights))
    if model.video_vae is not None:
        parts.append(Part("clip VAE", model.video_vae.wan, VAE, dtype, dict))
    if model.head is not None:
        parts.append(Part("action head", model.head, HEAD, head_dtype, dict))
    return parts


def build(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    where: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dtype: torch.dtype,
    with_text: bool = True,
    with_video_vae: bool = False,
    with_head: bool = True,
) -> DiT4DiT:
    """A model with the checkpoint's weights, in evaluation mode.

    Args:
        config: sizes. tensors: weights under the published names. where: the checkpoint's path, for messages.
        device: where everything goes. dtype: of everything but the head. head_dtype: of the head.
        with_text, with_video_vae, with_head: which optional parts to build.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or belongs to nothing.
    """
    with torch.device("meta"):
        model = DiT4DiT(config, with_text=with_text, with_head=with_head, with_video_vae=with_video_vae)
    for part in parts_of(model, dtype, head_dtype):
        fill(part, tensors, where, device)
    finish(model, device)
    return model


def finish(model: DiT4DiT, device: torch.device) -> None:
    """What no checkpoint holds, after the weights are in place: buffers, frozen flags, evaluation mode."""
    model.backbone.scale.to(device)
    if model.video_vae is not None:
        model.video_vae.scale.to(device)
    if model.text is not None:
        model.text.restore_buffers(device)
    for frozen in (model.text, model.backbone.frame_encoder, model.video_vae):
        if frozen is not None:
            frozen.requires_grad_(False)
    model.eval()


def check(config: ModelConfig, tensors: Mapping[str, Tensor], where: str) -> list[str]:
    """What `build` would refuse, one message per part at most; no weight is read.

    The parts are those of a policy, and the VAE's decoder where the checkpoint has anything of it.
    """
    decoder = any(name.startswith(f"{VAE}decoder.") for name in tensors)
    with torch.device("meta"):
        model = DiT4DiT(config, with_text=True, with_head=True, with_video_vae=decoder)
    found = []
    for part in parts_of(model, torch.float32, torch.float32):
        try:
            match(part, tensors, where)
        except CheckpointError as error:
            policy = "; a policy does without this part, training does not" if part.name == "clip VAE" else ""
            found.append(f"{error}{policy}")
    return found


def match(part: Part, tensors: Mapping[str, Tensor], where: str) -> Mapping[str, Tensor]:
    """One part's tensors under the module's own names; CheckpointError where they are not the module's, one for one."""
    expected = dict(part.module.state_dict())
    found = part.select(Slice(tensors, part.prefix))
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(
            f"{where}: {part.name}: {len(missing)} of {len(expected)} tensors missing, first "
            f"{part.prefix}…{missing[0]}; the checkpoint is incomplete or its configuration is another model's"
        )
    extra = [name for name in found if name not in expected]
    if extra:
        raise CheckpointError(
            f"{where}: {part.name}: {len(extra)} tensors that this model does not have, first {part.prefix}…{extra[0]}; "
            "the configuration is another model's"
        )
    for name, blank in expected.items():
        value = found[name]
        if value.shape != blank.shape:
            empty = (
                "; an empty tensor is what DeepSpeed's ZeRO-3 leaves of one: zero_to_fp32.py puts the shards together"
            )
            raise CheckpointError(
                f"{where}: {part.name}: {part.prefix}…{name}: expected shape {list(blank.shape)} from the configuration, "
                f"got {list(value.shape)}{'' if value.numel() else empty}"
            )
        if not value.is_floating_point():
            raise CheckpointError(f"{where}: {part.name}: {part.prefix}…{name}: expected floats, got {value.dtype}")
        if value.layout != torch.strided:
            raise CheckpointError(
                f"{where}: {part.name}: {part.prefix}…{name}: expected a dense tensor, got {value.layout}; save its "
                ".to_dense()"
            )
    return found


def fill(part: Part, tensors: Mapping[str, Tensor], where: str, device: torch.device) -> None:
    """Bring one part's weights from the checkpoint to the device, one tensor at a time."""
    found = match(part, tensors, where)
    # a copy even where nothing changes: a mapped file that is replaced later must not change a running policy
    state = {
        name: found[name].to(device=device, dtype=part.dtype, copy=True).contiguous()
        for name in part.module.state_dict()
    }
    part.module.load_state_dict(state, assign=True)


class Slice(Mapping[str, Tensor]):
    """The tensors below a prefix, names without it."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        self._tensors, self._prefix = tensors, prefix
        self._names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def cosmos_sizes(folder: Path, base: ModelConfig) -> ModelConfig:
    """`base` with the sizes of a Cosmos folder's own parts; reads small files only."""
    text, vae, dit, sigma_max = read_cosmos(folder)
    return replace(
        base,
        text=replace(text, max_length=base.text.max_length),
        vae=vae,
        dit=dit,
        head=replace(base.head, context_dim=dit.width),
        sigma_max=sigma_max,
    )


def from_cosmos(
    folder: Path,
    base: ModelConfig,
    seed: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dtype: torch.dtype | None = None,
    with_text: bool = True,
    with_video_vae: bool = True,
) -> DiT4DiT:
    """A model whose backbone, VAE and text encoder are a Cosmos-Predict2.5 folder's and whose head is fresh.

    Args:
        folder: the folder in diffusers' layout, with weights.
        base: everything that the folder does not say: head, frames, picture size, loss. Sizes of the folder's own
            parts are taken from the folder.
        seed: fixes the head's weights. head_dtype: `dtype` when None. The others: as in `build`.

    Raises:
        CheckpointError: no folder, no weights in it, or weights that do not fit its configuration.
    """
    config = cosmos_sizes(folder, base)
    parts = ("transformer", "vae", "text_encoder") if with_text else ("transformer", "vae")
    model = build(
        config,
        cosmos_tensors(folder, parts),
        str(folder),
        device=torch.device(device),
        dtype=dtype,
        head_dtype=head_dtype or dtype,
        with_text=with_text,
        with_video_vae=with_video_vae,
        with_head=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.head = ActionHead(config.head).to(device=device, dtype=head_dtype or dtype).eval()
    return model


def random_model(
    config: ModelConfig,
    seed: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dtype: torch.dtype | None = None,
    with_text: bool = True,
    vae_weights: Mapping[str, Tensor] | None = None,
) -> DiT4DiT:
    """A model with fresh weights, a function of the seed: PyTorch's own initialisation of each layer.

    They are drawn where the model will be (ten thousand million numbers take most of a minute on a processor), so that a GPU
    and a CPU draw other ones.

    Args:
        config: sizes. seed: fixes every weight. device, dtype, with_text: as in `build`.
        head_dtype: of the action head; `dtype` when None.
        vae_weights: trained VAE weights under diffusers' names; fresh ones when None.

    Returns:
        A model with its clip VAE, whose frame encoder is that VAE's, in evaluation mode.
    """
    place = torch.device(device)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), place:
        torch.manual_seed(seed)
        model = DiT4DiT(config, with_text=with_text, with_video_vae=True)
    assert model.video_vae is not None
    if vae_weights is not None:
        model.video_vae.wan.load_state_dict(dict(vae_weights))
    model.backbone.frame_encoder.load_state_dict(FrameEncoder.convert(model.video_vae.wan.state_dict()))
    for part in parts_of(model, dtype, head_dtype or dtype):
        part.module.to(device=device)
        if any(p.dtype != part.dtype for p in part.module.parameters()):
            part.module.to(dtype=part.dtype)
    finish(model, torch.device(device))
    return model
