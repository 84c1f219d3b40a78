"""unnormalize: the inverse of every robot's action chain, to the bit, from a table."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from dit4dit.errors import ConfigError, InputError
from dit4dit.ops import unnormalize
from dit4dit.robots import EMBODIMENTS
from dit4dit.robots.statistics import Statistics, VectorStats
from dit4dit.robots.transforms import Chain, Normalize, Pad, SinCos, Threshold, inverse_table

EDGES = np.array([-2.0, -1.0, -0.3, 0.0, 0.4999999, 0.5, np.nextafter(np.float32(0.5), np.float32(1)), 1.0, 1.7])


def stats(size: int, empty: tuple[int, ...] = ()) -> VectorStats:
    generator = np.random.default_rng(0)
    low, high = np.sort(generator.normal(size=(2, size)), axis=0)
    high[list(empty)] = low[list(empty)]
    std = np.where(high > low, generator.uniform(0.1, 2, size), 0.0)
    mask = np.ones(size, dtype=bool)
    return VectorStats(mean=(low + high) / 2, std=std, min=low, max=high, q01=low, q99=high, mask=mask)


def values(size: int) -> np.ndarray:
    generator = np.random.default_rng(1)
    drawn = generator.normal(size=(3, 16, size))
    drawn[1, : len(EDGES)] = EDGES[:, None]
    return drawn.astype(np.float32)


@pytest.mark.parametrize("name", EMBODIMENTS)
def test_every_robot(triton_op, name):
    robot = EMBODIMENTS[name]
    chain = robot.action_chain(Statistics(robot.tag, action=stats(robot.action_dim), state=None), robot.action_dim + 3)
    check(triton_op, chain, values(robot.action_dim + 3))


@pytest.mark.parametrize("mode", ["min_max", "q99", "mean_std", "binary", "none"])
def test_every_normalization_with_dimensions_that_never_move(triton_op, mode):
    steps = (Normalize.from_stats(stats(6, empty=(1, 4)), [mode] * 6), Threshold(2, at=0.25), Pad(6, 6))
    check(triton_op, Chain(steps), values(6))


def check(triton_op, chain: Chain, y: np.ndarray) -> None:
    """In robot units, and the model's own values beside them, bit by bit."""
    wanted, table, given = chain.inverse(y), torch.from_numpy(inverse_table(chain)), torch.from_numpy(y)
    for call in (partial(unnormalize, backend="torch"), partial(triton_op, "unnormalize")):
        for places in ({}, {"copy": torch.full(y.shape, torch.nan)}):
            units, actions = call(given, table, **places)
            assert np.array_equal(units.numpy(), wanted)
            assert torch.equal(actions, given)


def test_what_is_not_a_number_stays_so_and_bounds_may_cross(triton_op):
    crossed = torch.tensor([[torch.nan, 0.5, -0.5, 2, 0.1]] * 2, dtype=torch.float64).T.contiguous()
    given = torch.linspace(-1, 1, 16).reshape(1, 8, 2)
    assert torch.equal(unnormalize(given, crossed, backend="torch")[0], triton_op("unnormalize", given, crossed)[0])
    table = torch.tensor([[torch.nan, -1, 1, 2, 0.5]] * 2, dtype=torch.float64).T.contiguous()
    y = torch.tensor([[[torch.nan, 0.0, -torch.inf]]])
    for call in (partial(unnormalize, backend="torch"), partial(triton_op, "unnormalize")):
        units, actions = call(y, table, copy=torch.zeros(1, 1, 3))
        assert units.isnan().tolist() == [[[True, False]]]
        assert actions.tolist()[0][0][1:] == [0.0, -torch.inf]
        assert actions.isnan().tolist() == [[[True, False, False]]]


def test_refuses_what_does_not_fit():
    table = torch.zeros(5, 7, dtype=torch.float64)
    with pytest.raises(InputError, match="float64 table"):
        unnormalize(torch.zeros(1, 2, 7), table.float())
    with pytest.raises(InputError, match="at most 6 dimensions, got 7"):
        unnormalize(torch.zeros(1, 2, 6), table)
    with pytest.raises(ConfigError, match="SinCos"):
        inverse_table(Chain((SinCos((3,)), Normalize.from_stats(stats(3), ["none"] * 3))))


def test_writes_where_it_is_told(triton_op):
    actions = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    table = torch.tensor([[torch.nan, -1.0, 1.0, 2.0, 0.5]] * 4, dtype=torch.float64).T.contiguous()
    (wanted, same), place = unnormalize(actions, table, backend="torch"), torch.full((2, 3, 4), torch.nan)
    assert same is actions
    copy = torch.full((2, 3, 10), 3.0)[..., ::2]
    units, copied = unnormalize(actions, table, out=place, copy=copy)
    assert (units is place, copied is copy) == (True, True)
    assert torch.equal(place, wanted)
    assert torch.equal(copy, actions)
    for copies in (None, torch.full((2, 3, 5), torch.nan)):
        units, copied = triton_op("unnormalize", actions, table, out=torch.full((2, 3, 4), torch.nan), copy=copies)
        assert torch.equal(units, wanted)
        assert torch.equal(copied, actions)
    with pytest.raises(InputError, match="unnormalize: out: expected float32"):
        unnormalize(actions, table, out=place[:, :2])
    with pytest.raises(InputError, match=r"unnormalize: copy: expected float32 \[2, 3, 5\] on cpu"):
        unnormalize(actions, table, copy=place)
