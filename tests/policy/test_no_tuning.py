"""Nothing is tuned where a robot waits: a policy looks verdicts up, measures nothing, and starts nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from waiting import WAIT

SCRIPT = """
import logging, os, sys
import numpy as np
import torch  # whatever it starts when it is imported is its own

started = []
EVENTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.spawn")
sys.addaudithook(lambda event, args: started.append(event) if event in EVENTS else None)
from dit4dit import Observation, Policy, ops
from dit4dit.ops import verdicts

CPU = torch.device("cpu")
names = ("x", "y", "z", "roll", "pitch", "yaw", "pad", "gripper")

def chunks(side):
    images = {name: np.zeros((side, side, 3), np.uint8) for name in ("primary_image", "wrist_image")}
    seen = Observation(images, {name: np.zeros(1, np.float32) for name in names})
    with ops.trace() as ran:
        for seed in range(2):
            policy.infer(seen, "go", seed=seed)
    return ran["preprocess"]

policy = Policy.from_pretrained(sys.argv[1], device="cpu")
with ops.listing() as calls:
    assert chunks(40) == {"cpp"}
op, args = next(call for call in calls if call[0] == "preprocess")
found = verdicts.Verdict(op, verdicts.call_text(args), verdicts.place(CPU), "cpp", "torch", {"torch": 1.0})
verdicts.write(found, verdicts.folder(CPU))
policy = Policy.from_pretrained(sys.argv[1], device="cpu")
policy.warm_up()
assert chunks(40) == {"torch"}
assert chunks(41) == {"cpp"}, "a request that nobody has measured"
os.system("")
assert started == ["os.system"], started
print(*sorted(name for name in sys.modules if name.startswith("dit4dit.benchmarks")))
"""


def test_a_policy_measures_nothing_and_starts_no_process(small_libero: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(small_libero)]
    environment = {**os.environ, "DIT4DIT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=WAIT, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "\n", "modules that measure"
