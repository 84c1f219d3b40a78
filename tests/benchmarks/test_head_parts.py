"""Parts of the one-launch head's time by leaving work out: they add up, and find what a time was made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import pytest
from dit4dit.benchmarks import head_parts
from dit4dit.benchmarks.budget_head import RATES
from dit4dit.benchmarks.head_parts import FEW_KEYS, FEW_TOKENS, NARROW, Variant

from dit4dit.config import HeadConfig
from dit4dit.engine.action_ode import Device, Schedule, head_shape, plan
from dit4dit.engine.action_ode.cost import Costs, head_us
from dit4dit.errors import ConfigError

GR1 = HeadConfig.dit_b(action_horizon=16)
H200 = Device(sms=132, shared_memory=227 << 10, capability=90, clusters=(66, 30, 15))


def planned(variant: Variant, ranks: int | None = 8, fused: bool | None = None) -> Schedule:
    prefix = variant.config.state_dim is not None
    shape = head_shape(variant.config, batch=1, context=variant.context, prefix=prefix, steps=variant.steps)
    return plan(shape, H200, ranks=ranks, fused=fused)


def made_of(variant: Variant) -> dict[str, float]:
    """A time with known parts, for its sum."""
    config, steps = variant.config, variant.steps
    crossing = -(-config.num_layers // 2)
    own = config.num_layers - crossing
    return {
        "start": 5.0,
        "stages": steps * (3.0 + 7.0 * crossing + 6.0 * own),
        "width": steps * (config.width - NARROW) * (0.1 + 0.02 * crossing + 0.03 * own),
        "tokens": steps * (config.tokens - FEW_TOKENS) * (0.5 + 0.125 * own),
        "keys": steps * (variant.context - FEW_KEYS) * 0.0625 * crossing,
    }


def measured(
    config: HeadConfig, context: int = 588, steps: int = 4, lost: tuple[str, ...] = ()
) -> tuple[dict[str, Any], list[str]]:
    launched = []

    def time(name: str, variant: Variant) -> Mapping[str, Any]:
        launched.append(name)
        return {"left_out": "no time"} if name in lost else {"ms": {"p50": sum(made_of(variant).values()) / 1e3}}

    found = head_parts.measure(
        config, context, steps, plan=planned, predict=lambda schedule: head_us(schedule)["total"], time=time
    )
    return found, launched


@pytest.mark.parametrize("layers", [16, 15, 3])
def test_parts_of_a_known_time_are_found(layers: int) -> None:
    config = replace(GR1, num_layers=layers)
    found, launched = measured(config)
    assert launched == list(head_parts.variants(config, 588, 4))
    request = Variant(config, 588, 4)
    parts = made_of(request)
    assert found["measured"]["by_work"] == pytest.approx(parts)
    place = found["measured"]["by_place"]
    one, two, three = (sum(made_of(replace(request, config=replace(config, num_layers=n))).values()) for n in (1, 2, 3))
    assert place["a block on tokens"] == pytest.approx(two - one)
    assert place["a block on features"] == pytest.approx(three - two)
    assert place["ends"] == pytest.approx(one - (three - two))


@pytest.mark.parametrize("context", [588, 7])
def test_predicted_parts_add_up_to_the_prediction(context: int) -> None:
    found, _ = measured(GR1, context)
    request = head_us(planned(Variant(GR1, context, 4)))["total"]
    predicted = found["predicted"]
    assert found["variants"]["request"]["predicted_us"] == request
    assert sum(predicted["by_work"].values()) == pytest.approx(request)
    place = predicted["by_place"]
    assert place["ends"] + 8 * place["a block on features"] + 8 * place["a block on tokens"] == pytest.approx(request)
    assert min(part for name, part in predicted["by_work"].items() if name != "keys") > 0
    assert predicted["by_work"]["start"] == pytest.approx(3.0, abs=0.5), "a narrow head's time is straight in its steps"
    assert (predicted["by_work"]["keys"] > 0) == (context > FEW_KEYS)


@pytest.mark.parametrize(("fused", "stages"), [(True, 4), (False, 5)])
def test_a_block_takes_its_stages(fused: bool, stages: int) -> None:
    """Where nothing but the words' way costs anything, all that is left of a block is how often they go."""
    only_hops = Costs(
        **{field.name: math.inf if field.name in RATES else 0.0 for field in fields(Costs)} | {"hop": 1.0}
    )
    rows = head_parts.measure(
        GR1,
        588,
        4,
        plan=lambda variant: planned(variant, fused=fused),
        predict=lambda schedule: head_us(schedule, only_hops)["total"],
        time=lambda *_: {"left_out": "no time"},
    )
    place = rows["predicted"]["by_place"]
    assert place == pytest.approx({"ends": 4 * 4, "a block on features": 4 * 5, "a block on tokens": 4 * stages})
    assert rows["predicted"]["by_work"]["stages"] == pytest.approx(4 * (4 + 8 * 5 + 8 * stages))


def test_what_was_not_timed_takes_its_parts_along_and_no_other() -> None:
    found, _ = measured(GR1, lost=("narrow",))
    assert found["measured"]["by_work"] == {}
    assert set(found["measured"]["by_place"]) == {"ends", "a block on features", "a block on tokens"}
    assert found["variants"]["narrow"]["us"] is None
    shown = [" ".join(line.split()) for line in head_parts.show(found).splitlines()]
    assert "narrow: no time" in shown
    assert f"start - {found['predicted']['by_work']['start']:,.1f}" in shown
    place = found["measured"]["by_place"]["ends"], found["predicted"]["by_place"]["ends"]
    assert f"ends {place[0]:,.1f} {place[1]:,.1f}" in shown
    assert measured(GR1, lost=("one block less",))[0]["measured"]["by_place"] == {}


def test_one_step_or_two_blocks_leave_parts_out() -> None:
    assert measured(GR1, steps=1)[0]["measured"]["by_work"] == {}
    found, launched = measured(replace(GR1, num_layers=2))
    assert found["measured"]["by_place"] == found["predicted"]["by_place"] == {}
    assert "one block less" not in launched
    assert measured(replace(GR1, interleave_self_attention=False))[0]["measured"]["by_place"] == {}


@pytest.mark.parametrize(
    "config", [GR1, HeadConfig.dit_l(action_horizon=50), replace(GR1, state_dim=None, action_horizon=4)]
)
def test_every_variant_can_be_planned_with_the_ranks_of_the_request(config: HeadConfig) -> None:
    for steps in (1, 4):
        every = head_parts.variants(config, 588, steps)
        ranks = planned(every["request"], None).ranks
        for name, variant in every.items():
            schedule = planned(variant, ranks)
            assert schedule.ranks == ranks, name
            assert schedule.shape.tokens <= config.tokens
            assert variant.config.tokens == min(config.tokens, FEW_TOKENS) or variant.config.tokens == config.tokens


def test_another_cut_is_said() -> None:
    def otherwise(variant: Variant) -> Schedule:
        return planned(variant, 4 if variant.context == FEW_KEYS and variant.config.width > NARROW else 8)

    def time(name: str, variant: Variant) -> Mapping[str, Any]:
        return {"ms": {"p50": 1.0}}

    found = head_parts.measure(GR1, 588, 4, plan=otherwise, predict=lambda _: 1.0, time=time)["variants"]
    same = {name: row["same_cut"] for name, row in found.items()}
    assert (same["few keys"], same["few tokens"]) == (False, False)
    assert same["request"]
    assert (same["one block less"], same["two blocks less"]) == (True, True)
    request = Variant(GR1, 588, 4)
    assert head_parts.cut(planned(request, fused=False)) != head_parts.cut(planned(request))
    shares = [head_parts.cut(planned(replace(request, context=context))) for context in (588, FEW_KEYS)]
    assert shares[0] - shares[1] == {("features", 8)}
    with pytest.raises(ConfigError):
        head_parts.measure(GR1, 588, 4, plan=lambda v: planned(v, 16), predict=lambda _: 1.0, time=time)
