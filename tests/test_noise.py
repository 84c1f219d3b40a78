"""Counter-based noise: the generator's published test vectors, and what a request may rely on."""

from __future__ import annotations

import numpy as np
import pytest

from dit4dit import Noise
from dit4dit.errors import InputError
from dit4dit.noise import normal, philox

SHAPES = {"posterior": (16, 1, 4, 8), "latent": (16, 2, 4, 8), "action": (8, 7)}
# known answers of Philox 4x32-10, as published with Random123: counter, key, result
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, want", KNOWN)
def test_philox_known_answers(counter, key, want) -> None:
    assert tuple(philox(np.array([counter], dtype=np.uint64), key)[0].tolist()) == want


def test_normal_is_standard_normal() -> None:
    x = normal((400_000,), seed=1, chunk=2, stream=0).astype(np.float64)
    assert abs(x.mean()) < 0.005
    assert abs(x.std() - 1) < 0.005
    assert abs((x**3).mean()) < 0.02
    assert abs((x**4).mean() - 3) < 0.05
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.005


def test_same_integers_same_bits_others_differ() -> None:
    a, b = (Noise.from_seed(3, 4).draw(SHAPES) for _ in range(2))
    assert all(np.array_equal(a[k], b[k]) and a[k].dtype == np.float32 and a[k].shape == SHAPES[k] for k in SHAPES)
    for other in (
        Noise.from_seed(3, 5),
        Noise.from_seed(4, 4),
        Noise.from_seed(3 + 2**32, 4),
        Noise.from_seed(3, 4 + 2**32),
    ):
        assert not np.array_equal(a["action"], other.draw(SHAPES)["action"])
    flat = {k: v.reshape(-1)[:56] for k, v in a.items()}
    assert not np.array_equal(flat["latent"], flat["posterior"])


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    assert np.array_equal(normal((10,), 1, 2, 0), normal((4, 3), 1, 2, 0).reshape(-1)[:10])


def test_fresh_noise_can_be_repeated() -> None:
    first = Noise.fresh()
    assert first.seed != Noise.fresh().seed
    assert np.array_equal(Noise.from_seed(first.seed).draw(SHAPES)["latent"], first.draw(SHAPES)["latent"])


def test_given_arrays_are_used_and_checked() -> None:
    arrays = {k: np.full(s, 0.5, np.float32) for k, s in SHAPES.items()}
    assert Noise(**arrays).draw(SHAPES)["action"] is arrays["action"]
    some = Noise(action=arrays["action"], seed=1)
    assert (some.given, Noise(**arrays).given, Noise.from_seed(1).given) == (True, True, False)
    mixed = some.draw(SHAPES)
    assert np.array_equal(mixed["latent"], Noise.from_seed(1).draw(SHAPES)["latent"])
    with pytest.raises(InputError, match=r"noise action: expected shape \(8, 7\), got \(7, 8\)"):
        Noise(**{**arrays, "action": arrays["action"].T}).draw(SHAPES)
    with pytest.raises(InputError, match="expected float32, got float64"):
        Noise(**{**arrays, "latent": arrays["latent"].astype(np.float64)}).draw(SHAPES)
    arrays["posterior"][0] = np.nan
    with pytest.raises(InputError, match="posterior: has NaN"):
        Noise(**arrays).draw(SHAPES)


def test_numpy_integers_are_integers() -> None:
    noise = Noise.from_seed(np.int64(7), np.uint8(2))  # type: ignore[arg-type]
    assert (noise.seed, noise.chunk) == (7, 2)
    assert np.array_equal(noise.draw(SHAPES)["action"], Noise.from_seed(7, 2).draw(SHAPES)["action"])


@pytest.mark.parametrize("bad", [-1, 2**64, 1.5, "1", True])
def test_bad_seeds(bad) -> None:
    with pytest.raises(InputError, match="expected an integer in"):
        Noise.from_seed(bad)


def test_half_given_noise_without_a_seed_is_refused() -> None:
    with pytest.raises(InputError, match="got no posterior and no latent"):
        Noise(action=np.zeros((8, 7), np.float32))
