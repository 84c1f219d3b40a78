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


@pytest.mark.parametrize("shape", [(1,), (3, 7), (16, 2, 4, 8), (5, 103)])
@pytest.mark.parametrize("stream", [0, 2])
def test_reference_and_kernel_give_the_hosts_numbers(triton_op, shape, stream):
    wanted = expected(REQUESTS, stream, shape)
    assert_same_numbers(philox_normal(tensor(REQUESTS), stream, shape, backend="torch"), wanted)
    assert_same_numbers(triton_op("philox_normal", tensor(REQUESTS), stream, shape), wanted)


def test_a_sample_does_not_depend_on_its_batch():
    alone = [philox_normal(tensor([request]), 1, (4, 9)) for request in REQUESTS]
    assert torch.equal(torch.cat(alone), philox_normal(tensor(REQUESTS), 1, (4, 9)))
    assert len({float(x.sum()) for x in alone}) == len(REQUESTS)


@pytest.mark.parametrize("given", [(0, 1, 0, 2**62), (1, 1, 1, 1)])
def test_what_is_given_stays(triton_op, given):
    """And what is drawn beside it has the bits of a draw alone."""
    requests, shape = tensor(REQUESTS), (3, 7)
    fresh = {
        "torch": philox_normal(requests, 1, shape, backend="torch"),
        "triton": triton_op("philox_normal", requests, 1, shape),
    }
    requests[:, 2] = torch.tensor(given)
    brought = torch.randn(len(given), *shape, generator=torch.Generator().manual_seed(0))
    brought[1, 0, 0] = torch.nan
    for name, drawn in fresh.items():
        for place in (brought.clone(), None):
            kinds = {} if place is None else {"out": place}
            call = partial(philox_normal, backend="torch") if name == "torch" else partial(triton_op, "philox_normal")
            got = call(requests, 1, shape, **kinds)
            assert place is None or name != "torch" or got is place
            for i, is_given in enumerate(given):
                wanted = drawn[i] if not is_given else torch.zeros(shape) if place is None else brought[i]
                assert torch.equal(got[i].nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0)), (name, i)


@pytest.mark.parametrize("out", [torch.zeros(4, 3, 8), torch.zeros(4, 3, 14)[..., ::2], torch.zeros(4, 3, 7).double()])
def test_refuses_another_place(out):
    with pytest.raises(InputError, match="philox_normal: out: expected"):
        philox_normal(tensor(REQUESTS), 1, (3, 7), out=out)


def test_refuses_what_does_not_fit():
    with pytest.raises(InputError, match="requests: expected int64"):
        philox_normal(torch.zeros(1, 3), 0, (3,))
    with pytest.raises(InputError, match=r"requests: expected \[B, 3\]"):
        philox_normal(torch.zeros(1, 2, dtype=torch.int64), 0, (3,))
    with pytest.raises(InputError, match="stream"):
        philox_normal(tensor(REQUESTS), -1, (3,))
    with pytest.raises(InputError, match="at least one element"):
        philox_normal(tensor(REQUESTS), 0, (0, 3))
