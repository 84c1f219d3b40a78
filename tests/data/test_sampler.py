"""The order of samples: a function of the seed alone, whatever the workers, ranks and interruptions."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from dit4dit.data.catalogue import Entry, catalogue
from dit4dit.data.mixture import Mixture
from dit4dit.data.sampler import Draws
from dit4dit.errors import ConfigError


def draws(seed: int = 0, weights=(1.0, 3.0), lengths=((10, 30), (5,))) -> Draws:
    episodes = [range(100, 100 + len(each)) for each in lengths]
    return Draws(episodes, lengths, weights, seed)


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


@pytest.fixture(scope="module")
def mixture(libero_data: Path) -> Mixture:
    entries = [Entry("v2.1", "libero_franka"), Entry("v3.0", "libero_franka", weight=2.0)]
    return Mixture.open(entries, libero_data, catalogue())


def test_held_out_episodes_are_never_trained_on(mixture: Mixture) -> None:
    train, held = mixture.episodes("train", 0.25, seed=3), mixture.episodes("heldout", 0.25, seed=3)
    for one, other in zip(train, held, strict=True):
        assert len(other) == 1
        assert sorted(one + other) == [0, 1, 2, 3]
    drawn = []
    for episodes in (train, held):
        lengths = [
            [recording.length(i) for i in chosen]
            for recording, chosen in zip(mixture.recordings, episodes, strict=True)
        ]
        made = Draws(episodes, lengths, mixture.weights, 3)
        drawn.append({(d.dataset, d.episode) for d in map(made.draw, range(80))})
    assert not drawn[0] & drawn[1]
    assert [len(each) for each in drawn] == [6, 2]
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
