"""A policy in a process that was forked from its own, as multiprocessing does on Linux."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from waiting import WAIT

from dit4dit import Observation, Policy
from dit4dit.errors import BackendError
from dit4dit.policy.device import pick_device

SCRIPT = """
import os, signal, sys, threading
import numpy as np, torch
from dit4dit import Observation, Policy

torch.set_num_threads(2)
policy = Policy.from_pretrained(sys.argv[1], device="cpu")
state = {key.name: np.zeros(key.dim, np.float32) for key in policy.embodiment.state}
seen = Observation({view: np.full((300, 301, 3), 9, np.uint8) for view in policy.embodiment.views}, state)
policy.prepare("kept").result()
wanted = policy.infer(seen, "kept", seed=3).normalized
torch.randn(512, 512) @ torch.randn(512, 512)  # OpenMP's threads are there

# what another thread is in the middle of when the process is forked
texts, runner = policy._texts, policy._runner
making, held, over = threading.Event(), threading.Event(), threading.Event()
embed = policy.model.embed

def slow(tokens):
    if threading.get_ident() != main:
        making.set()
        over.wait()
    return embed(tokens)

def hold():
    locks = [texts._kept._lock, runner._turn, runner._plans._lock]
    for lock in locks:
        lock.acquire()
    held.set()
    over.wait()
    for lock in locks:
        lock.release()

main = threading.get_ident()
policy.model.embed = slow
in_flight = policy.prepare("in flight")
assert making.wait(60)
threading.Thread(target=hold).start()
assert held.wait(60)
child = os.fork()
if child == 0:
    signal.alarm(100)
    policy.model.embed = embed
    made = []
    policy.model.embed = lambda tokens: made.append(1) or embed(tokens)
    assert np.allclose(policy.infer(seen, "kept", seed=3).normalized, wanted, atol=1e-5)
    assert not made, "what was kept is kept"
    for words in ("in flight", "new"):
        policy.prepare(words).result(60)
        policy.infer(seen, words, seed=3)
    assert len(made) == 2
    os._exit(0)
_, status = os.waitpid(child, 0)
over.set()
in_flight.result(60)
assert np.array_equal(policy.infer(seen, "kept", seed=3).normalized, wanted), "the child writes into no buffer of its parent"
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_prepares_and_infers(small_libero: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, small_libero]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=WAIT)
    assert done.returncode == 0, done.stderr


def test_a_forked_child_cannot_use_the_gpu_and_says_so_before_any_work(
    small_libero: Path, observation: Observation, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.from_pretrained(small_libero, device="cpu")
    policy.infer(observation, "go", seed=0)
    monkeypatch.setattr(type(policy.model), "device", property(lambda _: torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    monkeypatch.setattr(policy._runner, "run", lambda *_: pytest.fail("ran"))
    calls = [
        lambda: policy.infer(observation, "go", seed=0),
        lambda: policy.prepare("go"),
        lambda: policy.warm_up(),
        lambda: policy.embed_prompts(["go"]),
    ]
    for call in calls:
        with pytest.raises(BackendError, match=r"^policy on cuda: this process was forked .*'spawn'"):
            call()


def test_a_forked_child_cannot_load_a_policy_for_the_gpu(small_libero: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device in ("cuda", "auto"):
        with pytest.raises(BackendError, match="this process was forked"):
            Policy.from_pretrained(small_libero, device=device)
    assert pick_device("cpu").type == "cpu"
