"""The order of samples: a function of the seed alone, whatever the workers, ranks and interruptions."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dit4dit.data.catalogue import Entry, catalogue
from dit4dit.data.loader import Loader
from dit4dit.data.mixture import Mixture
from dit4dit.data.sampler import Draws, Sampler
from dit4dit.data.samples import Window
from dit4dit.errors import ConfigError
from dit4dit.presets import preset

WINDOW = Window.for_model(preset("tiny").model)


def draws(seed: int = 0, weights=(1.0, 3.0), lengths=((10, 30), (5,)), **options) -> Draws:
    episodes = [range(100, 100 + len(each)) for each in lengths]
    return Draws(episodes, lengths, weights, seed, **options)


def take(sampler: Sampler, count: int) -> list[list[int]]:
    return [batch for _, batch in zip(range(count), sampler, strict=False)]


def test_weights_are_of_data_sets_and_frames_are_uniform_within() -> None:
    """A data set's weight is not multiplied by its length; 20 000 draws, five standard deviations."""
    made = draws()
    drawn = [made.draw(i) for i in range(20_000)]
    second = [d for d in drawn if d.dataset == 1]
    assert abs(len(second) / 20_000 - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 20_000)
    first = np.array([d.frame + 10 * (d.episode - 100) for d in drawn if d.dataset == 0])
    counts = np.bincount(first, minlength=40)
    assert len(counts) == 40
    assert np.abs(counts - len(first) / 40).max() < 5 * np.sqrt(len(first) / 40)
    assert {(d.episode, d.frame) for d in second} == {(100, i) for i in range(5)}


def test_draws_depend_on_seed_epoch_and_number_alone() -> None:
    one, same = draws(7), draws(7)
    backwards = [same.draw(i) for i in reversed(range(200))][::-1]
    assert [one.draw(i) for i in range(200)] == backwards
    for seed in (8, 7 + 2**32):
        assert [one.draw(i) for i in range(200)] != [draws(seed).draw(i) for i in range(200)]
    size = one.epoch_size
    assert size == 45
    assert [one.draw(i) for i in range(size)] != [one.draw(i + size) for i in range(size)]
    assert one.draw(3, attempt=1) != one.draw(3)


def test_data_sets_without_frames_are_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    made = draws(weights=(1.0, 1e9, 1.0), lengths=((3,), (), (4,)))
    assert {made.draw(i).dataset for i in range(300)} == {0, 2}
    # whatever is drawn, the ends of 0..1 and weights that add up to less than 1 by a rounding too
    many = draws(weights=(1.0, *[0.1] * 7, 1.0), lengths=((), *[(4,)] * 7, ()))
    for unit, dataset in ((0.0, 1), (1 - 2.0**-53, 7)):
        monkeypatch.setattr("dit4dit.data.sampler._unit", lambda words, unit=unit: unit)
        assert many.draw(0).dataset == dataset
    with pytest.raises(ConfigError, match="no frames to draw from"):
        draws(lengths=((), ()))
    with pytest.raises(ConfigError, match="seed: expected an integer"):
        draws(seed=-1)
    with pytest.raises(ConfigError, match="epoch_size: expected at least 1, got 0"):
        draws(epoch_size=0)


@pytest.mark.parametrize("world_size,batch_size", [(1, 12), (2, 6), (3, 4), (4, 3)])
def test_the_global_batch_is_the_same_however_it_is_cut(world_size: int, batch_size: int) -> None:
    ranks = [take(Sampler(draws(), batch_size=batch_size, rank=r, world_size=world_size), 5) for r in range(world_size)]
    joined = [[number for rank in ranks for number in rank[step]] for step in range(5)]
    assert joined == [list(range(12 * step, 12 * step + 12)) for step in range(5)]


def test_a_run_goes_on_with_the_next_sample_with_another_number_of_ranks() -> None:
    first = Sampler(draws(), batch_size=6, rank=0, world_size=2)
    first.position = 5 * first.global_batch
    state = first.state_dict()
    again = [Sampler(draws(), batch_size=4, rank=r, world_size=3) for r in range(3)]
    for sampler in again:
        sampler.load_state_dict(state)
    assert [number for sampler in again for number in take(sampler, 1)[0]] == list(range(60, 72))
    assert again[0].epoch == 60 // 45


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"weights": (1.0, 2.0)},
        {"lengths": ((10, 30), (6,))},
        {"epoch_size": 9},
        {"lengths": ((30, 10), (5,))},
    ],
)
def test_a_position_of_other_data_is_refused(change: dict) -> None:
    state = Sampler(draws(), batch_size=2).state_dict()
    with pytest.raises(ConfigError, match="belongs to other data"):
        Sampler(draws(**change), batch_size=2).load_state_dict(state)


def test_bad_sizes_are_refused() -> None:
    for options in (
        {"batch_size": 0},
        {"batch_size": 1, "rank": 2, "world_size": 2},
        {"batch_size": 1, "world_size": 0},
    ):
        with pytest.raises(ConfigError, match="sampler: expected"):
            Sampler(draws(), **options)


@pytest.fixture(scope="module")
def mixture(libero_data: Path) -> Mixture:
    entries = [Entry("v2.1", "libero_franka"), Entry("v3.0", "libero_franka", weight=2.0)]
    return Mixture.open(entries, libero_data, catalogue())


def first_batches(loader: Loader, count: int) -> list:
    batches = [batch for _, batch in zip(range(count), loader, strict=False)]
    assert len(batches) == count
    return batches


def assert_same(one: list, other: list) -> None:
    assert [batch.sources for batch in one] == [batch.sources for batch in other]
    for a, b in zip(one, other, strict=True):
        assert a.lang == b.lang
        for name in ("video", "state", "actions", "action_mask"):
            assert torch.equal(getattr(a, name), getattr(b, name))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_do_not_depend_on_the_number_of_workers(mixture: Mixture, workers: int) -> None:
    plain = first_batches(Loader(mixture, WINDOW, batch_size=3, seed=5), 6)
    assert_same(plain, first_batches(Loader(mixture, WINDOW, batch_size=3, seed=5, workers=workers), 6))


@pytest.mark.parametrize("workers,resumed", [(0, 2), (2, 0), (2, 2)])
def test_a_loader_resumes_with_the_very_next_batch(mixture: Mixture, workers: int, resumed: int) -> None:
    """Batches that workers had ready and nobody took do not count."""
    whole = first_batches(Loader(mixture, WINDOW, batch_size=3, seed=5), 8)
    loader = Loader(mixture, WINDOW, batch_size=3, seed=5, workers=workers)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    state = loader.state_dict()
    del iterator
    again = Loader(mixture, WINDOW, batch_size=3, seed=5, workers=resumed)
    again.load_state_dict(state)
    assert_same(whole[3:], first_batches(again, 5))


def test_two_ranks_share_the_batch_of_one(mixture: Mixture) -> None:
    one = first_batches(Loader(mixture, WINDOW, batch_size=4), 3)
    halves = [first_batches(Loader(mixture, WINDOW, batch_size=2, rank=r, world_size=2), 3) for r in range(2)]
    for whole, first, second in zip(one, *halves, strict=True):
        assert whole.sources == first.sources + second.sources


def test_held_out_episodes_are_never_trained_on(mixture: Mixture) -> None:
    train, held = mixture.episodes("train", 0.25, seed=3), mixture.episodes("heldout", 0.25, seed=3)
    for one, other in zip(train, held, strict=True):
        assert len(other) == 1
        assert sorted(one + other) == [0, 1, 2, 3]
    sources = {
        split: {(s.dataset, s.episode) for batch in first_batches(loader, 40) for s in batch.sources}
        for split, loader in (
            (split, Loader(mixture, WINDOW, batch_size=2, split=split, heldout=0.25, seed=3))
            for split in ("train", "heldout")
        )
    }
    assert not sources["train"] & sources["heldout"]
    assert len(sources["train"]) == 6
    assert len(sources["heldout"]) == 2
    assert mixture.episodes("train", 0.0, seed=3) == ((0, 1, 2, 3),) * 2
    assert [len(each) for each in mixture.episodes("heldout", 0.01, seed=3)] == [1, 1], "at least one"
    assert [len(each) for each in mixture.episodes("train", 0.99, seed=3)] == [1, 1], "never all"
    with pytest.raises(ConfigError, match="no episodes for 'heldout'"):
        mixture.episodes("heldout", 0.0, seed=3)
    with pytest.raises(ConfigError, match="held-out fraction: expected 0 to below 1"):
        mixture.episodes("train", 1.0, seed=3)


def test_the_split_is_a_matter_of_seed_name_and_number(mixture: Mixture, libero_data: Path, tmp_path: Path) -> None:
    splits = {mixture.episodes("heldout", 0.25, seed) for seed in range(12)}
    assert len(splits) > 3
    # read again, the data sets in the other order and with other weights
    entries = [Entry("v3.0", "libero_franka"), Entry("v2.1", "libero_franka", weight=3.0)]
    again = Mixture.open(entries, libero_data, catalogue())
    for seed in range(12):
        assert again.episodes("heldout", 0.25, seed) == mixture.episodes("heldout", 0.25, seed)[::-1]
    assert any(len(set(split)) > 1 for split in splits), "by its name, each data set has a split of its own"
    # without its first episode: the others keep their numbers, and with them their sides
    shutil.copytree(libero_data / "v2.1", tmp_path / "v2.1")
    listed = tmp_path / "v2.1" / "meta" / "episodes.jsonl"
    listed.write_text("".join(listed.read_text().splitlines(keepends=True)[1:]))
    fewer = Mixture.open([Entry("v2.1", "libero_franka")], tmp_path, catalogue())
    assert [each.index for each in fewer.recordings[0].data.meta.episodes] == [1, 2, 3]
    kept = 0
    for seed in range(12):
        (held,) = mixture.episodes("heldout", 0.25, seed)[0]
        if held:
            assert fewer.episodes("heldout", 0.25, seed) == ((held - 1,),)
            kept += 1
    assert kept > 6


def test_clips_of_different_sizes_in_a_batch_are_refused(mixture: Mixture) -> None:
    from dataclasses import replace

    from dit4dit.data.samples import Samples

    one, other = (mixture.readers(replace(WINDOW, image_size=size))[0].read(0, 0) for size in ((32, 32), (16, 16)))
    with pytest.raises(ConfigError, match="clips of different sizes"):
        Samples.collate([one, other])


def test_workers_get_no_copy_of_the_numbers(tmp_path: Path, libero_episode) -> None:
    """Pickled for a spawned worker, a data set of 4 MB is a few kilobytes, and reads the same."""
    import pickle

    from dit4dit.data.writer import Writer

    columns, pictures = libero_episode(0, 2000, height=16, width=16)
    columns["observation.environment"] = np.zeros((2000, 500), np.float32)
    with Writer(tmp_path / "set", 10) as writer:
        writer.add(columns, pictures, "go")
    made = Mixture.open([Entry("set", "libero_franka")], tmp_path, catalogue())
    loader = Loader(made, WINDOW, batch_size=2)
    first_batches(loader, 1)  # files are open, columns are mapped
    data = pickle.dumps(loader.dataset)
    assert len(data) < 50_000
    assert torch.equal(pickle.loads(data).read(3)[0].video, loader.dataset.read(3)[0].video)
