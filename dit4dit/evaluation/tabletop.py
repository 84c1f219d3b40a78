"""The built-in tabletop world as a benchmark."""

from __future__ import annotations

from dit4dit.envs.tabletop import PICTURES, TEST_SEEDS_FROM
from dit4dit.errors import ConfigError
from dit4dit.evaluation.plan import Episode, Plan
from dit4dit.evaluation.workers import Launch
from dit4dit.robots import TABLETOP


def plan(
    episodes: int = 50,
    seed: int = TEST_SEEDS_FROM,
    *,
    picture: int = 64,
    max_steps: int = 60,
    paraphrase: int | None = 0,
    launch: Launch | None = None,
) -> Plan:
    """So many layouts, from `seed` on; from `TEST_SEEDS_FROM` on no layout is ever trained on.

    The layout's seed is the policy's noise seed too. picture, max_steps, paraphrase: of `TabletopEnv`.
    """
    if episodes < 1 or seed < 0 or max_steps < 1:
        raise ConfigError(
            f"tabletop: expected episodes >= 1, seed >= 0, max_steps >= 1, got {episodes}, {seed}, {max_steps}"
        )
    if picture not in PICTURES:
        raise ConfigError(f"tabletop: picture: expected one of {PICTURES} px, got {picture}")
    options = {"picture": picture, "max_steps": max_steps, "paraphrase": paraphrase}
    return Plan(
        name="tabletop",
        embodiment=TABLETOP.name,
        launch=launch or Launch(),
        episodes=tuple(
            Episode("tabletop", "put_block_on_plate", trial, seed + trial, seed + trial, "tabletop", options)
            for trial in range(episodes)
        ),
        about={"episodes": episodes, "seed": seed, **options},
    )
