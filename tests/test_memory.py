"""How much memory loading takes, on a checkpoint of more than 2 GB."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dit4dit.model import checkpoint as ck

FILE = "checkpoints/steps_10_pytorch_model.pt"
MEMORY_SCRIPT = """
import json, sys
from pathlib import Path
import torch
from dit4dit.model.checkpoint import open_checkpoint
from dit4dit.model.weights import build
from dit4dit.policy import Codec
import diffusers, transformers.models.qwen2_5_vl.modeling_qwen2_5_vl

def anonymous():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

import threading
peak, stop = [0], threading.Event()
def watch():
    while not stop.wait(0.002):
        peak[0] = max(peak[0], anonymous())

before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
opened = open_checkpoint(sys.argv[1])
kinds = {"dtype": getattr(torch, sys.argv[2]), "head_dtype": torch.float32}
model = build(opened.model, opened.tensors, "x", device=torch.device("cpu"), **kinds)
stop.set()
thread.join()
kept = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"kept": kept, "peak": max(peak[0], anonymous()) - before}))
"""


@pytest.fixture(scope="module")
def large_run(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published run of over 2 GB: the fixture with a wide text encoder, whose weights are zeros."""
    run = tmp_path_factory.mktemp("large") / "run"
    shutil.copytree(golden_dir / "libero_tiny", run)
    config = json.loads((run / "cosmos" / "text_encoder" / "config.json").read_text())
    config["text_config"] |= {"vocab_size": 60_000, "intermediate_size": 5_400_000}
    (run / "cosmos" / "text_encoder" / "config.json").write_text(json.dumps(config))
    state = torch.load(run / FILE, weights_only=True)
    for layer in range(2):
        for name, shape in (("gate", (5_400_000, 32)), ("up", (5_400_000, 32)), ("down", (32, 5_400_000))):
            state[f"{ck.TEXT}model.language_model.layers.{layer}.mlp.{name}_proj.weight"] = torch.zeros(shape)
    state[f"{ck.TEXT}model.language_model.embed_tokens.weight"] = torch.zeros(60_000, 32)
    torch.save(state, run / FILE)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_one_copy_of_the_weights(large_run: Path, dtype: str, tmp_path: Path) -> None:
    assert (large_run / FILE).stat().st_size >= 2e9
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(large_run), dtype],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert numbers["kept"] >= (4.1e9 if dtype == "float32" else 2.05e9)
    assert numbers["peak"] <= 1.2 * numbers["kept"], numbers
