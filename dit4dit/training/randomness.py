"""The random draws of a step as a function of (seed, position) alone, where a sample's position is its number in the run.

Step s of a run with global batch G uses positions s G to s G + G - 1, however many processes share them, so two processes
draw what one would, and a resumed run draws what the interrupted one would have. Nothing here touches a global generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dit4dit.config import ModelConfig
from dit4dit.model.dit4dit import Draws


def key(seed: int, purpose: str, position: int) -> int:
    """63 well-mixed bits from the three."""
    digest = hashlib.blake2b(f"{seed} {purpose} {position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draws(config: ModelConfig, size: tuple[int, int], seed: int, purpose: str, positions: Sequence[int]) -> Draws:
    """All draws of a micro step on the CPU; `size` is the latents' rows and columns.

    Rows of the action draws are repeat-major, as the batch is tiled: row r * B + b is repeat r of sample b.
    """
    ones = []
    for position in positions:
        generator = torch.Generator().manual_seed(key(seed, purpose, position))
        ones.append(Draws.draw(config, 1, size, generator, torch.device("cpu")))
    return Draws(
        posterior=torch.cat([d.posterior for d in ones]),
        latent=torch.cat([d.latent for d in ones]),
        video_time=torch.cat([d.video_time for d in ones]),
        video_noise=torch.cat([d.video_noise for d in ones]),
        action_time=torch.stack([d.action_time for d in ones], dim=1).flatten(),
        action_noise=torch.stack([d.action_noise for d in ones], dim=1).flatten(0, 1),
    )


def dropout_keys(seed: int, positions: Sequence[int], repeats: int) -> Tensor:
    """One key per row of the tiled batch, int64 [repeats * B]."""
    rows = [key(seed, f"dropout {r}", position) for r in range(repeats) for position in positions]
    return torch.tensor(rows, dtype=torch.int64)


class Keys:
    """The dropout keys of the micro step at hand, shared by all `KeyedDropout` of a model.

    No module and no buffer: DDP would send the first rank's to the others.
    """

    def __init__(self) -> None:
        self.rows = torch.zeros(0, dtype=torch.int64)


class KeyedDropout(nn.Module):
    """Dropout whose mask is a hash of (row's key, layer, element): the same on any rank, and when a checkpointed block is
    run again in the backward pass.
    """

    def __init__(self, p: float, salt: int, keys: Keys) -> None:
        super().__init__()
        self.p, self.salt, self.keys = p, salt, keys

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, ...] -> the same shape, kept entries scaled by 1 / (1 - p); unchanged in evaluation mode."""
        if not self.training or self.p == 0:
            return x
        rows = self.keys.rows
        if rows.shape[0] != x.shape[0]:
            raise RuntimeError(f"dropout: {rows.shape[0]} keys were set for {x.shape[0]} rows")
        keep = uniform_bits(rows, self.salt, x[0].numel()).view(x.shape) >= int(self.p * 2**24)
        return torch.where(keep, x / (1 - self.p), 0)


def uniform_bits(rows: Tensor, salt: int, count: int) -> Tensor:
    """Integers in 0..2^24 - 1, int64 [rows, count]: SplitMix64 (Steele et al., 2014) of key, layer and element."""
    golden = -7046029254386353131  # 2^64 / golden ratio, as a signed number; products wrap
    start = rows + salt * 0x632BE59BD9B4E019 % 2**63
    z = start[:, None] + torch.arange(1, count + 1, device=rows.device) * golden
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * -4658895280553007687
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * -7723592293110705685
    return z >> 40 & (1 << 24) - 1


def key_dropouts(module: nn.Module, keys: Keys) -> int:
    """Replace every nn.Dropout below `module`; returns how many there were."""
    found = [
        (parent, name)
        for parent in module.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Dropout
    ]
    for salt, (parent, name) in enumerate(found):
        layer = getattr(parent, name)
        setattr(parent, name, KeyedDropout(layer.p, salt + 1, keys).train(layer.training))
    return len(found)
