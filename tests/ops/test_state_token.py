"""state_token: the model's state encoder, in one launch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dit4dit.benchmarks.harness import assert_no_worse

from dit4dit.checkpoints.weights import random_model
from dit4dit.errors import InputError
from dit4dit.ops import state_token
from dit4dit.ops.state_token import reference
from dit4dit.presets import preset

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def make(batch: int, size: int, hidden: int, width: int, dtype: torch.dtype, state: torch.dtype = F32):
    generator = torch.Generator().manual_seed(size * hidden)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    x = normal(batch, size).to(state)
    first, second = normal(hidden, size, scale=size**-0.5), normal(width, hidden, scale=hidden**-0.5)
    return x, *(t.to(dtype) for t in (first, normal(hidden), second, normal(width)))


@pytest.mark.parametrize("dtype, out", [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16)])
@pytest.mark.parametrize("sizes", [(1, 64, 2560, 768), (3, 16, 257, 130), (2, 3, 5, 1), (16, 37, 128, 48)])
def test_triton(triton_op, sizes, dtype, out) -> None:
    args = (*make(*sizes, dtype), out)
    assert_no_worse(partial(triton_op, "state_token"), reference, args, float32_limit=2e-6)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_it_is_the_models(triton_op, dtype: torch.dtype) -> None:
    model = random_model(preset("tiny").model, 0, with_text=False, dtype=dtype)
    encoder = model.head.state_encoder
    state = torch.randn(2, 1, encoder.layer1.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = encoder(state.to(dtype))[:, 0]
    layers = (encoder.layer1.weight, encoder.layer1.bias, encoder.layer2.weight, encoder.layer2.bias)
    args = (state[:, 0], *(t.detach() for t in layers), F32)
    assert torch.equal(state_token(*args, backend="torch"), want.float())
    got = triton_op("state_token", *args)
    assert torch.equal(got, got.to(dtype).float()), "a token of the head's dtype"
    torch.testing.assert_close(
        got, want.float(), rtol=2e-2 if dtype == BF16 else 1e-5, atol=1e-2 if dtype == BF16 else 1e-6
    )


@pytest.mark.parametrize("place", ["state", "bias"])
def test_nan_is_not_hidden(triton_op, place: str) -> None:
    """By the ReLU: what spoils a chunk is to be seen in its actions."""
    args = make(2, 8, 40, 20, F32)
    if place == "state":
        args[0][1, 3] = torch.nan
    else:
        args[2][39] = torch.nan
    for call in (partial(state_token, backend="torch"), partial(triton_op, "state_token")):
        spoiled = call(*args, F32).isnan()
        assert spoiled.all(dim=1).tolist() == [place == "bias", True]
        assert spoiled.any(dim=1).tolist() == [place == "bias", True]


def test_a_row_does_not_depend_on_its_batch(triton_op) -> None:
    x, *rest = make(3, 16, 70, 50, BF16)
    whole = triton_op("state_token", x, *rest, BF16)
    assert torch.equal(whole, torch.cat([triton_op("state_token", x[i : i + 1], *rest, BF16) for i in range(3)]))


def test_refuses_what_does_not_fit() -> None:
    x, first, bias1, second, bias2 = make(2, 8, 40, 20, F32)
    with pytest.raises(InputError, match=r"weight1: expected \[H, S\] = \[40, 8\], got \[40, 7\]"):
        state_token(x, first[:, 1:], bias1, second, bias2, F32)
    with pytest.raises(InputError, match=r"bias2: expected \[W\] = \[20\], got \[19\]"):
        state_token(x, first, bias1, second, bias2[1:], F32)
    with pytest.raises(InputError, match=r"weight2: expected torch\.float32 as weight1, got torch\.bfloat16"):
        state_token(x, first, bias1, second.bfloat16(), bias2, F32)
