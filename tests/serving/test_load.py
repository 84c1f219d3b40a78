"""Sixty-four clients, a tenth of them hostile: what the others lose by it."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest
from serving_load import BAD, Harm, Role
from waiting import WAIT

from dit4dit.serving.settings import Settings

KEY = "a-key-of-more-than-16-letters"
HOSTILE_CLIENTS = 6
HALF_S = 30.0
"""Without the hostile ones, and with them."""


@pytest.mark.long
@pytest.mark.serial
def test_the_well_behaved_lose_nothing_by_the_hostile(tmp_path, capsys) -> None:
    """With the limits that are the defaults. Also 1000 sockets that never finish a handshake."""
    settings = Settings()
    kinds = Harm({})._kinds()
    assert len(kinds) >= 25
    assert {*BAD} < {*kinds}
    to = {"key": KEY}
    with Role("serve", {"seconds": 0.02, "settings": {"api_key": KEY}}, tmp_path / "serve") as server:
        to["port"] = server.port
        good = {**to, "clients": settings.max_clients - HOSTILE_CLIENTS}
        with Role("work", good, tmp_path / "work") as working:
            begin = time.monotonic()
            time.sleep(HALF_S)
            middle = time.monotonic()
            with (
                Role("harm", {**to, "clients": HOSTILE_CLIENTS}, tmp_path / "harm") as harming,
                Role("knock", to, tmp_path / "knock") as knocking,
            ):
                again = time.monotonic()
                time.sleep(HALF_S)
                end = time.monotonic()
                assert working.process.poll() is None, (tmp_path / "work").read_text()
                found = np.array(working.end(WAIT))  # each is a request that got its own answer
                done, knocks = harming.end(WAIT), knocking.end(WAIT)
        assert server.process.poll() is None
    assert working.process.returncode == 0, (tmp_path / "work").read_text()
    assert {*done} == {*kinds}, sorted({*kinds} - {*done})
    assert knocks > 1000
    without = found[(begin < found[:, 0]) & (found[:, 0] < middle), 1]
    beside = found[(again < found[:, 0]) & (found[:, 0] < end), 1]
    p99 = [float(np.percentile(half, 99)) for half in (without, beside)]
    p50 = [float(np.median(half)) for half in (without, beside)]
    report = (
        f"p99 {1e3 * p99[0]:.0f} -> {1e3 * p99[1]:.0f} ms, p50 {1e3 * p50[0]:.0f} -> {1e3 * p50[1]:.0f} ms, {len(without)} -> "
        f"{len(beside)} requests; {sum(done.values())} times one of {len(done)} kinds of harm, {knocks} knocks"
    )
    with capsys.disabled():
        sys.stdout.write(f"\n{report}\n")
    assert min(len(without), len(beside)) > 10 * good["clients"]
    assert p99[1] <= 3 * p99[0], report
