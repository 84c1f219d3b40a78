"""Which episodes are to be run, in which simulator, and with which seeds: the whole of a run but for the policy."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dit4dit.errors import ConfigError, shown
from dit4dit.evaluation.workers import Launch

Key = tuple[str, str, int]


@dataclass(frozen=True)
class Episode:
    """One episode.

    Attributes:
        suite, task, trial: what it is called; together they name it within its run.
        seed: of the simulator. noise_seed: of the policy's noise; chunk i takes `Noise.from_seed(noise_seed, i)`.
        environment, options: what the worker makes, `sim_worker.make(environment, options)`.
    """

    suite: str
    task: str
    trial: int
    seed: int
    noise_seed: int
    environment: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return self.suite, self.task, self.trial

    @property
    def world(self) -> str:
        """The environment and its options as text: equal for episodes that one environment can play."""
        return json.dumps([self.environment, dict(self.options)], sort_keys=True)


@dataclass(frozen=True)
class Plan:
    """All episodes of a run.

    Attributes:
        name: of the benchmark: "tabletop", "libero", ...
        embodiment: name of the robot that the policy must be for.
        launch: how a worker is started.
        episodes: in the order in which they are begun, as far as workers are free.
        about: what the plan was made from, for run.json; a run that goes on must be told the same.
        shard: (i, n), the part of the plan that `episodes` is, 1 <= i <= n.
    """

    name: str
    embodiment: str
    launch: Launch
    episodes: tuple[Episode, ...]
    about: Mapping[str, Any]
    shard: tuple[int, int] = (1, 1)

    def part(self, shard: str | None) -> Plan:
        """The episodes of shard "i/n": every n-th from the i-th on, so that all shards have the same mix of tasks."""
        if shard is None:
            return self
        found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", shard)
        if not found or int(found[1]) > int(found[2]):
            raise ConfigError(f"--shard {shown(shard)}: expected i/n with 1 <= i <= n, such as 1/4")
        i, n = int(found[1]), int(found[2])
        return replace(self, episodes=self.episodes[i - 1 :: n], shard=(i, n))


def derived_seed(seed: int, *names: object) -> int:
    """A seed in 0..2^63-1 that is a function of the arguments alone, for plans whose episodes share a simulator seed."""
    text = " ".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
