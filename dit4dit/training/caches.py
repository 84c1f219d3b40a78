"""What never changes during a run, computed once, before the first step: prompt embeddings, and the VAE's latents.

Both stand on disk under hashes of what made them, are written by all ranks, each its share, and are read memory-mapped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dit4dit.config import hashed_text
from dit4dit.engine.packs import text_fingerprint, weights_key
from dit4dit.errors import CheckpointError, shown
from dit4dit.files.atomic import whole_file
from dit4dit.model.dit4dit import DiT4DiT
from dit4dit.model.text import TextEncoder, tokenize
from dit4dit.training.samples import TrainingData, collate, pictures

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 64
"""Clips per file of the latent cache, encoded four at a time, so that a clip's latents do not depend on who asks for it."""
ENCODED_TOGETHER = 4


def digest(*parts: object) -> str:
    """32 hex digits of the parts' words: numbers, texts, lists and maps of them; of a configuration its `hashed_text`."""
    return hashlib.blake2b("\n".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def write_aside(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file that appears whole or not at all; CheckpointError where it cannot be written."""
    from safetensors.torch import save_file

    with whole_file(path, CheckpointError, "free space, or choose another folder with --data.cache") as partial:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial)


class PromptCache:
    """instruction -> prompt embedding [L, text_in], mapped from its file."""

    def __init__(self, folder: Path, key: str) -> None:
        """key: what the embeddings are made by (`prompt_key`)."""
        self.folder, self.key = folder / "prompts", key
        self._open: dict[str, Tensor] = {}

    def path(self, instruction: str) -> Path:
        """Where the instruction's embedding is or will be."""
        return self.folder / f"{digest(self.key, instruction)}.safetensors"

    def missing(self, instructions: Sequence[str]) -> list[str]:
        """Those that have no file yet."""
        return [words for words in dict.fromkeys(instructions) if not self.path(words).is_file()]

    def left(self, instructions: Sequence[str], rank: int, ranks: int) -> list[str]:
        """Those of one rank's share that have no file yet."""
        return self.missing(sorted(set(instructions))[rank::ranks])

    def store(self, instruction: str, embedding: Tensor) -> None:
        """embedding [L, text_in]."""
        write_aside(self.path(instruction), {"embedding": embedding})

    def __getitem__(self, instruction: str) -> Tensor:
        if instruction not in self._open:
            path = self.path(instruction)
            if not path.is_file():
                raise CheckpointError(
                    f"prompt cache {self.folder}: no embedding of {shown(instruction)}; the data has instructions that it did "
                    "not list"
                )
            self._open[instruction] = _mapped(path)["embedding"]
        return self._open[instruction]


def _mapped(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not readable ({error}); delete it and start again") from None


def prompt_key(text: TextEncoder, tokenizer: PreTrainedTokenizerBase) -> str:
    """What makes a prompt embedding: the encoder's weights and dtype, the length, the tokenizer's words."""
    dtype = next(text.parameters()).dtype
    words = digest(*sorted(tokenizer.get_vocab().items()), tokenizer.chat_template)
    return digest(text_fingerprint(text.language_model), hashed_text("TextConfig", text.config), dtype, words)


@torch.no_grad()
def fill_prompts(
    cache: PromptCache,
    text: TextEncoder,
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[str],
    *,
    rank: int = 0,
    ranks: int = 1,
    done: Callable[[int], object] = lambda count: None,
) -> None:
    """Embed what is missing, every `ranks`-th instruction from `rank` on; `done` is told of each."""
    device = next(text.parameters()).device
    for words in cache.left(instructions, rank, ranks):
        tokens = tokenize(tokenizer, [words], text.config.max_length)
        cache.store(words, text(tokens.to(device))[0])
        done(1)


class LatentCache:
    """Index of a clip -> its latents: posterior mean and std of frame 0 [z, h, w], normalised means of the clip [z, T, h, w]."""

    def __init__(self, folder: Path, key: str, clips: int) -> None:
        """key: what the latents are made of and by (`latent_key`); clips: how many there are."""
        self.folder, self.clips = folder / "latents" / key, clips
        self._open: dict[int, dict[str, Tensor]] = {}

    @property
    def chunks(self) -> int:
        return -(-self.clips // CHUNK)

    def path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:06d}.safetensors"

    def missing(self, chunks: Sequence[int]) -> list[int]:
        """Those that have no file yet."""
        return [chunk for chunk in chunks if not self.path(chunk).is_file()]

    def left(self, rank: int, ranks: int) -> list[int]:
        """The chunks of one rank's share that have no file yet."""
        return self.missing(range(self.chunks)[rank::ranks])

    def count(self, chunks: Sequence[int]) -> int:
        """Clips in these chunks."""
        return sum(len(self.indices(chunk)) for chunk in chunks)

    def indices(self, chunk: int) -> range:
        return range(chunk * CHUNK, min((chunk + 1) * CHUNK, self.clips))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        chunk, row = divmod(index, CHUNK)
        if chunk not in self._open:
            if not self.path(chunk).is_file():
                raise CheckpointError(f"latent cache: {self.path(chunk)} is missing; start the run again to make it")
            self._open[chunk] = _mapped(self.path(chunk))
        return {name: tensor[row] for name, tensor in self._open[chunk].items()}


def latent_key(model: DiT4DiT, data: TrainingData) -> str:
    """What makes a clip's latents: the data, the VAE's weights, the number of frames."""
    assert model.video_vae is not None
    modules: list[nn.Module] = [model.video_vae.wan]
    vae = hashed_text("VaeConfig", model.config.vae)
    return digest(data.clip_fingerprint, weights_key(modules), vae, model.config.frames)


@torch.no_grad()
def fill_latents(
    cache: LatentCache,
    model: DiT4DiT,
    data: TrainingData,
    *,
    rank: int = 0,
    ranks: int = 1,
    done: Callable[[int], object] = lambda count: None,
) -> None:
    """Encode the clips of every `ranks`-th missing chunk from `rank` on; `done` is told of clips."""
    assert model.video_vae is not None
    device = next(model.parameters()).device
    if device.type == "cpu":
        model.video_vae.channels_last()
    for chunk in cache.left(rank, ranks):
        found: dict[str, list[Tensor]] = {"mean": [], "std": [], "clip": []}
        for start in range(0, len(cache.indices(chunk)), ENCODED_TOGETHER):
            indices = cache.indices(chunk)[start : start + ENCODED_TOGETHER]
            raw = collate(indices, indices, [data.sample(index) for index in indices])
            video = pictures(raw, model.config, device)
            # one pass for all three: latent frame 0 is the first picture's alone
            posterior = model.video_vae.posterior(video.transpose(1, 2))
            clip = model.video_vae.scale.normalize(posterior.mean)
            for name, value in (("mean", posterior.mean[:, :, 0]), ("std", posterior.std[:, :, 0]), ("clip", clip)):
                found[name].append(value.float())
            done(len(indices))
        write_aside(cache.path(chunk), {name: torch.cat(values) for name, values in found.items()})
