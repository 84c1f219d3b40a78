"""Randomness of one request, as data. Counter-based, so that a request's noise does not depend on its batch or its past.

The generator is Philox 4x32-10 (Salmon et al., 2011): key = seed, counter = (position, stream, chunk). Four words make two
Box-Muller pairs in float64, rounded to float32; a device can draw the very same numbers from the same four integers.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit4dit.errors import InputError, shown

STREAMS = {"posterior": 0, "latent": 1, "action": 2}
_WORD = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


@dataclass(frozen=True, eq=False)
class Noise:
    """The three draws of one inference request, each standard normal float32.

    Attributes:
        posterior: turns the posterior of latent frame 0 into its sample, mean + std * noise; [z, 1, h, w].
        latent: initial latents of all T frames (frame 0 is overwritten); [z, T, h, w].
        action: initial noisy actions; [K, A_model].
        seed, chunk: where the arrays come from when they are not given: drawn when the shapes are known.
    """

    posterior: NDArray[np.float32] | None = None
    latent: NDArray[np.float32] | None = None
    action: NDArray[np.float32] | None = None
    seed: int | None = None
    chunk: int = 0

    def __post_init__(self) -> None:
        given = [name for name in STREAMS if getattr(self, name) is not None]
        if self.seed is None and len(given) < len(STREAMS):
            missing = [name for name in STREAMS if name not in given]
            raise InputError(
                f"noise: expected posterior, latent and action, or a seed; got no {' and no '.join(missing)}"
            )
        for name in ("seed", "chunk"):
            value = getattr(self, name)
            if value is None and name == "seed":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < 2**64:
                raise InputError(f"noise {name}: expected an integer in 0..2^64-1, got {shown(value)}")
            object.__setattr__(self, name, int(value))

    @classmethod
    def from_seed(cls, seed: int, chunk: int = 0) -> Noise:
        """Noise of request number `chunk` of the episode `seed`: same two integers, same bits."""
        return cls(seed=seed, chunk=chunk)

    @classmethod
    def fresh(cls) -> Noise:
        """Noise from a seed taken from the operating system; the seed can be read back and used again."""
        return cls.from_seed(secrets.randbits(63))

    @property
    def given(self) -> bool:
        """Whether some of the arrays are given, not drawn from the seed."""
        return any(getattr(self, name) is not None for name in STREAMS)

    def draw(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, NDArray[np.float32]]:
        """The three arrays for the given shapes; InputError when a given array has another shape, dtype, or NaN."""
        out = {}
        for name, stream in STREAMS.items():
            value: Any = getattr(self, name)
            if value is None:
                assert self.seed is not None
                out[name] = normal(shapes[name], self.seed, self.chunk, stream)
                continue
            value = np.asarray(value)
            if value.shape != shapes[name]:
                raise InputError(f"noise {name}: expected shape {shapes[name]}, got {value.shape}")
            if value.dtype != np.float32:
                raise InputError(f"noise {name}: expected float32, got {value.dtype}")
            if not np.isfinite(value).all():
                raise InputError(f"noise {name}: has NaN or infinite values")
            out[name] = value
        return out


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Ten rounds of Philox 4x32: counter [N, 4] of 32-bit words, key of two -> [N, 4] of 32-bit words."""
    c0, c1, c2, c3 = (counter[:, i] & _WORD for i in range(4))
    k0, k1 = key
    for _ in range(10):
        low = np.uint64(0xD2511F53) * c0
        high = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (high >> _SHIFT) ^ c1 ^ np.uint64(k0),
            high & _WORD,
            (low >> _SHIFT) ^ c3 ^ np.uint64(k1),
            low & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1)


def normal(shape: tuple[int, ...], seed: int, chunk: int, stream: int) -> NDArray[np.float32]:
    """Standard normal float32 of `shape`, a function of the three integers alone."""
    count = math.prod(shape)
    counter = np.empty((-(-count // 4), 4), dtype=np.uint64)
    counter[:, 0] = np.arange(counter.shape[0], dtype=np.uint64)
    counter[:, 1] = stream
    counter[:, 2] = chunk & 0xFFFFFFFF
    counter[:, 3] = chunk >> 32
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log((words[:, 0::2] + 1.0) * 2.0**-32))
    angle = words[:, 1::2] * (2.0 * np.pi * 2.0**-32)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2)
    return pairs.reshape(-1)[:count].astype(np.float32).reshape(shape)
