"""Whole small runs: modes, strategies, precisions, averages, adapters; and that one process and two train the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import training_runs as runs
from training_worker import small_config

from dit4dit import Observation, Policy
from dit4dit.errors import TrainingError
from dit4dit.training import checkpoint, loop, optim
from dit4dit.training.loop import train
from dit4dit.training.random_data import HELD_OUT, RandomData


def run(out: Path, **changes: str) -> dict[int, tuple[float, ...]]:
    """Losses of a run of `small_config` in this process; keys with __ for dots."""
    config = small_config(out).override({key.replace("__", "."): value for key, value in changes.items()})
    assert train(config, RandomData(config.model, "libero")) == 0
    return runs.losses(out)


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "run"
    run(out, run__eval_every="3", run__eval_samples="4", run__eval_strips="0")
    return out


@pytest.mark.slow
def test_learning_lowers_the_losses(tmp_path: Path) -> None:
    config = small_config(tmp_path).override({"run.steps": "30", "optim.learning_rate.action_model": "3e-3"})
    one_clip = RandomData(config.model, "libero", clips=HELD_OUT + 1)
    assert train(config, one_clip) == 0
    found = runs.losses(tmp_path)
    first, last = (np.mean([found[s][:2] for s in steps], axis=0) for steps in (range(1, 6), range(26, 31)))
    assert (last < 0.85 * first).all(), (first, last)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_does(strategy: str, plain: Path, tmp_path: Path) -> None:
    """Unequal masks, dropout, held-out samples: equal to 1e-5 with half the batch on each."""
    words = ["--data.batch_size", 2, "--run.eval_every", 3, "--run.eval_samples", 4, "--run.eval_strips", 0]
    words += ["--run.strategy", strategy, "--optim.ema", 0.9]
    runs.Run(tmp_path / "two", *words, ranks=2).ok()
    names = (
        "step",
        *runs.LOSSES,
        "eval/action_loss",
        "eval/video_loss",
        "eval/action_mae",
        "action_mae/x",
        "action_mse/yaw",
    )
    for one, two in zip(lines(plain), lines(tmp_path / "two"), strict=True):
        shared = [name for name in names if name in one]
        assert len(shared) >= 4
        assert {name: two[name] for name in shared} == pytest.approx({name: one[name] for name in shared}, rel=1e-5)
    # and its checkpoint is the same model
    mine, theirs = (checkpoint.read(checkpoint.latest(out)) for out in (plain, tmp_path / "two"))
    assert set(theirs.average) == set(mine.weights) == set(theirs.weights)
    for name in (
        "action_model.action_decoder.layer2.weight",
        "backbone_interface.extractor.transformer.proj_out.weight",
    ):
        assert torch.allclose(mine.weights[name], theirs.weights[name], atol=2e-5), name


FSDP_WORKER = """
import sys
from pathlib import Path
import torch
from torch.distributed.tensor import DTensor
from training_worker import small_config
from dit4dit.training import loop, optim, setup
from dit4dit.training.parallel import Processes
from dit4dit.training.random_data import HELD_OUT, RandomData

config = small_config("unused").override({"run.strategy": "fsdp2", "optim.ema": "0.9"})
processes = Processes(config)
start = setup.load(config, processes.device)
whole = sum(p.nbytes for p in optim.named_parameters(start.model).values())
trainer = loop.Trainer(start, RandomData(config.model, "libero"), processes, None, None)
parameters = trainer.moves.parameters
assert all(isinstance(p, DTensor) for p in parameters.values()), [n for n, p in parameters.items() if not isinstance(p, DTensor)]
assert all(isinstance(v, DTensor) for v in trainer.moves.average.values.values())
here = sum(p.to_local().nbytes for p in parameters.values())
odd = sum(p.numel() // p.shape[0] * 4 for p in parameters.values() if p.shape[0] % 2)
# the first rank holds the larger half where a first dimension is odd
assert here == (whole + (1 if processes.rank == 0 else -1) * odd) // 2, (here, whole, odd)
assert not any(isinstance(p, DTensor) for p in start.model.backbone.frame_encoder.parameters())
print("halved", processes.ranks)
"""


@pytest.mark.slow
def test_fsdp2_really_shards(tmp_path: Path) -> None:
    script = tmp_path / "shards.py"
    script.write_text(FSDP_WORKER)
    both = runs.Run(tmp_path, ranks=2, script=script)
    assert [out.strip() for out in both.outputs()] == ["halved 2"] * 2


@pytest.mark.parametrize("mode, absent", [("action", "video_loss"), ("video", "action_loss")])
def test_modes(mode: str, absent: str, tmp_path: Path) -> None:
    run(
        tmp_path,
        model__flow__training=mode,
        run__eval_every="6",
        run__eval_samples="4",
        run__eval_strips="1",
        run__steps="2",
    )
    for line in lines(tmp_path):
        assert not [name for name in line if name.endswith(absent)]
    assert runs.losses(tmp_path).keys() == {1, 2}
    assert any(f"eval/{mode}_loss" in line for line in lines(tmp_path))
    saved = checkpoint.read(checkpoint.latest(tmp_path))
    moved = {name.split(".", 1)[1].split(".")[0] for name in saved.moments if name.startswith("exp_avg.")}
    assert moved == ({"action_model"} if mode == "action" else {"backbone_interface"})
    assert (tmp_path / "strips").exists() == (mode == "video")


def same(first: dict[int, tuple[float, ...]], second: dict[int, tuple[float, ...]], rel: float) -> None:
    assert list(first) == list(second) == list(range(1, 7))
    for step, values in first.items():
        assert second[step] == pytest.approx(values, rel=rel), step


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, rel",
    [
        ({"run__gradient_checkpointing": "true"}, 1e-5),
        ({"data__batch_size": "1", "optim__accumulate": "4"}, 1e-5),
        ({"data__cache_latents": "true"}, 1e-4),
        ({"run__precision": "bfloat16"}, 0.1),
        ({"run__precision": "float16"}, 0.1),
        ({"data__workers": "2"}, 0),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_same_losses_another_way(changes: dict[str, str], rel: float, plain: Path, tmp_path: Path) -> None:
    same(runs.losses(plain), run(tmp_path, **changes), rel)


def test_lower_precision_keeps_float32_masters_and_the_scaler(tmp_path: Path) -> None:
    run(tmp_path, run__precision="float16", run__steps="2")
    saved = checkpoint.read(checkpoint.latest(tmp_path))
    kinds = {t.dtype for mapping in (saved.weights, saved.moments) for t in mapping.values()}
    assert kinds == {torch.float32}
    assert saved.progress.scale is not None
    assert saved.progress.growth == 2
    config = small_config(tmp_path).override({"run.precision": "float16", "run.steps": "3"})
    assert train(config, RandomData(config.model, "libero"), resume=checkpoint.latest(tmp_path)) == 0
    assert checkpoint.read(checkpoint.latest(tmp_path)).progress.growth == 3


@pytest.mark.long
def test_compiled_blocks_train_the_same(plain: Path, tmp_path: Path) -> None:
    same(runs.losses(plain), run(tmp_path, run__compile="true"), 1e-4)


@pytest.mark.parametrize("kind", ["plain", "ema", "lora"])
def test_the_policy_is_what_was_trained(kind: str, tmp_path: Path) -> None:
    """The checkpoint's policy folder, loaded as it is, has the weights that the trainer would use; a resumed run goes on."""
    changes = {"ema": {"optim__ema": "0.5"}, "lora": {"optim__lora__rank": "2"}, "plain": {}}[kind]
    found = run(tmp_path / "whole", **changes, run__save_every="3")
    half = checkpoint.folder_of(tmp_path / "whole", 3)
    config = small_config(tmp_path / "rest").override({k.replace("__", "."): v for k, v in changes.items()})
    assert train(config, RandomData(config.model, "libero"), resume=half) == 0
    assert runs.losses(tmp_path / "rest") == {step: found[step] for step in (4, 5, 6)}
    last = checkpoint.read(checkpoint.latest(tmp_path / "whole"))
    for again in (tmp_path / "rest", tmp_path / "whole"):
        policy = Policy.from_pretrained(checkpoint.latest(again) / "policy", device="cpu", engine="off")
        weights = {n: p.detach() for n, p in optim.named_parameters(policy.model).items()}
        want = last.average if kind == "ema" else last.weights
        assert want
        if kind == "lora":
            assert any(".lora_" in name for name in want)
            name = "action_model.model.transformer_blocks.0.attn1.to_q"
            low = [want[f"{name}.lora_{side}.default.weight"] for side in "BA"]
            merged = want[f"{name}.base_layer.weight"] + 8.0 * low[0] @ low[1]
            assert torch.allclose(weights[f"{name}.weight"], merged)
            assert not torch.equal(weights[f"{name}.weight"], want[f"{name}.base_layer.weight"])
        else:
            assert all(torch.equal(weights[n], want[n]) for n in want)
    if kind == "ema":
        assert not all(torch.equal(last.average[n], last.weights[n]) for n in last.average)
    state = {key.name: np.zeros(key.dim) for key in policy.embodiment.state}
    images = {view: np.zeros((32, 32, 3), np.uint8) for view in policy.embodiment.views}
    assert np.isfinite(policy.infer(Observation(images=images, state=state), "open the drawer").actions).all()


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    class Spoilt(RandomData):
        def sample(self, index: int, *, video: bool = True):
            good = super().sample(index, video=video)
            return replace(good, actions=good.actions * float("nan"))

    config = small_config(tmp_path)
    with pytest.raises(TrainingError, match="step 1: the loss or its gradient is not a number"):
        train(config, Spoilt(config.model, "libero"))
    assert checkpoint.latest(tmp_path) is None


def test_a_gradient_that_is_no_number_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are spoilt then, whatever the loss is."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_, **__: torch.tensor(float("inf")))
    config = small_config(tmp_path)
    with pytest.raises(TrainingError, match=r"step 1: the loss or its gradient .*gradient norm inf"):
        train(config, RandomData(config.model, "libero"))
    assert checkpoint.latest(tmp_path) is None


def test_fine_tuning_a_checkpoint_with_a_fresh_head(plain: Path, tmp_path: Path) -> None:
    source = checkpoint.latest(plain) / "policy"
    base = small_config(tmp_path / "run").override({"weights.checkpoint": str(source), "run.steps": "1"})
    config = base.override({"weights.fresh_head": "true", "model.head.action_dim": "7", "optim.warmup_steps": "1000"})
    assert train(config, RandomData(config.model, "libero")) == 0
    before, after = (checkpoint.read(checkpoint.latest(out)).weights for out in (plain, tmp_path / "run"))
    assert after["action_model.action_decoder.layer2.weight"].shape[0] == 7
    backbone = [n for n in before if n.startswith("backbone_interface")]
    assert backbone
    assert all(torch.equal(before[n], after[n]) for n in backbone)


def test_the_text_encoder_is_not_built_again_on_resume(plain: Path, monkeypatch, tmp_path: Path) -> None:
    """All embeddings are there, so nothing asks for the encoder."""
    built = []
    fresh = loop.setup._fresh

    def counted(config, device):
        start = fresh(config, device)
        return replace(start, text=lambda: built.append(1) or start.text())

    monkeypatch.setattr(loop.setup, "_fresh", counted)
    config = small_config(plain).override({"run.steps": "7"})
    assert train(config, RandomData(config.model, "libero"), resume=checkpoint.latest(plain)) == 0
    assert built == []
    assert max(runs.losses(plain)) == 7
