"""How much memory loading a policy takes, on checkpoints of more than 2 GB."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dit4dit.checkpoints.native import named_tensors
from dit4dit.checkpoints.published import read_run
from dit4dit.files.keys import read_yaml
from dit4dit.model.dit4dit import DiT4DiT

FILE = "checkpoints/steps_10_pytorch_model.pt"
SCRIPT = """
import json, sys, threading
from pathlib import Path
import torch
import diffusers, matplotlib, transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
from dit4dit.policy.policy import Policy

def anonymous():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

peak, stop = [0], threading.Event()
def watch():
    while not stop.wait(0.002):
        peak[0] = max(peak[0], anonymous())

before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
policy = Policy.from_pretrained(sys.argv[1], device="cpu", dtype=getattr(torch, sys.argv[2]))
stop.set()
thread.join()
kept = sum(p.numel() * p.element_size() for p in policy.model.parameters())
print(json.dumps({"kept": kept, "peak": max(peak[0], anonymous()) - before}))
"""


@pytest.fixture(scope="module", params=["text encoder", "backbone"])
def large_run(request, golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published run of over 2 GB whose weights are zeros, most of them in the part that the parameter names."""
    run = tmp_path_factory.mktemp("large") / "run"
    shutil.copytree(golden_dir / "libero_tiny", run)
    if request.param == "text encoder":
        file, key, sizes = "text_encoder", "text_config", {"vocab_size": 60_000, "intermediate_size": 5_400_000}
    else:
        file, key, sizes = "transformer", None, {"num_attention_heads": 32, "num_layers": 36}
        config = read_yaml(run / "config.yaml")
        config["framework"]["action_model"]["diffusion_model_cfg"]["cross_attention_dim"] = 1024
        config["framework"]["cosmos25"]["extract_layer"] = 35
        (run / "config.yaml").write_text(json.dumps(config))
    path = run / "cosmos" / file / "config.json"
    data = json.loads(path.read_text())
    (data if key is None else data[key]).update(sizes)
    path.write_text(json.dumps(data))
    model = read_run(run / "config.yaml", run / "cosmos").model
    with torch.device("meta"):
        shapes = named_tensors(DiT4DiT(model, with_video_vae=True))
    torch.save({name: torch.zeros(t.shape) for name, t in shapes.items()}, run / FILE)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_one_copy_of_the_weights(large_run: Path, dtype: str, tmp_path: Path) -> None:
    size = (large_run / FILE).stat().st_size
    assert size >= 2e9
    command = [sys.executable, "-c", SCRIPT, str(large_run), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert numbers["kept"] >= (0.95 if dtype == "float32" else 0.47) * size
    assert numbers["peak"] <= 1.2 * numbers["kept"], numbers
