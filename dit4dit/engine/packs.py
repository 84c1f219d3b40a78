"""Prompt packs: everything in a chunk that depends on the instruction alone.

A pack is k and v of the cross-attentions of all blocks that run, keys already normed. It replaces the text encoder, the
100352-wide projection and 36 matrix products of every chunk. On disk a pack stands under a key made of the backbone weights it
came from, so that another backbone never finds it, with the text encoder's fingerprint inside: a policy that has its text encoder
makes a pack of another one again, a policy that has none takes what is there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit4dit.config import hashed_text
from dit4dit.errors import CheckpointError, InputError, shown
from dit4dit.files.atomic import whole_file
from dit4dit.model.dit4dit import DiT4DiT
from dit4dit.model.video_dit import VideoDiT


@dataclass(frozen=True)
class PromptPack:
    """keys and values [blocks, heads, L, head_dim] in the backbone's dtype, keys normed, on the backbone's device.

    `stack` makes that of a batch, [B, blocks, heads, L, head_dim]. On a GPU `ready` stands behind the kernels that write it:
    another stream waits for that event, and for nothing else, before it reads.
    """

    keys: Tensor
    values: Tensor
    ready: torch.cuda.Event | None = None

    @property
    def length(self) -> int:
        """Text tokens L."""
        return self.keys.shape[-2]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values))


def stack(packs: Sequence[PromptPack]) -> PromptPack:
    """Packs of a batch as one, [B or 1, blocks, heads, L, d]; one instruction for all is not copied."""
    for pack in packs:
        if pack.ready is not None:
            torch.cuda.current_stream(pack.keys.device).wait_event(pack.ready)
    if all(pack is packs[0] for pack in packs):
        return PromptPack(packs[0].keys[None], packs[0].values[None])
    return PromptPack(torch.stack([p.keys for p in packs]), torch.stack([p.values for p in packs]))


@torch.no_grad()
def make_pack(transformer: VideoDiT, prompt_embeds: Tensor, blocks: int) -> PromptPack:
    """prompt_embeds [1, L, text_in] -> the pack for the first `blocks` blocks."""
    context = transformer.project_text(prompt_embeds)
    keys, values = [], []
    for block in transformer.blocks[:blocks]:
        attention = block.attn2
        k, v = (
            y(context).unflatten(-1, (attention.heads, -1)).transpose(1, 2) for y in (attention.to_k, attention.to_v)
        )
        keys.append(attention.norm_k(k)[0])
        values.append(v[0])
    return with_event(torch.stack(keys), torch.stack(values))


def with_event(keys: Tensor, values: Tensor) -> PromptPack:
    """A pack whose tensors the current stream has been told to write."""
    if keys.device.type != "cuda":
        return PromptPack(keys, values)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(keys.device))
    return PromptPack(keys, values, event)


def packs_key(model: DiT4DiT) -> str:
    """What the model's packs are made from: the weights of the backbone's text side and the length of a prompt.

    The text encoder is not part of it: with it left out the key must be the same (see `text_fingerprint`).
    """
    transformer = model.backbone.transformer
    blocks = transformer.blocks[: model.config.extract_layer + 1]
    sides: list[nn.Module] = [transformer.crossattn_proj]
    for block in blocks:
        sides += [block.attn2.to_k, block.attn2.to_v, block.attn2.norm_k]
    return f"{hashed_text('TextConfig', model.config.text)} {weights_key(sides)}"


def weights_key(modules: Iterable[nn.Module]) -> str:
    """A content hash of all weights of `modules`, 32 hex digits."""
    return content_hash(item for module in modules for item in module.state_dict().items())


def content_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of names, dtypes, shapes and bytes, 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(values)
    return digest.hexdigest()


def text_fingerprint(text: nn.Module | None) -> str | None:
    """A content hash of a text encoder, 32 hex digits: up to 4096 values of each of its tensors, evenly spread.

    Whole, its 16 GB would take longer to hash than to load; a fine-tuned encoder differs nearly everywhere.
    """
    if text is None:
        return None
    items = []
    for name, tensor in text.state_dict().items():
        values = tensor.detach().reshape(-1)
        items.append((f"{name} {tuple(tensor.shape)}", values[:: max(1, -(-values.numel() // 4096))]))
    return content_hash(items)


class PackFolder:
    """Packs on disk, one safetensors file each, under a hash of the weights' key and the instruction."""

    def __init__(
        self,
        folder: Path,
        key: str,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device | str,
        text: str | None = None,
    ) -> None:
        """Where packs of one model are.

        Args:
            key: what the packs are made from (`packs_key`), so that other weights never find them.
            shape, dtype: of keys and of values.
            device: where they are brought.
            text: the `text_fingerprint` of the encoder at hand, if any.
        """
        self.folder, self._key, self._device, self._text = folder, key, device, text
        self._shape, self._dtype = shape, dtype

    @classmethod
    def of(cls, folder: Path, model: DiT4DiT) -> PackFolder:
        """The folder for the packs of `model`."""
        config = model.config
        shape = (config.extract_layer + 1, config.dit.num_heads, config.text.max_length, config.dit.head_dim)
        return cls(folder, packs_key(model), shape, model.dtype, model.device, text_fingerprint(model.text))

    def path(self, instruction: str) -> Path:
        """Where the instruction's pack is or will be."""
        name = hashlib.blake2b(f"{self._key}\n{instruction}".encode(), digest_size=16).hexdigest()
        return self.folder / f"{name}.safetensors"

    def load(self, instruction: str) -> PromptPack | None:
        """The pack, or None when there is none of this text encoder; CheckpointError when the file is broken."""
        from safetensors import SafetensorError, safe_open

        path = self.path(instruction)
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                facts = file.metadata() or {}
                if self._text is not None and facts.get("text_encoder") != self._text:
                    return None
                keys, values = (file.get_tensor(name) for name in ("keys", "values"))
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: not a readable prompt pack ({error}); delete it and make it again"
            ) from None
        for tensor in (keys, values):
            if tensor.shape != self._shape or tensor.dtype != self._dtype:
                raise CheckpointError(
                    f"{path}: expected keys and values {self._dtype} {list(self._shape)}, got {tensor.dtype} "
                    f"{list(tensor.shape)}; delete it and make it again"
                )
        if facts.get("content") != content_hash((("keys", keys), ("values", values))):
            raise CheckpointError(f"{path}: its content is not what was written; delete it and make it again")
        return with_event(keys.to(self._device), values.to(self._device))

    def store(self, instruction: str, pack: PromptPack) -> None:
        """Write the pack, whole or not at all; InputError when it cannot be written."""
        from safetensors.torch import save_file

        tensors = {"keys": pack.keys.cpu(), "values": pack.values.cpu()}
        metadata = {"instruction": instruction, "weights": self._key, "text_encoder": self._text or ""}
        metadata["content"] = content_hash(tensors.items())
        hint = f"give another folder for the pack of {shown(instruction)}"
        with whole_file(self.path(instruction), InputError, hint) as partial:
            save_file(tensors, partial, metadata=metadata)
