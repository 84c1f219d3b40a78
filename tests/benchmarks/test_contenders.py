"""The engine's stages, timed one by one, are the plan's own calls."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from dit4dit.benchmarks.contenders import Inputs, Planned, random_images

from dit4dit import ops
from dit4dit.checkpoints.weights import random_model
from dit4dit.engine import Engine
from dit4dit.engine.encoder import fold_encoder
from dit4dit.ops.verdicts import call_text
from dit4dit.presets import preset
from dit4dit.robots import EMBODIMENTS

CPU = torch.device("cpu")


@pytest.mark.parametrize("apart", [False, True], ids=["as on a CPU", "as on a GPU"])
def test_the_stages_make_the_calls_of_the_step(apart: bool) -> None:
    """Their frame has the channels and the layout that a plan's preprocessing gives it."""
    chosen = preset("tiny")
    robot = EMBODIMENTS[chosen.embodiment]
    engine = Engine(random_model(chosen.model, 1, with_text=False, dtype=torch.bfloat16))
    engine.branches = apart
    engine.encoder = fold_encoder(engine.model.backbone, apart=apart)
    inputs = Inputs.random(chosen.model, len(robot.views), 0, CPU, text=False)
    images, inputs_frame = random_images(chosen.model, robot, 0, CPU, torch.bfloat16)
    planned = Planned(engine, Inputs(**{**vars(inputs), "frame": inputs_frame}), images, robot)
    functions = planned.eager()
    with torch.no_grad(), ops.listing() as wanted:
        planned.plan.compute()
    with torch.no_grad(), ops.listing() as found:
        for stage in functions.values():
            stage()
    calls = [Counter(f"{op}: {call_text(args)}" for op, args in listed) for listed in (wanted, found)]
    assert sum(calls[0].values()) > 50
    assert calls[1] == calls[0]
