"""Training's loader over LeRobot data sets: the same samples whatever the workers, ranks and interruptions; damage on the way."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training_worker import small_config

from dit4dit.data.catalogue import Entry, catalogue
from dit4dit.data.mixture import Mixture
from dit4dit.data.sampler import Draws
from dit4dit.data.writer import Writer
from dit4dit.errors import ConfigError, DataError, InputError
from dit4dit.model import dit4dit
from dit4dit.presets import preset
from dit4dit.training.checkpoint import Progress
from dit4dit.training.config import DataConfig
from dit4dit.training.feed import Feed, Share, to_batch
from dit4dit.training.lerobot_data import LeRobotData
from dit4dit.training.loop import check_progress
from dit4dit.training.samples import Raw, collate, pictures

pytest.importorskip("pyarrow")
TINY = preset("tiny").model


def opened(root: Path, *names: str, **options) -> LeRobotData:
    mixture = Mixture.open([Entry(name, "libero_franka") for name in names], root, catalogue())
    return LeRobotData(mixture, TINY, DataConfig(holdout=0.0, **options), seed=5)


@pytest.fixture(scope="module")
def data(libero_data: Path) -> LeRobotData:
    return opened(libero_data, "v2.1", "v3.0")


def load(data: LeRobotData, first: int, last: int, *, batch_size: int = 3, workers: int = 0, rank=0, ranks=1):
    share = Share(rank, ranks, batch_size, 1)
    return iter(Feed(data, share, first, last, workers=workers, video=True, pin=False))


def assert_same(one: list[Raw], other: list[Raw]) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a.positions, a.indices, a.instructions) == (b.positions, b.indices, b.instructions)
        for name in ("video", "state", "actions", "action_mask"):
            assert torch.equal(getattr(a, name), getattr(b, name))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_do_not_depend_on_the_number_of_workers(data: LeRobotData, workers: int) -> None:
    """Files that this process has open already do not disturb those of the workers."""
    assert_same(list(load(data, 0, 6)), list(load(data, 0, 6, workers=workers)))


@pytest.mark.parametrize("workers,resumed", [(0, 2), (2, 0), (2, 2)])
def test_a_loader_resumes_with_the_very_next_batch(data: LeRobotData, workers: int, resumed: int) -> None:
    """Batches that workers had ready and nobody took do not count."""
    whole, feed = list(load(data, 0, 8)), load(data, 0, 8, workers=workers)
    taken = [next(feed) for _ in range(3)]
    feed.close()
    assert_same(whole, taken + list(load(data, 3, 8, workers=resumed)))


def test_two_ranks_share_the_batch_of_one(data: LeRobotData) -> None:
    halves = [load(data, 0, 3, batch_size=2, rank=rank, ranks=2) for rank in range(2)]
    for whole, first, second in zip(load(data, 0, 3, batch_size=4), *halves, strict=True):
        assert whole.positions == first.positions + second.positions
        assert whole.indices == first.indices + second.indices


@pytest.mark.parametrize("world_size,batch_size", [(1, 12), (2, 6), (3, 4), (4, 3)])
def test_the_global_batch_is_the_same_however_it_is_cut(world_size: int, batch_size: int) -> None:
    shares = [Share(rank, world_size, batch_size, 1) for rank in range(world_size)]
    for step in range(5):
        joined = [position for share in shares for position in share.positions(step, 0)]
        assert joined == list(range(12 * step, 12 * step + 12))


def progress(fingerprint: str, global_batch: int) -> SimpleNamespace:
    """A checkpoint of step 5 of `small_config`."""
    made = Progress(step=5, seed=42, global_batch=global_batch, data=fingerprint, prompts="")
    return SimpleNamespace(folder="step_00000005", progress=made)


def test_a_run_goes_on_with_the_next_sample_with_another_number_of_ranks(tmp_path: Path) -> None:
    saved = progress("same", Share(0, 2, 6, 1).global_batch)
    check_progress(
        saved, small_config(tmp_path).override({"data.batch_size": "4"}), SimpleNamespace(fingerprint="same"), 3
    )
    again = [Share(rank, 3, 4, 1) for rank in range(3)]
    assert [position for share in again for position in share.positions(5, 0)] == list(range(60, 72))


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"weights": (1.0, 2.0)},
        {"lengths": ((10, 30), (6,))},
        {"first": 7},
        {"lengths": ((30, 10), (5,))},
    ],
)
def test_a_position_of_other_data_is_refused(change: dict, tmp_path: Path) -> None:
    def fingerprint(seed: int = 0, weights=(1.0, 3.0), lengths=((10, 30), (5,)), first: int = 0) -> str:
        return Draws([range(first, first + len(each)) for each in lengths], lengths, weights, seed).fingerprint

    config = small_config(tmp_path)
    saved = progress(fingerprint(), config.data.batch_size)
    check_progress(saved, config, SimpleNamespace(fingerprint=fingerprint()), 1)
    with pytest.raises(ConfigError, match=r"the data's fingerprint .*make them equal"):
        check_progress(saved, config, SimpleNamespace(fingerprint=fingerprint(**change)), 1)


def test_bad_sizes_are_refused(tmp_path: Path) -> None:
    for size in ("0", "-1"):
        with pytest.raises(ConfigError, match=f"data.batch_size: expected at least 1, got {size}"):
            small_config(tmp_path).override({"data.batch_size": size})


@pytest.mark.parametrize(("clip", "got"), [(torch.zeros(1, 4, 3, 16, 16), r"\[4, 3, 16, 16\]"), (None, "none")])
def test_clips_of_another_length_than_the_models_are_refused(clip, got: str) -> None:
    raw = Raw((0,), (7,), ("go",), clip, torch.zeros(1, 2, 3), torch.ones(1, 2, 3, dtype=torch.bool), None)
    with pytest.raises(
        InputError, match=rf"samples \[7\]: video: expected \[5, 3, H, W\], got {got}; set --model.frames"
    ):
        pictures(raw, preset("tiny").model, torch.device("cpu"))


def test_clips_of_different_sizes_in_a_batch_are_refused(data: LeRobotData) -> None:
    sizes = [replace(data.window, image_size=size) for size in ((32, 32), (16, 16))]
    samples = [data.mixture.readers(window)[0].read(0, 0) for window in sizes]
    with pytest.raises(InputError, match=r"samples \[0, 1\]: video: expected one shape, got .*64.*"):
        collate([0, 1], [0, 1], samples)


def test_a_sample_is_a_batch_for_the_models_loss(data: LeRobotData) -> None:
    torch.manual_seed(0)
    model = dit4dit.DiT4DiT(TINY, with_text=False, with_video_vae=True)
    raw = collate([0, 1], [1, 30], [data.sample(1), data.sample(30)])
    prompts = dict.fromkeys(raw.instructions, torch.zeros(7, TINY.dit.text_in))
    batch = to_batch(raw, TINY, torch.device("cpu"), prompts, None)
    assert batch.video.shape == (2, 5, 3, 32, 64)
    assert float(batch.video.min()) >= -1
    assert float(batch.video.max()) <= 1
    draws = dit4dit.Draws.random(TINY, batch, torch.Generator().manual_seed(0))
    assert torch.isfinite(model.loss(batch, draws).total)


def test_workers_get_no_copy_of_the_numbers(tmp_path: Path, libero_episode) -> None:
    """Pickled for a spawned worker, a data set of 4 MB is a few kilobytes, and reads the same."""
    columns, pictures = libero_episode(0, 2000, height=16, width=16)
    columns["observation.environment"] = np.zeros((2000, 500), np.float32)
    with Writer(tmp_path / "set", 10) as writer:
        writer.add(columns, pictures, "go")
    data = opened(tmp_path, "set")
    want = data.sample(3).video  # files are open, columns are mapped
    sent = pickle.dumps(data)
    assert len(sent) < 50_000
    assert torch.equal(pickle.loads(sent).sample(3).video, want)


def test_damage_found_while_training_is_an_error_or_a_counted_skip(write_libero, tmp_path: Path) -> None:
    """A video whose header is fine and whose pictures are not, as a failing disk makes them."""
    root = write_libero(tmp_path / "set", lengths=(20, 20))
    (path,) = root.glob("videos/chunk-000/*wrist_image/episode_000001.mp4")
    damaged = bytearray(path.read_bytes())
    half = len(damaged) // 2
    rng = np.random.default_rng(0)
    damaged[half - 8000 : half + 8000] = rng.integers(0, 256, 16000, dtype=np.uint8).tobytes()
    path.write_bytes(damaged)
    for workers in (0, 2):
        with pytest.raises(DataError) as caught:
            list(load(opened(tmp_path, "set"), 0, 20, batch_size=4, workers=workers))
        assert str(caught.value).startswith(f"{path}: frame ")
        assert "\n" not in str(caught.value)
    # opened without skip_bad: looking beforehand finds nothing
    lenient = opened(tmp_path, "set", skip_bad=True)
    batches, again = (list(load(lenient, 0, 10, batch_size=4, workers=workers)) for workers in (0, 2))
    assert_same(batches, again)
    skipped = [why for raw in batches for why in raw.skipped]
    assert skipped == [why for raw in again for why in raw.skipped]
    assert len(skipped) > 3
    assert all(str(path) in why for why in skipped)
    assert [len(raw.indices) for raw in batches] == [4] * 10
