"""patch_tokens: every implementation against the reference, on latents as they lie and on rows of patches."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dit4dit.benchmarks.harness import assert_no_worse

from dit4dit import ops
from dit4dit.errors import BackendError, InputError
from dit4dit.model.video_dit import patches
from dit4dit.ops import patch_tokens
from dit4dit.ops.patch_tokens import reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def make(size, width: int, patch: int, dtype: torch.dtype, *, given: str = "noise", expanded: bool = True):
    """size: batch, channels, frames, rows, columns of the latents."""
    batch, channels, frames, rows, columns = size
    generator = torch.Generator().manual_seed(width)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    latents = normal(batch, channels, frames + 1, rows, columns)
    tokens, inner = rows // patch * (columns // patch), channels * patch**2
    view = patches(latents[:, :, 1:], patch)
    if given == "rows":
        view = normal(*view.shape).to(dtype)
    begin = normal(frames, 1 if expanded else tokens, width).expand(batch, frames, tokens, width)
    weight = (2 * normal(width, inner) / inner**0.5).to(dtype)
    return view, weight, begin, normal(frames, width), normal(frames, width), 1e-6


SIZES = [((1, 16, 2, 6, 4), 64, 2), ((2, 3, 3, 6, 9), 130, 3), ((3, 5, 1, 5, 7), 33, 1), ((1, 16, 1, 2, 2), 300, 2)]


@pytest.mark.parametrize("given, expanded", [("noise", True), ("rows", True), ("noise", False)])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("size, width, patch", SIZES)
def test_triton(triton_op, size, width, patch, dtype, given, expanded) -> None:
    args = make(size, width, patch, dtype, given=given, expanded=expanded)
    for n in range(2):

        def one(run, n=n):
            return lambda *args: run(*args)[n]

        assert_no_worse(one(partial(triton_op, "patch_tokens")), one(reference), args, float32_limit=2e-5)


def test_a_wide_row_whose_mean_is_far_from_zero(triton_op) -> None:
    """Parts of a row are added up: the mean must not drown the variance."""
    view, weight, begin, shift, scale, eps = make((1, 16, 2, 4, 4), 2048, 2, F32)
    begin = begin + 1e3
    args = (view, weight, begin, shift, scale, eps)
    exact = reference(*(t.double() if torch.is_tensor(t) else t for t in args))[1]
    got, plain = triton_op("patch_tokens", *args)[1], reference(*args)[1]
    assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-5


@pytest.mark.parametrize("backend", ["parts", "torch", "triton"])
def test_writes_where_it_is_told(triton_op, backend) -> None:
    args = make((1, 4, 2, 4, 6), 48, 2, F32)
    want = reference(*args)
    place = torch.full(args[2].shape, torch.nan)
    if backend == "triton":
        x, h = triton_op("patch_tokens", *args, out=place)
    else:
        x, h = patch_tokens(*args, out=place, backend=backend)
        assert x is place
    torch.testing.assert_close(x, want[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(h, want[1], rtol=1e-5, atol=1e-5)
    buffer = torch.full((1, 5, 6, 48), torch.nan)  # what is no multiple of anything in front
    x, _ = patch_tokens(*args, out=buffer[:, 2:4])
    torch.testing.assert_close(buffer[:, 2:4], want[0], rtol=1e-6, atol=1e-6)
    assert buffer.isnan().sum() == 3 * 6 * 48


def test_nan_stays_in_its_row(triton_op) -> None:
    view, *rest = make((1, 4, 2, 4, 6), 48, 2, BF16, given="rows")
    view[0, 1, 1, 2, 3, 0, 1] = torch.nan  # frame 1, token 5
    for call in (partial(patch_tokens, backend="torch"), partial(triton_op, "patch_tokens")):
        for result in call(view, *rest):
            assert result.isnan().any(dim=3).nonzero().tolist() == [[0, 1, 5]]
            assert result[0, 1, 5].isnan().all()


def test_parts_are_the_ops() -> None:
    args = make((1, 4, 2, 4, 6), 48, 2, F32)
    with ops.listing() as calls:
        patch_tokens(*args, backend="parts")
    assert [op for op, _ in calls] == ["patch_tokens", "linear", "adaln"]


def test_refuses_what_does_not_fit() -> None:
    view, weight, begin, shift, scale, eps = make((1, 4, 2, 4, 6), 48, 2, F32)
    with pytest.raises(InputError, match=r"weight: expected \[D, K\] = \[48, 16\], got \[48, 15\]"):
        patch_tokens(view, weight[:, 1:], begin, shift, scale, eps)
    with pytest.raises(InputError, match=r"begin: expected \[B, T, N, D\] = \[1, 2, 6, 48\], got \[1, 2, 5, 48\]"):
        patch_tokens(view, weight, begin[:, :, 1:], shift, scale, eps)
    with pytest.raises(InputError, match=r"shift: expected torch\.float32, got torch\.bfloat16"):
        patch_tokens(view, weight, begin, shift.bfloat16(), scale, eps)
    with pytest.raises(InputError, match="out: expected a tensor like begin"):
        patch_tokens(view, weight, begin, shift, scale, eps, out=begin[:, :1])
    with pytest.raises(BackendError, match="'triton' refused: patches of 132 numbers, it takes at most 128"):
        patch_tokens(*make((1, 33, 2, 4, 6), 48, 2, F32), backend="triton")
