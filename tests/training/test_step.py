"""One step: the published losses and gradients through samples, caches and collation; draws and dropout that know no ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dit4dit.checkpoints.checkpoint import open_checkpoint
from dit4dit.config import ModelConfig
from dit4dit.data.samples import Sample, Window
from dit4dit.data.writer import VideoCodec, Writer
from dit4dit.evaluation.parity import (
    GRADIENTS,
    golden_video_time,
    gradient_norm,
    load_golden,
    relative_error,
)
from dit4dit.model.dit4dit import Draws
from dit4dit.presets import preset
from dit4dit.training import caches, setup
from dit4dit.training.config import DataConfig, TrainConfig, WeightsConfig
from dit4dit.training.feed import Feed, Share, to_batch
from dit4dit.training.lerobot_data import LeRobotData
from dit4dit.training.loop import loss_step, prepare
from dit4dit.training.parallel import Root
from dit4dit.training.random_data import RandomData
from dit4dit.training.randomness import KeyedDropout, Keys, draws, dropout_keys, key_dropouts, uniform_bits
from dit4dit.training.samples import collate

GOLDEN = Path(__file__).parents[1] / "golden"
CPU = torch.device("cpu")


class GoldenData(LeRobotData):
    """The golden batch as a LeRobot data set: sample i is the first frame of episode i.

    State and actions are written as the model has them, for a robot without normalisation. The fixtures' padded entries hold
    numbers where a loader has zeros, so those are written too, and the mask alone is the fixture's.
    """

    @classmethod
    def write(cls, folder: Path, golden: dict[str, torch.Tensor], prompts: list[str], model: ModelConfig) -> GoldenData:
        images, actions, state = (golden[f"in.{name}"].numpy() for name in ("images", "actions", "state"))
        views = ("left", "right") if images.shape[3] > images.shape[2] else ("only",)
        offsets = Window.for_model(model).offsets
        with Writer(folder / "set", 10, codec=VideoCodec.lossless()) as writer:
            for i, words in enumerate(prompts):
                length = offsets[-1] + 1
                shown = np.zeros((length, *images.shape[2:]), np.uint8)
                shown[list(offsets)] = images[i]
                done = np.resize(actions[i], (length, actions.shape[2]))
                columns = {"action": done, "observation.state": np.repeat(state[i], length, axis=0)}
                cameras = {
                    f"observation.images.{v}": part
                    for v, part in zip(views, np.split(shown, len(views), 2), strict=True)
                }
                writer.add(columns, cameras, words)
        modality = {
            "state": {"all": {"start": 0, "end": state.shape[2]}},
            "action": {"all": {"start": 0, "end": actions.shape[2]}},
            "video": {view: {"original_key": f"observation.images.{view}"} for view in views},
            "annotation": {"task": {"original_key": "task_index"}},
        }
        robot = {"video": list(views), "state": ["all"], "action": ["all"], "language": "annotation.task"}
        robots = {"golden": {**robot, "action_steps": actions.shape[1], "modality": modality}}
        mixtures = {"golden": [{"dataset": "set", "robot": "golden"}]}
        (folder / "robots.yaml").write_text(json.dumps({"robots": robots, "mixtures": mixtures}))
        own = DataConfig(root=str(folder), mixture="golden", robots=str(folder / "robots.yaml"), holdout=0.0)
        data = cls.open(own, replace(model, image_size=(images.shape[2], images.shape[3] // len(views))), seed=0)
        data.masks = golden["in.action_mask"].bool()
        return data

    def index(self, position: int, attempt: int = 0) -> int:
        return position * self.clips // len(self.masks)

    def sample(self, index: int, *, video: bool = True) -> Sample:
        return replace(
            super().sample(index, video=video), action_mask=self.masks[index * len(self.masks) // self.clips]
        )


@pytest.mark.parametrize("cached", [False, True], ids=["pictures", "latents"])
@pytest.mark.parametrize("name", ["libero_tiny", "gr1_tiny"])
def test_published_losses_and_gradients(name: str, cached: bool, tmp_path: Path) -> None:
    """From video files and parquet through reader, worker, collation and caches to the losses and their gradients."""
    golden = load_golden(GOLDEN / name / "golden.safetensors", CPU)
    prompts = json.loads((GOLDEN / name / "golden.json").read_text())["prompts"]
    published = open_checkpoint(GOLDEN / name).model
    data = GoldenData.write(tmp_path, golden, prompts, published)
    flow = published.flow
    config = TrainConfig(
        model=replace(preset("tiny").model, flow=flow),
        embodiment=None,
        weights=WeightsConfig(checkpoint=str(GOLDEN / name)),
    )
    start = setup.load(config, CPU)
    embedded = caches.PromptCache(tmp_path, caches.prompt_key(start.text(), start.tokenizer))
    caches.fill_prompts(embedded, start.text(), start.tokenizer, data.instructions)
    latents = None
    if cached:
        latents = caches.LatentCache(tmp_path, caches.latent_key(start.model, data), data.clips)
        caches.fill_latents(latents, start.model, data)
    keys = Keys()
    prepare(start.model, start.config, keys)  # gradient checkpointing is on
    root = Root(start.model, "float32").eval()
    share = Share(0, 1, len(prompts), 1)
    (raw,) = Feed(data, share, 0, 1, workers=1, video=not cached, pin=False)
    assert raw.instructions == tuple(prompts)
    batch = to_batch(raw, start.model.config, CPU, embedded, latents)
    drawn = Draws(
        posterior=golden["train.posterior_noise"],
        latent=golden["train.latent_noise"],
        video_time=golden_video_time(start.model, golden),
        video_noise=golden["train.video_noise_future"],
        action_time=golden["train.action_time"],
        action_noise=golden["train.action_noise"],
    )
    losses = root(partial(loss_step, batch=batch, drawn=drawn))
    (losses["action"] + flow.future_video_weight * losses["video"]).backward()
    errors = {part: relative_error(losses[part].detach(), golden[f"train.{part}_loss"]) for part in ("action", "video")}
    for grad, parameter in GRADIENTS.items():
        errors[grad] = relative_error(start.model.get_parameter(parameter).grad, golden[f"train.grad.{grad}"])
    for part, module in (("action_model", start.model.head), ("transformer", start.model.backbone.transformer)):
        errors[part] = relative_error(gradient_norm(module), golden[f"train.grad_norm.{part}"])
    assert len(errors) == 6
    assert max(errors.values()) <= 1e-4, errors


def test_draws_do_not_depend_on_the_batch_they_are_in() -> None:
    model = preset("tiny").model
    together = draws(model, (4, 8), 3, "training", [5, 6, 7, 8])
    repeats = model.flow.repeated_diffusion_steps
    for half in ([5, 6], [7, 8]):
        part = draws(model, (4, 8), 3, "training", half)
        rows = [position - 5 for position in half]
        for name in ("posterior", "latent", "video_time", "video_noise"):
            assert torch.equal(getattr(part, name), getattr(together, name)[rows]), name
        for name in ("action_time", "action_noise"):
            whole = getattr(together, name).unflatten(0, (repeats, 4))
            assert torch.equal(getattr(part, name).unflatten(0, (repeats, 2)), whole[:, rows]), name
    assert not torch.equal(draws(model, (4, 8), 4, "training", [5]).latent, together.latent[:1])
    assert not torch.equal(together.action_noise[:4], together.action_noise[4:8]), "repeats must differ"


def test_dropout_masks_follow_the_key() -> None:
    keys = Keys()
    layer = KeyedDropout(0.2, salt=1, keys=keys).train()
    x = torch.ones(4, 64, 512)
    keys.rows = dropout_keys(0, [10, 11, 12, 13], 1)
    y = layer(x)
    assert set(y.unique().tolist()) == {0.0, 1.25}
    assert (y == 0).float().mean().item() == pytest.approx(0.2, abs=0.005)
    assert torch.equal(layer(x), y)
    keys.rows = dropout_keys(0, [12, 13], 1)
    assert torch.equal(layer(x[:2]), y[2:])
    assert not torch.equal(KeyedDropout(0.2, salt=2, keys=keys).train()(x[:2]), y[2:])
    assert torch.equal(layer.eval()(x[:2]), x[:2])
    repeats = dropout_keys(0, [12, 13], 3)
    assert torch.equal(repeats[:2], dropout_keys(0, [12, 13], 1)), "repeat-major"
    assert len(set(repeats.tolist())) == 6, "each repeat of a sample has a mask of its own"
    with pytest.raises(RuntimeError, match="2 keys were set for 4 rows"):
        layer.train()(x)


def test_dropout_bits_are_uniform_and_uncorrelated() -> None:
    bits = uniform_bits(dropout_keys(1, range(64), 1), 3, 4096).double() / 2**24
    assert bits.mean().item() == pytest.approx(0.5, abs=0.003)
    assert bits.var().item() == pytest.approx(1 / 12, abs=0.001)
    centred = bits - 0.5
    for a, b in ((centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1])):
        assert abs((a * b).mean().item() * 12) < 0.01


def test_every_dropout_of_the_head_is_replaced() -> None:
    from dit4dit.model.action_head import ActionHead

    head = ActionHead(preset("tiny").model.head)
    count = key_dropouts(head, Keys())
    assert count == 4 * preset("tiny").model.head.num_layers
    assert not [module for module in head.modules() if type(module) is torch.nn.Dropout]
    salts = [module.salt for module in head.modules() if isinstance(module, KeyedDropout)]
    assert len(set(salts)) == count
    evaluated = ActionHead(preset("tiny").model.head).eval()
    key_dropouts(evaluated, Keys())
    assert not any(module.training for module in evaluated.modules())


@pytest.mark.parametrize("ranks, batch_size, accumulate", [(1, 8, 1), (2, 4, 1), (2, 2, 2), (4, 1, 2), (1, 2, 4)])
def test_ranks_and_micro_steps_share_the_same_positions(ranks: int, batch_size: int, accumulate: int) -> None:
    taken = []
    for rank in range(ranks):
        share = Share(rank, ranks, batch_size, accumulate)
        assert share.global_batch == 8
        taken += [p for micro in range(accumulate) for p in share.positions(3, micro)]
    assert sorted(taken) == list(range(24, 32))


def test_samples_of_unequal_shapes_are_refused() -> None:
    data = RandomData(preset("tiny").model, "libero")
    good = data.sample(0)
    bad = replace(good, actions=good.actions[:3])
    with pytest.raises(ValueError, match=r"samples \[0, 1\]: actions: expected one shape, got"):
        collate([0, 1], [0, 1], [good, bad])
    raw = collate([0], [0], [bad])
    with pytest.raises(ValueError, match=r"actions: expected shape \[8, 8\], got \[3, 8\]"):
        to_batch(raw, preset("tiny").model, CPU, None, None)
