"""One step: the published losses and gradients through samples, caches and collation; draws and dropout that know no ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from dit4dit.commands.parity import (
    GRADIENTS,
    golden_video_time,
    gradient_norm,
    load_golden,
    prepare_video,
    relative_error,
)
from dit4dit.model.checkpoint import open_checkpoint
from dit4dit.model.dit4dit import Draws
from dit4dit.presets import preset
from dit4dit.training import caches, setup
from dit4dit.training.config import TrainConfig, WeightsConfig
from dit4dit.training.feed import Share, collate, to_batch
from dit4dit.training.loop import loss_step, prepare
from dit4dit.training.parallel import Root
from dit4dit.training.random_data import RandomData, RandomSample
from dit4dit.training.randomness import KeyedDropout, Keys, draws, dropout_keys, key_dropouts, uniform_bits

GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")


class GoldenData:
    """The golden batch as a data set of its own samples."""

    def __init__(self, folder: Path) -> None:
        self.golden = load_golden(folder / "golden.safetensors", CPU)
        self.instructions = json.loads((folder / "golden.json").read_text())["prompts"]
        self.video = prepare_video(self.golden["in.images"], torch.float32)
        self.clip_fingerprint, self.clips = str(folder), len(self.video)

    def sample(self, index: int, *, video: bool = True) -> RandomSample:
        golden = self.golden
        return RandomSample(
            video=self.video[index] if video else None,
            lang=self.instructions[index],
            actions=golden["in.actions"][index],
            action_mask=golden["in.action_mask"][index].bool(),
            state=golden["in.state"][index] if "in.state" in golden else None,
        )


@pytest.mark.parametrize("cached", [False, True], ids=["pictures", "latents"])
@pytest.mark.parametrize("name", ["libero_tiny", "gr1_tiny"])
def test_published_losses_and_gradients(name: str, cached: bool, tmp_path: Path) -> None:
    data = GoldenData(GOLDEN / name)
    golden = data.golden
    weights = WeightsConfig(checkpoint=str(GOLDEN / name))
    flow = open_checkpoint(GOLDEN / name).model.flow
    base = preset("tiny").model
    config = TrainConfig(model=replace(base, flow=flow), embodiment=None, weights=weights)
    start = setup.load(config, CPU)
    prompts = caches.PromptCache(tmp_path, caches.prompt_key(start.text(), start.tokenizer))
    caches.fill_prompts(prompts, start.text(), start.tokenizer, data.instructions)
    latents = None
    if cached:
        latents = caches.LatentCache(tmp_path, caches.latent_key(start.model, data), data.clips)
        caches.fill_latents(latents, start.model, data)
    keys = Keys()
    prepare(start.model, start.config, keys)  # gradient checkpointing is on
    root = Root(start.model, "float32").eval()
    indices = range(data.clips)
    raw = collate(indices, indices, [data.sample(index, video=not cached) for index in indices])
    batch = to_batch(raw, start.model.config, CPU, prompts, latents)
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
