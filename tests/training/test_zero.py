"""DeepSpeed's ZeRO-2 and ZeRO-3, two processes on a CPU: the losses of one process, checkpoints, resuming, bytes. Without
deepspeed only what is said in its absence.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import training_runs as runs
from training_worker import small_config

from dit4dit.errors import ConfigError, MissingExtra
from dit4dit.training import checkpoint, memory
from dit4dit.training.loop import train
from dit4dit.training.random_data import RandomData

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed: pip install 'dit4dit[deepspeed]'"
)
STRATEGIES = ("zero2", "zero3")
WORDS = ("--run.save_every", 3, "--run.eval_every", 3, "--run.eval_samples", 4, "--run.eval_strips", 0)


def lines(out: Path) -> list[dict[str, float]]:
    timing = ("samples_per_s", "data_wait")
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in timing} for line in found]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """One process without ZeRO."""
    return runs.Run(tmp_path_factory.mktemp("alone") / "run", *WORDS).ok().out


@pytest.fixture(scope="module", params=STRATEGIES)
def split(request, tmp_path_factory) -> tuple[str, Path]:
    """The same global batch on two processes, in two micro steps each."""
    how = ("--run.strategy", request.param, "--data.batch_size", 1, "--optim.accumulate", 2)
    return request.param, runs.Run(tmp_path_factory.mktemp(request.param) / "run", *WORDS, *how, ranks=2).ok().out


@needs_deepspeed
def test_two_processes_train_what_one_does(split: tuple[str, Path], alone: Path) -> None:
    """Losses, norms, held-out losses, weights and moments."""
    _, out = split
    for one, two in zip(lines(alone), lines(out), strict=True):
        assert two == pytest.approx(one, rel=1e-5)
    mine, theirs = (checkpoint.read(checkpoint.latest(folder)) for folder in (alone, out))
    for kind in ("weights", "moments"):
        first, second = getattr(mine, kind), getattr(theirs, kind)
        assert set(first) == set(second)
        for name in first:
            assert torch.allclose(first[name], second[name], atol=2e-5), name


@needs_deepspeed
def test_a_resumed_run_has_the_same_bits(split: tuple[str, Path], tmp_path: Path) -> None:
    strategy, out = split
    how = ("--run.strategy", strategy, "--data.batch_size", 1, "--optim.accumulate", 2)
    rest = runs.Run(tmp_path / "rest", *WORDS, *how, "--resume", checkpoint.folder_of(out, 3), ranks=2).ok().out
    assert lines(rest) == [line for line in lines(out) if line["step"] > 3]
    mine, theirs = (checkpoint.read(checkpoint.latest(folder)) for folder in (rest, out))
    for kind in ("weights", "moments"):
        first, second = getattr(mine, kind), getattr(theirs, kind)
        assert [name for name in first if not torch.equal(first[name], second[name])] == []


@needs_deepspeed
def test_another_strategy_and_number_of_processes_goes_on(split: tuple[str, Path], alone: Path, tmp_path: Path) -> None:
    _, out = split
    rest = runs.Run(tmp_path / "rest", *WORDS, "--resume", checkpoint.folder_of(out, 3)).ok().out
    for got, want in zip(lines(rest), [line for line in lines(alone) if line["step"] > 3], strict=True):
        assert got == pytest.approx(want, rel=1e-5)


@needs_deepspeed
@pytest.mark.long
def test_average_and_adapters(tmp_path: Path) -> None:
    """Adapters on both stages, a moving average on stage 2, as one process without ZeRO has them."""
    lora, half = ("--optim.lora.rank", 2, "--run.steps", 3), ("--data.batch_size", 2)
    one = runs.Run(tmp_path / "one", *lora, "--optim.ema", 0.5).ok().out
    for strategy, more in (("zero2", ("--optim.ema", 0.5)), ("zero3", ())):
        two = runs.Run(tmp_path / strategy, *lora, *half, *more, "--run.strategy", strategy, ranks=2).ok().out
        for a, b in zip(lines(one), lines(two), strict=True):
            assert b == pytest.approx(a, rel=1e-5)
        mine, theirs = (checkpoint.read(checkpoint.latest(folder)) for folder in (one, two))
        assert set(theirs.average) == (set(mine.average) if more else set())
        for name, value in theirs.average.items():
            assert torch.allclose(value, mine.average[name], atol=2e-5), name


BYTES = """
import json, sys
from functools import partial
import torch
from training_worker import small_config
from dit4dit.training import caches, loop, optim, setup
from dit4dit.training.feed import Feed
from dit4dit.training.parallel import Processes
from dit4dit.training.random_data import RandomData

config = small_config(OUT).override({"run.strategy": STRATEGY, "optim.freeze": FROZEN})
processes = Processes(config)
start = setup.load(config, processes.device)
data = RandomData(config.model, "libero")
prompts, _ = loop.fill_caches(start, data, processes, None)
processes.wait()
trainer = loop.Trainer(start, data, processes, prompts, None)
feed = iter(Feed(data, trainer.share, 0, 1, workers=0, video=True, pin=False))
raw = [next(feed)]
trainer.take_step(raw, processes.sum(torch.tensor([float(raw[0].action_mask.sum())]))[0])

def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)

zero, moved = trainer.moves.optimizer, trainer.moves.parameters.values()
mine = {id(p) for p in moved}
fixed = [p for p in trainer.model.parameters() if id(p) not in mine]
state = size(t for s in zero.optimizer.state.values() for t in s.values())
if STRATEGY == "zero3":
    found = {"trained": size(p.data for p in moved) + size(p.ds_tensor for p in moved)}
    found["frozen"] = size(p.data for p in fixed) + size(p.ds_tensor for p in fixed)
    found["optimizer"] = state + size(zero.fp32_partitioned_groups_flat)
    found["gradients"] = size([zero.grad_partitions_flat_buffer]) + size(b.buffer for b in zero.ipg_buckets.values())
else:
    found = {"trained": size(zero.bit16_groups_flat), "frozen": size(fixed)}
    assert size(p.data for p in moved) <= found["trained"]
    found["optimizer"] = state + size(zero.single_partition_of_fp32_groups)
print(json.dumps(found))
"""
FROZEN = "backbone_interface.extractor.transformer.transformer_blocks.0"


@needs_deepspeed
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_memory_plan_is_what_deepspeed_holds(strategy: str, tmp_path: Path) -> None:
    script = tmp_path / "bytes.py"
    facts = {"OUT": str(tmp_path / "run"), "STRATEGY": strategy, "FROZEN": FROZEN}
    script.write_text("".join(f"{name} = {value!r}\n" for name, value in facts.items()) + BYTES)
    outputs = runs.Run(tmp_path, ranks=2, script=script).outputs()
    config = small_config(tmp_path).override({"run.strategy": strategy, "optim.freeze": FROZEN})
    plan = vars(memory.plan(config, (32, 64), 2))
    for text in outputs:
        found = json.loads(text.strip().splitlines()[-1])
        assert {name: plan[name] for name in found} == found
    whole = vars(memory.plan(small_config(tmp_path).override({"optim.freeze": FROZEN}), (32, 64), 2))
    # the piece that is moved, and its two moments
    assert plan["optimizer"] == pytest.approx(0.75 * whole["optimizer"], rel=0.01)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"run.strategy": "zero3", "optim.ema": "0.9"}, "optim.ema: strategy zero3 keeps no moving average"),
        ({"run.strategy": "zero2", "run.compile": "true"}, "run.compile: does not go with strategy zero2"),
        ({"run.strategy": "zero2", "run.precision": "float16"}, "float16 scales its loss"),
    ],
)
def test_what_zero_cannot_do_is_refused(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(tmp_path).override(changes)


def test_without_deepspeed_the_extra_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    config = small_config(tmp_path).override({"run.strategy": "zero2"})
    with pytest.raises(MissingExtra, match=r"deepspeed is not installed; pip install 'dit4dit\[deepspeed\]'"):
        train(config, RandomData(config.model, "libero"))
