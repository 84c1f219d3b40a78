"""One process of a small training run, for tests that kill it. Arguments: --a.b.c value, as `dit4dit train` takes them, and
--resume DIR; --die-in-save N ends the process with SIGKILL at the N-th file that it writes into a checkpoint; --hold N waits for
a signal when N steps have been taken, so that one that comes late still comes in the middle of the run.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from dit4dit.presets import preset
from dit4dit.training import loop
from dit4dit.training.config import DataConfig, LearningRates, OptimConfig, RunConfig, TrainConfig, split_words
from dit4dit.training.loop import train
from dit4dit.training.random_data import RandomData


def small_config(out: Path | str, embodiment: str = "libero") -> TrainConfig:
    """A run of seconds that still has everything: both losses, dropout, unequal masks, warm-up, decay."""
    return TrainConfig(
        model=preset("tiny").model,
        embodiment=embodiment,
        data=DataConfig(batch_size=4, workers=0, mixture="random"),
        optim=OptimConfig(learning_rate=LearningRates(1e-3, 1e-3, 1e-3), warmup_steps=4),
        run=RunConfig(
            out=str(out),
            steps=6,
            precision="float32",
            device="cpu",
            gradient_checkpointing=False,
            log_every=1,
            save_every=1000,
            eval_every=0,
            save_frozen=True,
            trackers=(),
        ),
    )


def die_in_save(count: int) -> None:
    """SIGKILL in the middle of the `count`-th safetensors file of a checkpoint: half of its bytes are there."""
    from safetensors import torch as files

    write, left = files.save_file, [count]

    def half(tensors, path, metadata=None):
        if "step_" in str(path):
            left[0] -= 1
        write(tensors, path, metadata=metadata)
        if not left[0]:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    files.save_file = half


def hold(step: int) -> None:
    """Wait before the step after `step` until a signal has come."""
    take_step, handle, came = loop.Trainer.take_step, loop.Stop.__call__, []

    def held(self, *args):
        while self.step == step and not came:
            time.sleep(0.01)
        return take_step(self, *args)

    def heard(self, *args):
        came.append(args)
        return handle(self, *args)

    loop.Trainer.take_step, loop.Stop.__call__ = held, heard


def main() -> int:
    words = split_words(sys.argv[1:])
    resume, dies, holds = (words.pop(name, None) for name in ("resume", "die-in-save", "hold"))
    config = small_config("runs").override(words)
    if dies is not None:
        die_in_save(int(dies))
    if holds is not None:
        hold(int(holds))
    return train(config, RandomData(config.model, "libero"), resume=None if resume is None else Path(resume))


if __name__ == "__main__":
    from dit4dit.errors import Dit4DitError

    try:
        sys.exit(main())
    except Dit4DitError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
