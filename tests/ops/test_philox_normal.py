"""philox_normal: the numbers of dit4dit.noise, on a device."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from dit4dit.errors import InputError
from dit4dit.noise import normal
from dit4dit.ops import philox_normal

REQUESTS = [(0, 0), (7, 3), (2**63 + 12345, 2**40 + 1), (2**64 - 1, 2**64 - 1)]


def tensor(requests) -> torch.Tensor:
    """Seeds and chunks as a request of each, with nothing given."""
    return torch.from_numpy(np.array([(*one, 0) for one in requests], dtype=np.uint64).view(np.int64))


def expected(requests, stream: int, shape) -> torch.Tensor:
    return torch.from_numpy(np.stack([normal(shape, *request, stream) for request in requests]))


def assert_same_numbers(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal but for the last bit of a few, which two libraries' float64 logarithms may round apart."""
    assert got.dtype == torch.float32
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, rtol=2**-22, atol=1e-12)
    assert (got == wanted).double().mean() > 0.999


SHAPES = [(1,), (3, 7), (16, 2, 4, 8), (5, 103), (40, 29)]


def alone(call, requests, stream, shape, **kinds) -> torch.Tensor:
    (drawn,) = call(requests, ((stream, shape),), **kinds)
    return drawn


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stream", [0, 1, 2, 2**31 - 1])
def test_reference_and_kernel_give_the_hosts_numbers(triton_op, shape, stream):
    wanted = expected(REQUESTS, stream, shape)
    for call in (partial(philox_normal, backend="torch"), partial(triton_op, "philox_normal")):
        assert_same_numbers(alone(call, tensor(REQUESTS), stream, shape), wanted)


@pytest.mark.parametrize("streams", [(2, 0), (0, 1, 2), (2**31 - 1, 1, 0)])
@pytest.mark.parametrize("shapes", [SHAPES[:3], SHAPES[2:], SHAPES[2::-1]])
def test_a_draw_has_the_bits_that_it_has_alone(triton_op, streams, shapes):
    """Whatever is drawn beside it, and into what memory."""
    requests, draws = tensor(REQUESTS), tuple(zip(streams, shapes[: len(streams)], strict=True))
    for call in (partial(philox_normal, backend="torch"), partial(triton_op, "philox_normal")):
        apart = [alone(call, requests, *draw) for draw in draws]
        for places in (None, tuple(torch.full_like(x, torch.nan) if i else None for i, x in enumerate(apart))):
            for got, wanted in zip(call(requests, draws, out=places), apart, strict=True):
                assert torch.equal(got, wanted)


def test_a_sample_does_not_depend_on_its_batch():
    each = [alone(philox_normal, tensor([request]), 1, (4, 9)) for request in REQUESTS]
    assert torch.equal(torch.cat(each), alone(philox_normal, tensor(REQUESTS), 1, (4, 9)))
    assert len({float(x.sum()) for x in each}) == len(REQUESTS)


@pytest.mark.parametrize("given", [(0, 1, 0, 2**62), (1, 1, 1, 1)])
def test_what_is_given_stays(triton_op, given):
    """And what is drawn beside it has the bits of a draw alone."""
    requests, draws = tensor(REQUESTS), ((1, (3, 7)), (0, (5, 103)))
    brought = tuple(torch.randn(len(given), *shape, generator=torch.Generator().manual_seed(0)) for _, shape in draws)
    brought[0][1, 0, 0] = torch.nan
    for name in ("torch", "triton"):
        call = partial(philox_normal, backend="torch") if name == "torch" else partial(triton_op, "philox_normal")
        drawn = call(requests, draws)
        marked = requests.clone()
        marked[:, 2] = torch.tensor(given)
        for places in (tuple(place.clone() for place in brought), None):
            got = call(marked, draws, out=places)
            assert places is None or name != "torch" or all(a is b for a, b in zip(got, places, strict=True))
            for n, of in enumerate(got):
                for i, is_given in enumerate(given):
                    kept = torch.zeros_like(of[i]) if places is None else brought[n][i]
                    wanted = kept if is_given else drawn[n][i]
                    assert torch.equal(of[i].nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0)), (name, n, i)


@pytest.mark.parametrize("out", [torch.zeros(4, 3, 8), torch.zeros(4, 3, 14)[..., ::2], torch.zeros(4, 3, 7).double()])
def test_refuses_another_place(out):
    with pytest.raises(InputError, match="philox_normal: out: expected"):
        philox_normal(tensor(REQUESTS), ((0, (2,)), (1, (3, 7))), out=(None, out))


def test_refuses_what_does_not_fit():
    with pytest.raises(InputError, match="requests: expected int64"):
        philox_normal(torch.zeros(1, 3), ((0, (3,)),))
    with pytest.raises(InputError, match=r"requests: expected \[B, 3\]"):
        philox_normal(torch.zeros(1, 2, dtype=torch.int64), ((0, (3,)),))
    with pytest.raises(InputError, match="stream"):
        philox_normal(tensor(REQUESTS), ((-1, (3,)),))
    with pytest.raises(InputError, match="at least one element"):
        philox_normal(tensor(REQUESTS), ((0, (3,)), (1, (0, 3))))
    for draws in ((), ((0, (3,)),) * 4):
        with pytest.raises(InputError, match=f"draws: expected 1 to 3, and as many places, got {len(draws)}"):
            philox_normal(tensor(REQUESTS), draws)
    with pytest.raises(InputError, match="got 1 and 2 places"):
        philox_normal(tensor(REQUESTS), ((0, (3,)),), out=(None, None))
