"""Each transform against its inverse, and against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dit4dit.ops import unnormalize
from dit4dit.robots.statistics import VectorStats
from dit4dit.robots.transforms import Chain, Normalize, Pad, SinCos, Threshold, inverse_table


def stats(**changes) -> VectorStats:
    base = {
        "mean": [0.0, 1.0, 3.0, 5.0],
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
    x = np.array([[0.7, 2.5, 3.0, 0.4]], np.float32)
    assert np.allclose(normalize.inverse(normalize.forward(x)), x, atol=1e-6)


def test_equal_values_are_constant_whatever_their_standard_deviation_was_rounded_to() -> None:
    """0.1 a hundred times has a mean a last bit beside it, and a deviation that is not 0."""
    s = stats(mean=[0.0, 1.0, 3.0000000000000004, 5.0], std=[1.0, 2.0, 4e-16, 1.0])
    normalize = Normalize.from_stats(s, ["mean_std"] * 4)
    y = normalize.forward(np.array([[0.0, 1.0, 3.5, 5.0]], np.float32))
    assert y.tolist() == [[0.0, 0.0, 3.5, 0.0]], "not thousands of millions of deviations"
    assert normalize.inverse(y).tolist() == [[0.0, 1.0, 3.0, 5.0]]


def test_the_inverse_clips_and_the_published_formula_holds() -> None:
    """As in a published LIBERO checkpoint: the arm min_max, the gripper none with mask false."""
    s = stats(mask=[True, True, True, False])
    a = np.array([[-3.0, 0.25, 0.9, 7.0], [0.5, 2.0, -1.0, 0.3]])
    clipped = np.clip(a, -1, 1)
    want = np.where(s.mask, 0.5 * (clipped + 1) * (s.max - s.min) + s.min, clipped)
    assert np.allclose(Normalize.from_stats(s, ["min_max"] * 3 + ["none"]).inverse(a), want, atol=1e-6)


# mode -> model values of `y` below in robot units, with mask true and with mask false; dimension 1 of `stats()`
INVERSE = {
    "min_max": ([4.0, 0.0, 3.0, 2.6, 2.4], [4.0, 0.0, 3.0, 2.6, 2.4]),
    "q99": ([3.0, 1.0, 2.5, 2.3, 2.2], [3.0, 1.0, 2.5, 2.3, 2.2]),
    "mean_std": ([15.0, -13.0, 2.0, 1.6, 1.4], [15.0, -13.0, 2.0, 1.6, 1.4]),
    "binary": ([1.0, 0.0, 0.0, 0.0, 0.0], [1.0, -1.0, 0.5, 0.3, 0.2]),
    "none": ([7.0, -7.0, 0.5, 0.3, 0.2], [4.0, -1.0, 0.5, 0.3, 0.2]),
}


@pytest.mark.parametrize("mode", INVERSE)
@pytest.mark.parametrize("mask", [True, False])
def test_the_mode_decides_and_the_mask_counts_for_binary_and_none(mode, mask) -> None:
    y, x = np.full((5, 4), 0.1, np.float32), np.array([[0.5, 1.5, 3.0, 0.75]], np.float32)
    y[:, 1] = [7.0, -7.0, 0.5, 0.3, 0.2]
    normalize = Normalize.from_stats(stats(mask=[True, mask, True, True]), [mode] * 4)
    np.testing.assert_allclose(normalize.inverse(y)[:, 1], INVERSE[mode][not mask], atol=1e-6)
    # forward, whatever the mask: what training saw
    whole = Normalize.from_stats(stats(), [mode] * 4)
    assert np.array_equal(normalize.forward(x), whole.forward(x))
    # and other dimensions have nothing of it
    assert np.array_equal(np.delete(normalize.inverse(y), 1, 1), np.delete(whole.inverse(y), 1, 1))
    # the table that the engine has
    table = torch.from_numpy(inverse_table(Chain((normalize, Pad(4, 4)))))
    assert np.array_equal(unnormalize(torch.from_numpy(y[None]), table)[0][0].numpy(), normalize.inverse(y))


def test_a_raw_value_is_never_cut_off_below_its_data() -> None:
    """Published statistics mask what is named "gripper", ours what is not normalised; a gripper may go from 0 to 100."""
    raw = Normalize.from_stats(stats(max=[2.0, 100.0, 3.0, 1.0], mask=[True, False, True, True]), ["none"] * 4)
    y = np.array([[0.0, 87.0, 0.0, 0.0], [0.0, 140.0, 0.0, 0.0], [0.0, -0.5, 0.0, 0.0]], np.float32)
    assert raw.inverse(y)[:, 1].tolist() == [87.0, 100.0, -0.5]


def test_threshold_before_the_affine_map() -> None:
    modes = ["min_max"] * 3 + ["none"]
    chain = Chain((Normalize.from_stats(stats(mask=[True, True, True, False]), modes), Threshold(3), Pad(4, 6)))
    y = np.zeros((2, 6), np.float32)
    y[:, 3] = [0.49, 0.5]
    assert chain.inverse(y)[:, 3].tolist() == [0.0, 1.0]
    assert y[0, 3] == np.float32(0.49), "the input must not be written to"
