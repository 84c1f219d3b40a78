"""The twin of the one-launch head: the order of teams, words and sets of words."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from head_case import SMALL, Case, tiles_of, tiny
from head_faults import changed, without
from head_ways import all_ways
from torch import Tensor

from dit4dit.engine.action_ode import Schedule, plan
from dit4dit.engine.action_ode.schedule import EMPTY, SETS, Product
from dit4dit.engine.action_ode.words import Area, Words


@pytest.mark.parametrize("way", [0, 1, 2], ids=["blocks", "shared", "fused"])
def test_the_order_of_the_teams_does_not_matter(way: int) -> None:
    case = Case(tiny(), batch=2, context=150)
    schedule = all_ways(case)[way]
    runs = [case.twin(schedule).run(torch.Generator().manual_seed(seed)) for seed in range(4)]
    runs.append(case.twin(schedule).run())
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("way", [0, 1, 2], ids=["blocks", "shared", "fused"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_launches_follow_each_other(steps: int, way: int) -> None:
    """Each begins in the set where the one before ended; what it leaves are the words of its last step, the noisy ones EMPTY."""
    case = Case(tiny(), steps=steps)
    schedule = all_ways(case)[way]
    want, words = case.twin(schedule).run(), None
    for launch in range(1, 5):
        twin = case.twin(schedule, words=words)
        assert torch.equal(twin.run(torch.Generator().manual_seed(launch)), want)
        words = twin.words
        last = launch * steps - 1
        assert words.done == last + 1
        found = [words.step[(last + ahead) % SETS] for ahead in range(SETS)]
        used = sum(buffer.words for name, buffer in schedule.buffers.items() if name != "noisy")
        assert ((found[0] == last).sum(), (found[1] != EMPTY).sum(), (found[2] != EMPTY).sum()) == (used, 0, 0)
        assert not twin.buffer("tokens", steps - 1).isnan().any()
        assert twin.buffer("noisy", steps - 1).isnan().all()


def test_the_twin_stops_after_any_tile() -> None:
    case = Case(tiny(), steps=1)
    schedule = plan(case.shape, SMALL)
    whole = case.twin(schedule)
    assert not whole.run().isnan().any()
    assert whole.tiles_run == len(schedule.tiles)
    for count in (0, 1, 5, 40, len(schedule.tiles) - 1):
        part = case.twin(schedule)
        assert part.run(stop_after=count).isnan().all()
        assert part.tiles_run == count
    early = case.twin(schedule)
    early.run(stop_after=40)
    assert not early.buffer("tokens", 0).isnan().any()
    assert early.buffer("decoded", 0).isnan().all()
    assert not early.private.isnan().all()


def test_a_tile_that_is_missing_is_waited_for() -> None:
    case = Case(tiny())
    schedule = plan(case.shape, SMALL)
    lost = tiles_of(schedule, "1.mlp_in")[0]
    with pytest.raises(RuntimeError, match="wait for each other"):
        case.twin(without(schedule, lost)).run()


def test_tiles_in_a_wrong_order_wait_for_each_other() -> None:
    case = Case(tiny())
    schedule = plan(case.shape, SMALL)
    begin, end = schedule.first_tile[:2]
    tiles = schedule.tiles.copy()
    tiles[begin:end] = tiles[begin:end][::-1]
    with pytest.raises(RuntimeError, match="wait for each other"):
        case.twin(replace(schedule, tiles=tiles)).run(torch.Generator().manual_seed(0))


def test_a_word_that_is_written_twice_is_an_error() -> None:
    case = Case(tiny())
    schedule = plan(case.shape, SMALL)
    one, other = tiles_of(schedule, "0.mlp_in")[:2]
    broken = changed(schedule, one, out=schedule.decoded[other].work.out)
    with pytest.raises(RuntimeError, match="overwrites a word of step 0 in step 0"):
        case.twin(broken).run()


@pytest.mark.parametrize(
    "own,message",
    [
        (True, "clears a word of step 0 for step 0"),
        (False, "expected words of step 3, got one of step 0|overwrites a word of step 0 in step 3"),
    ],
)
@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("way", [0, 1, 2], ids=["blocks", "shared", "fused"])
def test_a_wrong_set_is_an_error(
    way: int, own: bool, message: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words are made EMPTY in the step's own set, or not at all: seen in one launch, or in the next."""
    clear = Words.clear

    def wrong(self: Words, area: Area, step: int) -> None:
        if own:
            clear(self, area, step - (SETS - 1))

    monkeypatch.setattr(Words, "clear", wrong)
    case = Case(tiny(), steps=steps)
    schedule = all_ways(case)[way]
    first = case.twin(schedule)
    again = case.twin(schedule, words=first.words)

    def run() -> None:
        first.run()
        again.run()

    with pytest.raises(RuntimeError, match=message):
        run()


def of_part(schedule: Schedule, part: int) -> list[int]:
    """Products that make queries, keys or values of the tokens of block 1, and nothing else."""
    width = schedule.shape.width
    found = [(i, schedule.decoded[i].work) for i in tiles_of(schedule, "1.project")]
    return [i for i, w in found if part * width <= w.row < w.row + w.rows <= (part + 1) * width]


@pytest.mark.parametrize("way", [1, 2], ids=["shared", "fused"])
@pytest.mark.parametrize("part", [0, 1, 2], ids=["queries", "keys", "values"])
def test_attention_waits_for_queries_keys_and_values(part: int, way: int) -> None:
    """One tile is missing: its heads are not attended to, and no product that needs them comes."""
    case = Case(tiny())
    schedule = all_ways(case, ranks=2)[way]
    lost = of_part(schedule, part)[0]
    twin = case.twin(without(schedule, lost))
    with pytest.raises(RuntimeError, match="teams wait for each other"):
        twin.run()
    assert twin.buffer("1.out", 0).isnan().all()
    work = schedule.decoded[lost].work
    assert isinstance(work, Product)
    if not schedule.fused:
        first = work.row - part * schedule.shape.width
        lost_columns = torch.zeros(schedule.shape.width, dtype=torch.bool)
        lost_columns[first : first + work.rows] = True
        assert torch.equal(twin.buffer("1.attended", 0).isnan().any(0), lost_columns)


@pytest.mark.parametrize("way", [1, 2], ids=["shared", "fused"])
@pytest.mark.parametrize("part", [0, 1, 2], ids=["queries", "keys", "values"])
def test_attention_to_words_of_another_step_is_an_error(part: int, way: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tiny())
    schedule = all_ways(case, ranks=2)[way]
    outs, write = {schedule.decoded[i].work.out for i in of_part(schedule, part)}, Words.write
    assert outs

    def late(self: Words, area: Area, step: int, values: Tensor) -> None:
        write(self, area, step, values)
        if area.first in outs:
            self._of(self.step[step % SETS], area).fill_(step - SETS)

    monkeypatch.setattr(Words, "write", late)
    with pytest.raises(RuntimeError, match="expected words of step 0, got one of step -3"):
        case.twin(schedule).run()
