"""Each transform against its inverse, and against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dit4dit.stats import VectorStats
from dit4dit.transforms import Chain, Normalize, Pad, SinCos, Threshold


def stats(**changes) -> VectorStats:
    base = {
        "mean": [0.0, 1.0, 2.0, 5.0],
        "std": [1.0, 2.0, 0.0, 1.0],
        "min": [-2.0, 0.0, 3.0, 0.0],
        "max": [2.0, 4.0, 3.0, 1.0],
        "q01": [-1.0, 1.0, 3.0, 0.0],
        "q99": [1.0, 3.0, 3.0, 1.0],
        "mask": [True, True, True, True],
    }
    return VectorStats(**{k: np.asarray({**base, **changes}[k], dtype=bool if k == "mask" else float) for k in base})


def test_sin_cos_interleaves_scalars_and_groups_vectors() -> None:
    x = np.array([[0.1, 0.2, 0.3]], np.float32)
    s, c = np.sin(x[0]), np.cos(x[0])
    assert np.allclose(SinCos((1, 1, 1)).forward(x)[0], [s[0], c[0], s[1], c[1], s[2], c[2]])
    assert np.allclose(SinCos((2, 1)).forward(x)[0], [s[0], s[1], c[0], c[1], s[2], c[2]])
    for dims in ((1, 1, 1), (2, 1), (3,)):
        assert np.allclose(SinCos(dims).inverse(SinCos(dims).forward(x)), x, atol=1e-6)


def test_pad_and_its_inverse() -> None:
    x = np.ones((2, 3), np.float32)
    assert Pad(3, 5).forward(x).tolist() == [[1, 1, 1, 0, 0]] * 2
    assert np.array_equal(Pad(3, 5).inverse(Pad(3, 5).forward(x)), x)


@pytest.mark.parametrize(
    "mode, x, want",
    [
        ("min_max", [1.0, 4.0, 9.0, 0.5], [0.5, 1.0, 0.0, 0.0]),
        ("q99", [0.5, 9.0, 0.25, 0.25], [0.5, 1.0, 0.25, -0.5]),
        ("mean_std", [0.5, 5.0, 2.0, 7.0], [0.5, 2.0, 2.0, 2.0]),
        ("binary", [0.4, 0.6, 0.5, 1.0], [0.0, 1.0, 0.0, 1.0]),
        ("none", [0.4, 7.0, -3.0, 1.0], [0.4, 7.0, -3.0, 1.0]),
    ],
)
def test_normalisation_modes(mode, x, want) -> None:
    got = Normalize.from_stats(stats(), [mode] * 4).forward(np.array(x, np.float32))
    assert np.allclose(got, want)
    assert got.dtype == np.float32


@pytest.mark.parametrize("mode", ["min_max", "q99", "mean_std"])
def test_normalisation_comes_back(mode) -> None:
    normalize = Normalize.from_stats(stats(), [mode] * 4)
    x = np.array([[0.7, 2.5, 2.0 if mode == "mean_std" else 3.0, 0.4]], np.float32)
    assert np.allclose(normalize.inverse(normalize.forward(x)), x, atol=1e-6)


def test_the_inverse_clips_and_the_published_formula_holds() -> None:
    s = stats(mask=[True, True, True, False])
    a = np.array([[-3.0, 0.25, 0.9, 7.0], [0.5, 2.0, -1.0, 0.3]])
    clipped = np.clip(a, -1, 1)
    want = np.where(s.mask, 0.5 * (clipped + 1) * (s.max - s.min) + s.min, clipped)
    assert np.allclose(Normalize.from_stats(s, ["min_max"] * 4).inverse(a), want, atol=1e-6)


def test_masked_dimensions_pass_unscaled() -> None:
    s = stats(mask=[True, False, True, True])
    assert Normalize.from_stats(s, ["min_max"] * 4).forward(np.array([0, 3.5, 3, 0], np.float32))[1] == 3.5


def test_threshold_before_the_affine_map() -> None:
    chain = Chain(
        (Normalize.from_stats(stats(mask=[True, True, True, False]), ["min_max"] * 4), Threshold(3), Pad(4, 6))
    )
    y = np.zeros((2, 6), np.float32)
    y[:, 3] = [0.49, 0.5]
    assert chain.inverse(y)[:, 3].tolist() == [0.0, 1.0]
    assert y[0, 3] == np.float32(0.49), "the input must not be written to"
